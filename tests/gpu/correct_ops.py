"""Every op of src/ops.h against float64 PyTorch: the table is read from the header and called as the model calls it.

    correct_ops.py BUILD/tests/gpu/libops.so [--device cuda:0]
"""
import ctypes
import os
import re
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, \
    c_void_p

import torch
import torch.nn.functional as F

os.environ["PSOUP_LIBRARY"] = sys.argv[1]  # as libpsoup.so, but with the names inside it
import psoup  # noqa: E402
from psoup import _abi  # noqa: E402
from psoup._library import lib  # noqa: E402

device = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cuda:0"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DTYPES = {"f32": (0, torch.float32, 2e-5), "f16": (1, torch.float16, 3e-3), "bf16": (2, torch.bfloat16, 2e-2)}
SIZES = ((1, 64), (37, 129), (128, 640))  # rows, width
torch.manual_seed(1)
NOT_HERE = {"free", "copy", "zero", "record", "replay", "advance",  # they compute nothing; see test_gpu.c,
            "unused", "packed_bytes", "reserved_bytes"}  # nor do these; see test_train_memory.c
failures = checks = 0


HEADER = re.sub(r"/\*.*?\*/", "", "".join(open(os.path.join(ROOT, "src", name), encoding="utf-8").read()
                                          for name in ("base/policy.h", "ops.h")), flags=re.S)
KINDS = {"int32_t": c_int32, "int64_t": c_int64, "uint64_t": c_uint64, "size_t": c_size_t, "float": c_float,
         "double": c_double, "bool": c_bool, "psoup_dtype": c_int, "psoup_status": c_int, "void": None}


def fields(*names_and_kinds):
    return type("Struct", (Structure,), {"_fields_": list(names_and_kinds)})


def struct(name):
    """A struct of the header."""
    members = []
    for line in re.search(r"typedef struct psoup__%s \{(.*?)\}" % name, HEADER, re.S).group(1).split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+) (.*)", line, re.S).groups()
        members += [(n.strip(" *\n"), c_void_p if "*" in n else KINDS[kind]) for n in names.split(",")]
    return fields(*members)


Weight, Lora, Mix, Linear, Keys, Spans, Shape, Draw, Adamw, Dropout, Terms, Response, Old, Objective = map(struct, (
    "weight", "lora", "mix", "linear", "keys", "spans", "attention_shape", "draw", "adamw_args", "dropout", "loss_terms",
    "response", "old", "objective"))


# ---- the table ---------------------------------------------------------------------------------------------


class Table:
    """ops.rmsnorm(out, rstd, …) calls that op of the backend. Tensors stand for their device memory (see `put`)."""

    def __init__(self, context):
        text = HEADER[HEADER.index("typedef struct psoup__ops {"):]
        kind = lambda words: c_void_p if "*" in words else KINDS[words.split()[0]]
        members = [("name", ctypes.c_char_p), ("on_host", c_bool), ("page", c_int32)]
        text = text[:text.index("} psoup__ops;")]
        for result, name, parameters in re.findall(r"(\w+ ?\*?)\(\*(\w+)\)\(([^)]*)\)", text):
            members.append((name, ctypes.CFUNCTYPE(kind(result), *(kind(p) for p in parameters.split(",")))))
        struct, self.be, error = fields(*members), c_void_p(), _abi.psoup_error()
        create = lib.psoup__cpu_create if device == "cpu" else lib.psoup__gpu_create
        if create(context.handle, byref(self.be), byref(error)) != 0:
            sys.exit("correct_ops.py: " + error.message.decode())
        self.table = ctypes.cast(self.be, POINTER(POINTER(struct)))[0].contents
        self.page, self.called = self.table.page, set()
        self.names = {name for name, _ in members[3:]}

    def __getattr__(self, name):
        function = getattr(self.table, name)
        self.called.add(name)
        return lambda *given: function(self.be, *(a.address if isinstance(a, Buffer) else
                                                  byref(a) if isinstance(a, Structure) else a for a in given))

    def need(self, status, error):
        if status:
            sys.exit("correct_ops.py: " + error.message.decode())


class Buffer:
    """A tensor in device memory. get() reads it, in float64."""

    def __init__(self, x):
        self.x = x.contiguous()
        self.bytes, error = self.x.numel() * self.x.element_size(), _abi.psoup_error()
        self.address = ops.alloc(max(self.bytes, 1), 1, error)
        ops.need(not self.address, error)
        ops.write(self.address, self.x.data_ptr(), self.bytes)
        self.before = self.x.double()

    def get(self, dtype=None):
        out, error = torch.empty_like(self.x), _abi.psoup_error()
        ops.need(ops.read(out.data_ptr(), self.address, self.bytes, error), error)
        return out.double() if dtype is None else out

    def __del__(self):
        ops.release(self.address)


def normal(*shape, dtype=torch.float32):
    return Buffer(torch.randn(*shape).to(dtype))


def blank(*shape):
    """An output: NaN, for what is not written to be seen."""
    return Buffer(torch.full(shape, float("nan")))


def whole(values, dtype=torch.int32):
    return Buffer(torch.as_tensor(values).to(dtype))


def leaf(buffer):
    return buffer.before.clone().requires_grad_()


def cache_of(code):
    """The dtype of a cache for weights of a dtype."""
    return next((c, kind) for c, kind, _ in DTYPES.values() if c == ops.cache(code))


def check(op, what, got, want, tolerance=2e-5):
    global checks, failures
    got = got.get() if isinstance(got, Buffer) else got
    want = want.detach().double().reshape(got.shape)
    error = ((got - want).norm() / (want.norm() + 1e-30)).item()
    checks += 1
    if not error <= tolerance:
        failures += 1
        print("FAILED %s, %s: %.2e of %.0e" % (op, what, error, tolerance))


# ---- rows and layers ---------------------------------------------------------------------------------------


def layers(rows, width):
    x, w, rstd, out = normal(rows, width), normal(width), blank(rows, 1), blank(rows, width)
    ops.rmsnorm(out, rstd, x, None, w, 1e-5, rows, width)
    xl, wl = leaf(x), leaf(w)
    scale = torch.rsqrt(xl.pow(2).mean(-1, True) + 1e-5)
    check("rmsnorm", "out", out, xl * scale * wl)
    check("rmsnorm", "rstd", rstd, scale)
    total, y, out = normal(rows, width), normal(rows, width), blank(rows, width)
    ops.rmsnorm(out, blank(rows, 1), total, y, w, 1e-5, rows, width)
    want = total.before + y.before
    check("rmsnorm", "x with a residual", total, want)
    check("rmsnorm", "out with a residual", out, want * torch.rsqrt(want.pow(2).mean(-1, True) + 1e-5) * w.before)
    dx, dw, dout = normal(rows, width), normal(width), normal(rows, width)
    (xl * scale * wl).backward(dout.before)
    ops.rmsnorm_backward(dx, dw, dout, x, w, rstd, rows, width)
    check("rmsnorm_backward", "dx", dx, dx.before + xl.grad)
    check("rmsnorm_backward", "dweight", dw, dw.before + wl.grad)

    gate, up, out, dgate, dup = normal(rows, width), normal(rows, width), blank(rows, width), blank(rows, width), \
        blank(rows, width)
    ops.swiglu(out, gate, up, rows * width)
    gl, ul = leaf(gate), leaf(up)
    check("swiglu", "out", out, F.silu(gl) * ul)
    (F.silu(gl) * ul).backward(dout.before)
    ops.swiglu_backward(dgate, dup, dout, gate, up, rows * width)
    check("swiglu_backward", "dgate", dgate, gl.grad)
    check("swiglu_backward", "dup", dup, ul.grad)

    sum_, y = normal(rows, width), normal(rows, width)
    ops.add(sum_, y, rows * width)
    check("add", "x", sum_, sum_.before + y.before)


def rope(rows, heads, dim):
    stride = heads * dim + 8
    angle = torch.outer(torch.arange(200.0), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    table, position = Buffer(torch.cat((angle.cos(), angle.sin()), 1)), whole([(7 * i) % 200 for i in range(rows)])
    for inverse in (False, True):
        x = normal(rows, stride)
        ops.rope(x, table, position, rows, heads, dim, stride, inverse)
        cos, sin = table.before[position.x.long()][:, None].chunk(2, -1)
        a, b = x.before[:, :heads * dim].reshape(rows, heads, dim).chunk(2, -1)
        sin = -sin if inverse else sin
        want = x.before.clone()
        want[:, :heads * dim] = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).reshape(rows, -1)
        check("rope", "inverse" if inverse else "x", x, want)


def rope_append(rows, heads, kv, dim, dtype):
    code, kind = cache_of(DTYPES[dtype][0])
    angle = torch.outer(torch.arange(200.0), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    table, position = Buffer(torch.cat((angle.cos(), angle.sin()), 1)), whole([(7 * i) % 200 for i in range(rows)])
    q, k, v = normal(rows, heads * dim), normal(rows, kv * dim), normal(rows, kv * dim)
    place, caches = whole(torch.randperm(rows + 5)[:rows]), [normal(rows + 5, kv * dim, dtype=kind) for _ in range(2)]
    held = Keys(code, kv * dim, caches[0].address, caches[1].address)
    ops.rope_append(q, k, v, table, position, held, place, rows, Shape(heads, kv, dim, dim ** -0.5, DTYPES[dtype][0]))
    cos, sin = table.before[position.x.long()][:, None].chunk(2, -1)
    def turned(x):
        a, b = x.before.reshape(rows, -1, dim).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).reshape(rows, -1)
    check("rope_append", "q, " + dtype, q, turned(q))
    for name, cache, given in zip("kv", caches, (turned(k), v.before)):
        want = cache.before.clone()
        want[place.x.long()] = given
        check("rope_append", name + ", " + dtype, cache, want, DTYPES[dtype][2])


def moves(rows, width, dtype):
    code, kind, tolerance = DTYPES[dtype]
    table, token = normal(50, width, dtype=kind), whole(torch.randint(50, (rows,)))
    out, dtable, dout = blank(rows, width), normal(50, width), normal(rows, width)
    ops.embed(out, Weight(code, 50, width, table.address), token, rows)
    check("embed", dtype, out, table.before[token.x.long()], 0)
    ops.embed_backward(dtable, dout, token, 50, width, rows)
    check("embed_backward", "dtable", dtable, dtable.before.index_add(0, token.x.long(), dout.before))

    place, k, v = whole(torch.randperm(rows + 5)[:rows]), normal(rows, width), normal(rows, width)
    code, kind = cache_of(code)
    cache_k, cache_v = normal(rows + 5, width, dtype=kind), normal(rows + 5, width, dtype=kind)
    ops.cache_append(Keys(code, width, cache_k.address, cache_v.address), place, k, v, rows, width)
    for cache, given in ((cache_k, k), (cache_v, v)):
        want = cache.before.clone()
        want[place.x.long()] = given.x.to(kind).double()
        check("cache_append", dtype, cache, want, 0)

    row, out, scale = whole(torch.randperm(rows + 5)[:rows]), blank(rows, width), normal(rows)
    source, sums = normal(rows + 5, width), normal(rows + 5, width)
    ops.gather_rows(out, source, row, rows, width)
    check("gather_rows", "out", out, source.before[row.x.long()], 0)
    for scales in (scale, None):
        before = sums.get()
        ops.scatter_add_rows(sums, k, scales, row, rows, width)
        part = k.before * scale.before[:, None] if scales else k.before
        check("scatter_add_rows", "out", sums, before.index_add(0, row.x.long(), part))
    if rows > 4:  # one row alone, the others in two sums
        out, part = blank(3, width), k.before * scale.before[:, None]
        ops.combine_rows(out, k, scale, whole((3, 4, 7, rows + 3)), 3, width)
        check("combine_rows", "out", out, torch.stack((k.before[0], part[1:4].sum(0), part[4:].sum(0))))

    w, bias, value, dhidden, dw, dbias, dvalue = normal(width), normal(1), normal(rows + 3), normal(rows + 5, width), \
        normal(width), normal(1), normal(rows + 3)
    at = whole(torch.randperm(rows + 3)[:rows])
    ops.head(value, source, row, at, scale, w, bias, rows, width)
    chosen, dout = source.before[row.x.long()], scale.before * dvalue.before[at.x.long()]
    check("head", "value", value, value.before.index_add(0, at.x.long(), scale.before * (chosen @ w.before + bias.before)))
    ops.head_backward(dhidden, dw, dbias, dvalue, source, row, at, scale, w, rows, width)
    check("head_backward", "dhidden", dhidden, dhidden.before.index_add(0, row.x.long(), torch.outer(dout, w.before)))
    check("head_backward", "dw", dw, dw.before + dout @ chosen)
    check("head_backward", "dbias", dbias, dbias.before + dout.sum())


# ---- random words ------------------------------------------------------------------------------------------


def philox(seed, sequence, position):
    """The word at a position: Philox4x32-10 (Salmon et al. 2011), keyed and counted as cuRAND does."""
    low = 0xffffffff
    block = position // 4
    c, k = [block & low, block >> 32, sequence & low, sequence >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        p, q = c[0] * 0xd2511f53, c[2] * 0xcd9e8d57
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [k[0] + 0x9e3779b9 & low, k[1] + 0xbb67ae85 & low]
    return c[position % 4]


def uniform(*where):
    return (philox(*where) >> 8) * 2.0 ** -24


def dropout(rows, width):
    p = 0.3
    host = [torch.randint(1 << 40, (rows,)) for _ in range(3)]
    settings = Dropout(p, *(t.data_ptr() for t in host))
    x, out, dx = normal(rows, width), blank(rows, width), normal(rows, width)
    ops.dropout(out, x, settings, rows, width)
    kept = torch.tensor([[uniform(int(seed), int(stream), int(offset) * width + j) >= p for j in range(width)]
                         for seed, stream, offset in zip(*host)]).double()
    check("dropout", "out", out, x.before * kept / (1 - p))
    ops.dropout_backward(dx, x, settings, rows, width)
    check("dropout_backward", "dx", dx, dx.before + x.before * kept / (1 - p))


def sample(rows, vocab):
    kinds = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.5)]
    logits, token, logprob = Buffer(3 * torch.randn(rows, vocab)), whole([-7] * rows), blank(rows)
    banned = whole(torch.randint(vocab, (rows, 3)))
    draws = (Draw * rows)(*(Draw(*kinds[i % len(kinds)], 11, 5 + i, 3 * i, banned.address + 12 * i, i % 4 and 3)
                            for i in range(rows)))
    ops.sample(token, logprob, logits, Buffer(torch.frombuffer(bytearray(draws), dtype=torch.uint8)), rows, vocab)
    got = token.get().long()
    for i in range(rows):
        d, row = draws[i], logits.before[i].clone()
        row[banned.x[i][:d.n_banned].long()] = -torch.inf
        order = row.argsort(descending=True, stable=True)
        choices = {int(order[0])}
        if d.temperature > 0:
            p = (row[order][:d.top_k or vocab] / d.temperature).softmax(0)
            p = p[p.cumsum(0) - p < d.top_p]
            edges = (p / p.sum()).cumsum(0)
            u = uniform(d.seed, d.sequence, d.position)
            choices = {int(order[min(int((edges <= at).sum()), len(p) - 1)]) for at in (u - 1e-6, u, u + 1e-6)}
        check("sample", "row %d" % i, torch.tensor([float(int(got[i]) in choices)]), torch.ones(1), 0)
    check("sample", "exp(logprob)", logprob.get().exp(), logits.before.softmax(-1).gather(1, got[:, None]))


# ---- losses and the optimiser ------------------------------------------------------------------------------


def losses(rows, vocab):
    logits, target = normal(rows, vocab), whole(torch.randint(vocab, (rows,)))
    logprob, lse, given = blank(rows), blank(rows), normal(rows)
    ops.logprob(logprob, lse, logits, target, rows, vocab)
    x = leaf(logits)
    want = x.log_softmax(-1).gather(1, target.x.long()[:, None])[:, 0]
    check("logprob", "logprob", logprob, want)
    check("logprob", "lse", lse, x.logsumexp(-1))
    for weights in (given, None):
        dlogits = blank(rows, vocab)
        x.grad = None
        want.backward(given.before if weights else torch.ones(rows).double(), retain_graph=True)
        ops.logprob_backward(dlogits, logits, lse, target, weights, rows, vocab)
        check("logprob_backward", "dlogits", dlogits, x.grad)


def advantages(lengths, gamma, lam):
    first = torch.tensor([0, *lengths]).cumsum(0)
    n = int(first[-1])
    reward, value, advantage, returns = normal(n), normal(n), blank(n), blank(n)
    ops.gae(advantage, returns, reward, value, whole(first), len(lengths), gamma, lam)
    want = torch.zeros(n).double()
    for begin, end in zip(first.tolist(), first.tolist()[1:]):
        for t in reversed(range(begin, end)):
            more = t + 1 < end
            delta = reward.before[t] + (gamma * value.before[t + 1] if more else 0) - value.before[t]
            want[t] = delta + (gamma * lam * want[t + 1] if more else 0)
    check("gae", "advantage, gamma %g, lambda %g" % (gamma, lam), advantage, want, 1e-6)
    check("gae", "returns", returns, want + value.before, 1e-6)


def policies(lengths, whole_response, kl, critic):
    """Losses of responses one after another, what was known of them in the opposite order."""
    what = "%s%s%s" % ("whole responses" if whole_response else "tokens", ", k%d" % kl if kl else "",
                       ", critic" if critic else "")
    clip, value_clip, coefficient, n = 0.2, 0.3, 0.4, sum(lengths)
    old, advantage, ref, old_value, returns = (normal(n) for _ in range(5))
    first, known, slices = 0, n, []
    responses = (Response * len(lengths))()
    for i, length in enumerate(lengths):
        known -= length
        responses[i] = Response(0.5 + i, 0.1 * (i + 1), first, length, known)
        slices.append((slice(first, first + length), slice(known, known + length)))
        first += length
    near = lambda x, far: Buffer((torch.cat([x.before[k] for _, k in slices]) + far * torch.randn(n)).float())
    logprob, value = near(old, 0.02 if whole_response else 0.3), near(old_value, 0.4)
    dlogprob, dvalue = blank(n), blank(n)
    terms = Buffer(torch.full((len(lengths), ctypes.sizeof(Terms) // 8), float("nan"), dtype=torch.float64))
    ops.policy_loss(dlogprob, dvalue if critic else None, terms, logprob, value,
                    Old(old.address, advantage.address, ref.address if kl else None,
                        old_value.address if critic else None, returns.address if critic else None),
                    Buffer(torch.frombuffer(bytearray(responses), dtype=torch.uint8)), len(lengths),
                    Objective(clip, value_clip, coefficient, whole_response, kl))
    x, v, loss, sums = leaf(logprob), leaf(value), 0, []
    for r, (now, then) in zip(responses, slices):
        d, a = x[now] - old.before[then], advantage.before[then]
        d, a = (d.sum()[None], a[:1]) if whole_response else (d, a)
        ratio = d.exp()
        plain, clipped = -a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)
        policy, values, near_value = torch.maximum(plain, clipped).sum(), torch.zeros(1).double().sum(), []
        if kl:
            d_ref = x[now] - ref.before[then]
            policy = policy + r.beta * (d_ref ** 2 / 2 if kl == 2 else (-d_ref).exp() - 1 + d_ref).sum()
        if critic:
            bounded = torch.minimum(torch.maximum(v[now], old_value.before[then] - value_clip),
                                    old_value.before[then] + value_clip)
            errors = [(b - returns.before[then]) ** 2 for b in (v[now], bounded)]
            values = 0.5 * torch.maximum(*errors).sum()
            near_value = errors[1] > errors[0]
        loss = loss + r.scale * (policy + coefficient * values)
        sums.append([policy, values, ratio.sum(), ratio.max(), -d.sum(), (clipped > plain).sum(), sum(near_value)])
    loss.backward()
    check("policy_loss", "dlogprob, " + what, dlogprob, x.grad, 1e-6)
    if critic:
        check("policy_loss", "dvalue, " + what, dvalue, v.grad, 1e-6)
    got = terms.get()
    check("policy_loss", "terms, " + what, got[:, :7],
          torch.tensor([[float(y) for y in row] for row in sums], dtype=torch.float64), 1e-12)
    counts = got[:, 7:].contiguous().view(torch.int64).double()
    check("policy_loss", "counts, " + what, counts, torch.tensor([[k, 1 if whole_response else k, 0] for k in lengths]), 0)


def optimiser(n):
    p, m, v, g = normal(n), Buffer(torch.zeros(n)), Buffer(torch.zeros(n)), normal(n)
    x = leaf(p)
    adamw, error = torch.optim.AdamW([x], lr=1e-2, eps=1e-8, weight_decay=0.1), _abi.psoup_error()
    x.grad = 0.25 * g.before
    for step in range(1, 4):
        adamw.step()
        ops.adamw(p, m, v, g, n, Adamw(1e-2, 0.9, 0.999, 1e-8, 0.1, 1 - 0.9 ** step, 1 - 0.999 ** step, 0.25))
        check("adamw", "step %d of %d" % (step, n), p, x)
    total = c_double()
    ops.need(ops.sum_squares(ctypes.addressof(total), g, n, error), error)
    check("sum_squares", "%d" % n, torch.tensor([total.value], dtype=torch.float64), (g.before ** 2).sum(), 1e-12)
    ops.clip_values(g, n, 0.5)
    check("clip_values", "%d" % n, g, g.before.clamp(-0.5, 0.5), 0)


# ---- linear_mix --------------------------------------------------------------------------------------------


def linear_mix(rows, n_in, n_out, ranks, dtype, apart, bias):
    """`apart`: the adapters read another input than the base, as after dropout."""
    code, kind, tolerance = DTYPES[dtype]
    what = "%s, %d rows, %d to %d, ranks %s" % (dtype, rows, n_in, n_out, ranks)
    n, x, w = len(ranks), normal(rows, n_in), normal(n_out, n_in, dtype=kind)
    xs = normal(rows, n_in) if apart else x
    b = normal(n_out) if bias else None
    weights = torch.randn(rows, max(n, 1)) * (torch.rand(rows, max(n, 1)) < 0.6)
    weights = Buffer(weights[:, :n])
    uses = [weights.x[:, i].nonzero()[:, 0] for i in range(n)]
    first = torch.tensor([0] + [len(u) for u in uses]).cumsum(0).int()
    listed, dweight = whole(torch.cat([*uses, torch.zeros(1)])), Buffer(torch.randn(rows, max(n, 1))[:, :n])
    factors = [(normal(r, n_in), normal(n_out, r), normal(r, n_in), normal(n_out, r)) for r in ranks]
    loras = (Lora * max(n, 1))(*(Lora(r, 0.5 + i, *(f.address for f in fs))
                                 for i, (r, fs) in enumerate(zip(ranks, factors))))
    mix = Mix(n, weights.address, listed.address, first.data_ptr(), dweight.address)
    size = max(sum(len(u) * r for u, r in zip(uses, ranks)), 1)
    weight, y, u, du = Weight(code, n_out, n_in, w.address), blank(rows, n_out), blank(size), blank(size)
    error = _abi.psoup_error()
    ops.need(ops.weights_pack(ctypes.addressof(ctypes.c_void_p(ctypes.addressof(weight))), 1, True, error), error)
    ops.linear_mix(y, u, x, xs, weight, b, ctypes.addressof(loras), mix, rows)
    xl, wl, ml = leaf(x), leaf(w), leaf(weights)
    sl, bl, fl = leaf(xs) if apart else xl, leaf(b) if bias else None, [(leaf(f[0]), leaf(f[1])) for f in factors]
    want = F.linear(xl, wl, bl)
    for i, (a_, b_) in enumerate(fl):
        want = want + ml[:, i:i + 1] * (0.5 + i) * (sl @ a_.T @ b_.T)
    check("linear_mix", what, y, want, tolerance)
    if not apart:
        twins = [(blank(rows, n_out), blank(size)) for _ in range(2)]
        each = (Linear * 2)(*(Linear(y2.address, u2.address, ctypes.addressof(weight), b.address if bias else None,
                                     ctypes.addressof(loras) if n else None) for y2, u2 in twins))
        ops.linear_mix_each(ctypes.addressof(each), 2, x, mix, rows)
        for y2, _ in twins:
            check("linear_mix_each", what, y2, want, tolerance)

    dy, dx, dxs, dw = normal(rows, n_out), normal(rows, n_in), normal(rows, n_in), normal(n_out, n_in)
    dxs, dbias = dxs if apart else dx, normal(n_out)
    want.backward(dy.before)
    ops.linear_mix_backward(dx, dxs, dw, dbias, du, dy, x, xs, u, weight, ctypes.addressof(loras), mix, rows)
    ops.weight_unpack(weight)
    check("linear_mix_backward", "dx, " + what, dx, dx.before + xl.grad, tolerance)
    if apart and n:
        check("linear_mix_backward", "dx_lora, " + what, dxs, dxs.before + sl.grad, tolerance)
    check("linear_mix_backward", "dw, " + what, dw, dw.before + wl.grad, tolerance)
    check("linear_mix_backward", "dbias, " + what, dbias, dbias.before + dy.before.sum(0))
    for f, l in zip(factors, fl):
        if len(l[0]):
            check("linear_mix_backward", "da, " + what, f[2], f[2].before + l[0].grad, tolerance)
            check("linear_mix_backward", "db, " + what, f[3], f[3].before + l[1].grad, tolerance)
    if n:
        used = (weights.before != 0) * (torch.tensor(ranks) > 0)
        check("linear_mix_backward", "dweight, " + what, (dweight.get() - dweight.before) * used, ml.grad * used,
              tolerance)


# ---- attention ---------------------------------------------------------------------------------------------


def attention(dtype, heads, kv, dim, paged):
    code, kind, tolerance = DTYPES[dtype]
    what = "%s, %d of %d heads of %d%s" % (dtype, kv, heads, dim, ", pages" if paged else "")
    page, sizes = ops.page, [(1, 1), (37, 37), (64, 64), (129, 129)]
    if paged:
        sizes = [(1, 1), (37, 37), (1, 129), (20, 83)]
    spans, queries, keys, lists = [], 0, 0, []
    for q, k in sizes:
        spans.append([queries, q, k, len(lists) if paged else keys])
        lists += [0] * (-(-k // page)) if paged else []
        queries, keys = queries + q, keys + k
    lists = torch.randperm(len(lists))
    total = len(lists) * page if paged else keys
    held_code, stored = cache_of(code) if paged else (0, torch.float32)
    k, v = normal(total, kv * dim, dtype=stored), normal(total, kv * dim, dtype=stored)
    q, out, lse = normal(queries, heads * dim), blank(queries, heads * dim), blank(queries, heads)
    table, pages = whole(spans), whole(lists) if paged else None
    dk, dv, dq, dout = normal(total, kv * dim), normal(total, kv * dim), blank(queries, heads * dim), \
        normal(queries, heads * dim)
    held = Keys(held_code, kv * dim, k.address, v.address, dk.address, dv.address,
                pages.address if paged else None)
    batch = Spans(table.address, len(sizes), max(q for q, _ in sizes), max(k for _, k in sizes))
    shape = Shape(heads, kv, dim, dim ** -0.5, code)
    ops.attention(out, lse, q, held, batch, shape)

    ql, kl, vl = leaf(q), leaf(k), leaf(v)
    outs, sums = [], []
    for at, n, length, first in spans:
        rows = torch.arange(length) + first
        if paged:
            rows = lists[first + torch.arange(length) // page] * page + torch.arange(length) % page
        split = lambda x, h: x.reshape(-1, h, dim).transpose(0, 1)
        k_, v_ = (split(x[rows], kv).repeat_interleave(heads // kv, 0) for x in (kl, vl))
        scores = split(ql[at:at + n], heads) @ k_.transpose(1, 2) * dim ** -0.5
        scores = scores.masked_fill(torch.ones(n, length).tril(length - n) == 0, -torch.inf)
        outs.append((scores.softmax(-1) @ v_).transpose(0, 1).reshape(n, -1))
        sums.append(scores.logsumexp(-1).T)
    check("attention", what, out, torch.cat(outs), tolerance)
    check("attention", "lse, " + what, lse, torch.cat(sums), tolerance)
    if paged:
        return
    torch.cat(outs).backward(dout.before)
    ops.attention_backward(dq, dout, q, out, lse, held, batch, shape)
    tolerance = max(tolerance, DTYPES["bf16"][2]) if dtype != "f32" else tolerance  # f16 may be taken in bf16
    for name, got, want in (("dq", dq, ql.grad), ("dk", dk, dk.before + kl.grad), ("dv", dv, dv.before + vl.grad)):
        check("attention_backward", name + ", " + what, got, want, tolerance)


# ---- the program -------------------------------------------------------------------------------------------


def main():
    error = _abi.psoup_error()
    ops.need(ops.reserve(1024, 1024, error), error)
    for rows, width in SIZES:
        layers(rows, width)
        losses(rows, width + 1)
        moves(rows, width, "f32")
        sample(rows, width)
    for rows, heads, dim in ((1, 1, 64), (37, 3, 128), (129, 2, 80)):
        rope(rows, heads, dim)
    for dtype in DTYPES:
        rope_append(37, 4, 2, 64, dtype)
    dropout(37, 65)
    lengths = (1, 37, 64, 127, 128, 129, 640)
    for gamma, lam in ((1, 0.95), (0.9, 0.8), (1, 1)):
        advantages(lengths, gamma, lam)
    for kind in ((False, 0, True), (True, 0, False), (False, 3, False), (False, 2, False), (True, 3, True)):
        policies(lengths, *kind)
    for n in (1, 1000, 65537):
        optimiser(n)
    for dtype in DTYPES:
        moves(37, 96, dtype)
        for rows, ranks, apart, bias in ((1, (16, 4), False, False), (5, (8, 0, 16), False, True),
                                         (70, (), False, False), (130, (16, 3, 16), True, True)):
            linear_mix(rows, 128, 192, ranks, dtype, apart, bias)
        for heads, kv, dim in ((2, 2, 64), (4, 1, 128)):
            for paged in (False, True) if ops.page else (False,):
                attention(dtype, heads, kv, dim, paged)
    print("%d checks of ops against float64 PyTorch, %d failed" % (checks, failures))
    missed = ops.names - ops.called - NOT_HERE
    if missed:
        sys.exit("correct_ops.py: no check calls %s" % ", ".join(sorted(missed)))
    return failures > 0


context = psoup.Context(device=device)
ops = Table(context)
sys.exit(main())
