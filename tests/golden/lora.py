#!/usr/bin/env python3
"""Golden files of LoRA's variants in training: PEFT adapters over tests/golden/model/plain, the gradient that autograd
gives each of their factors, and their weights after steps of torch.optim.AdamW, computed in float64.

    pip install torch transformers==4.57.* peft safetensors
    python tests/golden/lora.py                writes tests/golden/lora/
    python tests/golden/lora.py --verify DIR   loads each DIR/VARIANT, which test_train_lora --write DIR wrote after
                                               training, into PEFT, and compares its factors, scales and logits
"""
import json
import os
import shutil
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model as base

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "lora")
PLAIN = os.path.join(base.HERE, "plain")
VARIANTS = {
    "all": dict(r=2, lora_alpha=5, target_modules=base.ALL),
    "o_down": dict(r=3, lora_alpha=6, target_modules=["o_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=3, target_modules=["k_proj", "o_proj", "up_proj"], use_rslora=True),
    "patterns": dict(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"],
                     rank_pattern={"gate_proj": 3, "layers.1.self_attn.q_proj": 1},
                     alpha_pattern={"o_proj": 7, "layers.0.mlp.down_proj": 1}),
    "rslora_patterns": dict(r=2, lora_alpha=4, target_modules=["v_proj", "down_proj"], use_rslora=True,
                            rank_pattern={"down_proj": 3}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
}
STEPS, RATE, DECAY = 3, 1e-2, 0.1


def write_adapter(name, seed):
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(PLAIN), LoraConfig(task_type="CAUSAL_LM",
                                                                                   **VARIANTS[name]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(0, 0.2)
    path = os.path.join(HERE, name)
    model.save_pretrained(path)
    for other in os.listdir(path):
        if other not in ("adapter_config.json", "adapter_model.safetensors"):
            os.remove(os.path.join(path, other))
    config = json.load(open(os.path.join(path, "adapter_config.json")))
    config["base_model_name_or_path"] = "plain"
    config["target_modules"].sort()
    json.dump(config, open(os.path.join(path, "adapter_config.json"), "w"), indent=1)
    return path


def load(path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
        PLAIN, torch_dtype=torch.float32, attn_implementation="eager"), path, is_trainable=True).double().eval()


def factors(model):
    return {n.replace("base_model.model.", "").replace(".default.weight", ""): p
            for n, p in model.named_parameters() if "lora_" in n}


def loss(model, rows):
    """The mean over all tokens but each row's first."""
    return -base.logprobs(model, rows).mean()


def golden(name, seed):
    model, rows = load(write_adapter(name, seed)), base.token_rows(9)
    leaves, out = factors(model), {}
    optimizer = torch.optim.AdamW(leaves.values(), lr=RATE, eps=1e-8, weight_decay=DECAY)
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, rows)
        value.backward()
        if step == 0:
            out.update({"grad:" + n: base.f32(p.grad) for n, p in leaves.items()})
            out["loss"] = base.f32(value.reshape(1))
        optimizer.step()
    out.update({"after:" + n: base.f32(p) for n, p in leaves.items()})
    return {name + "/" + key: tensor for key, tensor in out.items()}


def verify(directory):
    rows, after = base.token_rows(9), load_file(os.path.join(HERE, "golden.safetensors"))
    for name in VARIANTS:
        trained, started = load(os.path.join(directory, name)), load(os.path.join(HERE, name))
        scales = [{n: layer.scaling["default"] for n, layer in m.named_modules() if hasattr(layer, "lora_A")}
                  for m in (trained, started)]
        worst = max(((p - after[name + "/after:" + n].double()).norm() / p.norm()).item()
                    for n, p in factors(trained).items())
        with torch.no_grad():
            ours = torch.from_file(os.path.join(directory, name + ".f32"), size=sum(len(r) - 1 for r in rows)).double()
            off = (ours - base.logprobs(trained, rows)).abs().max().item()
        print(f"{name}: scales {'equal' if scales[0] == scales[1] else 'differ'}, factors within {worst:.2g}, "
              f"log-probabilities within {off:.2g}")
        if scales[0] != scales[1] or not worst < 1e-4 or not off < 1e-4:
            raise SystemExit(1)


def main():
    base.whole_float64()
    if sys.argv[1:2] == ["--verify"]:
        return verify(sys.argv[2])
    shutil.rmtree(HERE, ignore_errors=True)
    os.makedirs(HERE)
    out, rows = {}, base.token_rows(9)
    for seed, name in enumerate(VARIANTS):
        out.update(golden(name, 60 + seed))
    out["tokens"], out["lengths"] = torch.cat(rows).int(), torch.tensor([len(r) for r in rows]).int()
    save_file(out, os.path.join(HERE, "golden.safetensors"))


if __name__ == "__main__":
    main()
