"""Trainings that are iterated over: PPO, SFT, rewards, DPO."""

import gc
import json
import re
import unittest
import weakref
import xml.etree.ElementTree as tree

from .case import Case, psoup, tiny

EXAMPLES = [psoup.Example([2 + (i + j) % 8 for j in range(8)], 2) for i in range(6)]
COMPARISONS = [psoup.Comparison([2, 3, 4 + i], [2, 3, 9]) for i in range(4)]
PAIRS = [psoup.DpoPair([2, 3 + i], [5, 6], [9], i % 2) for i in range(6)]


def nines(rollouts):
    return [sum(t == 9 for t in r.response) - 0.1 * len(r.response) for r in rollouts]


class Iteration(Case):
    PPO = dict(prompts=[[2, 3], [4, 5], [6, 7]], reward=nines, validation=[[3, 2], [5, 4]], batch_size=8, ppo_epochs=2,
               max_new_tokens=4, learning_rate=0.01, kl_coefficient=0.01, steps=6, validate_every=3)

    def weights(self, model, *names):
        return [list(model.adapter_data(name)) for name in names]

    def test_ppo_gives_its_reports_and_leaves_the_best_weights(self):
        whole = tiny()
        psoup.PPO(whole, ["A", "B"], seed=3, **self.PPO).run()
        model = tiny()
        run = psoup.PPO(model, ["A", "B"], seed=3, **self.PPO)
        seen = []
        for step in run:
            seen.append((step.phase, step.subject, step.step))
            self.assertEqual(step.reward, step.metrics["reward"])
            self.assertGreaterEqual(step.kl_coefficient if step.phase == "train" else 1, 0)
            model.generate([[2, 3]], {"A": 1}, max_new_tokens=2)  # the model is free between steps
        expected = []
        for n in range(1, 7):
            expected += [("train", name, n) for name in "AB"]
            expected += [("validation", name, n) for name in "AB"] if n % 3 == 0 else []
        self.assertEqual(seen, expected)
        self.assertEqual(self.weights(model, "A", "B"), self.weights(whole, "A", "B"))
        self.assertEqual([(s.phase, s.subject, s.step) for s in run.history], seen)
        for name in "AB":
            rewards = dict(run.history.values("reward", name, "validation"))
            best = run.history.best(name)
            self.assertEqual((best.reward, best.step), (max(rewards.values()), max(rewards, key=rewards.get)))
        self.assertEqual(list(run), [])  # it is done

    def test_who_breaks_off_may_go_on(self):
        whole = tiny(("A",))
        psoup.PPO(whole, ["A"], metrics=self.path("whole.jsonl"), **self.PPO).run()
        model = tiny(("A",))
        options = dict(self.PPO, metrics=self.path("m.jsonl"), checkpoint_dir=self.path("c"), checkpoint_every=2)
        run = psoup.PPO(model, ["A"], **options)
        for step in run:
            if step.step == 2:
                break
        self.assertEqual(next(iter(run)).step, 3)
        run.close()
        model = tiny(("A",))
        steps = [s.step for s in psoup.PPO(model, ["A"], resume=True, **options) if s.phase == "train"]
        self.assertEqual(steps, [3, 4, 5, 6])  # its last checkpoint was of step 2
        self.assertEqual(self.weights(model, "A"), self.weights(whole, "A"))
        with open(self.path("whole.jsonl")) as a, open(self.path("m.jsonl")) as b:
            self.assertEqual(a.read(), b.read())

    def test_the_others_are_what_their_functions_do(self):
        options = dict(epochs=3, learning_rate=0.02, validate_every=2)

        def train(kind, model, step_by_step, told):
            if kind == "sft":
                if not step_by_step:
                    return psoup.sft(model, EXAMPLES, "A", EXAMPLES[:2], told, batch_tokens=16, **options)
                return psoup.SFT(model, EXAMPLES, "A", EXAMPLES[:2], told, batch_tokens=16, **options)
            if kind == "dpo":
                return (psoup.DPO if step_by_step else psoup.dpo)(model, ["A", "B"], PAIRS, PAIRS[:2], told,
                                                                  batch_size=2, **options)
            rewards = [psoup.Reward(model, "R", rank=2)]
            if step_by_step:
                return rewards[0].training(COMPARISONS, COMPARISONS[:2], told, batch_size=2, **options)
            return psoup.train_rewards(rewards, COMPARISONS, COMPARISONS[:2], told, batch_size=2, **options)

        for kind, names in (("sft", "A"), ("dpo", "AB"), ("reward", "R")):
            told, again = [], []
            whole, model = tiny(), tiny()
            train(kind, whole, False, told.append)
            run = train(kind, model, True, again.append)
            steps = list(run)
            bare = [s._replace(times={}) for s in told]
            self.assertEqual([s._replace(times={}) for s in steps], bare)
            self.assertEqual([s._replace(times={}) for s in again], bare)
            self.assertTrue(any(s.phase == "validation" for s in steps))
            self.assertLess(steps[-1].loss, steps[0].loss)
            self.assertEqual(self.weights(model, *names), self.weights(whole, *names))
            run.close()
            self.assertRaises(psoup.StateError, run.step)

    def test_a_base_is_trained_step_by_step(self):
        model = tiny(())
        losses = [s.loss for s in psoup.SFT(model, EXAMPLES, epochs=10, learning_rate=0.01)]
        self.assertLess(losses[-1], 0.8 * losses[0])

    def test_what_is_wrong_is_said(self):
        model = tiny(("A",))
        self.assertRaisesRegex(psoup.ArgumentError, "policy 'A' has no reward", psoup.PPO, model, ["A"], prompts=[[2]])
        self.assertRaisesRegex(psoup.ArgumentError, "no adapter 'B'", psoup.SFT, model, EXAMPLES, "B")
        self.assertRaisesRegex(TypeError, "there is no option 'epoch'", psoup.SFT, model, EXAMPLES, "A", epoch=1)
        run = psoup.SFT(model, EXAMPLES, "A", on_step=lambda s: 1 / 0)
        self.assertRaises(ZeroDivisionError, next, iter(run))
        self.assertEqual(run.history[0].step, 1)
        with self.assertRaisesRegex(AttributeError, "no metric 'reward', but loss"):
            run.history[0].reward
        self.assertRaises(psoup.StateError, psoup.SFT, model, EXAMPLES, "A")  # one training at a time
        run.close()
        psoup.SFT(model, EXAMPLES, "A").run()

    def test_nothing_is_kept_alive(self):
        model = tiny(("A",))
        run = psoup.SFT(model, EXAMPLES, "A")
        next(iter(run))
        gone = weakref.ref(run)
        del run
        gc.collect()
        self.assertIsNone(gone())
        psoup.sft(model, EXAMPLES, "A")  # the adapter is free again

    def test_a_notebook_shows_it(self):
        run = psoup.PPO(tiny(), ["A", "B"], **self.PPO)
        run._repr_html_()  # before anything
        for step in run:
            self.assertRegex(str(step), r"^[AB]: step \d/6(, validation)?: reward .*")
        page = tree.fromstring("<div>%s</div>" % run._repr_html_())
        lines = page.findall(".//polyline")
        self.assertEqual([len(line.get("points").split()) for line in lines], [6, 6])
        rows = ["".join(row.itertext()) for row in page.findall(".//tr")]
        self.assertEqual(len(rows), 3)
        self.assertRegex(rows[1], r"A6/6.*reward %s at %d$" % (re.escape("%.4g" % run.history.best("A").reward),
                                                               run.history.best("A").step))

    def test_a_history_stays_small(self):
        history = psoup.History()
        for i in range(25000):
            history.append(psoup.Step("train", "A", i, 25000, {"loss": 1.0}))
        self.assertLessEqual(len(history), 20000)
        self.assertEqual(history[-1].step, 24999)
        self.assertEqual(json.loads(json.dumps(history.values("loss")[-1])), [24999, 1.0])


class BestOfN(Case):
    PROMPTS = [[2, 3], [4, 5, 6]]

    def test_the_best_of_the_answers(self):
        model = tiny()
        plain = model.generate(self.PROMPTS, {"A": 1}, max_new_tokens=6, seed=4)
        found = psoup.best_of_n(model, self.PROMPTS, nines, 8, {"A": 1}, max_new_tokens=6, seed=4)
        self.assertEqual(len(found), 2)
        for best, first, prompt in zip(found, plain, self.PROMPTS):
            rollouts = [psoup.Rollout("", prompt, 0, list(c.tokens), c.finish) for c in best.candidates]
            for score, expected in zip(best.scores, nines(rollouts)):
                self.assertAlmostEqual(score, expected, places=5)
            self.assertEqual((best.score, best.chosen), (max(best.scores), best.scores.index(max(best.scores))))
            self.assertEqual(list(best.answer.tokens), list(best.candidates[best.chosen].tokens))
            self.assertEqual(list(best.candidates[0].tokens), list(first.tokens))
        alone, = psoup.best_of_n(model, [psoup.Prompt(self.PROMPTS[1], {"A": 1}, 1)], nines, 3, max_new_tokens=6, seed=4)
        self.assertEqual(alone.scores, found[1].scores[:3])

    def test_reward_models_and_questions(self):
        model = tiny()
        rewards = [psoup.Reward(model, name, rank=2) for name in ("R", "S")]
        psoup.train_rewards(rewards, COMPARISONS + [c._replace(reward=1) for c in COMPARISONS], learning_rate=0.05,
                            epochs=5)
        best, = psoup.best_of_n(model, [[2, 3]], rewards[0], 4, max_new_tokens=3)
        expected = rewards[0].score([[2, 3] + list(c.tokens) for c in best.candidates])
        self.assertEqual(best.scores, [float(x) for x in expected])
        question = psoup.PpoPrompt([7], inputs=[psoup.RewardInput([7], 0, 0.5), psoup.RewardInput([8, 2], 1, 2.0)])
        again, = psoup.best_of_n(model, [[2, 3]], rewards, 4, max_new_tokens=3, questions=[question])
        first = rewards[0].score([[7] + list(c.tokens) for c in best.candidates])
        second = rewards[1].score([[8, 2] + list(c.tokens) for c in best.candidates])
        self.assertNear(again.scores, [0.5 * x + 2 * y for x, y in zip(first, second)], 1e-6)
        several = {"taste": (rewards[0], 0.5), "nines": nines, "other": rewards[1]}
        named = psoup.PpoPrompt([7], inputs=[psoup.RewardInput([7], "taste")])
        third, = psoup.best_of_n(model, [[2, 3]], several, 4, max_new_tokens=3, questions=[named])
        paid = nines([psoup.Rollout("", [7], 0, list(c.tokens), c.finish) for c in best.candidates])
        self.assertNear(third.scores, [0.5 * x + y for x, y in zip(first, paid)], 1e-6)

    def test_what_is_wrong_is_said(self):
        model = tiny(("A",))
        self.assertRaises(ZeroDivisionError, psoup.best_of_n, model, [[2]], lambda r: 1 / 0)
        for wrong, message in ((dict(n=0), "n is 0"), (dict(temperature=0), "the same"),
                               (dict(reward_text=True), "tokenizer is NULL")):
            self.assertRaisesRegex(psoup.ArgumentError, message, psoup.best_of_n, model, [[2]], nines, **wrong)
        self.assertRaisesRegex(ValueError, "1 prompts and 0 questions", psoup.best_of_n, model, [[2]], nines, questions=[])
        self.assertEqual(psoup.best_of_n(model, [], nines), [])


if __name__ == "__main__":
    unittest.main()
