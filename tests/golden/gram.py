"""Golden facts for tests/test_merge_inspect.c: what numpy says of tests/golden/merge's adapters, from the dense
changes in float64.

    pip install numpy safetensors
    python tests/golden/gram.py        writes tests/golden/gram/
"""
import json
import math
import os

import numpy as np
from safetensors.numpy import load_file

HERE = os.path.dirname(os.path.abspath(__file__))


def changes(name):
    """Module → (s B A, A, s B, s, r), all float64."""
    with open(os.path.join(HERE, "merge", name, "adapter_config.json")) as f:
        config = json.load(f)
    tensors = load_file(os.path.join(HERE, "merge", name, "adapter_model.safetensors"))
    found = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key[len("base_model.model."):-len(".lora_A.weight")]
        a = tensors[key].astype(np.float64)
        b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
        r = a.shape[0]
        scale = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
        scale = float(np.float32(scale))
        found[module] = (scale * b @ a, a, b, scale, r)
    return found


def layer(module):
    return int(module.split("layers.")[1].split(".")[0])


def gram(matrices):
    return [[float((x * y).sum()) for y in matrices] for x in matrices]


def cosine(g):
    d = np.sqrt(np.diag(g))
    return [[None if d[i] * d[j] == 0 else (1.0 if i == j else float(g[i][j] / (d[i] * d[j])))
             for j in range(len(d))] for i in range(len(d))]


def facts(names, weights):
    adapters = [changes(n) for n in names]
    modules = sorted({m for a in adapters for m in a}, key=lambda m: (layer(m), m))
    n = len(names)
    total, out, layers = np.zeros((n, n)), [], {}
    opposed, shared = np.zeros((n, n)), np.zeros((n, n))
    exact = cross = 0
    kept = {}
    equal = True
    for m in modules:
        shape = next(a[m][0].shape for a in adapters if m in a)
        dense = [a[m][0] if m in a else np.zeros(shape) for a in adapters]
        g = np.array(gram(dense))
        soup = sum(w * d for w, d in zip(weights, dense))
        values = np.linalg.svd(soup, compute_uv=False)
        one = {"name": m, "layer": layer(m), "gram": g.tolist(), "cosine": cosine(g),
               "norms": np.sqrt(np.diag(g)).tolist(), "soup_norm": float(np.linalg.norm(soup)),
               "factors_error": None}
        ranks = sum(a[m][4] for a in adapters if m in a)
        one["singular_values"] = [float(v) for v in values[:ranks]]
        one["singular_values"] += [0.0] * (ranks - len(one["singular_values"]))
        same = all(m in a and a[m][3:] == adapters[0][m][3:] for a in adapters)
        equal &= same
        if same:
            mixed = sum(w * a[m][2] for w, a in zip(weights, adapters)) @ \
                sum(w * a[m][1] for w, a in zip(weights, adapters)) * adapters[0][m][3]
            one["factors_error"] = float(np.linalg.norm(mixed - soup) / np.linalg.norm(soup))
            cross += np.linalg.norm(mixed - soup) ** 2
        exact += np.linalg.norm(soup) ** 2
        for r in (1, 2, 4):
            kept[r] = kept.get(r, 0) + float((values[:r] ** 2).sum())
        for i in range(n):
            for j in range(n):
                if m in adapters[i] and m in adapters[j]:
                    shared[i, j] += 1
                    opposed[i, j] += g[i, j] < 0
        total += g
        layers[layer(m)] = layers.get(layer(m), 0) + g
        out.append(one)
    return {"gram": total.tolist(), "norms": np.sqrt(np.diag(total)).tolist(), "cosine": cosine(total),
            "interference": (total / np.diag(total)[:, None]).tolist(),
            "opposed": (opposed / shared).tolist(),
            "soup": {"weights": weights, "norm": math.sqrt(exact),
                     "factors": {"error": math.sqrt(cross / exact)} if equal else None,
                     "svd": [{"rank": r, "energy": k / exact} for r, k in sorted(kept.items())]},
            "layers": [{"layer": k, "norms": np.sqrt(np.diag(g)).tolist(), "cosine": cosine(g)}
                       for k, g in sorted(layers.items())],
            "modules": out}


if __name__ == "__main__":
    os.makedirs(os.path.join(HERE, "gram"), exist_ok=True)
    for file, names, weights in [("two", ["a", "b"], [0.3, 0.7]), ("three", ["a", "b", "c"], [0.5, 0.3, 0.2])]:
        with open(os.path.join(HERE, "gram", file + ".json"), "w") as f:
            json.dump(facts(names, weights), f, indent=1)
            f.write("\n")
