#!/usr/bin/env python3
"""The peer of tests/bench_methods.c: mergekit's own code (pip install mergekit torch) on a base and three
models of one bf16 linear [4096, 4096], two threads; prints the seconds of METHOD, the better of bf16 and f32
arithmetic. For "svd": the rank-16 fit of six rank-16 adapters by LAPACK's QR and SVD of the small factors.
"""
import sys
import time

import torch

N, INPUTS, TURNS = 4096, 3, 2
torch.set_num_threads(2)
torch.manual_seed(0)


def best(function, turns=TURNS):
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def svd():
    b, a = torch.randn(N, 96), torch.randn(96, N)

    def fit():
        q, r = torch.linalg.qr(b.double())
        p, s = torch.linalg.qr(a.double().T)
        u, values, vt = torch.linalg.svd(r @ s.T)
        root = values[:16].sqrt()
        return (q @ (u[:, :16] * root)).float(), (root[:, None] * (vt[:16] @ p.T)).float()

    return best(fit)


def mergekit(method):
    from mergekit.architecture import WeightInfo
    from mergekit.common import ImmutableMap, ModelReference
    from mergekit.merge_methods.generalized_task_arithmetic import GTATask
    from mergekit.merge_methods.model_stock import ModelStockMergeTask
    from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS
    from mergekit.merge_methods.slerp import SlerpTask
    from mergekit.sparsify import RescaleNorm

    info, root = WeightInfo(name="linear"), ModelReference.parse("org/base")
    models = [ModelReference.parse(f"org/{c}") for c in "abc"]
    parameters = ImmutableMap({m: ImmutableMap({"weight": w, "density": 0.5, "gamma": 0.01, "epsilon": 0.15})
                               for m, w in zip(models, (0.5, 0.3, 0.2))})
    if method == "slerp":
        task = SlerpTask.model_construct(gather_tensors=None, base_model=root, t=0.3, weight_info=info)
        models = models[:1]
    elif method == "model_stock":
        task = ModelStockMergeTask.model_construct(gather_tensors=None, base_model=root, weight_info=info,
                                                   filter_wise=False)
    else:
        how = REGISTERED_MERGE_METHODS[method]
        task = GTATask.model_construct(
            method=how, tensors=None, base_model=root, weight_info=info, tensor_parameters=parameters,
            int8_mask=False, normalize=how.default_normalize, lambda_=1.0,
            rescale_norm=RescaleNorm.l1 if how.default_rescale else None)
    base = torch.randn(N, N).bfloat16()
    others = [(base.float() + 0.01 * torch.randn(N, N)).bfloat16() for _ in models]
    return min(best(lambda: task.execute({root: base.to(dtype)} | {m: x.to(dtype) for m, x in zip(models, others)}))
               for dtype in (torch.bfloat16, torch.float32))


with torch.inference_mode():
    print(svd() if sys.argv[1] == "svd" else mergekit(sys.argv[1]))
