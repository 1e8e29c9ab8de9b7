"""The model on the GPU against a LLaMA in float64 PyTorch: scores, the gradient of everything, an optimiser step,
greedy tokens. correct_ops.py looks at every op by itself.

    correct.py [--device cuda:0]
"""
import json
import os
import struct
import sys
import tempfile

import torch

import plain
import psoup

device = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cuda:0"
CONFIG = dict(vocab_size=301, hidden_size=256, intermediate_size=328, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, rope_theta=10000.0, rms_norm_eps=1e-6)
ADAPTERS = {"a": dict(rank=8, targets=["q_proj", "v_proj"]), "b": dict(rank=8, targets="all_linear")}  # alpha 16
# What a rounding of products' operands leaves of a whole model, relative to the norm of what is compared.
TOLERANCE = {"f32": 2e-5, "f16": 2e-2, "bf16": 6e-2}
LENGTHS, MIXES = (2, 37, 64, 129), (None, [1.0, 0.0], [0.25, 0.75], [0.0, -0.5])
failures, worst = 0, {dtype: [0, 0.0] for dtype in TOLERANCE}  # checks and the largest error


def check(dtype, what, got, want):
    global failures
    got, want = torch.tensor(got.tolist(), dtype=torch.float64).reshape(-1), want.detach().double().reshape(-1)
    error = ((got - want).norm() / want.norm()).item()
    worst[dtype] = [worst[dtype][0] + 1, max(worst[dtype][1], error)]
    if not error <= TOLERANCE[dtype]:
        failures += 1
        print("FAILED %s, %s: %.2e of %.0e" % (dtype, what, error, TOLERANCE[dtype]))


def saved(path):
    """A safetensors file, in float64."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    data = open(path, "rb").read()
    n = struct.unpack("<Q", data[:8])[0]
    return {name: torch.frombuffer(bytearray(data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]),
                                   dtype=kinds[t["dtype"]]).reshape(t["shape"]).double()
            for name, t in json.loads(data[8:8 + n]).items() if name != "__metadata__"}


def adapter(model, name, weights):
    """Its factors by name, cut from the flat buffer that adapter_data has."""
    flat, at, out = torch.tensor(list(model.adapter_data(name)), dtype=torch.float64), 0, {}
    linears = plain.LINEARS if name == "b" else ("self_attn.q_proj", "self_attn.v_proj")
    for layer in range(CONFIG["num_hidden_layers"]):
        for linear in linears:
            full = "model.layers.%d.%s" % (layer, linear)
            rows, columns = weights[full + ".weight"].shape
            for part, shape in ((".lora_A", (8, columns)), (".lora_B", (rows, 8))):
                n = shape[0] * shape[1]
                out[full + part] = flat[at:at + n].reshape(shape)
                at += n
    assert at == len(flat)
    return out


def log_likelihood(oracle, row, mix):
    tokens = torch.tensor([row])
    logits = oracle.logits(oracle.hidden(tokens, mix))[0]
    return logits, logits[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


def run(dtype, context):
    settings = dict(CONFIG, torch_dtype=dtype, initializer_range=0.1, max_position_embeddings=512)
    model = psoup.Model.create(seed=3, context=context, **settings)
    with tempfile.TemporaryDirectory() as directory:
        model.save(directory)
        weights = saved(os.path.join(directory, "model.safetensors"))
    rows = [[(i * i * 7 + 3 * i + n) % CONFIG["vocab_size"] for i in range(n)] for n in LENGTHS]
    for name, options in ADAPTERS.items():
        model.add_adapter(name, alpha=16.0, **options)
        # one step from B = 0 with a clipped gradient moves every weight by the learning rate
        psoup.sft(model, [psoup.Example(r, 1) for r in rows], name, max_steps=2, learning_rate=0.02, keep_best=0)
    adapters = [adapter(model, name, weights) for name in ADAPTERS]
    leaves = [w.requires_grad_() for part in (weights, *adapters) for w in part.values()]
    mixes = torch.tensor([m or [0.0, 0.0] for m in MIXES], dtype=torch.float64, requires_grad=True)
    oracle = plain.Llama(CONFIG, weights, adapters)
    want = [log_likelihood(oracle, row, mixes[i:i + 1]) for i, row in enumerate(rows)]

    for got, (logits, _), n in zip(model.logits(rows, mixes=MIXES), want, LENGTHS):
        check(dtype, "logits of %d tokens" % n, got, logits)
    for got, (_, logprobs), n in zip(model.logprobs(rows, mixes=MIXES), want, LENGTHS):
        check(dtype, "log-probabilities of %d tokens" % n, got, logprobs)

    sum(l.sum() for _, l in want).backward()
    gradients = model.gradients(rows, mixes=MIXES, what=("base", "adapters", "mix"))
    for name, w in weights.items():
        check(dtype, "d " + name.replace("model.layers.", ""), gradients[name], w.grad)
    for owner, factors in zip(ADAPTERS, adapters):
        for name, w in factors.items():
            check(dtype, "d %s/%s" % (owner, name.replace("model.layers.", "")), gradients[owner + "/" + name], w.grad)
    used = torch.tensor([[bool(w) for w in m or (0, 0)] for m in MIXES])  # a weight of 0 is skipped
    check(dtype, "d mix", gradients["mix"], mixes.grad * used)

    with torch.no_grad():
        prompts = [row[:20] for row in rows[1:]]
        for prompt, mix, out in zip(prompts, mixes[1:], model.generate(prompts, mixes=MIXES[1:], temperature=0.0,
                                                                        max_new_tokens=40, stop_tokens=[])):
            text = prompt + list(out.tokens)
            logits, logprobs = log_likelihood(oracle, text, mix[None])
            check(dtype, "greedy: log-probabilities", out.logprobs, logprobs[19:])
            check(dtype, "greedy: the largest logits", logits[torch.arange(19, 59), text[20:]],
                  logits[19:59].max(-1).values)
    if dtype == "f32":  # f32 adapters move alike for every dtype
        step(model, adapters[1], weights, rows)


def step(model, factors, weights, rows):
    """AdamW, one step after the gradient of the mean over tokens, not clipped. With an epsilon that counts, so that
    the sign of a gradient of almost nothing does not."""
    before = {name: w.detach().clone().requires_grad_() for name, w in factors.items()}
    optimizer = torch.optim.AdamW(before.values(), lr=1e-3, eps=1e-3, weight_decay=0.1)
    oracle = plain.Llama(CONFIG, {n: w.detach() for n, w in weights.items()}, [before])
    one = torch.ones(1, 1, dtype=torch.float64)
    terms = torch.cat([log_likelihood(oracle, row, one)[1] for row in rows])
    (-terms.mean()).backward()
    optimizer.step()
    psoup.sft(model, [psoup.Example(r, 1) for r in rows], "b", max_steps=1, learning_rate=1e-3, epsilon=1e-3,
              weight_decay=0.1, max_grad_norm=0.0, keep_best=0)
    after = adapter(model, "b", weights)
    for name, w in before.items():
        check("f32", "AdamW " + name.replace("model.layers.", ""), after[name], w)


with psoup.Context(device=device) as context:
    for dtype in TOLERANCE:
        run(dtype, context)
for dtype, (n, error) in worst.items():
    print("%d checks of a model in %s against float64 PyTorch, the largest error %.1e of %.0e"
          % (n, dtype, error, TOLERANCE[dtype]))
sys.exit(failures > 0)
