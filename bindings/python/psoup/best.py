"""Several answers to each prompt, and the one that a reward likes best."""

from __future__ import annotations

from ctypes import POINTER, byref, c_float, c_int32, cast
from typing import TYPE_CHECKING, Any, List, Mapping, NamedTuple, Optional, Sequence, Union

from . import _abi
from ._library import call_long, lib, new
from .arrays import empty, pointer_of
from .model import Completion, Method, Mix, Model, Prompt, Tokens, _completions, sampling_of
from .policies import Policy, PpoPrompt, Rewards, _named, _ppo_prompts, _reward_callback, _sources
from .rewards import Reward, _rewards
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import Sampling

__all__ = ["Best", "best_of_n"]


class Best(NamedTuple):
    """The answers to one prompt, and which of them is the best."""

    answer: Completion
    """candidates[chosen]"""
    score: float
    chosen: int
    candidates: List[Completion]
    """The first is what `Model.generate` gives."""
    scores: List[float]
    """NaN where an answer's logits were no numbers."""


def best_of_n(model: Model, prompts: Sequence[Union[Prompt, Tokens]],
              reward: Rewards, n: int = 4, mix: Mix = None,
              mixes: Optional[Sequence[Mix]] = None, questions: Optional[Sequence[Union[PpoPrompt, Tokens]]] = None,
              tokenizer: Optional[Tokenizer] = None, reward_text: bool = False, reward_max_tokens: int = 512,
              stop_tokens: Optional[Sequence[int]] = None, max_sequences: int = 0, method: Method = "delta",
              methods: Optional[Sequence[Method]] = None, strength: float = 1.0, **sampling: Unpack[Sampling]) -> List[Best]:
    """Samples n answers to each prompt, with its mix, and has a reward choose: a function from rollouts to scores, a
    reward model, or several, weighed by the questions' inputs or by names, as a `Policy`'s. `questions` are what rewards read before the answers;
    None: the prompts. The same answers and scores in any batch.

        best, = psoup.best_of_n(model, [tokens], lambda rollouts: [-len(r.response) for r in rollouts], n=8)
        best.answer.tokens, best.score
    """
    keep: List[Any] = []
    options = new(_abi.psoup_best_options, {"n": n, "reward_text": int(reward_text),
                                            "reward_max_tokens": reward_max_tokens})
    named = _named(Policy("best of n", (), reward))
    if isinstance(reward, Mapping):
        options.sources, options.n_sources = _sources(named, keep, keep), len(named)
    elif callable(reward):
        options.reward_fn = _reward_callback(reward)
    else:
        handles, _ = _rewards([reward] if isinstance(reward, Reward) else list(reward))
        options.rewards, options.n_rewards = handles, len(handles)
        keep.append(handles)
    if questions is not None:
        if len(questions) != len(prompts):
            raise ValueError("there are %d prompts and %d questions" % (len(prompts), len(questions)))
        options.questions = cast(_ppo_prompts(questions, keep, list(named)), POINTER(_abi.psoup_ppo_prompt))
    if tokenizer is not None:
        options.tokenizer = tokenizer.handle
    settings = sampling_of({**sampling, "stop_tokens": stop_tokens}, keep)
    session = new(_abi.psoup_session_options, {"max_sequences": max_sequences})
    chosen, scores = (c_int32 * max(len(prompts), 1))(), empty(max(len(prompts) * n, 1))
    with model.lock:
        structs = model._prompts(prompts, mix, mixes, method, methods, strength, keep)
        generation = POINTER(_abi.psoup_generation)()
        call_long(lib.psoup_best_of_n, model.handle, structs, len(prompts), settings, session, options,
                  byref(generation), chosen, pointer_of(scores, c_float))
    answers = _completions(generation, len(prompts) * n)
    out = []
    for i in range(len(prompts)):
        candidates, values = answers[i * n:(i + 1) * n], [float(s) for s in scores[i * n:(i + 1) * n]]
        out.append(Best(candidates[chosen[i]], values[chosen[i]], chosen[i], candidates, values))
    return out
