"""Merging arrays, state dicts and files."""

import array
import os
import struct
import sys
import unittest

from .case import Case, needs_numpy, needs_torch, numpy, psoup, tiny, torch


def f32(*values):
    return array.array("f", values)


def bits(x):
    """bfloat16 bits of a float, rounded to nearest even."""
    n = struct.unpack("I", struct.pack("f", x))[0]
    return (n + 0x7FFF + (n >> 16 & 1)) >> 16


class Sums(Case):
    def test_plain_buffers(self):
        a, b = f32(1, 2, 3), f32(3, 2, 1)
        out = psoup.merge_sum([a, b], [0.25, 0.75])
        self.assertEqual(list(out), [2.5, 2.0, 1.5])
        place = f32(0, 0, 0)
        self.assertIs(psoup.merge_sum([a, b], [0.5, 0.5], out=place), place)
        self.assertEqual(list(place), [2.0, 2.0, 2.0])
        psoup.merge_sum([a, b], [0.5, 0.5], out=a)
        self.assertEqual(list(a), [2.0, 2.0, 2.0])

    def test_bfloat16_in_any_buffer_of_16_bits(self):
        values = [[1.5, -2.25, 1e-3], [0.3, 7.0, -5e4]]
        held = [psoup.view(array.array("H", map(bits, row)), "bf16") for row in values]
        out = array.array("H", [0] * 3)
        psoup.merge_sum(held, [0.5, 0.5], out=psoup.view(out, "bf16"))
        back = [[struct.unpack("f", struct.pack("I", bits(x) << 16))[0] for x in row] for row in values]
        self.assertEqual(list(out), [bits(0.5 * x + 0.5 * y) for x, y in zip(*back)])

    def test_dtypes_and_rows_of_their_own(self):
        out = psoup.merge_sum([f32(1, 2, 3), array.array("d", [3, 2, 1])], [0.25, 0.75])
        self.assertEqual(list(out), [2.5, 2.0, 1.5])
        whole = memoryview(array.array("f", range(12))).cast("B").cast("f", (3, 4))
        halves = psoup.merge_sum([whole[1:], whole[:2]], [0.5, 0.5])
        self.assertEqual([halves[1, j] for j in range(4)], [6.0, 7.0, 8.0, 9.0])

    def test_quantised(self):
        block = struct.pack("<e32b", 0.5, *range(-16, 16))
        x = psoup.packed(block * 2, "q8_0", (2, 32))
        out = memoryview(bytearray(4 * 64)).cast("f", (2, 32))
        psoup.merge_sum([x], [2.0], out=out)
        self.assertEqual([out[1, j] for j in range(32)], [float(j) for j in range(-16, 16)])
        back = psoup.empty((2, 32), "q8_0")
        psoup.merge_sum([out], [0.5], out=psoup.packed(back, "q8_0", (2, 32)))
        again = psoup.merge_sum([psoup.packed(back, "q8_0", (2, 32))], [1.0], out=psoup.empty((2, 32)))
        self.assertNear([again[0, j] for j in range(32)], [j / 2 for j in range(-16, 16)], 0.05)
        for shape in ((2, 31), (3, 32)):
            self.assertRaises(ValueError, psoup.packed, block * 2, "q8_0", shape)

    @needs_torch
    def test_float8(self):
        x = torch.tensor([[1.0, -2.0, 448.0, 0.5]]).to(torch.float8_e4m3fn)
        self.assertEqual((psoup.view(x).dtype, psoup.view(x).address), (psoup.Dtype.F8_E4M3, x.data_ptr()))
        out = psoup.merge_sum([x, x], [0.25, 0.25], dtype="float32")
        self.assertTrue(torch.equal(out, 0.5 * x.float()))
        self.assertEqual(psoup.merge_sum([x, x], [0.25, 0.25]).dtype, torch.float8_e4m3fn)

    def test_what_does_not_fit_is_refused(self):
        a = f32(1, 2, 3)
        for arrays, weights, words in (([a, f32(1, 2)], [0.5, 0.5], r"source 1 has shape \[2\]: expected \[3\]"),
                                       ([a], [0.5, 0.5], "1 sources and 2 weights"), ([], [], "no arrays")):
            with self.assertRaisesRegex(psoup.ArgumentError, words):
                psoup.merge_sum(arrays, weights)
        with self.assertRaisesRegex(ValueError, "out is read-only"):
            psoup.merge_sum([a], [1.0], out=bytes(12))
        with self.assertRaisesRegex(TypeError, "neither an array nor a buffer"):
            psoup.merge_sum([object()], [1.0])

    @needs_numpy
    def test_numpy_equals_numpys_own_sum(self):
        rng = numpy.random.default_rng(1)
        arrays = [rng.standard_normal((37, 53)).astype("float32") for _ in range(3)]
        weights = [0.2, 0.5, 0.3]
        out = psoup.merge_sum(arrays, weights)
        self.assertIsInstance(out, numpy.ndarray)
        exact = sum(w * a.astype("float64") for w, a in zip(weights, arrays))
        numpy.testing.assert_allclose(out, exact, rtol=0, atol=1e-6)
        half = [a.astype("float16") for a in arrays]
        out = psoup.merge_sum(half, weights)
        self.assertEqual(out.dtype, numpy.float16)
        expected = sum(w * a.astype("float64") for w, a in zip(weights, half)).astype("float16")
        numpy.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-3)
        self.assertEqual(psoup.merge_sum(half, weights, dtype="float32").dtype, numpy.float32)
        with self.assertRaisesRegex(psoup.ArgumentError, "expected rows of elements side by side"):
            psoup.merge_sum([arrays[0].T], [1.0])
        shards = [a[:, 10:31] for a in arrays]  # where they lie
        numpy.testing.assert_array_equal(psoup.merge_sum(shards, weights), psoup.merge_sum(arrays, weights)[:, 10:31])
        mixed = [arrays[0], arrays[1].astype("float16"), arrays[2].astype("float64")]
        exact = sum(w * a.astype("float64") for w, a in zip(weights, mixed))
        numpy.testing.assert_allclose(psoup.merge_sum(mixed, weights), exact, rtol=0, atol=1e-6)
        arrays[0].flags.writeable = False
        with self.assertRaisesRegex(ValueError, "read-only"):
            psoup.merge_sum(arrays, weights, out=arrays[0])

    @needs_torch
    def test_torch_goes_in_and_out_without_a_copy(self):
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            a, b = (torch.randn(17, 9, generator=torch.Generator().manual_seed(i)).to(kind) for i in range(2))
            self.assertEqual(psoup.view(a).address, a.data_ptr())
            out = psoup.merge_sum([a, b], [0.25, 0.75])
            self.assertEqual((out.dtype, out.shape), (kind, a.shape))
            self.assertTrue(torch.equal(out, (0.25 * a.float() + 0.75 * b.float()).to(kind)))
            place = torch.empty_like(a)
            address = place.data_ptr()
            psoup.merge_sum([a, b], [0.25, 0.75], out=place)
            self.assertEqual(place.data_ptr(), address)
            self.assertTrue(torch.equal(place, out))


class Bits(Case):
    """Results of types that the arrays' library has not: their bits."""

    @needs_numpy
    def test_bfloat16_without_ml_dtypes(self):
        a = numpy.array([1.0, 2.0, -3.5], "float32")
        kept, sys.modules["ml_dtypes"] = sys.modules.get("ml_dtypes"), None
        try:
            out = psoup.merge_sum([a], [1.0], dtype="bfloat16")
            merged = psoup.merge({"x": {"w": a}}, {"x": 1.0}, dtype="bfloat16")["w"]
            by_name = psoup.merge({"x": {"w": a}}, {"x": 1.0}, method="linear", dtype="bfloat16")["w"]
        finally:
            del sys.modules["ml_dtypes"]
            if kept is not None:
                sys.modules["ml_dtypes"] = kept
        for bits in (out, merged, by_name):
            self.assertEqual(bits.dtype.name, "uint16")
            self.assertEqual(bits.tolist(), [0x3F80, 0x4000, 0xC060])


class Views(Case):
    def test_a_view_holds_its_buffer(self):
        x = bytearray(8)
        seen = psoup.view(x)
        with self.assertRaises(BufferError):
            x.append(1)
        self.assertEqual((seen.dtype, seen.shape, seen.readonly), (psoup.Dtype.U8, (8,), False))
        del seen
        x.append(1)
        self.assertTrue(psoup.view(b"abc").readonly)

    def test_strides(self):
        m = memoryview(bytearray(24)).cast("f", (2, 3))
        self.assertEqual((psoup.view(m).shape, psoup.view(m).strides), ((2, 3), (3, 1)))
        every_other = memoryview(array.array("i", range(6)))[::2]
        seen = psoup.view(every_other)
        self.assertEqual((seen.shape, seen.strides, seen.is_contiguous), ((3,), (2,), False))

    def test_another_type_of_the_same_size_only(self):
        with self.assertRaisesRegex(TypeError, "8 bits"):
            psoup.view(b"abcd", "f32")
        with self.assertRaisesRegex(ValueError, "expected one of"):
            psoup.view(b"abcd", "f31")

    @needs_numpy
    def test_numpy(self):
        x = numpy.arange(12, dtype="int64").reshape(3, 4)
        seen = psoup.view(x.T)
        self.assertEqual((seen.address, seen.dtype, seen.shape, seen.strides),
                         (x.ctypes.data, psoup.Dtype.I64, (4, 3), (1, 4)))
        for bad in (x.astype(">f4"), x.astype("complex64"), numpy.array(["a"])):
            self.assertRaises(TypeError, psoup.view, bad)
        try:
            import ml_dtypes
        except ImportError:
            return
        y = numpy.ones(4, ml_dtypes.bfloat16)
        self.assertEqual(psoup.view(y).dtype, psoup.Dtype.BF16)
        self.assertEqual(psoup.merge_sum([y, y], [0.5, 0.5]).dtype, y.dtype)

    @needs_torch
    def test_torch(self):
        x = torch.zeros(3, 4, dtype=torch.bfloat16).t()
        seen = psoup.view(x)
        self.assertEqual((seen.address, seen.dtype, seen.shape, seen.strides),
                         (x.data_ptr(), psoup.Dtype.BF16, (4, 3), (1, 4)))
        p = torch.nn.Parameter(torch.zeros(3))
        self.assertEqual(psoup.view(p).address, p.data_ptr())
        with self.assertRaisesRegex(TypeError, "host"):
            psoup.view(torch.empty(3, device="meta"))


class Adapters(Case):
    def factors(self):
        def matrix(rows, columns, seed):
            m = memoryview(bytearray(4 * rows * columns)).cast("f", (rows, columns))
            for i in range(rows):
                for j in range(columns):
                    m[i, j] = ((seed * 31 + i * 7 + j * 13) % 11 - 5) / 8
            return m

        return [psoup.Factors(matrix(2, 5, s), matrix(3, 2, s + 1), 0.5 + s) for s in range(2)]

    def product(self, factors, weights):
        return [[sum(w * f.scale * f.b[i, k] * f.a[k, j] for w, f in zip(weights, factors)
                     for k in range(f.a.shape[0])) for j in range(5)] for i in range(3)]

    def test_fold(self):
        factors, weights = self.factors(), [0.25, 0.75]
        base = memoryview(bytearray(60)).cast("f", (3, 5))
        for i in range(3):
            for j in range(5):
                base[i, j] = i - j
        expected = self.product(factors, weights)
        out = psoup.fold(base, factors, weights)
        for i in range(3):
            self.assertNear([out[i, j] for j in range(5)], [base[i, j] + expected[i][j] for j in range(5)])
        psoup.fold(base, factors, weights, out=base)
        self.assertEqual([base[2, j] for j in range(5)], [out[2, j] for j in range(5)])
        part = memoryview(bytearray(20)).cast("f", (1, 5))
        psoup.fold(part, factors, weights, out=part, at=(2, 0))
        self.assertNear([part[0, j] for j in range(5)], expected[2])
        with self.assertRaises(psoup.ArgumentError):
            psoup.fold(part, factors, weights, at=(3, 0))
        with self.assertRaisesRegex(psoup.ArgumentError, "expected a row-major f32 matrix"):
            psoup.fold(memoryview(bytearray(40)).cast("f", (2, 5)), factors, weights)

    def test_factors(self):
        factors, weights = self.factors(), [0.25, 0.75]
        expected = self.product(factors, weights)
        for method, rank in (("delta", None), ("svd", 3)):
            merged, error = psoup.merge_factors(factors, weights, method, rank)
            got = self.product([merged], [1.0])
            for x, y in zip(got, expected):
                self.assertNear(x, y, 1e-5)
            self.assertLess(error, 1e-6)
        whole = psoup.merge_adapter({"q": factors, "v": factors}, weights)
        again = whole["q"].b
        psoup.merge_adapter({"q": factors, "v": factors}, [1.0, 0.0], out=whole)
        self.assertIs(whole["q"].b, again)
        alone, _ = psoup.merge_factors(factors, [1.0, 0.0])
        for module in whole.values():
            for x, y in zip(self.product([module], [1.0]), self.product([alone], [1.0])):
                self.assertNear(x, y, 1e-6)
        _, error = psoup.merge_factors(factors, weights, "svd", 1)
        self.assertGreater(error, 1e-3)


class StateDicts(Case):
    def test_named_sources_and_weights(self):
        x = {"w": f32(1, 2), "n": array.array("q", [7])}
        y = {"w": f32(3, 4), "n": array.array("q", [7])}
        told = []
        soup = psoup.merge({"x": x, "y": y}, {"y": 0.75, "x": 0.25}, progress=lambda *a: told.append(a))
        self.assertEqual((list(soup["w"]), list(soup["n"])), ([2.5, 3.5], [7]))
        self.assertEqual(told[-1], ("merge", 2, 2))
        again = {"w": f32(0, 0)}
        kept = again["w"]
        psoup.merge([x, y], [1, 0], out=again)
        self.assertEqual(list(kept), [1, 2])

    def test_what_does_not_fit_is_refused(self):
        x = {"w": f32(1, 2)}
        for sources, weights, words in (
                ([x, {"v": f32(1, 2)}], [0.5, 0.5], "not in every source"),
                ([x, {"w": f32(1)}], [0.5, 0.5], "w: source 1 has shape"),
                ([x, x], [0.5, 0.6], "sum to 1.1"), ([x, x], [1.0], "2 sources and 1 weights"),
                ({"a": x}, {"b": 1.0}, "weights are of"),
                ([{"n": array.array("q", [1])}, {"n": array.array("q", [2])}], [0.5, 0.5], "differs")):
            with self.assertRaisesRegex(psoup.ArgumentError, words):
                psoup.merge(sources, weights)

    def test_its_progress_can_stop_it(self):
        def progress(label, done, total):
            raise psoup.Cancelled("enough")

        with self.assertRaises(psoup.Cancelled):
            psoup.merge([{"w": f32(1)}], [1.0], progress=progress)

    @needs_torch
    def test_torch_modules(self):
        models = [torch.nn.Linear(5, 3) for _ in range(2)]
        soup = psoup.merge([m.state_dict() for m in models], [0.5, 0.5])
        fresh = torch.nn.Linear(5, 3)
        fresh.load_state_dict(soup)
        self.assertTrue(torch.equal(fresh.weight, 0.5 * models[0].weight + 0.5 * models[1].weight))


class Methods(Case):
    """Methods of whole tensors, on what the caller holds."""

    def dicts(self):
        def values(seed):
            flat = array.array("f", [((seed * 7 + i * 5) % 13 - 6) / 4 for i in range(12)])
            return {self.NAME: memoryview(flat).cast("B").cast("f", (3, 4))}
        return values(1), values(2), values(3)

    NAME = "model.layers.0.mlp.up_proj.weight"

    def test_task_arithmetic_is_its_formula(self):
        base, x, y = self.dicts()
        out = psoup.merge({"x": x, "y": y}, [0.5, 0.25], "task_arithmetic", base=base, lambda_=2.0)
        for i in range(3):
            for j in range(4):
                b = base[self.NAME][i, j]
                self.assertAlmostEqual(out[self.NAME][i, j], b + 2 * (0.5 * (x[self.NAME][i, j] - b)
                                                                     + 0.25 * (y[self.NAME][i, j] - b)), places=5)

    def test_in_memory_pulled_and_from_files_it_is_the_same(self):
        base, x, y = self.dicts()
        expected = psoup.merge([x, y], [1, 1], "ties", base=base, density=0.5)[self.NAME].tobytes()
        for name, d in (("b", base), ("x", x), ("y", y)):
            psoup.write_safetensors(self.path(name + ".safetensors"), d)
        files = [self.path(n + ".safetensors") for n in "bxy"]
        got = psoup.merge(files[1:], [1, 1], "ties", base=files[0], density=0.5)
        self.assertEqual(got[self.NAME].tobytes(), expected)
        reads = []

        def pulled(d):
            raw = bytes(d[self.NAME].tobytes())

            def read(offset, out):
                reads.append((offset, len(out)))
                out[:] = raw[offset:offset + len(out)]

            return {self.NAME: psoup.Pulled("f32", (3, 4), read)}

        got = psoup.merge([pulled(x), y], [1, 1], "ties", base=pulled(base), density=0.5)
        self.assertEqual(got[self.NAME].tobytes(), expected)
        self.assertTrue(reads)

    def test_what_a_read_raises_comes_out(self):
        base, x, _ = self.dicts()

        def read(offset, out):
            raise ConnectionError("the store is away")

        with self.assertRaisesRegex(ConnectionError, "the store is away"):
            psoup.merge([{self.NAME: psoup.Pulled("f32", (3, 4), read)}, x], [1, 1], "linear")

    def test_results_stream(self):
        base, x, y = self.dicts()
        got, names = {}, []
        with psoup.Merger(method="linear") as merger:
            merger.add(x, 0.5)
            merger.add(y, 0.5)

            def tensor(name, dtype, shape):
                names.append((name, dtype, shape))
                got[name] = bytearray(48)

            def write(offset, data):
                got[names[-1][0]][offset:offset + len(data)] = data

            merger.stream(tensor, write)
            self.assertEqual(names, [(self.NAME, psoup.Dtype.F32, (3, 4))])
            self.assertEqual(bytes(got[self.NAME]), merger.run()[self.NAME].tobytes())
            merger.set_parameter("weight", 0.0, source=1)
            self.assertEqual(merger.run()[self.NAME].tobytes(), x[self.NAME].tobytes())

            def fail(offset, data):
                raise InterruptedError("full")

            with self.assertRaisesRegex(InterruptedError, "full"):
                merger.stream(tensor, fail)
            with self.assertRaisesRegex(psoup.ArgumentError, "expected row-major f32"):
                merger.run({self.NAME: array.array("f", [0])})

    def test_unknown_methods_and_options_are_refused(self):
        _, x, y = self.dicts()
        with self.assertRaisesRegex(ValueError, "expected one of delta, factors"):
            psoup.merge([x, y], [0.5, 0.5], "blend")
        with self.assertRaisesRegex(TypeError, "did you mean 'density'"):
            psoup.merge([x, y], [0.5, 0.5], "ties", densty=1)
        with self.assertRaises(psoup.ArgumentError):
            psoup.merge([x, y], [0.5, 0.5], "ties")  # without a base

    @needs_torch
    def test_torch_comes_back_as_torch(self):
        a, b = ({"w": torch.full((4, 4), v, dtype=torch.bfloat16)} for v in (1.0, 3.0))
        out = psoup.merge([a, b], [0.5, 0.5], "linear")
        self.assertTrue(torch.equal(out["w"], torch.full((4, 4), 2.0, dtype=torch.bfloat16)))


class Files(Case):
    def setUp(self):
        super().setUp()
        self.model = tiny()
        for name in ("A", "B"):
            self.model.save_adapter(name, self.path(name))

    def test_adapters_to_one_adapter_with_progress(self):
        told = []
        with psoup.Merger(progress=lambda *a: told.append(a)) as merger:
            merger.add(self.path("A"), 0.5)
            merger.add(self.path("B"), 0.5)
            merger.write(self.path("half"))
            merger.set_weights([1.0, 0.0])
            merger.write(self.path("first"))
        self.assertEqual(told[-1][0], "merge")
        self.assertEqual(told[-1][1], told[-1][2])
        for name, mix in (("half", {"A": 0.5, "B": 0.5}), ("first", {"A": 1.0})):
            self.model.load_adapter(name, self.path(name))
            row = [[2, 3, 4, 5]]
            self.assertNear(self.model.logprobs(row, {name: 1})[0], self.model.logprobs(row, mix)[0], 1e-5)

    def test_a_result_is_verified_and_made_again(self):
        with psoup.Merger() as merger:
            merger.add(self.path("A"), 0.5)
            merger.add(self.path("B"), 0.5)
            merger.write(self.path("soup"))
        self.assertGreater(psoup.verify(self.path("soup")), 0)
        with psoup.Merger() as merger:
            merger.load_certificate(self.path("soup", "psoup-merge.json"))
            merger.write(self.path("again"))
        name = "adapter_model.safetensors"
        with open(self.path("soup", name), "rb") as f, open(self.path("again", name), "rb") as g:
            self.assertEqual(f.read(), g.read())
        with open(self.path("soup", name), "r+b") as f:
            f.seek(-1, 2)
            f.write(b"\x01")
        with self.assertRaises(psoup.Error):
            psoup.verify(self.path("soup"))

    def test_inspection(self):
        adapters = [self.path("A"), self.path("B")]
        found = psoup.inspect(adapters, [0.5, 0.5], plot=self.path("map.svg"), names=["first", "second"])
        self.assertEqual(len(found["norms"]), 2)
        self.assertAlmostEqual(found["gram"][0][0], found["norms"][0] ** 2, places=4)
        self.assertAlmostEqual(found["cosine"][0][1], found["cosine"][1][0])
        with open(self.path("map.svg")) as f:
            self.assertIn("second", f.read())
        with self.assertRaises(psoup.ArgumentError):
            psoup.inspect(adapters, [1.0])

    def test_a_recipe_of_mergekits(self):
        for name, scale in (("x", 0.1), ("y", 0.3)):
            tiny((), initializer_range=scale).save(self.path(name))
        with open(self.path("r.yaml"), "w") as f:
            f.write("merge_method: linear\nmodels:\n  - model: %s\n    parameters: {weight: 0.5}\n"
                    "  - model: %s\n    parameters: {weight: 0.5}\ndtype: float32\n" % (self.path("x"), self.path("y")))
        with psoup.Merger() as merger:
            merger.load_recipe(self.path("r.yaml"))
            merger.write(self.path("recipe"))
        expected = psoup.merge([self.path("x"), self.path("y")], [0.5, 0.5], "linear")
        got = psoup.merge([self.path("recipe")], [1.0], "linear")
        self.assertEqual(set(got), set(expected))
        for name in got:
            self.assertEqual(got[name].tobytes(), expected[name].tobytes(), name)
        with open(self.path("r.yaml"), "a") as f:
            f.write("merge_method: blend\n")
        with self.assertRaisesRegex(psoup.Error, "r.yaml"), psoup.Merger() as merger:
            merger.load_recipe(self.path("r.yaml"))

    def test_a_lossy_method_reports(self):
        with psoup.Merger(method="svd", svd_rank=1) as merger:
            merger.add(self.path("A"), 0.5)
            merger.add(self.path("B"), 0.5)
            merger.write(self.path("out"))
            report = merger.report()
        self.assertGreater(report["worst_error"], 0)
        self.assertIn("proj", report["worst_name"])

    def test_cancelled_it_leaves_nothing(self):
        def progress(label, done, total):
            raise psoup.Cancelled("enough")

        merger = psoup.Merger(progress=progress)
        merger.add(self.path("A"))
        with self.assertRaises(psoup.Cancelled):
            merger.write(self.path("out"))
        self.assertFalse(os.path.exists(self.path("out", "adapter_model.safetensors")))

    def test_errors_have_the_librarys_words(self):
        with psoup.Merger() as merger:
            with self.assertRaises(psoup.Error) as caught:
                merger.add(self.path("nowhere"))
            self.assertIn("nowhere", str(caught.exception))

    def test_safetensors(self):
        psoup.write_safetensors(self.path("x.safetensors"), {"a": f32(1, 2), "b": b"abc"})
        with open(self.path("x.safetensors"), "rb") as f:
            data = f.read()
        n = struct.unpack("<Q", data[:8])[0]
        import json
        header = json.loads(data[8:8 + n])
        begin, end = header["a"]["data_offsets"]
        self.assertEqual(data[8 + n + begin:8 + n + end], struct.pack("<2f", 1, 2))
        self.assertEqual(header["b"]["dtype"], "U8")


if __name__ == "__main__":
    unittest.main()
