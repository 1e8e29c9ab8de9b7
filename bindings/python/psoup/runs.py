"""Supervised fine-tuning, reward training and DPO step by step: to be iterated over."""

from __future__ import annotations

from ctypes import byref, c_int64
from typing import TYPE_CHECKING, Any, List, Optional, Sequence

from . import _abi
from ._library import Handle, call_long, create, encoded, lib, new, texts
from .comm import Comm
from .history import OnStep, Run
from .model import Model
from .training import (Comparison, DpoPair, Example, Reward, _comparisons, _examples, _pairs, _reward_settings,
                       _rewards, _step_callback, _with_comm)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DpoOptions, RewardOptions, SftOptions

__all__ = ["SFT", "RewardTraining", "DPO"]


class _Training(Run):
    """What the three have in common: their C handle."""

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


class SFT(_Training):
    """Supervised fine-tuning of the named adapter, or without one of the base's own weights: `sft` to be taken
    step by step.

        for step in psoup.SFT(model, examples, "A", epochs=3):
            print(step.loss)

    Options and their defaults: `sft_options()`.
    """

    def __init__(self, model: Model, train: Sequence[Example], adapter: Optional[str] = None,
                 validation: Sequence[Example] = (), on_step: Optional[OnStep] = None,
                 comm: Optional[Comm] = None, **options: Unpack[SftOptions]) -> None:
        keep: List[Any] = []
        settings = new(_abi.psoup_sft_options, dict(options), keep)
        rows = (_examples(train, keep), len(train), _examples(validation, keep), len(validation))
        self._start(lib.psoup_sft_create, model, (model.handle, encoded(adapter)), rows, settings, on_step, comm,
                    [model], keep)


class RewardTraining(_Training):
    """Training of several reward models of one base, side by side: `train_rewards` to be taken step by step.
    Options and their defaults: `reward_options()`."""

    def __init__(self, rewards: Sequence[Reward], train: Sequence[Comparison],
                 validation: Sequence[Comparison] = (), on_step: Optional[OnStep] = None,
                 comm: Optional[Comm] = None, **options: Unpack[RewardOptions]) -> None:
        keep: List[Any] = []
        settings = _reward_settings(options, keep)
        handles, model = _rewards(rewards)
        rows = (_comparisons(train, keep), len(train), _comparisons(validation, keep), len(validation))
        self._start(lib.psoup_reward_train_create, model, (handles, len(rewards)), rows, settings, on_step, comm,
                    [model, *rewards], keep)


class DPO(_Training):
    """Direct preference optimisation of several adapters of one model, side by side: `dpo` to be taken step by
    step. Options and their defaults: `dpo_options()`."""

    def __init__(self, model: Model, policies: Sequence[str], train: Sequence[DpoPair],
                 validation: Sequence[DpoPair] = (), on_step: Optional[OnStep] = None,
                 comm: Optional[Comm] = None, **options: Unpack[DpoOptions]) -> None:
        keep: List[Any] = []
        settings = new(_abi.psoup_dpo_options, dict(options), keep)
        rows = (_pairs(train, keep), len(train), _pairs(validation, keep), len(validation))
        self._start(lib.psoup_dpo_create, model, (model.handle, texts(list(policies)), len(policies)), rows,
                    settings, on_step, comm, [model], keep)
