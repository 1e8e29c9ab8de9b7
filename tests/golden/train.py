"""Golden values of the trainers' formulas, from trl 0.7.2 and torch's autograd and optimisers.

pip install torch transformers accelerate peft tqdm, then pip install --no-deps trl==0.7.2
python train.py            writes train/objectives.json and train/optim.json beside this file

trl 0.7.2 imports names that newer packages dropped or that PPO never uses; they are stubbed here.
Tensors are float64 with values that float32 holds exactly, so that the library's float32 inputs are
the same numbers and its results can be compared within 1e-6.
"""
import importlib.machinery
import json
import os
import sys
import types
from unittest.mock import MagicMock

import torch
import transformers

transformers.top_k_top_p_filtering = None


for name in ("datasets", "tyro"):
    stub = types.ModuleType(name)
    stub.__file__ = name + ".py"
    stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    stub.__getattr__ = lambda attribute: MagicMock
    sys.modules[name] = stub
sys.modules["tyro"].conf = MagicMock()

from trl.trainer.ppo_trainer import PPOTrainer  # noqa: E402
from trl.trainer.utils import AdaptiveKLController, RunningMoments  # noqa: E402

torch.manual_seed(20231017)
here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train")


def numbers(shape, scale=1.0, shift=0.0):
    return (torch.randn(shape) * scale + shift).float().double()


def flat(tensor, lengths):
    return [x for row, n in zip(tensor.tolist(), lengths) for x in row[:n]]


def trainer(beta, gamma, lam, clip, clip_value, coefficient):
    t = PPOTrainer.__new__(PPOTrainer)
    t.config = types.SimpleNamespace(
        gamma=gamma, lam=lam, cliprange=clip, cliprange_value=clip_value, vf_coef=coefficient,
        ratio_threshold=1e9, kl_penalty="kl")
    t.kl_ctl = types.SimpleNamespace(value=beta)
    return t


def ppo_case(lengths, beta, gamma, lam, clip, clip_value, coefficient, move):
    t = trainer(beta, gamma, lam, clip, clip_value, coefficient)
    batch, width = len(lengths), max(lengths)
    mask = torch.zeros(batch, width, dtype=torch.float64)
    for row, n in zip(mask, lengths):
        row[:n] = 1
    old, ref = numbers((batch, width), 0.7, -2), numbers((batch, width), 0.7, -2)
    values, scores = numbers((batch, width)), numbers((batch,))
    rewards, _ = t.compute_rewards(scores, old, ref, mask)
    _, advantages, returns = t.compute_advantages(values, rewards, mask)
    # The loss reads the advantages and returns that the library stored in float32.
    advantages32, returns32 = advantages.float().double(), returns.float().double()
    new = (old + numbers((batch, width), move)).float().double().requires_grad_()
    vpreds = (values + numbers((batch, width), 0.3)).float().double().requires_grad_()
    logits = torch.zeros(batch, width, 3, dtype=torch.float64)
    policy, value, stats = t.loss(old, values * mask, logits, vpreds, new, mask, advantages32,
                                  returns32)
    (policy + value).backward()
    ratio = torch.exp(new - old)
    return dict(
        lengths=lengths, beta=beta, gamma=gamma, lambda_=lam, clip=clip, clip_value=clip_value,
        coefficient=coefficient, logprob=flat(old, lengths), ref_logprob=flat(ref, lengths),
        value=flat(values, lengths), score=scores.tolist(), reward=flat(rewards, lengths),
        advantage=flat(advantages, lengths), returns=flat(returns, lengths),
        advantage32=flat(advantages32, lengths), returns32=flat(returns32, lengths),
        new_logprob=flat(new.detach(), lengths), new_value=flat(vpreds.detach(), lengths),
        policy_loss=policy.item(), value_loss=value.item(),
        clip_fraction=stats["policy/clipfrac"].item(),
        value_clip_fraction=stats["val/clipfrac"].item(),
        policy_kl=stats["policy/policykl"].item(),
        mean_ratio=((ratio * mask).sum() / mask.sum()).item(),
        dlogprob=flat(new.grad, lengths), dvalue=flat(vpreds.grad, lengths))


def kl_case():
    controller, betas = AdaptiveKLController(0.2, 6.0, 10000.0), []
    kls = [0.0, 3.0, 5.9, 6.0, 6.3, 9.0, 40.0, -1.0]
    for kl in kls:
        controller.update(kl, 64)
        betas.append(float(controller.value))
    return dict(start=0.2, target=6.0, horizon=10000.0, n=64, kl=kls, beta=betas)


def moments_case():
    running = RunningMoments(types.SimpleNamespace(use_distributed=False))
    batches = []
    for n, scale, shift in ((16, 1, 0), (3, 4, 2), (64, 0.5, -1), (7, 2, 0.25)):
        x = numbers((n,), scale, shift)
        running.update(x)
        batches.append(dict(x=x.tolist(), mean=float(running.mean), deviation=float(running.std)))
    return batches


def bradley_terry_cases():
    cases = []
    for margin, centering in ((0.0, 0.0), (0.5, 0.01), (0.0, 0.1)):
        w, l = numbers((12,), 2).requires_grad_(), numbers((12,), 2).requires_grad_()
        with torch.no_grad():
            w[0], l[0], w[1], l[1] = 60.0, -60.0, -60.0, 60.0
        loss = (-torch.nn.functional.logsigmoid(w - l - margin) + centering * (w + l) ** 2)
        loss.sum().backward()
        cases.append(dict(margin=margin, centering=centering, w=w.tolist(), l=l.tolist(),
                          loss=loss.tolist(), dw=w.grad.tolist(), dl=l.grad.tolist()))
    return cases


def adamw_case(decay, clip, value=0.0):
    p = torch.nn.Parameter(torch.randn(37))
    start = p.tolist()
    optimizer = torch.optim.AdamW([p], lr=3e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 6)
    steps = []
    for _ in range(6):
        p.grad = torch.randn(37)
        gradient, norm = p.grad.tolist(), p.grad.norm().item()
        torch.nn.utils.clip_grad_value_([p], value if value else 1e30)
        torch.nn.utils.clip_grad_norm_([p], clip if clip else 1e30)
        optimizer.step()
        scheduler.step()
        steps.append(dict(gradient=gradient, norm=norm, p=p.tolist()))
    return dict(learning_rate=3e-2, weight_decay=decay, max_grad_norm=clip, max_grad_value=value, warmup=2, total=6,
                start=start, steps=steps)


def schedule_cases():
    cases, total, warmup = [], 20, 4
    makers = dict(
        constant=lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
        linear=lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, total),
        cosine=lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, total))
    for name, make in makers.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler, rates = make(optimizer), []
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        cases.append(dict(schedule=name, warmup=warmup, total=total, peak=1e-3, rates=rates))
    return cases


def write(name, value):
    os.makedirs(here, exist_ok=True)
    with open(os.path.join(here, name), "w") as out:
        json.dump(value, out)
        out.write("\n")


if __name__ == "__main__":
    write("objectives.json", dict(
        ppo=[ppo_case([5, 9, 1, 7], 0.2, 1.0, 0.95, 0.2, 0.2, 0.1, 0.3),
             ppo_case([12, 3], 0.05, 0.97, 0.8, 0.1, 0.5, 1.0, 0.15),
             ppo_case([2, 2, 2], 0.0, 1.0, 1.0, 0.2, 0.2, 0.1, 1.0)],
        kl=kl_case(), moments=moments_case(), bradley_terry=bradley_terry_cases()))
    write("optim.json", dict(adamw=[adamw_case(0.0, 0.0), adamw_case(0.1, 1.0), adamw_case(0.1, 0.0, 0.5),
                                    adamw_case(0.0, 1.0, 0.5)],
                             schedules=schedule_cases()))
