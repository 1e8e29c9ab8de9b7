"""Handles, callbacks, threads and signals."""

import copy
import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import unittest
import weakref

from .case import Case, needs_numpy, psoup, tiny


class Handles(Case):
    def test_a_model_keeps_its_context(self):
        with psoup.Context(threads=1) as context:
            model = psoup.Model.create(context=context, vocab_size=16, hidden_size=8, intermediate_size=8,
                                       num_hidden_layers=1, num_attention_heads=1)
        self.assertTrue(context.closed)
        self.assertEqual(len(model.logprobs([[1, 2, 3]])[0]), 2)
        session = model.session()
        model.close()
        session.submit(0, [1, 2], max_new_tokens=2)
        while session.running:
            session.step()
        session.close()
        session.close()

    def test_a_closed_handle_says_so(self):
        model = tiny(())
        model.close()
        with self.assertRaisesRegex(psoup.StateError, "this Model is closed"):
            model.logprobs([[1, 2]])
        with self.assertRaisesRegex(psoup.StateError, "this Model is closed"), model:
            pass
        self.assertIn("closed", repr(model))

    def test_a_cycle_is_freed_in_order(self):
        model = tiny(("A",))
        held = []
        ppo = psoup.Ppo(model, [psoup.Policy("A", [[2, 3]], lambda r: held and [0.0] * len(r))], steps=1)
        held += [ppo, model]  # the run's callback holds the run and its model
        gone = weakref.ref(model)
        del model, ppo
        held.clear()
        gc.collect()
        self.assertIsNone(gone())

    def test_what_failed_to_open_is_nothing(self):
        with self.assertRaises(psoup.FileError) as caught:
            psoup.Model(self.path("nowhere"))
        self.assertIsInstance(caught.exception, OSError)
        self.assertEqual(caught.exception.status, psoup.Status.ERROR_IO)
        self.assertNotIn("\n", str(caught.exception))

    def test_a_context_has_what_was_asked(self):
        context = psoup.Context(threads=1, isa="generic")
        self.assertEqual((context.threads, context.isa), (1, "generic"))
        with self.assertRaises(psoup.Error):
            psoup.Context(isa="abacus")
        with self.assertRaisesRegex(TypeError, "did you mean 'threads'"):
            psoup.Context(treads=1)
        with self.assertRaises(ValueError):
            psoup.Model("a\0b")

    def test_every_status_has_its_class(self):
        from psoup.errors import BY_STATUS
        self.assertEqual(set(BY_STATUS), set(psoup.Status) - {psoup.Status.OK})


class Closing(Case):
    def test_a_model_closed_by_a_callback_lives_until_the_call_ends(self):
        model = tiny(())
        out = model.generate([[2, 3]], max_new_tokens=4, on_token=lambda t: model.close())
        self.assertEqual(out[0].tokens[0] >= 0, True)
        self.assertTrue(model.closed)
        with self.assertRaises(psoup.StateError):
            model.logprobs([[2, 3]])

    def test_a_copy_stays_open(self):
        model = tiny(())
        twin = copy.copy(model)
        model.close()
        self.assertEqual(len(twin.logprobs([[2, 3, 4]])[0]), 2)


class Callbacks(Case):
    def test_what_on_token_raises_comes_out_of_generate(self):
        model = tiny()

        def on_token(token):
            if token.id == 0:
                raise KeyError("stop here")

        with self.assertRaisesRegex(KeyError, "stop here"):
            model.generate([[2, 3]], on_token=on_token, max_new_tokens=4)
        self.assertEqual(len(model.generate([[2, 3]], max_new_tokens=1)[0].tokens), 1)

    def test_a_callback_may_call_the_library(self):
        model = tiny()
        other = tiny(())
        scores = []
        model.generate([[2, 3]], on_token=lambda t: scores.append(other.logprobs([[2, 3, 4]])[0][0]),
                       max_new_tokens=3, stop_tokens=[])
        self.assertEqual(len(scores), 3)
        self.assertEqual(len(set(scores)), 1)

    def test_the_log_reaches_python(self):
        lines = []
        context = psoup.Context(log=lambda level, line: lines.append((level, line)))
        self.log_something(context)
        self.assertTrue(lines)
        self.assertIsInstance(lines[0][0], psoup.LogLevel)

        def fail(level, line):
            raise ArithmeticError(line)

        with self.assertRaises(ArithmeticError):
            self.log_something(psoup.Context(log=fail))

    def log_something(self, context):
        """A tokenizer's truncation is not applied, and the log says so."""
        path = self.path("tokenizer.json")
        psoup.Tokenizer.train(["soup"], 257).save(path)
        with open(path) as f:
            value = json.load(f)
        value["truncation"] = {"max_length": 8}
        with open(path, "w") as f:
            json.dump(value, f)
        psoup.Tokenizer(path, context=context)

    def test_the_bar(self):
        out = io.StringIO()
        bar = psoup.Bar(out, width=4)
        for i in range(3):
            bar("merge", i, 2)
        self.assertEqual(out.getvalue(), "\rmerge [....] 0/2\rmerge [##..] 1/2\rmerge [####] 2/2\n")


class Threads(Case):
    def test_other_threads_run_while_c_does(self):
        model = tiny((), vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                     max_position_embeddings=512)
        counted = [0]
        done = threading.Event()

        def count():
            while not done.is_set():
                counted[0] += 1
                time.sleep(0)

        other = threading.Thread(target=count)
        other.start()
        before = counted[0]
        model.logits([[i % 512 for i in range(400)]] * 4)  # one call into C
        during = counted[0] - before
        done.set()
        other.join()
        self.assertGreater(during, 10)

    def test_threads_share_a_model_by_waiting(self):
        model = tiny()
        expected = [list(model.logprobs([[2, 3, 4, 5]], mix)[0]) for mix in ({"A": 1}, {"B": 1})]
        wrong = []

        def work(i):
            for _ in range(20):
                if list(model.logprobs([[2, 3, 4, 5]], ({"A": 1}, {"B": 1})[i])[0]) != expected[i]:
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(wrong, [])


class Signals(Case):
    @unittest.skipUnless(hasattr(signal, "SIGINT") and os.name == "posix", "there are no signals")
    def test_ctrl_c_stops_a_training_and_is_raised(self):
        program = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
sys.path[:0] = %r
import psoup
model = psoup.Model.create(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2)
model.add_adapter("A", rank=2)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    psoup.sft(model, [psoup.Example([2, 3, 4, 5])], "A", epochs=10**9)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    psoup.sft(model, [psoup.Example([2, 3, 4, 5])], "A")
    print("stopped")
""" % [p for p in sys.path if os.path.isdir(os.path.join(p, "psoup"))][:1]
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  timeout=60)
            self.assertEqual((done.stdout.decode().strip(), done.stderr.decode()), ("stopped", ""))


class WithoutNumpy(Case):
    @needs_numpy
    def test_everything_is_a_memoryview_then(self):
        program = """
import sys
sys.path[:0] = %r
sys.modules["numpy"] = None
import psoup
out = psoup.empty((2, 3))
assert isinstance(out, memoryview) and out.shape == (2, 3), out
assert psoup.empty(0).nbytes == 0
assert psoup.empty(3, "bf16").itemsize == 2
""" % [p for p in sys.path if os.path.isdir(os.path.join(p, "psoup"))][:1]
        subprocess.run([sys.executable, "-c", program], check=True)


if __name__ == "__main__":
    unittest.main()
