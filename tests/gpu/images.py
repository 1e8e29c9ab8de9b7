"""What the kernels of a library are compiled for: images.py LIBRARY 80 90 …

Every fatbin in the file has machine code for each architecture named, and PTX of the last. A fatbin is a header and entries,
each with a header of its own, as NVIDIA's fatbinary writes them.
"""
import struct
import sys

MAGIC, PTX, CODE = struct.pack("<IH", 0xBA55ED50, 1), 1, 2


def entries(data, at):
    """(kind, architecture) of each entry of the fatbin that begins there."""
    header, size = struct.unpack_from("<HQ", data, at + 6)
    at += header
    end = at + size
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
        yield kind, struct.unpack_from("<I", data, at + 28)[0]
        at += header + size


def main(path, *archs):
    data = open(path, "rb").read()
    want = {(CODE, int(a)) for a in archs} | {(PTX, int(archs[-1]))}
    n, at = 0, data.find(MAGIC)
    while at >= 0:
        have = set(entries(data, at))
        if have != want:
            sys.exit("%s: kernels are for %s, not %s" % (path, sorted(have), sorted(want)))
        n, at = n + 1, data.find(MAGIC, at + 1)
    if n == 0:
        sys.exit("%s: no kernels" % path)
    print("GPU: %d files of kernels, each for %s and PTX" % (n, " ".join(archs)))


main(*sys.argv[1:])
