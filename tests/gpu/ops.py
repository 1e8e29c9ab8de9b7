"""Ops with a goal in PyTorch, in the shapes of checkops --bench."""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import DEVICE, TINY, attempt, replayed, sums

ROWS, WIDTH, FFN, PARAMETERS = (32, 128, 192, 1 << 12) if TINY else (4096, 4096, 11008, 1 << 27)
SPANS, LENGTH, HEADS, DIM = (2, 16, 2, 64) if TINY else (2, 2048, 32, 128)
BATCH, CONTEXT = (4, 24) if TINY else (64, 512)
KEY_HEADS = (HEADS, HEADS // 4 or 1)
COPIES = 1 if TINY else 4  # more than any cache holds


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def both(key, copies, function):
    """As it is written, and compiled."""
    def of(f):
        def step():
            for inputs in copies:
                f(*inputs)
        return lambda: replayed(step) / len(copies)
    with torch.no_grad():
        attempt(key, "PyTorch", of(function))
        if not TINY:
            attempt(key, "PyTorch, torch.compile", of(torch.compile(function)))


# ---- what memory bounds ------------------------------------------------------------------------------------


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def layers():
    weight, shape = normal(WIDTH), "%d rows of %d"
    norm = lambda x: F.rms_norm(x, (WIDTH,), weight, 1e-5)
    def residual_norm(x, y):
        x = x + y
        return x, norm(x)
    both("rmsnorm · " + shape % (ROWS, WIDTH), [(normal(ROWS, WIDTH),) for _ in range(COPIES)], norm)
    both("rmsnorm · " + shape % (ROWS, WIDTH) + ", with a residual",
         [(normal(ROWS, WIDTH), normal(ROWS, WIDTH)) for _ in range(COPIES)], residual_norm)
    angle = torch.outer(torch.arange(ROWS, device=DEVICE) % LENGTH,
                        10000.0 ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM))[:, None]
    both("rope · " + shape % (ROWS, WIDTH), [(normal(ROWS, HEADS, DIM), angle.cos(), angle.sin()) for _ in range(COPIES)],
         turn)
    both("swiglu · " + shape % (ROWS, FFN), [(normal(ROWS, FFN), normal(ROWS, FFN)) for _ in range(COPIES)],
         lambda gate, up: F.silu(gate) * up)


def adamw():
    p = normal(PARAMETERS).requires_grad_()
    p.grad = normal(PARAMETERS)
    optimizer = torch.optim.AdamW([p], lr=1e-4, weight_decay=0.1, fused=True, capturable=DEVICE == "cuda")
    return replayed(optimizer.step)


def interpolation():
    for n in (2, 3, 8):
        arrays = [normal(PARAMETERS, dtype=torch.bfloat16) for _ in range(n)]
        sums("sum · bf16, %d inputs of %d numbers" % (n, PARAMETERS), arrays, [1 / n] * n)


# ---- attention ---------------------------------------------------------------------------------------------


def named(spans, keys, kv):
    return "bf16, %d x %d, %d of %d heads of %d" % (spans, keys, kv, HEADS, DIM)


def inputs(kv):
    return [[normal(SPANS, n, LENGTH, DIM, dtype=torch.bfloat16).requires_grad_() for n in (HEADS, kv, kv)]
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


def decode(kv):
    """The heads of a key head are its queries: no key is read twice."""
    copies = [[normal(BATCH, kv, n, DIM, dtype=torch.bfloat16) for n in (HEADS // kv, CONTEXT, CONTEXT)]
              for _ in range(COPIES)]
    def step():
        for q, k, v in copies:
            F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        return replayed(step) / COPIES


layers()
attempt("adamw · %d parameters" % PARAMETERS, "PyTorch, fused", adamw)
interpolation()
with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if DEVICE == "cuda" else [SDPBackend.MATH]):
    for heads in KEY_HEADS:
        attempt("attention · " + named(SPANS, LENGTH, heads), "PyTorch, flash", lambda: forward(heads))
        attempt("attention_back · " + named(SPANS, LENGTH, heads), "PyTorch, flash", lambda: backward(heads))
for heads in KEY_HEADS:
    attempt("attention_decode · " + named(BATCH, CONTEXT, heads), "PyTorch", lambda: decode(heads))
