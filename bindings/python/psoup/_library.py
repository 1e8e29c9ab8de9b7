"""The door to libpsoup: finding it, calling it, callbacks into Python, handles and option structs."""

from __future__ import annotations

import ctypes
import ctypes.util
import difflib
import os
import signal
import sys
import threading
from typing import Any, Callable, Dict, List, Optional, Sequence

from . import _abi
from .errors import BY_STATUS, Error, StateError

# ---- the library ------------------------------------------------------------------------------------


def _candidates() -> List[str]:
    """In order: what PSOUP_LIBRARY names, the wheel's own, the source tree's, the system's."""
    here = os.path.dirname(os.path.abspath(__file__))
    named = os.environ.get("PSOUP_LIBRARY")
    if named:
        return [named]
    paths = [os.path.join(here, "libpsoup.so"),
             os.path.join(here, "..", "..", "..", "lib", "libpsoup.so")]
    return [p for p in paths if os.path.exists(p)] + ["libpsoup.so.0"]


def _load() -> ctypes.CDLL:
    tried = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            tried.append(str(error))
            continue
        for name, (result, parameters) in _abi.FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise ImportError("%s has no %s: it is older than this package" % (path, name)) from None
            function.restype, function.argtypes = result, parameters
        return library
    raise ImportError("libpsoup.so was not found: %s" % "; ".join(tried))


lib = _load()

# ---- calls ------------------------------------------------------------------------------------------

# What a callback raised on this thread; libpsoup runs callbacks on the thread that made the call.
_local = threading.local()


def _raise_pending() -> None:
    raised = getattr(_local, "raised", None)
    if raised is not None:
        _local.raised = None
        raise raised


def call(function: Any, *arguments: Any) -> None:
    """Calls a function that returns a status and takes a psoup_error last. Raises what a callback raised,
    or the exception of the status."""
    error = _abi.psoup_error()
    held = [a.owner for a in arguments if hasattr(a, "owner")]  # a close() meanwhile takes effect afterwards
    for owner in held:
        owner.hold()
    try:
        status = function(*arguments, ctypes.byref(error))
    finally:
        for owner in held:
            owner.release()
    _raise_pending()
    if status != 0:
        raise failure(status, error.message)


def failure(status: int, message: bytes = b"") -> Error:
    text = message.decode("utf-8", "replace") or lib.psoup_status_name(status).decode()
    return BY_STATUS.get(_abi.Status(status), Error)(text)


def call_long(function: Any, *arguments: Any) -> None:
    """As `call`, for work that reports through a callback: a signal that raises (Ctrl-C) stops it at the
    next report. Without this the exception would strike between C and the callback's first line, where
    ctypes can only print and forget it."""
    if threading.current_thread() is not threading.main_thread():
        return call(function, *arguments)
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        return call(function, *arguments)

    def keep(number: int, frame: Any) -> None:
        try:
            before(number, frame)
        except BaseException as error:
            _local.raised = error

    signal.signal(signal.SIGINT, keep)
    try:
        call(function, *arguments)
    finally:
        signal.signal(signal.SIGINT, before)
        _raise_pending()


def callback(kind: Any, function: Callable[..., Optional[int]], raised: Optional[List[BaseException]] = None) -> Any:
    """`function` as a C callback. What it raises is kept and raised by the call that ran it, which
    libpsoup leaves because the callback returns non-zero. A callback that worker threads run leaves it in
    `raised` instead, for the caller to raise."""

    def run(*arguments: Any) -> int:
        if getattr(_local, "raised", None) is not None:
            return 1
        try:
            return function(*arguments) or 0
        except BaseException as error:
            if raised is None:
                _local.raised = error
            else:
                raised.append(error)
            return 1

    return kind(run)


Progress = Callable[[str, int, int], Any]


def progress_callback(progress: Any) -> Any:
    """A psoup_progress_fn that calls `progress(label, done, total)`. None gives one that only lets
    signals in, True draws a bar on standard error."""
    if progress is None:
        return callback(_abi.psoup_progress_fn, lambda user, label, done, total: 0)
    report = Bar() if progress is True else progress

    def run(user: Any, label: bytes, done: int, total: int) -> int:
        report(text(label), done, total)
        return 0

    return callback(_abi.psoup_progress_fn, run)


class Bar:
    """A progress callback that draws one line: `merge [########........] 12/24`."""

    def __init__(self, stream: Any = None, width: int = 32) -> None:
        self.stream, self.width, self.drawn = stream or sys.stderr, width, ""

    def __call__(self, label: str, done: int, total: int) -> None:
        if total > 0:
            full = self.width * done // total
            line = "%s [%s%s] %d/%d" % (label, "#" * full, "." * (self.width - full), done, total)
        else:
            line = "%s %d" % (label, done)
        if line != self.drawn:
            self.drawn = line
            self.stream.write("\r" + line + ("\n" if done == total else ""))
            self.stream.flush()


# ---- text -------------------------------------------------------------------------------------------


def encoded(value: Any) -> Optional[bytes]:
    """A str or path as C text; None stays None."""
    if value is None:
        return None
    value = os.fspath(value)
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ValueError("a text with a NUL cannot be passed: %r" % (value,))
    return data


def text(value: Optional[bytes]) -> str:
    return value.decode("utf-8", "replace") if value is not None else ""


def texts(values: Sequence[Any]) -> Any:
    """A char *[n]."""
    return (ctypes.c_char_p * len(values))(*[encoded(v) for v in values])


# ---- handles ------------------------------------------------------------------------------------------

_owners = threading.RLock()


class _Owner:
    """One C handle and how many hold it: its Python object, and each handle made from it. It is freed
    when the last of them lets go, so that a context outlives its models and a model its sessions,
    whatever order they are closed or collected in."""

    def __init__(self, pointer: Any, free: Any, parents: Sequence["_Owner"], keep: Any) -> None:
        self.pointer, self.free, self.parents, self.keep, self.holders = pointer, free, parents, keep, 1
        pointer.owner = self
        for parent in parents:
            parent.hold()

    def hold(self) -> None:
        with _owners:
            if not self.holders:
                raise StateError("the handle is closed")
            self.holders += 1

    def release(self) -> None:
        with _owners:
            self.holders -= 1
            if self.holders:
                return
        del self.pointer.owner
        self.free(self.pointer)
        self.keep = None
        for parent in self.parents:
            parent.release()


class Handle:
    """What Context, Model and the others have in common. `close()` lets go of the C object; so do the end
    of a `with` block and the garbage collector. One handle, one thread at a time: calls on a model and on
    what is made from it wait for one another."""

    _owner: Optional[_Owner] = None
    lock: Any

    def _own(self, pointer: Any, free: Any, parents: Sequence["Handle"] = (), keep: Any = None,
             lock: Any = None) -> None:
        self.lock = lock or threading.RLock()
        self._owner = _Owner(pointer, free, [p._holder() for p in parents], keep)

    def _holder(self) -> _Owner:
        if self._owner is None:
            raise StateError("this %s is closed" % type(self).__name__)
        return self._owner

    def _again(self) -> Any:
        """Another object of the same C handle, which stays open when this one is closed."""
        owner = self._holder()
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        owner.hold()
        return twin

    def __copy__(self) -> Any:
        return self._again()

    @property
    def handle(self) -> Any:
        """The C pointer, for calls of one's own through `psoup._library.lib`."""
        return self._holder().pointer

    @property
    def closed(self) -> bool:
        return self._owner is None

    def close(self) -> None:
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.release()

    def __enter__(self) -> Any:
        self._holder()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def create(kind: Any, function: Any, *arguments: Any, long: bool = False) -> Any:
    """The pointer that a `**out` before the error receives."""
    out = ctypes.POINTER(kind)()
    (call_long if long else call)(function, *arguments, ctypes.byref(out))
    return out


# ---- option structs -------------------------------------------------------------------------------------


def fill(struct: Any, values: Dict[str, Any], keep: List[Any]) -> Any:
    """Sets fields by name: enums by name or value, text, numbers, bools. What the struct borrows is
    appended to `keep`."""
    kinds = dict(type(struct)._fields_)
    enums = _abi.ENUM_FIELDS.get(type(struct), {})
    for name, value in values.items():
        field = name.rstrip("_")
        if field not in kinds or field in ("size", "user") or field.startswith("reserved"):
            near = difflib.get_close_matches(field, kinds, 1)
            raise TypeError("there is no option %r%s" % (name, ": did you mean %r?" % near[0] if near else ""))
        if value is None:
            continue
        if field in enums:
            value = member(enums[field], value, field)
        elif kinds[field] is ctypes.c_char_p or getattr(kinds[field], "_type_", None) is ctypes.c_char:
            value = encoded(value)
        elif isinstance(value, (list, tuple)) and hasattr(kinds[field], "_length_"):
            array = getattr(struct, field)
            if len(value) > len(array):
                raise ValueError("%s takes %d values at most: %d given" % (name, len(array), len(value)))
            for i, item in enumerate(value):
                array[i] = item
            continue
        keep.append(value)
        try:
            setattr(struct, field, value)
        except TypeError as error:
            raise TypeError("%s: %s" % (name, error)) from None
    return struct


def new(kind: Any, values: Optional[Dict[str, Any]] = None, keep: Optional[List[Any]] = None) -> Any:
    """A struct with its size and defaults set, as the INIT macro does, and then `values`."""
    struct = kind()
    if any(name == "size" for name, _ in kind._fields_):
        struct.size = ctypes.sizeof(kind)
    for name, value in _abi.DEFAULTS.get(kind, {}).items():
        setattr(struct, name, value)
    return fill(struct, values or {}, keep if keep is not None else [])


def member(enum: Any, value: Any, what: str) -> int:
    """An enum's member by its name in any case, or by its value."""
    if isinstance(value, str):
        try:
            return enum[value.upper().replace("-", "_")]
        except KeyError:
            names = ", ".join(n.lower() for n in enum.__members__)
            raise ValueError("%s is %r: expected one of %s" % (what, value, names)) from None
    return int(value)


def record(struct: Any) -> Dict[str, Any]:
    """A struct's numbers and texts as a dict."""
    out: Dict[str, Any] = {}
    enums = _abi.ENUM_FIELDS.get(type(struct), {})
    for name, kind in type(struct)._fields_:
        if name == "size" or name.startswith("reserved"):
            continue
        value = getattr(struct, name)
        if name in enums:
            try:
                value = enums[name](value)
            except ValueError:  # such as -1 for "that of the source"
                pass
        elif isinstance(value, bytes):
            value = text(value)
        elif isinstance(value, ctypes.Array):
            value = tuple(value)
        elif not isinstance(value, (int, float)):
            continue
        out[name] = value
    return out


