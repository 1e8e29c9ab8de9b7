"""The model, its adapters and their mix; scores, gradients and generation.

A *mix* is the weights of a row over the model's adapters: None or {} is the base, {"P1A": 1.0} one policy,
{"P1A": 0.5, "P2B": 0.5} or "P1A=0.5,P2B=0.5" a personal soup, and a sequence of floats one weight per
adapter in the order of `model.adapters`. Named weights sum to 1 unless `model.mix(..., any_sum=True)` says
otherwise; a sequence may sum to anything. What the weights are given to is the row's *method*, a `MixMethod` or its
name: "delta", the weighted sum of what the adapters change; "factors", s (sum w B)(sum w A); or "logits", where each
policy reads the text by itself and their logits are weighed. A *strength* multiplies the weights after their sum was
checked: 1.5 goes half as far again from the base.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, byref, c_float, c_int32, c_size_t
from os import PathLike
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi
from ._abi import Finish, MixMethod
from ._library import Handle, call, callback, create, encoded, lib, member, new, record, text
from .arrays import copied, empty, floats, ids, pointer_of
from .context import Context, default_context
from .errors import ArgumentError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import AdapterOptions, ModelConfig, Sampling, SessionOptions

__all__ = ["Model", "Session", "Gradients", "Prompt", "Completion", "Token", "TARGETS"]

Path = Union[str, "PathLike[str]"]
Tokens = Any  # a sequence of ints, or an int32 array, which is not copied
Mix = Union[None, str, Mapping[str, float], Sequence[float], Any]
Method = Union[str, int, MixMethod]

TARGETS = {name: getattr(_abi, "PSOUP_" + name.upper()) for name in (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all_linear")}


class Token(NamedTuple):
    """One new token of the sequence that was submitted under `id`."""

    id: int
    token: int
    """-1 with Finish.ERROR."""
    logprob: float
    finish: Finish
    """Finish.NONE but for the last token."""


class Completion(NamedTuple):
    """What was generated for one prompt."""

    tokens: Any
    """int32; a stop token is kept as the last."""
    logprobs: Any
    """float32, of the untouched distribution."""
    finish: Finish


class Prompt(NamedTuple):
    """A prompt with settings of its own."""

    tokens: Tokens
    mix: Mix = None
    sequence: Optional[int] = None
    """With the seed, its stream of random words; None: its number in the call."""
    sampling: Optional[Mapping[str, Any]] = None
    """Options as for `Model.generate`, in place of all of the call's; None: the call's."""
    method: Method = MixMethod.DELTA
    """What the mix's weights are given to."""
    strength: float = 1.0
    """Multiplies them."""


def targets(value: Union[int, str, Sequence[str]]) -> int:
    """The set of linears: `["q_proj", "v_proj"]`, "all_linear", or psoup's bits."""
    if isinstance(value, int):
        return value
    bits = 0
    for name in [value] if isinstance(value, str) else value:
        if name not in TARGETS:
            raise ValueError("there is no linear %r: expected one of %s" % (name, ", ".join(TARGETS)))
        bits |= TARGETS[name]
    return bits


def adapter_options(options: Mapping[str, Any]) -> Any:
    options = dict(options)
    if "targets" in options:
        options["targets"] = targets(options["targets"])
    return new(_abi.psoup_adapter_options, options)


def method_of(value: Method) -> int:
    """psoup_mix_method's number of a name or a `MixMethod`."""
    if not isinstance(value, str):
        return int(value)
    if value.upper() not in MixMethod.__members__:
        raise ArgumentError("there is no mix method %r: expected one of %s"
                            % (value, ", ".join(m.name.lower() for m in MixMethod)))
    return int(MixMethod[value.upper()])


def sampling_of(options: Mapping[str, Any], keep: List[Any]) -> Any:
    options = dict(options)
    stop = options.pop("stop_tokens", None)
    struct = new(_abi.psoup_sampling, options, keep)
    if stop is not None:
        row = ids(stop, "stop_tokens")
        keep.append(row)
        struct.n_stop_tokens = row.n
        # An empty list is not the default: a pointer that is not NULL says that there are none.
        struct.stop_tokens = row.pointer if row.n else ctypes.cast((c_int32 * 1)(), POINTER(c_int32))
    return struct




class Model(Handle):
    """A base and its adapters. `Model(directory)` loads a Hugging Face model directory;
    `Model.create(vocab_size=..., hidden_size=..., ...)` makes one with random weights. `dtype` keeps all matrices
    in "f32", "f16" or "bf16", or the layers' linears in blocks of "int8" or "nf4"; None: as the files have them."""

    context: Context

    def __init__(self, directory: Path, context: Optional[Context] = None, dtype: Optional[str] = None) -> None:
        context = context or default_context()
        options = new(_abi.psoup_load_options, {} if dtype is None else {"dtype": member(_abi.Dtype, dtype, "dtype")})
        self._open(create(_abi.psoup_model, lib.psoup_model_load_with, context.handle, encoded(directory), options),
                   context)

    def _open(self, pointer: Any, context: Context) -> None:
        self.context = context
        self._own(pointer, lib.psoup_model_free, [context])

    @classmethod
    def load(cls, directory: Path, context: Optional[Context] = None, dtype: Optional[str] = None) -> "Model":
        """The same as `Model(directory)`."""
        return cls(directory, context, dtype)

    @classmethod
    def create(cls, seed: int = 0, context: Optional[Context] = None, **config: Unpack[ModelConfig]) -> "Model":
        """A model with random weights of the architecture that `config` names as config.json does."""
        context = context or default_context()
        struct = new(_abi.psoup_model_config, dict(config))
        self = cls.__new__(cls)
        self._open(create(_abi.psoup_model, lib.psoup_model_create, context.handle, struct, seed), context)
        return self

    def save(self, directory: Path, tokenizer: Optional[Tokenizer] = None) -> None:
        """Writes config.json and model.safetensors; with a tokenizer, its files too."""
        with self.lock:
            call(lib.psoup_model_save, self.handle, encoded(directory), tokenizer.handle if tokenizer else None)

    @property
    def config(self) -> Dict[str, Any]:
        struct = new(_abi.psoup_model_config)
        call(lib.psoup_model_get_config, self.handle, struct)
        return record(struct)

    @property
    def parameters(self) -> int:
        """The base's number of parameters."""
        return lib.psoup_model_parameters(self.handle)

    # ---- adapters ----------------------------------------------------------------------------------

    @property
    def adapters(self) -> Tuple[str, ...]:
        """The adapters' names in their order."""
        with self.lock:
            return tuple(text(lib.psoup_model_adapter_name(self.handle, i))
                         for i in range(lib.psoup_model_adapters(self.handle)))

    def add_adapter(self, name: str, **options: Unpack[AdapterOptions]) -> None:
        """Adds an adapter: rank=16, alpha=32.0, targets=["q_proj", "v_proj"], rslora=0, seed=0. Its B is zero,
        so it changes nothing yet."""
        struct = adapter_options(options)
        with self.lock:
            call(lib.psoup_model_add_adapter, self.handle, encoded(name), struct)

    def load_adapter(self, name: str, directory: Path) -> None:
        """Reads a PEFT directory."""
        with self.lock:
            call(lib.psoup_model_load_adapter, self.handle, encoded(name), encoded(directory))

    def save_adapter(self, name: str, directory: Path, base_name: Optional[str] = None) -> None:
        """Writes a PEFT directory; `base_name` goes into base_model_name_or_path."""
        with self.lock:
            call(lib.psoup_model_save_adapter, self.handle, encoded(name), encoded(directory), encoded(base_name))

    def remove_adapter(self, name: str) -> None:
        """Later adapters move down by one."""
        with self.lock:
            call(lib.psoup_model_remove_adapter, self.handle, encoded(name))

    def adapter_data(self, name: str) -> Any:
        """A copy of the adapter's parameters, float32: layer by layer, q k v o gate up down, A then B,
        then the scalar head if it has one."""
        data, count = POINTER(c_float)(), c_size_t()
        with self.lock:
            call(lib.psoup_model_adapter_data, self.handle, encoded(name), byref(data), byref(count))
            return copied(data, count.value)

    def mix(self, mix: Mix, any_sum: bool = False) -> Optional[List[float]]:
        """A mix as one weight per adapter; None for the base."""
        names = self.adapters
        if mix is None:
            return None
        if isinstance(mix, str):
            weights = (c_float * max(len(names), 1))()
            with self.lock:
                call(lib.psoup_model_parse_mix, self.handle, encoded(mix), int(any_sum), weights)
            return weights[:len(names)]
        if isinstance(mix, Mapping):
            if not mix:
                return None
            unknown = [name for name in mix if name not in names]
            if unknown:
                raise ArgumentError("the mix names %r: the model's adapters are %s"
                                    % (unknown[0], ", ".join(names) or "none"))
            total = math.fsum(mix.values())
            if not any_sum and not abs(total - 1) <= 1e-6:
                raise ArgumentError("the mix sums to %.9g: expected 1 (any_sum allows others)" % total)
            return [float(mix.get(name, 0.0)) for name in names]
        weights_given = list(mix)
        if len(weights_given) != len(names):
            raise ArgumentError("the mix has %d weights: the model has %d adapters"
                                % (len(weights_given), len(names)))
        return [float(w) for w in weights_given]

    # ---- scores --------------------------------------------------------------------------------------

    def _rows(self, rows: Sequence[Tokens], mix: Mix, mixes: Optional[Sequence[Mix]], method: Method,
              methods: Optional[Sequence[Method]], strength: float) -> Tuple[Any, Any, List[int], Any]:
        """psoup_row[n], their methods and lengths, and what the structs borrow."""
        if methods is not None and len(methods) != len(rows):
            raise ArgumentError("there are %d rows and %d methods" % (len(rows), len(methods)))
        how = (c_int32 * max(len(rows), 1))(*(method_of(m) for m in (
            methods if methods is not None else [method] * len(rows))))
        if mixes is not None and len(mixes) != len(rows):
            raise ArgumentError("there are %d rows and %d mixes" % (len(rows), len(mixes)))
        structs, lengths, keep = (_abi.psoup_row * len(rows))(), [], []
        for i, tokens in enumerate(rows):
            row, weights = ids(tokens), self._mix_row(mixes[i] if mixes is not None else mix, strength)
            structs[i].tokens, structs[i].n = row.pointer, row.n
            if weights is not None:
                structs[i].mix = weights.pointer
            lengths.append(row.n)
            keep += [row, weights]
        return structs, how, lengths, keep

    def _mix_row(self, mix: Mix, strength: float = 1.0) -> Any:
        if strength != 1.0 and mix is not None:
            if not math.isfinite(strength):
                raise ArgumentError("strength is %r: expected a finite number" % (strength,))
            weights = self.mix(mix if isinstance(mix, (str, Mapping)) else list(mix))
            return floats([strength * w for w in weights], "the mix") if weights is not None else None
        if mix is not None and not isinstance(mix, (str, Mapping, list, tuple)):
            row = floats(mix, "the mix")  # an array: not copied
            n = lib.psoup_model_adapters(self.handle)
            if row.n != n:
                raise ArgumentError("the mix has %d weights: the model has %d adapters" % (row.n, n))
            return row
        weights = self.mix(mix)
        return floats(weights, "the mix") if weights is not None else None

    def logprobs(self, rows: Sequence[Tokens], mix: Mix = None, mixes: Optional[Sequence[Mix]] = None,
                 method: Method = "delta", methods: Optional[Sequence[Method]] = None,
                 strength: float = 1.0) -> List[Any]:
        """For each row, the log-probabilities of its tokens 1 ... n-1 given those before, float32. `mix` is
        every row's, or `mixes` has one a row; `method` and `methods` likewise. `strength` multiplies weights."""
        with self.lock:  # mixes are as long as there are adapters
            structs, how, lengths, keep = self._rows(rows, mix, mixes, method, methods, strength)
            counts = [max(n - 1, 0) for n in lengths]
            out = empty(sum(counts))
            call(lib.psoup_model_logprobs_mixed, self.handle, structs, how, len(rows), pointer_of(out, c_float))
        return _split(out, counts)

    def logits(self, rows: Sequence[Tokens], mix: Mix = None, mixes: Optional[Sequence[Mix]] = None,
               method: Method = "delta", methods: Optional[Sequence[Method]] = None,
               strength: float = 1.0) -> List[Any]:
        """For each row, [its length, vocab_size] float32."""
        with self.lock:
            structs, how, lengths, keep = self._rows(rows, mix, mixes, method, methods, strength)
            vocabulary = self.config["vocab_size"]
            out = empty(sum(lengths) * vocabulary)
            call(lib.psoup_model_logits_mixed, self.handle, structs, how, len(rows), pointer_of(out, c_float))
        parts = _split(out, [n * vocabulary for n in lengths])
        return [p.reshape(n, vocabulary) if hasattr(p, "reshape") else p.cast("B").cast("f", (n, vocabulary))
                for p, n in zip(parts, lengths)]

    def gradients(self, rows: Sequence[Tokens], mix: Mix = None, mixes: Optional[Sequence[Mix]] = None,
                  weights: Any = None, what: Sequence[str] = ("adapters",), method: Method = "delta",
                  methods: Optional[Sequence[Method]] = None, strength: float = 1.0) -> "Gradients":
        """The gradient of the sum over rows and tokens of weight * log p(token). `weights` has the layout
        of `logprobs`, concatenated; None: all 1. `what` is any of "base", "adapters" and "mix"."""
        bits = 0
        for word in what:
            bits |= getattr(_abi, "PSOUP_GRADIENT_" + word.upper())
        scale = floats(weights) if weights is not None else None
        with self.lock:
            structs, how, lengths, keep = self._rows(rows, mix, mixes, method, methods, strength)
            if scale is not None and scale.n != sum(n - 1 for n in lengths):
                raise ArgumentError("there are %d weights and %d tokens" % (scale.n, sum(n - 1 for n in lengths)))
            return Gradients(create(_abi.psoup_gradients, lib.psoup_model_gradients_mixed, self.handle, structs, how,
                                    len(rows), scale.pointer if scale else None, bits), self)

    # ---- generation ------------------------------------------------------------------------------------

    def _prompt(self, prompt: Union[Prompt, Tokens], mix: Mix, method: Method, strength: float, number: int,
                keep: List[Any]) -> Any:
        if not isinstance(prompt, Prompt):
            prompt = Prompt(prompt, mix, method=method, strength=strength)
        row, weights = ids(prompt.tokens), self._mix_row(prompt.mix, prompt.strength)
        struct = _abi.psoup_prompt(tokens=row.pointer, n=row.n)
        struct.mix_method = method_of(prompt.method)
        struct.sequence = prompt.sequence if prompt.sequence is not None else number
        if weights is not None:
            struct.mix = weights.pointer
        if prompt.sampling is not None:
            own = sampling_of(prompt.sampling, keep)
            struct.sampling = ctypes.pointer(own)
            keep.append(own)
        keep += [row, weights]
        return struct

    def generate(self, prompts: Sequence[Union[Prompt, Tokens]], mix: Mix = None,
                 mixes: Optional[Sequence[Mix]] = None, on_token: Optional[Callable[[Token], Any]] = None,
                 stop_tokens: Optional[Sequence[int]] = None, max_sequences: int = 0, max_tokens: int = 0,
                 prefill_rows: int = 0, method: Method = "delta", methods: Optional[Sequence[Method]] = None,
                 strength: float = 1.0, **sampling: Unpack[Sampling]) -> List[Completion]:
        """Generates for all prompts together, each with its mix and method, weights times strength. `on_token(token)`
        sees every new token as it comes; `token.id` is the prompt's number. Sampling: max_new_tokens=128,
        temperature=1.0 (0: greedy), top_p, top_k, min_new_tokens, no_repeat_ngram_size, seed. stop_tokens: None is the
        model's own end tokens. max_sequences decode together."""
        keep: List[Any] = []
        settings = sampling_of({**sampling, "stop_tokens": stop_tokens}, keep)
        session = new(_abi.psoup_session_options, {"max_sequences": max_sequences, "max_tokens": max_tokens,
                                                   "prefill_rows": prefill_rows})
        with self.lock:
            structs = self._prompts(prompts, mix, mixes, method, methods, strength, keep)
            generation = create(_abi.psoup_generation, lib.psoup_generate, self.handle, structs, len(prompts),
                                settings, session, _token_callback(on_token), None, long=True)
        return _completions(generation, len(prompts))

    def _prompts(self, prompts: Sequence[Union[Prompt, Tokens]], mix: Mix, mixes: Optional[Sequence[Mix]],
                 method: Method, methods: Optional[Sequence[Method]], strength: float, keep: List[Any]) -> Any:
        if mixes is not None and len(mixes) != len(prompts):
            raise ArgumentError("there are %d prompts and %d mixes" % (len(prompts), len(mixes)))
        if methods is not None and len(methods) != len(prompts):
            raise ArgumentError("there are %d prompts and %d methods" % (len(prompts), len(methods)))
        structs = (_abi.psoup_prompt * len(prompts))()
        for i, prompt in enumerate(prompts):
            structs[i] = self._prompt(prompt, mixes[i] if mixes is not None else mix,
                                      methods[i] if methods is not None else method, strength, i, keep)
        return structs

    def session(self, **options: Unpack[SessionOptions]) -> "Session":
        """A `Session` over this model."""
        return Session(self, **options)

    def __repr__(self) -> str:
        return "<psoup.Model closed>" if self.closed else "<psoup.Model, %d parameters, adapters: %s>" % (
            self.parameters, ", ".join(self.adapters) or "none")


def _completions(generation: Any, n: int) -> List[Completion]:
    """Copies of the first n, and frees the generation."""
    try:
        out = []
        for i in range(n):
            c = lib.psoup_generation_get(generation, i).contents
            out.append(Completion(copied(c.tokens, c.n, "int32"), copied(c.logprobs, c.n), Finish(c.finish)))
        return out
    finally:
        lib.psoup_generation_free(generation)


def _split(flat: Any, counts: Sequence[int]) -> List[Any]:
    out, at = [], 0
    for n in counts:
        out.append(flat[at:at + n])
        at += n
    return out


def _token_callback(on_token: Optional[Callable[[Token], Any]]) -> Any:
    def run(user: Any, id: int, token: int, logprob: float, finish: int) -> int:
        if on_token is not None:
            on_token(Token(id, token, logprob, Finish(finish)))
        return 0

    return callback(_abi.psoup_token_fn, run)


class Session(Handle):
    """A KV cache and a changing set of sequences that decode together, each with its own mix. Prompts may
    be submitted at any time between steps; a finished sequence gives its place to the next.

        session = model.session(max_sequences=8)
        session.submit(7, prompt, mix={"P1A": 1.0}, temperature=0.7)
        while session.running:
            for token in session.step(): ...
    """

    def __init__(self, model: Model, **options: Unpack[SessionOptions]) -> None:
        self.model, self.running = model._again(), 0
        with model.lock:
            self._own(create(_abi.psoup_session, lib.psoup_session_create, model.handle,
                             new(_abi.psoup_session_options, dict(options))),
                      lib.psoup_session_free, [model], lock=model.lock)

    def submit(self, id: int, prompt: Tokens, mix: Mix = None, sequence: Optional[int] = None,
               stop_tokens: Optional[Sequence[int]] = None, method: Method = "delta", strength: float = 1.0,
               **sampling: Unpack[Sampling]) -> None:
        """Queues a prompt under an id of the caller's. sequence: its stream of random words; None: the id."""
        keep: List[Any] = []
        with self.lock:
            struct = self.model._prompt(Prompt(prompt, mix, sequence, {**sampling, "stop_tokens": stop_tokens}, method,
                                               strength), None, method, strength, id, keep)
            call(lib.psoup_session_submit, self.handle, id, struct)
            self.running += 1

    def step(self) -> List[Token]:
        """Admits waiting prompts, then one new token for every running sequence; `running` tells how many
        are running or waiting afterwards."""
        tokens: List[Token] = []
        running = c_size_t()
        with self.lock:
            call(lib.psoup_session_step, self.handle, _token_callback(tokens.append), None, byref(running))
            self.running = running.value
        return tokens


class Gradients(Handle):
    """Gradients by name: `gradients["P1A/model.layers.0.self_attn.q_proj.lora_A"]`, flat float32. Base
    weights have their Hugging Face names; "mix" is [rows, adapters]."""

    def __init__(self, pointer: Any, model: Model) -> None:
        self._own(pointer, lib.psoup_gradients_free, [model])

    def __getitem__(self, name: str) -> Any:
        count = c_size_t()
        data = lib.psoup_gradients_get(self.handle, encoded(name), byref(count))
        if not data:
            raise KeyError(name)
        return copied(data, count.value)
