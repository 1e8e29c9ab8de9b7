"""What the programs of this directory share: sizes, time, and the line a figure is told in."""
import gc
import json
import statistics
import sys
import time

import torch

TINY = "--tiny" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The sizes of llama.c.
CONFIG = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=32, rope_theta=10000.0, rms_norm_eps=1e-6)
STEPS, PROMPT, ADAPTERS, RANK = 128, 416, 8, 16
BATCHES, ROWS, LENGTH, PPO_PROMPT = {1: 1, 64: 64}, 8, 512, 128
if TINY:
    CONFIG.update(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
                  num_key_value_heads=1)
    STEPS, PROMPT, BATCHES, ROWS, LENGTH, PPO_PROMPT = 4, 5, {1: 1, 64: 3}, 2, 16, 4


def report(key, who, ms, **more):
    print(json.dumps({"key": key, "who": who, "ms": ms, **more}), flush=True)


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(work, times=5, warm=2):
    """The median of `times` calls."""
    taken = []
    for i in range(warm + times):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[warm:])


def attempt(key, who, work):
    """One peer of several: what it cannot do is told, and the others go on."""
    try:
        report(key, who, work())
    except Exception as error:  # whatever a compiler or a library raises
        text = "%s: %s" % (type(error).__name__, str(error).split("\n")[0])
        print(json.dumps({"key": key, "who": who, "error": text}), flush=True)
    if DEVICE == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def graphed(step, stream=None):
    """The step as a CUDA graph, after three calls of it; on the CPU, itself."""
    if DEVICE == "cpu":
        return step
    stream = stream or torch.cuda.Stream()
    wait()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def replayed(step, times=20, stream=None):
    """Milliseconds of one call of `step`, which is long enough for its launch not to matter, as a CUDA graph."""
    run = graphed(step, stream)
    def many():
        for _ in range(times):
            run()
    return milliseconds(many) / times


def fused(arrays, weights):
    return sum(w * x.float() for w, x in zip(weights, arrays)).bfloat16()


def sums(key, arrays, weights):
    """PyTorch's ways to a weighted sum of bf16."""
    out = torch.empty_like(arrays[0])
    def in_place():
        torch.mul(arrays[0], weights[0], out=out)
        for x, w in zip(arrays[1:], weights[1:]):
            out.add_(x, alpha=w)
    attempt(key, "PyTorch, add_ in bf16", lambda: replayed(in_place))
    if not TINY:
        compiled = torch.compile(fused)
        attempt(key, "PyTorch, torch.compile", lambda: replayed(lambda: compiled(arrays, weights)))
