"""Golden file for tests/test_dtypes.c: torch's 8-bit floats and the gguf package's q8_0.

    pip install torch==2.5.1 gguf==0.19.0 safetensors numpy
    python tests/golden/dtypes.py      writes tests/golden/dtypes/dtypes.safetensors
"""
import os

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import save_file

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dtypes")
KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def beside(values):
    """Each value with its two neighbours in f32."""
    values = np.float32(values)
    return np.concatenate([values, np.nextafter(values, np.float32(np.inf)),
                           np.nextafter(values, np.float32(-np.inf))])


def inputs(kind, rng):
    codes = torch.arange(256, dtype=torch.uint8).view(kind).float().numpy()
    finite = np.unique(codes[np.isfinite(codes)])
    step = finite[-1] - finite[-2]
    ties = np.concatenate([(finite[1:] + finite[:-1]) / 2, [finite[-1] + step / 2, -finite[-1] - step / 2,
                                                           finite[-1] + step, finite[-1] * 4]])
    bits = rng.integers(0, 2**32, 400, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([beside(finite), beside(ties), bits,
                           np.float32([np.inf, -np.inf, np.nan, -np.nan, 1e38, -1e38, 1e-45])])


def q8_inputs(rng):
    blocks = [rng.standard_normal(32) * s for s in (1e-3, 1, 30, 1e4, 6e4, 1e-9, 1e-34)]
    blocks += [np.zeros(32), -np.zeros(32), np.full(32, 127.0), np.full(32, -3.0)]
    for scale in (1.0, 0.25, 3.0, 0.1):  # halves of a step, which round away from zero
        blocks.append(np.concatenate([[127.0], np.arange(31) - 15.5]) * scale)
    blocks.append(np.concatenate([beside(np.arange(10) + 0.5), [127, -127]]))
    blocks.append(np.eye(32)[5] * 8.3e6)  # near the largest scale that an f16 holds
    return np.float32(np.stack(blocks))


def main():
    rng = np.random.default_rng(7)
    tensors = {}
    for name, kind in KINDS.items():
        x = torch.from_numpy(inputs(kind, rng))
        tensors[f"{name}.codes"] = torch.arange(256, dtype=torch.uint8).view(kind)
        tensors[f"{name}.values"] = torch.arange(256, dtype=torch.uint8).view(kind).float()
        tensors[f"{name}.in"] = x
        tensors[f"{name}.out"] = x.to(kind)
    x = q8_inputs(rng)
    packed = quants.quantize(x, GGMLQuantizationType.Q8_0)
    tensors["q8_0.in"] = torch.from_numpy(x)
    tensors["q8_0.out"] = torch.from_numpy(packed)
    tensors["q8_0.back"] = torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.Q8_0))
    os.makedirs(HERE, exist_ok=True)
    save_file(tensors, os.path.join(HERE, "dtypes.safetensors"))


main()
