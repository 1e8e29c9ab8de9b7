"""Golden values of the objectives beside PPO, from trl 0.23.1 and torch's autograd.

pip install torch "transformers<4.58" accelerate datasets, then pip install --no-deps trl==0.23.1
python objectives.py       writes train/preferences.json beside this file

Tensors are float64 with values that float32 holds exactly, so that the library's float32 inputs are
the same numbers and its results can be compared within 1e-6.
"""
import inspect
import json
import os
import textwrap
import types
from collections import defaultdict

import torch
from trl.trainer.dpo_config import FDivergenceType
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

torch.manual_seed(20240529)
here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train")


def numbers(shape, scale=1.0, shift=0.0):
    return (torch.randn(shape) * scale + shift).float().double()


def dpo_case(beta, smoothing, n=12):
    t = DPOTrainer.__new__(DPOTrainer)
    t.beta, t.label_smoothing, t.reference_free = beta, smoothing, False
    t.f_divergence_type, t.f_divergence_params = FDivergenceType.REVERSE_KL, None
    t.accelerator = types.SimpleNamespace(device="cpu")
    ref = [numbers((n,), 5, -40) for _ in range(2)]
    policy = [(r + numbers((n,), 3)).float().double().requires_grad_() for r in ref]
    with torch.no_grad():  # both ends of the logistic
        policy[0][0], policy[1][0] = ref[0][0] + 300, ref[1][0] - 300
        policy[0][1], policy[1][1] = ref[0][1] - 300, ref[1][1] + 300
        for p in policy:
            p.copy_(p.float().double())
    loss, chosen, rejected = t.dpo_loss(policy[0], policy[1], ref[0], ref[1], loss_type="sigmoid")
    loss.sum().backward()
    return dict(beta=beta, label_smoothing=smoothing, chosen=policy[0].tolist(),
                rejected=policy[1].tolist(), ref_chosen=ref[0].tolist(), ref_rejected=ref[1].tolist(),
                loss=loss.tolist(), reward_chosen=chosen.tolist(), reward_rejected=rejected.tolist(),
                dchosen=policy[0].grad.tolist(), drejected=policy[1].grad.tolist())


def advantages(trainer, begin, **names):
    """trl's own lines from the one that begins so to "# Slice to keep", which stand in a long method."""
    source = inspect.getsource(trainer._generate_and_score_completions)
    source = source[source.index(begin):source.index("# Slice to keep")]
    exec(textwrap.dedent("        " + source), names)
    return names["advantages"]


def group_case(kind, lengths, k, beta, clip, move, scale="group"):
    batch, width = len(lengths), max(lengths)
    mask = torch.zeros(batch, width, dtype=torch.float64)
    for row, n in zip(mask, lengths):
        row[:n] = 1
    old, ref = numbers((batch, width), 0.7, -2), numbers((batch, width), 0.7, -2)
    new = (old + numbers((batch, width), move)).float().double().requires_grad_()
    scores = numbers((batch,))
    trainer = {"rloo": RLOOTrainer, "grpo": GRPOTrainer}[kind]
    t = trainer.__new__(trainer)
    t.beta, t.num_generations, t.epsilon_low, t.epsilon_high = beta, k, clip, clip
    t.normalize_advantages, t.scale_rewards, t.reward_clip_range = False, scale, None
    t.importance_sampling_level, t.loss_type, t.use_vllm = "token", "grpo", False
    t.top_entropy_quantile, t.args = 1.0, types.SimpleNamespace(delta=None)
    t.current_gradient_accumulation_steps = 1
    t.model = types.SimpleNamespace(training=True)
    t.accelerator = types.SimpleNamespace(gather=lambda x: x)
    t._metrics = defaultdict(lambda: defaultdict(list))
    t._get_per_token_logps_and_entropies = lambda *a, **b: (new, torch.zeros_like(new))
    names = dict(self=t, torch=torch, rewards=scores, gather=lambda x: x, completion_mask=mask,
                 old_per_token_logps=old, ref_per_token_logps=ref)
    first = {"rloo": "# Include the KL penalty", "grpo": "# Compute grouped-wise rewards"}[kind]
    a = advantages(trainer, first, **names)
    a32 = a.float().double()  # as the library stored them
    ids = torch.zeros(batch, width, dtype=torch.long)
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask,
                  advantages=a32, old_per_token_logps=old, ref_per_token_logps=ref,
                  old_logps=(old * mask).sum(1))
    loss = t._compute_loss(None, inputs)
    loss.backward()

    def flat(tensor):
        return [x for row, n in zip(tensor.tolist(), lengths) for x in row[:n]]

    return dict(kind=kind, scale=scale, lengths=lengths, k=k, beta=beta, clip=clip, logprob=flat(old),
                ref_logprob=flat(ref), new_logprob=flat(new.detach()), score=scores.tolist(),
                advantage=a.tolist(), advantage32=a32.tolist(), loss=loss.item(), dlogprob=flat(new.grad))


def kl_case(estimator, beta, n=16):
    """The penalty in the reward, by the lines of trl's PPO for k1 and k3; trl 0.7's "mse" is k2. And the estimate as
    a loss, of which autograd says the gradient."""
    ref = numbers((n,), 0.7, -2)
    new = (ref + numbers((n,), 0.8)).float().double().requires_grad_()
    with torch.no_grad():
        new[0], new[1], new[2] = ref[0], ref[1] - 6, ref[2] + 6
        new.copy_(new.float().double())
    if estimator == "k2":
        kl = 0.5 * (new - ref).square()
    else:
        source = inspect.getsource(PPOTrainer.train)
        source = source[source.index("logr = ref_logprobs - logprobs"):source.index("non_score_reward =")]
        names = dict(logprobs=new, ref_logprobs=ref, args=types.SimpleNamespace(kl_estimator=estimator))
        exec(textwrap.dedent("                " + source), names)
        kl = names["kl"]
    (beta * kl).sum().backward()
    return dict(estimator=estimator, beta=beta, logprob=new.tolist(), ref_logprob=ref.tolist(),
                kl=kl.tolist(), reward=(-beta * kl).tolist(), loss=(beta * kl).sum().item(),
                dlogprob=new.grad.tolist())


lengths = [5, 3, 1, 7, 2, 6]
groups = [group_case("rloo", lengths, 3, 0.05, 0.2, 0.1), group_case("rloo", lengths, 2, 0.0, 0.1, 0.3),
          group_case("grpo", lengths, 3, 0.04, 0.2, 0.3), group_case("grpo", lengths, 6, 0.5, 0.1, 0.2)]

dpo = [dpo_case(0.1, 0.0), dpo_case(0.5, 0.1), dpo_case(0.02, 0.5)]
groups += [group_case("grpo", lengths, 3, 0.04, 0.2, 0.3, "none"),
           group_case("grpo", lengths, 3, 0.04, 0.2, 0.3, "batch")]
kl = [kl_case(k, 0.3) for k in ("k1", "k2", "k3")]

with open(os.path.join(here, "preferences.json"), "w") as out:
    json.dump(dict(dpo=dpo, groups=groups, kl=kl), out)
    out.write("\n")
