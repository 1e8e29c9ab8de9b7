"""Preferences, prompt templates, judges, feedback and win rates."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int32, create_string_buffer
from os import PathLike
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, \
    Tuple, Union

from . import _abi
from ._library import Handle, call, call_long, callback, create, encoded, lib, new, progress_callback, record, \
    text, texts
from .context import Context, default_context
from .errors import ArgumentError, OutOfMemoryError
from .model import Method, Mix, Model, method_of, sampling_of
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import FeedbackOptions

__all__ = ["Preference", "Preferences", "User", "fill_template", "Question", "Judge", "A_WINS", "TIE", "B_WINS",
           "UNPARSED", "Instruction", "feedback", "Duel", "Rate", "winrate_aggregate", "winrate_criterion",
           "winrate_helpfulness"]

Path = Union[str, "PathLike[str]"]
A_WINS, TIE, B_WINS, UNPARSED = _abi.PSOUP_A_WINS, _abi.PSOUP_TIE, _abi.PSOUP_B_WINS, _abi.PSOUP_UNPARSED

# ---- preferences ------------------------------------------------------------------------------------------


class Preference(NamedTuple):
    symbol: str
    dimension: str
    prompt: str
    """"Generate a response that ..."."""
    criterion: str
    """"Choose a response that ...", for judges."""
    opposite: Optional[str]
    """The symbol of the preference that negatives are sampled with."""


def _preference(struct: Any) -> Preference:
    return Preference(text(struct.symbol), text(struct.dimension), text(struct.prompt), text(struct.criterion),
                      text(struct.opposite) if struct.opposite is not None else None)


class User(NamedTuple):
    """One preference of each dimension."""

    name: str
    """The symbols' last letters: "AAB"."""
    members: Tuple[int, ...]
    """Indices into the catalogue."""


class Preferences(Handle):
    """A catalogue of preferences: the paper's (with_new adds P3C and P3D), or a JSON file's. A sequence of
    `Preference`; `find("P1A")` gives an index, `users()` everyone who has one of each dimension."""

    def __init__(self, path: Optional[Path] = None, with_new: bool = False,
                 context: Optional[Context] = None) -> None:
        context = context or default_context()
        if path is None:
            pointer = create(_abi.psoup_preferences, lib.psoup_preferences_default, context.handle, int(with_new))
        else:
            pointer = create(_abi.psoup_preferences, lib.psoup_preferences_load, context.handle, encoded(path))
        self._own(pointer, lib.psoup_preferences_free, [context])

    def __len__(self) -> int:
        return lib.psoup_preferences_count(self.handle)

    def __getitem__(self, index: int) -> Preference:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(index)
        return _preference(lib.psoup_preferences_get(self.handle, index % n).contents)

    def __iter__(self) -> Iterator[Preference]:
        return (self[i] for i in range(len(self)))

    def find(self, symbol: str) -> Optional[int]:
        found = lib.psoup_preferences_find(self.handle, encoded(symbol))
        return found if found >= 0 else None

    def users(self) -> List[User]:
        """All users, the last dimension fastest: 8 for the paper's six, 16 with the two new ones."""
        size = lib.psoup_user_size(self.handle)
        out = []
        for u in range(lib.psoup_users_count(self.handle)):
            members, name = (c_int32 * size)(), create_string_buffer(256)
            call(lib.psoup_user_get, self.handle, u, members, name, len(name))
            out.append(User(text(name.value), tuple(members)))
        return out


def fill_template(instruction: str, input: Optional[str] = None, preference: Optional[str] = None,
                  template: Optional[str] = None) -> str:
    """Fills a prompt template: None or "tulu", "alpaca", or a text with {instruction}, {input} and
    {preference}."""
    out = ctypes.c_void_p()
    call(lib.psoup_template_fill, encoded(template), encoded(instruction), encoded(input), encoded(preference),
         byref(out))
    if not out.value:
        raise OutOfMemoryError("out of memory")
    try:
        return text(ctypes.string_at(out.value))
    finally:
        lib.psoup_text_free(out)


# ---- judges -------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    id: int
    prompt: str
    """The instruction and its input, without preference prompts."""
    preference: Optional[Preference]
    """The criterion; None: general helpfulness."""
    a: str
    b: str


JudgeFunction = Callable[[List[Question]], Sequence[int]]


class Judge(Handle):
    """Says which of two responses is better: a function from questions to verdicts (A_WINS, TIE, B_WINS,
    UNPARSED; "a", "b" and "tie" will do), or a command that speaks JSON Lines, given as its argument list.
    What the function raises comes out of the call that asked. A command that is silent for `patience`
    seconds while it is asked fails; None waits for ever."""

    def __init__(self, judge: Union[JudgeFunction, Sequence[str]], patience: Optional[float] = None,
                 context: Optional[Context] = None) -> None:
        context = context or default_context()
        keep = None
        if callable(judge):
            keep = _judge_callback(judge)
            pointer = create(_abi.psoup_judge, lib.psoup_judge_create, context.handle, keep, None)
        else:
            argv = texts([*judge, None])
            pointer = create(_abi.psoup_judge, lib.psoup_judge_command, context.handle, argv)
        self._own(pointer, lib.psoup_judge_free, [context], keep)
        if patience is not None:
            call(lib.psoup_judge_set_patience, self.handle, patience)

    def ask(self, questions: Sequence[Question]) -> List[int]:
        """One verdict a question."""
        structs, keep = (_abi.psoup_question * len(questions))(), []
        for struct, q in zip(structs, questions):
            struct.id, struct.prompt, struct.a, struct.b = q.id, encoded(q.prompt), encoded(q.a), encoded(q.b)
            if q.preference is not None:
                p = _abi.psoup_preference(*[encoded(word) for word in q.preference])
                struct.preference = ctypes.pointer(p)
                keep.append(p)
        verdicts = (c_int32 * len(questions))()
        with self.lock:
            call_long(lib.psoup_judge_ask, self.handle, structs, len(questions), verdicts)
        return list(verdicts)

    def duels(self, preferences: Preferences, prompts: Sequence[str], a: Sequence[str], b: Sequence[str],
              criteria: Sequence[Sequence[int]], swap: bool = True,
              helpfulness: bool = False) -> Tuple[List[List[int]], List[int]]:
        """Asks about responses a[i] and b[i] to prompts[i] by each of criteria[i] (indices into the
        preferences), and where asked about general helpfulness. With `swap` every question is asked in both
        orders, and a verdict that changes sides is a tie. Returns each duel's verdicts and helpfulness
        (UNPARSED where not asked)."""
        n = len(prompts)
        if not n == len(a) == len(b) == len(criteria):
            raise ArgumentError("there are %d prompts, %d and %d responses and %d criteria"
                                % (n, len(a), len(b), len(criteria)))
        structs, keep = _duels([Duel(i, 0, tuple(c), (UNPARSED,) * len(c)) for i, c in enumerate(criteria)])
        verdicts = (c_int32 * sum(len(c) for c in criteria))()
        helpful = (c_int32 * n)(*[UNPARSED] * n)
        with self.lock:
            call_long(lib.psoup_judge_duels, self.handle, preferences.handle, texts(prompts), texts(a), texts(b),
                      structs, n, int(swap), verdicts, helpful if helpfulness else None)
        out, at = [], 0
        for c in criteria:
            out.append(list(verdicts[at:at + len(c)]))
            at += len(c)
        return out, list(helpful)


_WORDS = {"a": A_WINS, "b": B_WINS, "tie": TIE}


def _judge_callback(function: JudgeFunction) -> Any:
    def run(user: Any, questions: Any, n: int, verdicts: Any) -> int:
        seen = []
        for i in range(n):
            q = questions[i]
            seen.append(Question(q.id, text(q.prompt), _preference(q.preference.contents) if q.preference else None,
                                 text(q.a), text(q.b)))
        given = function(seen)
        if len(given) != n:
            raise ValueError("the judge gave %d verdicts on %d questions" % (len(given), n))
        for i, verdict in enumerate(given):
            verdicts[i] = _WORDS.get(verdict, UNPARSED) if isinstance(verdict, str) else verdict
        return 0

    return callback(_abi.psoup_judge_fn, run)


# ---- feedback -------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    instruction: str
    input: Optional[str] = None
    id: int = 0


def feedback(generator: Model, tokenizer: Tokenizer, preferences: Preferences, instructions: Sequence[Instruction],
             judge: Judge, path: Path, mix: Mix = None, sampling: Optional[Mapping[str, Any]] = None,
             progress: Any = None, method: Method = "delta", strength: float = 1.0, **options: Unpack[FeedbackOptions]) -> Dict[str, int]:
    """Samples responses with and without preference prompts, asks the judge which are better, and writes
    comparisons as JSON Lines to `path`. Returns how many were written, and the ties and unparsed verdicts
    that dropped one. `mix`, `method` and `strength` are the generator's, as of `Model.generate`. Options:
    prompt_template, max_sequences, seed."""
    keep: List[Any] = []
    struct = new(_abi.psoup_feedback_options, dict(options), keep)
    if sampling is not None:
        settings = sampling_of(sampling, keep)
        struct.sampling = ctypes.pointer(settings)
        keep.append(settings)
    struct.progress = progress_callback(progress)
    struct.mix_method = method_of(method)
    structs = (_abi.psoup_instruction * len(instructions))()
    for item, given in zip(structs, instructions):
        item.instruction, item.input, item.id = encoded(given.instruction), encoded(given.input), given.id
    counts = new(_abi.psoup_feedback_counts)
    with generator.lock, judge.lock:
        row = generator._mix_row(mix, strength)
        if row is not None:
            struct.mix = row.pointer
            keep.append(row)
        call_long(lib.psoup_feedback, generator.handle, tokenizer.handle, preferences.handle, structs,
                  len(instructions), judge.handle, struct, encoded(path), byref(counts))
    return record(counts)


# ---- win rates --------------------------------------------------------------------------------------------------


class Duel(NamedTuple):
    """One comparison of responses A and B to one prompt for one user."""

    prompt: int
    """Which prompt: intervals resample prompts, not rows."""
    user: int
    preferences: Sequence[int]
    """The user's criteria, in any stable numbering."""
    verdicts: Sequence[int]
    """One per criterion."""
    helpfulness: int = UNPARSED


class Rate(NamedTuple):
    rate: float
    """wins / (wins + losses); NaN when all tie."""
    low: float
    high: float
    """The 95 % interval, by bootstrap over prompts."""
    wins: int
    ties: int
    losses: int
    unparsed: int


def _duels(duels: Sequence[Duel]) -> Tuple[Any, List[Any]]:
    structs, keep = (_abi.psoup_duel * len(duels))(), []
    for struct, d in zip(structs, duels):
        if len(d.preferences) != len(d.verdicts):
            raise ArgumentError("a duel has %d criteria and %d verdicts" % (len(d.preferences), len(d.verdicts)))
        criteria = (c_int32 * len(d.preferences))(*d.preferences)
        verdicts = (c_int32 * len(d.verdicts))(*d.verdicts)
        struct.prompt, struct.user, struct.n, struct.helpfulness = d.prompt, d.user, len(d.verdicts), d.helpfulness
        struct.preferences = ctypes.cast(criteria, POINTER(c_int32))
        struct.verdicts = ctypes.cast(verdicts, POINTER(c_int32))
        keep += [criteria, verdicts]
    return structs, keep


def _rate(function: Any, duels: Sequence[Duel], context: Optional[Context], *arguments: Any) -> Rate:
    structs, keep = _duels(duels)
    out = _abi.psoup_rate()
    call(function, (context or default_context()).handle, structs, len(duels), *arguments, byref(out))
    return Rate(**record(out))


def winrate_aggregate(duels: Sequence[Duel], seed: int = 0, context: Optional[Context] = None) -> Rate:
    """By the sign of the sum of each duel's verdicts."""
    return _rate(lib.psoup_winrate_aggregate, duels, context, seed)


def winrate_criterion(duels: Sequence[Duel], preference: int, seed: int = 0,
                      context: Optional[Context] = None) -> Rate:
    """One criterion over the duels that contain it: the mean of its users' rates."""
    return _rate(lib.psoup_winrate_criterion, duels, context, preference, seed)


def winrate_helpfulness(duels: Sequence[Duel], seed: int = 0, context: Optional[Context] = None) -> Rate:
    return _rate(lib.psoup_winrate_helpfulness, duels, context, seed)
