# Win rates with clustered bootstrap intervals, by numpy, for tests/test_eval.c.
#   pip install numpy;  python tests/golden/eval.py
import json
import os

import numpy as np

random = np.random.default_rng(5)
PROMPTS, USERS, REPLICATES = 40, 8, 200000


def mean_rate(w, l):
    """[..., groups] → [...]: the mean of w / (w + l) over the groups that have any."""
    with np.errstate(invalid="ignore"):
        return np.nanmean(w / (w + l), -1)


def interval(wins, losses):
    """[prompts, groups]. Percentile interval: whole prompts are drawn with replacement."""
    rates = []
    for _ in range(REPLICATES // 1000):
        picks = random.integers(0, len(wins), (1000, len(wins)))
        rates.append(mean_rate(wins[picks].sum(1), losses[picks].sum(1)))
    return np.nanpercentile(np.concatenate(rates), [2.5, 97.5])


def measure(rows):
    """rows: (prompt, group, verdict) of the duels that count."""
    prompts, groups = sorted({p for p, _, _ in rows}), sorted({g for _, g, _ in rows})
    wins, losses = np.zeros((2, len(prompts), len(groups)), int)
    for p, g, v in rows:
        wins[prompts.index(p), groups.index(g)] += v == 1
        losses[prompts.index(p), groups.index(g)] += v == -1
    low, high = interval(wins, losses)
    return {"rate": mean_rate(wins.sum(0), losses.sum(0)), "low": low, "high": high,
            "wins": int(wins.sum()), "losses": int(losses.sum()),
            "ties": sum(v == 0 for _, _, v in rows)}


duels = []
for prompt in range(PROMPTS):
    lean = random.normal(0.3, 1.2)  # what a prompt's duels have in common
    for user in range(USERS):
        criteria = [user >> 2 & 1, 2 + (user >> 1 & 1), 4 + (user & 1)]
        noisy = lean + random.normal(0, 1.0, 4)
        verdict = [1 if x > 0.4 else -1 if x < -0.4 else 0 for x in noisy]
        for k in range(4):
            if random.random() < 0.04:
                verdict[k] = 2
        duels.append({"prompt": 1000 - 7 * prompt, "user": user, "criteria": criteria,
                      "verdicts": verdict[:3], "helpfulness": verdict[3]})
random.shuffle(duels)

known = lambda v: 0 if v == 2 else v
golden = {
    "duels": duels,
    "aggregate": measure([(d["prompt"], 0, int(np.sign(sum(map(known, d["verdicts"])))))
                          for d in duels]),
    "helpfulness": measure([(d["prompt"], 0, d["helpfulness"]) for d in duels
                            if d["helpfulness"] != 2]),
    "criteria": [measure([(d["prompt"], d["user"], v) for d in duels for c, v in zip(d["criteria"],
                          d["verdicts"]) if c == criterion and v != 2])
                 for criterion in range(6)],
    "unparsed": [sum(v == 2 for d in duels for v in d["verdicts"]),
                 sum(d["helpfulness"] == 2 for d in duels)],
}
for part in [golden["aggregate"], golden["helpfulness"]] + golden["criteria"]:
    n = part["wins"] + part["losses"]
    naive = 2 * 1.96 * (part["rate"] * (1 - part["rate"]) / n) ** 0.5
    print(f"rate {part['rate']:.4f} width {part['high'] - part['low']:.4f}, of rows {naive:.4f}")
os.makedirs(os.path.join(os.path.dirname(__file__), "eval"), exist_ok=True)
with open(os.path.join(os.path.dirname(__file__), "eval", "winrate.json"), "w") as file:
    json.dump(golden, file)
