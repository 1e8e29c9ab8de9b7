"""A policy that learns from a reward written in Python.

    python3 examples/train_policy.py [OUTPUT_DIRECTORY [MODEL_DIRECTORY]]

The reward pays for vowels. Without a model, a small one with random weights learns to say them. The output has the
adapter, and what `psoup plot OUTPUT_DIRECTORY` draws."""
import os
import sys

import psoup

QUESTIONS = ["What is your name?", "How are you?", "Where do you live?", "What do you eat?"]
if len(sys.argv) > 2:
    model, tokenizer = psoup.Model(sys.argv[2]), psoup.Tokenizer(sys.argv[2])
else:
    tokenizer = psoup.Tokenizer.train(QUESTIONS, 280, special=["</s>"])
    model = psoup.Model.create(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                               num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
                               eos_token_id=tokenizer.token_id("</s>"))
model.add_adapter("vowels", rank=8, targets="all_linear")


def reward(rollouts):
    """The share of vowels in each answer."""
    texts = [tokenizer.decode(r.response, skip_special=True).lower() for r in rollouts]
    return [sum(t.count(v) for v in "aeiou") / max(len(t), 1) for t in texts]


options = dict(steps=60, batch_size=32, max_new_tokens=8, learning_rate=0.01, kl_coefficient=0.02)
if len(sys.argv) > 1:
    os.makedirs(sys.argv[1], exist_ok=True)
    options.update(metrics=os.path.join(sys.argv[1], "metrics.jsonl"), validate_every=10, samples_every=20,
                   samples=os.path.join(sys.argv[1], "samples.jsonl"))
prompts = [tokenizer.encode(q) for q in QUESTIONS]
ppo = psoup.PPO(model, ["vowels"], prompts=prompts, validation=prompts, reward=reward, tokenizer=tokenizer, **options)
for step in ppo:
    if step.step % 10 == 1:
        print("step %2d  reward %.3f  KL %.2f" % (step.step, step.reward, step.kl))
answer, = model.generate(prompts[:1], {"vowels": 1}, max_new_tokens=8, seed=1)
print("Now:", repr(tokenizer.decode(answer.tokens, skip_special=True)))
if len(sys.argv) > 1:
    model.save_adapter("vowels", sys.argv[1])  # a PEFT adapter
