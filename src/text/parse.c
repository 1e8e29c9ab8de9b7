/* tokenizer.json: normalizer, pre-tokenizer, post-processor and decoder, read into lists of steps. What
 * is not supported is refused by its name. */
#include "text/text.h"

#include <stdio.h>
#include <string.h>

typedef struct reader {
    psoup_tokenizer *tokenizer;
    psoup_context *context;
    psoup__steps *steps; /* the list being filled */
    const char *room;    /* "normalizer", "pre_tokenizer", … for messages */
    psoup_error *error;
} reader;

static psoup_status refuse(const reader *r, psoup_status status, const char *type, const char *field,
                           const char *what) {
    return psoup__fail(r->error, status, "%s: %s: %.80s%s%s: %s", r->tokenizer->name, r->room, type,
                       field ? "." : "", field ? field : "", what);
}

static psoup_status flag(const reader *r, const psoup_json *object, const char *key, bool otherwise,
                         bool *out) {
    const psoup_json *value = psoup_json_get(object, key);
    psoup_json_type kind = psoup_json_kind(value);
    if (kind != PSOUP_JSON_NULL && kind != PSOUP_JSON_BOOL)
        return refuse(r, PSOUP_ERROR_FORMAT, psoup_json_string(psoup_json_get(object, "type"), "?"),
                      key, "expected true or false");
    *out = psoup_json_bool(value, otherwise) != 0;
    return PSOUP_OK;
}

static psoup_status text(const reader *r, const psoup_json *object, const char *key,
                         const char **out) {
    *out = psoup_json_string(psoup_json_get(object, key), NULL);
    if (*out == NULL)
        return refuse(r, PSOUP_ERROR_FORMAT, psoup_json_string(psoup_json_get(object, "type"), "?"),
                      key, "expected a text");
    return PSOUP_OK;
}

/* Takes the step, and what it owns, in every case. */
static psoup_status add(const reader *r, psoup__step step) {
    psoup_status status =
        psoup__reserve(r->context, &r->steps->items, &r->steps->capacity, r->steps->n + 1,
                       sizeof *r->steps->items, r->error);
    if (status == PSOUP_OK)
        r->steps->items[r->steps->n++] = step;
    else
        psoup__pattern_free(step.pattern);
    return status;
}

static psoup_status add_pattern(const reader *r, psoup__step step, const char *pattern,
                                bool literal) {
    char where[256];
    snprintf(where, sizeof where, "%.160s: %s.pattern", r->tokenizer->name, r->room);
    psoup_status status =
        psoup__pattern_create(r->context, where, pattern, literal, &step.pattern, r->error);
    return status == PSOUP_OK ? add(r, step) : status;
}

/* {"String": "…"} or {"Regex": "…"}; old files have the bare text. */
static psoup_status add_json_pattern(const reader *r, psoup__step step, const psoup_json *object) {
    const psoup_json *pattern = psoup_json_get(object, "pattern");
    const char *literal = psoup_json_string(psoup_json_get(pattern, "String"), NULL);
    const char *regex = psoup_json_string(psoup_json_get(pattern, "Regex"), NULL);
    if (literal == NULL && regex == NULL)
        literal = psoup_json_string(pattern, NULL);
    if (literal == NULL && regex == NULL)
        return refuse(r, PSOUP_ERROR_FORMAT, psoup_json_string(psoup_json_get(object, "type"), "?"),
                      "pattern", "expected {\"String\": text} or {\"Regex\": text}");
    return add_pattern(r, step, literal ? literal : regex, literal != NULL);
}

/* ---- normalizer ------------------------------------------------------------------------------- */

static psoup_status read_normalizer(const reader *r, const psoup_json *object, const char *type) {
    psoup_status status = PSOUP_OK;
    psoup__step step = {0};
    if (strcmp(type, "Prepend") == 0) {
        step.kind = PSOUP__STEP_PREPEND;
        PSOUP__TRY(text(r, object, "prepend", &step.content));
        return add(r, step);
    }
    if (strcmp(type, "Replace") == 0) {
        step.kind = PSOUP__STEP_REPLACE;
        PSOUP__TRY(text(r, object, "content", &step.content));
        return add_json_pattern(r, step, object);
    }
    if (strcmp(type, "Strip") == 0) {
        step.kind = PSOUP__STEP_STRIP;
        PSOUP__TRY(flag(r, object, "strip_left", true, &step.left));
        PSOUP__TRY(flag(r, object, "strip_right", true, &step.right));
        return add(r, step);
    }
    if (strcmp(type, "NFC") == 0 || strcmp(type, "NFD") == 0) {
        step.kind = type[2] == 'C' ? PSOUP__STEP_NFC : PSOUP__STEP_NFD;
        return add(r, step);
    }
    return refuse(r, PSOUP_ERROR_UNSUPPORTED, type, NULL, "this normalizer is not supported");
fail:
    return status;
}

/* ---- pre-tokenizer ------------------------------------------------------------------------------ */

static psoup_status read_metaspace(const reader *r, const psoup_json *object, const char **content,
                                   const char **scheme) {
    psoup_status status = PSOUP_OK;
    uint32_t code;
    bool prefix;
    PSOUP__TRY(text(r, object, "replacement", content));
    if ((*content)[0] == '\0' ||
        psoup__utf8_next(*content, strlen(*content), &code) != strlen(*content))
        return refuse(r, PSOUP_ERROR_FORMAT, "Metaspace", "replacement", "expected one character");
    PSOUP__TRY(flag(r, object, "add_prefix_space", true, &prefix));
    *scheme = psoup_json_string(psoup_json_get(object, "prepend_scheme"), "always");
    if (!prefix)
        *scheme = "never";
    if (strcmp(*scheme, "always") != 0 && strcmp(*scheme, "first") != 0 &&
        strcmp(*scheme, "never") != 0)
        return refuse(r, PSOUP_ERROR_FORMAT, "Metaspace", "prepend_scheme",
                      "expected \"always\", \"first\" or \"never\"");
fail:
    return status;
}

static psoup_status add_metaspace(const reader *r, const psoup_json *object) {
    psoup_status status = PSOUP_OK;
    const char *content, *scheme;
    bool splits;
    PSOUP__TRY(read_metaspace(r, object, &content, &scheme));
    PSOUP__TRY(flag(r, object, "split", true, &splits));
    psoup__step spaces = {.kind = PSOUP__STEP_REPLACE, .content = content};
    PSOUP__TRY(add_pattern(r, spaces, " ", true));
    if (strcmp(scheme, "never") != 0)
        PSOUP__TRY(add(r, (psoup__step){.kind = PSOUP__STEP_PREPEND,
                                        .content = content,
                                        .missing = true,
                                        .first = strcmp(scheme, "first") == 0}));
    if (splits)
        PSOUP__TRY(add_pattern(
            r, (psoup__step){.kind = PSOUP__STEP_SPLIT, .behavior = PSOUP__MERGED_WITH_NEXT},
            content, true));
fail:
    return status;
}

static psoup_status add_byte_level(const reader *r, const psoup_json *object) {
    psoup_status status = PSOUP_OK;
    bool prefix, regex;
    PSOUP__TRY(flag(r, object, "add_prefix_space", true, &prefix));
    PSOUP__TRY(flag(r, object, "use_regex", true, &regex));
    if (prefix)
        PSOUP__TRY(add(r, (psoup__step){
                              .kind = PSOUP__STEP_PREPEND, .content = " ", .missing = true}));
    if (regex)
        PSOUP__TRY(add_pattern(
            r, (psoup__step){.kind = PSOUP__STEP_SPLIT, .behavior = PSOUP__ISOLATED},
            PSOUP__GPT2_PATTERN, false));
    PSOUP__TRY(add(r, (psoup__step){.kind = PSOUP__STEP_BYTES}));
fail:
    return status;
}

static psoup_status add_split(const reader *r, const psoup_json *object) {
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    psoup_status status = PSOUP_OK;
    psoup__step step = {.kind = PSOUP__STEP_SPLIT};
    const char *behavior;
    PSOUP__TRY(text(r, object, "behavior", &behavior));
    PSOUP__TRY(flag(r, object, "invert", false, &step.invert));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(behavior, names[i]) == 0) {
            step.behavior = (psoup__behavior)i;
            return add_json_pattern(r, step, object);
        }
    }
    return refuse(r, PSOUP_ERROR_FORMAT, "Split", "behavior",
                  "expected Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
fail:
    return status;
}

static psoup_status read_pre_tokenizer(const reader *r, const psoup_json *object,
                                       const char *type) {
    psoup_status status = PSOUP_OK;
    psoup__step step = {.kind = PSOUP__STEP_SPLIT, .behavior = PSOUP__REMOVED};
    bool single;
    if (strcmp(type, "ByteLevel") == 0)
        return add_byte_level(r, object);
    if (strcmp(type, "Split") == 0)
        return add_split(r, object);
    if (strcmp(type, "Metaspace") == 0)
        return add_metaspace(r, object);
    if (strcmp(type, "WhitespaceSplit") == 0)
        return add_pattern(r, step, "\\s", false);
    if (strcmp(type, "Whitespace") == 0) {
        step.invert = true;
        return add_pattern(r, step, PSOUP__WORD_CLASS "+|[^\\s\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}"
                                    "\\x{200C}\\x{200D}\\x{24B6}-\\x{24E9}]+", false);
    }
    if (strcmp(type, "Digits") == 0) {
        PSOUP__TRY(flag(r, object, "individual_digits", false, &single));
        step.behavior = single ? PSOUP__ISOLATED : PSOUP__CONTIGUOUS;
        return add_pattern(r, step, "\\p{N}", false);
    }
    return refuse(r, PSOUP_ERROR_UNSUPPORTED, type, NULL, "this pre-tokenizer is not supported");
fail:
    return status;
}

/* ---- decoder ---------------------------------------------------------------------------------------- */

static psoup_status read_decoder(const reader *r, const psoup_json *object, const char *type) {
    psoup_status status = PSOUP_OK;
    psoup__step step = {.kind = PSOUP__STEP_FUSE};
    const char *scheme;
    if (strcmp(type, "Fuse") == 0)
        return add(r, step);
    if (strcmp(type, "ByteLevel") == 0 || strcmp(type, "ByteFallback") == 0) {
        step.kind = type[4] == 'L' ? PSOUP__STEP_BYTE_LEVEL : PSOUP__STEP_BYTE_FALLBACK;
        return add(r, step);
    }
    if (strcmp(type, "Replace") == 0) {
        step.kind = PSOUP__STEP_REPLACE;
        PSOUP__TRY(text(r, object, "content", &step.content));
        return add_json_pattern(r, step, object);
    }
    if (strcmp(type, "Metaspace") == 0) {
        step.kind = PSOUP__STEP_METASPACE;
        PSOUP__TRY(read_metaspace(r, object, &step.content, &scheme));
        step.first = strcmp(scheme, "never") != 0;
        return add(r, step);
    }
    if (strcmp(type, "Strip") == 0) {
        step.kind = PSOUP__STEP_CUT;
        PSOUP__TRY(text(r, object, "content", &step.content));
        step.start = psoup_json_integer(psoup_json_get(object, "start"), -1);
        step.stop = psoup_json_integer(psoup_json_get(object, "stop"), -1);
        if (step.content[0] == '\0' || step.start < 0 || step.stop < 0)
            return refuse(r, PSOUP_ERROR_FORMAT, type, NULL,
                          "expected one character of content, and start and stop from 0");
        return add(r, step);
    }
    return refuse(r, PSOUP_ERROR_UNSUPPORTED, type, NULL, "this decoder is not supported");
fail:
    return status;
}

/* ---- post-processor ---------------------------------------------------------------------------------- */

static psoup_status add_template_token(const reader *r, const psoup_json *special, const char *name,
                                       int32_t *list, size_t *n) {
    const psoup_json *ids = psoup_json_get(psoup_json_get(special, name), "ids");
    psoup_tokenizer *t = r->tokenizer;
    if (psoup_json_size(ids) == 0)
        return refuse(r, PSOUP_ERROR_FORMAT, "TemplateProcessing.special_tokens", name,
                      "expected an object with ids");
    for (size_t i = 0; i < psoup_json_size(ids); i++) {
        int64_t id = psoup_json_integer(psoup_json_at(ids, i), -1);
        if (id < 0 || id >= t->vocab_size || t->tokens[id] == NULL)
            return refuse(r, PSOUP_ERROR_FORMAT, "TemplateProcessing.special_tokens", name,
                          "its id is no token");
        if (t->n_before + t->n_after >= PSOUP__MAX_TEMPLATE)
            return refuse(r, PSOUP_ERROR_UNSUPPORTED, "TemplateProcessing", "single",
                          "more than 8 special tokens");
        list[(*n)++] = (int32_t)id;
    }
    return PSOUP_OK;
}

static psoup_status read_template(const reader *r, const psoup_json *object) {
    psoup_status status = PSOUP_OK;
    psoup_tokenizer *t = r->tokenizer;
    const psoup_json *single = psoup_json_get(object, "single");
    const psoup_json *special = psoup_json_get(object, "special_tokens");
    bool seen = false; /* the text itself */
    if (t->n_before + t->n_after > 0)
        return refuse(r, PSOUP_ERROR_UNSUPPORTED, "TemplateProcessing", NULL,
                      "more than one template");
    for (size_t i = 0; i < psoup_json_size(single); i++) {
        const psoup_json *piece = psoup_json_at(single, i);
        const psoup_json *sequence = psoup_json_get(piece, "Sequence");
        const char *name =
            psoup_json_string(psoup_json_get(psoup_json_get(piece, "SpecialToken"), "id"), NULL);
        if (name != NULL) {
            PSOUP__TRY(add_template_token(r, special, name, seen ? t->after : t->before,
                                          seen ? &t->n_after : &t->n_before));
        } else if (strcmp(psoup_json_string(psoup_json_get(sequence, "id"), ""), "A") == 0 &&
                   !seen) {
            seen = true;
        } else {
            return refuse(r, PSOUP_ERROR_UNSUPPORTED, "TemplateProcessing", "single",
                          "expected special tokens around one sequence A");
        }
    }
    if (!seen)
        return refuse(r, PSOUP_ERROR_FORMAT, "TemplateProcessing", "single",
                      "expected special tokens around one sequence A");
fail:
    return status;
}

static psoup_status read_post_processor(const reader *r, const psoup_json *object,
                                        const char *type) {
    psoup_status status = PSOUP_OK;
    psoup_tokenizer *t = r->tokenizer;
    bool trim;
    if (strcmp(type, "TemplateProcessing") == 0)
        return read_template(r, object);
    if (strcmp(type, "ByteLevel") != 0)
        return refuse(r, PSOUP_ERROR_UNSUPPORTED, type, NULL,
                      "this post-processor is not supported");
    PSOUP__TRY(flag(r, object, "trim_offsets", true, &trim));
    PSOUP__TRY(flag(r, object, "add_prefix_space", true, &t->trim_keeps_first));
    t->trim_offsets = t->trim_offsets || trim;
fail:
    return status;
}

/* ---- the four lists ------------------------------------------------------------------------------------- */

typedef psoup_status (*read_fn)(const reader *r, const psoup_json *object, const char *type);

/* One object, or the members of a Sequence under `list`, one after the other. */
static psoup_status read_list(const reader *r, const psoup_json *object, const char *list,
                              read_fn read_one) {
    psoup_status status = PSOUP_OK;
    const char *type = psoup_json_string(psoup_json_get(object, "type"), NULL);
    if (psoup_json_kind(object) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    if (type == NULL)
        return refuse(r, PSOUP_ERROR_FORMAT, "type", NULL, "expected an object with a type");
    if (strcmp(type, "Sequence") != 0)
        return read_one(r, object, type);
    const psoup_json *items = psoup_json_get(object, list);
    if (psoup_json_kind(items) != PSOUP_JSON_ARRAY)
        return refuse(r, PSOUP_ERROR_FORMAT, "Sequence", list, "expected an array");
    for (size_t i = 0; i < psoup_json_size(items); i++)
        PSOUP__TRY(read_list(r, psoup_json_at(items, i), list, read_one));
fail:
    return status;
}

psoup_status psoup__parse_steps(psoup_tokenizer *t, psoup_error *error) {
    const struct {
        psoup__steps *steps;
        const char *room, *list;
        read_fn read_one;
    } rooms[] = {
        {&t->normalizer, "normalizer", "normalizers", read_normalizer},
        {&t->pre_tokenizer, "pre_tokenizer", "pretokenizers", read_pre_tokenizer},
        {&t->decoder, "decoder", "decoders", read_decoder},
        {NULL, "post_processor", "processors", read_post_processor},
    };
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) {
        reader r = {t, t->context, rooms[i].steps, rooms[i].room, error};
        PSOUP__TRY(read_list(&r, psoup_json_get(t->root, rooms[i].room), rooms[i].list,
                             rooms[i].read_one));
    }
    t->no_decoder = psoup_json_kind(psoup_json_get(t->root, "decoder")) == PSOUP_JSON_NULL;
fail:
    return status;
}
