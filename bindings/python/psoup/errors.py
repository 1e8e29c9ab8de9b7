"""What goes wrong in libpsoup, as exceptions: one class per status, each with the library's message."""

from __future__ import annotations

from ._abi import Status

__all__ = ["Error", "ArgumentError", "OutOfMemoryError", "FileError", "FormatError", "UnsupportedError",
           "StateError", "Cancelled"]


class Error(Exception):
    """A call of libpsoup failed. `str(error)` is one line that names the file, the field or tensor, the
    value and what was expected; `error.status` is the library's status."""

    status: Status = Status.OK


class ArgumentError(Error, ValueError):
    """Something that the function cannot accept was passed."""

    status = Status.ERROR_ARGUMENT


class OutOfMemoryError(Error, MemoryError):
    """An allocation failed."""

    status = Status.ERROR_MEMORY


class FileError(Error, OSError):
    """The operating system refused to open, read or write."""

    status = Status.ERROR_IO


class FormatError(Error, ValueError):
    """A file or text is not what its format says."""

    status = Status.ERROR_FORMAT


class UnsupportedError(Error, NotImplementedError):
    """Understood, but libpsoup does not do it."""

    status = Status.ERROR_UNSUPPORTED


class StateError(Error, RuntimeError):
    """The handle is not in a state for this call: it is closed, for example."""

    status = Status.ERROR_STATE


class Cancelled(Error):
    """Raise it in a callback to stop the call that runs it; the same exception comes out of that call."""

    status = Status.ERROR_CANCELLED


BY_STATUS = {kind.status: kind for kind in (ArgumentError, OutOfMemoryError, FileError, FormatError,
                                            UnsupportedError, StateError, Cancelled)}
