"""Golden files for tests/test_quant.c: bitsandbytes' nf4 and int8, and models that transformers saved in them.

    pip install torch==2.15.0 bitsandbytes==0.50.2 transformers==5.24.0 accelerate==1.15.0 safetensors numpy
    python tests/golden/quant.py            writes tests/golden/quant (on the CPU; bitsandbytes' own code)
    python tests/golden/quant.py --errors   prints the error of each format on normal weights

blocks.safetensors: numbers, and what bitsandbytes makes of them: nf4 of blocks of 64 (quantize_4bit), and int8 with
every block for a row (int8_vectorwise_quant). nf4, double, int8: models saved with a quantization_config, each with
logits.safetensors of the same weights, dequantised by bitsandbytes, in a float64 model.
"""
import os
import shutil
import sys
import tempfile

import bitsandbytes.functional as F
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "quant")
SHAPES = [(4, 64), (7, 48), (3, 37), (5, 128), (1, 1)]


def nf4_values(codes, state):
    """Blocks run through a matrix whatever its rows. bitsandbytes' kernel for CPUs begins one with every row, unlike
    its others, so it is given a matrix of one row."""
    shape = state.shape
    state.shape = torch.Size([1, shape.numel()])
    return F.dequantize_4bit(codes, state).reshape(shape)


def blocks():
    out = {}
    for number, shape in enumerate(SHAPES):
        x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
        x[0, 0] *= 8  # an outlier
        codes, state = F.quantize_4bit(x, blocksize=64, quant_type="nf4")
        out["%d.in" % number] = x
        out["%d.nf4.codes" % number] = codes.flatten()
        out["%d.nf4.scales" % number] = state.absmax
        out["%d.nf4.values" % number] = nf4_values(codes, state)
        if x.numel() % 64 == 0:
            codes, stats, _ = F.int8_vectorwise_quant(x.reshape(-1, 64))
            out["%d.int8.codes" % number] = codes.flatten()
            out["%d.int8.scales" % number] = stats  # max|x| of a row
            out["%d.int8.values" % number] = F.int8_vectorwise_dequant(codes, stats).reshape(shape)
    save_file({k: v.contiguous() for k, v in out.items()}, os.path.join(HERE, "blocks.safetensors"))


def dequantised(tensors):
    """The state dict of a plain model, by bitsandbytes' own functions."""
    out = {}
    for name, value in tensors.items():
        if ".weight." in name or name.endswith(("SCB", "weight_format")):
            continue
        parts = {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(name + ".")}
        if "absmax" in parts:
            value = nf4_values(value, F.QuantState.from_dict(parts, device="cpu"))
        elif value.dtype == torch.int8:
            value = F.int8_vectorwise_dequant(value, tensors[name.replace("weight", "SCB")])
        out[name] = value.double()
    return out


def model(kind, hidden, intermediate, **how):
    config = LlamaConfig(vocab_size=40, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         initializer_range=0.2, dtype="float32")
    directory = os.path.join(HERE, kind)
    with tempfile.TemporaryDirectory() as plain:
        LlamaForCausalLM(config).save_pretrained(plain)
        quantised = AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**how),
                                                         device_map="cpu", dtype=torch.float32)
        quantised.save_pretrained(directory)
    os.remove(os.path.join(directory, "generation_config.json"))
    wide = LlamaForCausalLM(config).double()
    wide.load_state_dict(dequantised(load_file(os.path.join(directory, "model.safetensors"))))
    tokens = torch.randint(3, 40, (1, 12))
    with torch.no_grad():
        logits = wide(tokens).logits[0]
    save_file({"tokens": tokens[0].int(), "logits": logits.float()}, os.path.join(directory, "logits.safetensors"))


def errors():
    """Root mean square of the error, over that of the weights, in blocks of 64."""
    x = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1))
    codes, state = F.quantize_4bit(x, blocksize=64, quant_type="nf4")
    dynamic, dynamic_state = F.quantize_blockwise(x, blocksize=64)
    rows, stats, _ = F.int8_vectorwise_quant(x.reshape(-1, 64))
    for name, values in [("nf4", F.dequantize_4bit(codes, state)),
                         ("int8, 127 steps to max|x|", F.int8_vectorwise_dequant(rows, stats)),
                         ("int8, bitsandbytes' dynamic map", F.dequantize_blockwise(dynamic, dynamic_state))]:
        print("%-32s %.4f" % (name, ((values.reshape(-1) - x).norm() / x.norm()).item()))


if "--errors" in sys.argv:
    errors()
    sys.exit()
torch.manual_seed(5)
shutil.rmtree(HERE, ignore_errors=True)
os.makedirs(HERE)
blocks()
model("nf4", 48, 112, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model("double", 64, 128, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
      bnb_4bit_compute_dtype=torch.float32)
model("int8", 64, 128, load_in_8bit=True)
