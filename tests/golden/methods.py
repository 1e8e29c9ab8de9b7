"""Golden files for tests/test_methods.c: small tensors merged by mergekit's and PEFT's own code, and by numpy
in float64 from the papers' formulas.

    pip install torch==2.5.1 mergekit==0.1.4 peft==0.13.2 safetensors numpy
    python tests/golden/methods.py             writes tests/golden/methods/

Every case runs in float64; what is written is that, rounded to float32. mergekit and PEFT run a second time in
float32 and must agree. Random masks are psoup's (Philox by the tensor's name, the input and the element), put
in the place of torch.bernoulli, so that results can be compared number by number.
"""
import json
import math
import os

import numpy as np
import torch
from safetensors.numpy import save_file

import mergekit.merge_methods.generalized_task_arithmetic as gta
import mergekit.sparsify
import peft.utils.merge_utils as pm
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods.linear import LinearMergeTask
from mergekit.merge_methods.model_stock import ModelStockMergeTask
from mergekit.merge_methods.nuslerp import NuSlerpTask
from mergekit.merge_methods.passthrough import PassthroughMergeTask
from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS
from mergekit.merge_methods.slerp import SlerpTask

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "methods")
SEED = 0x1234567890ABCDEF
SHAPES = {"m": (9, 23), "v": (31,), "t": (3, 5, 7), "one": (7, 1)}
PAPER, MERGEKIT, PEFT = "paper", "mergekit", "peft"

# ---- the masks ------------------------------------------------------------------------------------------


def philox(seed, sequence, n):
    """Words 0 … n−1 of Philox4x32-10 (Salmon et al. 2011), as src/base/philox.c lays them out."""
    blocks = np.arange((n + 3) // 4, dtype=np.uint64)
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [blocks & low, blocks >> high, np.full_like(blocks, sequence & 0xFFFFFFFF),
         np.full_like(blocks, sequence >> 32)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> high) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> high) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).reshape(-1)[:n]


def sequence(name, index):
    """FNV-1a, 64 bits, of the name, a zero byte and the input's index in eight bytes."""
    h = 0xCBF29CE484222325
    for byte in name.encode() + b"\0" + index.to_bytes(8, "little"):
        h = (h ^ byte) * 0x100000001B3 % 2**64
    return h


def uniform(name, index, shape):
    n = math.prod(shape)
    return ((philox(SEED, sequence(name, index), n) >> np.uint64(8)).astype(np.float64) * 2.0**-24).reshape(shape)


class Masks:
    """Stands for the torch module inside a peer's file; its bernoulli gives our masks, input after input."""

    def __init__(self, name):
        self.name, self.index = name, 0

    def __getattr__(self, key):
        return getattr(torch, key)

    def bernoulli(self, p):
        u = torch.from_numpy(uniform(self.name, self.index, tuple(p.shape)))
        assert (u - p.double()).abs().min() > 1e-6, "a draw too close to its chance to compare"
        return (u < p.double()).to(p.dtype)


def counted(masks, function):
    """Calls function, after which masks belong to the next input."""
    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        masks.index += 1
        return out
    return call


# ---- the papers, in float64 --------------------------------------------------------------------------------


def order(x):
    """Positions from the largest magnitude to the smallest, equal ones by index."""
    return np.argsort(-np.abs(x).ravel(), kind="stable")


def thin(x, case, i):
    density, kind, peer = case["density"][i], case["thinning"], case["peer"]
    if kind is None or density >= 1:
        return x
    n, stay, keep = x.size, int(density * x.size), np.zeros(x.size, bool)
    chance = np.full(x.shape, density)
    if kind == "magnitude":
        keep[order(x)[:stay]] = True
    elif kind == "outliers":
        top = min(int(case["gamma"][i] * n), n - stay)
        if not (peer == MERGEKIT and top == 0):
            keep[order(x)[top:top + stay]] = True
    elif density > 0:
        if kind == "ranked":
            rows = np.abs(x).reshape(-1, x.shape[-1])
            ranks = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1)
            place = ranks / (rows.shape[1] - 1) if rows.shape[1] > 1 else ranks + 0.5
            epsilon = case["epsilon"][i]
            chance = (density - epsilon + place * 2 * epsilon).reshape(x.shape)
        keep = (uniform(case["name"], i, x.shape) < chance).ravel()
    kept = np.where(keep.reshape(x.shape), x, 0)
    if not case["rescale"]:
        return kept
    if kind in ("random", "ranked") and peer != MERGEKIT:
        return kept / chance
    before, after = np.abs(x).sum(), np.abs(kept).sum()
    return kept * (before / after) if min(before, after) >= 1e-7 else kept


def deltas_merged(case, inputs, base):
    peer, weights = case["peer"], case["weight"]
    used = [i for i, w in enumerate(weights) if w != 0]
    x = np.stack([thin(inputs[i] - base, case, i) for i in used])
    w = np.array([weights[i] for i in used]).reshape([-1] + [1] * base.ndim)
    if not case["elects"]:
        out = (x * w).sum(0)
        if case["normalize"] and abs(sum(weights)) >= 1e-8:
            out = out / sum(weights)
    else:
        votes = x * w if peer == MERGEKIT else x
        total = (np.sign(votes) if case["vote"] == "frequency" else votes).sum(0)
        sign = np.where(total > 0, 1, np.where(total < 0, -1, 0 if peer == PAPER else 1))
        agree = (np.sign(votes) == sign) & (sign != 0)
        out = (x * w * agree).sum(0)
        divisor = agree.sum(0) if peer == PEFT else (w * agree).sum(0)
        if case["normalize"]:
            out = out / np.where(divisor == 0, 1, divisor)
    return base + case["lambda"] * out


def angle(a, b):
    return math.acos(max(-1, min(1, float((a * b).sum()) / np.linalg.norm(a) / np.linalg.norm(b))))


def slerp(t, a, b):
    theta = angle(a, b) if a.any() and b.any() else math.pi / 2
    if abs(math.cos(theta)) > 0.9995:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


# ---- the peers ---------------------------------------------------------------------------------------------


def references(n):
    return [ModelReference.parse(f"org/{c}") for c in "abcdefgh"[:n]], ModelReference.parse("org/base")


def run_mergekit(case, inputs, base):
    models, base_model = references(len(inputs))
    info = WeightInfo(name=case["name"])
    tensors = dict(zip(models, inputs))
    parameters = ImmutableMap({m: ImmutableMap({
        k: case[k][i] for k in ("weight", "density", "gamma", "epsilon", "scale") if case.get(k) is not None})
        for i, m in enumerate(models)})
    method = case["method"]
    if method == "linear":
        return LinearMergeTask.model_construct(gather_tensors=None, tensor_parameters=parameters,
                                               normalize=case["normalize"], weight_info=info).execute(tensors)
    if method == "passthrough":
        return PassthroughMergeTask.model_construct(gather_tensors=None,
                                                    tensor_parameters=parameters).execute(tensors)
    if method == "slerp":
        pair = {base_model: base, models[0]: inputs[0]}
        return SlerpTask.model_construct(gather_tensors=None, base_model=base_model, t=case["t"],
                                         weight_info=info).execute(pair)
    if base is not None:
        tensors[base_model] = base
    if method == "nuslerp":
        return NuSlerpTask.model_construct(
            gather_tensors=None, tensor_parameters=parameters, weight_info=info, row_wise=case["row_wise"],
            flatten=case["flatten"], base_model=base_model if base is not None else None).execute(tensors)
    if method == "model_stock":
        return ModelStockMergeTask.model_construct(gather_tensors=None, base_model=base_model, weight_info=info,
                                                   filter_wise=case["filter_wise"]).execute(tensors)
    masks = Masks(case["name"])
    real, mergekit.sparsify.torch = gta.sparsify, masks
    gta.sparsify = counted(masks, real)
    try:
        return gta.GTATask.model_construct(
            method=REGISTERED_MERGE_METHODS[method], tensors=None, base_model=base_model, weight_info=info,
            tensor_parameters=parameters, int8_mask=False, normalize=case["normalize"],
            lambda_=case["lambda"], rescale_norm=mergekit.sparsify.RescaleNorm.l1 if case["rescale"] else None,
        ).execute(tensors)
    finally:
        gta.sparsify, mergekit.sparsify.torch = real, torch


def run_peft(case, inputs, base):
    assert base is None
    masks = Masks(case["name"])
    real, pm.torch = pm.prune, masks
    pm.prune = counted(masks, real)
    args = [list(inputs), torch.tensor(case["weight"], dtype=inputs[0].dtype)]
    if case["method"] != "task_arithmetic":
        args.append(case["density"][0])
    if case["elects"]:
        args.append(case["vote"])
    try:
        return getattr(pm, case["method"])(*args)
    finally:
        pm.prune, pm.torch = real, torch


# ---- the cases ---------------------------------------------------------------------------------------------

DELTA = {  # thinning, elects
    "task_arithmetic": (None, False), "magnitude_prune": ("magnitude", False), "ties": ("magnitude", True),
    "dare_linear": ("random", False), "dare_ties": ("random", True), "della": ("ranked", True),
    "della_linear": ("ranked", False), "breadcrumbs": ("outliers", False), "breadcrumbs_ties": ("outliers", True),
}
cases = []


def add(method, peer=MERGEKIT, n=3, shape="m", base=True, **changes):
    kind, elects = DELTA.get(method, (None, False))
    case = dict(method=method, peer=peer, tensors=shape, inputs=[f"{shape}.{c}" for c in "abc"[:n]],
                base=f"{shape}.base" if base else None, thinning=kind, elects=elects, weight=[0.5, 0.9, -0.3][:n],
                density=[0.5, 0.3, 0.7][:n], gamma=[0.05, 0.1, 0.02][:n], epsilon=[0.15, 0.1, 0.2][:n], t=0.3,
                normalize=False, rescale=False, vote="total", flatten=True, row_wise=False, filter_wise=False,
                scale=None, name=f"layer.{len(cases)}.weight")
    case["lambda"] = 1.0
    case.update(changes)
    cases.append(case)


def make_cases():
    for weight in ([0.5, 0.9, -0.3], [1, 0, 2], [0, 0, 1.5]):
        for normalize in (False, True):
            add("linear", weight=weight, normalize=normalize, base=False)
            add("task_arithmetic", weight=weight, normalize=normalize, **{"lambda": 0.7})
    add("task_arithmetic", weight=[1, -1, 0], normalize=True)
    add("task_arithmetic", n=1, shape="v")
    add("linear", n=1, shape="one", base=False)
    for method, (kind, elects) in DELTA.items():
        if kind is None or method == "magnitude_prune":
            continue
        for normalize, rescale in ((False, False), (True, False), (False, True), (True, True)):
            for peer in (MERGEKIT, PAPER):
                add(method, peer, normalize=normalize, rescale=rescale, **{"lambda": 1.3})
        for peer in (MERGEKIT, PAPER):
            add(method, peer, shape="v", rescale=True, normalize=True)
            add(method, peer, density=[1, 0.4, 1.0], rescale=True, weight=[0.6, 0.7, 0.8])
            add(method, peer, n=1, weight=[0.8])
            add(method, peer, weight=[0.7, 0, 0.4], normalize=True)
        add(method, PAPER, density=[0, 0.4, 0.001], epsilon=[0.15, 0.15, 0.0005])
        add(method, PAPER, vote="frequency")
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        for peer in (MERGEKIT, PAPER):
            add(method, peer, gamma=[0, 0.001, 0.2])
            add(method, peer, gamma=[0.6, 0.7, 0.99])
    for method in ("magnitude_prune", "ties", "dare_linear", "dare_ties"):
        for vote in ("total", "frequency") if DELTA[method][1] else ("total",):
            for density in (0.4, 1.0):
                add(method, PEFT, base=False, density=[density] * 3, vote=vote, normalize=DELTA[method][1],
                    weight=[0.5, 0.9, 0.3])
        add(method, PEFT, base=False, shape="v", density=[0.2] * 3, normalize=DELTA[method][1])
    add("magnitude_prune", PAPER, rescale=True, normalize=True)
    add("magnitude_prune", PAPER, density=[0, 0, 0])
    add("task_arithmetic", PEFT, base=False)
    for t in (0, 0.3, 0.5, 1):
        add("slerp", n=1, t=t)
        add("slerp", n=1, t=t, shape="v")
    add("slerp", n=1, inputs=["m.near"])
    add("slerp", n=1, inputs=["m.opposite"])
    add("slerp", n=1, inputs=["m.zero"])
    for shape in SHAPES:
        for flatten, row_wise in ((True, False), (False, False), (False, True)):
            if shape == "one" and not flatten and not row_wise:
                continue  # mergekit's rows of one element are all colinear, and its squeeze() breaks on them
            for base in (False, True):
                add("nuslerp", n=2, shape=shape, base=base, flatten=flatten, row_wise=row_wise,
                    weight=[0.5, 0.9])
    add("nuslerp", n=2, weight=[1, 0], base=False)
    add("nuslerp", n=2, weight=[0.5, -0.5])
    for shape in ("m", "v", "t"):
        for filter_wise in (False, True):
            for n in (2, 3):
                add("model_stock", n=n, shape=shape, filter_wise=filter_wise)
    add("passthrough", n=1, base=False)
    add("passthrough", n=1, base=False, scale=[-1.7])


def make_tensors():
    rng = np.random.default_rng(3)
    tensors = {}
    for shape, dims in SHAPES.items():
        base = rng.standard_normal(dims)
        common = rng.standard_normal(dims) * 0.05
        tensors[f"{shape}.base"] = base
        for c in "abc":
            tensors[f"{shape}.{c}"] = base + common + rng.standard_normal(dims) * 0.1
    base = tensors["m.base"]
    tensors["m.near"] = base * 1.5 + rng.standard_normal(base.shape) * 1e-3
    tensors["m.opposite"] = -base * 0.5 + rng.standard_normal(base.shape) * 1e-3
    tensors["m.zero"] = np.zeros_like(base)
    return {k: v.astype(np.float32) for k, v in tensors.items()}


def make_adapters(out):
    """Three adapters of one linear, what PEFT's functions make of their ΔW, and numpy's best fits of that."""
    rng = np.random.default_rng(5)
    rows, columns, ranks = 24, 40, (4, 2, 3)
    pairs = []
    for c, rank in zip("abc", ranks):
        a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
        out[f"lora.{c}.A"], out[f"lora.{c}.B"] = a.astype(np.float32), b.astype(np.float32)
        pairs.append(out[f"lora.{c}.B"].astype(np.float64) @ out[f"lora.{c}.A"].astype(np.float64))
    for method in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        case = dict(method=method, elects=DELTA[method][1], vote="total", weight=[0.5, 0.3, 0.2],
                    density=[0.4] * 3, name="lora")
        dense = run_peft(case, [torch.from_numpy(1.5 * x) for x in pairs], None).numpy()  # their scale is 1.5
        out[f"dense.{method}"] = dense.astype(np.float32)
        s = np.linalg.svd(dense, compute_uv=False)
        out[f"lost.{method}"] = np.array([math.sqrt((s[r:] ** 2).sum() / (s ** 2).sum())
                                          for r in range(len(s) + 1)])


def reference(case, inputs, base):
    method = case["method"]
    if method in DELTA:
        return deltas_merged(case, inputs, base if base is not None else np.zeros_like(inputs[0]))
    if method == "linear":
        total = sum(case["weight"]) if case["normalize"] else 1
        return sum(w * x for w, x in zip(case["weight"], inputs)) / total
    if method == "slerp":
        return slerp(case["t"], base, inputs[0])
    if method == "passthrough":
        return inputs[0] * (case["scale"][0] if case["scale"] else 1)
    return None  # nuslerp, model_stock: mergekit's own is the reference


def main():
    tensors = make_tensors()
    out, worst = dict(tensors), {}
    make_cases()
    for index, case in enumerate(cases):
        inputs = [tensors[i].astype(np.float64) for i in case["inputs"]]
        base = tensors[case["base"]].astype(np.float64) if case["base"] else None
        results = []
        expected = reference(case, inputs, base)
        if expected is not None:
            results.append(expected)
        run = {MERGEKIT: run_mergekit, PEFT: run_peft}.get(case["peer"])
        if run is not None:
            for dtype in (torch.float64, torch.float32):
                made = run(case, [torch.from_numpy(x).to(dtype) for x in inputs],
                           torch.from_numpy(base).to(dtype) if base is not None else None)
                results.append(made.double().numpy())
        for other in results[1:]:
            gap = np.abs(other - results[0]).max()
            worst[case["method"]] = max(worst.get(case["method"], 0), gap)
            assert gap < 1e-5, (index, case, gap)
        out[f"case.{index}"] = results[0].astype(np.float32)
    make_adapters(out)
    print({k: f"{v:.1e}" for k, v in worst.items()})
    os.makedirs(HERE, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in out.items()}, os.path.join(HERE, "model.safetensors"))
    for case in cases:  # what the method does not read, or has the value that the test assumes, is left out
        uses = {"weight": case["method"] not in ("slerp", "model_stock", "passthrough"),
                "density": case["thinning"] is not None, "gamma": case["thinning"] == "outliers",
                "epsilon": case["thinning"] == "ranked", "t": case["method"] == "slerp"}
        assumed = {"peer": MERGEKIT, "vote": "total", "flatten": True, "lambda": 1.0, "base": None, "scale": None}
        for key in list(case):
            if key in ("name", "tensors", "thinning", "elects") or not uses.get(key, True) or \
                    assumed.get(key, False) is case[key]:
                del case[key]
    with open(os.path.join(HERE, "cases.json"), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()
