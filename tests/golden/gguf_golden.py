"""Golden files for tests/test_gguf*.c, written by llama.cpp's own converters, and the check that what
libpsoup writes loads in llama.cpp and transformers with equal logits.

    pip install torch==2.5.1 transformers==4.46.3 peft==0.13.2 sentencepiece protobuf safetensors gguf
    pip download --no-binary :all: --no-deps llama-cpp-python     (its vendor/llama.cpp is what is meant)
    python tests/golden/gguf_golden.py --llama-cpp DIR    writes tests/golden/gguf/
    python tests/golden/gguf_golden.py --check DIR        checks what test_gguf and test_gguf_files wrote
        with PSOUP_TEST_KEEP=DIR; LLAMA_PYTHON names a python that has llama-cpp-python 0.3.36
    python tests/golden/gguf_golden.py --program bin/psoup    the same of what `psoup merge` writes
    python tests/golden/gguf_golden.py --vocabularies LLAMA_CPP bin/psoup    published vocabularies, both ways
"""
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)

ROOT = os.path.dirname(os.path.abspath(__file__))
HERE = os.path.join(ROOT, "gguf")
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
TEXTS = ["It's the soup's turn: 12345 spoons, 3.14 bowls!", "  two spaces,\ttabs\n\nand lines ",
         "naïve Zé \U0001f372 スープ", "DON'T we'll <s>x</s>[INST]", "a", ""]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
PRE = {"llama3": "llama-bpe", "qwen2": "qwen2", "gpt2": "gpt-2"}


def corpus():
    return json.load(open(os.path.join(ROOT, "text", "corpus.json"), encoding="utf-8"))


def sentencepiece_tokenizer(directory):
    import sentencepiece
    words = corpus()
    lines = words if isinstance(words, list) else list(words.values())
    lines = [str(line).encode("ascii", "ignore").decode() for line in lines]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_writer=model, model_type="bpe", vocab_size=520,
        byte_fallback=True, character_coverage=0.98, add_dummy_prefix=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, hard_vocab_limit=False)
    with tempfile.TemporaryDirectory() as work:
        open(os.path.join(work, "tokenizer.model"), "wb").write(model.getvalue())
        tokenizer = LlamaTokenizerFast(os.path.join(work, "tokenizer.model"), add_prefix_space=True)
        tokenizer.chat_template = TEMPLATE
        tokenizer.add_tokens(["[INST]"])
        tokenizer.save_pretrained(directory)
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json"):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            os.remove(path)
    open(os.path.join(directory, "spm.model"), "wb").write(model.getvalue())
    return len(tokenizer)


def byte_level_tokenizer(directory, name):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(ROOT, "text", name + ".json"),
                                        bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    os.remove(os.path.join(directory, "special_tokens_map.json"))
    return len(tokenizer)


def write_model(name, make, tokenizer, dtype, outtypes, llama_cpp):
    directory = os.path.join(HERE, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    vocab = tokenizer(directory)
    torch.manual_seed(len(name))
    model = make(vocab + 3)  # an embedding is often larger than the vocabulary
    for parameter in model.parameters():  # gains and biases that are not all 1 and 0
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(directory)
    os.remove(os.path.join(directory, "generation_config.json"))
    spm = os.path.join(directory, "spm.model")
    for outtype in outtypes:
        if os.path.exists(spm):  # as the original publishes it: the converter then has the true scores
            shutil.copy(spm, os.path.join(directory, "tokenizer.model"))
        convert(llama_cpp, "convert_hf_to_gguf.py", name, "--outtype", outtype, "--outfile",
                os.path.join(HERE, f"{name}-{outtype}.gguf"), directory)
        if os.path.exists(spm):
            os.remove(os.path.join(directory, "tokenizer.model"))
    if os.path.exists(spm):
        os.remove(spm)
    return directory


def convert(llama_cpp, script, name, *arguments):
    """Runs a converter in this process; tokenizers this small are in no table of known hashes."""
    sys.path.insert(0, llama_cpp)
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE[name]
    argv = sys.argv
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(os.path.join(llama_cpp, script), run_name="__main__")
    finally:
        sys.argv = argv


def write_adapter(name, base, llama_cpp, **settings):
    directory = os.path.join(HERE, "adapter_" + name)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=True, **settings))
    for key, parameter in peft.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(directory)
    os.remove(os.path.join(directory, "README.md"))
    path = os.path.join(directory, "adapter_config.json")
    config = json.load(open(path))
    config["base_model_name_or_path"] = ""
    json.dump(config, open(path, "w"), indent=2, sort_keys=True)
    convert(llama_cpp, "convert_lora_to_gguf.py", name, "--outtype", "f32", "--base", base, "--outfile",
            directory + ".gguf", directory)


def main(llama_cpp):
    os.makedirs(HERE, exist_ok=True)
    llama = write_model("llama", lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **SMALL)),
                        sentencepiece_tokenizer, torch.bfloat16, ["bf16", "q8_0"], llama_cpp)
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64)
    write_model("llama3", lambda n: LlamaForCausalLM(LlamaConfig(
        vocab_size=n, **SMALL, rope_scaling=rope, rope_theta=500000.0, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, attention_bias=True)),
        lambda d: byte_level_tokenizer(d, "llama3"), torch.float16, ["f16"], llama_cpp)
    write_model("qwen2", lambda n: Qwen2ForCausalLM(Qwen2Config(
        vocab_size=n, **{**SMALL, "num_hidden_layers": 1}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1)),
        lambda d: byte_level_tokenizer(d, "qwen2"), torch.float32, ["f32"], llama_cpp)
    write_adapter("llama", llama, llama_cpp, r=4, lora_alpha=6,
                  target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                  "down_proj"])
    write_adapter("qwen2", os.path.join(HERE, "qwen2"), llama_cpp, r=2, lora_alpha=8,
                  target_modules=["q_proj", "v_proj"])
    write_rslora(llama)
    write_seeds()


def write_seeds():
    """Small files with vocabularies and no weights, for the fuzzer to start from."""
    from gguf import GGUFWriter
    for kind in ("llama", "gpt2"):
        writer = GGUFWriter(os.path.join(HERE, f"seed-{kind}.gguf"), "llama")
        writer.add_vocab_size(12)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_context_length(32)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre("default" if kind == "llama" else "llama-bpe")
        writer.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "aba", "abab", "\u2581", "é", ""])
        writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 4, 5])
        if kind == "llama":
            writer.add_token_scores([float(-i) for i in range(12)])
        else:
            writer.add_token_merges(["a b", "ab a", "ab ab"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ x }}")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def write_rslora(base):
    """Scales that llama.cpp cannot say: rsLoRA, patterns of alpha and rank. No golden by llama.cpp's
    converter, which leaves them out."""
    directory = os.path.join(HERE, "adapter_rslora")
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=True, rank_pattern={"k_proj": 2},
        alpha_pattern={"v_proj": 3}, target_modules=["q_proj", "k_proj", "v_proj"]))
    for key, parameter in peft.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(directory)
    os.remove(os.path.join(directory, "README.md"))
    path = os.path.join(directory, "adapter_config.json")
    config = json.load(open(path))
    config["base_model_name_or_path"] = ""
    json.dump(config, open(path, "w"), indent=2, sort_keys=True)


# ---- what libpsoup wrote, in llama.cpp and transformers ----------------------------------------------

LLAMA = """
import json, sys
import numpy as np
from llama_cpp import Llama
import llama_cpp.llama_cpp as lib
defaults = lib.llama_model_default_params
def plain_buffers():
    params = defaults()
    params.use_extra_bufts = False  # AMX's are not to be had in every container that has the processor
    return params
lib.llama_model_default_params = plain_buffers
model, adapter, tokens, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
llama = Llama(model, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1,
              flash_attn=False, **({"lora_path": adapter} if adapter else {}))
llama.eval(tokens)
cut = [llama.tokenize(t.encode(), add_bos=bool(lib.llama_vocab_get_add_bos(llama._model.vocab)), special=True)
       for t in texts]
json.dump({"logits": np.array(llama.scores[:len(tokens)]).tolist(), "tokens": cut}, sys.stdout)
"""


def llama_cpp(model, tokens, adapter="", texts=()):
    out = subprocess.run([os.environ["LLAMA_PYTHON"], "-c", LLAMA, model, adapter, json.dumps(tokens),
                          json.dumps(list(texts))], check=True, capture_output=True, text=True)
    answer = json.loads(out.stdout)
    return torch.tensor(answer["logits"]), answer["tokens"]


def largest(a, b):
    return (a - b).abs().max().item()


def check(directory):
    tokens = [1, 5, 42, 17, 9, 200, 33, 77, 3, 250]
    worst = 0
    with torch.inference_mode():
        for name, file in (("llama", "llama-bf16"), ("llama3", "llama3-f16"), ("qwen2", "qwen2-f32")):
            base = AutoModelForCausalLM.from_pretrained(os.path.join(HERE, name), torch_dtype=torch.float32)
            want = base(torch.tensor([tokens])).logits[0]
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(HERE, name, "tokenizer.json"))
            again = AutoTokenizer.from_pretrained(os.path.join(directory, "hf_" + name))
            texts = [t for t in TEXTS if t]
            if again.chat_template != TEMPLATE:
                sys.exit(f"{name}: another chat template")
            for t in texts:
                if tokenizer(t)["input_ids"] != again(t)["input_ids"]:
                    sys.exit(f"{name}: {t!r} is cut otherwise by the tokenizer made of the GGUF file")
            got, cut = llama_cpp(os.path.join(directory, f"f32-{file}.gguf"), tokens, "", texts)
            theirs, _ = llama_cpp(os.path.join(HERE, file + ".gguf"), tokens)
            ours, _ = llama_cpp(os.path.join(directory, file + ".gguf"), tokens)
            for t, ids in zip(texts, cut):
                if ids != tokenizer(t)["input_ids"]:
                    sys.exit(f"{name}: {t!r} is cut otherwise by llama.cpp: {ids}, {tokenizer(t)['input_ids']}")
            print(f"{name}: logits up to {want.abs().max():.2f}; llama.cpp with our f32 file against transformers: "
                  f"{largest(got, want):.2e}; with our {file} against the converter's: {largest(ours, theirs):.2e}")
            worst = max(worst, largest(got, want))
            if largest(ours, theirs) != 0:
                sys.exit(f"{name}: our file and the converter's give other logits")
            for adapter in ("llama", "rslora") if name == "llama" else (name,) if name == "qwen2" else ():
                peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
                    os.path.join(HERE, name), torch_dtype=torch.float32), os.path.join(HERE, "adapter_" + adapter))
                expected = peft(torch.tensor([tokens])).logits[0]
                got, _ = llama_cpp(os.path.join(directory, f"f32-{file}.gguf"), tokens,
                                   os.path.join(directory, f"adapter_{adapter}.gguf"))
                print(f"  adapter_{adapter}: moves logits by {largest(expected, want):.2f}; llama.cpp against PEFT: "
                      f"{largest(got, expected):.2e}")
                worst = max(worst, largest(got, expected))
    q8, _ = llama_cpp(os.path.join(directory, "llama-q8_0.gguf"), tokens)
    if largest(q8, llama_cpp(os.path.join(HERE, "llama-q8_0.gguf"), tokens)[0]) != 0:
        sys.exit("our q8_0 file and the converter's give other logits")
    from gguf import GGUFReader
    ours = {t.name: bytes(t.data) for t in GGUFReader(os.path.join(directory, "llama-q8_0.gguf")).tensors}
    theirs = {t.name: bytes(t.data) for t in GGUFReader(os.path.join(HERE, "llama-q8_0.gguf")).tensors}
    if ours != theirs:
        sys.exit("our q8_0 file and the converter's differ")
    print(f"llama q8_0: {len(ours)} tensors, the same bytes and logits as the converter's")
    if worst > 1e-5:
        sys.exit("too far apart")
    print("all as it should be")


def check_program(psoup):
    """Conversions and merges by the program, in llama.cpp and transformers."""
    tokens = [1, 5, 42, 17, 9, 200, 33, 77, 3, 250]
    llama, gguf = os.path.join(HERE, "llama"), os.path.join(HERE, "llama-bf16.gguf")

    def logits(directory, adapter=None):
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter)
            return model(torch.tensor([tokens])).logits[0]

    with tempfile.TemporaryDirectory() as work:
        def merge(out, *arguments):
            path = os.path.join(work, out)
            subprocess.run([psoup, "merge", "--out", path, *arguments], check=True, capture_output=True)
            return path

        plain, rslora = os.path.join(HERE, "adapter_llama"), os.path.join(HERE, "adapter_rslora")
        want = {name: logits(llama, path) for name, path in (("plain", plain), ("rslora", rslora))}
        base = merge("base.gguf", "--dtype", "f32", llama + "=1")
        results = {
            "base.gguf + adapter.gguf folded into one.gguf, llama.cpp against PEFT":
                (llama_cpp(merge("folded.gguf", "--base", gguf, "--dtype", "f32", plain + ".gguf=1"), tokens)[0],
                 want["plain"]),
            "PEFT to adapter.gguf, rsLoRA and patterns, llama.cpp against PEFT":
                (llama_cpp(base, tokens, merge("adapter.gguf", "--reference", llama, rslora + "=1"))[0],
                 want["rslora"]),
            "adapter.gguf to PEFT, against the PEFT it was made of":
                (logits(llama, merge("peft", "--reference", llama, plain + ".gguf=1")), want["plain"]),
            "model.gguf to a directory, transformers against the directory it was made of":
                (logits(merge("hf", gguf + "=1")), logits(llama)),
            "half of two adapters, one PEFT, one GGUF, as adapter.gguf in llama.cpp against PEFT":
                (llama_cpp(base, tokens, merge("soup.gguf", "--reference", llama, rslora + "=0.5",
                                               plain + ".gguf=0.5"))[0],
                 logits(llama, merge("soup", "--reference", llama, rslora + "=0.5", plain + "=0.5"))),
        }
        for name, (got, expected) in results.items():
            print(f"{name}: {largest(got, expected):.2e}")
            if largest(got, expected) > 1e-5:
                sys.exit("too far apart")
        AutoTokenizer.from_pretrained(os.path.join(work, "hf"))
        for rope in ROPES:
            check_rope(merge, work, rope)
    print("all as it should be")


ROPES = (None, dict(rope_type="linear", factor=2.0),
         dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32),
         dict(rope_type="yarn", factor=4.0),  # 4.46 takes max_position_embeddings for the original length
         dict(rope_type="yarn", factor=4.0, beta_fast=24.0, beta_slow=2.0,
              attention_factor=1.25))


def check_rope(merge, work, rope):
    """A rotation over 60 positions, with heads larger than hidden_size / heads, biases and another theta."""
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=524, **{**SMALL, "max_position_embeddings": 64}, head_dim=16,
                         rope_theta=50000.0, rope_scaling=rope, attention_bias=True, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    directory = os.path.join(work, "rope")
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(HERE, "llama", name), directory)
    tokens = [(i * 37 + 5) % 524 for i in range(60)]
    with torch.inference_mode():
        want = model(torch.tensor([tokens])).logits[0]
    got, _ = llama_cpp(merge("rope.gguf", directory + "=1"), tokens)
    print(f"rope_scaling {rope}: {largest(got, want):.2e} of {want.abs().max():.1f}")
    if largest(got, want) > 1e-5 * want.abs().max():
        sys.exit("too far apart")


VOCAB_ONLY = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
json.dump([llama.tokenize(t.encode(), add_bos=False, special=False) for t in json.load(sys.stdin)], sys.stdout)
"""
VOCABULARIES = ("llama-spm", "llama-bpe", "qwen2", "gpt-2", "starcoder", "refact", "phi-3")


def check_vocabularies(llama_cpp_tree, psoup):
    """llama.cpp's tree has the vocabularies of published models, with texts and the ids that their own
    tokenizers give: GGUF to tokenizer.json to GGUF by the program."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from tokenizers import Tokenizer
    for name in VOCABULARIES:
        path = os.path.join(llama_cpp_tree, "models", f"ggml-vocab-{name}.gguf")
        fields = GGUFReader(path).fields
        texts = open(path + ".inp", encoding="utf-8", newline="").read().split("\n__ggml_vocab_test__\n")
        ids = [[int(i) for i in line.split()] for line in open(path + ".out")][:len(texts)]
        with tempfile.TemporaryDirectory() as work:
            model, back = os.path.join(work, "model.gguf"), os.path.join(work, "back.gguf")
            hf = os.path.join(work, "hf")
            writer = GGUFWriter(model, "llama")  # the vocabulary with the least of models around it
            for key, field in fields.items():
                if key.startswith("tokenizer."):
                    sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                    writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
            vocab = len(fields["tokenizer.ggml.tokens"].contents())
            for add, value in ((writer.add_vocab_size, vocab), (writer.add_context_length, 64),
                               (writer.add_embedding_length, 2), (writer.add_feed_forward_length, 2),
                               (writer.add_block_count, 1), (writer.add_head_count, 1),
                               (writer.add_head_count_kv, 1), (writer.add_layer_norm_rms_eps, 1e-5)):
                add(value)
            for tensor, shape in (("token_embd", (vocab, 2)), ("output_norm", (2,)), ("blk.0.attn_norm", (2,)),
                                  ("blk.0.ffn_norm", (2,)), *((f"blk.0.{m}", (2, 2)) for m in (
                                      "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                                      "ffn_down"))):
                writer.add_tensor(tensor + ".weight", np.zeros(shape, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            for out, source in ((hf, model), (back, hf)):
                subprocess.run([psoup, "merge", "--out", out, source + "=1"], check=True, capture_output=True)
            tokenizer = Tokenizer.from_file(os.path.join(hf, "tokenizer.json"))
            cut = subprocess.run(
                [os.environ["LLAMA_PYTHON"], "-c", VOCAB_ONLY, back], input=json.dumps(texts), check=True,
                capture_output=True, text=True)
            there = sum(tokenizer.encode(t, add_special_tokens=False).ids != i for t, i in zip(texts, ids))
            again = sum(got != i for got, i in zip(json.loads(cut.stdout), ids))
            print(f"{name}: {vocab} tokens, {len(texts)} texts; cut otherwise by tokenizer.json {there}, by our "
                  f"GGUF of it in llama.cpp {again}")
            if there + again > 0:
                sys.exit("not as the model's own tokenizer")
    print("all as it should be")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--llama-cpp":
        main(os.path.abspath(sys.argv[2]))
    elif len(sys.argv) == 3 and sys.argv[1] == "--check":
        check(sys.argv[2])
    elif len(sys.argv) == 3 and sys.argv[1] == "--program":
        check_program(os.path.abspath(sys.argv[2]))
    elif len(sys.argv) == 4 and sys.argv[1] == "--vocabularies":
        check_vocabularies(sys.argv[2], os.path.abspath(sys.argv[3]))
    else:
        sys.exit(__doc__)
