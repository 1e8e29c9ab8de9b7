"""Reward models, and their training on comparisons."""

from __future__ import annotations

from ctypes import POINTER, byref, c_double, c_float
from os import PathLike
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi, data
from ._library import Handle, call, call_long, create, encoded, lib, new, text
from .arrays import empty, ids, pointer_of
from .comm import Comm
from .errors import ArgumentError
from .history import OnStep
from .model import Model, Tokens, adapter_options
from .training import _Training, _step_callback, _with_comm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import AdapterOptions, RewardOptions

__all__ = ["Reward", "Comparison", "train_rewards", "reward_options", "reward_accuracy", "RewardTraining"]

Path = Union[str, "PathLike[str]"]


class Reward(Handle):
    """A reward model: an adapter with a scalar head over a model's base. Several share one base.
    `Reward(model, name)` adds a new one, `Reward.load(model, name, directory)` reads one."""

    model: Model

    def __init__(self, model: Model, name: str, **options: Unpack[AdapterOptions]) -> None:
        struct = adapter_options(options)
        with model.lock:
            self._open(create(_abi.psoup_reward, lib.psoup_reward_create, model.handle, encoded(name), struct), model)

    def _open(self, pointer: Any, model: Model) -> None:
        self.model = model._again()
        self._own(pointer, lib.psoup_reward_free, [model], lock=model.lock)

    @classmethod
    def load(cls, model: Model, name: str, directory: Path) -> "Reward":
        """Reads a PEFT directory of task type SEQ_CLS."""
        self = cls.__new__(cls)
        with model.lock:
            self._open(create(_abi.psoup_reward, lib.psoup_reward_load, model.handle, encoded(name),
                              encoded(directory)), model)
        return self

    def save(self, directory: Path, base_name: Optional[str] = None) -> None:
        """Writes such a directory."""
        with self.lock:
            call(lib.psoup_reward_save, self.handle, encoded(directory), encoded(base_name))

    @property
    def name(self) -> str:
        return text(lib.psoup_reward_name(self.handle))

    def training(self, train: Sequence[Comparison], validation: Sequence[Comparison] = (),
                 on_step: Optional[OnStep] = None, comm: Optional[Comm] = None,
                 **options: Unpack[RewardOptions]) -> RewardTraining:
        """Its training, to be iterated over: `for step in reward.training(comparisons): print(step.accuracy)`."""
        return RewardTraining([self], train, validation, on_step, comm, **options)

    def score(self, rows: Sequence[Tokens]) -> Any:
        """The head's output on each row's last token, float32. The same bits for any batch."""
        structs, keep = (_abi.psoup_row * len(rows))(), []
        for struct, tokens in zip(structs, rows):
            row = ids(tokens)
            struct.tokens, struct.n = row.pointer, row.n
            keep.append(row)
        out = empty(len(rows))
        with self.lock:
            call(lib.psoup_reward_score, self.handle, structs, len(rows), pointer_of(out, c_float))
        return out


class Comparison(NamedTuple):
    """Two responses to one prompt, each with the prompt's tokens before it."""

    chosen: Tokens
    rejected: Tokens
    reward: int = 0
    """Which of the rewards it trains."""
    margin: float = 0.0
    """By how much more than the option `margin` the chosen response has to score higher."""


def _comparisons(comparisons: Sequence[Comparison], keep: List[Any]) -> Any:
    structs = (_abi.psoup_comparison * len(comparisons))()
    for struct, (chosen, rejected, reward, margin) in zip(structs, comparisons):
        better, worse = ids(chosen), ids(rejected)
        struct.chosen, struct.n_chosen = better.pointer, better.n
        struct.rejected, struct.n_rejected = worse.pointer, worse.n
        struct.reward, struct.margin = reward, margin
        keep += [better, worse]
    return structs


def _rewards(rewards: Sequence[Reward]) -> Tuple[Any, Model]:
    if not rewards:
        raise ArgumentError("there are no rewards")
    if any(r.model._holder() is not rewards[0].model._holder() for r in rewards):
        raise ArgumentError("the rewards are of different models")
    return (POINTER(_abi.psoup_reward) * len(rewards))(*[r.handle for r in rewards]), rewards[0].model


def _reward_settings(options: Any, keep: Optional[List[Any]] = None) -> Any:
    """A comparison's own margin counts here unless told otherwise: it is 0 where it was not given."""
    return new(_abi.psoup_reward_options, {"margins": 1, **options}, keep)


def train_rewards(rewards: Sequence[Reward], train: Sequence[Comparison],
                  validation: Sequence[Comparison] = (), on_step: Optional[OnStep] = None,
                  comm: Optional[Comm] = None, **options: Unpack[RewardOptions]) -> None:
    """Bradley-Terry training of several reward models of one base, side by side. Options and their
    defaults: `reward_options()`."""
    keep: List[Any] = []
    struct = _reward_settings(options, keep)
    struct.on_step = _step_callback(on_step)
    _with_comm(struct, comm)
    handles, model = _rewards(rewards)
    with model.lock:
        call_long(lib.psoup_reward_train, handles, len(rewards), _comparisons(train, keep), len(train),
                  _comparisons(validation, keep), len(validation), struct)


def reward_options(**options: Unpack[RewardOptions]) -> Dict[str, Any]:
    """Every option of `train_rewards` with its value."""
    return data.fields(lib.psoup_reward_fields(), _reward_settings(options))


def reward_accuracy(rewards: Sequence[Reward], comparisons: Sequence[Comparison]) -> Tuple[float, float]:
    """The fraction of comparisons whose chosen response scores higher, and the mean loss."""
    keep: List[Any] = []
    accuracy, loss = c_double(), c_double()
    handles, model = _rewards(rewards)
    with model.lock:
        call(lib.psoup_reward_accuracy, handles, len(rewards), _comparisons(comparisons, keep), len(comparisons),
             byref(accuracy), byref(loss))
    return accuracy.value, loss.value


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
