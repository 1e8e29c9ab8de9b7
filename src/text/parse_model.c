/* tokenizer.json: the vocabulary, the merges and the added tokens. */
#include "text/text.h"

#include <string.h>

#define MAX_NAME 65536 /* bytes of a token */
#define MAX_ADDED 1024 /* bytes of an added token: the trie walks that far at every byte */

/* A member that must be true or false where it is present. */
static psoup_status get_flag(const psoup_tokenizer *t, const psoup_json *object, const char *where,
                             const char *key, bool *out, psoup_error *error) {
    const psoup_json *value = psoup_json_get(object, key);
    psoup_json_type kind = psoup_json_kind(value);
    if (kind != PSOUP_JSON_NULL && kind != PSOUP_JSON_BOOL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s.%s: expected true or false", t->name,
                           where, key);
    *out = psoup_json_bool(value, 0) != 0;
    return PSOUP_OK;
}

static psoup_status check_id(const psoup_tokenizer *t, const char *where, const char *token,
                             const psoup_json *value, int32_t *out, psoup_error *error) {
    int64_t id = psoup_json_integer(value, -1);
    if (psoup_json_kind(value) != PSOUP_JSON_INTEGER || id < 0 || id > PSOUP__MAX_ID)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: %s: token \"%.80s\": the id must be an integer from 0 to %d",
                           t->name, where, token, PSOUP__MAX_ID);
    *out = (int32_t)id;
    return PSOUP_OK;
}

/* ---- vocabulary ------------------------------------------------------------------------------ */

/* The highest id of vocabulary and added tokens makes the arrays by id. */
static psoup_status measure(psoup_tokenizer *t, const psoup_json *vocab, const psoup_json *added,
                            psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t highest = -1, id = 0;
    const char *token = NULL;
    for (const psoup_json *v; (v = psoup_json_next(vocab, &token)) != NULL;) {
        PSOUP__TRY(check_id(t, "model.vocab", token, v, &id, error));
        highest = id > highest ? id : highest;
    }
    for (size_t i = 0; i < psoup_json_size(added); i++) {
        const psoup_json *item = psoup_json_at(added, i);
        PSOUP__TRY(check_id(t, "added_tokens",
                            psoup_json_string(psoup_json_get(item, "content"), "?"),
                            psoup_json_get(item, "id"), &id, error));
        highest = id > highest ? id : highest;
    }
    t->vocab_size = highest + 1;
    t->tokens = psoup__alloc(t->context, (size_t)t->vocab_size, sizeof *t->tokens, error);
    t->special = psoup__alloc(t->context, (size_t)t->vocab_size, sizeof *t->special, error);
    if (t->tokens == NULL || t->special == NULL)
        status = PSOUP_ERROR_MEMORY;
fail:
    return status;
}

static psoup_status name_token(psoup_tokenizer *t, const char *where, const char *token, int32_t id,
                               int64_t added, psoup_error *error) {
    if (t->tokens[id] != NULL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: %s: tokens \"%.80s\" and \"%.80s\" have the same id %d", t->name,
                           where, t->tokens[id], token, id);
    t->tokens[id] = token;
    return psoup__map_set(t->bpe.vocab, token, strlen(token), id | added, NULL, error);
}

static psoup_status read_vocab(psoup_tokenizer *t, const psoup_json *vocab, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const char *token = NULL;
    PSOUP__TRY(psoup__map_create(t->context, psoup_json_size(vocab), &t->bpe.vocab, error));
    for (const psoup_json *v; (v = psoup_json_next(vocab, &token)) != NULL;) {
        if (strlen(token) > MAX_NAME)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: model.vocab: token %lld is longer than %d bytes", t->name,
                               (long long)psoup_json_integer(v, -1), MAX_NAME);
        PSOUP__TRY(name_token(t, "model.vocab", token, (int32_t)psoup_json_integer(v, -1), 0, error));
    }
fail:
    return status;
}

/* ---- merges ------------------------------------------------------------------------------------ */

static psoup_status find_part(const psoup_tokenizer *t, size_t rank, const char *part,
                              size_t length, int32_t *id, psoup_error *error) {
    int64_t found;
    if (!psoup__map_get(t->bpe.vocab, part, length, &found))
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: model.merges[%zu]: \"%.*s\" is not in the vocabulary", t->name,
                           rank, (int)(length > 80 ? 80 : length), part);
    *id = (int32_t)found;
    return PSOUP_OK;
}

static psoup_status read_merge(psoup_tokenizer *t, size_t index, uint32_t rank,
                               const psoup_json *merge, psoup__buffer *joined,
                               psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const char *left = psoup_json_string(merge, NULL), *right = NULL;
    size_t left_length = 0;
    if (left != NULL) {
        const char *space = strchr(left, ' ');
        if (space != NULL && strchr(space + 1, ' ') == NULL) {
            left_length = (size_t)(space - left);
            right = space + 1;
        }
    } else if (psoup_json_kind(merge) == PSOUP_JSON_ARRAY && psoup_json_size(merge) == 2) {
        left = psoup_json_string(psoup_json_at(merge, 0), NULL);
        right = psoup_json_string(psoup_json_at(merge, 1), NULL);
        left_length = left ? strlen(left) : 0;
    }
    if (left == NULL || right == NULL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: model.merges[%zu]: expected \"left right\" or [left, right]",
                           t->name, index);
    int32_t left_id = 0, right_id = 0, id = 0;
    PSOUP__TRY(find_part(t, index, left, left_length, &left_id, error));
    PSOUP__TRY(find_part(t, index, right, strlen(right), &right_id, error));
    joined->length = 0;
    psoup__buffer_append(joined, left, left_length);
    psoup__buffer_append(joined, right, strlen(right));
    if (joined->failed)
        return psoup__out_of_memory(error, left_length + strlen(right));
    PSOUP__TRY(find_part(t, index, joined->data ? joined->data : "", joined->length, &id, error));
    PSOUP__TRY(psoup__pairs_set(&t->bpe.merges, left_id, right_id,
                                (uint64_t)rank << 32 | (uint32_t)id, error));
fail:
    return status;
}

static psoup_status read_merges(psoup_tokenizer *t, const psoup_json *merges, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__buffer joined = {.context = t->context};
    if (psoup_json_size(merges) >= UINT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: model.merges: too many", t->name);
    uint32_t rank = 0;
    for (size_t i = 0; i < psoup_json_size(merges); i++) {
        const psoup_json *merge = psoup_json_at(merges, i);
        if (strncmp(psoup_json_string(merge, ""), "#version", 8) == 0)
            continue;
        PSOUP__TRY(read_merge(t, i, rank++, merge, &joined, error));
    }
fail:
    psoup__buffer_free(&joined);
    return status;
}

/* ---- the model's flags ------------------------------------------------------------------------- */

static psoup_status read_model(psoup_tokenizer *t, const psoup_json *model, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const char *type = psoup_json_string(psoup_json_get(model, "type"), "BPE");
    if (psoup_json_kind(model) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: model: expected an object", t->name);
    if (strcmp(type, "BPE") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: model.type: \"%.80s\" is not supported, only \"BPE\"", t->name,
                           type);
    for (size_t i = 0; i < 2; i++) {
        const psoup_json *affix = psoup_json_get(model, affixes[i]);
        if (psoup_json_kind(affix) != PSOUP_JSON_NULL && psoup_json_string(affix, "?")[0] != '\0')
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: model.%s: not supported, expected null", t->name, affixes[i]);
    }
    const psoup_json *dropout = psoup_json_get(model, "dropout");
    if (psoup_json_kind(dropout) != PSOUP_JSON_NULL && psoup_json_real(dropout, 1.0) != 0.0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: model.dropout: not supported, expected null", t->name);
    PSOUP__TRY(get_flag(t, model, "model", "byte_fallback", &t->bpe.byte_fallback, error));
    PSOUP__TRY(get_flag(t, model, "model", "fuse_unk", &t->bpe.fuse_unk, error));
    PSOUP__TRY(get_flag(t, model, "model", "ignore_merges", &t->bpe.ignore_merges, error));
    const psoup_json *unk = psoup_json_get(model, "unk_token");
    t->bpe.unk = -1;
    if (psoup_json_kind(unk) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    const char *name = psoup_json_string(unk, NULL);
    int64_t id;
    if (name == NULL || !psoup__map_get(t->bpe.vocab, name, strlen(name), &id))
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: model.unk_token: \"%.80s\" is not in the vocabulary", t->name,
                           name ? name : "?");
    t->bpe.unk = (int32_t)id;
fail:
    return status;
}

/* ---- added tokens -------------------------------------------------------------------------------- */

static psoup_status read_added_one(psoup_tokenizer *t, const psoup_json *item, size_t index,
                                   psoup__added *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const char *content = psoup_json_string(psoup_json_get(item, "content"), NULL);
    if (content == NULL || strlen(content) > MAX_ADDED)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: added_tokens[%zu].content: expected a text of up to %d bytes",
                           t->name, index, MAX_ADDED);
    *out = (psoup__added){.content = content,
                          .id = (int32_t)psoup_json_integer(psoup_json_get(item, "id"), -1)};
    const char *where = "added_tokens[]";
    PSOUP__TRY(get_flag(t, item, where, "special", &out->special, error));
    PSOUP__TRY(get_flag(t, item, where, "single_word", &out->single_word, error));
    PSOUP__TRY(get_flag(t, item, where, "lstrip", &out->lstrip, error));
    PSOUP__TRY(get_flag(t, item, where, "rstrip", &out->rstrip, error));
    PSOUP__TRY(get_flag(t, item, where, "normalized", &out->normalized, error));
    int64_t known;
    if (!psoup__map_get(t->bpe.vocab, content, strlen(content), &known)) {
        PSOUP__TRY(name_token(t, "added_tokens", content, out->id, PSOUP__ADDED, error));
    } else if ((int32_t)known != out->id) {
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: added_tokens[%zu]: \"%.80s\" has id %d, but %d before", t->name,
                           index, content, out->id, (int)known);
    }
    if (out->special)
        t->special[out->id] = 1;
fail:
    return status;
}

static psoup_status read_added(psoup_tokenizer *t, const psoup_json *added, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = psoup_json_size(added);
    t->added = psoup__alloc(t->context, n, sizeof *t->added, error);
    if (t->added == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        PSOUP__TRY(read_added_one(t, psoup_json_at(added, i), i, &t->added[i], error));
        t->n_added = i + 1;
        if (t->added[i].single_word && t->word == NULL)
            PSOUP__TRY(psoup__pattern_create(t->context, "single_word", PSOUP__WORD_CLASS, false,
                                             &t->word, error));
        if (!t->added[i].normalized) /* the others wait until there is a normalizer */
            PSOUP__TRY(psoup__trie_add(t->context, &t->raw, t->added[i].content,
                                       strlen(t->added[i].content), (int32_t)i, error));
    }
fail:
    return status;
}

psoup_status psoup__parse_vocabulary(psoup_tokenizer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_json *model = psoup_json_get(t->root, "model");
    const psoup_json *vocab = psoup_json_get(model, "vocab");
    const psoup_json *merges = psoup_json_get(model, "merges");
    const psoup_json *added = psoup_json_get(t->root, "added_tokens");
    if (model != NULL && psoup_json_get(model, "type") != NULL &&
        strcmp(psoup_json_string(psoup_json_get(model, "type"), ""), "BPE") != 0)
        return read_model(t, model, error); /* which says so */
    if (psoup_json_kind(vocab) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: model.vocab: expected an object of token and id", t->name);
    if (psoup_json_kind(merges) != PSOUP_JSON_ARRAY)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: model.merges: expected an array",
                           t->name);
    if (psoup_json_kind(added) != PSOUP_JSON_ARRAY && psoup_json_kind(added) != PSOUP_JSON_NULL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: added_tokens: expected an array",
                           t->name);
    PSOUP__TRY(measure(t, vocab, added, error));
    PSOUP__TRY(read_vocab(t, vocab, error));
    PSOUP__TRY(read_model(t, model, error));
    PSOUP__TRY(read_merges(t, merges, error));
    psoup__bpe_index(&t->bpe); /* before the added tokens, which no merge makes */
    PSOUP__TRY(read_added(t, added, error));
fail:
    return status;
}
