/* The tokenizer's front: load and save, encode and decode. */
#include "text/text.h"

#include <string.h>

#define MAX_FILE ((size_t)256 << 20)
#define MAX_TEXT ((size_t)1 << 30) /* places of symbols are int32 */

/* ---- load and save --------------------------------------------------------------------------- */

/* Added tokens that are found after the normalizer are looked for as it would write them. */
static psoup_status index_normalized(psoup_tokenizer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__spans spans = {.context = t->context};
    psoup__stage stage = {.text = {.context = t->context, .limit = MAX_TEXT}}, spare = stage;
    for (size_t i = 0; i < t->n_added; i++) {
        const char *content = t->added[i].content;
        if (!t->added[i].normalized || content[0] == '\0')
            continue;
        psoup__stage_clear(&stage);
        PSOUP__TRY(psoup__aligned_read(&stage.text, content, strlen(content), error));
        PSOUP__TRY(psoup__stage_piece(&stage, 0, stage.text.length, -1, error));
        PSOUP__TRY(psoup__steps_run(&t->normalizer, &stage, &spare, &spans, error));
        if (stage.n > 0)
            PSOUP__TRY(psoup__trie_add(t->context, &t->normalized, stage.text.bytes,
                                       stage.text.length, (int32_t)i, error));
    }
fail:
    psoup__stage_free(&stage);
    psoup__stage_free(&spare);
    psoup__spans_free(&spans);
    return status;
}

psoup_status psoup__tokenizer_build(psoup_context *context, psoup_json *root, const char *name,
                                    psoup_tokenizer **out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup_tokenizer *t = psoup__alloc(context, 1, sizeof *t, error);
    if (t == NULL) {
        psoup_json_free(root);
        return PSOUP_ERROR_MEMORY;
    }
    t->context = t->bpe.context = t->bpe.merges.context = context;
    t->root = root;
    t->name = psoup__strdup(context, name, error);
    if (t->name == NULL)
        goto fail;
    if (psoup_json_kind(root) != PSOUP_JSON_OBJECT) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: expected an object", name);
        goto fail;
    }
    PSOUP__TRY(psoup__parse_vocabulary(t, error));
    PSOUP__TRY(psoup__parse_steps(t, error));
    PSOUP__TRY(index_normalized(t, error));
    if (psoup_json_kind(psoup_json_get(root, "truncation")) != PSOUP_JSON_NULL ||
        psoup_json_kind(psoup_json_get(root, "padding")) != PSOUP_JSON_NULL)
        psoup__log(context, PSOUP_LOG_WARNING, "%s: its truncation and padding are not applied",
                   name);
    *out = t;
    return PSOUP_OK;
fail:
    psoup_tokenizer_free(t);
    return status;
}

psoup_status psoup__tokenizer_parse(psoup_context *context, const char *text, size_t length,
                                    const char *name, psoup_tokenizer **out, psoup_error *error) {
    psoup_json *root;
    *out = NULL;
    psoup_status status = psoup_json_parse(text, length, name, &root, error);
    return status == PSOUP_OK ? psoup__tokenizer_build(context, root, name, out, error) : status;
}

psoup_status psoup_tokenizer_load(psoup_context *context, const char *path, psoup_tokenizer **out,
                                  psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    char *inside = NULL, *text = NULL;
    size_t length;
    *out = NULL;
    if (psoup__is_directory(path)) {
        inside = psoup__path_join(context, path, "tokenizer.json", error);
        if (inside == NULL)
            goto fail;
        path = inside;
    }
    PSOUP__TRY(psoup__file_read(context, path, MAX_FILE, &text, &length, error));
    if (length >= 4 && memcmp(text, "GGUF", 4) == 0) {
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: a GGUF file's tokenizer is read as tokenizer.json, which psoup merge --out "
                             "DIRECTORY %s=1 makes of it",
                             path, path);
        goto fail;
    }
    status = psoup__tokenizer_parse(context, text, length, path, out, error);
fail:
    psoup__free(context, text);
    psoup__free(context, inside);
    return status;
}

psoup_status psoup_tokenizer_save(const psoup_tokenizer *tokenizer, const char *path,
                                  psoup_error *error) {
    return psoup_json_write(tokenizer->context, path, tokenizer->root, error);
}

void psoup_tokenizer_free(psoup_tokenizer *t) {
    if (t == NULL)
        return;
    psoup__bpe_free(&t->bpe);
    psoup__trie_free(t->context, &t->raw);
    psoup__trie_free(t->context, &t->normalized);
    psoup__pattern_free(t->word);
    psoup__steps_free(t->context, &t->normalizer);
    psoup__steps_free(t->context, &t->pre_tokenizer);
    psoup__steps_free(t->context, &t->decoder);
    psoup__free(t->context, t->added);
    psoup__free(t->context, t->tokens);
    psoup__free(t->context, t->special);
    psoup__free(t->context, t->name);
    psoup_json_free(t->root);
    psoup__free(t->context, t);
}

int32_t psoup_tokenizer_vocab_size(const psoup_tokenizer *tokenizer) {
    return tokenizer->vocab_size;
}

int32_t psoup_tokenizer_token_id(const psoup_tokenizer *tokenizer, const char *token) {
    int64_t id;
    return psoup__map_get(tokenizer->bpe.vocab, token, strlen(token), &id) ? (int32_t)id : -1;
}

const char *psoup_tokenizer_token(const psoup_tokenizer *tokenizer, int32_t id) {
    return id >= 0 && id < tokenizer->vocab_size ? tokenizer->tokens[id] : NULL;
}

/* ---- encode -------------------------------------------------------------------------------------- */

/* A ByteLevel post-processor takes the spaces around a token's name off its offsets, character by
 * character; the first token keeps a single one, which add_prefix_space may have put there. */
static void trim(const psoup_tokenizer *t, psoup__token *token, bool first, const char *name,
                 size_t length, const char *text) {
    size_t leading = 0, trailing = 0, characters = 0, used;
    bool only = true; /* no other character so far */
    uint32_t code;
    for (size_t i = 0; i < length; i += used) {
        used = psoup__utf8_next(name + i, length - i, &code);
        bool space = code == psoup__byte_to_char(' ') || psoup__is_space(code);
        only = only && space;
        leading += only;
        trailing = space ? trailing + 1 : 0;
    }
    if (leading == 1 && (first || token->begin == 0) && t->trim_keeps_first)
        leading = 0;
    for (; leading > 0 && token->begin < token->end; leading--)
        token->begin += psoup__utf8_next(text + token->begin, token->end - token->begin, &code);
    for (size_t i = token->begin; i < token->end && trailing > 0; characters++)
        i += psoup__utf8_next(text + i, token->end - i, &code);
    if (trailing == 0)
        return;
    size_t end = token->begin;
    for (; characters > trailing; characters--)
        end += psoup__utf8_next(text + end, token->end - end, &code);
    token->end = end;
}

/* From a place in the stage's text to one in the caller's. */
static void place(const psoup_tokenizer *t, const psoup__aligned *stage, psoup__token *token,
                  bool first, bool added, const char *text) {
    psoup__token from = *token;
    token->begin = stage->source[from.begin].begin;
    token->end = stage->source[from.end - 1].end;
    /* An added token goes by the text it matched, which may have spaces that its name has not. */
    const char *name = added ? stage->bytes + from.begin : t->tokens[token->id];
    if (t->trim_offsets)
        trim(t, token, first, name, added ? from.end - from.begin : strlen(name), text);
}

/* Fills work->tokens, with offsets into the caller's text. */
static psoup_status encode(const psoup_tokenizer *t, const char *text, size_t length,
                           uint32_t flags, psoup__bpe_work *work, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool plain = (flags & PSOUP_PLAIN_SPECIAL) != 0;
    psoup__spans spans = {.context = t->context};
    psoup__stage stage = {.text = {.context = t->context, .limit = 64 * length + 65536}};
    psoup__stage spare = stage;
    PSOUP__TRY(psoup__aligned_read(&stage.text, text, length, error));
    if (length > 0)
        PSOUP__TRY(psoup__stage_piece(&stage, 0, stage.text.length, -1, error));
    PSOUP__TRY(psoup__added_split(&t->raw, t->added, plain, t->word, &stage, &spare, &spans, error));
    PSOUP__TRY(psoup__steps_run(&t->normalizer, &stage, &spare, &spans, error));
    PSOUP__TRY(psoup__added_split(&t->normalized, t->added, plain, t->word, &stage, &spare, &spans,
                                  error));
    PSOUP__TRY(psoup__steps_run(&t->pre_tokenizer, &stage, &spare, &spans, error));
    for (size_t i = 0; i < stage.n; i++) {
        psoup__piece piece = stage.pieces[i];
        size_t first = work->n;
        if (piece.id >= 0)
            PSOUP__TRY(psoup__bpe_push(work, piece.id, piece.begin, piece.end, error));
        else
            PSOUP__TRY(psoup__bpe_encode(&t->bpe, stage.text.bytes + piece.begin,
                                         piece.end - piece.begin, piece.begin, work, error));
        for (size_t k = first; k < work->n; k++)
            place(t, &stage.text, &work->tokens[k], k == 0, piece.id >= 0, text);
    }
fail:
    psoup__stage_free(&stage);
    psoup__stage_free(&spare);
    psoup__spans_free(&spans);
    return status;
}

psoup_status psoup_tokenizer_encode(const psoup_tokenizer *tokenizer, const char *text,
                                    size_t length, uint32_t flags, int32_t *ids,
                                    psoup_offset *offsets, size_t capacity, size_t *count,
                                    psoup_error *error) {
    const psoup_tokenizer *t = tokenizer;
    psoup__bpe_work work = {.context = t->context};
    *count = 0;
    if (length > MAX_TEXT)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "a text of %zu bytes; at most %zu", length,
                           MAX_TEXT);
    psoup_status status = encode(t, text, length, flags, &work, error);
    if (status == PSOUP_OK) {
        bool around = (flags & PSOUP_ADD_SPECIAL) != 0;
        size_t before = around ? t->n_before : 0, after = around ? t->n_after : 0;
        *count = before + work.n + after;
        for (size_t i = 0; i < *count && i < capacity; i++) {
            psoup__token token = {.id = 0};
            if (i < before)
                token.id = t->before[i];
            else if (i < before + work.n)
                token = work.tokens[i - before];
            else
                token.id = t->after[i - before - work.n];
            ids[i] = token.id;
            if (offsets != NULL)
                offsets[i] = (psoup_offset){token.begin, token.end};
        }
    }
    psoup__bpe_work_free(&work);
    return status;
}

/* ---- decode -------------------------------------------------------------------------------------- */

psoup_status psoup_tokenizer_decode(const psoup_tokenizer *tokenizer, const int32_t *ids, size_t n,
                                    int skip_special, char *text, size_t capacity, size_t *length,
                                    psoup_error *error) {
    const psoup_tokenizer *t = tokenizer;
    psoup__buffer out = {.context = t->context};
    size_t kept = 0;
    *length = 0;
    const char **names = psoup__alloc(t->context, n, sizeof *names, error);
    if (names == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= t->vocab_size) {
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "token %zu: id %d; the vocabulary has 0 to %d", i, ids[i],
                                 t->vocab_size - 1);
            goto fail;
        }
        const char *name = t->tokens[ids[i]];
        if (name != NULL && !(skip_special && t->special[ids[i]]))
            names[kept++] = name;
    }
    PSOUP__TRY(psoup__decode(t->context, &t->decoder, t->no_decoder, names, kept, &out, error));
    *length = out.length;
    if (out.length > 0 && capacity > 0)
        memcpy(text, out.data, out.length < capacity ? out.length : capacity);
fail:
    psoup__free(t->context, names);
    psoup__buffer_free(&out);
    return status;
}
