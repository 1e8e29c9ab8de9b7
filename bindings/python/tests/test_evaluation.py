"""Preferences, judges, feedback and win rates; JSON and JSON Lines."""

import json
import sys
import unittest

from .case import Case, psoup, tiny


class Preferences(Case):
    def test_the_papers(self):
        preferences = psoup.Preferences()
        self.assertEqual(len(preferences), 6)
        self.assertEqual([p.symbol for p in preferences], ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"])
        self.assertEqual(preferences[preferences.find("P2B")].symbol, "P2B")
        self.assertIsNone(preferences.find("P9Z"))
        self.assertEqual(preferences[-1].symbol, "P3B")
        users = preferences.users()
        self.assertEqual(len(users), 8)
        self.assertEqual((users[0].name, users[0].members), ("AAA", (0, 2, 4)))
        self.assertEqual(len(psoup.Preferences(with_new=True).users()), 16)

    def test_from_a_file(self):
        rows = [{"symbol": "S", "dimension": "size", "prompt": "Generate a short response."}]
        psoup.write_json(self.path("p.json"), rows)
        p = psoup.Preferences(self.path("p.json"))[0]
        self.assertEqual((p.symbol, p.criterion, p.opposite), ("S", "Choose a short response.", None))

    def test_templates(self):
        self.assertEqual(psoup.fill_template("Cook", preference="Be brief.", template="Q: {instruction} {preference}"),
                         "Q: Cook Be brief.")
        self.assertIn("Cook", psoup.fill_template("Cook"))


class Judges(Case):
    questions = [psoup.Question(1, "p", None, "long answer", "short"),
                 psoup.Question(2, "p", psoup.Preference("S", "d", "g", "c", None), "x", "longer")]

    def test_a_function_judges(self):
        seen = []

        def judge(questions):
            seen.extend(questions)
            return ["a" if len(q.a) > len(q.b) else psoup.B_WINS for q in questions]

        with psoup.Judge(judge) as j:
            self.assertEqual(j.ask(self.questions), [psoup.A_WINS, psoup.B_WINS])
        self.assertEqual(seen[0], self.questions[0])
        self.assertEqual(seen[1].preference.criterion, "c")

    def test_what_it_raises_comes_out(self):
        def judge(questions):
            raise PermissionError("not my job")

        with self.assertRaisesRegex(PermissionError, "not my job"):
            psoup.Judge(judge).ask(self.questions)

    def test_a_command_judges(self):
        program = ("import json, sys\n"
                   "for line in iter(sys.stdin.readline, ''):\n"
                   "    q = json.loads(line)\n"
                   "    v = 'a' if len(q['a']) > len(q['b']) else 'b'\n"
                   "    print(json.dumps({'id': q['id'], 'verdict': v}), flush=True)\n")
        with psoup.Judge([sys.executable, "-c", program]) as j:
            self.assertEqual(j.ask(self.questions), [psoup.A_WINS, psoup.B_WINS])

    def test_a_silent_command_is_given_up(self):
        with psoup.Judge([sys.executable, "-c", "import time; time.sleep(60)"], patience=0.2) as j:
            self.assertRaises(psoup.FileError, j.ask, self.questions)

    def test_duels_in_both_orders(self):
        preferences = psoup.Preferences()
        longer = psoup.Judge(lambda qs: [psoup.A_WINS if len(q.a) > len(q.b) else psoup.B_WINS for q in qs])
        first = psoup.Judge(lambda qs: [psoup.A_WINS] * len(qs))
        args = (preferences, ["p", "q"], ["aaa", "b"], ["a", "bbb"], [(0, 2), (1,)])
        self.assertEqual(longer.duels(*args, helpfulness=True), ([[1, 1], [-1]], [1, -1]))
        self.assertEqual(first.duels(*args), ([[0, 0], [0]], [psoup.UNPARSED] * 2))
        self.assertEqual(first.duels(*args, swap=False)[0], [[1, 1], [1]])


class Feedback(Case):
    def test_comparisons_are_written(self):
        tokenizer = psoup.Tokenizer.train(["Generate soup of the day"] * 3, 280, special=["</s>"])
        model = tiny((), vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_id=256)
        asked, told = [], []

        def judge(questions):
            asked.extend(questions)
            return [psoup.A_WINS] * len(questions)

        counts = psoup.feedback(model, tokenizer, psoup.Preferences(), [psoup.Instruction("Cook", id=3)],
                                psoup.Judge(judge), self.path("f.jsonl"), sampling={"max_new_tokens": 4},
                                seed=1, progress=lambda *a: told.append(a))
        rows = list(psoup.JsonlReader(self.path("f.jsonl")))
        self.assertEqual(counts, {"written": len(rows), "ties": 0, "unparsed": 0})
        self.assertEqual(len(rows), 24)
        self.assertEqual(len(asked), 6)
        self.assertEqual({r["id"] for r in rows}, {3})
        self.assertEqual(told[-1][0], "feedback")

    def test_feedback_of_a_mix(self):
        tokenizer = psoup.Tokenizer.train(["soup soup, hot soup"], 260, special=["<end>"])
        model = tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
        mix = dict.fromkeys(model.adapters, 1 / len(model.adapters))

        def answers(**how):
            asked = []
            psoup.feedback(model, tokenizer, psoup.Preferences(), [psoup.Instruction("Cook")],
                           psoup.Judge(lambda questions: asked.extend(questions) or [psoup.TIE] * len(questions)),
                           self.path("f.jsonl"), mix, {"max_new_tokens": 16}, seed=3, **how)
            return [q.a for q in asked]

        ways = [answers(), answers(strength=3.0), answers(method="factors", strength=3.0),
                answers(method=psoup.MixMethod.LOGITS, strength=3.0)]
        self.assertEqual(len({tuple(a) for a in ways}), 4)
        self.assertEqual(answers(method="delta"), ways[0])
        with self.assertRaisesRegex(psoup.ArgumentError, "method"):
            answers(method="sum")

    def test_cancelled_by_its_progress(self):
        tokenizer = psoup.Tokenizer.train(["soup"], 257)
        model = tiny((), vocab_size=tokenizer.vocab_size, max_position_embeddings=512)

        def progress(label, done, total):
            raise psoup.Cancelled("that will do")

        with self.assertRaisesRegex(psoup.Cancelled, "that will do"):
            psoup.feedback(model, tokenizer, psoup.Preferences(), [psoup.Instruction("Cook")],
                           psoup.Judge(lambda qs: [0] * len(qs)), self.path("f.jsonl"),
                           sampling={"max_new_tokens": 2}, progress=progress)


class WinRates(Case):
    def test_rates(self):
        a, b, tie = psoup.A_WINS, psoup.B_WINS, psoup.TIE
        duels = [psoup.Duel(0, 0, (0, 2), (a, a), a), psoup.Duel(1, 0, (0, 2), (a, b), b),
                 psoup.Duel(2, 0, (0, 2), (b, tie), a), psoup.Duel(3, 0, (0, 2), (a, tie), tie)]
        rate = psoup.winrate_aggregate(duels, seed=1)
        self.assertEqual((rate.wins, rate.ties, rate.losses, rate.unparsed), (2, 1, 1, 0))
        self.assertAlmostEqual(rate.rate, 2 / 3)
        self.assertLessEqual(rate.low, rate.rate)
        self.assertAlmostEqual(psoup.winrate_criterion(duels, 0).rate, 0.75)
        self.assertEqual(psoup.winrate_helpfulness(duels).wins, 2)
        with self.assertRaises(psoup.ArgumentError):
            psoup.winrate_aggregate([psoup.Duel(0, 0, (0,), ())])


class Data(Case):
    value = {"name": "na\u00efve \u2603", "list": [1, 2.5, None, True], "nested": {"b": 1, "a": -2 ** 62}}

    def test_json_there_and_back(self):
        for name in ("v.json", "v.json.zst"):
            psoup.write_json(self.path(name), self.value)
            self.assertEqual(psoup.read_json(self.path(name)), self.value)
        with open(self.path("v.json")) as f:
            self.assertEqual(json.load(f), self.value)
        with open(self.path("bad.json"), "w") as f:
            f.write('{"a": 1, "a": 2}')
        with self.assertRaisesRegex(psoup.FormatError, "bad.json"):
            psoup.read_json(self.path("bad.json"))
        with self.assertRaises(ValueError):
            psoup.write_json(self.path("nan.json"), float("nan"))

    def test_json_lines(self):
        rows = [{"i": i} for i in range(5)]
        with psoup.JsonlWriter(self.path("r.jsonl.zst")) as writer:
            for row in rows:
                writer.write(row)
        reader = psoup.JsonlReader(self.path("r.jsonl.zst"))
        self.assertEqual(next(reader), rows[0])
        self.assertEqual(reader.line, 1)
        self.assertEqual(list(reader), rows[1:])
        with self.assertRaises(KeyError), psoup.JsonlWriter(self.path("gone.jsonl")) as writer:
            writer.write({})
            raise KeyError
        with self.assertRaises(psoup.FileError):
            psoup.JsonlReader(self.path("gone.jsonl"))
        with psoup.JsonlWriter(self.path("log.jsonl"), append=True) as log:
            log.write({"a": 1})
            self.assertEqual(list(psoup.JsonlReader(self.path("log.jsonl"))), [{"a": 1}])


if __name__ == "__main__":
    unittest.main()
