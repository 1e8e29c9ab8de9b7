"""A LLaMA in plain PyTorch, of any dtype, whose every row has its own mix of LoRA adapters: the oracle in float64,
and the peer that decodes with a static cache."""
import torch
import torch.nn.functional as F

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")


def names(config):
    """Every weight's name and shape."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = ((d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f))
    yield "model.embed_tokens.weight", (v, d)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (v, d)
    for i in range(config["num_hidden_layers"]):
        layer = "model.layers.%d." % i
        yield layer + "input_layernorm.weight", (d,)
        yield layer + "post_attention_layernorm.weight", (d,)
        for name, shape in zip(LINEARS, shapes):
            yield layer + name + ".weight", shape


class Llama:
    """weights: by Hugging Face's names. adapters: a list of dicts {"model.layers.0.self_attn.q_proj.lora_A": …},
    with one scale for all. Batches are [rows, length]; mix [rows, adapters]."""

    def __init__(self, config, weights, adapters=(), scale=2.0):
        self.config, self.w, self.scale = config, weights, scale
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config["hidden_size"] // self.heads
        self.stacked = {}  # linear: ([Σ rank, in], [out, Σ rank], the adapter of each)
        for layer in range(config["num_hidden_layers"]):
            for linear in LINEARS:
                name = "model.layers.%d.%s" % (layer, linear)
                have = [(i, a[name + ".lora_A"], a[name + ".lora_B"]) for i, a in enumerate(adapters)
                        if name + ".lora_A" in a]
                if have:
                    self.stacked[name] = (torch.cat([a for _, a, _ in have]), torch.cat([b for _, _, b in have], 1),
                                          torch.tensor([i for i, a, _ in have for _ in range(len(a))],
                                                       device=have[0][1].device))

    def rope(self, length, like):
        inverse = self.config["rope_theta"] ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
        return angle.cos().to(like), angle.sin().to(like)

    def linear(self, x, name, mix):
        y = F.linear(x, self.w[name + ".weight"])
        if mix is not None and name in self.stacked:
            a, b, owner = self.stacked[name]
            y = y + F.linear(F.linear(x, a) * (self.scale * mix[:, owner])[:, None], b)
        return y

    def norm(self, x, name):
        scale = torch.rsqrt(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).pow(2).mean(-1, True)
                            + self.config["rms_norm_eps"])
        return (x * scale).to(x.dtype) * self.w[name]

    def hidden(self, tokens, mix=None, cache=None, at=None, rope=None):
        """With a cache, [layers][2] of [rows, kv heads, most, dim]: row r's tokens are at positions at …, a tensor.
        Without one the whole sequence is causal."""
        rows, length = tokens.shape
        x = F.embedding(tokens, self.w["model.embed_tokens.weight"])
        cos, sin = rope if rope is not None else self.rope(length, x)
        cos, sin = (cos[at], sin[at]) if at is not None else (cos[:length], sin[:length])
        split = lambda y, n: y.view(rows, length, n, self.dim).transpose(1, 2)
        def rotate(y):
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        mask = None
        if cache is not None and length == 1:
            mask = (torch.arange(cache[0][0].shape[2], device=tokens.device) <= at).view(1, 1, 1, -1)
        for i in range(self.config["num_hidden_layers"]):
            name = "model.layers.%d." % i
            h = self.norm(x, name + "input_layernorm.weight")
            q, k, v = (self.linear(h, name + "self_attn.%s_proj" % c, mix) for c in "qkv")
            q, k, v = rotate(split(q, self.heads)), rotate(split(k, self.kv)), split(v, self.kv)
            if cache is not None:
                cache[i][0].index_copy_(2, at, k)
                cache[i][1].index_copy_(2, at, v)
                if length == 1:
                    k, v = cache[i]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               enable_gqa=self.kv != self.heads)
            x = x + self.linear(y.transpose(1, 2).reshape(rows, length, -1), name + "self_attn.o_proj", mix)
            h = self.norm(x, name + "post_attention_layernorm.weight")
            h = F.silu(self.linear(h, name + "mlp.gate_proj", mix)) * self.linear(h, name + "mlp.up_proj", mix)
            x = x + self.linear(h, name + "mlp.down_proj", mix)
        return self.norm(x, "model.norm.weight")

    def logits(self, hidden):
        return F.linear(hidden, self.w["lm_head.weight"])
