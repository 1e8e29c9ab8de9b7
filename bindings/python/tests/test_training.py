"""SFT, reward models, DPO and PPO, rewarded from Python."""

import json
import os
import socket
import subprocess
import sys
import unittest

from .case import Case, psoup, tiny


class Sft(Case):
    def test_the_loss_falls_and_every_step_is_reported(self):
        model = tiny(())
        model.add_adapter("A", rank=4)
        steps = []
        train = [psoup.Example([2, 3, 4, 5, 6, 7], 1), psoup.Example([3, 4, 5, 6, 7, 8], 1)]
        psoup.sft(model, train, "A", validation=train, epochs=20, learning_rate=0.02, on_step=steps.append,
                  schedule="linear", metrics=self.path("metrics.jsonl"))
        training = [s for s in steps if s.phase == "train"]
        self.assertEqual([s.step for s in training], list(range(1, training[-1].total + 1)))
        self.assertEqual(training[0].subject, "A")
        self.assertLess(training[-1].metrics["loss"], 0.5 * training[0].metrics["loss"])
        self.assertTrue(any(s.phase == "validation" for s in steps))
        with open(self.path("metrics.jsonl")) as f:
            self.assertEqual(len([json.loads(line) for line in f]), len(steps))

    def test_what_a_callback_raises_comes_out_and_stops_it(self):
        model = tiny(("A",))
        seen = []

        def on_step(step):
            seen.append(step)
            if step.step == 2:
                raise ZeroDivisionError("enough")

        with self.assertRaisesRegex(ZeroDivisionError, "enough"):
            psoup.sft(model, [psoup.Example([2, 3, 4])], "A", epochs=9, on_step=on_step)
        self.assertEqual(len(seen), 2)
        psoup.sft(model, [psoup.Example([2, 3, 4])], "A")  # and the model is well

    def test_a_stopped_run_goes_on(self):
        train = [psoup.Example([2, 3, 4, 5], 1), psoup.Example([3, 4, 5, 6, 7], 1)]
        kept = dict(epochs=3, batch_tokens=4, checkpoint_dir=self.path("kept"))
        seen = []

        def on_step(step):
            seen.append(step.step)
            if step.step == 2:
                raise ZeroDivisionError("enough")

        with self.assertRaisesRegex(ZeroDivisionError, "enough"):
            psoup.sft(tiny(("A",)), train, "A", on_step=on_step, **kept)
        with self.assertRaisesRegex(psoup.Error, "its learning_rate was"):
            psoup.sft(tiny(("A",)), train, "A", learning_rate=0.5, resume=1, **kept)
        psoup.sft(tiny(("A",)), train, "A", resume=1, on_step=lambda step: seen.append(step.step), **kept)
        self.assertEqual(seen, list(range(1, len(seen) + 1)))
        self.assertGreater(len(seen), 3)

    def test_options_are_known_by_name(self):
        defaults = psoup.sft_options()
        self.assertEqual((defaults["epochs"], defaults["schedule"]), (1, "constant"))
        self.assertEqual(psoup.sft_options(schedule="cosine")["schedule"], "cosine")
        self.assertEqual(psoup.ppo_options(lambda_=0.5)["lambda"], 0.5)
        self.assertEqual(psoup.reward_options()["max_tokens"], 512)
        self.assertNotEqual(psoup.ppo_options("rlphf"), psoup.ppo_options())
        with self.assertRaisesRegex(TypeError, "did you mean 'learning_rate'"):
            psoup.sft_options(learning_rte=1)
        with self.assertRaisesRegex(ValueError, "expected one of constant, linear, cosine"):
            psoup.sft_options(schedule="steep")
        with self.assertRaisesRegex(TypeError, "epochs"):
            psoup.sft_options(epochs="many")


class Rewards(Case):
    def test_two_reward_models_learn_side_by_side(self):
        model = tiny(())
        rewards = [psoup.Reward(model, "R0", rank=4, seed=1), psoup.Reward(model, "R1", rank=4, seed=2)]
        up, down = [2, 3, 9, 9], [2, 3, 5, 5]
        train = [psoup.Comparison(up, down, 0), psoup.Comparison(down, up, 1)] * 4
        psoup.train_rewards(rewards, train, epochs=10, learning_rate=0.02)
        accuracy, loss = psoup.reward_accuracy(rewards, train)
        self.assertEqual(accuracy, 1.0)
        self.assertLess(loss, 0.69)
        scores = [r.score([up, down]) for r in rewards]
        self.assertGreater(scores[0][0], scores[0][1])
        self.assertLess(scores[1][0], scores[1][1])
        rewards[0].save(self.path("r"))
        again = psoup.Reward.load(model, "again", self.path("r"))
        self.assertEqual(again.name, "again")
        self.assertEqual(list(again.score([up, down])), list(scores[0]))

    def test_a_comparison_has_its_own_margin(self):
        steps = []
        pairs = [psoup.Comparison([2, 3, 9], [2, 3, 5], margin=m) for m in (0.0, 50.0)]
        for margins in (1, 0):
            psoup.train_rewards([psoup.Reward(tiny(()), "R")], pairs, on_step=steps.append, max_steps=1,
                                margins=margins)
        self.assertAlmostEqual(steps[0].metrics["loss"], (0.693147 + 50.0) / 2, places=4)
        self.assertAlmostEqual(steps[1].metrics["loss"], 0.693147, places=4)
        self.assertEqual(psoup.reward_options()["margins"], True)

    def test_rewards_of_two_models_are_refused(self):
        with self.assertRaises(psoup.ArgumentError):
            psoup.reward_accuracy([psoup.Reward(tiny(()), "R"), psoup.Reward(tiny(()), "R")],
                                  [psoup.Comparison([2], [3])])


class Dpo(Case):
    def test_two_policies_learn_opposite_tastes_side_by_side(self):
        model = tiny(("A", "B"))
        steps = []
        train = [psoup.DpoPair([2, 3], [9, 9], [5, 5], 0), psoup.DpoPair([2, 3], [5, 5], [9, 9], 1)] * 4
        psoup.dpo(model, ["A", "B"], train, train[:2], steps.append, epochs=20, learning_rate=0.01)
        last = {s.subject: s.metrics for s in steps if s.phase == "validation"}
        self.assertEqual(set(last), {"A", "B"})
        for metrics in last.values():
            self.assertEqual(metrics["accuracy"], 1.0)
            self.assertLess(metrics["loss"], 0.69)
            self.assertGreater(metrics["reward_chosen"], metrics["reward_rejected"])
        self.assertEqual(psoup.dpo_options(beta=0.5)["beta"], 0.5)
        with self.assertRaisesRegex(psoup.ArgumentError, "label_smoothing is 0.75: expected 0 to 0.5"):
            psoup.dpo(model, ["A"], train[:1], label_smoothing=0.75)
        with self.assertRaisesRegex(psoup.ArgumentError, "names policy 1 of 1"):
            psoup.dpo(model, ["A"], train)


class Ppo(Case):
    OPTIONS = dict(batch_size=16, mini_batch_size=8, ppo_epochs=2, max_new_tokens=4, learning_rate=0.01,
                   kl_coefficient=0.01)

    def test_a_python_reward_is_learnt(self):
        model = tiny(("A",))
        prompts = [[2, 3], [4, 5], [6, 7], [8, 9]]
        seen, means = [], []

        def reward(rollouts):
            seen.extend(rollouts)
            return [sum(t == 9 for t in r.response) - 0.1 * len(r.response) for r in rollouts]

        def on_step(step):
            if step.phase == "train":
                means.append(step.metrics)

        ppo = psoup.Ppo(model, [psoup.Policy("A", prompts, reward, seed=3)], steps=30, on_step=on_step,
                        **self.OPTIONS)
        remaining = ppo.step()
        self.assertEqual(remaining, 29)
        trace = ppo.trace("A")
        self.assertEqual(len(trace.start), 17)
        self.assertEqual(len(trace.response), trace.start[16])
        self.assertEqual(list(trace.score), [s for s in trace.score])
        self.assertAlmostEqual(trace.score[0], reward(seen[:1])[0], places=6)
        self.assertEqual(list(trace.response[:trace.start[1]]), seen[0].response)
        ppo.run()
        self.assertFalse(ppo.diverged())
        self.assertEqual({r.policy for r in seen}, {"A"})
        self.assertEqual({(r.id, tuple(r.prompt)) for r in seen}, set(enumerate(map(tuple, prompts))))

        def average(rollouts):
            return sum(sum(t == 9 for t in r.response) for r in rollouts) / len(rollouts)

        self.assertEqual(len(means), 30)
        self.assertGreater(average(seen[-160:]), average(seen[:160]) + 0.5)

    def test_what_is_seen_of_a_run(self):
        told, times = [], []
        ppo = psoup.Ppo(tiny(("A",)), [psoup.Policy("A", [[2, 3], [4, 5], [6, 7]], lambda rollouts: [
            float(len(r.response)) for r in rollouts])], steps=3, samples_every=2, samples_count=2,
            samples=self.path("samples.jsonl"), on_samples=lambda *what: told.append(what),
            on_step=lambda s: times.append(s.times), **self.OPTIONS)
        self.assertEqual(ppo.step(), 2)
        self.assertEqual([step for step, _, _ in told], [0])
        ppo.run()
        self.assertEqual([step for step, _, _ in told], [0, 2, 3])
        for _, rollouts, scores in told:
            self.assertEqual([r.prompt for r in rollouts], [[2, 3], [4, 5]])
            self.assertEqual(scores, [float(len(r.response)) for r in rollouts])
        with open(self.path("samples.jsonl")) as f:
            rows = [json.loads(line) for line in f]
        self.assertEqual([r["response"] for r in rows], [r.response for _, rollouts, _ in told for r in rollouts])
        for t in times:
            self.assertGreater(t["tokens_per_second"], 0)
            self.assertGreaterEqual(t["seconds"] + 1e-3, t["rollout_seconds"] + t["update_seconds"])

    def test_objectives_without_a_critic(self):
        for objective in ("rloo", "grpo"):
            ppo = psoup.Ppo(tiny(("A",)), [psoup.Policy("A", [[2, 3], [4, 5]], lambda rollouts: [
                float(r.response[0]) for r in rollouts])], steps=1, objective=objective, group_size=8, **self.OPTIONS)
            ppo.run()
            trace = ppo.trace()
            first = [trace.advantage[s] for s in trace.start[:-1]]
            for group in (first[:8], first[8:]):
                self.assertAlmostEqual(float(sum(group)), 0.0, places=4)
            self.assertEqual(set(trace.value), {0.0})
        with self.assertRaisesRegex(psoup.ArgumentError, "multiple of group_size, 3"):
            psoup.Ppo(tiny(("A",)), [psoup.Policy("A", [[2]], lambda r: [0.0])], objective="rloo", group_size=3)

    def test_two_policies_with_a_reward_model_and_a_function(self):
        model = tiny(("A", "B"))
        judge = psoup.Reward(model, "R", rank=2)
        prompts = [psoup.PpoPrompt([2, 3], 70), psoup.PpoPrompt([4, 5], 71, [psoup.RewardInput([5, 6], 0, 2.0)])]
        ids = []

        def reward(rollouts):
            ids.extend(r.id for r in rollouts)
            return [0.0] * len(rollouts)

        policies = [psoup.Policy("A", prompts, judge), psoup.Policy("B", [p._replace(inputs=()) for p in prompts],
                                                                   reward)]
        ppo = psoup.Ppo(model, policies, steps=1, **self.OPTIONS)
        judge.close()  # the run keeps it
        ppo.run()
        self.assertEqual(set(ids), {70, 71})
        self.assertEqual(set(ppo.trace("A").score), {0.0})

    def test_a_model_and_functions_reward_one_policy(self):
        model = tiny(("A",))
        steps = []
        sources = {"judge": psoup.Reward(model, "R", rank=2),
                   "length": (lambda rs: [len(r.response) for r in rs], -0.5),
                   "first": lambda rs: [float(r.response[0]) for r in rs]}
        ppo = psoup.Ppo(model, [psoup.Policy("A", [[2, 3], [4, 5]], sources)], steps=2, on_step=steps.append,
                        normalize_apart=True, length_penalty=0.1, **self.OPTIONS)
        del sources
        ppo.run()
        for step in steps:
            m = step.metrics
            self.assertAlmostEqual(m["reward"], m["reward/first"] - 0.5 * m["reward/length"] + m["reward/judge"],
                                   places=5)
            self.assertEqual(m["reward/length"], m["length"])
            self.assertAlmostEqual(m["length_penalty"], 0.1 * m["length"], places=5)
        with self.assertRaisesRegex(psoup.ArgumentError, "the weight of source 'x' is 0"):
            psoup.Ppo(tiny(("A",)), [psoup.Policy("A", [[2]], {"x": (lambda r: [0.0], 0.0)})])

    def test_a_reward_that_raises_stops_the_run(self):
        model = tiny(("A",))

        def reward(rollouts):
            raise LookupError("no reward today")

        for wrong, kind in ((reward, LookupError), (lambda r: [1.0], ValueError),
                            (lambda r: ["x"] * len(r), ValueError)):
            ppo = psoup.Ppo(model, [psoup.Policy("A", [[2, 3]], wrong)], steps=1, **self.OPTIONS)
            self.assertRaises(kind, ppo.run)
            ppo.close()


class Soup(unittest.TestCase):
    def test_a_soup_learns_under_mixes_of_its_own(self):
        seen = set()

        def reward(rollouts):
            seen.update(r.policy for r in rollouts)
            return [float(len(r.response)) for r in rollouts]

        soup = psoup.Policy("soup", [[2, 3], [4, 5]], reward, soup=("A", "B"), concentration=0.5)
        with psoup.Ppo(tiny(("A", "B")), [soup], steps=1, batch_size=4, max_new_tokens=4) as ppo:
            ppo.run()
            mix = list(ppo.trace("soup").mix)
        self.assertEqual(seen, {"A", "B"})
        self.assertEqual(len(mix), 8)
        for row in range(4):
            self.assertAlmostEqual(sum(mix[2 * row:2 * row + 2]), 1.0, 6)
        with self.assertRaisesRegex(psoup.Error, "concentration is -1"):
            psoup.Ppo(tiny(("A", "B")), [soup._replace(concentration=-1.0)], steps=1)

    def test_its_adapters_have_several_rewards(self):
        model, steps, asked = tiny(("A", "B")), [], set()

        def length(rollouts):
            asked.update(r.policy for r in rollouts)
            return [float(len(r.response)) for r in rollouts]

        rewards = {"A": {"length": (length, 0.5), "judge": psoup.Reward(model, "R", rank=2)},
                   "B": (lambda rs: [float(r.response[0]) for r in rs], -1.0)}
        prompts = [psoup.PpoPrompt([2, 3], 0, [psoup.RewardInput([5], "A/judge", 0.5), psoup.RewardInput([], "B", 0.5)]),
                   psoup.PpoPrompt([4, 5], 1)]
        soup = psoup.Policy("soup", prompts, rewards, soup=("A", "B"))
        options = dict(steps=1, batch_size=4, max_new_tokens=4)
        with psoup.PPO(model, [soup], on_step=steps.append, **options) as ppo:
            ppo.run()
            trace = ppo.trace()
        self.assertEqual(asked, {"A"})
        expected = 0.0
        for i in range(4):
            a, b = trace.mix[2 * i:2 * i + 2]
            start, end = trace.start[i:i + 2]
            self.assertAlmostEqual(trace.score[i], a * 0.5 * (end - start) - b * trace.response[start], places=5)
            expected += (end - start) / 4
        metrics = steps[0].metrics
        self.assertAlmostEqual(metrics["reward/A/length"], expected, places=5)
        self.assertEqual((metrics["reward/A/judge"], "reward/B" in metrics), (0.0, True))
        for reward, said in (({"A": length}, "no source is of its adapter 'B'"),
                             ({"A": length, "B": length, "C": length}, "'C', which is no adapter")):
            with self.assertRaisesRegex(psoup.ArgumentError, said):
                psoup.PPO(model, [soup._replace(reward=reward, prompts=[[2]])], **options)
        with self.assertRaisesRegex(psoup.ArgumentError, "an input is of reward 'A'"):
            psoup.PPO(model, [soup._replace(prompts=[psoup.PpoPrompt([2], 0, [psoup.RewardInput([3], "A")])])], **options)
        with self.assertRaisesRegex(psoup.ArgumentError, "several rewards under one name, 'x'"):
            psoup.PPO(model, [psoup.Policy("A", [[2]], {"x": {"y": length}})], **options)


RANK = """
import sys
from psoup_case import psoup, tiny
comm = psoup.Comm.launched()
assert (comm is None) == (len(sys.argv) == 2)
model = tiny(("A",))
seen = []
train = [psoup.Example([2, 3, 4 + i % 3, 5, 6 + i % 5], 1) for i in range(12)]
psoup.sft(model, train, "A", epochs=3, batch_tokens=20, learning_rate=0.01, comm=comm, on_step=seen.append,
          metrics=sys.argv[1])
print(model.adapter_data("A").tolist())
"""


class Ranks(Case):
    def run_ranks(self, world, port):
        script = self.path("rank.py")
        with open(self.path("psoup_case.py"), "w") as f:
            f.write("from tests.case import psoup, tiny\n")
        with open(script, "w") as f:
            f.write(RANK)
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        paths = [here, os.path.dirname(script)] + sys.path
        started = []
        for rank in range(world):
            env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in paths if p))
            if world > 1:
                env.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            started.append(subprocess.Popen(
                [sys.executable, "-B", script, self.path("metrics-%d.jsonl" % world)] + ["launched"] * (world > 1),
                env=env, stdout=subprocess.PIPE))
        out = [p.communicate()[0] for p in started]
        self.assertEqual([p.returncode for p in started], [0] * world)
        return [json.loads(o) for o in out]

    def test_two_processes_take_the_steps_of_one(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        alone, = self.run_ranks(1, 0)
        first, second = self.run_ranks(2, port)
        self.assertEqual(first, second)
        self.assertLess(max(abs(a - b) for a, b in zip(alone, first)), 1e-6)
        lines = []
        for n in (1, 2):
            with open(self.path("metrics-%d.jsonl" % n)) as f:
                lines.append(len(f.readlines()))
        self.assertEqual(lines[0], lines[1])  # rank 0 alone writes them


if __name__ == "__main__":
    unittest.main()
