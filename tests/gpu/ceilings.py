"""The device, and what it can do: a copy of memory, a large bf16 product of random data."""
import json

import torch

from common import DEVICE, TINY, replayed, report

side = 64 if TINY else 8192
a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
c = torch.empty_like(a)
report("copy", "PyTorch", replayed(lambda: c.copy_(a)), bytes=4 * side * side)
if not TINY:  # the figure of a size that no cache helps
    x = torch.randn(1 << 29, device=DEVICE)
    y = torch.empty_like(x)
    report("copy, 2 GiB", "PyTorch", replayed(lambda: y.copy_(x)), bytes=2 * 4 * x.numel())
report("product, bf16, 8192", "PyTorch", replayed(lambda: torch.mm(a, b.t(), out=c)), operations=2 * side ** 3)
if DEVICE == "cuda":
    p = torch.cuda.get_device_properties(0)
    print(json.dumps({"device": p.name, "memory": p.total_memory, "capability": "%d.%d" % (p.major, p.minor),
                      "multiprocessors": p.multi_processor_count, "torch": torch.__version__}))
