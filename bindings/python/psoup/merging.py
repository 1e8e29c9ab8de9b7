"""Merging models and adapters: files to files, arrays to arrays, state dicts to a state dict."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_float, c_void_p
from os import PathLike
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, MutableMapping, NamedTuple, Optional, Sequence, Tuple, \
    Union

from . import _abi
from ._abi import Dtype, MergeMethod
from ._library import Bar, Handle, call, call_long, create, encoded, lib, member, new, progress_callback, record
from .arrays import DtypeLike, View, doubles, dtype_of, empty, empty_like, view
from .context import Context, default_context
from .errors import ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import MergerOptions

__all__ = ["Merger", "merge", "merge_sum", "fold", "merge_factors", "Factors"]

Path = Union[str, "PathLike[str]"]
Arrays = Mapping[str, Any]


# ---- files --------------------------------------------------------------------------------------------------


class Merger(Handle):
    """Sources, weights and a method. Sources stay mapped, so that another user's weights cost one
    `set_weights` and one `write`.

        with psoup.Merger(base="llama", progress=True) as merger:
            merger.add("P1A", 0.5)
            merger.add("P2B", 0.5)
            merger.write("soup")

    Options: method="delta" (see MergeMethod), svd_rank, any_sum, dtype. progress: a callable
    (label, done, total), or True for a bar.
    """

    def __init__(self, base: Optional[Path] = None, progress: Any = None, context: Optional[Context] = None,
                 **options: Unpack[MergerOptions]) -> None:
        context = context or default_context()
        values: Dict[str, Any] = dict(options)
        if values.get("dtype") is not None and values["dtype"] != -1:
            values["dtype"] = int(dtype_of(values["dtype"]))
        struct = new(_abi.psoup_merger_options, values)
        struct.progress = progress_callback(progress)
        self._own(create(_abi.psoup_merger, lib.psoup_merger_create, context.handle, struct),
                  lib.psoup_merger_free, [context], struct)
        if base is not None:
            self.set_base(base)

    def set_base(self, path: Path) -> None:
        """The base that adapters are folded into: a model directory or file."""
        with self.lock:
            call(lib.psoup_merger_set_base, self.handle, encoded(path))

    def add(self, path: Path, weight: float = 1.0) -> None:
        """Adds a source: an adapter or a model."""
        with self.lock:
            call(lib.psoup_merger_add, self.handle, encoded(path), weight)

    def set_weights(self, weights: Sequence[float]) -> None:
        """New weights for the sources in the order they were added; nothing is read again."""
        row = doubles(weights)
        with self.lock:
            call(lib.psoup_merger_set_weights, self.handle, row.pointer, row.n)

    def write(self, directory: Path) -> None:
        """Merges into a directory, whole or not at all."""
        with self.lock:
            call_long(lib.psoup_merger_write, self.handle, encoded(directory))

    def report(self) -> Dict[str, Any]:
        """How good a lossy result is, after a run: tensors, worst_error, worst_name, mean_error."""
        struct = new(_abi.psoup_merge_report)
        with self.lock:
            call(lib.psoup_merger_report, self.handle, byref(struct))
        return record(struct)


# ---- arrays -------------------------------------------------------------------------------------------------


def merge_sum(arrays: Sequence[Any], weights: Sequence[float], out: Any = None, dtype: Optional[DtypeLike] = None,
              context: Optional[Context] = None) -> Any:
    """out = sum of weights[i] * arrays[i]: f32 accumulation in that order, rounded once. Arrays are
    row-major, of one shape and one dtype (float32, float16 or bfloat16). `out` may be one of them, or a
    buffer to use again; None makes one of `dtype`, or of theirs."""
    views = [view(a, what="arrays[%d]" % i) for i, a in enumerate(arrays)]
    if not views:
        raise ArgumentError("there are no arrays")
    if out is None:
        out = empty_like(arrays[0], dtype)
    _sum(context or default_context(), view(out, writable=True, what="out"), views, weights, "arrays")
    return out


def _sum(context: Context, out: View, views: Sequence[View], weights: Sequence[float], what: str) -> None:
    first = views[0]
    row = doubles(weights)
    if row.n != len(views):
        raise ArgumentError("%s: there are %d sources and %d weights" % (what, len(views), row.n))
    for i, v in enumerate([out, *views]):
        where = "%s: source %d" % (what, i - 1) if i else "%s: the result" % what
        if v.shape != first.shape:
            raise ArgumentError("%s has shape %s: expected %s" % (where, list(v.shape), list(first.shape)))
        if i and v.dtype != first.dtype:
            raise ArgumentError("%s is %s: expected %s" % (where, v.dtype.name.lower(), first.dtype.name.lower()))
        if not v.is_contiguous:
            raise ArgumentError("%s is not row-major" % where)
    pointers = (c_void_p * len(views))(*[v.address for v in views])
    call(lib.psoup_merge_sum, context.handle, out.address, out.dtype, pointers, first.dtype, row.pointer,
         len(views), first.size)


class Factors(NamedTuple):
    """One adapter's factors for one linear, float32: a [rank, in], b [out, rank]."""

    a: Any
    b: Any
    scale: float = 1.0


def _factors(factors: Sequence[Factors]) -> Tuple[Any, Any, int, int]:
    structs, keep = (_abi.psoup_lora_factors * len(factors))(), []
    n_in = n_out = -1
    for i, (struct, f) in enumerate(zip(structs, factors)):
        a, b = view(f.a, what="factors[%d].a" % i), view(f.b, what="factors[%d].b" % i)
        for name, v in (("a", a), ("b", b)):
            if v.dtype != Dtype.F32 or len(v.shape) != 2 or not v.is_contiguous:
                raise ArgumentError("factors[%d].%s is %s%s: expected a row-major float32 matrix"
                                    % (i, name, v.dtype.name.lower(), list(v.shape)))
        if a.shape[0] != b.shape[1] or n_in not in (-1, a.shape[1]) or n_out not in (-1, b.shape[0]):
            raise ArgumentError("factors[%d] are [%d, %d] and [%d, %d], which do not fit together or with those before"
                                % (i, *a.shape, *b.shape))
        n_in, n_out = a.shape[1], b.shape[0]
        struct.a, struct.b, struct.rank, struct.scale = a.pointer(c_float), b.pointer(c_float), a.shape[0], f.scale
        keep += [a, b]
    return structs, keep, n_out, n_in


def fold(base: Any, factors: Sequence[Factors], weights: Sequence[float], out: Any = None,
         context: Optional[Context] = None) -> Any:
    """out = base + sum of weights[i] * scale_i * B_i A_i, rounded once. `base` is [out, in], float32,
    float16 or bfloat16; `out` may be base itself."""
    seen = view(base, what="base")
    structs, keep, n_out, n_in = _factors(factors)
    row = doubles(weights)
    if row.n != len(factors):
        raise ArgumentError("there are %d adapters and %d weights" % (len(factors), row.n))
    if out is None:
        out = empty_like(base)
    result = view(out, writable=True, what="out")
    for name, v in (("base", seen), ("out", result)):
        if len(v.shape) != 2 or not v.is_contiguous or v.dtype != seen.dtype or \
                (factors and v.shape != (n_out, n_in)) or v.shape != seen.shape:
            raise ArgumentError("%s is %s%s: expected a row-major %s matrix of the factors' [%d, %d]"
                                % (name, v.dtype.name.lower(), list(v.shape), seen.dtype.name.lower(), n_out, n_in))
    call(lib.psoup_merge_fold, (context or default_context()).handle, result.address, seen.address, seen.dtype,
         seen.shape[0], seen.shape[1], structs, row.pointer, len(factors))
    return out


def merge_factors(factors: Sequence[Factors], weights: Sequence[float], method: Union[str, MergeMethod] = "delta",
                  rank: Optional[int] = None, context: Optional[Context] = None) -> Tuple[Factors, float]:
    """One adapter's factors, to be used with scale 1, and ||merged - exact|| / ||exact||. "delta" is exact, of
    the sum of the ranks; "factors" averages A and B; "svd" is the best of the given rank."""
    structs, keep, n_out, n_in = _factors(factors)
    row = doubles(weights)
    if not factors or row.n != len(factors):
        raise ArgumentError("there are %d adapters and %d weights" % (len(factors), row.n))
    kind = member(MergeMethod, method, "method")
    if rank is None:
        rank = (sum(s.rank for s in structs) if kind == MergeMethod.DELTA else structs[0].rank)
    a, b, error = empty((rank, n_in)), empty((n_out, rank)), c_double()
    call(lib.psoup_merge_factors, (context or default_context()).handle, kind, view(a).pointer(c_float),
         view(b).pointer(c_float), rank, n_out, n_in, structs, row.pointer, len(factors), byref(error))
    return Factors(a, b, 1.0), error.value


# ---- state dicts ----------------------------------------------------------------------------------------------


def merge(sources: Union[Mapping[str, Arrays], Sequence[Arrays]], weights: Union[Mapping[str, float], Sequence[float]],
          out: Optional[MutableMapping[str, Any]] = None, dtype: Optional[DtypeLike] = None, any_sum: bool = False,
          progress: Any = None, context: Optional[Context] = None) -> MutableMapping[str, Any]:
    """The weighted sum of state dicts, tensor by tensor, as a state dict:

        soup = psoup.merge({"a": model_a.state_dict(), "b": model_b.state_dict()}, {"a": 0.3, "b": 0.7})

    Tensors are numpy arrays, torch tensors or anything of `psoup.arrays`; results are of the same library,
    or go into the arrays of `out`. Tensors that are no floats (position ids, counters) must be equal in all
    sources and are carried over.
    """
    named = isinstance(sources, Mapping)
    keys = list(sources) if named else list(range(len(sources)))
    if isinstance(weights, Mapping):
        if set(weights) != set(keys):
            raise ArgumentError("the weights are of %s: expected of %s" % (sorted(weights), sorted(map(str, keys))))
        weights = [weights[k] for k in keys]
    weights = [float(w) for w in weights]
    if len(weights) != len(keys) or not keys:
        raise ArgumentError("there are %d sources and %d weights" % (len(keys), len(weights)))
    if not any_sum and not abs(sum(weights) - 1) <= 1e-6:
        raise ArgumentError("the weights sum to %.9g: expected 1 (any_sum allows others)" % sum(weights))
    dicts: List[Arrays] = [sources[k] for k in keys]  # type: ignore[index]
    names = list(dicts[0])
    for key, d in zip(keys, dicts):
        odd = set(d).symmetric_difference(names)
        if odd:
            raise ArgumentError("tensor %r is not in every source (source %s)" % (sorted(odd)[0], key))
    context = context or default_context()
    result: MutableMapping[str, Any] = {} if out is None else out
    report = Bar() if progress is True else progress
    for done, name in enumerate(names):
        views = [view(d[name], what="%s of source %s" % (name, key)) for key, d in zip(keys, dicts)]
        if views[0].dtype not in (Dtype.F32, Dtype.F16, Dtype.BF16):
            result[name] = _same(name, views, dicts[0][name])
        else:
            target = out[name] if out is not None and name in out else empty_like(dicts[0][name], dtype)
            _sum(context, view(target, writable=True, what=name), views, weights, name)
            result[name] = target
        if report is not None:
            report("merge", done + 1, len(names))
    return result


def _same(name: str, views: Sequence[View], first: Any) -> Any:
    for v in views:
        n = v.size * lib.psoup_dtype_size(v.dtype)
        if v.shape != views[0].shape or v.dtype != views[0].dtype or not v.is_contiguous or \
                ctypes.string_at(v.address, n) != ctypes.string_at(views[0].address, n):
            raise ArgumentError("%s is %s and differs between the sources" % (name, v.dtype.name.lower()))
    return first
