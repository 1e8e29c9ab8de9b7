"""The context that everything is made from: threads, instruction set, log."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Callable, Optional

from . import _abi
from ._abi import LogLevel
from ._library import Handle, callback, create, lib, new, text

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import ContextOptions

__all__ = ["Context", "default_context", "version"]

Log = Callable[[LogLevel, str], Any]


def version() -> str:
    """The library's version: "0.5.0"."""
    return text(lib.psoup_version())


class Context(Handle):
    """Worker threads and settings. Models that run in parallel may share one.

    threads: 0 means one per processor. isa: "generic", "avx2", "avx512", "neon"; None is the best there
    is. log: called as log(level, line); None is silence.
    """

    def __init__(self, log: Optional[Log] = None, **options: Unpack[ContextOptions]) -> None:
        keep: list = []
        struct = new(_abi.psoup_context_options, dict(options), keep)
        if log is not None:
            def line(user: Any, level: int, words: bytes) -> None:
                log(LogLevel(level), text(words))

            # ctypes wants no result of a void callback; what `line` raises leaves the call that logged.
            guarded = callback(_abi.psoup_log_fn, line)
            keep.append(guarded)
            struct.log = guarded
        self._own(create(_abi.psoup_context, lib.psoup_context_create, struct), lib.psoup_context_free,
                  keep=keep)

    @property
    def threads(self) -> int:
        """The worker threads in use."""
        return lib.psoup_context_threads(self.handle)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return text(lib.psoup_context_isa(self.handle))

    def __repr__(self) -> str:
        return "<psoup.Context closed>" if self.closed else "<psoup.Context %d threads, %s>" % (
            self.threads, self.isa)


_default: Optional[Context] = None
_default_lock = threading.Lock()


def default_context() -> Context:
    """The context of every call that is given none: made at the first use, with all processors."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = Context()
        return _default
