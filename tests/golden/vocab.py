"""Builds tokenizer.json files of the real vocabularies in ../shared/data/vocab (tensor-less GGUF files of
llama.cpp) under build/vocab, with their texts and expected tokens; tests/test_text.c reads them if there.

    pip install gguf tokenizers==0.20.3
    python3 tests/golden/vocab.py [directory of the .gguf files]
"""
import json
import os
import sys

from gguf import GGUFReader
from tokenizers import Tokenizer

SOURCE = sys.argv[1] if len(sys.argv) > 1 else "../shared/data/vocab"
OUT = "build/vocab"


def field(reader, name):
    f = reader.fields.get(name)
    if f is None:
        return None
    values = [f.parts[i] for i in f.data]
    if f.types[-1].name == "STRING":
        return [bytes(v).decode() for v in values]
    return [v[0].item() for v in values]


def gpt2(reader):
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    added = [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, t in enumerate(tokens) if types[i] == 3]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": {
        "type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": field(reader, "tokenizer.ggml.merges")}}


def spm(reader):
    """SentencePiece merges the pair whose joined piece has the best score, so merges are ranked by it."""
    tokens, scores = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.scores")
    vocab, merges = {t: i for i, t in enumerate(tokens)}, []
    for t, i in vocab.items():
        for k in range(1, len(t)):
            if t[:k] in vocab and t[k:] in vocab and i > 258:
                merges.append((-scores[i], vocab[t[:k]], vocab[t[k:]], [t[:k], t[k:]]))
    added = [{"id": i, "content": tokens[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i in range(3)]
    return {"added_tokens": added, "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                  "merges": [m[3] for m in sorted(merges, key=lambda m: m[:3])]}}


os.makedirs(OUT, exist_ok=True)
for name, make in (("gpt-2", gpt2), ("llama-spm", spm)):
    path = os.path.join(SOURCE, "ggml-vocab-%s.gguf" % name)
    root = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None}
    root.update(make(GGUFReader(path)))
    with open(os.path.join(OUT, name + ".json"), "w") as f:
        json.dump(root, f, ensure_ascii=False)
    texts = open(path + ".inp", encoding="utf-8", newline="").read().split("\n__ggml_vocab_test__\n")
    expected = [[int(x) for x in line.split()] for line in open(path + ".out").read().split("\n")[:len(texts)]]
    tok, same = Tokenizer.from_file(os.path.join(OUT, name + ".json")), 0
    with open(os.path.join(OUT, name + ".jsonl"), "w") as f:
        for text, ids in zip(texts, expected):
            same += tok.encode(text).ids == ids
            f.write(json.dumps({"text": text.encode().hex(), "ids": ids, "decoded": tok.decode(ids, skip_special_tokens=False).encode().hex()}) + "\n")
    print("%s: %d texts, tokenizers agrees on %d" % (name, len(texts), same))
