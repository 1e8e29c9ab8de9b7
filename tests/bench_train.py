#!/usr/bin/env python3
"""The peer of tests/bench_train.c: the same training steps in torch, transformers and peft, with trl's losses.

    pip install torch peft accelerate datasets "transformers<4.58", then pip install --no-deps trl==0.23.1

Reads "SIZE WORK" lines on standard input, SIZE being dim,ffn,layers,heads,vocabulary,rank,all (LoRA on all linears, or
on q and v),rollouts,prompt,new,epochs,rows,length and WORK ppo, sft or reward, and answers each with seconds of a step
(PPO: and of its rollout, scoring, old and reference log-probabilities with values, and update). Takes the faster of 1
and all threads. Every sequence of a batch is of one length: nothing is spent on padding.
"""
import os
import sys
import time

import torch
import transformers
import trl
import peft
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.ppo_trainer import masked_mean, masked_whiten
from trl.trainer.utils import selective_log_softmax

FIELDS = "dim ffn layers heads vocab rank all rollouts prompt new epochs rows length".split()
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Work:
    def __init__(self, words):
        for name, value in zip(FIELDS, words.split(",")):
            setattr(self, name, int(value))
        torch.manual_seed(1)
        base = LlamaForCausalLM(LlamaConfig(
            hidden_size=self.dim, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, vocab_size=self.vocab,
            max_position_embeddings=256, tie_word_embeddings=True, attn_implementation="sdpa", bos_token_id=None,
            eos_token_id=None, pad_token_id=0))
        settings = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=0.0,
                                   target_modules=LINEARS if self.all else ["q_proj", "v_proj"])
        self.model = peft.get_peft_model(base, settings, adapter_name="policy")
        self.model.add_adapter("reward", settings)
        self.heads_of = {name: torch.nn.Linear(self.dim, 1) for name in ("policy", "reward")}
        self.optimizers = {
            name: torch.optim.AdamW([p for n, p in self.model.named_parameters() if ".%s." % name in n] +
                                    list(head.parameters()), lr=1e-5, fused=True)
            for name, head in self.heads_of.items()}
        self.model.train()  # without dropout

    def hidden(self, ids):
        return self.model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def scored(self, ids, value=True):
        """log π of the responses' tokens and V, [rollouts, new]."""
        hidden = self.hidden(ids)[:, self.prompt - 1:-1]
        logits = self.model.base_model.model.lm_head(hidden)
        return (selective_log_softmax(logits, ids[:, self.prompt:]),
                self.heads_of["policy"](hidden).squeeze(-1) if value else None)

    def step(self, name, loss):
        loss.backward()
        optimizer = self.optimizers[name]
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ppo(self):
        marks = [time.perf_counter()]
        mark = lambda: marks.append(time.perf_counter())
        self.model.set_adapter("policy")
        prompts = torch.randint(1, self.vocab, (self.rollouts, self.prompt))
        with torch.no_grad():
            self.model.eval()
            ids = self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                                      top_k=0, max_new_tokens=self.new, min_new_tokens=self.new)
            self.model.train()
            mark()
            self.model.set_adapter("reward")
            score = self.heads_of["reward"](self.hidden(ids)[:, -1]).squeeze(-1)
            self.model.set_adapter("policy")
            mark()
            logprob, values = self.scored(ids)
            with self.model.disable_adapter():
                reference, _ = self.scored(ids, value=False)
            mark()
            rewards = -0.2 * (logprob - reference)
            rewards[:, -1] += score
            lastgaelam, advantages = 0, []
            for t in reversed(range(self.new)):  # as in trl's PPOTrainer.train
                after = values[:, t + 1] if t < self.new - 1 else 0.0
                lastgaelam = rewards[:, t] + after - values[:, t] + 0.95 * lastgaelam
                advantages.append(lastgaelam)
            advantages = torch.stack(advantages[::-1], 1)
            returns = advantages + values
            mask = torch.ones_like(values, dtype=torch.bool)
            advantages = masked_whiten(advantages, mask)
        for _ in range(self.epochs):
            new_logprob, vpred = self.scored(ids)
            vpredclipped = torch.clamp(vpred, values - 0.2, values + 0.2)
            vf_loss = 0.5 * masked_mean(torch.max(torch.square(vpred - returns), torch.square(vpredclipped - returns)), mask)
            ratio = torch.exp(new_logprob - logprob)
            pg_loss = masked_mean(torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)), mask)
            self.step("policy", pg_loss + 0.1 * vf_loss)
        mark()
        return [marks[-1] - marks[0]] + [b - a for a, b in zip(marks, marks[1:])]

    def sft(self):
        self.model.set_adapter("policy")
        ids = torch.randint(1, self.vocab, (self.rows, self.length))
        start = time.perf_counter()
        self.step("policy", self.model(input_ids=ids, labels=ids).loss)
        return [time.perf_counter() - start]

    def reward(self):
        """Half of the rows are chosen, half rejected."""
        self.model.set_adapter("reward")
        ids = torch.randint(1, self.vocab, (self.rows, self.length))
        start = time.perf_counter()
        scores = self.heads_of["reward"](self.hidden(ids)[:, -1]).squeeze(-1)
        self.step("reward", -torch.nn.functional.logsigmoid(scores[::2] - scores[1::2]).mean())
        return [time.perf_counter() - start]


def speed(work, threads):
    torch.set_num_threads(threads)
    return min(work() for _ in range(2))


def main():
    print("torch %s, transformers %s, peft %s, trl %s" % (torch.__version__, transformers.__version__, peft.__version__,
                                                          trl.__version__), flush=True)
    works, best = {}, {}
    for line in sys.stdin:
        size, what = line.split()
        if size not in works:
            works = {size: Work(size)}
        work = getattr(works[size], what)
        if line not in best:  # which number of threads suits it
            work()
            best[line] = min((speed(work, n), n) for n in sorted({1, os.cpu_count() or 1}))[1]
        print(*("%.5f" % x for x in speed(work, best[line])), flush=True)


main()
