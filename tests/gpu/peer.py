"""The same work as llama.c's in PyTorch, transformers and peft, each at its best settings.

    peer.py [--tiny] decode|generate 1|64     the batch
    peer.py [--tiny] train
    peer.py [--tiny] ppo LENGTHS...     the responses' lengths, as psoup drew them
"""
import sys

import torch
import torch.nn.functional as F

import plain
from common import (ADAPTERS, BATCHES, CONFIG, DEVICE, LENGTH, PPO_PROMPT, PROMPT, RANK, ROWS, STEPS, TINY, attempt,
                    graphed, milliseconds)

torch.manual_seed(1)


def tokens(*shape):
    return torch.randint(CONFIG["vocab_size"], shape, device=DEVICE)


def transformer():
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(**CONFIG, max_position_embeddings=2048, attn_implementation="sdpa", bos_token_id=None,
                         eos_token_id=None, pad_token_id=0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def adapted(model, *names, dropout=0.0):
    """LoRA of rank 16 on q and v under each name; the first is active."""
    from peft import LoraConfig, get_peft_model
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    model = get_peft_model(model, settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    return model


# ---- decoding: a plain LLaMA with a static cache, as a CUDA graph; transformers' generate ------------------


def decoder(rows, compiled, mixed):
    normal = lambda *shape: torch.randn(*shape, device=DEVICE).mul_(0.02).bfloat16()
    weights = {name: normal(*shape) for name, shape in plain.names(CONFIG)}
    adapters = []
    for _ in range(ADAPTERS if mixed else 0):
        adapters.append({})
        for name, w in weights.items():
            if "_proj" in name:
                name = name[:-len(".weight")]
                adapters[-1][name + ".lora_A"] = normal(RANK, w.shape[1])
                adapters[-1][name + ".lora_B"] = normal(w.shape[0], RANK)
    model = plain.Llama(CONFIG, weights, adapters)
    del adapters  # they are stacked
    mix = torch.rand(rows, ADAPTERS, device=DEVICE).bfloat16() if mixed else None
    most = PROMPT + STEPS + 16
    cache = [[normal(rows, model.kv, most, model.dim) for _ in range(2)] for _ in range(CONFIG["num_hidden_layers"])]
    rope = model.rope(most, weights["model.norm.weight"])
    token, at = tokens(rows, 1), torch.tensor([PROMPT], device=DEVICE)
    forward = lambda token, at: model.logits(model.hidden(token, mix, cache, at, rope)).argmax(-1)
    if compiled:
        forward = torch.compile(forward, fullgraph=True)
    def step():
        token.copy_(forward(token, at))
        at.add_(1)
    return step, at


@torch.inference_mode()
def plain_decode(rows, compiled, mixed):
    step, at = decoder(rows, compiled, mixed)
    run = graphed(step)
    def many():
        at.fill_(PROMPT)
        for _ in range(STEPS):
            run()
    return milliseconds(many, 3, 1) / STEPS


@torch.inference_mode()
def generate(model, rows, **cache):
    prompt = tokens(rows, PROMPT)
    mask = torch.ones_like(prompt)
    def length(n):
        return milliseconds(lambda: model.generate(prompt, attention_mask=mask, max_new_tokens=n, min_new_tokens=n,
                                                   do_sample=False, **cache), 2, 1)
    return (length(STEPS + 1) - length(1)) / STEPS


def decode(batch):
    rows = BATCHES[batch]
    for mixed in (False, True):
        key = "decode, batch %d%s" % (batch, ", 8 adapters" if mixed else "")
        attempt(key, "PyTorch", lambda: plain_decode(rows, False, mixed))
        if not TINY:
            attempt(key, "PyTorch, torch.compile", lambda: plain_decode(rows, True, mixed))


def generate_all(batch):
    model, rows, key = transformer().eval(), BATCHES[batch], "decode, batch %d" % batch
    attempt(key, "transformers", lambda: generate(model, rows))
    if not TINY:
        attempt(key, "transformers, static cache, compiled",
                lambda: generate(model, rows, cache_implementation="static"))


# ---- LoRA training -----------------------------------------------------------------------------------------


def train():
    model = adapted(transformer(), "policy").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=DEVICE == "cuda")
    batch = tokens(ROWS, LENGTH)
    def step_of(model):
        def step():
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step
    attempt("LoRA training step", "transformers + peft", lambda: milliseconds(step_of(model), 5, 3))
    if not TINY:
        compiled = torch.compile(model)
        attempt("LoRA training step", "transformers + peft, torch.compile",
                lambda: milliseconds(step_of(compiled), 5, 3))


# ---- a PPO step --------------------------------------------------------------------------------------------


class Ppo:
    """One policy with a value head, its reference and a reward model, all adapters of one base, as in llama.c: sample,
    score, then 8 epochs over the batch, one optimiser step each, in micro-batches of rows of alike length."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.model = adapted(transformer(), "policy", "reward", dropout=0.05)
        self.model.set_adapter("policy")
        head = lambda p: torch.nn.Sequential(torch.nn.Dropout(p),
                                             torch.nn.Linear(CONFIG["hidden_size"], 1, device=DEVICE))
        self.heads = {"policy": head(0.1), "reward": head(0.0)}
        policy = [p for n, p in self.model.named_parameters() if ".policy." in n]
        policy += self.heads["policy"].parameters()
        self.optimizer = torch.optim.AdamW(policy, lr=1.4e-5, weight_decay=0.0, fused=DEVICE == "cuda")
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        self.micro = [order[i:i + 8] for i in range(0, len(order), 8)]

    def hidden(self, ids):
        return self.model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def scored(self, ids, n):
        """log π and V of the response's tokens, [rows, n]."""
        hidden = self.hidden(ids)[:, PPO_PROMPT - 1:-1]
        logits = self.model.base_model.model.lm_head(hidden).float()
        chosen = ids[:, PPO_PROMPT:, None]
        logprob = logits.gather(-1, chosen).squeeze(-1) - logits.logsumexp(-1)
        return logprob, self.heads["policy"](hidden.float()).squeeze(-1)

    @torch.no_grad()
    def sample(self):
        self.model.eval()
        self.heads["policy"].eval()
        most = max(self.lengths)
        prompts = tokens(len(self.lengths), PPO_PROMPT)
        return self.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=most,
                                   min_new_tokens=most, do_sample=True, top_k=0)

    @torch.no_grad()
    def prepare(self, ids):
        """For each micro-batch its tokens, mask, log π, V, advantages and returns."""
        batches = []
        for rows in self.micro:
            n = max(self.lengths[i] for i in rows)
            part = ids[rows, :PPO_PROMPT + n]
            ends = torch.tensor([self.lengths[i] for i in rows], device=DEVICE)
            mask = (torch.arange(n, device=DEVICE) < ends[:, None]).float()
            logprob, value = self.scored(part, n)
            with self.model.disable_adapter():
                reference, _ = self.scored(part, n)
            self.model.set_adapter("reward")
            read = part[:, :512]
            last = (PPO_PROMPT + ends - 1).clamp(max=read.shape[1] - 1)
            score = self.heads["reward"](self.hidden(read)[torch.arange(len(rows), device=DEVICE), last].float())
            self.model.set_adapter("policy")
            reward = -0.2 * (logprob - reference) * mask
            reward[torch.arange(len(rows), device=DEVICE), ends - 1] += score.squeeze(-1)
            advantage, after = torch.zeros_like(value), torch.zeros(len(rows), device=DEVICE)
            value = value * mask
            for t in reversed(range(n)):  # GAE, λ 0.95, γ 1
                following = value[:, t + 1] if t + 1 < n else 0
                after = reward[:, t] + following - value[:, t] + 0.95 * after
                advantage[:, t] = after
            batches.append([part, mask, logprob, value, advantage, advantage + value])
        every = torch.cat([b[4][b[1] > 0] for b in batches])
        for b in batches:
            b[4] = (b[4] - every.mean()) * torch.rsqrt(every.var() + 1e-8)
        return batches

    def update(self, batches):
        self.model.train()
        self.heads["policy"].train()
        for _ in range(8):
            for part, mask, old, value_old, advantage, returns in batches:
                logprob, value = self.scored(part, mask.shape[1])
                ratio = (logprob - old).exp()
                policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
                clipped = value_old + (value - value_old).clamp(-0.2, 0.2)
                values = torch.maximum((value - returns) ** 2, (clipped - returns) ** 2) / 2
                loss = ((policy + 0.1 * values) * mask).sum() / mask.sum() / len(batches)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self):
        self.update(self.prepare(self.sample()))


def ppo(lengths):
    Ppo(lengths[:2]).step()  # kernels are loaded, the allocator is warm
    run = Ppo(lengths)
    attempt("PPO step", "transformers + peft", lambda: milliseconds(run.step, 1, 0))


if __name__ == "__main__":
    stage = [a for a in sys.argv[1:] if a != "--tiny"]
    numbers = [int(n) for n in stage[1:]]
    if stage[0] == "ppo":
        ppo(numbers)
    else:
        {"decode": decode, "generate": generate_all, "train": train}[stage[0]](*numbers)
