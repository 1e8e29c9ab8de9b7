"""Golden files for tests/test_format.c, written by the libraries that own the formats.

    pip install torch==2.5.1 transformers==4.46.3 peft==0.13.2 safetensors numpy
    python tests/golden/format.py               writes tests/golden/format/
    python tests/golden/format.py --check DIR   loads what test_format and test_format_hf wrote
                                                with PSOUP_TEST_KEEP=DIR
"""
import json
import os
import shutil
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification, MistralConfig, Qwen2Config)

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "format")
SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)


def ramp(count, dtype):
    return (torch.arange(count) % 2).bool() if dtype == torch.bool else (torch.arange(count) - 2).to(dtype)


def write_basic():
    dtypes = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16, f64=torch.float64,
                  i8=torch.int8, i16=torch.int16, i32=torch.int32, i64=torch.int64, u8=torch.uint8,
                  bool=torch.bool)
    tensors = {name: (torch.arange(6) if name == "u8" else ramp(6, dtype)).to(dtype).reshape(2, 3)
               for name, dtype in dtypes.items()}
    tensors["scalar"] = torch.tensor(7.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["naïve \"quoted\"\\名"] = torch.ones(3)
    save_file(tensors, os.path.join(HERE, "basic.safetensors"), metadata={"format": "pt", "note": "ü"})


def write_configs():
    configs = {
        "llama": LlamaConfig(**SMALL, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=True),
        "llama3": LlamaConfig(**SMALL, rope_theta=500000.0, torch_dtype="bfloat16",
                              eos_token_id=[30, 31],
                              rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                                high_freq_factor=4.0,
                                                original_max_position_embeddings=32)),
        "yarn": LlamaConfig(**SMALL, rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=24.0)),
        "mistral": MistralConfig(**SMALL, sliding_window=None, head_dim=8, torch_dtype="float16"),
        "mistral_window": MistralConfig(**SMALL, sliding_window=16),
        "qwen2": Qwen2Config(**SMALL, bos_token_id=None, eos_token_id=5),
    }
    for name, config in configs.items():
        config.save_pretrained(os.path.join(HERE, "config", name))


def write_model():
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.save_pretrained(os.path.join(HERE, "sharded"), max_shard_size="10KB")
    sums = {name: float(t.double().sum()) for name, t in model.state_dict().items()}
    with open(os.path.join(HERE, "sums.json"), "w") as f:
        json.dump(sums, f, indent=1)


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def write_adapters():
    adapters = {
        "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "patterns": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"],
                         rank_pattern={"down_proj": 2, r"layers.1.self_attn.q_proj": 3},
                         alpha_pattern={"down_proj": 5}),
        "regex": dict(r=2, lora_alpha=4, target_modules=r".*layers\.[01]\.mlp\.(up|gate)_proj",
                      rank_pattern={r"layers\.\d+.*up_proj": 3}),
    }
    scales = {}
    for name, options in adapters.items():
        torch.manual_seed(2)
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)),
                               LoraConfig(task_type="CAUSAL_LM", **options))
        randomise(model, 3)
        model.save_pretrained(os.path.join(HERE, "adapter", name))
        scales[name] = {key.removeprefix("base_model.model."): module.scaling["default"]
                        for key, module in model.named_modules() if hasattr(module, "lora_A")}
    config = LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)
    model = get_peft_model(LlamaForSequenceClassification(config),
                           LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["q_proj"]))
    randomise(model, 4)
    model.save_pretrained(os.path.join(HERE, "adapter", "reward"))
    with open(os.path.join(HERE, "scales.json"), "w") as f:
        json.dump(scales, f, indent=1)
    for root, _, files in os.walk(HERE):
        if "README.md" in files:
            os.remove(os.path.join(root, "README.md"))


def check(directory):
    path = os.path.join(directory, "ours.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "a key": "a \"value\""}, f.metadata()
    assert torch.equal(tensors["f32"], torch.arange(6).float().reshape(2, 3) / 2)
    assert tensors["f16"].dtype == torch.float16 and tensors["f16"].shape == (2,)
    assert torch.equal(tensors["f16"], torch.tensor([1.0, -2.0]).half())
    assert tensors["scalar"].shape == () and tensors["scalar"].item() == 42
    assert tensors["empty"].shape == (0, 3)
    for name in ["llama", "llama3", "yarn", "qwen2"]:
        ours = AutoConfig.from_pretrained(os.path.join(directory, "config", name))
        theirs = AutoConfig.from_pretrained(os.path.join(HERE, "config", name))
        assert ours.model_type == theirs.model_type
        for field in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                      "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                      "rms_norm_eps", "rope_theta", "tie_word_embeddings", "torch_dtype", "hidden_act"]:
            a, b = getattr(ours, field), getattr(theirs, field)
            assert a == b or (field == "torch_dtype" and b is None), (name, field, a, b)
        rope = theirs.rope_scaling or {}
        for key, value in rope.items():
            assert ours.rope_scaling[key] == value, (name, key)
        with torch.no_grad():
            AutoModelForCausalLM.from_config(ours)(torch.tensor([[1, 2, 3]]))
    for name in ["plain", "patterns", "regex", "reward"]:
        ours = load_file(os.path.join(directory, "adapter", name, "adapter_model.safetensors"))
        theirs = load_file(os.path.join(HERE, "adapter", name, "adapter_model.safetensors"))
        assert ours.keys() == theirs.keys(), name
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        if name == "reward":
            base = LlamaForSequenceClassification
            config = LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)
        else:
            base, config = LlamaForCausalLM, LlamaConfig(**SMALL)
        logits = []
        for place in [directory, HERE]:
            torch.manual_seed(5)
            model = PeftModel.from_pretrained(base(config), os.path.join(place, "adapter", name)).eval()
            with torch.no_grad():
                logits.append(model(torch.tensor([[1, 2, 3, 9]])).logits)
        assert torch.allclose(logits[0], logits[1], atol=1e-6), name
        assert float(logits[0].abs().max()) > 0
    print("read by their libraries:", directory)


if len(sys.argv) == 3 and sys.argv[1] == "--check":
    check(sys.argv[2])
else:
    shutil.rmtree(HERE, ignore_errors=True)
    os.makedirs(HERE)
    write_basic()
    write_configs()
    write_model()
    write_adapters()
