#!/usr/bin/env python3
"""A whole step of PPO as trl 0.7.2 takes it, recorded: PPOTrainer.step on given responses, with a PEFT adapter and a
value head over tests/golden/model/plain, in float64.

    pip install torch "transformers<4.58" accelerate peft tqdm, then pip install --no-deps trl==0.7.2
    build/gcc-release/tests/test_train_recorded --write /tmp/drawn.safetensors    what the library samples, and its order
    python tests/golden/step.py /tmp/drawn.safetensors                            writes train/step.safetensors

Of a case are kept the responses; log-probs of policy and reference, values, rewards, advantages, returns; and of each of
its epochs the new log-probs and values, the losses, the gradient and the weights after the optimiser's step, laid out
as the library's adapters are.
"""
import os
import sys
import types

import numpy
import torch
from safetensors.torch import load_file, save_file

import train  # noqa: F401  stubs what trl 0.7.2 imports and PPO never uses
import model as base
import lora
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train", "step.safetensors")
EPOCHS, RATE = 2, 3e-3
CASES = {"whole": 0, "groups": 2}  # responses whose tokens share a mean; 0: all


class Policy(AutoModelForCausalLMWithValueHead):
    """trl's, but that its logits stay float64."""

    def forward(self, input_ids=None, attention_mask=None):
        out = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return out.logits, None, self.v_head(out.hidden_states[-1]).squeeze(-1)


def rows(drawn, name):
    return list(torch.split(drawn[name].long(), drawn[name + "_lengths"].tolist()))


def flat(policy, of):
    """The adapter's numbers in the library's order."""
    factors = lora.factors(policy.pretrained_model)
    names = [f"model.layers.{layer}.{'mlp' if side in base.ALL[4:] else 'self_attn'}.{side}.lora_{ab}"
             for layer in range(2) for side in base.ALL for ab in "AB"]
    parts = [factors[n] for n in names] + [policy.v_head.summary.weight, policy.v_head.summary.bias]
    return torch.cat([of(p).detach().reshape(-1).clone() for p in parts])


def record(drawn, group):
    prompts, responses, scores = rows(drawn, "prompt"), rows(drawn, "response"), drawn["score"].double()
    n = len(prompts)
    policy = Policy(lora.load(os.path.join(lora.HERE, "all")), summary_dropout_prob=0.0).double()
    policy.is_peft_model = True
    with torch.no_grad():
        policy.v_head.summary.weight.copy_(drawn["head"][None, :-1])
        policy.v_head.summary.bias.copy_(drawn["head"][-1:])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")
    size = group or n
    config = PPOConfig(learning_rate=RATE, batch_size=n, mini_batch_size=size, gradient_accumulation_steps=n // size,
                       ppo_epochs=EPOCHS, use_score_scaling=True, use_score_norm=True)
    trainer = PPOTrainer(config, policy, None, tokenizer)
    out, micro, orders = {}, [], drawn["order"].reshape(EPOCHS, n).long()

    def kept(tensor, mask):
        return torch.cat([row[m.bool()] for row, m in zip(tensor, mask)])

    def rewards(self, scores, logprobs, ref_logprobs, masks):
        result = PPOTrainer.compute_rewards(self, scores, logprobs, ref_logprobs, masks)
        out.update(logprob=kept(logprobs, masks), ref_logprob=kept(ref_logprobs, masks), reward=kept(result[0], masks))
        return result

    def advantages(self, values, rewards, mask):
        result = PPOTrainer.compute_advantages(self, values, rewards, mask)
        out.update(value=kept(values, mask), advantage=kept(result[1], mask), returns=kept(result[2], mask))
        return result

    def minibatch(self, old, values, logprobs, logits, vpreds, mask, *rest):
        stats = PPOTrainer.train_minibatch(self, old, values, logprobs, logits, vpreds, mask, *rest)
        micro.append((logprobs.detach(), vpreds.detach(), mask, stats))
        return stats

    for name, method in dict(compute_rewards=rewards, compute_advantages=advantages, train_minibatch=minibatch).items():
        setattr(trainer, name, types.MethodType(method, trainer))
    gradients, after = [], []
    adam = trainer.optimizer.optimizer
    adam.register_step_pre_hook(lambda *_: gradients.append(flat(policy, lambda p: p.grad)))
    adam.register_step_post_hook(lambda *_: after.append(flat(policy, lambda p: p)))
    turns = iter(orders.numpy())
    numpy.random.permutation = lambda count: next(turns)
    before = flat(policy, lambda p: p)
    trainer.step(prompts, responses, list(scores))
    assert len(gradients) == EPOCHS and len(micro) == EPOCHS * (n // size)

    for epoch in range(EPOCHS):
        mine = micro[epoch * (n // size):(epoch + 1) * (n // size)]
        for at, name in enumerate(("new_logprob", "new_value")):
            by_row = dict(zip(orders[epoch].tolist(), [row[m.bool()] for m_ in mine for row, m in zip(m_[at], m_[2])]))
            out[f"{name}{epoch}"] = torch.cat([by_row[i] for i in range(n)])
        mean = lambda key: torch.stack([m[3][key].double().mean() for m in mine]).mean().reshape(1)
        out[f"policy_loss{epoch}"], out[f"value_loss{epoch}"] = mean("loss/policy"), mean("loss/value")
        out[f"gradient{epoch}"], out[f"after{epoch}"] = gradients[epoch], after[epoch]
        print(f"  epoch {epoch}: losses {out[f'policy_loss{epoch}'].item():.6g} {out[f'value_loss{epoch}'].item():.6g}, "
              f"clipped {mean('policy/clipfrac').item():.3g} and {mean('val/clipfrac').item():.3g}")
    out.update(before=before, kl_coefficient=torch.tensor([trainer.kl_ctl.value]).double())
    return out


def main(path):
    base.whole_float64()
    drawn, out = load_file(path), {}
    for case, group in CASES.items():
        print(case)
        mine = {k[len(case) + 1:]: v for k, v in drawn.items() if k.startswith(case + "/")}
        out.update({f"{case}/{k}": base.f32(v) for k, v in record(mine, group).items()})
        out[f"{case}/response"] = mine["response"]
    save_file(out, OUT)


if __name__ == "__main__":
    main(sys.argv[1])
