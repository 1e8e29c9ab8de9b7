/* tokenizer.json and tokenizer_config.json as GGUF metadata. llama.cpp knows two kinds that models here
 * have: byte-level BPE ("gpt2", with the name of its way of splitting text) and SentencePiece's BPE
 * ("llama", which merges by score). Sources: llama.cpp, conversion/base.py, gguf-py/gguf/vocab.py,
 * src/llama-vocab.cpp. */
#include "format/gguf.h"

#include <stdlib.h>
#include <string.h>

enum { SPARE = 1 << 20 }; /* ids without a token: an embedding padded to a round number */

#define CASES "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define REST "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define TEKKEN "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER       \
               "*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

const psoup__gguf_pre psoup__gguf_pres[] = {
    {"gpt-2", NULL, false, false},
    {"llama-bpe", CASES "\\p{N}{1,3}" REST, false, true},
    {"smaug-bpe", CASES "\\p{N}{1,3}" REST, false, false},
    {"qwen2", CASES "\\p{N}" REST, false, false},
    {"tekken", TEKKEN, false, true},
    {"smollm", NULL, true, false},
    /* other names of the same, only read */
    {"llama3", CASES "\\p{N}{1,3}" REST, false, true},
    {"llama-v3", CASES "\\p{N}{1,3}" REST, false, true},
    {"pixtral", CASES "\\p{N}{1,3}" REST, false, true},
    {"falcon3", CASES "\\p{N}{1,3}" REST, false, true},
    {"dbrx", CASES "\\p{N}{1,3}" REST, false, false},
    {"deepseek-r1-qwen", CASES "\\p{N}" REST, false, false},
    {"starcoder", NULL, true, false},
    {"refact", NULL, true, false},
    {"phi-2", NULL, false, false},
    {NULL, NULL, false, false},
};

/* What is gathered before it is written. */
typedef struct vocabulary {
    psoup__gguf_writer *writer;
    psoup_context *context;
    char *path;          /* of tokenizer.json, for messages */
    const psoup_json *root, *model;
    psoup_json *config;  /* tokenizer_config.json, or NULL */
    size_t n;            /* tokens: the model's vocab_size */
    const char **texts;  /* [n] NULL: none has this id */
    float *scores;       /* [n] */
    int32_t *types;      /* [n] psoup__gguf_token */
    psoup__map *ids;     /* text → id */
    psoup_error *error;
} vocabulary;

static const char *type_of(const psoup_json *object) {
    return psoup_json_string(psoup_json_get(object, "type"), "");
}

static psoup_status refuse(const vocabulary *v, const char *what, const char *value) {
    return psoup__fail(v->error, PSOUP_ERROR_UNSUPPORTED,
                       "%s: %s \"%.100s\" has no equal in llama.cpp's tokenizers", v->path, what, value);
}

/* ---- how text is split and normalised ------------------------------------------------------------ */

/* Part i of a Sequence, or the object itself as the only one; NULL past the end. */
static const psoup_json *part(const psoup_json *object, const char *list, size_t i) {
    if (strcmp(type_of(object), "Sequence") == 0)
        return psoup_json_at(psoup_json_get(object, list), i);
    return i == 0 && psoup_json_kind(object) == PSOUP_JSON_OBJECT ? object : NULL;
}

/* The name of the pre-tokenizer: an optional Split or Digits, then ByteLevel. */
static psoup_status find_pre(const vocabulary *v, const char **out) {
    const psoup_json *pre = psoup_json_get(v->root, "pre_tokenizer");
    const psoup_json *first = part(pre, "pretokenizers", 0), *last = part(pre, "pretokenizers", 1);
    const char *regex = NULL;
    bool digits = false, whole = psoup_json_bool(psoup_json_get(v->model, "ignore_merges"), 0);
    if (part(pre, "pretokenizers", 2) != NULL)
        return refuse(v, "pre_tokenizer", "Sequence of more than two");
    if (last == NULL)
        last = first;
    else if (strcmp(type_of(first), "Split") == 0) {
        regex = psoup_json_string(psoup_json_get(psoup_json_get(first, "pattern"), "Regex"), "");
        if (strcmp(psoup_json_string(psoup_json_get(first, "behavior"), ""), "Isolated") != 0 ||
            psoup_json_bool(psoup_json_get(first, "invert"), 0))
            return refuse(v, "pre_tokenizer", "Split that is inverted or not Isolated");
    } else if (strcmp(type_of(first), "Digits") == 0 &&
               psoup_json_bool(psoup_json_get(first, "individual_digits"), 0)) {
        digits = true;
    } else {
        return refuse(v, "pre_tokenizer", type_of(first));
    }
    if (strcmp(type_of(last), "ByteLevel") != 0)
        return refuse(v, "pre_tokenizer", type_of(last));
    if (psoup_json_bool(psoup_json_get(last, "add_prefix_space"), 1))
        return refuse(v, "pre_tokenizer", "ByteLevel with add_prefix_space");
    if (psoup_json_bool(psoup_json_get(last, "use_regex"), 1) != (regex == NULL))
        return refuse(v, "pre_tokenizer", "ByteLevel with or without use_regex, against its Split");
    for (const psoup__gguf_pre *p = psoup__gguf_pres; p->name != NULL; p++)
        if (p->digits == digits && p->ignore_merges == whole && (p->regex == NULL) == (regex == NULL) &&
            (regex == NULL || strcmp(p->regex, regex) == 0)) {
            *out = p->name;
            return PSOUP_OK;
        }
    return refuse(v, whole ? "pre_tokenizer with ignore_merges" : "pre_tokenizer",
                  regex != NULL ? regex : type_of(first));
}

static bool replaces_spaces(const psoup_json *object) {
    const char *what = psoup_json_string(psoup_json_get(psoup_json_get(object, "pattern"), "String"), "");
    const char *with = psoup_json_string(psoup_json_get(object, "content"), "");
    return strcmp(type_of(object), "Replace") == 0 && strcmp(what, " ") == 0 &&
           strcmp(with, "\xe2\x96\x81") == 0;
}

/* SentencePiece's spaces become U+2581, and one is put before the text or not. */
static psoup_status find_prefix(const vocabulary *v, bool *out) {
    const psoup_json *normalizer = psoup_json_get(v->root, "normalizer");
    const psoup_json *pre = psoup_json_get(v->root, "pre_tokenizer");
    const psoup_json *first = part(normalizer, "normalizers", 0);
    if (psoup_json_kind(pre) == PSOUP_JSON_NULL && first != NULL) {
        bool prepend = strcmp(type_of(first), "Prepend") == 0;
        if (prepend && strcmp(psoup_json_string(psoup_json_get(first, "prepend"), ""), "\xe2\x96\x81") != 0)
            return refuse(v, "normalizer", "Prepend");
        if (!replaces_spaces(part(normalizer, "normalizers", prepend)) ||
            part(normalizer, "normalizers", prepend + 1u) != NULL)
            return refuse(v, "normalizer", type_of(normalizer));
        *out = prepend;
        return PSOUP_OK;
    }
    if (first != NULL)
        return refuse(v, "normalizer", type_of(normalizer));
    const char *scheme = psoup_json_string(psoup_json_get(pre, "prepend_scheme"), NULL);
    if (strcmp(type_of(pre), "Metaspace") != 0 ||
        strcmp(psoup_json_string(psoup_json_get(pre, "replacement"), ""), "\xe2\x96\x81") != 0 ||
        psoup_json_bool(psoup_json_get(pre, "split"), 1))
        return refuse(v, "pre_tokenizer", type_of(pre));
    *out = scheme != NULL ? strcmp(scheme, "never") != 0
                          : psoup_json_bool(psoup_json_get(pre, "add_prefix_space"), 1);
    return PSOUP_OK;
}

/* ---- tokens ------------------------------------------------------------------------------------- */

static psoup_status add_token(vocabulary *v, const char *text, int64_t id, int32_t type) {
    if (id < 0 || (uint64_t)id >= v->n)
        return psoup__fail(v->error, PSOUP_ERROR_FORMAT,
                           "%s: token \"%.60s\" has id %lld; config.json's vocab_size is %zu", v->path, text,
                           (long long)id, v->n);
    if (v->texts[id] != NULL && strcmp(v->texts[id], text) != 0)
        return psoup__fail(v->error, PSOUP_ERROR_FORMAT, "%s: tokens \"%.60s\" and \"%.60s\" have one id %lld",
                           v->path, v->texts[id], text, (long long)id);
    v->texts[id] = text;
    v->types[id] = type;
    return psoup__map_set(v->ids, text, strlen(text), id, NULL, v->error);
}

static psoup_status gather(vocabulary *v) {
    psoup_status status;
    const psoup_json *vocab = psoup_json_get(v->model, "vocab"), *id;
    const psoup_json *added = psoup_json_get(v->root, "added_tokens");
    const char *text = NULL;
    size_t have = psoup_json_size(vocab) + psoup_json_size(added);
    if (psoup_json_kind(vocab) != PSOUP_JSON_OBJECT || v->n > have + SPARE)
        return psoup__fail(v->error, PSOUP_ERROR_FORMAT,
                           "%s: %zu tokens for config.json's vocab_size %zu", v->path, have, v->n);
    status = PSOUP_ERROR_MEMORY;
    if ((v->texts = psoup__alloc(v->context, v->n, sizeof *v->texts, v->error)) == NULL ||
        (v->scores = psoup__alloc(v->context, v->n, sizeof *v->scores, v->error)) == NULL ||
        (v->types = psoup__alloc(v->context, v->n, sizeof *v->types, v->error)) == NULL)
        goto fail;
    PSOUP__TRY(psoup__map_create(v->context, have, &v->ids, v->error));
    while ((id = psoup_json_next(vocab, &text)) != NULL)
        PSOUP__TRY(add_token(v, text, psoup_json_integer(id, -1), PSOUP__GGUF_NORMAL));
    for (size_t i = 0; i < psoup_json_size(added); i++) {
        const psoup_json *token = psoup_json_at(added, i);
        PSOUP__TRY(add_token(v, psoup_json_string(psoup_json_get(token, "content"), ""),
                             psoup_json_integer(psoup_json_get(token, "id"), -1),
                             psoup_json_bool(psoup_json_get(token, "special"), 0)
                                 ? PSOUP__GGUF_CONTROL
                                 : PSOUP__GGUF_USER_DEFINED));
    }
    return PSOUP_OK;
fail:
    return status;
}

/* The two sides of merge i, "a b" or ["a", "b"], joined by `between`. */
static psoup_status merge_text(const vocabulary *v, const psoup_json *merge, const char *between,
                               psoup__buffer *out) {
    const char *text = psoup_json_string(merge, NULL);
    const char *left = psoup_json_string(psoup_json_at(merge, 0), text);
    const char *right = psoup_json_string(psoup_json_at(merge, 1), NULL);
    size_t n = left != NULL ? strlen(left) : 0;
    if (text != NULL) {
        n = strcspn(text, " ");
        right = text[n] == ' ' ? text + n + 1 : NULL;
    }
    if (left == NULL || right == NULL)
        return psoup__fail(v->error, PSOUP_ERROR_FORMAT, "%s: merges: expected pairs of texts", v->path);
    psoup__buffer_append(out, left, n);
    psoup__buffer_append(out, between, strlen(between));
    psoup__buffer_append(out, right, strlen(right));
    return out->failed ? psoup__out_of_memory(v->error, out->length) : PSOUP_OK;
}

static bool is_byte_token(const char *text) {
    return strlen(text) == 6 && strncmp(text, "<0x", 3) == 0 && text[5] == '>' &&
           strspn(text + 3, "0123456789ABCDEFabcdef") == 2;
}

/* llama.cpp joins the neighbours whose joint text has the best score; tokenizer.json those of the first
 * merge. So a token's score is less the later the first merge that makes it. */
static psoup_status score(vocabulary *v) {
    psoup_status status = PSOUP_OK;
    const psoup_json *merges = psoup_json_get(v->model, "merges");
    const char *unknown = psoup_json_string(psoup_json_get(v->model, "unk_token"), NULL);
    psoup__buffer text = {.context = v->context};
    for (size_t i = 0; i < v->n; i++)
        v->scores[i] = PSOUP__GGUF_UNREACHED; /* no merge makes it: a character, or never made */
    for (size_t i = 0; i < psoup_json_size(merges); i++) {
        int64_t id;
        text.length = 0;
        PSOUP__TRY(merge_text(v, psoup_json_at(merges, i), "", &text));
        if (psoup__map_get(v->ids, text.data, text.length, &id) && v->scores[id] == PSOUP__GGUF_UNREACHED)
            v->scores[id] = -(float)i;
    }
    for (size_t i = 0; i < v->n; i++) {
        if (v->texts[i] == NULL)
            continue;
        if (v->types[i] != PSOUP__GGUF_NORMAL) {
            v->scores[i] = -1000; /* found before anything is merged */
        } else if (is_byte_token(v->texts[i])) {
            v->types[i] = PSOUP__GGUF_BYTE;
            v->scores[i] = 0;
        } else if (unknown != NULL && strcmp(v->texts[i], unknown) == 0) {
            v->types[i] = PSOUP__GGUF_UNKNOWN;
            v->scores[i] = 0;
        }
    }
fail:
    psoup__buffer_free(&text);
    return status;
}

/* ---- writing ------------------------------------------------------------------------------------ */

static void append_text(psoup__buffer *out, const char *text, size_t n) {
    unsigned char length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (unsigned char)((uint64_t)n >> (8 * i));
    psoup__buffer_append(out, length, 8);
    psoup__buffer_append(out, text, n);
}

static psoup_status set_strings(vocabulary *v, const char *key, size_t count, psoup__buffer *all) {
    if (all->failed)
        return psoup__out_of_memory(v->error, all->length);
    return psoup__gguf_set_array(v->writer, key, PSOUP__GGUF_STRING, count, all->data, all->length,
                                 v->error);
}

static psoup_status write_tokens(vocabulary *v, bool scored) {
    psoup_status status;
    psoup__buffer all = {.context = v->context};
    char hole[32];
    for (size_t i = 0; i < v->n; i++) {
        const char *text = v->texts[i];
        if (text == NULL) {
            text = psoup__gguf_hole(i, hole);
            v->types[i] = PSOUP__GGUF_UNUSED;
        }
        append_text(&all, text, strlen(text));
    }
    PSOUP__TRY(set_strings(v, "tokenizer.ggml.tokens", v->n, &all));
    if (scored)
        PSOUP__TRY(psoup__gguf_set_array(v->writer, "tokenizer.ggml.scores", PSOUP__GGUF_FLOAT32, v->n,
                                         v->scores, v->n * sizeof *v->scores, v->error));
    PSOUP__TRY(psoup__gguf_set_array(v->writer, "tokenizer.ggml.token_type", PSOUP__GGUF_INT32, v->n,
                                     v->types, v->n * sizeof *v->types, v->error));
fail:
    psoup__buffer_free(&all);
    return status;
}

static psoup_status write_merges(vocabulary *v) {
    psoup_status status = PSOUP_OK;
    const psoup_json *merges = psoup_json_get(v->model, "merges");
    psoup__buffer all = {.context = v->context}, one = {.context = v->context};
    for (size_t i = 0; i < psoup_json_size(merges); i++) {
        one.length = 0;
        PSOUP__TRY(merge_text(v, psoup_json_at(merges, i), " ", &one));
        append_text(&all, one.data, one.length);
    }
    PSOUP__TRY(set_strings(v, "tokenizer.ggml.merges", psoup_json_size(merges), &all));
fail:
    psoup__buffer_free(&all);
    psoup__buffer_free(&one);
    return status;
}

/* The text of tokenizer_config.json's "bos_token": a string, or an object with its content. */
static const char *named(const vocabulary *v, const char *field) {
    const psoup_json *value = psoup_json_get(v->config, field);
    return psoup_json_string(psoup_json_get(value, "content"), psoup_json_string(value, NULL));
}

/* Whether the post-processor puts a token of this id first (or last). */
static bool template_has(const vocabulary *v, int64_t id, bool first) {
    const psoup_json *post = psoup_json_get(v->root, "post_processor"), *p;
    for (size_t i = 0; (p = part(post, "processors", i)) != NULL; i++) {
        const psoup_json *single = psoup_json_get(p, "single");
        size_t n = psoup_json_size(single);
        const psoup_json *end = psoup_json_at(single, first ? 0 : n - (n > 0));
        const char *text =
            psoup_json_string(psoup_json_get(psoup_json_get(end, "SpecialToken"), "id"), NULL);
        int64_t found;
        if (text != NULL && psoup__map_get(v->ids, text, strlen(text), &found) && found == id)
            return true;
    }
    return false;
}

static psoup_status write_special(vocabulary *v, const psoup_model_config *c) {
    psoup_status status;
    const struct {
        const char *field, *key;
        int64_t otherwise;
    } ids[] = {{"bos_token", "tokenizer.ggml.bos_token_id", c->bos_token_id},
               {"eos_token", "tokenizer.ggml.eos_token_id", c->eos_token_id},
               {"unk_token", "tokenizer.ggml.unknown_token_id", -1},
               {"pad_token", "tokenizer.ggml.padding_token_id", c->pad_token_id}};
    int64_t found[4];
    for (size_t i = 0; i < 4; i++) {
        const char *text = named(v, ids[i].field);
        found[i] = ids[i].otherwise;
        if (text != NULL)
            psoup__map_get(v->ids, text, strlen(text), &found[i]);
        if (found[i] >= 0 && (size_t)found[i] < v->n)
            PSOUP__TRY(psoup__gguf_set_uint32(v->writer, ids[i].key, (uint32_t)found[i], v->error));
    }
    PSOUP__TRY(psoup__gguf_write_more_eos(v->writer, c, found[1], v->error));
    bool bos = found[0] >= 0 && psoup_json_bool(psoup_json_get(v->config, "add_bos_token"),
                                                template_has(v, found[0], true));
    bool eos = found[1] >= 0 && psoup_json_bool(psoup_json_get(v->config, "add_eos_token"),
                                                template_has(v, found[1], false));
    PSOUP__TRY(psoup__gguf_set_bool(v->writer, "tokenizer.ggml.add_bos_token", bos, v->error));
    PSOUP__TRY(psoup__gguf_set_bool(v->writer, "tokenizer.ggml.add_eos_token", eos, v->error));
fail:
    return status;
}

static psoup_status write_vocabulary(vocabulary *v, const psoup_model_config *config) {
    psoup_status status;
    const char *pre = NULL;
    bool prefix = true, spm = psoup_json_bool(psoup_json_get(v->model, "byte_fallback"), 0);
    static const char *const foreign[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"};
    const char *kind = psoup_json_string(psoup_json_get(v->model, "type"), "BPE");
    if (strcmp(kind, "BPE") != 0)
        return refuse(v, "model", kind);
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        const psoup_json *value = psoup_json_get(v->model, foreign[i]);
        if (psoup_json_real(value, 0) != 0 || *psoup_json_string(value, "") != '\0')
            return refuse(v, "model with", foreign[i]);
    }
    PSOUP__TRY(gather(v));
    PSOUP__TRY(psoup__gguf_set_string(v->writer, "tokenizer.ggml.model", spm ? "llama" : "gpt2", v->error));
    if (spm) {
        PSOUP__TRY(find_prefix(v, &prefix));
        PSOUP__TRY(score(v));
        PSOUP__TRY(psoup__gguf_set_string(v->writer, "tokenizer.ggml.pre", "default", v->error));
        PSOUP__TRY(psoup__gguf_set_bool(v->writer, "tokenizer.ggml.add_space_prefix", prefix, v->error));
    } else {
        const psoup_json *normalizer = psoup_json_get(v->root, "normalizer");
        if (psoup_json_kind(normalizer) != PSOUP_JSON_NULL && strcmp(type_of(normalizer), "NFC") != 0)
            return refuse(v, "normalizer", type_of(normalizer));
        PSOUP__TRY(find_pre(v, &pre));
        PSOUP__TRY(psoup__gguf_set_string(v->writer, "tokenizer.ggml.pre", pre, v->error));
        PSOUP__TRY(write_merges(v));
    }
    PSOUP__TRY(write_tokens(v, spm));
    PSOUP__TRY(write_special(v, config));
fail:
    return status;
}

psoup_status psoup__gguf_write_tokenizer(psoup__gguf_writer *writer, const char *directory,
                                         const psoup_model_config *config, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_context *context = psoup__gguf_writer_context(writer);
    psoup_json *root = NULL;
    vocabulary v = {.writer = writer, .context = context, .n = (size_t)config->vocab_size, .error = error};
    char *settings = NULL, *spm = NULL;
    if ((v.path = psoup__path_join(context, directory, "tokenizer.json", error)) == NULL ||
        (settings = psoup__path_join(context, directory, "tokenizer_config.json", error)) == NULL ||
        (spm = psoup__path_join(context, directory, "tokenizer.model", error)) == NULL)
        goto fail;
    if (!psoup__file_exists(v.path) && psoup__file_exists(spm)) {
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: is not read without a tokenizer.json beside it; make one with python -c "
                             "\"from transformers import AutoTokenizer as T; "
                             "T.from_pretrained('%.200s').save_pretrained('%.200s')\"",
                             spm, directory, directory);
        goto fail;
    }
    if (!psoup__file_exists(v.path)) {
        psoup__log(context, PSOUP_LOG_WARNING, "%s is not there: the GGUF file has no vocabulary", v.path);
        status = psoup__gguf_set_string(writer, "tokenizer.ggml.model", "none", error);
        goto fail;
    }
    PSOUP__TRY(psoup_json_read(context, v.path, &root, error));
    if (psoup__file_exists(settings))
        PSOUP__TRY(psoup_json_read(context, settings, &v.config, error));
    v.root = root;
    v.model = psoup_json_get(root, "model");
    PSOUP__TRY(write_vocabulary(&v, config));
    PSOUP__TRY(psoup__gguf_write_template(writer, directory, v.config, error));
fail:
    psoup__map_free(v.ids);
    psoup__free(context, v.texts);
    psoup__free(context, v.scores);
    psoup__free(context, v.types);
    psoup_json_free(v.config);
    psoup_json_free(root);
    psoup__free(context, settings);
    psoup__free(context, spm);
    psoup__free(context, v.path);
    return status;
}
