#!/usr/bin/env python3
"""Golden files of the model room: tiny random LLaMA models, PEFT adapters, and what transformers,
autograd and finite differences say of them, computed in float64 on the stored weights.

    pip install torch==2.5.* transformers==4.46.* peft==0.13.* safetensors
    python tests/golden/model.py                 writes tests/golden/model/
    python tests/golden/model.py --verify DIR    loads DIR/adapter, which test_model_files --write DIR
                                                 wrote, into PEFT over DIR/base and compares with
                                                 DIR/logits.safetensors
"""
import argparse
import json
import os
import shutil

import numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model")
SIZES = dict(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             rms_norm_eps=1e-5, initializer_range=0.15, bos_token_id=1, eos_token_id=2)
SCALED = ("llama3", "linear", "yarn", "dynamic")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(kind):
    if kind == "plain":
        return LlamaConfig(**SIZES), torch.bfloat16
    small = {**SIZES, "num_hidden_layers": 1}
    if kind == "qwen2":
        return Qwen2Config(**small, tie_word_embeddings=True), torch.bfloat16
    if kind == "biases":
        return LlamaConfig(**small, attention_bias=True, mlp_bias=True), torch.float16
    scaling = {
        "tied": None,
        "llama3": dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=32),
        "linear": dict(rope_type="linear", factor=2.0),
        "yarn": dict(rope_type="yarn", factor=4.0),
        "dynamic": dict(rope_type="dynamic", factor=2.0),
    }[kind]
    return LlamaConfig(**small, tie_word_embeddings=True, head_dim=16,
                       rope_scaling=scaling), torch.bfloat16


def build(kind, seed):
    torch.manual_seed(seed)
    config, dtype = make(kind)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # norms and biases that show when they are left out
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
    path = os.path.join(HERE, kind)
    model.to(dtype).save_pretrained(path)
    os.path.exists(os.path.join(path, "generation_config.json")) and os.remove(
        os.path.join(path, "generation_config.json"))
    return path


def whole_float64():
    """transformers computes its norms and softmax in f32 whatever the weights are: here they keep
    float64, which differences need."""
    softmax = torch.nn.functional.softmax

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    LlamaRMSNorm.forward = Qwen2RMSNorm.forward = norm
    torch.nn.functional.softmax = lambda x, dim, dtype=None: softmax(
        x, dim, dtype=None if x.dtype == torch.float64 else dtype)


def oracle(path):
    """The model in float64; its rope buffers stay what transformers makes them, f32."""
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32,
                                                 attn_implementation="eager")
    return model.double().eval()


def token_rows(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 80, (n,), generator=g) for n in (17, 1, 60, 8)]


def logprobs(model, rows):
    out = []
    for row in rows:
        lp = torch.log_softmax(model(row[None]).logits[0], -1)
        out.append(lp[:-1].gather(1, row[1:, None])[:, 0])
    return torch.cat(out)


def f32(t):
    return t.detach().to(torch.float32).contiguous()


def signs(n):
    """A direction of n ones and minus ones, made from the index; sign_of in test_model.c is its twin."""
    h = numpy.arange(n, dtype=numpy.uint32) * numpy.uint32(0x9E3779B1)
    h = (h ^ (h >> 15)) * numpy.uint32(0x85EBCA77)
    return torch.from_numpy(1.0 - 2.0 * ((h ^ (h >> 13)) & 1).astype(numpy.float64))


def difference(objective, p, step=1e-5):
    """d objective(p + t · signs) / dt at 0 as a central difference; p's zeros stay when p is the mix.
    Held against autograd's gradient, which p.grad has, before it is written."""
    direction, old, sides = signs(p.numel()).reshape(p.shape), p.data.clone(), []
    if p.shape[1:] == (2,):
        direction = direction * (old != 0)
    with torch.no_grad():
        for t in (step, -step):
            p.copy_(old + t * direction)
            sides.append(objective())
        p.copy_(old)
    slope = (sides[0] - sides[1]) / (2 * step)
    assert abs(slope - (p.grad * direction).sum()) < 1e-6 * p.grad.norm()
    return f32(slope.reshape(1))


def adapters():
    """Two adapters over `plain`: all linears with rsLoRA, and q, v with patterned ranks."""
    base = os.path.join(HERE, "plain")
    specs = {"all": dict(r=2, lora_alpha=8, target_modules=ALL, use_rslora=True),
             "qv": dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"],
                        rank_pattern={"layers.1.self_attn.v_proj": 2},
                        alpha_pattern={"layers.1.self_attn.v_proj": 7})}
    for i, (name, spec) in enumerate(specs.items()):
        torch.manual_seed(40 + i)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                               LoraConfig(task_type="CAUSAL_LM", **spec))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_" in n:
                    p.normal_(0, 0.2)
        model.save_pretrained(os.path.join(HERE, "adapter_" + name))
        readme = os.path.join(HERE, "adapter_" + name, "README.md")
        os.path.exists(readme) and os.remove(readme)


class MixedLinear(torch.nn.Module):
    """The mix as the definition has it: W x + Σ mix_i · scale_i · B_i A_i x."""

    def __init__(self, base, pairs, mix):
        super().__init__()
        self.base, self.pairs, self.mix = base, pairs, mix

    def forward(self, x):
        y = self.base(x)
        for i, (a, b, scale) in self.pairs.items():
            y = y + self.mix[0][i] * scale * (x @ a.T @ b.T)
        return y


def mixed_model(names):
    """plain in float64 with every adapter's factors as leaves; returns model, leaves, mix holder."""
    model, leaves, holder = oracle(os.path.join(HERE, "plain")), {}, [None]
    for i, name in enumerate(names):
        path = os.path.join(HERE, "adapter_" + name)
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
            os.path.join(HERE, "plain")), path)
        for module, layer in peft.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            short = module.replace("base_model.model.", "", 1)
            a = layer.lora_A["default"].weight.detach().double().requires_grad_()
            b = layer.lora_B["default"].weight.detach().double().requires_grad_()
            leaves[f"{name}/{short}.lora_A"], leaves[f"{name}/{short}.lora_B"] = a, b
            parent, leaf = short.rsplit(".", 1)
            parent = model.get_submodule(parent)
            current = getattr(parent, leaf)
            if not isinstance(current, MixedLinear):
                current = MixedLinear(current, {}, holder)
                setattr(parent, leaf, current)
            current.pairs[i] = (a, b, layer.scaling["default"])
    return model, leaves, holder


def golden_base(kind):
    path = build(kind, seed=7)
    model, rows = oracle(path), token_rows(5)
    with torch.no_grad():
        logits = torch.cat([model(r[None]).logits[0] for r in rows])
    out = {"tokens": torch.cat(rows).int(), "lengths": torch.tensor([len(r) for r in rows]).int(),
           "logits": f32(logits[::8])}  # every eighth position
    if kind in ("plain", "biases", "tied", "qwen2"):
        weights = torch.linspace(-1, 1, sum(len(r) - 1 for r in rows), dtype=torch.float64)
        objective = lambda: (weights * logprobs(model, rows)).sum()
        objective().backward()
        out["weights"] = f32(weights)
        for name, p in model.named_parameters():
            out["fd:" + name] = difference(objective, p)
            if kind == "plain" or p.dim() == 1 or "embed" in name:  # elsewhere only what is new
                out["grad:" + name] = f32(p.grad)
    save_file(out, os.path.join(HERE, kind, "golden.safetensors"))
    if kind in SCALED:  # the weights of "tied", which the test puts beside it
        tied, own = (load_file(os.path.join(HERE, k, "model.safetensors")) for k in ("tied", kind))
        assert all(torch.equal(tied[name], own[name]) for name in own)
        os.remove(os.path.join(path, "model.safetensors"))


def golden_mix():
    names, rows = ["all", "qv"], token_rows(6)
    mix = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.3, 0.7], [0.0, 1.0]], dtype=torch.float64)
    model, leaves, holder = mixed_model(names)
    mix.requires_grad_()
    weights = torch.linspace(-1, 1.5, sum(len(r) - 1 for r in rows), dtype=torch.float64)
    logits = []

    def objective():
        at, loss = 0, 0
        logits.clear()
        for i, row in enumerate(rows):
            holder[0] = mix[i]
            full = model(row[None]).logits[0]
            logits.append(full)
            lp = torch.log_softmax(full, -1)[:-1].gather(1, row[1:, None])[:, 0]
            loss = loss + (weights[at:at + len(row) - 1] * lp).sum()
            at += len(row) - 1
        return loss

    objective().backward()
    out = {"tokens": torch.cat(rows).int(), "lengths": torch.tensor([len(r) for r in rows]).int(),
           "mix": f32(mix), "weights": f32(weights), "logits": f32(torch.cat(logits)[::8]),
           "mixgrad": f32(mix.grad * (mix != 0)), "fd:mix": difference(objective, mix)}
    for name, p in leaves.items():
        out["grad:" + name], out["fd:" + name] = f32(p.grad), difference(objective, p)
    save_file(out, os.path.join(HERE, "mix.safetensors"))


def verify(directory):
    base = AutoModelForCausalLM.from_pretrained(os.path.join(directory, "base"),
                                                torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(base, os.path.join(directory, "adapter")).double().eval()
    ours = load_file(os.path.join(directory, "logits.safetensors"))
    with torch.no_grad():
        theirs = model(ours["tokens"].long()[None]).logits[0]
    worst = (theirs - ours["logits"].double()).abs().max().item()
    print(f"largest difference of a logit: {worst:.3g}")
    raise SystemExit(worst > 1e-4)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--verify", metavar="DIR")
    options = parser.parse_args()
    whole_float64()
    if options.verify:
        verify(options.verify)
    shutil.rmtree(HERE, ignore_errors=True)
    os.makedirs(HERE)
    for kind in ("plain", "tied", "biases", "qwen2", *SCALED):
        golden_base(kind)
    adapters()
    golden_mix()
    for path, _, files in os.walk(HERE):  # no machine's paths in what is kept
        for name in files:
            if name.endswith(".json"):
                full = os.path.join(path, name)
                data = json.load(open(full))
                for key in ("_name_or_path", "base_model_name_or_path"):
                    if key in data:
                        data[key] = "plain"
                if "target_modules" in data:
                    data["target_modules"].sort()  # a set's order is another each time
                json.dump(data, open(full, "w"), indent=1)


if __name__ == "__main__":
    main()
