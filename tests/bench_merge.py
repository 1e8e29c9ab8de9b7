#!/usr/bin/env python3
"""The peers of tests/bench_merge.c: PyTorch in memory (pip install torch), mergekit from file to file
(pip install mergekit).

Answers each line on standard input with one line:
    sum MILLIONS          0.6 a + 0.3 b + 0.1 c, bf16, into a buffer that is there: "SECONDS HOW", the fastest way
    fold LAYERS           three r = 16 adapters into the linears of TinyLlama layers, bf16: the same
    reweight              eight r = 16 adapters of 64 modules 4096 × 4096 into one of r = 128, f32: the same
    merge RECIPE OUT      mergekit's run_merge with its best settings: "SECONDS CPU_SECONDS MIB_OF_RSSANON"
"absent" stands for a package that is not there. Uses 2 threads.
"""
import os
import shutil
import sys
import threading
import time

import torch

torch.set_num_threads(2)
torch.set_grad_enabled(False)
W = (0.6, 0.3, 0.1)
SHAPES = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]


def fastest(ways, repeats=4):
    best = {}
    for _ in range(repeats):
        for how, work in ways.items():
            start = time.perf_counter()
            work()
            took = time.perf_counter() - start
            best[how] = min(best.get(how, took), took)
    how = min(best, key=best.get)
    return f"{best[how]:.5f} {how}"


def add_up(millions):
    n = millions * 1000 * 1000
    xs = [torch.full((n,), 0.25 * (i + 1), dtype=torch.bfloat16) for i in range(3)]
    out = torch.zeros(n, dtype=torch.bfloat16)

    def alpha(a, b, c, o):
        torch.mul(a, W[0], out=o)
        o.add_(b, alpha=W[1])
        o.add_(c, alpha=W[2])

    def lerp(a, b, c, o):
        torch.lerp(a, b, W[1] / (W[0] + W[1]), out=o)
        o.lerp_(c, W[2])

    def foreach(size):
        lists = [list(x.split(size)) for x in xs]
        o = list(out.split(size))

        def run():
            torch._foreach_copy_(o, lists[0])
            torch._foreach_mul_(o, W[0])
            torch._foreach_add_(o, lists[1], alpha=W[1])
            torch._foreach_add_(o, lists[2], alpha=W[2])
        return run

    def blocks(f, size):
        parts = list(zip(*(x.split(size) for x in xs), out.split(size)))

        def run():
            for p in parts:
                f(*p)
        return run

    return fastest({"mul, add_ with alpha": lambda: alpha(*xs, out), "lerp, lerp_": lambda: lerp(*xs, out),
                    "_foreach": foreach(4 << 20),
                    "add_ by blocks of 2^18": blocks(alpha, 1 << 18), "lerp_ by blocks of 2^18": blocks(lerp, 1 << 18),
                    "lerp_ by blocks of 2^20": blocks(lerp, 1 << 20)})


def fold(layers):
    work = []
    for _ in range(layers):
        for rows, columns in SHAPES:
            work.append((torch.zeros(rows, columns, dtype=torch.bfloat16),
                         torch.zeros(rows, columns, dtype=torch.bfloat16),
                         torch.randn(rows, 48), torch.randn(48, columns)))
    half = [(o, base, b.bfloat16(), a.bfloat16()) for o, base, b, a in work]

    def in_f32():
        for o, base, b, a in work:
            o.copy_(torch.addmm(base.float(), b, a))

    def product():
        for o, base, b, a in work:
            o.copy_((b @ a).add_(base))

    def in_bf16():
        for o, base, b, a in half:
            torch.addmm(base, b, a, out=o)

    exact = fastest({"stacked addmm in f32": in_f32, "stacked product, then base": product}, 3)
    rounded = fastest({"addmm of bf16 factors": in_bf16}, 3)
    # What each makes of weights and a change of usual sizes, as bench_merge's check_fold has them.
    base = (0.02 * torch.randn(1024, 2048)).bfloat16()
    b, a = 0.0092 * torch.randn(1024, 48), 0.02 * torch.randn(48, 2048)
    b *= torch.tensor([2 * w for w in W for _ in range(16)])
    want = base.double() + b.double() @ a.double()
    return "; ".join(answer + ": " + mistakes(out, want) for answer, out in (
        (exact, torch.addmm(base.float(), b, a).bfloat16()), (rounded, torch.addmm(base, b.bfloat16(), a.bfloat16()))))


def mistakes(out, want):
    """As bench_merge prints them of ours. Of float64 the nearest bf16 by way of float32 is a tie away at most."""
    nearest = want.bfloat16()
    wrong = (out != nearest).double().mean().item()
    error = ((out.double() - want).norm() / (nearest.double() - want).norm()).item()
    return "%.2f %% not the nearest bf16, error %.3f of one rounding's" % (100 * wrong, error)


def reweight():
    sources = [[(torch.randn(16, 4096), torch.randn(4096, 16)) for _ in range(8)] for _ in range(64)]
    outs = [(torch.zeros(128, 4096), torch.zeros(4096, 128)) for _ in range(64)]

    def cat():
        for (a, b), s in zip(outs, sources):
            torch.cat([x for x, _ in s], 0, out=a)
            torch.cat([0.25 * y for _, y in s], 1, out=b)

    def into():
        for (a, b), s in zip(outs, sources):
            torch.cat([x for x, _ in s], 0, out=a)
            for i, (_, y) in enumerate(s):
                torch.mul(y, 0.25, out=b[:, 16 * i:16 * i + 16])

    return fastest({"cat": cat, "cat, mul into place": into}, 6)


def rss_anon():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) / 1024


def merge(recipe, out):
    try:
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge
    except ImportError:
        return "absent"
    with open(recipe) as f:
        config = MergeConfiguration.model_validate(yaml.safe_load(f))
    best = None
    for settings in ({"async_write": True}, {}):
        known = {k: v for k, v in dict(num_threads=2, lazy_unpickle=True, quiet=True, copy_tokenizer=False,
                                       write_model_card=False, **settings).items()
                 if k in MergeOptions.model_fields}
        options = MergeOptions(**known)
        shutil.rmtree(out, ignore_errors=True)
        before, peak, done = rss_anon(), [0.0], threading.Event()

        def watch():
            while not done.wait(0.005):
                peak[0] = max(peak[0], rss_anon() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        cpu, start = time.process_time(), time.perf_counter()
        run_merge(config, out, options)
        took, used = time.perf_counter() - start, time.process_time() - cpu
        done.set()
        watcher.join()
        if best is None or took < best[0]:
            best = (took, used, peak[0])
    return "%.4f %.4f %.0f" % best


for line in sys.stdin:
    words = line.split()
    if words[0] == "sum":
        answer = add_up(int(words[1]))
    elif words[0] == "fold":
        answer = fold(int(words[1]))
    elif words[0] == "reweight":
        answer = reweight()
    else:
        out, sys.stdout = sys.stdout, sys.stderr
        try:
            answer = merge(words[1], words[2])
        finally:
            sys.stdout = out
    print(answer, flush=True)
