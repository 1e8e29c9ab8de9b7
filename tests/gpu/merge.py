"""Merging where the weights are, in a GPU's memory: ours beside PyTorch's ways, both as CUDA graphs in one stream. Where
PyTorch sees no GPU, in the host's memory."""
import torch

import psoup
from common import DEVICE, TINY, attempt, replayed, report, sums, wait

N = 1 << 12 if TINY else 1 << 28  # elements of an input
RANK, ADAPTERS = 16, 8
stream = torch.cuda.Stream() if DEVICE == "cuda" else None


def right(key, out, want):
    """One rounding to bf16 and no more: its root mean square is below 2⁻⁹."""
    error = ((out.double() - want).norm() / want.norm()).item()
    if not error < 2.0 ** -9:
        raise SystemExit("merge.py: %s: differs from float64 by %g" % (key, error))


def interpolations(context):
    for n in (2, 3, 8):
        arrays = [torch.randn(N, device=DEVICE).bfloat16() for _ in range(n)]
        out, weights = torch.empty_like(arrays[0]), [1 / n] * n
        key = "interpolation, %d × bf16" % n
        psoup.merge_sum(arrays, weights, out=out, context=context)
        wait()
        right(key, out, sum(w * x.double() for w, x in zip(weights, arrays)))
        ours = lambda: psoup.merge_sum(arrays, weights, out=out, context=context)
        report(key, "psoup", replayed(ours, stream=stream), bytes=2 * (n + 1) * N)
        sums(key, arrays, weights)


def folds(context):
    for rows, columns in ((64, 48),) if TINY else ((4096, 4096), (11008, 4096)):
        copies = 1 if TINY else 4
        bases = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(copies)]
        outs = [torch.empty_like(b) for b in bases]
        a = torch.randn(ADAPTERS, RANK, columns, device=DEVICE) / columns ** 0.5
        b = torch.randn(ADAPTERS, rows, RANK, device=DEVICE)
        weights = [1 / ADAPTERS] * ADAPTERS
        factors = [psoup.Factors(a[i], b[i], 2.0) for i in range(ADAPTERS)]
        key = "fold, 8 adapters into %d × %d" % (rows, columns)
        def ours():
            for base, out in zip(bases, outs):
                psoup.fold(base, factors, weights, out=out, context=context)
        ours()
        wait()
        want = bases[0].double() + sum(w * 2 * (y.double() @ x.double()) for w, x, y in zip(weights, a, b))
        right(key, outs[0], want)
        report(key, "psoup", replayed(ours, stream=stream) / copies, operations=2 * rows * columns * ADAPTERS * RANK,
               bytes=2 * 2 * rows * columns + 4 * ADAPTERS * RANK * (rows + columns))
        stacked_a, stacked_b = a.reshape(-1, columns), b.transpose(0, 1).reshape(rows, -1)
        def theirs(dtype):
            for base in bases:
                torch.addmm(base.to(dtype), (stacked_b * (2 / ADAPTERS)).to(dtype), stacked_a.to(dtype)).bfloat16()
        attempt(key, "PyTorch, addmm in f32", lambda: replayed(lambda: theirs(torch.float32)) / copies)
        attempt(key, "PyTorch, addmm in bf16", lambda: replayed(lambda: theirs(torch.bfloat16)) / copies)


if DEVICE == "cuda":
    with psoup.Context(device="cuda:0", stream=stream.cuda_stream) as context, psoup.GpuMerge(context), \
            torch.cuda.stream(stream):
        interpolations(context)
        folds(context)
else:
    with psoup.Context() as context:
        interpolations(context)
        folds(context)
