#!/usr/bin/env python3
"""The peer of tests/bench_model.c: the same LLaMA in plain PyTorch (pip install torch).

Reads "train" or "generate" lines on standard input and answers each with tokens per second, so that
the two programs can take turns. dim 256, 6 layers, 4 heads, vocabulary 4096, feed-forward 688, LoRA
r = 16 on q and v; training takes 16 sequences of 128 tokens, generation makes 112 tokens for each of
16 prompts of 16 tokens with a key-value cache. Uses the faster of 1 and all threads.
"""
import math
import os
import sys
import time

import torch
import torch.nn.functional as F

DIM, LAYERS, HEADS, VOCAB, FFN, RANK, BATCH, LENGTH, PROMPT = 256, 6, 4, 4096, 688, 16, 16, 128, 16
HEAD = DIM // HEADS


class Lora(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(n, n) * 0.02, requires_grad=False)
        self.a = torch.nn.Parameter(torch.randn(RANK, n) / math.sqrt(n))
        self.b = torch.nn.Parameter(torch.zeros(n, RANK))

    def forward(self, x):
        return F.linear(x, self.w) + 2.0 * F.linear(F.linear(x, self.a), self.b)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        frozen = lambda *s: torch.nn.Parameter(torch.randn(*s) * 0.02, requires_grad=False)
        self.q, self.v = Lora(DIM), Lora(DIM)
        self.k, self.o = frozen(DIM, DIM), frozen(DIM, DIM)
        self.gate, self.up, self.down = frozen(FFN, DIM), frozen(FFN, DIM), frozen(DIM, FFN)
        self.n1 = torch.nn.Parameter(torch.ones(DIM), requires_grad=False)
        self.n2 = torch.nn.Parameter(torch.ones(DIM), requires_grad=False)

    def forward(self, x, rope, cache, at):
        b, t, _ = x.shape
        h = norm(x, self.n1)
        shape = lambda y: y.view(b, t, HEADS, HEAD).transpose(1, 2)
        q, k, v = rotate(shape(self.q(h)), rope), rotate(shape(F.linear(h, self.k)), rope), shape(self.v(h))
        if cache is not None:
            cache[0][:, :, at:at + t] = k
            cache[1][:, :, at:at + t] = v
            k, v = cache[0][:, :, :at + t], cache[1][:, :, :at + t]
        y = attend(q, k, v, t > 1)
        x = x + F.linear(y.transpose(1, 2).reshape(b, t, DIM), self.o)
        h = norm(x, self.n2)
        return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)


def attend(q, k, v, causal):
    if hasattr(F, "scaled_dot_product_attention"):  # PyTorch 2
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def rotate(x, rope):
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Parameter(torch.randn(VOCAB, DIM) * 0.02, requires_grad=False)
        self.head = torch.nn.Parameter(torch.randn(VOCAB, DIM) * 0.02, requires_grad=False)
        self.n = torch.nn.Parameter(torch.ones(DIM), requires_grad=False)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        f = torch.outer(torch.arange(LENGTH).float(), 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD))
        self.cos, self.sin = f.cos(), f.sin()

    def forward(self, ids, caches=None, at=0):
        t = ids.shape[1]
        rope = self.cos[at:at + t], self.sin[at:at + t]
        x = F.embedding(ids, self.embed)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, caches[i] if caches else None, at)
        x = x[:, -1:] if caches else x  # generation reads the last position alone
        return F.linear(norm(x, self.n), self.head)


def train(model, optimizer, ids):
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return BATCH * LENGTH


@torch.inference_mode()
def generate(model, ids):
    caches = [tuple(torch.zeros(BATCH, HEADS, LENGTH, HEAD) for _ in range(2)) for _ in model.blocks]
    at, step = 0, ids[:, :PROMPT]
    while at + step.shape[1] <= LENGTH - 1:
        logits = model(step, caches, at)[:, -1]
        at += step.shape[1]
        step = torch.multinomial(torch.softmax(logits, -1), 1)
    return BATCH * (LENGTH - PROMPT)


def main():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    work = {"train": lambda: train(model, optimizer, ids), "generate": lambda: generate(model, ids)}
    print("torch", torch.__version__, flush=True)
    best = {}
    for line in sys.stdin:
        what = line.strip()
        if what not in best:  # which number of threads suits it, once: the best of three tries each
            best[what] = max((speed(work[what], n), n) for n in sorted({1, os.cpu_count() or 1}) * 3)[1]
        print(speed(work[what], best[what]), flush=True)


def speed(work, threads):
    torch.set_num_threads(threads)
    work()
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


main()
