"""What the tests share: a tiny model, a temporary directory, the source tree."""

import os
import shutil
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.abspath(os.path.join(HERE, "..", "..", ".."))
PACKAGE = os.path.realpath(os.path.join(HERE, ".."))
if os.environ.get("PSOUP_TEST_INSTALLED"):  # the package that pip put there; unittest put the tree's first
    sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != PACKAGE]
else:
    sys.path.insert(0, PACKAGE)

import psoup  # noqa: E402

try:
    import numpy
except ImportError:
    numpy = None
try:
    import torch
except ImportError:
    torch = None

needs_numpy = unittest.skipIf(numpy is None, "numpy is not there")
needs_torch = unittest.skipIf(torch is None, "torch is not there")
GOLDEN = os.path.join(ROOT, "tests", "golden")
END = 1


def tiny(adapters=("A", "B"), vocab_size=16, **config):
    """A model of two layers whose adapters, being trained a little, differ from the base."""
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 max_position_embeddings=64, eos_token_id=END, initializer_range=0.2)
    shape.update(config)
    model = psoup.Model.create(seed=5, vocab_size=vocab_size, **shape)
    for i, name in enumerate(adapters):
        model.add_adapter(name, rank=2, alpha=4, seed=i)
        examples = [psoup.Example([2 + (i + j) % 8 for j in range(8)], 2)]
        psoup.sft(model, examples, name, epochs=3, learning_rate=0.05)
    return model


class Case(unittest.TestCase):
    def setUp(self):
        self.work = tempfile.mkdtemp(prefix="psoup-python-")
        self.addCleanup(shutil.rmtree, self.work)

    def path(self, *names):
        return os.path.join(self.work, *names)

    def assertNear(self, a, b, tolerance=1e-6):
        a, b = list(a), list(b)
        self.assertEqual(len(a), len(b))
        for i, (x, y) in enumerate(zip(a, b)):
            self.assertLessEqual(abs(x - y), tolerance * max(1.0, abs(y)), "[%d] is %r: expected %r" % (i, x, y))
