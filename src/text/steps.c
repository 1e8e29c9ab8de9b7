/* Normalizer and pre-tokenizer as one list of steps. Each step reads the pieces of one stage and writes
 * those of the next. */
#include "text/text.h"

#include <string.h>

psoup_status psoup__stage_piece(psoup__stage *stage, size_t begin, size_t end, int32_t id,
                                psoup_error *error) {
    psoup_status status = psoup__reserve(stage->text.context, &stage->pieces, &stage->capacity,
                                         stage->n + 1, sizeof *stage->pieces, error);
    if (status == PSOUP_OK)
        stage->pieces[stage->n++] = (psoup__piece){begin, end, id};
    return status;
}

void psoup__stage_clear(psoup__stage *stage) {
    stage->text.length = 0;
    stage->n = 0;
}

void psoup__stage_free(psoup__stage *stage) {
    psoup__free(stage->text.context, stage->pieces);
    stage->pieces = NULL;
    stage->n = stage->capacity = 0;
    psoup__aligned_free(&stage->text);
}

void psoup__steps_free(psoup_context *context, psoup__steps *steps) {
    for (size_t i = 0; i < steps->n; i++)
        psoup__pattern_free(steps->items[i].pattern);
    psoup__free(context, steps->items);
    *steps = (psoup__steps){0};
}

/* One piece: the bytes and sources of a stage's text in [0, n). */
typedef struct view {
    const char *bytes;
    const psoup_offset *source;
    size_t n;
} view;

static psoup_status replace(const psoup__step *step, view in, psoup__aligned *out,
                            psoup__spans *spans, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t length = strlen(step->content);
    PSOUP__TRY(psoup__pattern_spans(step->pattern, in.bytes, in.n, spans, error));
    for (size_t i = 0; i < spans->n; i++) {
        psoup__span span = spans->items[i];
        if (!span.match) {
            PSOUP__TRY(psoup__aligned_append(out, in.bytes + span.begin, in.source + span.begin,
                                             span.end - span.begin, error));
            continue;
        }
        /* New text comes from where the match's last character came from. */
        psoup_offset source = {in.source[0].begin, in.source[0].begin};
        if (span.end > 0)
            source = in.source[span.end - 1];
        PSOUP__TRY(psoup__aligned_put(out, step->content, length, source, error));
    }
fail:
    return status;
}

static psoup_status prepend(const psoup__step *step, view in, psoup__aligned *out,
                            psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t length = strlen(step->content);
    bool starts = in.n >= length && memcmp(in.bytes, step->content, length) == 0;
    if (!(step->missing && starts) && !(step->first && in.source[0].begin > 0))
        PSOUP__TRY(psoup__aligned_put(out, step->content, length, in.source[0], error));
    PSOUP__TRY(psoup__aligned_append(out, in.bytes, in.source, in.n, error));
fail:
    return status;
}

static psoup_status strip(const psoup__step *step, view in, psoup__aligned *out,
                          psoup_error *error) {
    size_t begin = 0, end = 0, used;
    bool text = false; /* something that is no space has been seen */
    for (size_t i = 0; i < in.n; i += used) {
        uint32_t code;
        used = psoup__utf8_next(in.bytes + i, in.n - i, &code);
        bool space = psoup__is_space(code);
        if (!space && !text)
            begin = i;
        text = text || !space;
        if (!space)
            end = i + used;
    }
    if (!step->left)
        begin = 0;
    else if (!text)
        begin = in.n;
    if (!step->right)
        end = in.n;
    if (begin >= end)
        return PSOUP_OK;
    return psoup__aligned_append(out, in.bytes + begin, in.source + begin, end - begin, error);
}

static psoup_status to_bytes(view in, psoup__aligned *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < in.n && status == PSOUP_OK; i++) {
        char character[4];
        size_t length = psoup__utf8_put(psoup__byte_to_char((unsigned char)in.bytes[i]), character);
        status = psoup__aligned_put(out, character, length, in.source[i], error);
    }
    return status;
}

/* Joins the spans in place as the behavior says; what is to vanish becomes empty. */
static void join(psoup__behavior behavior, bool invert, psoup__spans *spans) {
    psoup__span *items = spans->items;
    size_t n = 0;
    bool previous = false;
    for (size_t i = 0; invert && i < spans->n; i++)
        items[i].match = !items[i].match;
    switch (behavior) {
    case PSOUP__ISOLATED:
        return;
    case PSOUP__REMOVED:
        for (size_t i = 0; i < spans->n; i++)
            if (items[i].match)
                items[i].end = items[i].begin;
        return;
    case PSOUP__CONTIGUOUS:
    case PSOUP__MERGED_WITH_PREVIOUS:
        for (size_t i = 0; i < spans->n; i++) {
            psoup__span span = items[i];
            bool joins = behavior == PSOUP__CONTIGUOUS ? span.match == previous
                                                       : span.match && !previous;
            if (joins && n > 0)
                items[n - 1].end = span.end;
            else
                items[n++] = span;
            previous = span.match;
        }
        spans->n = n;
        return;
    case PSOUP__MERGED_WITH_NEXT: /* the same from the right: a match joins what follows it */
        for (size_t i = spans->n; i-- > 0;) {
            if (items[i].match && !previous && i + 1 < spans->n) {
                items[i + 1].begin = items[i].begin;
                items[i].end = items[i].begin;
                previous = true;
            } else {
                previous = items[i].match;
            }
        }
        return;
    }
}

static psoup_status split(const psoup__step *step, view in, psoup__stage *out,
                          psoup__spans *spans, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t base = out->text.length;
    PSOUP__TRY(psoup__pattern_spans(step->pattern, in.bytes, in.n, spans, error));
    join(step->behavior, step->invert, spans);
    PSOUP__TRY(psoup__aligned_append(&out->text, in.bytes, in.source, in.n, error));
    for (size_t i = 0; i < spans->n; i++)
        if (spans->items[i].begin < spans->items[i].end)
            PSOUP__TRY(psoup__stage_piece(out, base + spans->items[i].begin,
                                          base + spans->items[i].end, -1, error));
fail:
    return status;
}

static psoup_status run_piece(const psoup__step *step, view in, psoup__stage *out,
                              psoup__spans *spans, psoup_error *error) {
    psoup_status status;
    size_t begin = out->text.length;
    switch (step->kind) {
    case PSOUP__STEP_SPLIT:
        return split(step, in, out, spans, error);
    case PSOUP__STEP_REPLACE:
        status = replace(step, in, &out->text, spans, error);
        break;
    case PSOUP__STEP_PREPEND:
        status = prepend(step, in, &out->text, error);
        break;
    case PSOUP__STEP_STRIP:
        status = strip(step, in, &out->text, error);
        break;
    case PSOUP__STEP_NFC:
    case PSOUP__STEP_NFD:
        status = psoup__normalize(in.bytes, in.source, in.n, step->kind == PSOUP__STEP_NFC,
                                  &out->text, error);
        break;
    default:
        status = to_bytes(in, &out->text, error);
        break;
    }
    if (status == PSOUP_OK && out->text.length > begin)
        status = psoup__stage_piece(out, begin, out->text.length, -1, error);
    return status;
}

psoup_status psoup__steps_run(const psoup__steps *steps, psoup__stage *stage, psoup__stage *spare,
                              psoup__spans *spans, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t s = 0; s < steps->n; s++) {
        psoup__stage_clear(spare);
        for (size_t p = 0; p < stage->n; p++) {
            psoup__piece piece = stage->pieces[p];
            view in = {stage->text.bytes + piece.begin, stage->text.source + piece.begin,
                       piece.end - piece.begin};
            if (piece.id < 0) {
                PSOUP__TRY(run_piece(&steps->items[s], in, spare, spans, error));
                continue;
            }
            size_t begin = spare->text.length;
            PSOUP__TRY(psoup__aligned_append(&spare->text, in.bytes, in.source, in.n, error));
            PSOUP__TRY(psoup__stage_piece(spare, begin, spare->text.length, piece.id, error));
        }
        psoup__stage next = *spare;
        *spare = *stage;
        *stage = next;
    }
fail:
    return status;
}
