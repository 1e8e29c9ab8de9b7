"""Direct preference optimisation: policies from pairs of responses."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence

from . import _abi, data
from ._library import call_long, encoded, lib, new, texts
from .arrays import ids
from .comm import Comm
from .history import OnStep
from .model import Model, Tokens
from .training import _Training, _step_callback, _with_comm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DpoOptions

__all__ = ["DpoPair", "dpo", "dpo_options", "DPO"]


class DpoPair(NamedTuple):
    """Two responses to one prompt, each without the prompt's tokens."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    policy: int = 0
    """Which of the policies it trains."""


def _pairs(pairs: Sequence[DpoPair], keep: List[Any]) -> Any:
    structs = (_abi.psoup_dpo_pair * len(pairs))()
    for struct, (prompt, chosen, rejected, policy) in zip(structs, pairs):
        asked, better, worse = ids(prompt), ids(chosen), ids(rejected)
        struct.prompt, struct.n_prompt = asked.pointer, asked.n
        struct.chosen, struct.n_chosen = better.pointer, better.n
        struct.rejected, struct.n_rejected = worse.pointer, worse.n
        struct.policy = policy
        keep += [asked, better, worse]
    return structs


def dpo(model: Model, policies: Sequence[str], train: Sequence[DpoPair], validation: Sequence[DpoPair] = (),
        on_step: Optional[OnStep] = None, comm: Optional[Comm] = None, **options: Unpack[DpoOptions]) -> None:
    """Direct preference optimisation of several adapters of one model, side by side; the reference is the
    base. Options and their defaults: `dpo_options()`."""
    keep: List[Any] = []
    struct = new(_abi.psoup_dpo_options, dict(options), keep)
    struct.on_step = _step_callback(on_step)
    _with_comm(struct, comm)
    names = (ctypes.c_char_p * len(policies))(*[encoded(name) for name in policies])
    with model.lock:
        call_long(lib.psoup_dpo, model.handle, names, len(policies), _pairs(train, keep), len(train),
                  _pairs(validation, keep), len(validation), struct)


def dpo_options(**options: Unpack[DpoOptions]) -> Dict[str, Any]:
    """Every option of `dpo` with its value."""
    return data.fields(lib.psoup_dpo_fields(), new(_abi.psoup_dpo_options, dict(options)))


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
