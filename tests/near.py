"""near.py A B TOLERANCE: whether the f32 tensors of two safetensors files are the same to ‖a − b‖ ≤ TOLERANCE ‖b‖."""
import array
import json
import math
import struct
import sys


def tensors(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        assert t["dtype"] == "F32", (path, name, t["dtype"])
        begin, end = t["data_offsets"]
        out[name] = array.array("f", data[begin:end])
    return out


a, b, tolerance = tensors(sys.argv[1]), tensors(sys.argv[2]), float(sys.argv[3])
assert a.keys() == b.keys() and a, "other tensors"
off = math.sqrt(sum((x - y) ** 2 for name in a for x, y in zip(a[name], b[name])))
size = math.sqrt(sum(y * y for name in b for y in b[name]))
print("%.3g apart, of %.3g" % (off, size))
sys.exit(not (size > 0 and off <= tolerance * size))
