/* Patterns: literals and regular expressions. The only file that knows PCRE2.
 *
 * tokenizer.json is written for Oniguruma with its Ruby syntax. Where the two libraries read the
 * same text differently it is rewritten, or refused. Matching has limits on steps, depth and memory, so
 * that a hostile expression ends in an error.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "text/text.h"

#include <string.h>

#define MAX_PATTERN 65536u
#define MAX_STEPS 5000000u
#define MAX_DEPTH 1000000u
#define MAX_HEAP_KIB 262144u

struct psoup__pattern {
    psoup_context *context;
    char *where;
    char *literal; /* NULL: a regular expression */
    size_t length; /* of the literal */
    pcre2_general_context *memory;
    pcre2_code *code;
    pcre2_match_context *limits;
};

/* ---- rewriting Oniguruma's syntax ----------------------------------------------------------------- */

#define SPACE "\\x09-\\x0D\\x20\\x85\\xA0\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"
#define WORD "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24B6}-\\x{24E9}"
#define HEX "0-9a-fA-F"

/* What a class escape means to Oniguruma, as the inside of a class; NULL: the same as to PCRE2. (PCRE2
 * counts U+180E as a space, has a narrower \w, and reads \h as horizontal space.) */
static const char *class_escape(char letter) {
    switch (letter | 0x20) {
    case 's':
        return SPACE;
    case 'w':
        return WORD;
    case 'h':
        return HEX;
    default:
        return NULL;
    }
}

static psoup_status rewrite_escape(char letter, bool in_class, const char *where,
                                   psoup__buffer *out, psoup_error *error) {
    const char *inside = class_escape(letter);
    bool negated = letter >= 'A' && letter <= 'Z';
    if (inside == NULL)
        psoup__buffer_print(out, "\\%c", letter);
    else if (!in_class)
        psoup__buffer_print(out, "[%s%s]", negated ? "^" : "", inside);
    else if (!negated)
        psoup__buffer_print(out, "%s", inside);
    else if (letter == 'S')
        psoup__buffer_print(out, "\\S");
    else
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: \\%c inside a character class is not supported", where, letter);
    return PSOUP_OK;
}

static psoup_status rewrite(const char *text, const char *where, psoup__buffer *out,
                            psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool in_class = false, counted = false;
    for (const char *p = text; *p; p++) {
        if (*p == '\\') {
            if (p[1] == '\0' || strchr("QECK", p[1]))
                return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                   "%s: \\%.1s in a regular expression is not supported", where,
                                   p + 1);
            p++;
            if ((unsigned char)*p < 0x80)
                PSOUP__TRY(rewrite_escape(*p, in_class, where, out, error));
            else
                psoup__buffer_append(out, p, 1);
        } else if (in_class && *p == '[' && p[1] == ':') {
            const char *end = strstr(p + 2, ":]");
            if (end == NULL)
                return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: \"[:\" without \":]\"", where);
            psoup__buffer_append(out, p, (size_t)(end + 2 - p));
            p = end + 1;
        } else if (in_class && (*p == '[' || (*p == '&' && p[1] == '&'))) {
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: a character class inside another is not supported", where);
        } else if (in_class) {
            in_class = *p != ']';
            psoup__buffer_append(out, p, 1);
        } else if (*p == '[') {
            in_class = true;
            psoup__buffer_append(out, p, 1);
            if (p[1] == '^')
                psoup__buffer_append(out, ++p, 1);
            if (p[1] == ']')
                psoup__buffer_print(out, "\\%c", *++p);
        } else if (*p == '}' && p[1] == '+' && counted) {
            /* Ruby repeats the repetition; PCRE2 would make it possessive. */
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: \"{n,m}+\" in a regular expression is not supported", where);
        } else if (*p == '(' && p[1] == '*') {
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: \"(*\": there is nothing to repeat", where);
        } else {
            if (*p == '{') /* a count, not the name in \p{…} */
                counted = p < text + 2 || p[-2] != '\\' || strchr("pPx", p[-1]) == NULL;
            psoup__buffer_append(out, p, 1);
        }
    }
fail:
    return status;
}

/* ---- compiling --------------------------------------------------------------------------------------- */

static void *take(PCRE2_SIZE bytes, void *context) {
    return psoup__alloc(context, bytes, 1, NULL);
}

static void give(void *memory, void *context) {
    psoup__free(context, memory);
}

static psoup_status compile(psoup__pattern *pattern, const char *text, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__buffer source = {.context = pattern->context};
    pcre2_compile_context *options = NULL;
    PSOUP__TRY(rewrite(text, pattern->where, &source, error));
    if (source.failed) {
        status = psoup__out_of_memory(error, source.length);
        goto fail;
    }
    pattern->memory = pcre2_general_context_create(take, give, pattern->context);
    if (pattern->memory != NULL) {
        pattern->limits = pcre2_match_context_create(pattern->memory);
        options = pcre2_compile_context_create(pattern->memory);
    }
    if (pattern->limits == NULL || options == NULL) {
        status = psoup__out_of_memory(error, 0);
        goto fail;
    }
    pcre2_set_max_pattern_length(options, MAX_PATTERN);
    pcre2_set_newline(options, PCRE2_NEWLINE_LF);
    pcre2_set_match_limit(pattern->limits, MAX_STEPS);
    pcre2_set_depth_limit(pattern->limits, MAX_DEPTH);
    pcre2_set_heap_limit(pattern->limits, MAX_HEAP_KIB);
    int code;
    PCRE2_SIZE place;
    /* In Ruby's syntax ^ and $ always match at lines. */
    pattern->code =
        pcre2_compile((PCRE2_SPTR)(source.data ? source.data : ""), source.length,
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code,
                      &place, options);
    if (pattern->code == NULL && code == PCRE2_ERROR_HEAP_FAILED) {
        status = psoup__out_of_memory(error, 0);
    } else if (pattern->code == NULL) {
        PCRE2_UCHAR message[256];
        pcre2_get_error_message(code, message, sizeof message);
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: not a regular expression: %s",
                             pattern->where, (const char *)message);
    } else {
        (void)pcre2_jit_compile(pattern->code, PCRE2_JIT_COMPLETE); /* without it: interpreted */
    }
fail:
    pcre2_compile_context_free(options);
    psoup__buffer_free(&source);
    return status;
}

psoup_status psoup__pattern_create(psoup_context *context, const char *where, const char *text,
                                   bool literal, psoup__pattern **out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup__pattern *pattern = psoup__alloc(context, 1, sizeof *pattern, error);
    if (pattern == NULL)
        return PSOUP_ERROR_MEMORY;
    pattern->context = context;
    pattern->where = psoup__strdup(context, where, error);
    if (pattern->where == NULL)
        goto fail;
    if (text[0] == '\0') {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: an empty pattern", where);
        goto fail;
    }
    if (literal) {
        pattern->literal = psoup__strdup(context, text, error);
        if (pattern->literal == NULL)
            goto fail;
        pattern->length = strlen(text);
    } else {
        PSOUP__TRY(compile(pattern, text, error));
    }
    *out = pattern;
    return PSOUP_OK;
fail:
    psoup__pattern_free(pattern);
    return status;
}

void psoup__pattern_free(psoup__pattern *pattern) {
    if (pattern == NULL)
        return;
    pcre2_code_free(pattern->code);
    pcre2_match_context_free(pattern->limits);
    pcre2_general_context_free(pattern->memory);
    psoup__free(pattern->context, pattern->literal);
    psoup__free(pattern->context, pattern->where);
    psoup__free(pattern->context, pattern);
}

/* ---- matching ------------------------------------------------------------------------------------------ */

/* Finds the next match at or after `from`; *found says whether there is one. */
static psoup_status find(const psoup__pattern *pattern, const char *text, size_t length,
                         size_t from, psoup__spans *scratch, psoup__span *match, bool *found,
                         psoup_error *error) {
    if (pattern->literal != NULL) {
        const char *at = memmem(text + from, length - from, pattern->literal, pattern->length);
        *found = at != NULL;
        if (*found)
            *match = (psoup__span){(size_t)(at - text), (size_t)(at - text) + pattern->length, true};
        return PSOUP_OK;
    }
    if (scratch->match_data == NULL)
        scratch->match_data = pcre2_match_data_create(1, pattern->memory);
    if (scratch->match_data == NULL)
        return psoup__out_of_memory(error, 0);
    int code = pcre2_match(pattern->code, (PCRE2_SPTR)text, length, from, PCRE2_NO_UTF_CHECK,
                           scratch->match_data, pattern->limits);
    if (code == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its stack on the heap */
        code = pcre2_match(pattern->code, (PCRE2_SPTR)text, length, from,
                           PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch->match_data,
                           pattern->limits);
    *found = code >= 0;
    if (code >= 0) {
        const PCRE2_SIZE *at = pcre2_get_ovector_pointer(scratch->match_data);
        *match = (psoup__span){at[0], at[1], true};
        if (at[0] < from || at[1] < at[0]) /* \K or a lookbehind that moved the start */
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: the regular expression matches backwards", pattern->where);
        return PSOUP_OK;
    }
    if (code == PCRE2_ERROR_NOMATCH)
        return PSOUP_OK;
    if (code == PCRE2_ERROR_NOMEMORY)
        return psoup__out_of_memory(error, 0);
    return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                       "%s: the regular expression takes too many steps on this text (at byte %zu)",
                       pattern->where, from);
}

static psoup_status add(psoup__spans *spans, size_t begin, size_t end, bool match,
                        psoup_error *error) {
    psoup_status status = psoup__reserve(spans->context, &spans->items, &spans->capacity,
                                         spans->n + 1, sizeof *spans->items, error);
    if (status == PSOUP_OK)
        spans->items[spans->n++] = (psoup__span){begin, end, match};
    return status;
}

psoup_status psoup__pattern_spans(const psoup__pattern *pattern, const char *text, size_t length,
                                  psoup__spans *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t from = 0, done = 0; /* where to look next; up to where the spans reach */
    bool any = false;
    out->n = 0;
    while (from <= length && length > 0) {
        psoup__span match = {0};
        bool found = false;
        PSOUP__TRY(find(pattern, text, length, from, out, &match, &found, error));
        if (!found)
            break;
        if (match.begin == match.end && any && match.begin == done) {
            /* An empty match right after a match: step over one character. */
            uint32_t code;
            from += from < length ? psoup__utf8_next(text + from, length - from, &code) : 1;
            continue;
        }
        if (match.begin > done)
            PSOUP__TRY(add(out, done, match.begin, false, error));
        PSOUP__TRY(add(out, match.begin, match.end, true, error));
        from = done = match.end;
        any = true;
    }
    if (done < length)
        PSOUP__TRY(add(out, done, length, false, error));
fail:
    return status;
}

void psoup__spans_free(psoup__spans *spans) {
    pcre2_match_data_free(spans->match_data);
    psoup__free(spans->context, spans->items);
    *spans = (psoup__spans){.context = spans->context};
}
