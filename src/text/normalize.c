/* Unicode normal forms C and D (Unicode 15, section 3.11; UAX #15), with sources.
 *
 * Each character made carries the number of characters that it adds (+) or swallows (−), as the crate
 * unicode-normalization-alignments counts them: decomposition gives 0, +1, +1, …; composition of two
 * gives their sum − 1. A character that adds takes the source of the one before it. */
#include "text/text.h"

typedef struct point {
    uint32_t code;
    int32_t change;
} point;

typedef struct points {
    point *items;
    size_t n, capacity;
} points;

static psoup_status add(psoup_context *context, points *list, uint32_t code, int32_t change,
                        psoup_error *error) {
    psoup_status status = psoup__reserve(context, &list->items, &list->capacity, list->n + 1,
                                         sizeof *list->items, error);
    if (status == PSOUP_OK)
        list->items[list->n++] = (point){code, change};
    return status;
}

/* Decompositions nest at most four deep; only the first part decomposes further. */
static psoup_status decompose(psoup_context *context, points *list, uint32_t code,
                              psoup_error *error) {
    uint32_t tail[8], parts[2];
    size_t n = 0;
    psoup_status status = PSOUP_OK;
    while (n < 8 && psoup__unicode_decompose(code, parts)) {
        code = parts[0];
        if (parts[1] != 0)
            tail[n++] = parts[1];
    }
    PSOUP__TRY(add(context, list, code, 0, error));
    while (n > 0)
        PSOUP__TRY(add(context, list, tail[--n], 1, error));
fail:
    return status;
}

/* Sorts every run of combining marks by class, keeping the order of equals: a merge-free insertion would
 * be quadratic on hostile runs, so classes are counted. */
static psoup_status reorder(psoup_context *context, points *list, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    point *sorted = NULL;
    for (size_t begin = 0, end; begin < list->n; begin = end) {
        end = begin + 1;
        if (psoup__unicode_class(list->items[begin].code) == 0)
            continue;
        while (end < list->n && psoup__unicode_class(list->items[end].code) != 0)
            end++;
        if (end - begin < 2)
            continue;
        if (sorted == NULL) {
            sorted = psoup__alloc(context, list->n, sizeof *sorted, error);
            if (sorted == NULL)
                return PSOUP_ERROR_MEMORY;
        }
        size_t starts[257] = {0};
        for (size_t i = begin; i < end; i++)
            starts[psoup__unicode_class(list->items[i].code) + 1]++;
        for (size_t c = 1; c < 257; c++)
            starts[c] += starts[c - 1];
        for (size_t i = begin; i < end; i++)
            sorted[starts[psoup__unicode_class(list->items[i].code)]++] = list->items[i];
        for (size_t i = begin; i < end; i++)
            list->items[i] = sorted[i - begin];
    }
    psoup__free(context, sorted);
    return status;
}

/* Composes in place: a mark joins the last starter unless one of its class, or a starter, stands between. */
static void compose(points *list) {
    size_t n = 0, starter = SIZE_MAX;
    int last = -1; /* class of the last kept mark since the starter; −1: none */
    for (size_t i = 0; i < list->n; i++) {
        point p = list->items[i];
        int class = psoup__unicode_class(p.code);
        if (starter != SIZE_MAX && last < class) {
            uint32_t joined = psoup__unicode_compose(list->items[starter].code, p.code);
            if (joined != 0) {
                list->items[starter].code = joined;
                list->items[starter].change += p.change - 1;
                continue;
            }
        }
        if (class == 0) {
            starter = n;
            last = -1;
        } else {
            last = class;
        }
        list->items[n++] = p;
    }
    list->n = n;
}

psoup_status psoup__normalize(const char *bytes, const psoup_offset *source, size_t n,
                              bool composed, psoup__aligned *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    points list = {0};
    size_t place = 0, used; /* in the old text */
    uint32_t code;
    for (size_t i = 0; i < n; i += used) {
        used = psoup__utf8_next(bytes + i, n - i, &code);
        PSOUP__TRY(decompose(out->context, &list, code, error));
    }
    PSOUP__TRY(reorder(out->context, &list, error));
    if (composed)
        compose(&list);
    for (size_t i = 0; i < list.n; i++) {
        int32_t change = list.items[i].change;
        psoup_offset from = {source[0].begin, source[0].begin};
        if (change <= 0 && place < n)
            from = source[place];
        else if (place > 0)
            from = source[place - 1];
        for (; change <= 0 && place < n; change++)
            place += psoup__utf8_next(bytes + place, n - place, &code);
        char text[4];
        size_t length = psoup__utf8_put(list.items[i].code, text);
        PSOUP__TRY(psoup__aligned_put(out, text, length, from, error));
    }
fail:
    psoup__free(out->context, list.items);
    return status;
}
