"""A policy that learns from a reward written in Python.

    python3 examples/train_policy.py [OUTPUT [MODEL]]

The reward pays for vowels. Without a MODEL directory, a small one with random weights learns to say them. OUTPUT,
"vowels" unless it is named, receives a PEFT adapter, and what `psoup plot OUTPUT` draws."""
import os
import sys

import psoup

questions = ["What is your name?", "How are you?", "Where do you live?", "What do you eat?"]
output, *base = sys.argv[1:] or ["vowels"]
if base:
    model, tokenizer = psoup.Model(base[0]), psoup.Tokenizer(base[0])
else:
    tokenizer = psoup.Tokenizer.train(questions, 280, special=["</s>"])
    model = psoup.Model.create(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                               num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
                               eos_token_id=tokenizer.token_id("</s>"))
model.add_adapter("vowels", rank=8, targets="all_linear")


def reward(rollouts):
    """A number for each response: the share of vowels in it."""
    texts = [tokenizer.decode(r.response, skip_special=True).lower() for r in rollouts]
    return [sum(t.count(v) for v in "aeiou") / max(len(t), 1) for t in texts]


os.makedirs(output, exist_ok=True)
prompts = [tokenizer.encode(q) for q in questions]
ppo = psoup.PPO(model, ["vowels"], prompts=prompts, validation=prompts, reward=reward, tokenizer=tokenizer,
                steps=60, batch_size=32, max_new_tokens=8, learning_rate=0.01, kl_coefficient=0.02, validate_every=10,
                metrics=os.path.join(output, "metrics.jsonl"), samples=os.path.join(output, "samples.jsonl"),
                samples_every=20)
for step in ppo:  # reports of steps and validations; in a notebook, ppo.history is a table and a curve
    if step.step % 10 == 1:
        print("step %2d  reward %.3f  KL %.2f" % (step.step, step.reward, step.kl))
answer, = model.generate(prompts[:1], {"vowels": 1}, max_new_tokens=8, seed=1)
print("Now:", repr(tokenizer.decode(answer.tokens, skip_special=True)))
model.save_adapter("vowels", output)
