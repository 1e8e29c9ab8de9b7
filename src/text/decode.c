/* From the names of tokens back to text. Each step turns a list of texts into another. */
#include "text/text.h"

#include <string.h>

typedef struct list { /* n texts, end to end */
    psoup__buffer bytes;
    size_t *ends; /* [n] */
    size_t n, capacity;
} list;

static psoup_status finish(list *out, psoup_error *error) {
    psoup_status status = psoup__reserve(out->bytes.context, &out->ends, &out->capacity,
                                         out->n + 1, sizeof *out->ends, error);
    if (status == PSOUP_OK)
        out->ends[out->n++] = out->bytes.length;
    return status;
}

static psoup_status replace(const psoup__step *step, const char *text, size_t length, list *out,
                            psoup__spans *spans, psoup_error *error) {
    psoup_status status = psoup__pattern_spans(step->pattern, text, length, spans, error);
    for (size_t i = 0; status == PSOUP_OK && i < spans->n; i++) {
        psoup__span span = spans->items[i];
        if (span.match)
            psoup__buffer_append(&out->bytes, step->content, strlen(step->content));
        else
            psoup__buffer_append(&out->bytes, text + span.begin, span.end - span.begin);
    }
    return status;
}

/* A text with a character that is no byte's stays as it is (an added token). */
static void byte_level(const char *text, size_t length, list *out) {
    size_t begin = out->bytes.length, used;
    for (size_t i = 0; i < length; i += used) {
        uint32_t code;
        used = psoup__utf8_next(text + i, length - i, &code);
        int byte = psoup__char_to_byte(code);
        if (byte < 0) {
            if (!out->bytes.failed)
                out->bytes.length = begin;
            psoup__buffer_append(&out->bytes, text, length);
            return;
        }
        char c = (char)byte;
        psoup__buffer_append(&out->bytes, &c, 1);
    }
}

static void cut(const psoup__step *step, const char *text, size_t length, list *out) {
    size_t size = strlen(step->content), end = length, begin = 0;
    for (int64_t i = 0; i < step->start && end - begin >= size; i++) {
        if (memcmp(text + begin, step->content, size) != 0)
            break;
        begin += size;
    }
    for (int64_t i = 0; i < step->stop && end - begin >= size; i++) {
        if (memcmp(text + end - size, step->content, size) != 0)
            break;
        end -= size;
    }
    psoup__buffer_append(&out->bytes, text + begin, end - begin);
}

static void metaspace(const psoup__step *step, bool is_first, const char *text, size_t length,
                      list *out) {
    size_t size = strlen(step->content), i = 0;
    while (i < length) {
        if (length - i >= size && memcmp(text + i, step->content, size) == 0) {
            if (!(is_first && step->first))
                psoup__buffer_append(&out->bytes, " ", 1);
            i += size;
        } else {
            psoup__buffer_append(&out->bytes, text + i++, 1);
        }
    }
}

static int digit(char c) {
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that "<0xNN>" names; −1: another text. */
static int named_byte(const char *text, size_t length) {
    if (length != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>')
        return -1;
    int high = digit(text[3]), low = digit(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* Ends a run of bytes: one text where they are UTF-8, else one U+FFFD per byte. */
static psoup_status end_run(psoup__buffer *run, list *out, psoup_error *error) {
    bool valid = true;
    size_t used;
    for (size_t i = 0; valid && i < run->length; i += used) {
        uint32_t code;
        used = psoup__utf8_next(run->data + i, run->length - i, &code);
        valid = code != 0xFFFD || (used == 3 && memcmp(run->data + i, "\xEF\xBF\xBD", 3) == 0);
    }
    psoup_status status = PSOUP_OK;
    if (valid) {
        psoup__buffer_append(&out->bytes, run->data, run->length);
        status = finish(out, error);
    }
    for (size_t i = 0; !valid && status == PSOUP_OK && i < run->length; i++) {
        psoup__buffer_append(&out->bytes, "\xEF\xBF\xBD", 3);
        status = finish(out, error);
    }
    run->length = 0;
    return status;
}

static psoup_status byte_fallback(const list *in, list *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__buffer run = {.context = in->bytes.context};
    for (size_t i = 0; i < in->n; i++) {
        size_t begin = i ? in->ends[i - 1] : 0, length = in->ends[i] - begin;
        const char *text = length ? in->bytes.data + begin : "";
        int byte = named_byte(text, length);
        if (byte >= 0) {
            char c = (char)byte;
            psoup__buffer_append(&run, &c, 1);
            continue;
        }
        if (run.length > 0)
            PSOUP__TRY(end_run(&run, out, error));
        psoup__buffer_append(&out->bytes, text, length);
        PSOUP__TRY(finish(out, error));
    }
    if (run.length > 0)
        PSOUP__TRY(end_run(&run, out, error));
    if (run.failed)
        status = psoup__out_of_memory(error, in->n);
fail:
    psoup__buffer_free(&run);
    return status;
}

static psoup_status run_step(const psoup__step *step, const list *in, list *out,
                             psoup__spans *spans, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (step->kind == PSOUP__STEP_BYTE_FALLBACK)
        return byte_fallback(in, out, error);
    for (size_t i = 0; i < in->n; i++) {
        size_t begin = i ? in->ends[i - 1] : 0, length = in->ends[i] - begin;
        const char *text = length ? in->bytes.data + begin : "";
        switch (step->kind) {
        case PSOUP__STEP_REPLACE:
            PSOUP__TRY(replace(step, text, length, out, spans, error));
            break;
        case PSOUP__STEP_BYTE_LEVEL:
            byte_level(text, length, out);
            continue; /* it also joins all texts */
        case PSOUP__STEP_CUT:
            cut(step, text, length, out);
            break;
        case PSOUP__STEP_METASPACE:
            metaspace(step, i == 0, text, length, out);
            break;
        default: /* PSOUP__STEP_FUSE */
            psoup__buffer_append(&out->bytes, text, length);
            continue;
        }
        PSOUP__TRY(finish(out, error));
    }
    if (step->kind == PSOUP__STEP_BYTE_LEVEL || step->kind == PSOUP__STEP_FUSE)
        PSOUP__TRY(finish(out, error));
fail:
    return status;
}

static void clear(list *texts) {
    texts->bytes.length = 0;
    texts->n = 0;
}

static void list_free(list *texts) {
    psoup__free(texts->bytes.context, texts->ends);
    psoup__buffer_free(&texts->bytes);
}

psoup_status psoup__decode(psoup_context *context, const psoup__steps *decoder, bool no_decoder,
                           const char *const *texts, size_t n, psoup__buffer *out,
                           psoup_error *error) {
    psoup_status status = PSOUP_OK;
    list now = {.bytes = {.context = context}}, next = {.bytes = {.context = context}};
    psoup__spans spans = {.context = context};
    for (size_t i = 0; i < n; i++) {
        if (no_decoder && i > 0) /* then the library puts spaces between tokens */
            psoup__buffer_append(&now.bytes, " ", 1);
        psoup__buffer_append(&now.bytes, texts[i], strlen(texts[i]));
        PSOUP__TRY(finish(&now, error));
    }
    for (size_t s = 0; s < decoder->n; s++) {
        clear(&next);
        PSOUP__TRY(run_step(&decoder->items[s], &now, &next, &spans, error));
        list swap = now;
        now = next;
        next = swap;
    }
    if (now.bytes.length > 0)
        psoup__buffer_append(out, now.bytes.data, now.bytes.length);
    if (now.bytes.failed || next.bytes.failed || out->failed)
        status = psoup__out_of_memory(error, now.bytes.length);
fail:
    list_free(&now);
    list_free(&next);
    psoup__spans_free(&spans);
    return status;
}
