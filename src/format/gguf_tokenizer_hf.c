/* A GGUF file's vocabulary as tokenizer.json and tokenizer_config.json. All tokens are in the model's
 * vocabulary under their ids, the added ones too, so that no reader numbers them anew. */
#include "format/gguf.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LONGEST = 1024 }; /* bytes of a SentencePiece token whose splits are looked up */

typedef struct reading {
    psoup_context *context;
    const psoup__gguf *file;
    const char *path;
    const psoup__gguf_pre *pre; /* NULL: SentencePiece */
    size_t n;
    const char **texts;   /* [n], NUL-terminated */
    char *storage;
    const int32_t *types; /* [n] */
    float *scores;        /* [n], or NULL */
    psoup__map *ids;
    int64_t bos, eos, unknown, pad; /* −1: none */
    bool add_bos, add_eos;
    psoup_json *root;
    int failures; /* of the builders, which hand a NULL on */
    psoup_error *error;
} reading;

static void set(reading *r, psoup_json *object, const char *key, psoup_json *value) {
    r->failures += psoup_json_set(object, key, value) != 0;
}

static void append(reading *r, psoup_json *array, psoup_json *value) {
    r->failures += psoup_json_append(array, value) != 0;
}

static psoup_json *of_type(reading *r, const char *type) {
    psoup_json *object = psoup_json_new_object();
    set(r, object, "type", psoup_json_new_string(type));
    return object;
}

static psoup_status wrong(const reading *r, const char *key, const char *what) {
    return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: %s: %s", r->path, key, what);
}

/* ---- reading ------------------------------------------------------------------------------------ */

static psoup_status find_kind(reading *r, bool *none) {
    const char *name = "", *key = "tokenizer.ggml.pre";
    size_t length = 0;
    *none = psoup__gguf_get(r->file, "tokenizer.ggml.model") == NULL ||
            psoup__gguf_is(r->file, "tokenizer.ggml.model", "none") ||
            psoup__gguf_is(r->file, "tokenizer.ggml.model", "no_vocab");
    if (*none || psoup__gguf_is(r->file, "tokenizer.ggml.model", "llama"))
        return PSOUP_OK;
    if (!psoup__gguf_is(r->file, "tokenizer.ggml.model", "gpt2")) {
        key = "tokenizer.ggml.model";
        psoup__gguf_string(r->file, key, &name, &length);
    } else {
        for (const psoup__gguf_pre *p = psoup__gguf_pres; p->name != NULL; p++)
            if (psoup__gguf_is(r->file, key, p->name)) {
                r->pre = p;
                return PSOUP_OK;
            }
        psoup__gguf_string(r->file, key, &name, &length);
    }
    return psoup__fail(r->error, PSOUP_ERROR_UNSUPPORTED,
                       "%s: %s: \"%.*s\" is not supported as a Hugging Face tokenizer", r->path, key,
                       (int)(length < 60 ? length : 60), name);
}

static psoup_status read_texts(reading *r) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    const char *key = "tokenizer.ggml.tokens", *text;
    const psoup__gguf_value *tokens = psoup__gguf_get(r->file, key);
    size_t length;
    char hole[32];
    if (tokens == NULL || tokens->type != PSOUP__GGUF_ARRAY || tokens->element != PSOUP__GGUF_STRING ||
        tokens->count > INT32_MAX)
        return wrong(r, key, "expected an array of strings");
    r->n = tokens->count;
    /* a token's NUL, and the name of an empty one, take no more than its length field again */
    if ((r->texts = psoup__alloc(r->context, r->n, sizeof *r->texts, r->error)) == NULL ||
        (r->storage = psoup__alloc(r->context, tokens->bytes + 1, 2, r->error)) == NULL)
        goto fail;
    PSOUP__TRY(psoup__map_create(r->context, r->n, &r->ids, r->error));
    const unsigned char *at = tokens->data;
    char *to = r->storage;
    for (size_t i = 0; i < r->n; i++) {
        bool fresh;
        psoup__gguf_next_string(&at, &text, &length);
        if (length == 0) {
            text = psoup__gguf_hole(i, hole);
            length = strlen(text);
        }
        if (memchr(text, '\0', length) != NULL)
            return wrong(r, key, "a token holds a NUL");
        memcpy(to, text, length);
        to[length] = '\0';
        if (!psoup__is_utf8(to))
            return wrong(r, key, "a token is not UTF-8 text");
        PSOUP__TRY(psoup__map_set(r->ids, to, length, (int64_t)i, &fresh, r->error));
        if (!fresh)
            return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: %s: \"%.100s\" is there twice", r->path,
                               key, to);
        r->texts[i] = to;
        to += length + 1;
    }
    return PSOUP_OK;
fail:
    return status;
}

static int64_t token_id(const reading *r, const char *key, int64_t otherwise) {
    int64_t id = psoup__gguf_integer(r->file, key, otherwise);
    return id >= 0 && (uint64_t)id < r->n ? id : -1;
}

static psoup_status read_tables(reading *r) {
    const psoup__gguf_value *types = psoup__gguf_get(r->file, "tokenizer.ggml.token_type");
    const psoup__gguf_value *scores = psoup__gguf_get(r->file, "tokenizer.ggml.scores");
    int32_t *kept = psoup__alloc(r->context, r->n, sizeof *kept, r->error);
    if ((r->types = kept) == NULL)
        return PSOUP_ERROR_MEMORY;
    if (types != NULL && (types->element != PSOUP__GGUF_INT32 || types->type != PSOUP__GGUF_ARRAY ||
                          types->count != r->n))
        return wrong(r, "tokenizer.ggml.token_type", "expected an int32 for each token");
    for (size_t i = 0; i < r->n; i++)
        kept[i] = types != NULL ? (int32_t)psoup__gguf_number(types, i) : PSOUP__GGUF_NORMAL;
    if (scores != NULL) {
        if (scores->element != PSOUP__GGUF_FLOAT32 || scores->type != PSOUP__GGUF_ARRAY ||
            scores->count != r->n)
            return wrong(r, "tokenizer.ggml.scores", "expected a float32 for each token");
        if ((r->scores = psoup__alloc(r->context, r->n, sizeof *r->scores, r->error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        memcpy(r->scores, scores->data, scores->bytes);
        for (size_t i = 0; i < r->n; i++) /* they are sorted by, which a NaN has no place in */
            if (!isfinite(r->scores[i]))
                return wrong(r, "tokenizer.ggml.scores", "a score is no finite number");
    } else if (r->pre == NULL) {
        return wrong(r, "tokenizer.ggml.scores", "expected a float32 for each token");
    }
    bool spm = r->pre == NULL; /* llama.cpp's defaults, llama-vocab.cpp */
    bool llama3 = !spm && r->pre->ignore_merges && strcmp(r->pre->name, "tekken") != 0;
    r->bos = token_id(r, "tokenizer.ggml.bos_token_id", spm ? 1 : -1);
    r->eos = token_id(r, "tokenizer.ggml.eos_token_id", spm ? 2 : -1);
    r->unknown = token_id(r, "tokenizer.ggml.unknown_token_id", spm ? 0 : -1);
    r->pad = token_id(r, "tokenizer.ggml.padding_token_id", -1);
    r->add_bos = r->bos >= 0 && psoup__gguf_bool(r->file, "tokenizer.ggml.add_bos_token", spm || llama3);
    r->add_eos = r->eos >= 0 && psoup__gguf_bool(r->file, "tokenizer.ggml.add_eos_token", false);
    return PSOUP_OK;
}

/* ---- merges ------------------------------------------------------------------------------------- */

/* "a b" becomes ["a", "b"]. */
static psoup_status byte_level_merges(reading *r, psoup_json *list) {
    const psoup__gguf_value *merges = psoup__gguf_get(r->file, "tokenizer.ggml.merges");
    psoup__buffer one = {.context = r->context};
    const char *text;
    size_t length;
    psoup_status status = PSOUP_OK;
    if (merges == NULL || merges->type != PSOUP__GGUF_ARRAY || merges->element != PSOUP__GGUF_STRING)
        return wrong(r, "tokenizer.ggml.merges", "expected an array of strings");
    const unsigned char *at = merges->data;
    for (size_t i = 0; i < merges->count && status == PSOUP_OK; i++) {
        psoup__gguf_next_string(&at, &text, &length);
        one.length = 0;
        psoup__buffer_append(&one, text, length);
        char *space = one.failed || length == 0 ? NULL : strchr(one.data, ' ');
        if (one.failed)
            status = psoup__out_of_memory(r->error, length);
        else if (space == NULL || strlen(one.data) != length || !psoup__is_utf8(one.data))
            status = wrong(r, "tokenizer.ggml.merges", "expected two texts with a space between");
        else {
            psoup_json *pair = psoup_json_new_array();
            *space = '\0';
            append(r, pair, psoup_json_new_string(one.data));
            append(r, pair, psoup_json_new_string(space + 1));
            append(r, list, pair);
        }
    }
    psoup__buffer_free(&one);
    return status;
}

typedef struct merge {
    float score;
    int32_t left, right;
    uint16_t left_length, right_length;
    size_t order;
} merge;

/* The order that transformers gives the merges it makes of a SentencePiece model
 * (convert_slow_tokenizer.py, generate_merges): best score first, then the longer sides. */
static int by_score(const void *a, const void *b) {
    const merge *x = a, *y = b;
    if (x->score != y->score)
        return x->score > y->score ? -1 : 1;
    if (x->left_length != y->left_length)
        return x->left_length > y->left_length ? -1 : 1;
    if (x->right_length != y->right_length)
        return x->right_length > y->right_length ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

/* Every way to join two tokens into a third. */
static psoup_status spm_merges(reading *r, psoup_json *list) {
    psoup_status status = PSOUP_OK;
    merge *all = NULL;
    size_t n = 0, capacity = 0, bytes = 0;
    /* Every two halves of every token may be tokens; of real vocabularies two or three are. */
    const size_t most = 64 * (psoup__gguf_get(r->file, "tokenizer.ggml.tokens")->bytes + 1024);
    char side[LONGEST + 1];
    for (size_t i = 0; i < r->n; i++) {
        const char *text = r->texts[i];
        size_t length = strlen(text);
        uint32_t code;
        if (r->types[i] != PSOUP__GGUF_NORMAL || r->scores[i] == PSOUP__GGUF_UNREACHED)
            continue;
        if (length > LONGEST) {
            status = wrong(r, "tokenizer.ggml.tokens", "a token has more than 1024 bytes");
            goto fail;
        }
        for (size_t at = psoup__utf8_next(text, length, &code); at < length;
             at += psoup__utf8_next(text + at, length - at, &code)) {
            int64_t left, right;
            if (!psoup__map_get(r->ids, text, at, &left) ||
                !psoup__map_get(r->ids, text + at, length - at, &right) ||
                r->types[left] != PSOUP__GGUF_NORMAL || r->types[right] != PSOUP__GGUF_NORMAL)
                continue;
            if ((bytes += length) > most) {
                status = wrong(r, "tokenizer.ggml.tokens", "too many ways to split the tokens");
                goto fail;
            }
            PSOUP__TRY(psoup__reserve(r->context, &all, &capacity, n + 1, sizeof *all, r->error));
            all[n] = (merge){r->scores[i], (int32_t)left, (int32_t)right, (uint16_t)at,
                             (uint16_t)(length - at), n};
            n++;
        }
    }
    if (n > 0)
        qsort(all, n, sizeof *all, by_score);
    for (size_t i = 0; i < n; i++) {
        psoup_json *pair = psoup_json_new_array();
        memcpy(side, r->texts[all[i].left], (size_t)all[i].left_length + 1);
        append(r, pair, psoup_json_new_string(side));
        append(r, pair, psoup_json_new_string(r->texts[all[i].right]));
        append(r, list, pair);
    }
fail:
    psoup__free(r->context, all);
    return status;
}

/* ---- tokenizer.json ----------------------------------------------------------------------------- */

static psoup_json *byte_level(reading *r, bool prefix, bool regex) {
    psoup_json *object = of_type(r, "ByteLevel");
    set(r, object, "add_prefix_space", psoup_json_new_bool(prefix));
    set(r, object, "trim_offsets", psoup_json_new_bool(1));
    set(r, object, "use_regex", psoup_json_new_bool(regex));
    return object;
}

static psoup_json *replace(reading *r, const char *from, const char *to) {
    psoup_json *object = of_type(r, "Replace"), *pattern = psoup_json_new_object();
    set(r, pattern, "String", psoup_json_new_string(from));
    set(r, object, "pattern", pattern);
    set(r, object, "content", psoup_json_new_string(to));
    return object;
}

static psoup_json *normalizer(reading *r, bool prefix) {
    if (r->pre != NULL) /* Qwen's models were trained on it; llama.cpp leaves it out */
        return strstr(r->pre->name, "qwen") != NULL ? of_type(r, "NFC") : psoup_json_new_null();
    psoup_json *object = of_type(r, "Sequence"), *list = psoup_json_new_array();
    if (prefix) {
        psoup_json *prepend = of_type(r, "Prepend");
        set(r, prepend, "prepend", psoup_json_new_string("\xe2\x96\x81"));
        append(r, list, prepend);
    }
    append(r, list, replace(r, " ", "\xe2\x96\x81"));
    set(r, object, "normalizers", list);
    return object;
}

static psoup_json *pre_tokenizer(reading *r) {
    if (r->pre == NULL)
        return psoup_json_new_null();
    if (r->pre->regex == NULL && !r->pre->digits)
        return byte_level(r, false, true);
    psoup_json *object = of_type(r, "Sequence"), *list = psoup_json_new_array();
    psoup_json *first = of_type(r, r->pre->digits ? "Digits" : "Split");
    if (r->pre->digits) {
        set(r, first, "individual_digits", psoup_json_new_bool(1));
    } else {
        psoup_json *pattern = psoup_json_new_object();
        set(r, pattern, "Regex", psoup_json_new_string(r->pre->regex));
        set(r, first, "pattern", pattern);
        set(r, first, "behavior", psoup_json_new_string("Isolated"));
        set(r, first, "invert", psoup_json_new_bool(0));
    }
    append(r, list, first);
    append(r, list, byte_level(r, false, r->pre->digits));
    set(r, object, "pretokenizers", list);
    return object;
}

static psoup_json *decoder(reading *r, bool prefix) {
    if (r->pre != NULL)
        return byte_level(r, true, true);
    psoup_json *object = of_type(r, "Sequence"), *list = psoup_json_new_array();
    append(r, list, replace(r, "\xe2\x96\x81", " "));
    append(r, list, of_type(r, "ByteFallback"));
    append(r, list, of_type(r, "Fuse"));
    if (prefix) {
        psoup_json *strip = of_type(r, "Strip");
        set(r, strip, "content", psoup_json_new_string(" "));
        set(r, strip, "start", psoup_json_new_integer(1));
        set(r, strip, "stop", psoup_json_new_integer(0));
        append(r, list, strip);
    }
    set(r, object, "decoders", list);
    return object;
}

/* One piece of a template: {"SpecialToken" or "Sequence": {"id", "type_id"}}. */
static void piece(reading *r, psoup_json *list, const char *kind, const char *id, int64_t type) {
    psoup_json *inner = psoup_json_new_object(), *outer = psoup_json_new_object();
    set(r, inner, "id", psoup_json_new_string(id));
    set(r, inner, "type_id", psoup_json_new_integer(type));
    set(r, outer, kind, inner);
    append(r, list, outer);
}

static void template_token(reading *r, psoup_json *tokens, int64_t id) {
    psoup_json *token = psoup_json_new_object(), *ids = psoup_json_new_array();
    psoup_json *texts = psoup_json_new_array();
    append(r, ids, psoup_json_new_integer(id));
    append(r, texts, psoup_json_new_string(r->texts[id]));
    set(r, token, "id", psoup_json_new_string(r->texts[id]));
    set(r, token, "ids", ids);
    set(r, token, "tokens", texts);
    set(r, tokens, r->texts[id], token);
}

static psoup_json *post_processor(reading *r) {
    if (!r->add_bos && !r->add_eos)
        return r->pre != NULL ? byte_level(r, true, true) : psoup_json_new_null();
    psoup_json *object = of_type(r, "TemplateProcessing"), *tokens = psoup_json_new_object();
    psoup_json *single = psoup_json_new_array(), *pair = psoup_json_new_array();
    for (int64_t text = 0; text < 2; text++) {
        for (int both = text > 0; both < 2; both++) {
            psoup_json *list = both ? pair : single;
            if (r->add_bos)
                piece(r, list, "SpecialToken", r->texts[r->bos], text);
            piece(r, list, "Sequence", text > 0 ? "B" : "A", text);
            if (r->add_eos)
                piece(r, list, "SpecialToken", r->texts[r->eos], text);
        }
    }
    if (r->add_bos)
        template_token(r, tokens, r->bos);
    if (r->add_eos && r->eos != r->bos)
        template_token(r, tokens, r->eos);
    set(r, object, "single", single);
    set(r, object, "pair", pair);
    set(r, object, "special_tokens", tokens);
    return object;
}

static psoup_json *added_tokens(reading *r) {
    static const char *const off[] = {"single_word", "lstrip", "rstrip", "normalized"};
    psoup_json *list = psoup_json_new_array();
    for (size_t i = 0; i < r->n; i++) {
        int32_t type = r->types[i];
        if (type != PSOUP__GGUF_CONTROL && type != PSOUP__GGUF_UNKNOWN && type != PSOUP__GGUF_USER_DEFINED)
            continue;
        psoup_json *token = psoup_json_new_object();
        set(r, token, "id", psoup_json_new_integer((int64_t)i));
        set(r, token, "content", psoup_json_new_string(r->texts[i]));
        for (size_t j = 0; j < sizeof off / sizeof *off; j++)
            set(r, token, off[j], psoup_json_new_bool(0));
        set(r, token, "special", psoup_json_new_bool(type != PSOUP__GGUF_USER_DEFINED));
        append(r, list, token);
    }
    return list;
}

static psoup_status build_model(reading *r, psoup_json *model) {
    psoup_json *vocab = psoup_json_new_object(), *merges = psoup_json_new_array();
    bool bytes = false;
    for (size_t i = 0; i < r->n; i++) {
        set(r, vocab, r->texts[i], psoup_json_new_integer((int64_t)i));
        bytes |= r->types[i] == PSOUP__GGUF_BYTE;
    }
    psoup_status status = r->pre != NULL ? byte_level_merges(r, merges) : spm_merges(r, merges);
    bool unknown = r->pre == NULL && r->unknown >= 0;
    set(r, model, "dropout", psoup_json_new_null());
    set(r, model, "unk_token",
        unknown ? psoup_json_new_string(r->texts[r->unknown]) : psoup_json_new_null());
    set(r, model, "continuing_subword_prefix", psoup_json_new_null());
    set(r, model, "end_of_word_suffix", psoup_json_new_null());
    set(r, model, "fuse_unk", psoup_json_new_bool(r->pre == NULL));
    set(r, model, "byte_fallback", psoup_json_new_bool(r->pre == NULL && bytes));
    set(r, model, "ignore_merges", psoup_json_new_bool(r->pre != NULL && r->pre->ignore_merges));
    set(r, model, "vocab", vocab);
    set(r, model, "merges", merges);
    return status;
}

static psoup_status build(reading *r) {
    bool prefix = psoup__gguf_bool(r->file, "tokenizer.ggml.add_space_prefix", true);
    psoup_json *model = of_type(r, "BPE");
    r->root = psoup_json_new_object();
    psoup_status status = build_model(r, model);
    set(r, r->root, "version", psoup_json_new_string("1.0"));
    set(r, r->root, "truncation", psoup_json_new_null());
    set(r, r->root, "padding", psoup_json_new_null());
    set(r, r->root, "added_tokens", added_tokens(r));
    set(r, r->root, "normalizer", normalizer(r, prefix));
    set(r, r->root, "pre_tokenizer", pre_tokenizer(r));
    set(r, r->root, "post_processor", post_processor(r));
    set(r, r->root, "decoder", decoder(r, prefix));
    set(r, r->root, "model", model);
    return status;
}

/* ---- tokenizer_config.json ---------------------------------------------------------------------- */

static psoup_status build_config(reading *r, const psoup_model_config *c, psoup_json **out) {
    const struct {
        const char *key;
        int64_t id;
    } named[] = {{"bos_token", r->bos}, {"eos_token", r->eos}, {"unk_token", r->unknown},
                 {"pad_token", r->pad}};
    psoup_json *config = *out = psoup_json_new_object();
    const char *text;
    size_t length;
    set(r, config, "tokenizer_class", psoup_json_new_string("PreTrainedTokenizerFast"));
    set(r, config, "model_max_length", psoup_json_new_integer(c->max_position_embeddings));
    set(r, config, "clean_up_tokenization_spaces", psoup_json_new_bool(0));
    set(r, config, "add_bos_token", psoup_json_new_bool(r->add_bos));
    set(r, config, "add_eos_token", psoup_json_new_bool(r->add_eos));
    for (size_t i = 0; i < sizeof named / sizeof *named; i++)
        if (named[i].id >= 0)
            set(r, config, named[i].key, psoup_json_new_string(r->texts[named[i].id]));
    if (psoup__gguf_string(r->file, "tokenizer.chat_template", &text, &length)) {
        char *kept = psoup__alloc(r->context, length + 1, 1, r->error);
        if (kept == NULL)
            return PSOUP_ERROR_MEMORY;
        memcpy(kept, text, length);
        bool good = strlen(kept) == length && psoup__is_utf8(kept);
        if (good)
            set(r, config, "chat_template", psoup_json_new_string(kept));
        psoup__free(r->context, kept);
        if (!good)
            return wrong(r, "tokenizer.chat_template", "expected UTF-8 text");
    }
    return PSOUP_OK;
}

psoup_status psoup__gguf_tokenizer_json(psoup_context *context, const psoup__gguf *file,
                                        const psoup_model_config *config, psoup_json **tokenizer,
                                        psoup_json **settings, psoup_error *error) {
    psoup_status status;
    *tokenizer = *settings = NULL;
    reading r = {.context = context, .file = file, .path = psoup__gguf_path(file), .error = error};
    bool none;
    PSOUP__TRY(find_kind(&r, &none));
    if (none)
        return PSOUP_OK;
    PSOUP__TRY(read_texts(&r));
    PSOUP__TRY(read_tables(&r));
    PSOUP__TRY(build(&r));
    PSOUP__TRY(build_config(&r, config, settings));
    if (r.failures > 0) {
        status = psoup__out_of_memory(error, 0);
        goto fail;
    }
    *tokenizer = r.root;
    r.root = NULL;
fail:
    if (status != PSOUP_OK) {
        psoup_json_free(*settings);
        *settings = NULL;
    }
    psoup_json_free(r.root);
    psoup__map_free(r.ids);
    psoup__free(context, r.texts);
    psoup__free(context, r.storage);
    psoup__free(context, (int32_t *)(uintptr_t)r.types);
    psoup__free(context, r.scores);
    return status;
}
