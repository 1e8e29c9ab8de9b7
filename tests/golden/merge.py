"""Golden files for tests/test_merge_files.c: three adapters of a tiny base, and what PEFT and numpy merge
them to.

    pip install torch==2.5.1 transformers==4.46.3 peft==0.13.2 safetensors numpy
    python tests/golden/merge.py               writes tests/golden/merge/
    python tests/golden/merge.py --check DIR   loads what test_merge_files wrote with PSOUP_TEST_KEEP=DIR
"""
import json
import os
import shutil
import sys

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "merge")
CONFIG = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
ADAPTERS = {  # a and b: equal ranks and scales; c: others
    "a": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "b": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "c": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"]),
}
TWO, THREE = {"a": 0.3, "b": 0.7}, {"a": 0.5, "b": 0.3, "c": 0.2}
RANK = 3


def peft_weights(kind):
    """PEFT 0.13's "svd" multiplies by the scale (2 for a and b) twice: once here, once in the delta."""
    return [w / 2 if kind == "svd" else w for w in TWO.values()]


def save(model, name):
    model.save_pretrained(os.path.join(HERE, name))
    path = os.path.join(HERE, name, "adapter_config.json")
    if os.path.exists(path):
        with open(path) as f:
            config = json.load(f) | {"base_model_name_or_path": "base"}
        with open(path, "w") as f:
            json.dump(config, f, indent=2, sort_keys=True)
    for junk in ["README.md", "generation_config.json"]:
        if os.path.exists(os.path.join(HERE, name, junk)):
            os.remove(os.path.join(HERE, name, junk))


def base():
    return AutoModelForCausalLM.from_pretrained(os.path.join(HERE, "base"))


def write_inputs():
    torch.manual_seed(1)
    save(LlamaForCausalLM(LlamaConfig(**CONFIG)), "base")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        save(model, name)
    for seed in [11, 12]:  # full models in bf16
        torch.manual_seed(seed)
        save(LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16(), f"model{seed}")


def together(weights):
    names = list(weights)
    model = PeftModel.from_pretrained(base(), os.path.join(HERE, names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(os.path.join(HERE, name), adapter_name=name)
    return model


def deltas(model, name):
    """Module name -> dense float64 change that the adapter makes."""
    out = {}
    for key, module in model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            a, b = module.lora_A[name].weight.data, module.lora_B[name].weight.data
            out[key.removeprefix("base_model.model.")] = (b.double() @ a.double()
                                                          * module.scaling[name]).contiguous()
    return out


def write_expected():
    facts = {}
    for kind in ["cat", "linear", "svd"]:  # as PEFT does it
        model = together(TWO)
        model.add_weighted_adapter(list(TWO), peft_weights(kind), "merged", combination_type=kind,
                                   **({"svd_rank": RANK} if kind == "svd" else {}))
        save_file({k: v.float() for k, v in deltas(model, "merged").items()},
                  os.path.join(HERE, f"{kind}.safetensors"))
        if kind == "cat":
            model.set_adapter("merged")
            save_file({k: v.contiguous() for k, v in model.merge_and_unload().state_dict().items()},
                      os.path.join(HERE, "unloaded.safetensors"))
    model = together(THREE)
    sums, errors = {}, {}
    for name, weight in THREE.items():
        for key, delta in deltas(model, name).items():
            sums[key] = sums.get(key, 0) + weight * delta
    whole = load_file(os.path.join(HERE, "base", "model.safetensors"))
    folded = {k: v.double() for k, v in whole.items()}
    for key, delta in sums.items():
        folded[key + ".weight"] = folded[key + ".weight"] + delta
        s = np.linalg.svd(delta.numpy(), compute_uv=False)
        errors[key] = float(np.sqrt((s[RANK:] ** 2).sum() / (s ** 2).sum()))
    save_file({k: folded[k + ".weight"] for k in sums}, os.path.join(HERE, "folded.safetensors"))
    facts["svd_errors"] = errors  # of the best rank 3, by numpy
    model = together(TWO)
    worst = 0.0
    for key, module in model.named_modules():  # factors: s (Σ w B)(Σ w A) against delta
        if hasattr(module, "lora_A"):
            a = {n: module.lora_A[n].weight.data.double() for n in TWO}
            b = {n: module.lora_B[n].weight.data.double() for n in TWO}
            exact = sum(w * 2 * b[n] @ a[n] for n, w in TWO.items())
            factors = 2 * sum(w * b[n] for n, w in TWO.items()) @ sum(w * a[n] for n, w in TWO.items())
            worst = max(worst, float((factors - exact).norm() / exact.norm()))
    facts["factors_worst"] = worst
    with open(os.path.join(HERE, "facts.json"), "w") as f:
        json.dump(facts, f, indent=1)
    one, two = (load_file(os.path.join(HERE, f"model{seed}", "model.safetensors")) for seed in [11, 12])
    total = {k: (one[k].float() * np.float32(0.37) + two[k].float() * np.float32(0.63)).bfloat16()
             for k in one}
    save_file(total, os.path.join(HERE, "models.safetensors"))


def check(directory):
    tokens = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        model = together(TWO)
        model.add_weighted_adapter(list(TWO), list(TWO.values()), "merged", combination_type="cat")
        model.set_adapter("merged")
        expected = model(tokens).logits
        adapter = PeftModel.from_pretrained(base(), os.path.join(directory, "cat"))
        assert torch.allclose(adapter(tokens).logits, expected, atol=1e-5)
        plain = base()(tokens).logits
        assert not torch.allclose(plain, expected, atol=1e-2)
        folded = AutoModelForCausalLM.from_pretrained(os.path.join(directory, "unloaded"))
        assert torch.allclose(folded(tokens).logits, expected, atol=1e-5)
        model = together(TWO)
        model.add_weighted_adapter(list(TWO), peft_weights("svd"), "merged", combination_type="svd",
                                   svd_rank=RANK)
        model.set_adapter("merged")
        adapter = PeftModel.from_pretrained(base(), os.path.join(directory, "svd"))
        assert torch.allclose(adapter(tokens).logits, model(tokens).logits, atol=1e-4)
        summed = AutoModelForCausalLM.from_pretrained(os.path.join(directory, "models"),
                                                      torch_dtype="auto")
        assert summed.dtype == torch.bfloat16 and summed(tokens).logits.isfinite().all()
    print("read by their libraries:", directory)


if len(sys.argv) == 3 and sys.argv[1] == "--check":
    check(sys.argv[2])
else:
    shutil.rmtree(HERE, ignore_errors=True)
    os.makedirs(HERE)
    write_inputs()
    write_expected()
