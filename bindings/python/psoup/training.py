"""Training on the adapters of one model: supervised fine-tuning, reward models, DPO, PPO."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_float, c_int64
from os import PathLike
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi, data
from ._abi import Finish
from ._library import Handle, call, call_long, callback, create, encoded, fill, lib, new, text, texts
from .arrays import copied, empty, ids, pointer_of
from .comm import Comm
from .errors import ArgumentError
from .history import OnStep, Run, Step
from .model import Model, Tokens, adapter_options
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .runs import RewardTraining
    from .options import AdapterOptions, DpoOptions, PpoOptions, RewardOptions, SftOptions

__all__ = ["Example", "sft", "Reward", "Comparison", "train_rewards", "reward_accuracy", "DpoPair",
           "dpo", "Policy", "PpoPrompt", "RewardInput", "Rollout", "Trace", "PPO", "Ppo", "sft_options",
           "reward_options", "dpo_options", "ppo_options"]

Path = Union[str, "PathLike[str]"]


def _step_callback(on_step: Optional[OnStep]) -> Any:
    """Always there, so that a signal can stop the training."""

    def run(user: Any, pointer: Any) -> int:
        if on_step is not None:
            s = pointer.contents
            on_step(Step(text(s.phase), text(s.subject), s.step, s.total,
                         {text(s.names[i]): s.values[i] for i in range(s.n)},
                         {text(s.time_names[i]): s.times[i] for i in range(s.n_times)}))
        return 0

    return callback(_abi.psoup_step_fn, run)


def _with_comm(struct: Any, comm: Optional[Comm]) -> None:
    if comm is not None:
        struct.comm = comm.handle


# ---- supervised fine-tuning ---------------------------------------------------------------------------


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


# ---- reward models --------------------------------------------------------------------------------------


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
        from .runs import RewardTraining as Training

        return Training([self], train, validation, on_step, comm, **options)

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


# ---- DPO --------------------------------------------------------------------------------------------------


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


# ---- PPO --------------------------------------------------------------------------------------------------


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

