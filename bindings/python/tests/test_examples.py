"""The example for vLLM: what it writes, and what it asks a server, here a stand-in for it."""

import http.server
import json
import os
import subprocess
import sys
import threading
import unittest

from .case import ROOT, Case, psoup, tiny

SCRIPT = os.path.join(ROOT, "examples", "embed_vllm.py")
try:
    import peft
    import transformers
except ImportError:
    peft = None


class StandIn(http.server.BaseHTTPRequestHandler):
    """vLLM's two endpoints, as strict about names as it is."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        loaded, name = self.server.loaded, body["lora_name"]
        status, words = 200, "Success"
        if self.path == "/v1/load_lora_adapter":
            if name in loaded:
                status, words = 400, "already loaded"
            elif not os.path.exists(os.path.join(body["lora_path"], "adapter_model.safetensors")):
                status, words = 404, "no adapter at %s" % body["lora_path"]
            else:
                loaded[name] = body["lora_path"]
        elif self.path == "/v1/unload_lora_adapter":
            if loaded.pop(name, None) is None:
                status, words = 404, "no such adapter"
        else:
            status, words = 404, "no such page"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(words.encode())

    def log_message(self, *_):
        pass


class Vllm(Case):
    def setUp(self):
        super().setUp()
        self.model = tiny()
        for name in ("A", "B"):
            self.model.save_adapter(name, self.path(name))

    def run_script(self, *arguments):
        path = os.path.dirname(os.path.dirname(os.path.abspath(psoup.__file__)))
        return subprocess.run([sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=dict(os.environ, PYTHONPATH=path), cwd=self.work)

    def soup(self, done):
        """Where the script says that it wrote."""
        self.assertEqual((done.returncode, done.stderr.decode()), (0, ""))
        return self.path(done.stdout.decode().split(":")[0])

    def test_the_soup_is_exact_or_of_the_servers_rank(self):
        for rank, exact in ((2, False), (16, True)):
            done = self.run_script("--out", "ann", "--name", "ann", "--rank", str(rank), "A=0.25", "B=0.75")
            soup = self.soup(done)
            self.assertEqual("off by" not in done.stdout.decode(), exact)
            config = psoup.read_json(os.path.join(soup, "adapter_config.json"))
            self.assertLessEqual(config["r"], rank)
            self.assertEqual((config["bias"], config.get("rank_pattern") or {}, config.get("modules_to_save")),
                             ("none", {}, None))
        self.model.load_adapter("soup", soup)
        row = [[2, 3, 4, 5]]
        self.assertNear(self.model.logprobs(row, {"soup": 1})[0],
                        self.model.logprobs(row, {"A": 0.25, "B": 0.75})[0], 1e-5)

    def test_the_server_is_asked_to_load_it_in_place_of_the_last(self):
        server = http.server.HTTPServer(("127.0.0.1", 0), StandIn)
        server.asked, server.loaded = [], {}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = "http://127.0.0.1:%d" % server.server_port
            soups = []
            for weights in (("A=0.5", "B=0.5"), ("A=1", "B=0"), ("A=0.5", "B=0.5")):
                soups.append(self.soup(self.run_script("--out", "ann", "--name", "ann", "--server", url, *weights)))
                self.assertEqual({k: os.path.realpath(v) for k, v in server.loaded.items()},
                                 {"ann": os.path.realpath(soups[-1])})
            self.assertNotEqual(soups[0], soups[1])  # another soup, another path: vLLM's prefix cache goes by it
            self.assertEqual(soups[0], soups[2])
            self.assertEqual(sorted(os.listdir(self.path("ann"))), sorted(map(os.path.basename, soups[:2])))
            self.assertEqual([path for path, _ in server.asked],
                             ["/v1/unload_lora_adapter", "/v1/load_lora_adapter"] * 3)
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
        done = self.run_script("--out", "soup", "--name", "ann", "--server", url, "A=1")
        self.assertEqual(done.returncode, 1)
        self.assertIn("refused", done.stderr.decode())

    def test_errors_are_one_line(self):
        done = self.run_script("--out", "soup", "--name", "ann", "nowhere=1")
        self.assertEqual((done.returncode, len(done.stderr.decode().strip().splitlines())), (1, 1))

    @unittest.skipIf(peft is None, "peft is not there")
    def test_peft_loads_it_with_the_same_logits(self):
        import torch
        self.model.save(self.path("base"))
        written = self.soup(self.run_script("--out", "ann", "--name", "ann", "A=0.25", "B=0.75"))
        base = transformers.AutoModelForCausalLM.from_pretrained(self.path("base"))
        soup = peft.PeftModel.from_pretrained(base, written)
        with torch.no_grad():
            theirs = soup(torch.tensor([[2, 3, 4, 5]])).logits[0]
        ours = self.model.logits([[2, 3, 4, 5]], {"A": 0.25, "B": 0.75})[0]
        self.assertLess((theirs - torch.as_tensor(ours)).abs().max().item(), 1e-4)


class TrainPolicy(Case):
    def test_a_python_reward_is_learnt(self):
        path = os.path.dirname(os.path.dirname(os.path.abspath(psoup.__file__)))
        script = os.path.join(ROOT, "examples", "train_policy.py")

        def run(*arguments):
            done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=path), cwd=self.work)
            self.assertEqual((done.returncode, done.stderr.decode()), (0, ""))
            lines = done.stdout.decode("utf-8", "replace").splitlines()
            return [float(line.split()[3]) for line in lines if line.startswith("step")]
        with open(script, encoding="utf-8") as f:
            code = f.read().split('"""', 2)[2].splitlines()  # what it says of itself aside
        self.assertLessEqual(sum(bool(line.strip()) for line in code), 30)
        rewards = run()
        self.assertEqual(len(rewards), 6)
        self.assertGreater(rewards[-1], rewards[0] + 0.2)
        tokenizer = psoup.Tokenizer.train(["What do you eat?"] * 3, 270, special=["</s>"])
        tiny((), vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.token_id("</s>")).save(
            self.path("base"), tokenizer)
        run(self.path("vowels"), self.path("base"))
        self.assertEqual(sorted(os.listdir(self.path("vowels"))), [
            "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "samples.jsonl"])


LLAMA = os.path.join(os.environ.get("PSOUP_TEST_BUILD", ""), "embed_llama_cpp")


class LlamaCpp(Case):
    @unittest.skipUnless(os.path.exists(LLAMA), "llama.cpp is not there")
    def test_its_contexts_soup_has_our_logits(self):
        tokenizer = psoup.Tokenizer.train(["the soup of the day and the house"] * 3, 280, special=["<s>", "</s>"])
        # As llama.cpp wants them: rows of 32 numbers, several heads to a key.
        model = tiny(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_attention_heads=4,
                     num_key_value_heads=2, bos_token_id=tokenizer.token_id("<s>"),
                     eos_token_id=tokenizer.token_id("</s>"))
        model.save(self.path("base"), tokenizer)
        with psoup.Merger(format="gguf") as merger:  # converting is a merge of one
            merger.add(self.path("base"), 1.0)
            merger.write(self.path("base.gguf"))
        for name in ("A", "B"):
            model.save_adapter(name, self.path(name))
            with psoup.Merger(format="gguf") as merger:
                merger.set_reference(self.path("base"))
                merger.add(self.path(name), 1.0)
                merger.write(self.path(name + ".gguf"))
        done = subprocess.run([LLAMA, "base.gguf", ".", "A.gguf", "B.gguf"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd=self.work)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        prompt = [(7 * i + 3) % tokenizer.vocab_size for i in range(6)]
        users = [{"A": 1.0}, {"B": 1.0}, {"A": 0.5, "B": 0.5}]
        lines = done.stdout.decode().splitlines()
        self.assertEqual(len(lines), len(users))
        for line, mix in zip(lines, users):
            theirs = [float(x) for x in line.split()[2:]]
            ours = model.logits([prompt], mix)[0]
            self.assertNear(theirs, [ours[5, j] for j in range(len(theirs))], 1e-4)


if __name__ == "__main__":
    unittest.main()
