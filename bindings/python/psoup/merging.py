"""Merging models and adapters: files to files, arrays to arrays, state dicts to a state dict."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_float, c_int64, c_size_t, c_void_p
from os import PathLike
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, MutableMapping, NamedTuple, Optional, \
    Sequence, Tuple, Union

from . import _abi
from ._abi import Dtype, MergeMethod, MergePlace
from ._library import Bar, Handle, call, call_long, callback, create, encoded, lib, member, new, \
    progress_callback, record, text, texts
from .arrays import DtypeLike, View, bytes_of, doubles, dtype_of, empty, empty_like, result_view, view
from .context import Context, default_context
from .data import python_value
from .errors import ArgumentError, Error

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import MergerOptions

__all__ = ["Merger", "Pulled", "merge", "merge_sum", "fold", "merge_factors", "merge_adapter", "Factors",
           "verify", "inspect", "GpuMerge"]

Path = Union[str, "PathLike[str]"]
Arrays = Mapping[str, Any]
Source = Union[Path, Arrays]


# ---- files --------------------------------------------------------------------------------------------------


class Pulled(NamedTuple):
    """A tensor of a source that is not in memory: `read(offset, out)` fills the memoryview `out` with its
    bytes from `offset`. It is called from several threads, and more than once where a method needs it."""

    dtype: DtypeLike
    shape: Sequence[int]
    read: Callable[[int, memoryview], Any]


class Merger(Handle):
    """Sources, weights and a method. Sources stay open, so that another user's weights cost one
    `set_weights` and one `write`.

        with psoup.Merger(base="llama", progress=True) as merger:
            merger.add("P1A", 0.5)
            merger.add("P2B", 0.5)
            merger.write("soup")

    A base or source is a path (model directory, .safetensors, .gguf, PEFT directory, GGUF adapter) or a
    state dict of arrays and `Pulled` tensors, which are not copied. Options: method="delta" (see
    MergeMethod), dtype, format="gguf", shard_size, svd_rank, any_sum, peer, density, gamma, epsilon,
    lambda_, t, normalize, rescale, seed, sha256, resume, keep_bytes, strength. progress: a callable (label,
    done, total), or True for a bar.
    """

    def __init__(self, base: Optional[Source] = None, progress: Any = None, context: Optional[Context] = None,
                 **options: Unpack[MergerOptions]) -> None:
        context = context or default_context()
        values: Dict[str, Any] = dict(options)
        if values.get("dtype") is not None and values["dtype"] != -1:
            values["dtype"] = int(dtype_of(values["dtype"]))
        struct = new(_abi.psoup_merger_options, values)
        struct.progress = progress_callback(progress)
        self._raised: List[BaseException] = []  # by callbacks on worker threads
        self._kept: List[Any] = [struct]
        self._like: Arrays = {}
        self._own(create(_abi.psoup_merger, lib.psoup_merger_create, context.handle, struct),
                  lib.psoup_merger_free, [context], self._kept)
        if base is not None:
            self.set_base(base)

    def load_certificate(self, path: Path) -> None:
        """Takes everything, into a fresh merger, from the certificate of another merge. A run then stops
        where an input or result differs from it."""
        with self.lock:
            call(lib.psoup_merger_load_certificate, self.handle, encoded(path))

    def load_recipe(self, path: Path) -> None:
        """Takes everything, into a fresh merger, from a mergekit YAML file. Paths in it are relative to the
        working directory; what psoup lacks is refused with its line."""
        with self.lock:
            call(lib.psoup_merger_load_recipe, self.handle, encoded(path))

    def set_reference(self, model: Path) -> None:
        """The model whose heads say how q's and k's rows are ordered in GGUF adapters, where nothing else
        does. Before the adapters are added."""
        with self.lock:
            call(lib.psoup_merger_set_reference, self.handle, encoded(model))

    def set_base(self, base: Source) -> None:
        """What adapters are folded into, and what methods of task vectors take differences from."""
        with self.lock:
            if isinstance(base, Mapping):
                call(lib.psoup_merger_set_base_tensors, self.handle, self._tensors(base, "the base"))
            else:
                call(lib.psoup_merger_set_base, self.handle, encoded(base))

    def add(self, source: Source, weight: float = 1.0, name: Optional[str] = None) -> None:
        """Adds an adapter or a model. `name` stands for a state dict in messages."""
        with self.lock:
            if isinstance(source, Mapping):
                call(lib.psoup_merger_add_tensors, self.handle, self._tensors(source, name or "a state dict"), weight)
            else:
                call(lib.psoup_merger_add, self.handle, encoded(source), weight)

    def _tensors(self, source: Arrays, name: str) -> Any:
        named = (_abi.psoup_named_tensor * len(source))()
        keep: List[Any] = [named]
        pulled: Dict[int, Pulled] = {}
        for i, (struct, (key, x)) in enumerate(zip(named, source.items())):
            if isinstance(x, Pulled):
                pulled[i] = x
                dtype, shape = dtype_of(x.dtype), tuple(x.shape)
            else:
                seen = view(x, what=key)
                if not seen.is_contiguous:
                    raise ArgumentError("%s: %s is not row-major" % (name, key))
                dtype, shape, struct.data = seen.dtype, seen.shape, seen.address
                keep.append(seen)
            sizes = (c_int64 * len(shape))(*shape)
            struct.name, struct.dtype, struct.rank = encoded(key), dtype, len(shape)
            struct.shape = ctypes.cast(sizes, POINTER(c_int64))
            keep.append(sizes)
        out = new(_abi.psoup_merge_tensors, {"name": name, "n": len(named)}, keep)
        out.tensors = ctypes.cast(named, POINTER(_abi.psoup_named_tensor))
        if pulled:
            def read(user: Any, index: int, offset: int, n: int, data: int) -> int:
                pulled[index].read(offset, memoryview((ctypes.c_char * n).from_address(data)).cast("B"))
                return 0

            kinds: Dict[str, Any] = {name: kind for name, kind, *_ in _abi.psoup_merge_tensors._fields_}
            out.read = callback(kinds["read"], read, self._raised)
            keep.append(out.read)
        self._kept += keep
        self._like = self._like or source
        return out

    def set_weights(self, weights: Sequence[float]) -> None:
        """New weights for the sources in the order they were added. Nothing is opened again, and of adapters
        nothing is read again that the option keep_bytes let stay in memory."""
        row = doubles(weights)
        with self.lock:
            call(lib.psoup_merger_set_weights, self.handle, row.pointer, row.n)

    def set_parameter(self, parameter: str, values: Union[float, Sequence[float]], source: Optional[int] = None,
                      filter: Optional[str] = None) -> None:
        """A parameter of docs/merging.md, for one source (its number) or all, for the tensors whose name
        contains `filter` ("re:..." is an expression). Several values are a gradient over the depth."""
        row = doubles(values if hasattr(values, "__len__") else [values], parameter)
        with self.lock:
            call(lib.psoup_merger_set_parameter, self.handle, -1 if source is None else source, encoded(parameter),
                 encoded(filter), row.pointer, row.n)

    def _run(self, function: Any, argument: Any) -> None:
        with self.lock:
            self._raised.clear()
            try:
                call_long(function, self.handle, argument)
            except Error:
                if self._raised:
                    raise self._raised[0] from None
                raise

    def write(self, path: Path) -> None:
        """Merges into a directory, or with format="gguf" a file: whole or not at all."""
        self._run(lib.psoup_merger_write, encoded(path))

    def stream(self, tensor: Callable[[str, Dtype, Tuple[int, ...]], Any],
               write: Callable[[int, memoryview], Any]) -> None:
        """Merges into callbacks: `tensor(name, dtype, shape)` begins one, `write(offset, data)` has its next
        bytes, which are borrowed for the call."""
        self._stream(tensor, lambda offset, address, n: write(
            offset, memoryview((ctypes.c_char * n).from_address(address)).cast("B").toreadonly()))

    def _stream(self, tensor: Callable[[str, Dtype, Tuple[int, ...]], Any],
                write: Callable[[int, int, int], Any]) -> None:
        kinds: Dict[str, Any] = {name: kind for name, kind, *_ in _abi.psoup_merge_sink._fields_}

        def begin(user: Any, name: bytes, dtype: int, rank: int, shape: Any) -> int:
            tensor(text(name), Dtype(dtype), tuple(shape[:rank]))
            return 0

        def data(user: Any, offset: int, address: int, n: int) -> int:
            write(offset, address, n)
            return 0

        sink = new(_abi.psoup_merge_sink)
        sink.tensor, sink.write = callback(kinds["tensor"], begin), callback(kinds["write"], data)
        self._run(lib.psoup_merger_run, sink)

    def run(self, out: Optional[MutableMapping[str, Any]] = None) -> MutableMapping[str, Any]:
        """Merges into a state dict: into the arrays of `out` where it has the tensor, into new ones of the
        sources' library otherwise."""
        result: MutableMapping[str, Any] = {} if out is None else out
        place: List[View] = []

        def tensor(name: str, dtype: Dtype, shape: Tuple[int, ...]) -> None:
            if name not in result:
                like = self._like.get(name)
                result[name] = (empty(shape, dtype) if like is None or isinstance(like, Pulled)
                                else empty_like(like, dtype, shape))
            seen = result_view(result[name], dtype, shape, what=name)
            if seen.shape != shape or seen.dtype != dtype or not seen.is_contiguous:
                raise ArgumentError("out: %s is %s%s: expected row-major %s%s" % (
                    name, seen.dtype.name.lower(), list(seen.shape), dtype.name.lower(), list(shape)))
            place[:] = [seen]

        self._stream(tensor, lambda offset, address, n: ctypes.memmove(place[0].address + offset, address, n))
        return result

    def report(self) -> Dict[str, Any]:
        """How good a lossy result is, after a run: tensors, worst_error, worst_name, mean_error."""
        struct = new(_abi.psoup_merge_report)
        with self.lock:
            call(lib.psoup_merger_report, self.handle, byref(struct))
        return record(struct)


def verify(path: Path, context: Optional[Context] = None) -> int:
    """Checks a result against the certificate beside it; returns how many tensors it has."""
    tensors = c_size_t()
    call(lib.psoup_merge_verify, (context or default_context()).handle, encoded(path), byref(tensors))
    return tensors.value


def inspect(adapters: Sequence[Path], weights: Optional[Sequence[float]] = None, plot: Optional[Path] = None,
            names: Optional[Sequence[str]] = None, context: Optional[Context] = None) -> Dict[str, Any]:
    """What adapters have to do with each other, from their small factors: norms, cosines and interference,
    the soup's norm and how well it can be truncated, and warnings. See psoup/merge.h for the dict's members.
    `plot` writes a heat map (SVG) with the adapters' `names`."""
    if weights is not None and len(weights) != len(adapters) or names is not None and len(names) != len(adapters):
        raise ArgumentError("there are %d adapters and other numbers of weights or names" % len(adapters))
    where = (context or default_context()).handle
    row = doubles(weights) if weights is not None else None
    found = create(_abi.psoup_json, lib.psoup_merge_inspect, where, texts(adapters), len(adapters),
                   row.pointer if row else None)
    try:
        if plot is not None:
            call(lib.psoup_merge_inspect_plot, where, found, texts(names) if names is not None else None, encoded(plot))
        return python_value(found)
    finally:
        lib.psoup_json_free(found)


# ---- arrays -------------------------------------------------------------------------------------------------


class GpuMerge(Handle):
    """The memory of an NVIDIA GPU as a place of arrays: while it is open, `merge_sum` and `fold` with its context
    take arrays there, torch's CUDA tensors or any with DLPack.

        stream = torch.cuda.Stream()
        with psoup.Context(device="cuda:0", stream=stream.cuda_stream) as context, psoup.GpuMerge(context):
            psoup.fold(base, adapters, weights, out=live, context=context)

    With a stream calls return at once and are in order with what else is put there; without one (torch's default
    stream is 0, which is none) they wait for the device before and after."""

    def __init__(self, context: Context) -> None:
        self._own(create(_abi.psoup_gpu_merge, lib.psoup_gpu_merge_create, context.handle),
                  lib.psoup_gpu_merge_free, parents=[context])


def merge_sum(arrays: Sequence[Any], weights: Sequence[float], out: Any = None, dtype: Optional[DtypeLike] = None,
              context: Optional[Context] = None) -> Any:
    """out = sum of weights[i] * arrays[i]: f32 accumulation in that order, rounded once. Arrays are of one
    shape, each of any float dtype; their rows may lie apart, as those of a slice of a larger matrix do.
    `out` may be one of them, or a buffer to use again; None makes one of `dtype`, or of the first's. All may
    lie on a GPU (see GpuMerge)."""
    views = [view(a, gpu=True, what="arrays[%d]" % i) for i, a in enumerate(arrays)]
    if not views:
        raise ArgumentError("there are no arrays")
    kind = dtype_of(dtype) if dtype is not None else views[0].dtype
    if out is None:
        out = empty_like(arrays[0], kind, views[0].shape)
    elif dtype is None:
        kind = view(out, gpu=True, what="out").dtype
    _sum(context or default_context(), result_view(out, kind, views[0].shape, gpu=True, what="out"), views, weights,
         "arrays")
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
    if first.dtype not in _SUMMED or out.dtype not in _SUMMED or any(v.dtype != first.dtype for v in views) or \
            not all(v.is_contiguous and not v.on_gpu for v in [out, *views]):
        return _sum_views(context, out, views, row, what)
    pointers = (c_void_p * len(views))(*[v.address for v in views])
    call(lib.psoup_merge_sum, context.handle, out.address, out.dtype, pointers, first.dtype, row.pointer,
         len(views), first.size)


_SUMMED = (Dtype.F32, Dtype.F16, Dtype.BF16)


def _struct(v: View, what: str) -> Any:
    """A psoup_merge_view: rows of contiguous elements."""
    shape, strides = v.shape, v.strides
    if v.is_contiguous:
        columns = shape[-1] if shape else 1
        rows, stride = (v.size // columns if columns else 0), columns
    elif len(shape) == 2 and (strides[1] == 1 or shape[1] == 1) and strides[0] >= shape[1]:
        (rows, columns), stride = shape, strides[0]
    else:
        raise ArgumentError("%s has strides %s: expected rows of elements side by side" % (what, list(strides)))
    return _abi.psoup_merge_view(data=v.address, dtype=v.dtype, rows=rows, columns=columns, row_stride=stride,
                                 place=MergePlace.DEVICE if v.on_gpu else MergePlace.HOST)


def _sum_views(context: Context, out: View, views: Sequence[View], row: Any, what: str) -> None:
    structs = (_abi.psoup_merge_view * len(views))(*[_struct(v, "%s: source %d" % (what, i))
                                                     for i, v in enumerate(views)])
    call(lib.psoup_merge_views, context.handle, _struct(out, what + ": the result"), structs, row.pointer, len(views))


class Factors(NamedTuple):
    """One adapter's factors for one linear, float32: a [rank, in], b [out, rank]."""

    a: Any
    b: Any
    scale: float = 1.0


def _factors(factors: Sequence[Factors], gpu: bool = False) -> Tuple[Any, Any, int, int]:
    structs, keep = (_abi.psoup_lora_factors * len(factors))(), []
    n_in = n_out = -1
    for i, (struct, f) in enumerate(zip(structs, factors)):
        a, b = view(f.a, gpu=gpu, what="factors[%d].a" % i), view(f.b, gpu=gpu, what="factors[%d].b" % i)
        for name, v in (("a", a), ("b", b)):
            if v.on_gpu != gpu:
                raise ArgumentError("factors[%d].%s is not on the GPU, where base is" % (i, name))
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
         at: Optional[Tuple[int, int]] = None, context: Optional[Context] = None) -> Any:
    """out = base + sum of weights[i] * scale_i * B_i A_i, rounded once. `base` is [out, in] of any float
    dtype; `out` may be base itself. With `at` base is a slice of the linear that begins at that row and
    column (a tensor-parallel shard); the factors are the whole linear's. All may lie on a GPU (see GpuMerge)."""
    seen = view(base, gpu=True, what="base")
    structs, keep, n_out, n_in = _factors(factors, seen.on_gpu)
    row = doubles(weights)
    if row.n != len(factors):
        raise ArgumentError("there are %d adapters and %d weights" % (len(factors), row.n))
    if out is None:
        out = empty_like(base)
    result = view(out, writable=True, gpu=True, what="out")
    if at is not None or seen.on_gpu or result.on_gpu or seen.dtype not in _SUMMED or \
            not (seen.is_contiguous and result.is_contiguous):
        for name, v in (("base", seen), ("out", result)):
            if len(v.shape) != 2 or v.shape != seen.shape:
                raise ArgumentError("%s has shape %s: expected a matrix of base's" % (name, list(v.shape)))
        call(lib.psoup_merge_fold_view, (context or default_context()).handle, _struct(result, "out"),
             _struct(seen, "base"), *(at or (0, 0)), n_out, n_in, structs, row.pointer, len(factors))
        return out
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


def merge_adapter(modules: Mapping[str, Sequence[Factors]], weights: Sequence[float],
                  method: Union[str, MergeMethod] = "delta", rank: Optional[int] = None,
                  out: Optional[MutableMapping[str, Factors]] = None,
                  context: Optional[Context] = None) -> MutableMapping[str, Factors]:
    """New weights for a whole adapter: each module's factors as `merge_factors` merges them, all in
    parallel, into the arrays of `out` where it has the module."""
    kind = member(MergeMethod, method, "method")
    row = doubles(weights)
    result: MutableMapping[str, Factors] = {} if out is None else out
    structs, keep = (_abi.psoup_merge_module * len(modules))(), []
    for struct, (name, factors) in zip(structs, modules.items()):
        each, kept, n_out, n_in = _factors(factors)
        if not factors or row.n != len(factors):
            raise ArgumentError("%s: there are %d adapters and %d weights" % (name, len(factors), row.n))
        r = rank or (sum(s.rank for s in each) if kind == MergeMethod.DELTA else each[0].rank)
        if name not in result:
            result[name] = Factors(empty((r, n_in)), empty((n_out, r)), 1.0)
        a, b = (view(x, writable=True, what=name) for x in result[name][:2])
        if a.shape != (r, n_in) or b.shape != (n_out, r) or not (a.is_contiguous and b.is_contiguous) or \
                not a.dtype == b.dtype == Dtype.F32:
            raise ArgumentError("%s: out is not [%d, %d] and [%d, %d] of float32" % (name, r, n_in, n_out, r))
        struct.factors = ctypes.cast(each, POINTER(_abi.psoup_lora_factors))
        struct.weights, struct.count = row.pointer, row.n
        struct.out_features, struct.in_features, struct.rank = n_out, n_in, r
        struct.a_out, struct.b_out = a.pointer(c_float), b.pointer(c_float)
        keep += [each, kept, a, b]
    call(lib.psoup_merge_factors_batch, (context or default_context()).handle, kind, structs, len(modules), 0)
    return result


# ---- state dicts ----------------------------------------------------------------------------------------------


def merge(sources: Union[Mapping[str, Source], Sequence[Source]],
          weights: Union[Mapping[str, float], Sequence[float]], method: Union[None, str, MergeMethod] = None,
          base: Optional[Source] = None, out: Optional[MutableMapping[str, Any]] = None,
          dtype: Optional[DtypeLike] = None, any_sum: bool = False, progress: Any = None,
          context: Optional[Context] = None, **options: Any) -> MutableMapping[str, Any]:
    """Merges state dicts (or files) into a state dict:

        soup = psoup.merge({"a": model_a.state_dict(), "b": model_b.state_dict()}, {"a": 0.3, "b": 0.7})

    Without a method it is the weighted sum, tensor by tensor, straight into its place. Any other is by
    name ("ties", base=state_dict, density=0.5), with the options of `Merger`. Tensors are numpy arrays,
    torch tensors or anything of `psoup.arrays`; results are of the same library, or go into the arrays of
    `out`. In a sum, tensors that are no floats (position ids, counters) must be equal in all sources and
    are carried over.
    """
    keys: List[Any] = list(sources) if isinstance(sources, Mapping) else list(range(len(sources)))
    if isinstance(weights, Mapping):
        if set(weights) != set(keys):
            raise ArgumentError("the weights are of %s: expected of %s" % (sorted(weights), sorted(map(str, keys))))
        weights = [weights[k] for k in keys]
    weights = [float(w) for w in weights]
    if method is not None or base is not None or options or \
            any(not isinstance(sources[k], Mapping) for k in keys):  # type: ignore[index]
        return _merged([(k, sources[k]) for k in keys], weights, base, out, progress, context,  # type: ignore[index]
                       dict(options, method=method, dtype=dtype, any_sum=any_sum))
    if len(weights) != len(keys) or not keys:
        raise ArgumentError("there are %d sources and %d weights" % (len(keys), len(weights)))
    if not any_sum and not abs(sum(weights) - 1) <= 1e-6:
        raise ArgumentError("the weights sum to %.9g: expected 1 (any_sum allows others)" % sum(weights))
    dicts: List[Any] = [sources[k] for k in keys]  # type: ignore[index]
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
        if views[0].dtype in _WHOLE:
            result[name] = _same(name, views, dicts[0][name])
        else:
            kind = dtype_of(dtype) if dtype is not None else views[0].dtype
            target = out[name] if out is not None and name in out else empty_like(dicts[0][name], kind)
            place = result_view(target, kind, views[0].shape, what=name)
            _sum(context, place, views, weights, name)
            result[name] = target
        if report is not None:
            report("merge", done + 1, len(names))
    return result


def _merged(sources: Sequence[Tuple[Any, Source]], weights: Sequence[float], base: Optional[Source],
            out: Optional[MutableMapping[str, Any]], progress: Any, context: Optional[Context],
            options: Dict[str, Any]) -> MutableMapping[str, Any]:
    if len(weights) != len(sources):
        raise ArgumentError("there are %d sources and %d weights" % (len(sources), len(weights)))
    with Merger(base, progress, context, **options) as merger:
        for (key, source), weight in zip(sources, weights):
            merger.add(source, weight, name="source %s" % key)
        return merger.run(out)


_WHOLE = (Dtype.I8, Dtype.U8, Dtype.I16, Dtype.I32, Dtype.I64, Dtype.BOOL)


def _same(name: str, views: Sequence[View], first: Any) -> Any:
    for v in views:
        n = bytes_of(v.dtype, v.shape)
        if v.shape != views[0].shape or v.dtype != views[0].dtype or not v.is_contiguous or \
                ctypes.string_at(v.address, n) != ctypes.string_at(views[0].address, n):
            raise ArgumentError("%s is %s and differs between the sources" % (name, v.dtype.name.lower()))
    return first
