"""What trainings have in common: a handle that is stepped, and a callback that is told."""

from __future__ import annotations

from ctypes import byref, c_int64
from typing import Any, List, Optional, Sequence

from . import _abi
from ._library import Handle, call_long, callback, create, lib, text
from .comm import Comm
from .history import OnStep, Run, Step
from .model import Model

__all__: List[str] = []


def _step_callback(on_step: Optional[OnStep]) -> Any:
    """Always there, so that a signal can stop the training."""

    def run(user: Any, pointer: Any) -> int:
        s = pointer.contents
        if on_step is not None and s.phase != b"pause":
            on_step(Step(text(s.phase), text(s.subject), s.step, s.total,
                         {text(s.names[i]): s.values[i] for i in range(s.n)},
                         {text(s.time_names[i]): s.times[i] for i in range(s.n_times)}))
        return 0

    return callback(_abi.psoup_step_fn, run)


def _with_comm(struct: Any, comm: Optional[Comm]) -> None:
    if comm is not None:
        struct.comm = comm.handle


class _Training(Run):
    """Fine-tuning, reward training or DPO, step by step: all are one C handle."""

    def _start(self, function: Any, model: Model, subject: Sequence[Any], rows: Sequence[Any], settings: Any,
               on_step: Optional[OnStep], comm: Optional[Comm], parents: List[Handle], keep: List[Any]) -> None:
        settings.on_step = _step_callback(self._told(on_step))
        _with_comm(settings, comm)
        if comm is not None:
            parents.append(comm)
        keep += [settings, subject, rows]
        with model.lock:
            self._own(create(_abi.psoup_training, function, *subject, *rows, settings, long=True),
                      lib.psoup_training_free, parents, keep, lock=model.lock)

    def step(self) -> int:
        remaining = c_int64()
        with self.lock:
            call_long(lib.psoup_training_step, self.handle, byref(remaining))
        return remaining.value

    def run(self) -> None:
        with self.lock:
            call_long(lib.psoup_training_run, self.handle)
