/* Byte-pair encoding of one piece of text: its characters are merged pair by pair, lowest rank first
 * and leftmost among equals, with a priority queue: O(n log n) for a word of n characters. */
#include "text/text.h"

#include <stdio.h>
#include <string.h>

/* ---- pairs --------------------------------------------------------------------------------- */

#define EMPTY UINT64_MAX /* no pair of non-negative int32 ids has this key */

static uint64_t pair_key(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static size_t pair_slot(const psoup__pairs *pairs, uint64_t key) {
    uint64_t h = key; /* the finaliser of MurmurHash3 (Appleby) */
    h = (h ^ h >> 33) * UINT64_C(0xff51afd7ed558ccd);
    h = (h ^ h >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
    size_t slot = (size_t)(h ^ h >> 33) & (pairs->capacity - 1);
    while (pairs->slots[2 * slot] != key && pairs->slots[2 * slot] != EMPTY)
        slot = (slot + 1) & (pairs->capacity - 1);
    return slot;
}

static psoup_status grow_pairs(psoup__pairs *pairs, psoup_error *error) {
    psoup__pairs bigger = *pairs;
    bigger.capacity = pairs->capacity ? pairs->capacity * 2 : 1024;
    bigger.slots =
        psoup__alloc(pairs->context, bigger.capacity, 2 * sizeof *bigger.slots, error);
    if (bigger.slots == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < bigger.capacity; i++)
        bigger.slots[2 * i] = EMPTY;
    for (size_t i = 0; i < pairs->capacity; i++) {
        if (pairs->slots[2 * i] == EMPTY)
            continue;
        size_t slot = pair_slot(&bigger, pairs->slots[2 * i]);
        memcpy(bigger.slots + 2 * slot, pairs->slots + 2 * i, 2 * sizeof *bigger.slots);
    }
    psoup__free(pairs->context, pairs->slots);
    *pairs = bigger;
    return PSOUP_OK;
}

psoup_status psoup__pairs_set(psoup__pairs *pairs, int32_t left, int32_t right, uint64_t value,
                              psoup_error *error) {
    if (pairs->count >= pairs->capacity / 2) {
        psoup_status status = grow_pairs(pairs, error);
        if (status != PSOUP_OK)
            return status;
    }
    uint64_t key = pair_key(left, right);
    size_t slot = pair_slot(pairs, key);
    if (pairs->slots[2 * slot] == EMPTY)
        pairs->count++;
    pairs->slots[2 * slot] = key;
    pairs->slots[2 * slot + 1] = value;
    return PSOUP_OK;
}

bool psoup__pairs_get(const psoup__pairs *pairs, int32_t left, int32_t right, uint64_t *value) {
    if (pairs->capacity == 0)
        return false;
    size_t slot = pair_slot(pairs, pair_key(left, right));
    if (pairs->slots[2 * slot] == EMPTY)
        return false;
    *value = pairs->slots[2 * slot + 1];
    return true;
}

void psoup__pairs_free(psoup__pairs *pairs) {
    psoup__free(pairs->context, pairs->slots);
    pairs->slots = NULL;
    pairs->capacity = pairs->count = 0;
}

/* ---- the queue of candidate merges -------------------------------------------------------------- */

struct psoup__symbol {
    int32_t id;
    int32_t prev, next; /* −1: none */
    size_t begin, end;  /* begin == end: merged into its left neighbour */
};

struct psoup__candidate {
    uint32_t rank;
    int32_t place; /* of the left symbol */
    int32_t id;    /* of the merged token */
};

static bool before(const struct psoup__candidate *a, const struct psoup__candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->place < b->place;
}

static psoup_status push(psoup__bpe_work *work, struct psoup__candidate item, psoup_error *error) {
    psoup_status status = psoup__reserve(work->context, &work->heap, &work->heap_capacity,
                                         work->heap_n + 1, sizeof *work->heap, error);
    if (status != PSOUP_OK)
        return status;
    size_t i = work->heap_n++;
    for (; i > 0 && before(&item, &work->heap[(i - 1) / 2]); i = (i - 1) / 2)
        work->heap[i] = work->heap[(i - 1) / 2];
    work->heap[i] = item;
    return PSOUP_OK;
}

static struct psoup__candidate pop(psoup__bpe_work *work) {
    struct psoup__candidate top = work->heap[0], last = work->heap[--work->heap_n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= work->heap_n)
            break;
        if (child + 1 < work->heap_n && before(&work->heap[child + 1], &work->heap[child]))
            child++;
        if (!before(&work->heap[child], &last))
            break;
        work->heap[i] = work->heap[child];
        i = child;
    }
    work->heap[i] = last;
    return top;
}

static psoup_status consider(const psoup__bpe *bpe, psoup__bpe_work *work, int32_t left,
                             psoup_error *error) {
    if (left < 0 || work->symbols[left].next < 0)
        return PSOUP_OK;
    uint64_t merge;
    const struct psoup__symbol *symbol = &work->symbols[left];
    if (!psoup__pairs_get(&bpe->merges, symbol->id, work->symbols[symbol->next].id, &merge))
        return PSOUP_OK;
    return push(work, (struct psoup__candidate){(uint32_t)(merge >> 32), left, (int32_t)(uint32_t)merge},
                error);
}

static psoup_status merge_all(const psoup__bpe *bpe, psoup__bpe_work *work, size_t n,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    struct psoup__symbol *symbols = work->symbols;
    work->heap_n = 0;
    for (size_t i = 0; i + 1 < n; i++)
        PSOUP__TRY(consider(bpe, work, (int32_t)i, error));
    while (work->heap_n > 0) {
        struct psoup__candidate top = pop(work);
        struct psoup__symbol *left = &symbols[top.place];
        uint64_t merge;
        /* The candidate is stale when its symbols have changed since it was queued. */
        if (left->begin == left->end || left->next < 0 ||
            !psoup__pairs_get(&bpe->merges, left->id, symbols[left->next].id, &merge) ||
            (int32_t)(uint32_t)merge != top.id)
            continue;
        struct psoup__symbol *right = &symbols[left->next];
        left->id = top.id;
        left->end = right->end;
        left->next = right->next;
        right->end = right->begin;
        if (left->next >= 0)
            symbols[left->next].prev = top.place;
        PSOUP__TRY(consider(bpe, work, left->prev, error));
        PSOUP__TRY(consider(bpe, work, top.place, error));
    }
fail:
    return status;
}

/* ---- a word ---------------------------------------------------------------------------------------- */

/* −1: no token, or none that words are made of. */
static int32_t word_id(const psoup__bpe *bpe, const char *name, size_t length) {
    int64_t id;
    return psoup__map_get(bpe->vocab, name, length, &id) && !(id & PSOUP__ADDED) ? (int32_t)id : -1;
}

void psoup__bpe_index(psoup__bpe *bpe) {
    char name[16];
    for (uint32_t code = 0; code < PSOUP__DIRECT; code++) {
        size_t length = psoup__utf8_put(code, name);
        bpe->direct[code] = word_id(bpe, name, length);
    }
    for (unsigned byte = 0; byte < 256; byte++) {
        int length = snprintf(name, sizeof name, "<0x%02X>", byte);
        bpe->bytes[byte] = word_id(bpe, name, (size_t)length);
    }
}

static int32_t character_id(const psoup__bpe *bpe, const char *bytes, size_t length,
                            uint32_t code) {
    return code < PSOUP__DIRECT ? bpe->direct[code] : word_id(bpe, bytes, length);
}

static bool has_bytes(const psoup__bpe *bpe, const char *bytes, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (bpe->bytes[(unsigned char)bytes[i]] < 0)
            return false;
    return true;
}

static void add_symbol(psoup__bpe_work *work, size_t *n, int32_t id, size_t begin, size_t end) {
    int32_t place = (int32_t)*n;
    work->symbols[*n] = (struct psoup__symbol){id, place - 1, -1, begin, end};
    if (place > 0)
        work->symbols[place - 1].next = place;
    (*n)++;
}

/* The first symbols of a word; at most one per byte. A character without a token falls back to its
 * bytes, then to unk, then to nothing. */
static size_t first_symbols(const psoup__bpe *bpe, const char *word, size_t length,
                            psoup__bpe_work *work) {
    size_t n = 0, used;
    bool unknown = false; /* the last symbol is unk */
    for (size_t i = 0; i < length; i += used) {
        uint32_t code;
        used = psoup__utf8_next(word + i, length - i, &code);
        int32_t id = character_id(bpe, word + i, used, code);
        if (id >= 0) {
            add_symbol(work, &n, id, i, i + used);
            unknown = false;
        } else if (bpe->byte_fallback && has_bytes(bpe, word + i, used)) {
            for (size_t b = i; b < i + used; b++)
                add_symbol(work, &n, bpe->bytes[(unsigned char)word[b]], b, b + 1);
            unknown = false;
        } else if (bpe->unk >= 0 && unknown && bpe->fuse_unk) {
            work->symbols[n - 1].end = i + used;
        } else if (bpe->unk >= 0) {
            add_symbol(work, &n, bpe->unk, i, i + used);
            unknown = true;
        }
    }
    return n;
}

psoup_status psoup__bpe_push(psoup__bpe_work *work, int32_t id, size_t begin, size_t end,
                             psoup_error *error) {
    psoup_status status = psoup__reserve(work->context, &work->tokens, &work->capacity,
                                         work->n + 1, sizeof *work->tokens, error);
    if (status == PSOUP_OK)
        work->tokens[work->n++] = (psoup__token){id, begin, end};
    return status;
}

psoup_status psoup__bpe_encode(const psoup__bpe *bpe, const char *word, size_t length, size_t base,
                               psoup__bpe_work *work, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t whole;
    if (length == 0)
        return PSOUP_OK;
    if (bpe->ignore_merges && (whole = word_id(bpe, word, length)) >= 0)
        return psoup__bpe_push(work, whole, base, base + length, error);
    PSOUP__TRY(psoup__reserve(work->context, &work->symbols, &work->symbol_capacity, length,
                              sizeof *work->symbols, error));
    size_t n = first_symbols(bpe, word, length, work);
    PSOUP__TRY(merge_all(bpe, work, n, error));
    for (size_t i = 0; i < n; i++) {
        const struct psoup__symbol *symbol = &work->symbols[i];
        if (symbol->begin < symbol->end)
            PSOUP__TRY(psoup__bpe_push(work, symbol->id, base + symbol->begin, base + symbol->end,
                                       error));
    }
fail:
    return status;
}

void psoup__bpe_work_free(psoup__bpe_work *work) {
    psoup__free(work->context, work->symbols);
    psoup__free(work->context, work->heap);
    psoup__free(work->context, work->tokens);
    *work = (psoup__bpe_work){.context = work->context};
}

void psoup__bpe_free(psoup__bpe *bpe) {
    psoup__map_free(bpe->vocab);
    psoup__pairs_free(&bpe->merges);
    bpe->vocab = NULL;
}
