"""JSON, JSON Lines and safetensors files as libpsoup reads and writes them: strict, plain or through
Zstandard where the name ends in .zst, written beside and renamed."""

from __future__ import annotations

import ctypes
import json
from ctypes import POINTER, byref, c_int64
from os import PathLike
from typing import Any, Dict, Iterator, Mapping, Optional, Union

from . import _abi
from ._library import Handle, call, create, encoded, lib
from .arrays import view
from .context import Context, default_context
from .errors import OutOfMemoryError

__all__ = ["read_json", "write_json", "JsonlReader", "JsonlWriter", "write_safetensors"]

Path = Union[str, "PathLike[str]"]


def python_value(value: Any) -> Any:
    """A psoup_json as Python has it."""
    address = lib.psoup_json_text(value, 0)
    if not address:
        raise OutOfMemoryError("out of memory")
    try:
        return json.loads(ctypes.string_at(address).decode())
    finally:
        lib.psoup_text_free(address)


class _Json:
    """A Python value as a psoup_json, freed at the end of the `with` block."""

    def __init__(self, value: Any) -> None:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        self.value = create(_abi.psoup_json, lib.psoup_json_parse, data, len(data), b"the value")

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: Any) -> None:
        lib.psoup_json_free(self.value)


def read_json(path: Path, context: Optional[Context] = None) -> Any:
    """Reads a file of one JSON value. Duplicate keys, invalid UTF-8 and trailing text are refused."""
    value = create(_abi.psoup_json, lib.psoup_json_read, (context or default_context()).handle, encoded(path))
    try:
        return python_value(value)
    finally:
        lib.psoup_json_free(value)


def write_json(path: Path, value: Any, context: Optional[Context] = None) -> None:
    """Writes a file of one JSON value, indented, keys in their order."""
    with _Json(value) as json_value:
        call(lib.psoup_json_write, (context or default_context()).handle, encoded(path), json_value)


class JsonlReader(Handle):
    """The rows of a JSON Lines file, or of a file that is one array of objects: iterate over it.
    `line` is the last row's line, from 1."""

    def __init__(self, path: Path, context: Optional[Context] = None) -> None:
        context = context or default_context()
        self._own(create(_abi.psoup_jsonl_reader, lib.psoup_jsonl_open, context.handle, encoded(path)),
                  lib.psoup_jsonl_reader_free, [context])

    @property
    def line(self) -> int:
        return lib.psoup_jsonl_line(self.handle)

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        return self

    def __next__(self) -> Dict[str, Any]:
        row = create(_abi.psoup_json, lib.psoup_jsonl_next, self.handle)
        if not row:
            raise StopIteration
        try:
            return python_value(row)
        finally:
            lib.psoup_json_free(row)


class JsonlWriter(Handle):
    """Writes rows. Without `append` the file appears when the `with` block ends well, whole; with it
    every row is flushed to the file at once."""

    def __init__(self, path: Path, append: bool = False, context: Optional[Context] = None) -> None:
        context = context or default_context()
        self._own(create(_abi.psoup_jsonl_writer, lib.psoup_jsonl_create, context.handle, encoded(path),
                         int(append)), lib.psoup_jsonl_writer_free, [context])

    def write(self, row: Mapping[str, Any]) -> None:
        with _Json(row) as value:
            call(lib.psoup_jsonl_write, self.handle, value)

    def finish(self) -> None:
        """Completes the file and closes the writer. `close()` alone leaves no file behind."""
        try:
            call(lib.psoup_jsonl_close, self.handle)
        finally:
            self.close()

    def __exit__(self, kind: Any = None, *_: Any) -> None:
        if kind is None and not self.closed:
            self.finish()
        else:
            self.close()


def write_safetensors(path: Path, tensors: Mapping[str, Any], context: Optional[Context] = None) -> None:
    """Writes named arrays as a safetensors file; they must be row-major, and are not copied."""
    structs = (_abi.psoup_named_tensor * len(tensors))()
    keep = []
    for struct, (name, x) in zip(structs, tensors.items()):
        seen = view(x, what=name)
        if not seen.is_contiguous:
            raise ValueError("%s is not row-major" % name)
        shape = (c_int64 * len(seen.shape))(*seen.shape)
        struct.name, struct.dtype, struct.rank = encoded(name), seen.dtype, len(seen.shape)
        struct.shape = ctypes.cast(shape, POINTER(c_int64))
        struct.data = seen.address
        keep.append((seen, shape))
    call(lib.psoup_safetensors_write, (context or default_context()).handle, encoded(path), structs,
         len(tensors))


def fields(table: Any, options: Any) -> Dict[str, Any]:
    """The current values of an option struct that describes itself (psoup_sft_fields and others)."""
    value = lib.psoup_fields_json(table, byref(options))
    try:
        return python_value(value)
    finally:
        lib.psoup_json_free(value)
