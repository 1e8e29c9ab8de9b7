# Win rates with clustered bootstrap intervals, by numpy, for tests/test_eval.c.
#   pip install numpy;  python tests/golden/eval.py
import json
import os

import numpy as np

random = np.random.default_rng(5)
PROMPTS, USERS, REPLICATES = 40, 8, 200000


def interval(wins, losses):
    """Percentile interval: whole prompts are drawn with replacement."""
    rates = []
    for _ in range(REPLICATES // 1000):
        picks = random.integers(0, len(wins), (1000, len(wins)))
        w, l = wins[picks].sum(1), losses[picks].sum(1)
        rates.append(w[w + l > 0] / (w + l)[w + l > 0])
    return np.percentile(np.concatenate(rates), [2.5, 97.5])


def measure(rows):
    """rows: (prompt, verdict) of the duels that count."""
    prompts = sorted({p for p, _ in rows})
    wins = np.array([sum(p == q and v == 1 for q, v in rows) for p in prompts])
    losses = np.array([sum(p == q and v == -1 for q, v in rows) for p in prompts])
    low, high = interval(wins, losses)
    w, l = int(wins.sum()), int(losses.sum())
    return {"rate": w / (w + l), "low": low, "high": high, "wins": w, "losses": l,
            "ties": sum(v == 0 for _, v in rows)}


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
    "aggregate": measure([(d["prompt"], int(np.sign(sum(map(known, d["verdicts"])))))
                          for d in duels]),
    "helpfulness": measure([(d["prompt"], d["helpfulness"]) for d in duels
                            if d["helpfulness"] != 2]),
    "criteria": [measure([(d["prompt"], v) for d in duels for c, v in zip(d["criteria"],
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
