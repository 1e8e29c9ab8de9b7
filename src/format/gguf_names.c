/* Names and row orders: llama.cpp's and Hugging Face's.
 * Sources: llama.cpp, gguf-py/gguf/tensor_mapping.py (names) and conversion/llama.py, LlamaModel.permute
 * (rows of q and k, for the architecture "llama" only: its rotation pairs neighbours, where transformers
 * pairs the halves of a head). */
#include "format/gguf.h"

#include <stdio.h>
#include <string.h>

typedef struct pair {
    const char *gguf, *hf;
} pair;

static const pair outer[] = {{"token_embd", "model.embed_tokens"},
                             {"output_norm", "model.norm"},
                             {"output", "lm_head"}};
static const pair inner[] = {{"attn_norm", "input_layernorm"},
                             {"ffn_norm", "post_attention_layernorm"},
                             {"attn_q", "self_attn.q_proj"},
                             {"attn_k", "self_attn.k_proj"},
                             {"attn_v", "self_attn.v_proj"},
                             {"attn_output", "self_attn.o_proj"},
                             {"ffn_gate", "mlp.gate_proj"},
                             {"ffn_up", "mlp.up_proj"},
                             {"ffn_down", "mlp.down_proj"}};
enum { OUTER = sizeof outer / sizeof *outer, INNER = sizeof inner / sizeof *inner };

/* What may follow a module's name; "" is the module itself. */
static bool is_ending(const char *text) {
    static const char *const endings[] = {"", ".weight", ".bias", ".weight.lora_a",
                                          ".weight.lora_b", ".lora_A.weight", ".lora_B.weight"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (strcmp(text, endings[i]) == 0)
            return true;
    return false;
}

/* Whether text is `name` and an ending, which *ending receives. */
static bool is_module(const char *text, const char *name, const char **ending) {
    size_t n = strlen(name);
    *ending = text + n;
    return strncmp(text, name, n) == 0 && is_ending(text + n);
}

/* "blk.12." of text, no leading zeros; *rest receives what follows, *digits the number's place. */
static bool has_layer(const char *text, const char *prefix, const char **digits, int *n,
                      const char **rest) {
    size_t length = strlen(prefix);
    if (strncmp(text, prefix, length) != 0)
        return false;
    *digits = text + length;
    *n = (int)strspn(*digits, "0123456789");
    *rest = *digits + *n + 1;
    return *n >= 1 && *n <= 6 && (*n == 1 || **digits != '0') && (*digits)[*n] == '.';
}

static bool rename_to(const char *name, bool to_hf, char *out, size_t room) {
    const char *ending, *digits, *rest;
    int n;
    for (size_t i = 0; i < OUTER; i++) {
        const char *from = to_hf ? outer[i].gguf : outer[i].hf, *to = to_hf ? outer[i].hf : outer[i].gguf;
        if (is_module(name, from, &ending)) {
            snprintf(out, room, "%s%s", to, ending);
            return true;
        }
    }
    if (!has_layer(name, to_hf ? "blk." : "model.layers.", &digits, &n, &rest))
        return false;
    for (size_t i = 0; i < INNER; i++) {
        const char *from = to_hf ? inner[i].gguf : inner[i].hf, *to = to_hf ? inner[i].hf : inner[i].gguf;
        if (is_module(rest, from, &ending)) {
            snprintf(out, room, "%s%.*s.%s%s", to_hf ? "model.layers." : "blk.", n, digits, to, ending);
            return true;
        }
    }
    return false;
}

bool psoup__gguf_to_hf(const char *name, char *out) {
    return rename_to(name, true, out, PSOUP__GGUF_NAME);
}

bool psoup__gguf_from_hf(const char *name, char *out) {
    return rename_to(name, false, out, PSOUP__GGUF_NAME);
}

bool psoup__gguf_to_peft(const char *name, char *out) {
    static const struct {
        const char *from, *to;
    } endings[] = {{".weight.lora_a", ".lora_A.weight"}, {".weight.lora_b", ".lora_B.weight"}};
    char module[PSOUP__GGUF_MAX_NAME + 1], hf[PSOUP__GGUF_NAME - 40];
    size_t length = strlen(name);
    for (size_t i = 0; i < 2; i++) {
        size_t n = strlen(endings[i].from);
        if (length <= n || length > PSOUP__GGUF_MAX_NAME || strcmp(name + length - n, endings[i].from) != 0)
            continue;
        snprintf(module, sizeof module, "%.*s", (int)(length - n), name);
        /* of the embedding llama.cpp has the factors the other way round, and PEFT other names */
        if (strcmp(module, "token_embd") == 0 || !rename_to(module, true, hf, sizeof hf))
            return false;
        snprintf(out, PSOUP__GGUF_NAME, "base_model.model.%s%s", hf, endings[i].to);
        return true;
    }
    return false;
}

/* ---- rows --------------------------------------------------------------------------------------- */

psoup_status psoup__gguf_layout_of(const psoup__gguf *file, psoup__gguf_layout *out,
                                   psoup_error *error) {
    const char *name = "";
    size_t length = 0;
    int64_t heads = 0, kv_heads = 0;
    *out = (psoup__gguf_layout){.permuted = false};
    if (psoup__gguf_is(file, "general.architecture", "llama")) {
        out->permuted = true;
        heads = psoup__gguf_integer(file, "llama.attention.head_count", 0);
        kv_heads = psoup__gguf_integer(file, "llama.attention.head_count_kv", heads);
    } else if (psoup__gguf_is(file, "general.architecture", "qwen2")) {
        heads = psoup__gguf_integer(file, "qwen2.attention.head_count", 0);
        kv_heads = psoup__gguf_integer(file, "qwen2.attention.head_count_kv", heads);
    } else {
        psoup__gguf_string(file, "general.architecture", &name, &length);
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: general.architecture: \"%.*s\"; expected llama or qwen2",
                           psoup__gguf_path(file), (int)(length < 60 ? length : 60), name);
    }
    if (heads < 0 || heads > INT32_MAX || kv_heads < 0 || kv_heads > heads)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: attention.head_count: %lld heads, %lld of keys and values; expected at "
                           "most as many of these",
                           psoup__gguf_path(file), (long long)heads, (long long)kv_heads);
    const char *architecture = out->permuted ? "llama" : "qwen2";
    char key[64];
    snprintf(key, sizeof key, "%s.embedding_length", architecture);
    int64_t width = psoup__gguf_integer(file, key, 0);
    snprintf(key, sizeof key, "%s.attention.key_length", architecture);
    int64_t head_dim = psoup__gguf_integer(file, key, heads > 0 ? width / heads : 0);
    out->head_dim = head_dim > 0 && head_dim <= 1 << 20 ? (int32_t)head_dim : 0;
    out->heads = (int32_t)heads;
    out->kv_heads = (int32_t)kv_heads;
    return PSOUP_OK;
}

int32_t psoup__gguf_heads(const psoup__gguf_layout *layout, const char *hf_name) {
    static const char peft[] = "base_model.model.";
    const char *digits, *rest, *ending;
    int n;
    if (strncmp(hf_name, peft, strlen(peft)) == 0)
        hf_name += strlen(peft);
    if (!layout->permuted || !has_layer(hf_name, "model.layers.", &digits, &n, &rest))
        return 0;
    bool q = is_module(rest, "self_attn.q_proj", &ending);
    if (!q && !is_module(rest, "self_attn.k_proj", &ending))
        return 0;
    if (strcmp(ending, ".weight.lora_a") == 0 || strcmp(ending, ".lora_A.weight") == 0)
        return 0; /* A's rows are the rank */
    return q ? layout->heads : layout->kv_heads;
}

/* Whether the tensor is q's or k's of a permuted architecture. */
static bool is_permuted(const psoup__gguf_layout *layout, const char *hf_name) {
    const psoup__gguf_layout one = {.permuted = layout->permuted, .heads = 1, .kv_heads = 1};
    return psoup__gguf_heads(&one, hf_name) > 0;
}

psoup_status psoup__gguf_set_heads(const psoup__gguf_layout *layout, const char *path,
                                   const char *name, const char *hf_name, psoup__tensor *tensor,
                                   psoup_error *error) {
    if (!is_permuted(layout, hf_name))
        return PSOUP_OK;
    tensor->heads = psoup__gguf_heads(layout, hf_name);
    if (tensor->heads <= 0)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: its rows are interleaved by heads, and there is no "
                           "llama.attention.head_count to say how many; the model it is for knows",
                           path, name);
    int64_t rows = tensor->rank > 0 ? tensor->shape[0] : 0;
    if (tensor->rank < 1 || tensor->rank > 2 || rows % ((int64_t)tensor->heads * 2) != 0)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: %lld rows are no %d heads of an even size", path, name,
                           (long long)rows, (int)tensor->heads);
    if (layout->head_dim > 0 && rows != (int64_t)tensor->heads * layout->head_dim)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %.200s: %lld rows; expected %d heads of %d",
                           path, name, (long long)rows, (int)tensor->heads, (int)layout->head_dim);
    return PSOUP_OK;
}
