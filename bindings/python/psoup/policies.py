"""Policies that learn from rewards: PPO, RLOO and GRPO, and soups of them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int64
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi, data
from ._abi import Finish
from ._library import Handle, call, call_long, callback, create, encoded, fill, lib, new, text, texts
from .arrays import copied, ids
from .comm import Comm
from .errors import ArgumentError
from .history import OnStep, Run
from .model import Model, Tokens
from .rewards import Reward, _rewards
from .tokenizer import Tokenizer
from .training import _step_callback, _with_comm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import PpoOptions

__all__ = ["Policy", "PpoPrompt", "RewardInput", "Rollout", "Trace", "PPO", "Ppo", "ppo_options"]


class RewardInput(NamedTuple):
    """One way in which a response is scored: reward model `reward`, by its number or the name it has in the policy's
    `reward`, reads `tokens` and then the response. The response's score is the sum of weight * score over the prompt's
    list. Of a soup's policy the weight is that of the reward's adapter in the mix."""

    tokens: Tokens
    reward: Union[int, str] = 0
    weight: float = 1.0


class PpoPrompt(NamedTuple):
    tokens: Tokens
    """What the policy reads."""
    id: int = 0
    """The caller's, given back to reward functions."""
    inputs: Sequence[RewardInput] = ()
    """None: the first reward model, or every one of several with names, reads the same tokens, weight 1."""


class Rollout(NamedTuple):
    """A response to score."""

    policy: str
    prompt: List[int]
    id: int
    """The prompt's."""
    response: List[int]
    """With its end token if it has one."""
    finish: Finish


RewardFunction = Callable[[List[Rollout]], Sequence[float]]
Source = Union[RewardFunction, Reward, Tuple[Union[RewardFunction, Reward], float]]
Rewards = Union[RewardFunction, Reward, Sequence[Reward], Mapping[str, Union[Source, Mapping[str, Source]]]]


class Policy(NamedTuple):
    """An adapter to train, what it is prompted with, and what rewards it: a function from rollouts to
    scores, a reward model, or several."""

    adapter: str
    prompts: Sequence[Union[PpoPrompt, Tokens]]
    reward: Rewards
    """By name there may be models and functions together, each alone or with its weight: {"helpful": model, "short":
    (function, 0.1)}. Steps report each as "reward/NAME". Of a soup the names are its adapters', each with one or with
    several: {"A": {"helpful": model, "short": (function, 0.1)}, "B": model}; those are "reward/A/short" and so on."""
    validation: Sequence[Union[PpoPrompt, Tokens]] = ()
    """The best weights are those of the highest mean reward on these."""
    seed: int = 0
    soup: Sequence[str] = ()
    """Adapters that learn as one policy, each prompt's responses under a mix of its own; `adapter` is then
    its name, reward i is what adapter i is trained for (or `reward` says it by name), and a function is called for
    each of them."""
    concentration: float = 1.0
    """Of the Dirichlet distribution that a soup's mixes are drawn from."""


class Trace(NamedTuple):
    """What the last step saw of one policy, token by token; tokens of all rollouts, one after another."""

    start: Any
    """[rollouts + 1] into the arrays of tokens."""
    response: Any
    logprob: Any
    ref_logprob: Any
    value: Any
    reward: Any
    """With the KL penalty, the score on the last token."""
    advantage: Any
    returns: Any
    score: Any
    """[rollouts] as the reward gave it."""
    first_ratio: Any
    kl_coefficient: float
    mix: Any
    """[rollouts · adapters] of the policy: all 1 but for a soup."""


OnSamples = Callable[[int, List[Rollout], List[float]], Any]
"""Told of the steps done, one policy's responses to its sampled prompts, and their scores."""


def _rollouts(rollouts: Any, n: int) -> List[Rollout]:
    seen = []
    for i in range(n):
        r = rollouts[i]
        p = r.prompt.contents
        seen.append(Rollout(text(r.policy), p.tokens[:p.n], p.id, r.response[:r.n], Finish(r.finish)))
    return seen


def _samples_callback(function: OnSamples) -> Any:
    def run(user: Any, step: int, rollouts: Any, scores: Any, n: int) -> int:
        function(step, _rollouts(rollouts, n), scores[:n])
        return 0

    return callback(_abi.psoup_samples_fn, run)


def _reward_callback(function: RewardFunction) -> Any:
    def run(user: Any, rollouts: Any, n: int, scores: Any) -> int:
        given = function(_rollouts(rollouts, n))
        if len(given) != n:
            raise ValueError("the reward function gave %d scores for %d rollouts" % (len(given), n))
        for i, score in enumerate(given):
            scores[i] = float(score)
        return 0

    return callback(_abi.psoup_reward_fn, run)


def _named(policy: Policy) -> Dict[str, Tuple[Source, int]]:
    """The rewards that a policy names, each with the number of its adapter."""
    named: Dict[str, Tuple[Source, int]] = {}
    for name, source in policy.reward.items() if isinstance(policy.reward, Mapping) else ():
        if policy.soup and name not in policy.soup:
            raise ArgumentError("policy %r has a reward of %r, which is no adapter of it" % (policy.adapter, name))
        adapter = list(policy.soup).index(name) if policy.soup else 0
        if not isinstance(source, Mapping):
            named[name] = source, adapter
        elif policy.soup:
            named.update({"%s/%s" % (name, part): (given, adapter) for part, given in source.items()})
        else:
            raise ArgumentError("policy %r has several rewards under one name, %r" % (policy.adapter, name))
    return named


def _sources(named: Mapping[str, Tuple[Source, int]], keep: List[Any], parents: List[Handle]) -> Any:
    structs = (_abi.psoup_reward_source * len(named))()
    for struct, (name, (source, adapter)) in zip(structs, named.items()):
        reward, weight = source if isinstance(source, tuple) else (source, 1.0)
        struct.name, struct.weight, struct.adapter = encoded(name), weight, adapter
        if isinstance(reward, Reward):
            struct.model = reward.handle
            parents.append(reward)
        else:
            struct.function = _reward_callback(reward)
    keep.append(structs)
    return structs


def _number(reward: Union[int, str], names: Sequence[str]) -> int:
    if isinstance(reward, str) and reward not in names:
        raise ArgumentError("an input is of reward %r, which no policy of its prompt has" % reward)
    return names.index(reward) if isinstance(reward, str) else reward


def _ppo_prompts(prompts: Sequence[Union[PpoPrompt, Tokens]], keep: List[Any], names: Sequence[str]) -> Any:
    structs = (_abi.psoup_ppo_prompt * len(prompts))()
    for number, (struct, prompt) in enumerate(zip(structs, prompts)):
        if not isinstance(prompt, PpoPrompt):
            prompt = PpoPrompt(prompt, number)
        row = ids(prompt.tokens)
        struct.tokens, struct.n, struct.id = row.pointer, row.n, prompt.id
        keep.append(row)
        if prompt.inputs:
            inputs = (_abi.psoup_reward_input * len(prompt.inputs))()
            for item, given in zip(inputs, prompt.inputs):
                read = ids(given.tokens)
                item.tokens, item.n, item.weight = read.pointer, read.n, given.weight
                item.reward = _number(given.reward, names)
                keep.append(read)
            struct.inputs, struct.n_inputs = ctypes.cast(inputs, POINTER(_abi.psoup_reward_input)), len(inputs)
            keep.append(inputs)
    keep.append(structs)
    return structs


def _soup(policy: Policy, keep: List[Any]) -> Any:
    adapters = texts(policy.soup)
    soup = _abi.psoup_ppo_soup(size=ctypes.sizeof(_abi.psoup_ppo_soup), adapters=adapters, n=len(policy.soup),
                               concentration=policy.concentration)
    keep += [adapters, soup]
    return ctypes.pointer(soup)


class PPO(Run):
    """PPO of several policies side by side, each an adapter of one model with its own rewards.

        for step in psoup.PPO(model, ["P1A"], prompts=prompts, reward=lambda rollouts: [...], steps=10):
            print(step.reward, step.kl)

    A policy is named, and then has the prompts, reward and validation given here, and seed + its place; or it is
    a `Policy` with its own.

    Options and their defaults: `ppo_options()`; preset "rlphf" has the settings of the paper's released
    code. `tokenizer` is for reward_text=1, and for texts in the file `samples`. With samples_every,
    on_samples is told what each policy says on the way. What a reward function, on_step or on_samples
    raises comes out of step() or run().
    """

    def __init__(self, model: Model, policies: Sequence[Union[Policy, str]], preset: Optional[str] = None,
                 on_step: Optional[OnStep] = None, tokenizer: Optional[Tokenizer] = None,
                 on_samples: Optional[OnSamples] = None, comm: Optional[Comm] = None, *,
                 prompts: Sequence[Union[PpoPrompt, Tokens]] = (),
                 reward: Rewards = (),
                 validation: Sequence[Union[PpoPrompt, Tokens]] = (), seed: int = 0,
                 **options: Unpack[PpoOptions]) -> None:
        given = [Policy(p, prompts, reward, validation, seed + k) if isinstance(p, str) else p
                 for k, p in enumerate(policies)]
        keep: List[Any] = []
        parents: List[Handle] = [model]
        structs = (_abi.psoup_ppo_policy * len(given))()
        for struct, policy in zip(structs, given):
            struct.adapter, struct.seed = encoded(policy.adapter), policy.seed
            named = _named(policy)
            names = list(named or policy.soup)
            struct.prompts, struct.n_prompts = _ppo_prompts(policy.prompts, keep, names), len(policy.prompts)
            struct.validation = _ppo_prompts(policy.validation, keep, names)
            struct.n_validation = len(policy.validation)
            if policy.soup:
                struct.soup = _soup(policy, keep)
            if isinstance(policy.reward, Mapping):
                struct.sources, struct.n_sources = _sources(named, keep, parents), len(named)
            elif callable(policy.reward):
                struct.reward_fn = _reward_callback(policy.reward)
            else:
                rewards = [policy.reward] if isinstance(policy.reward, Reward) else list(policy.reward)
                if not rewards:
                    raise ArgumentError("policy %r has no reward" % policy.adapter)
                handles, _ = _rewards(rewards)
                struct.rewards, struct.n_rewards = handles, len(rewards)
                keep.append(handles)
                parents += rewards
        settings = self._settings(preset, options, keep)
        settings.on_step = _step_callback(self._told(on_step))
        _with_comm(settings, comm)
        if comm is not None:
            parents.append(comm)
        if on_samples is not None:
            settings.on_samples = _samples_callback(on_samples)
        if tokenizer is not None:
            settings.tokenizer = tokenizer.handle
            parents.append(tokenizer)
        keep += [structs, settings]
        self.policies = tuple(p.adapter for p in given)
        with model.lock:
            self._own(create(_abi.psoup_ppo, lib.psoup_ppo_create, model.handle, structs, len(policies), settings),
                      lib.psoup_ppo_free, parents, keep, lock=model.lock)

    @staticmethod
    def _settings(preset: Optional[str], options: Any, keep: List[Any]) -> Any:
        settings = new(_abi.psoup_ppo_options)
        if preset is not None:
            call(lib.psoup_ppo_preset, encoded(preset), settings)
        return fill(settings, dict(options), keep)

    def step(self) -> int:
        """One step of every policy that still has steps to go: sample, score, update; and the validation
        and samples that are due. Returns how many steps are left."""
        remaining = c_int64()
        with self.lock:
            call_long(lib.psoup_ppo_step, self.handle, byref(remaining))
        return remaining.value

    def run(self) -> None:
        """Steps to the end, with validation, and leaves the best weights in the adapters."""
        with self.lock:
            call_long(lib.psoup_ppo_run, self.handle)

    def diverged(self, policy: Union[int, str] = 0) -> bool:
        """Whether a policy's logits stopped being numbers, at which it left the run."""
        return bool(lib.psoup_ppo_diverged(self.handle, self._number(policy)))

    def trace(self, policy: Union[int, str] = 0) -> Trace:
        struct = new(_abi.psoup_ppo_trace)
        with self.lock:
            call(lib.psoup_ppo_get_trace, self.handle, self._number(policy), byref(struct))
            def take(name: str, n: int, dtype: str = "float32") -> Any:
                return copied(getattr(struct, name), n, dtype)
            n = struct.tokens
            return Trace(take("start", struct.rollouts + 1, "int32"), take("response", n, "int32"),
                         take("logprob", n), take("ref_logprob", n), take("value", n), take("reward", n),
                         take("advantage", n), take("returns", n), take("score", struct.rollouts),
                         take("first_ratio", n), struct.kl_coefficient,
                         take("mix", struct.rollouts * struct.adapters))

    def _number(self, policy: Union[int, str]) -> int:
        return self.policies.index(policy) if isinstance(policy, str) else policy


def ppo_options(preset: Optional[str] = None, **options: Unpack[PpoOptions]) -> Dict[str, Any]:
    """Every option of `PPO` with its value."""
    return data.fields(lib.psoup_ppo_fields(), PPO._settings(preset, options, []))


Ppo = PPO
"""Its name before 0.4."""
