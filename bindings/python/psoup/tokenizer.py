"""Text to token ids and back: BPE, as tokenizer.json has it."""

from __future__ import annotations

from ctypes import byref, c_int32, c_size_t, create_string_buffer
from os import PathLike
from typing import Any, List, Optional, Sequence, Tuple, Union

from . import _abi
from ._library import Handle, call, create, encoded, lib, text, texts
from .arrays import ids
from .context import Context, default_context

__all__ = ["Tokenizer"]

Path = Union[str, "PathLike[str]"]


class Tokenizer(Handle):
    """Load one with `Tokenizer(path)`, a tokenizer.json or a model's directory, or train one with
    `Tokenizer.train(texts, vocab_size)`. encode and decode may be called from several threads."""

    def __init__(self, path: Path, context: Optional[Context] = None) -> None:
        context = context or default_context()
        self._open(create(_abi.psoup_tokenizer, lib.psoup_tokenizer_load, context.handle, encoded(path)),
                   context)

    def _open(self, pointer: Any, context: Context) -> None:
        self._own(pointer, lib.psoup_tokenizer_free, [context])

    @classmethod
    def train(cls, corpus: Sequence[str], vocab_size: int, special: Sequence[str] = (),
              pattern: Optional[str] = None, context: Optional[Context] = None) -> "Tokenizer":
        """Trains a byte-level BPE: 256 bytes, the special tokens, then merges by frequency. `pattern` is
        the pre-tokeniser's regular expression; None is GPT-2's."""
        context = context or default_context()
        self = cls.__new__(cls)
        self._open(create(_abi.psoup_tokenizer, lib.psoup_tokenizer_train, context.handle, texts(corpus),
                          len(corpus), vocab_size, texts(special), len(special), encoded(pattern)), context)
        return self

    def save(self, path: Path) -> None:
        """Writes tokenizer.json at `path`."""
        call(lib.psoup_tokenizer_save, self.handle, encoded(path))

    @property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        return lib.psoup_tokenizer_vocab_size(self.handle)

    def token_id(self, token: str) -> Optional[int]:
        """The id of a token by its exact name, specials included; None where there is none."""
        found = lib.psoup_tokenizer_token_id(self.handle, encoded(token))
        return found if found >= 0 else None

    def token(self, id: int) -> Optional[str]:
        """The name of a token as the file spells it."""
        found = lib.psoup_tokenizer_token(self.handle, id)
        return text(found) if found is not None else None

    def encode(self, string: Union[str, bytes], add_special: bool = False,
               plain_special: bool = False) -> List[int]:
        """Token ids. add_special lets the post-processor add its tokens (<s> ...); plain_special reads
        special tokens in the text as plain text."""
        return self._encode(string, add_special, plain_special, False)[0]

    def encode_with_offsets(self, string: Union[str, bytes], add_special: bool = False,
                            plain_special: bool = False) -> Tuple[List[int], List[Tuple[int, int]]]:
        """Ids, and for each the bytes [begin, end) of the UTF-8 text that it stands for."""
        return self._encode(string, add_special, plain_special, True)

    def _encode(self, string: Union[str, bytes], add_special: bool, plain_special: bool,
                offsets: bool) -> Tuple[List[int], List[Tuple[int, int]]]:
        data = string if isinstance(string, bytes) else string.encode("utf-8", "surrogatepass")
        flags = add_special * _abi.PSOUP_ADD_SPECIAL | plain_special * _abi.PSOUP_PLAIN_SPECIAL
        count, capacity = c_size_t(), len(data) + 8
        while True:  # one id a byte nearly always suffices; the library says how many there are
            found = (c_int32 * capacity)()
            places = (_abi.psoup_offset * capacity)() if offsets else None
            call(lib.psoup_tokenizer_encode, self.handle, data, len(data), flags, found, places, capacity,
                 byref(count))
            n = count.value
            if n <= capacity:
                return found[:n], [(p.begin, p.end) for p in places[:n]] if places is not None else []
            capacity = n

    def decode(self, tokens: Any, skip_special: bool = False) -> str:
        """Text; bytes that are no UTF-8, where the ids cut a character, come out as U+FFFD."""
        return self.decode_bytes(tokens, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, tokens: Any, skip_special: bool = False) -> bytes:
        row = ids(tokens)
        length, capacity = c_size_t(), 16 * row.n + 64
        while True:
            buffer = create_string_buffer(capacity)
            call(lib.psoup_tokenizer_decode, self.handle, row.pointer, row.n, int(skip_special), buffer,
                 capacity, byref(length))
            if length.value <= capacity:
                return buffer.raw[:length.value]
            capacity = length.value

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return "<psoup.Tokenizer%s>" % (" closed" if self.closed else ", %d tokens" % self.vocab_size)
