"""Supervised fine-tuning of an adapter, or of the base itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence

from . import _abi, data
from ._library import call_long, encoded, lib, new
from .arrays import ids
from .comm import Comm
from .history import OnStep
from .model import Model, Tokens
from .training import _Training, _step_callback, _with_comm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import SftOptions

__all__ = ["Example", "sft", "sft_options", "SFT"]


class Example(NamedTuple):
    """Prompt, completion and, if wanted, the end token; the first n_prompt carry no loss."""

    tokens: Tokens
    n_prompt: int = 0


def _examples(examples: Sequence[Example], keep: List[Any]) -> Any:
    structs = (_abi.psoup_example * len(examples))()
    for struct, (tokens, n_prompt) in zip(structs, examples):
        row = ids(tokens)
        struct.tokens, struct.n, struct.n_prompt = row.pointer, row.n, n_prompt
        keep.append(row)
    return structs


def sft(model: Model, train: Sequence[Example], adapter: Optional[str] = None,
        validation: Sequence[Example] = (), on_step: Optional[OnStep] = None,
        comm: Optional[Comm] = None, **options: Unpack[SftOptions]) -> None:
    """Trains the named adapter, or without one the base's own weights. The loss is the mean over the
    completion tokens of an optimiser step. Options and their defaults: `sft_options()`."""
    keep: List[Any] = []
    struct = new(_abi.psoup_sft_options, dict(options), keep)
    struct.on_step = _step_callback(on_step)
    _with_comm(struct, comm)
    with model.lock:
        call_long(lib.psoup_sft, model.handle, encoded(adapter), _examples(train, keep), len(train),
                  _examples(validation, keep), len(validation), struct)


def sft_options(**options: Unpack[SftOptions]) -> Dict[str, Any]:
    """Every option of `sft` with its value: the default, or what is given."""
    return data.fields(lib.psoup_sft_fields(), new(_abi.psoup_sft_options, dict(options)))


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
