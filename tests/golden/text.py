"""Golden files for tests/test_text.c, made with Hugging Face's tokenizers.

    pip install tokenizers==0.20.3; apt-get install zstd
    python3 tests/golden/text.py            write tests/golden/text/
    python3 tests/golden/text.py FILE       compare FILE, a tokenizer.json that the library saved after
                                            training on corpus.json, with tokenizers' own training

Every NAME.json is a tokenizer; every line of NAME.jsonl.zst one text: hex of its bytes, then without and
with special tokens the ids, the byte offsets, and the decoded text (hex), with and without skipping
special tokens; "plain" has the ids with special tokens read as text.
"""
import json
import os
import random
import subprocess
import sys

from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "text")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CORPUS = [
    "A personal soup is a weighted sum of policies, one for each thing a reader cares about.",
    "The judge prefers the shorter answer; the reader prefers the friendlier one. It's a matter of taste!",
    "We'll stir 12 bowls, 345 spoons and 6789 grains of salt. They're warm, aren't they?",
    "Suppe, Käse, Größe, naïve café, déjà vu, ångström, señor, žlutý kůň, İstanbul.",
    "Слова и буквы складываются в суп. Буквы варятся, слова остывают.",
    "汤 是 热 的。 日本語のスープは温かいです。 한국어 수프도 맛있어요.",
    "שלום עולם، مرحبا بالعالم، नमस्ते दुनिया, สวัสดีชาวโลก",
    "def soup(weights):\n    return sum(w * p for w, p in zip(weights, policies))\n\n\tprint(soup([0.5, 0.5]))",
    "emoji 😀 👍🏽 👨‍👩‍👧‍👦 ❤️ 🇨🇭 and arrows → ← ↔, maths ∑∫√≤≥, money €£¥.",
    "soup soups souper soupy soup-like the the the and and and of of of to to to in in in",
    "warm warmer warmest cook cooked cooking cooks taste tasted tasting tastes",
]

TEXTS = [
    b"", b" ", b"  ", b"   a", b"a", b"soup", b" soup", b"The soup is warm.", b"  leading and trailing  ",
    b"a  b   c    d     e", b"tabs\tand\t\ttabs \t x", b"line\nline\r\nline\n\n\nline\r\rline", b"\n", b"\r\n\r\n",
    b" \n \n  x", b"end of line   \n", b"\x00\x01\x02\x1b[0m\x7f\x08", b"\xc2\x80\xc2\x85\xc2\xa0x\xc2\xad",
    "it's we'll they're I'M HE'S don't I'd've 'tis 'S ’s".encode(), b"'s't're've'm'll'd",
    b"1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F", "१२३ ٣٤٥ ½ ² Ⅷ ①②③ 𝟘𝟙".encode(),
    "café cafe\u0301 e\u0301\u0323 \u0323\u0301 a\u0300\u0316\u0301 \u1e9b\u0323 \u212b \u2126 ﬁ".encode(),
    "각 가\u11a8 \u1100\u1161\u11a8 \u1100\u1161 한국어".encode(), "\u0958 \u0344 \u0f73 \u2adc \U0001d15e".encode(),
    "😀👍🏽👨‍👩‍👧‍👦❤️🇨🇭 x👨‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿".encode(), "汤是热的。日本語のスープ、한국어 수프".encode(),
    "שָׁלוֹם עולם مَرْحَبًا بالعالم \u200f\u200e\u202eabc\u202c".encode(), "नमस्ते สวัสดี ကမ္ဘာ".encode(),
    "\u2028\u2029\u00a0\u1680\u180e\u2003\u202f\u205f\u3000\ufeff x\u180ey".encode(), "ａｂｃ ＡＢＣ　全角".encode(),
    "Ünïcödé ÅÄÖ straße İi ıI ſs Ǆ".encode(), "ĠĊ Ġsoup Ċ ▁ ▁▁soup x▁y ÄÅ".encode(), "\ufffd \U0010ffff \ue000 \u0378".encode(),
    b"\xff", b"\xfe\xff soup", b"a\xc3", b"a\xe2\x82", b"a\xe2\x82b", b"\xf0\x9f\x98", b"\xf0\x9f\x98x\xf0\x9f",
    b"\xed\xa0\x80\xed\xb0\x80", b"\xc0\xaf\xe0\x80\x80\xf0\x80\x80\x80", b"\xf4\x90\x80\x80\xf5\x80", b"\x80\x81soup\xbf soup",
    b"<s>", b"</s>", b"<s>soup</s>", b" <s> soup </s> ", b"<s><s></s></s>", b"<s", b"<s>\n<pad> x<pad>y", b"a<sep>b <sep> c",
    b"soup<mask>soup   <mask>   soup <mask>", b"<mask><mask>", b"wordsouper soupers souper Souper souper.", b"<left>  <left>x  <right>  y<right>",
    "é<s>é <s> é".encode(), "<s>\u0301x".encode(), b"<s>\xff<s>", b"AddNorm addnorm x AddNorm  AddNormal", "Zé\u0301 Ze\u0301 Zé".encode(),
    b"a" * 300, b"ab" * 200, b"soupsoup" * 60, b" " * 200 + b"x", b"\n" * 50 + b" " * 50, "é".encode() * 100, "汤".encode() * 60,
    b"<0x41><0x0A> <0xFF>", b"x = {'a': [1, 2], \"b\": None}  # comment", b"https://example.com/a?b=c&d=%20#e", b"!!! ??? ... --- ___ ***",
    b"\xe2\x96\x81\xe2\x96\x81 \xe2\x96\x81", b" a b ", b"\ta ", b"UPPER lower MiXeD CamelCase snake_case kebab-case",
]


def fuzz(n):
    r = random.Random(20240607)
    parts = [t for t in TEXTS if 0 < len(t) < 60] + [c.encode() for c in " \t\n'sé汤😀\u0301▁"] + [bytes([b]) for b in range(0, 256, 7)]
    return [b"".join(r.choice(parts) for _ in range(r.randint(2, 6))) for _ in range(n)]


def decode_errors(data):
    """Text of bytes with errors="replace", and for every character where its bytes are."""
    text, places, i = "", [], 0
    while i < len(data):
        for k in (1, 2, 3, 4):
            try:
                c = data[i:i + k].decode()
                break
            except UnicodeDecodeError as e:
                c, bad = None, e.end
        if c is None:  # the first maximal ill-formed part
            try:
                data[i:].decode()
            except UnicodeDecodeError as e:
                k, c = e.end, "\ufffd"
        text += c
        places.append((i, i + k))
        i += k
    assert text == data.decode(errors="replace"), data
    return text, places


def record(tok, data):
    text, places = decode_errors(data)

    def one(special):
        e = tok.encode(text, add_special_tokens=special)
        off = []
        for b, t in e.offsets:
            begin = places[b][0] if b < len(places) else len(data)
            off.append([begin, places[t - 1][1] if t > b else begin])
        for i, m in enumerate(e.special_tokens_mask):
            if m and e.offsets[i] == (0, 0):
                off[i] = [0, 0]
        return {"ids": e.ids, "off": off, "dec": tok.decode(e.ids, skip_special_tokens=False).encode().hex(),
                "skip": tok.decode(e.ids, skip_special_tokens=True).encode().hex()}

    row = {"text": data.hex(), "bare": one(False), "with": one(True)}
    if row["with"] == row["bare"]:
        del row["with"]
    tok.encode_special_tokens = True
    plain = tok.encode(text, add_special_tokens=False).ids
    tok.encode_special_tokens = False
    if plain != row["bare"]["ids"]:
        row["plain"] = plain
    return row


SPECIALS = ["<s>", "</s>", "<pad>"]
ADDED = [AddedToken("<sep>", normalized=False), AddedToken("<mask>", lstrip=True, special=True),
         AddedToken("souper", single_word=True), AddedToken("<left>", lstrip=True, normalized=False),
         AddedToken("<right>", rstrip=True, normalized=False), AddedToken("AddNorm", normalized=True),
         AddedToken("Zé", normalized=True)]


def byte_level(pre, size, specials=SPECIALS, normalizer=None, post=None, ignore=False):
    tok = Tokenizer(models.BPE(ignore_merges=ignore))
    if normalizer:
        tok.normalizer = normalizer
    tok.pre_tokenizer = pre
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=size, min_frequency=0, show_progress=False, special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.decoder = decoders.ByteLevel()
    if post:
        tok.post_processor = post
    tok.add_tokens(ADDED)
    return tok


def around(tok, single="<s> $A </s>"):
    names = [p for p in single.split() if p != "$A"]
    return processors.TemplateProcessing(single=single, special_tokens=[(p, tok.token_to_id(p)) for p in names])


def sentencepiece(normalizer, pre, decoder, fallback=True, fuse=True, bytes_to=256):
    """Trained on text with ▁ for spaces, then given the bytes."""
    train = Tokenizer(models.BPE(unk_token="<unk>"))
    train.pre_tokenizer = pre_tokenizers.Metaspace()
    train.train_from_iterator(CORPUS[:5], trainers.BpeTrainer(vocab_size=260, show_progress=False,
                                                              special_tokens=["<unk>", "<s>", "</s>"]))
    model = json.loads(train.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    if fallback:
        for b in range(bytes_to):
            vocab["<0x%02X>" % b] = len(vocab)
    for t in model["vocab"]:
        vocab.setdefault(t, len(vocab))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]],
                               unk_token="<unk>", fuse_unk=fuse, byte_fallback=fallback))
    if normalizer:
        tok.normalizer = normalizer
    if pre:
        tok.pre_tokenizer = pre
    if decoder:
        tok.decoder = decoder
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tok.add_tokens(ADDED)
    tok.post_processor = around(tok, "<s> $A")
    return tok


def tokenizers():
    B, P, N, D = pre_tokenizers.ByteLevel, pre_tokenizers, normalizers, decoders
    yield "gpt2", byte_level(B(add_prefix_space=False), 500, post=processors.ByteLevel(trim_offsets=False))
    yield "gpt2_prefix", byte_level(B(add_prefix_space=True), 330, post=processors.ByteLevel(trim_offsets=True, add_prefix_space=True))
    tok = byte_level(P.Sequence([P.Split(Regex(LLAMA3), "isolated"), B(add_prefix_space=False, use_regex=False)]), 500, ignore=True)
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True, add_prefix_space=False), around(tok)])
    yield "llama3", tok
    yield "qwen2", byte_level(P.Sequence([P.Split(Regex(QWEN2), "isolated"), B(add_prefix_space=False, use_regex=False)]), 400, normalizer=N.NFC())
    llama = D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse(), D.Strip(" ", 1, 0)])
    yield "llama2", sentencepiece(N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None, llama)
    yield "metaspace_always", sentencepiece(None, P.Metaspace(prepend_scheme="always"), D.Metaspace(prepend_scheme="always"))
    yield "metaspace_first", sentencepiece(None, P.Metaspace(prepend_scheme="first", split=False), D.Sequence([D.ByteFallback(), D.Metaspace(prepend_scheme="first")]), fallback=False)
    yield "metaspace_never", sentencepiece(N.Sequence([N.NFD(), N.Strip(left=True, right=True), N.Replace(Regex(r"[\u200b-\u200f]|\s{2,}"), " ")]),
                                           P.Metaspace(prepend_scheme="never"), None, fallback=False, fuse=False)
    for name, split in {"removed": P.Split(" ", "removed"), "previous": P.Split(Regex(r"[\s\p{P}]"), "merged_with_previous"),
                        "next": P.Split(Regex(r"[\s\p{P}]"), "merged_with_next"), "contiguous": P.Split(Regex(r"\w|\S"), "contiguous"),
                        "invert": P.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True),
                        "digits": P.Digits(individual_digits=True), "runs": P.Digits(individual_digits=False),
                        "whitespace": P.Whitespace(), "whitespace_split": P.WhitespaceSplit()}.items():
        tok = byte_level(P.Sequence([split, B(add_prefix_space=False, use_regex=name == "runs")]), 290)
        tok.decoder = D.Sequence([D.ByteLevel(), D.Replace(Regex("[ao]+"), "_")]) if name == "removed" else D.ByteLevel()
        yield "split_" + name, tok


def slim(tok, text):
    """Merges as "a b" where that is possible, so that both spellings are tested."""
    root = json.loads(text)
    if tok in ("gpt2", "llama3"):
        root["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in root["model"]["merges"]]
    return json.dumps(root, ensure_ascii=False, separators=(",", ":"))


def check(path):
    ours = Tokenizer.from_file(path)
    theirs = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), 700)
    a, b = json.load(open(path))["model"], json.loads(theirs.to_str())["model"]
    assert [list(m) for m in a["merges"]] == [m.split(" ") if isinstance(m, str) else m for m in b["merges"]], "merges differ"
    for data in TEXTS + fuzz(300):
        text = data.decode(errors="replace")
        x = [t for t in ours.encode(text).tokens]
        bare = byte_level.__globals__["strip_added"](theirs).encode(text).tokens
        assert x == bare, (text, x, bare)
    print("same merges (%d), same tokens" % len(a["merges"]))


def strip_added(tok, cache={}):
    if "t" not in cache:
        root = json.loads(tok.to_str())
        root["added_tokens"] = [t for t in root["added_tokens"] if t["content"] in SPECIALS]
        cache["t"] = Tokenizer.from_str(json.dumps(root))
    return cache["t"]


def main():
    os.makedirs(HERE, exist_ok=True)
    json.dump(CORPUS, open(os.path.join(HERE, "corpus.json"), "w"), ensure_ascii=False, indent=0)
    merges = json.loads(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), 700).to_str())["model"]["merges"]
    json.dump([m if isinstance(m, str) else " ".join(m) for m in merges], open(os.path.join(HERE, "merges.json"), "w"), ensure_ascii=False, separators=(",", ":"))
    for name, tok in tokenizers():
        with open(os.path.join(HERE, name + ".json"), "w") as f:
            f.write(slim(name, tok.to_str()))
        tok = Tokenizer.from_file(os.path.join(HERE, name + ".json"))
        texts = TEXTS + fuzz(20 if name.startswith("split") else 100)
        with open(os.path.join(HERE, name + ".jsonl"), "w") as f:
            for data in texts:
                f.write(json.dumps(record(tok, data), separators=(",", ":")) + "\n")
        subprocess.run(["zstd", "-19", "-q", "-f", "--rm", f.name], check=True)


if __name__ == "__main__":
    check(sys.argv[1]) if len(sys.argv) > 1 else main()
