"""Attention in PyTorch, in the shapes of checkops --bench."""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import DEVICE, TINY, attempt, replayed

SPANS, LENGTH, HEADS, DIM = (2, 16, 2, 64) if TINY else (2, 2048, 32, 128)
COPIES = 1 if TINY else 4  # more than any cache holds


def inputs(kv):
    return [[torch.randn(SPANS, n, LENGTH, DIM, device=DEVICE).bfloat16().requires_grad_() for n in (HEADS, kv, kv)]
            for _ in range(COPIES)]


def forward(kv):
    copies = inputs(kv)
    def step():
        for q, k, v in copies:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != HEADS)
    with torch.no_grad():
        return replayed(step) / COPIES


def backward(kv):
    copies = inputs(kv)
    outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != HEADS) for q, k, v in copies]
    gradient = torch.randn_like(outs[0])
    def step():
        for out, qkv in zip(outs, copies):
            torch.autograd.grad(out, qkv, gradient, retain_graph=True)
    return replayed(step) / COPIES


with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if DEVICE == "cuda" else [SDPBackend.MATH]):
    for kv in (HEADS, HEADS // 4 or 1):
        shape = "bf16, %d x %d, %d of %d heads of %d" % (SPANS, LENGTH, kv, HEADS, DIM)
        attempt("attention · " + shape, "PyTorch, flash", lambda: forward(kv))
        attempt("attention_back · " + shape, "PyTorch, flash", lambda: backward(kv))
