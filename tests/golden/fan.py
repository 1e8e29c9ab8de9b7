"""Golden files for tests/test_merge_fan.c: a GPT-2, whose linears keep their weights as [in, out] (Conv1D), two
adapters with fan_in_fan_out, and what PEFT folds them to.

    pip install torch==2.5.1 transformers==4.46.3 peft==0.13.2 safetensors numpy
    python tests/golden/fan.py               writes tests/golden/fan/
    python tests/golden/fan.py --check DIR   loads what test_merge_fan wrote with PSOUP_TEST_KEEP=DIR
"""
import json
import os
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fan")
WEIGHTS = {"a": 0.3, "b": 0.7}


def base():
    return GPT2LMHeadModel.from_pretrained(os.path.join(HERE, "base"), torch_dtype=torch.float32).eval()


def folded(adapters):
    """base + Σ w · ΔW by PEFT's own get_delta_weight, and so by its transpose."""
    model, delta = base(), {}
    for name, weight in adapters.items():
        peft = PeftModel.from_pretrained(base(), os.path.join(HERE, name))
        for key, module in peft.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta[key] = delta.get(key, 0) + weight * module.get_delta_weight("default").double()
    state = model.state_dict()
    return {f"{k}.weight": (state[f"{k}.weight"].double() + d).float().contiguous() for k, d in delta.items()}


def write():
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(os.path.join(HERE, "base"))
    for name, rank in (("a", 2), ("b", 3)):
        peft = get_peft_model(base(), LoraConfig(r=rank, lora_alpha=5, fan_in_fan_out=True,
                                                 target_modules=["c_attn", "c_proj"]))
        for key, p in peft.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.3)
        peft.save_pretrained(os.path.join(HERE, name))
        path = os.path.join(HERE, name, "adapter_config.json")
        with open(path) as f:
            settings = json.load(f)
        settings["base_model_name_or_path"] = "gpt2"
        with open(path, "w") as f:
            json.dump(settings, f, indent=1, sort_keys=True)
        os.remove(os.path.join(HERE, name, "README.md"))
    os.remove(os.path.join(HERE, "base", "generation_config.json"))
    save_file(folded(WEIGHTS), os.path.join(HERE, "folded.safetensors"))


def check(directory):
    expected = load_file(os.path.join(HERE, "folded.safetensors"))
    peft = PeftModel.from_pretrained(base(), os.path.join(directory, "soup")).merge_and_unload().state_dict()
    model = GPT2LMHeadModel.from_pretrained(os.path.join(directory, "folded")).state_dict()
    for key, want in expected.items():
        print(key, float((peft[key] - want).abs().max()), float((model[key] - want).abs().max()))


check(sys.argv[2]) if len(sys.argv) > 2 else write()
