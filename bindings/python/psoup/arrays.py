"""Numbers in and out without a copy: numpy arrays, DLPack (torch, jax, ...), the buffer protocol.

What goes in is looked at in this order:
  1. `__array_interface__`, which numpy arrays have: the only one that tells read-only arrays, and that
     knows the dtypes of ml_dtypes (bfloat16, float8);
  2. `__dlpack__`: torch and others, bfloat16 included;
  3. the buffer protocol: bytes, bytearray, array.array, memoryview, mmap.
What comes out is a numpy array where numpy is there, and a memoryview of the same shape where it is not.
"""

from __future__ import annotations

import array
import ctypes
import sys
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_ssize_t, c_uint8, c_uint16, \
    c_uint64, c_void_p, py_object
from typing import Any, Optional, Sequence, Tuple, Union

from ._abi import Dtype
from ._library import lib, member

try:
    import numpy  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # everything works without it
    numpy = None  # type: ignore[assignment]

__all__ = ["View", "view", "packed", "empty", "empty_like"]

DtypeLike = Union[Dtype, str, int]

# ---- dtypes -------------------------------------------------------------------------------------------

_NAMES = {  # as numpy, ml_dtypes and torch spell them
    "float32": Dtype.F32, "float16": Dtype.F16, "bfloat16": Dtype.BF16, "float64": Dtype.F64,
    "int8": Dtype.I8, "uint8": Dtype.U8, "int16": Dtype.I16, "int32": Dtype.I32, "int64": Dtype.I64,
    "bool": Dtype.BOOL, "float8_e4m3fn": Dtype.F8_E4M3, "float8_e5m2": Dtype.F8_E5M2,
    "half": Dtype.F16, "float": Dtype.F32, "double": Dtype.F64,
}
_DLPACK = {(0, 8): "int8", (0, 16): "int16", (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8",
           (2, 16): "float16", (2, 32): "float32", (2, 64): "float64", (4, 16): "bfloat16", (6, 8): "bool",
           (10, 8): "float8_e4m3fn", (12, 8): "float8_e5m2"}
_FORMATS = {"f": "float32", "d": "float64", "e": "float16", "b": "int8", "B": "uint8", "c": "uint8",
            "h": "int16", "?": "bool"}
_OUT = {Dtype.F32: ("float32", "f"), Dtype.F16: ("float16", "H"), Dtype.F64: ("float64", "d"),
        Dtype.I8: ("int8", "b"), Dtype.U8: ("uint8", "B"), Dtype.I16: ("int16", "h"),
        Dtype.I32: ("int32", "i"), Dtype.I64: ("int64", "q"), Dtype.BOOL: ("bool", "?")}


def dtype_of(value: DtypeLike) -> Dtype:
    """A dtype by psoup's name, numpy's or torch's, or as an object of theirs."""
    if isinstance(value, int):
        return Dtype(value)
    name = value if isinstance(value, str) else getattr(value, "name", None) or str(value)
    name = name.rsplit(".", 1)[-1].lower()
    if name in _NAMES:
        return _NAMES[name]
    return Dtype(member(Dtype, name, "dtype"))


def _named(name: str, what: str) -> Dtype:
    if name not in _NAMES:
        raise TypeError("%s has dtype %s, which psoup does not know" % (what, name))
    return _NAMES[name]


# ---- views ------------------------------------------------------------------------------------------


class View:
    """Where an array's numbers lie: `address`, `dtype`, `shape`, `strides` (in elements), and whether that is
    `on_gpu`. It keeps the array alive and its memory in place."""

    __slots__ = ("address", "dtype", "shape", "strides", "readonly", "owner", "on_gpu", "_buffer")

    def __init__(self, address: int, dtype: Dtype, shape: Tuple[int, ...], strides: Optional[Tuple[int, ...]],
                 readonly: bool, owner: Any, on_gpu: bool = False) -> None:
        self.address, self.dtype, self.shape, self.readonly = address, dtype, shape, readonly
        self.strides = strides if strides is not None else contiguous(shape)
        self.owner, self.on_gpu = owner, on_gpu

    @property
    def size(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def is_contiguous(self) -> bool:
        if self.size == 0:
            return True
        return all(d == 1 or s == c for d, s, c in zip(self.shape, self.strides, contiguous(self.shape)))

    def pointer(self, kind: Any) -> Any:
        """A ctypes pointer to the first element."""
        return ctypes.cast(self.address, POINTER(kind))


def contiguous(shape: Sequence[int]) -> Tuple[int, ...]:
    """Row-major strides, in elements."""
    out, step = [], 1
    for d in reversed(shape):
        out.append(step)
        step *= d
    return tuple(reversed(out))


def view(x: Any, dtype: Optional[DtypeLike] = None, *, writable: bool = False, gpu: bool = False,
         what: str = "the array") -> View:
    """The numbers of `x`, without a copy. `dtype` reads elements of the same size as another type
    (bfloat16 held as uint16). Raises TypeError where x is no array of a known dtype, or on a GPU and `gpu`
    does not allow that; ValueError where it must be writable and is not."""
    if isinstance(x, View):
        found = x
    else:
        wanted = dtype_of(dtype) if dtype is not None else None
        if hasattr(x, "__array_interface__"):
            found = _from_numpy(x, wanted, what)
        elif hasattr(x, "__dlpack__"):
            found = _from_dlpack(x, wanted, what)
        else:
            found = _from_buffer(x, wanted, what)
    if found.on_gpu and not gpu:
        raise TypeError("%s is not in the host's memory" % what)
    if writable and found.readonly:
        raise ValueError("%s is read-only" % what)
    return found


def packed(x: Any, dtype: DtypeLike, shape: Sequence[int], *, gpu: bool = False, what: str = "the buffer") -> View:
    """The bytes of a buffer as row-major elements of a dtype and shape: of q8_0, whose 32 elements take 34
    bytes together, and of whatever else lies in plain bytes."""
    kind, shape = dtype_of(dtype), tuple(shape)
    seen = view(x, gpu=gpu, what=what)
    expected = bytes_of(kind, shape)
    if not seen.is_contiguous or seen.size * (lib.psoup_dtype_size(seen.dtype) or 1) != expected:
        raise ValueError("%s is not %d bytes together, which %s%s takes"
                         % (what, expected, kind.name.lower(), list(shape)))
    return View(seen.address, kind, shape, None, seen.readonly, seen, seen.on_gpu)


def result_view(x: Any, dtype: DtypeLike, shape: Sequence[int], *, gpu: bool = False, what: str) -> View:
    """Where a result of a dtype and shape is to be written: the array itself, or, of a type that its library
    has not, the bits that `empty` makes for it."""
    kind = dtype_of(dtype)
    try:
        seen = view(x, writable=True, gpu=gpu, what=what)
    except TypeError:  # uint16, say
        return view(x, kind, writable=True, gpu=gpu, what=what)
    return packed(x, kind, shape, gpu=gpu, what=what) if seen.dtype == Dtype.U8 and kind != Dtype.U8 else seen


def bytes_of(kind: Dtype, shape: Sequence[int]) -> int:
    n = 1
    for d in shape:
        n *= d
    if kind == Dtype.Q8_0:
        if shape and shape[-1] % 32:
            raise ValueError("rows of q8_0 have a multiple of 32 elements: %s" % list(shape))
        return n // 32 * 34
    return n * lib.psoup_dtype_size(kind)


def _reread(found: str, bits: int, wanted: Optional[Dtype], what: str) -> Dtype:
    if wanted is None:
        return _named(found, what)
    size = lib.psoup_dtype_size(wanted) or 1
    if size * 8 != bits:
        raise TypeError("%s has elements of %d bits, and %s has %d" % (what, bits, wanted.name.lower(), size * 8))
    return wanted


def _from_numpy(x: Any, wanted: Optional[Dtype], what: str) -> View:
    face = x.__array_interface__
    address, readonly = face["data"]
    itemsize = x.dtype.itemsize
    if face["typestr"][0] == ">" and itemsize > 1:
        raise TypeError("%s is big-endian" % what)
    strides = face.get("strides")
    if strides is not None:
        if any(s % itemsize for s in strides):
            raise TypeError("%s has strides that are no multiple of its element" % what)
        strides = tuple(s // itemsize for s in strides)
    return View(address, _reread(x.dtype.name, itemsize * 8, wanted, what), tuple(face["shape"]), strides,
                readonly, x)


class _DLTensor(ctypes.Structure):  # dlpack.h
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
                ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16), ("shape", POINTER(c_int64)),
                ("strides", POINTER(c_int64)), ("byte_offset", c_uint64)]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, [py_object, c_char_p]
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13


def _from_dlpack(x: Any, wanted: Optional[Dtype], what: str) -> View:
    if getattr(x, "requires_grad", False):
        x = x.detach()  # shares its memory
    source = x
    if "float8" in str(getattr(x, "dtype", "")) and type(x).__module__.split(".")[0] == "torch":
        name = str(x.dtype).rsplit(".", 1)[-1]  # torch has no DLPack for these: its bytes have
        wanted, x = wanted or _named(name, what), x.view(sys.modules["torch"].uint8)
    try:
        device, _ = x.__dlpack_device__()
    except (ValueError, RuntimeError):  # torch's "meta"
        device = None
    on_gpu = device in (_CUDA, _CUDA_MANAGED)
    if not on_gpu and device not in (_CPU, _CUDA_HOST):
        raise TypeError("%s is not in the host's memory" % what)
    # The capsule is not consumed: it returns the tensor to its library when the view lets go of it. Stream −1:
    # nobody waits, the context's stream is where the order is made.
    capsule = x.__dlpack__(stream=-1) if on_gpu else x.__dlpack__()
    t = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else None
    found = _DLPACK.get((t.code, t.bits), "(%d, %d bits)" % (t.code, t.bits)) if t.lanes == 1 else "(vector)"
    return View((t.data or 0) + t.byte_offset, _reread(found, t.bits, wanted, what), shape, strides, False,
                (source, capsule), on_gpu)


class _PyBuffer(ctypes.Structure):  # CPython's Py_buffer, of its stable interface
    _fields_ = [("buf", c_void_p), ("obj", py_object), ("len", c_ssize_t), ("itemsize", c_ssize_t),
                ("readonly", c_int), ("ndim", c_int), ("format", c_char_p), ("shape", POINTER(c_ssize_t)),
                ("strides", POINTER(c_ssize_t)), ("suboffsets", POINTER(c_ssize_t)), ("internal", c_void_p)]


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.restype, _get_buffer.argtypes = c_int, [py_object, POINTER(_PyBuffer), c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.restype, _release_buffer.argtypes = None, [POINTER(_PyBuffer)]
_FULL_RO = 0x011C


class _Held:
    """A buffer that stays exported (its bytearray cannot be resized, its mmap not closed)."""

    def __init__(self, x: Any) -> None:
        self.buffer = _PyBuffer()
        self.got = False
        _get_buffer(x, ctypes.byref(self.buffer), _FULL_RO)
        self.got = True

    def __del__(self) -> None:
        if self.got:
            _release_buffer(ctypes.byref(self.buffer))


def _from_buffer(x: Any, wanted: Optional[Dtype], what: str) -> View:
    try:
        held = _Held(x)
    except (TypeError, BufferError) as error:
        raise TypeError("%s is neither an array nor a buffer: %s" % (what, error)) from None
    b = held.buffer
    if b.suboffsets and any(b.suboffsets[i] >= 0 for i in range(b.ndim)):
        raise TypeError("%s is an array of pointers" % what)
    letter = (b.format or b"B").decode().lstrip("@=<")
    bits = b.itemsize * 8
    found = _FORMATS.get(letter) or ("int%d" % bits if letter in "ilqn" else "with format %r" % letter)
    shape = tuple(b.shape[i] for i in range(b.ndim))
    size = max(b.itemsize, 1)
    strides = tuple(b.strides[i] // size for i in range(b.ndim)) if b.strides else None
    return View(b.buf or 0, _reread(found, bits, wanted, what), shape, strides, bool(b.readonly), (x, held))


# ---- arrays of our own --------------------------------------------------------------------------------


def empty(shape: Union[int, Sequence[int]], dtype: DtypeLike = Dtype.F32) -> Any:
    """A new array, its values not set: numpy's where it is there, otherwise a memoryview. bfloat16 and
    float8 are ml_dtypes' where that is there, and otherwise their bits as uint16 and uint8; q8_0 is its bytes
    (see `packed`)."""
    kind = dtype_of(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if kind == Dtype.Q8_0:
        kind, shape = Dtype.U8, (bytes_of(kind, shape),)
    name, letter = _OUT.get(kind, ("", ""))
    if numpy is not None:
        if not name:
            name = next(n for n, d in _NAMES.items() if d == kind)
            try:
                import ml_dtypes  # type: ignore[import-not-found, unused-ignore]
                return numpy.empty(shape, getattr(ml_dtypes, name))
            except (ImportError, AttributeError):
                name = "uint16" if lib.psoup_dtype_size(kind) == 2 else "uint8"
        return numpy.empty(shape, name)
    letter = letter or ("H" if lib.psoup_dtype_size(kind) == 2 else "B")
    n = 1
    for d in shape:
        n *= d
    flat = memoryview(bytearray(max(n, 1) * lib.psoup_dtype_size(kind)))
    part: Any = flat[:n * lib.psoup_dtype_size(kind)]
    return part.cast(letter, shape) if n else part.cast(letter)


def empty_like(x: Any, dtype: Optional[DtypeLike] = None, shape: Optional[Sequence[int]] = None) -> Any:
    """A new row-major array of x's library (torch, numpy, or ours), device, shape and dtype, unless told."""
    seen = view(x, gpu=True)
    kind = dtype_of(dtype) if dtype is not None else seen.dtype
    shape = tuple(shape) if shape is not None else seen.shape
    if type(x).__module__.split(".")[0] == "torch" or "torch" in sys.modules and isinstance(
            x, sys.modules["torch"].Tensor):
        torch = sys.modules["torch"]
        if kind == Dtype.Q8_0:
            return torch.empty(bytes_of(kind, shape), dtype=torch.uint8, device=x.device)
        names = [n for n, d in _NAMES.items() if d == kind and hasattr(torch, n)]
        return torch.empty(shape, dtype=getattr(torch, names[0]), device=x.device)
    if seen.on_gpu:
        raise TypeError("arrays of %s on a GPU are not made here: give `out`" % type(x).__module__)
    if numpy is not None and isinstance(x, numpy.ndarray) and kind == seen.dtype:
        return numpy.empty(shape, x.dtype)
    return empty(shape, kind)


# ---- the two kinds that calls take most --------------------------------------------------------------


class Row:
    """Numbers as C wants them: `pointer` to `n` contiguous elements, kept alive."""

    __slots__ = ("pointer", "n", "keep")

    keep: Any

    def __init__(self, x: Any, dtype: Dtype, kind: Any, letter: str, what: str) -> None:
        if not isinstance(x, (list, tuple)):
            try:
                seen = view(x, what=what)
            except TypeError:
                seen = None  # type: ignore[assignment]
            if seen is not None and len(seen.shape) == 1 and seen.dtype == dtype and seen.is_contiguous:
                self.pointer, self.n, self.keep = seen.pointer(kind), seen.size, seen
                return
            if seen is not None and len(seen.shape) != 1:
                raise ValueError("%s has %d dimensions: expected 1" % (what, len(seen.shape)))
            x = x.tolist() if hasattr(x, "tolist") else list(x)
        own = array.array(letter, x)
        self.keep = own
        self.n = len(own)
        self.pointer = ctypes.cast(ctypes.c_void_p(own.buffer_info()[0] or None), POINTER(kind))


def ids(x: Any, what: str = "tokens") -> Row:
    """Token ids; int32 arrays are not copied."""
    return Row(x, Dtype.I32, c_int32, "i", what)


def floats(x: Any, what: str = "values") -> Row:
    return Row(x, Dtype.F32, ctypes.c_float, "f", what)


def doubles(x: Any, what: str = "weights") -> Row:
    return Row(x, Dtype.F64, ctypes.c_double, "d", what)


def pointer_of(x: Any, kind: Any) -> Any:
    """A ctypes pointer into an array of `empty`."""
    return view(x).pointer(kind)


def copied(pointer: Any, n: int, dtype: DtypeLike = Dtype.F32) -> Any:
    """A new array with the n elements at `pointer`: the library's own may change or go."""
    out = empty(n, dtype)
    if n:
        ctypes.memmove(view(out).address, pointer, n * lib.psoup_dtype_size(dtype_of(dtype)))
    return out


