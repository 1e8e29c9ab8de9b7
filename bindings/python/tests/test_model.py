"""Model, tokenizer, adapters, scores, generation, sessions."""

import array
import os
import unittest

from .case import GOLDEN, Case, psoup, needs_numpy, numpy, tiny


class Models(Case):
    def test_a_model_is_saved_and_loaded_with_the_same_scores(self):
        model = tiny()
        model.save(self.path("m"))
        again = psoup.Model(self.path("m"))
        rows = [[2, 3, 4, 5], [6, 7, 8]]
        self.assertEqual([list(r) for r in again.logprobs(rows)], [list(r) for r in model.logprobs(rows)])
        self.assertEqual(again.config["hidden_size"], 16)
        self.assertEqual(again.parameters, model.parameters)

    def test_an_adapter_is_saved_and_loaded(self):
        model = tiny()
        model.save_adapter("A", self.path("a"), base_name="tiny")
        model.load_adapter("C", self.path("a"))
        self.assertEqual(model.adapters, ("A", "B", "C"))
        self.assertEqual(list(model.adapter_data("C")), list(model.adapter_data("A")))
        row = [[2, 3, 4, 5]]
        self.assertEqual(list(model.logprobs(row, {"A": 1})[0]), list(model.logprobs(row, {"C": 1})[0]))
        model.remove_adapter("A")
        self.assertEqual(model.adapters, ("B", "C"))

    def test_each_row_has_its_own_mix(self):
        model = tiny()
        row = [2, 3, 4, 5, 6]
        mixes = [None, {"A": 1.0}, "B=1", [0.25, 0.75], {}]
        together = model.logprobs([row] * len(mixes), mixes=mixes)
        alone = [model.logprobs([row], mix=m)[0] for m in mixes]
        self.assertEqual([list(x) for x in together], [list(x) for x in alone])
        self.assertEqual(list(together[0]), list(together[4]))
        for other in (1, 2, 3):
            self.assertNotEqual(list(together[0]), list(together[other]))

    def test_a_mix_has_the_scores_of_the_merged_model(self):
        model = tiny()
        model.save(self.path("base"))
        for name in ("A", "B"):
            model.save_adapter(name, self.path(name))
        weights = {"A": 0.3, "B": 0.7}
        with psoup.Merger(base=self.path("base")) as merger:
            for name, w in weights.items():
                merger.add(self.path(name), w)
            merger.write(self.path("soup"))
        merged = psoup.Model(self.path("soup"))
        rows = [[2, 3, 4, 5, 6, 7], [8, 9, 10]]
        for a, b in zip(model.logprobs(rows, weights), merged.logprobs(rows)):
            self.assertNear(a, b, 1e-5)

    def test_factors_are_those_of_the_merged_adapter(self):
        model = tiny()
        for name in ("A", "B"):
            model.save_adapter(name, self.path(name))
        with psoup.Merger(method="factors") as merger:
            for name, w in (("A", 0.3), ("B", 0.7)):
                merger.add(self.path(name), w)
            merger.write(self.path("soup"))
        rows, mix = [[2, 3, 4, 5, 6, 7], [8, 9, 10]], {"A": 0.3, "B": 0.7}
        by_row = model.logprobs(rows, mix, methods=["factors", psoup.MixMethod.DELTA])
        alone = [model.logprobs([rows[0]], mix, method="factors")[0], model.logprobs([rows[1]], mix)[0]]
        self.assertEqual([list(r) for r in by_row], [list(r) for r in alone])
        model.load_adapter("C", self.path("soup"))
        self.assertNear(by_row[0], model.logprobs([rows[0]], {"C": 1})[0], 1e-5)
        self.assertNotEqual(list(by_row[0]), list(model.logprobs([rows[0]], mix)[0]))
        text = model.generate([rows[0]], mix, method="factors", max_new_tokens=4, temperature=0)[0]
        told = psoup.Prompt(rows[0], mix, method=psoup.MixMethod.FACTORS)
        self.assertEqual(list(model.generate([told], max_new_tokens=4, temperature=0)[0].logprobs), list(text.logprobs))
        with self.assertRaisesRegex(psoup.ArgumentError, "no mix method 'sum': expected one of delta, factors, logits"):
            model.logprobs(rows, mix, method="sum")
        with self.assertRaisesRegex(psoup.ArgumentError, "2 rows and 1 methods"):
            model.logprobs(rows, mix, methods=["delta"])

    def test_logits_are_mixed_and_a_strength_multiplies(self):
        model = tiny()
        row, mix = [2, 3, 4, 5, 6], {"A": 0.3, "B": 0.7}
        each = [model.logits([row], m)[0] for m in ({"A": 1}, {"B": 1}, None)]
        for strength in (1.0, 1.5):
            mixed = model.logits([row], mix, method="logits", strength=strength)[0]
            shares = [0.3 * strength, 0.7 * strength, 1 - strength]
            for i in range(5):
                want = [sum(s * e[i, j] for s, e in zip(shares, each)) for j in range(16)]
                self.assertNear([mixed[i, j] for j in range(16)], want, 1e-4)
        self.assertEqual(list(model.logprobs([row], mix, strength=1.5)[0]), list(model.logprobs([row], [0.45, 1.05])[0]))
        self.assertEqual(list(model.logprobs([row], mix, strength=0)[0]), list(model.logprobs([row])[0]))
        texts = model.generate([row, row], mix, methods=["logits", "delta"], max_new_tokens=5, ignore_stop=1, seed=3)
        alone = model.generate([psoup.Prompt(row, mix, 0, method="logits")], max_new_tokens=5, ignore_stop=1, seed=3)
        self.assertEqual(list(texts[0].logprobs), list(alone[0].logprobs))
        session = model.session(max_sequences=2)
        session.submit(0, row, mix, method="logits", max_new_tokens=5, ignore_stop=1, seed=3)
        tokens = []
        while session.running:
            tokens += [t.token for t in session.step()]
        self.assertEqual(tokens, list(alone[0].tokens))
        with self.assertRaisesRegex(psoup.ArgumentError, "takes a place; the session has 1"):
            model.session(max_sequences=1).submit(0, row, mix, method="logits")

    def test_logits_agree_with_logprobs(self):
        import math
        model = tiny()
        row = [2, 3, 4, 5]
        logits = model.logits([row], {"A": 1})[0]
        self.assertEqual(logits.shape, (4, 16))
        expected = []
        for i in range(3):
            values = [logits[i, j] for j in range(16)]
            top = max(values)
            expected.append(values[row[i + 1]] - top - math.log(sum(math.exp(v - top) for v in values)))
        self.assertNear(model.logprobs([row], {"A": 1})[0], expected, 1e-5)

    def test_gradients_are_the_slope_of_the_score(self):
        model = tiny()
        row = [2, 3, 4, 5]
        with model.gradients([row], {"A": 0.5, "B": 0.5}, what=("adapters", "mix")) as g:
            slope = g["mix"]
            self.assertEqual(len(g["A/model.layers.0.self_attn.q_proj.lora_A"]), 2 * 16)
            self.assertRaises(KeyError, lambda: g["nothing"])
        step = 1e-2
        up = sum(model.logprobs([row], [0.5 + step, 0.5])[0])
        down = sum(model.logprobs([row], [0.5 - step, 0.5])[0])
        self.assertAlmostEqual(slope[0], (up - down) / (2 * step), delta=2e-2 * max(1, abs(slope[0])))

    def test_mixes_that_cannot_be_are_refused(self):
        model = tiny()
        for mix, words in (({"A": 0.5}, "sums to 0.5"), ({"C": 1}, "names 'C'"), ([1.0], "1 weights"),
                           ("A=2", "")):
            with self.assertRaises(psoup.ArgumentError) as caught:
                model.logprobs([[2, 3]], mix)
            self.assertIn(words, str(caught.exception))
        self.assertEqual(model.mix({"A": 0.5}, any_sum=True), [0.5, 0.0])
        self.assertEqual(model.mix("A=0.5", any_sum=True), [0.5, 0.0])

    def test_golden_models_load(self):
        model = psoup.Model.load(os.path.join(GOLDEN, "model", "plain"))
        model.load_adapter("qv", os.path.join(GOLDEN, "model", "adapter_qv"))
        base, mixed = model.logprobs([[3, 1, 4, 1, 5]] * 2, mixes=[None, {"qv": 1}])
        self.assertNotEqual(list(base), list(mixed))

    def test_a_model_is_kept_in_blocks(self):
        plain = os.path.join(GOLDEN, "model", "plain")
        rows, wide = [[3, 1, 4, 1, 5]], psoup.Model(plain, dtype="f32")
        for dtype, most in ("int8", 0.2), ("nf4", 2.0):
            model = psoup.Model(plain, dtype=dtype)
            self.assertEqual(model.config["linear_dtype"], psoup.Dtype[dtype.upper()])
            pairs = list(zip(model.logprobs(rows)[0], wide.logprobs(rows)[0]))
            self.assertTrue(0 < max(abs(a - b) for a, b in pairs) < most)
            with self.assertRaises(psoup.Error):
                model.save(self.path("m"))
        with self.assertRaises(ValueError):
            psoup.Model(plain, dtype="int3")

    def test_token_arrays_need_not_be_lists(self):
        model = tiny()
        expected = list(model.logprobs([[2, 3, 4]])[0])
        for row in ((2, 3, 4), array.array("i", [2, 3, 4]), array.array("q", [2, 3, 4]), bytes([2, 3, 4])):
            self.assertEqual(list(model.logprobs([row])[0]), expected)

    @needs_numpy
    def test_numpy_goes_in_and_out(self):
        model = tiny()
        expected = model.logprobs([[2, 3, 4]], [0.5, 0.5])[0]
        self.assertIsInstance(expected, numpy.ndarray)
        for kind in (numpy.int32, numpy.int64):
            row = numpy.array([2, 3, 4], kind)
            got = model.logprobs([row], numpy.array([0.5, 0.5], numpy.float32))[0]
            self.assertTrue((got == expected).all())
        two = numpy.array([[2, 3, 4], [5, 6, 7]], numpy.int32)
        self.assertEqual(len(model.logprobs(two)), 2)
        every_other = numpy.array([2, 0, 3, 0, 4], numpy.int32)[::2]
        self.assertTrue((model.logprobs([every_other], [0.5, 0.5])[0] == expected).all())


class Generation(Case):
    def test_tokens_stream_as_they_are_returned(self):
        model = tiny()
        seen = {0: [], 1: []}
        out = model.generate([[2, 3], [4, 5, 6]], mixes=[{"A": 1}, None], max_new_tokens=6, seed=4,
                             on_token=lambda t: seen[t.id].append((t.token, t.logprob, t.finish)))
        for i, c in enumerate(out):
            self.assertEqual([t for t, _, _ in seen[i]], list(c.tokens))
            self.assertEqual([p for _, p, _ in seen[i]], list(c.logprobs))
            self.assertEqual(seen[i][-1][2], c.finish)
            self.assertIn(c.finish, (psoup.Finish.STOP, psoup.Finish.LENGTH))

    def test_greedy_takes_the_likeliest(self):
        model = tiny()
        prompt = [2, 3, 4]
        first = model.generate([prompt], {"A": 1}, temperature=0, max_new_tokens=1)[0].tokens[0]
        logits = model.logits([prompt], {"A": 1})[0]
        self.assertEqual(first, max(range(16), key=lambda j: logits[2, j]))

    def test_prompts_have_settings_of_their_own(self):
        model = tiny()
        own = {"max_new_tokens": 2, "seed": 1, "ignore_stop": True}
        prompts = [psoup.Prompt([2, 3], {"A": 1}, sequence=9, sampling=own),
                   psoup.Prompt([2, 3], {"A": 1}, sequence=9)]
        a, b = model.generate(prompts, max_new_tokens=5, seed=1, ignore_stop=True)
        self.assertEqual((len(a.tokens), len(b.tokens)), (2, 5))
        self.assertEqual(list(a.tokens), list(b.tokens)[:2])  # one stream of random words

    def test_stop_tokens(self):
        model = tiny()
        free = model.generate([[2, 3]], max_new_tokens=8, seed=3, stop_tokens=[])[0]
        self.assertEqual((len(free.tokens), free.finish), (8, psoup.Finish.LENGTH))
        stop = int(free.tokens[3])
        at = list(free.tokens).index(stop)
        cut = model.generate([[2, 3]], max_new_tokens=8, seed=3, stop_tokens=[stop])[0]
        self.assertEqual((list(cut.tokens), cut.finish), (list(free.tokens)[:at + 1], psoup.Finish.STOP))

    def test_a_session_gives_what_generate_gives(self):
        model = tiny()
        prompts, mixes = [[2, 3], [4, 5, 6], [7]], [{"A": 1}, {"A": 0.5, "B": 0.5}, None]
        expected = model.generate(prompts, mixes=mixes, max_new_tokens=5, seed=2)
        with model.session(max_sequences=2) as session:
            for i, (p, m) in enumerate(zip(prompts, mixes)):
                session.submit(i, p, m, max_new_tokens=5, seed=2)
            self.assertEqual(session.running, 3)
            got = {0: [], 1: [], 2: []}
            while session.running:
                for token in session.step():
                    got[token.id].append(token.token)
        self.assertEqual([got[i] for i in range(3)], [list(c.tokens) for c in expected])


class Tokenizers(Case):
    def test_it_is_trained_saved_and_loaded(self):
        texts = ["soup of the day, soup of the house", "the day of the soup"] * 4
        tokenizer = psoup.Tokenizer.train(texts, 290, special=["</s>"])
        self.assertEqual(len(tokenizer), tokenizer.vocab_size)
        tokenizer.save(self.path("tokenizer.json"))
        again = psoup.Tokenizer(self.path("tokenizer.json"))
        for text in ("soup of the day", "na\u00efve \u2603 \U0001f35c", "", "</s>"):
            ids = tokenizer.encode(text)
            self.assertEqual(again.encode(text), ids)
            self.assertEqual(tokenizer.decode(ids), text)
        end = tokenizer.token_id("</s>")
        self.assertEqual(tokenizer.encode("a</s>")[-1], end)
        self.assertEqual(tokenizer.token(end), "</s>")
        self.assertIsNone(tokenizer.token_id("nothing of the kind"))
        self.assertEqual(tokenizer.decode([end], skip_special=True), "")
        self.assertNotIn(end, tokenizer.encode("</s>", plain_special=True))

    def test_offsets_are_bytes_of_the_text(self):
        tokenizer = psoup.Tokenizer.train(["the soup"] * 3, 270)
        text = "the soup, the snow \u2603"
        ids, offsets = tokenizer.encode_with_offsets(text)
        self.assertEqual(len(ids), len(offsets))
        # The tokens of one character's bytes all stand for that character.
        self.assertEqual(b"".join(text.encode()[a:b] for a, b in sorted(set(offsets))), text.encode())

    def test_an_id_out_of_range_is_refused(self):
        tokenizer = psoup.Tokenizer.train(["the soup"], 256)
        with self.assertRaises(psoup.ArgumentError):
            tokenizer.decode([99999])


if __name__ == "__main__":
    unittest.main()
