"""Golden values of the objectives beside PPO, from trl 0.23.1 and torch's autograd.

pip install torch "transformers<4.58" accelerate datasets, then pip install --no-deps trl==0.23.1
python objectives.py       writes train/preferences.json beside this file

Tensors are float64 with values that float32 holds exactly, so that the library's float32 inputs are
the same numbers and its results can be compared within 1e-6.
"""
import json
import os
import types

import torch
from trl.trainer.dpo_config import FDivergenceType
from trl.trainer.dpo_trainer import DPOTrainer

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


with open(os.path.join(here, "preferences.json"), "w") as out:
    json.dump(dict(dpo=[dpo_case(0.1, 0.0), dpo_case(0.5, 0.1), dpo_case(0.02, 0.5)]), out)
    out.write("\n")
