"""The stages' files as one table in Markdown: each figure beside its floor, its peers and its goal."""
import glob
import json
import os
import sys

# Of an op: the least share of its floor; and how many times as long as the peer it may take.
OPS = {"sum": 0.92, "rmsnorm": 0.85, "rope": 0.85, "swiglu": 0.85, "adamw": 0.85, "attention": 0.33,
       "attention_back": 0.20, "attention_decode": 0.80}
AS_LONG_AS = {"attention": 1.3, "attention_back": 1.3}
# Of a key: (the least share of the floor, how many times as fast as the fastest peer, the least share of another
# key's speed and that key)
GOALS = {
    "interpolation, 2 × bf16": (0.92, None, None),
    "interpolation, 3 × bf16": (0.92, None, None),
    "interpolation, 8 × bf16": (0.92, None, None),
    "decode, batch 1": (0.75, None, None),
    "decode, batch 64": (0.65, None, None),
    "decode, batch 1, 8 adapters": (None, None, (0.80, "decode, batch 1")),
    "decode, batch 64, 8 adapters": (None, None, (0.90, "decode, batch 64")),
    "LoRA training step": (0.50, 1.5, None),
    "PPO step": (None, 3.0, None),
}
ORDER = ("device", "correctness", "sanitizer", "ops", "decode", "train", "ppo", "merge")


def read(out):
    files = {}
    for path in glob.glob(os.path.join(out, "*.json")):
        with open(path) as file:
            result = json.load(file)
        files[result["stage"]] = result
    return files


def figures(files):
    """Ours by key, peers by key as [(who, ms or None, what went wrong)], in the order they came."""
    ours, peers = {}, {}
    for stage in ORDER:
        for line in files.get(stage, {}).get("lines", ()):
            if "op" in line:  # checkops --bench
                key = "%s · %s" % (line["op"], line["shape"])
                ours[key] = {"ms": 1e3 * line["seconds"], "bytes": line["bytes"], "operations": line["flops"],
                             "op": line["op"]}
            elif line.get("who") == "psoup":
                ours[line["key"]] = line
            elif "key" in line:
                peers.setdefault(line["key"], []).append((line["who"], line.get("ms"), line.get("error")))
    return ours, peers


def ceilings(files, ours):
    """Bytes and operations in a millisecond: the best that was seen of a copy and of a product."""
    rates = {"bytes": 0.0, "operations": 0.0}
    lines = [line for line in files.get("device", {}).get("lines", ()) if "ms" in line]
    lines += [f for key, f in ours.items() if f.get("op") in ("copy", "product")]
    for line in lines:
        product = "product" in (line.get("key") or line.get("op"))
        name = "operations" if product else "bytes"
        rates[name] = max(rates[name], line[name] / line["ms"])
    return rates


def number(x):
    return "–" if x is None else "%.3g" % x if x < 1000 else "%.0f" % x


def goals_of(key, figure, floor, fastest, ours):
    """The goals as (text, what was reached, whether that is enough)."""
    share = floor / figure["ms"] if floor else None
    op = figure.get("op")
    least, times, other = (OPS.get(op), None, None) if op else GOALS.get(key, (None, None, None))
    found = []
    if least is not None and share is not None:
        found.append(("≥ %.2f of the floor" % least, share, share >= least))
    if times is not None and fastest:
        found.append(("≥ %.1f × the peer" % times, fastest / figure["ms"], fastest / figure["ms"] >= times))
    if op in AS_LONG_AS and fastest:
        longer = figure["ms"] / fastest
        found.append(("≤ %.1f × the peer's time" % AS_LONG_AS[op], longer, longer <= AS_LONG_AS[op]))
    if other is not None and other[1] in ours:
        reached = ours[other[1]]["ms"] / figure["ms"]
        found.append(("≥ %.2f of the base's speed" % other[0], reached, reached >= other[0]))
    return found


def rows_of(key, figure, rates, ours, peers):
    floors = [figure.get(name, 0) / rate for name, rate in rates.items() if rate]
    floor = max(floors) if floors else 0
    measured = [(ms, who) for who, ms, _ in peers.get(key, ()) if ms]
    fastest = min(measured)[0] if measured else None
    told = "; ".join("%s %s" % (who, number(ms) if ms else "failed: " + error)
                     for who, ms, error in peers.get(key, ()))
    text = "; ".join("%s: %.2f, %s" % (goal, reached, "met" if good else "**not met**")
                     for goal, reached, good in goals_of(key, figure, floor, fastest, ours))
    share = "%.2f" % (floor / figure["ms"]) if floor else "–"
    return "| %s | %s | %s | %s | %s | %s |" % (key, number(figure["ms"]), number(floor or None), share, told or "–",
                                              text or "–")


def of(out):
    """The table, the goals that nothing of ours was measured for, and ours that have a goal and no peer's time."""
    files = read(out)
    ours, peers = figures(files)
    rates = ceilings(files, ours)
    lines = []
    for stage in ORDER:
        f = files.get(stage)
        lines.append("- %s: %s" % (stage, "not measured yet" if f is None else
                                   "%s, driver %s, nvcc %s, commit %s, %s" % (f["device"], f["driver"], f["nvcc"],
                                                                              f["commit"], f["date"])))
        for c in f["commands"] if f else ():
            if stage in ("correctness", "sanitizer") or c["wrong"]:
                lines.append("  - `%s`: %s" % (c["command"], c["wrong"] or "passed"))
    if rates["bytes"] and rates["operations"]:
        lines += ["", "Ceilings: a copy moves %.0f GB/s, a bf16 product makes %.0f TFLOP/s. A floor is the larger of "
                  "the bytes at the one and the operations at the other."
                  % (rates["bytes"] / 1e6, rates["operations"] / 1e9)]
    lines += ["", "| | ours, ms | floor, ms | of the floor | peers, ms | goals |", "|---|---|---|---|---|---|"]
    lines += [rows_of(key, figure, rates, ours, peers) for key, figure in ours.items()]
    ops = {figure.get("op") for figure in ours.values()}
    lost = [op for op in OPS if op not in ops]
    lost += [key for key in GOALS if key not in ours and ("merge" in files or "interpolation" not in key)]
    alone = [key for key, figure in ours.items() if (figure.get("op") in OPS or key in GOALS) and
             not any(ms for _, ms, _ in peers.get(key, ()))]
    return "# Speed on a GPU\n\n" + "\n".join(lines) + "\n", lost, alone


if __name__ == "__main__":
    print(of(sys.argv[1])[0])
