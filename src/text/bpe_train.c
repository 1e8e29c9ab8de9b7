/* Training a byte-level BPE: count the words, then merge the most frequent pair of neighbours again and
 * again (Sennrich et al. 2016, algorithm 1). The result is written as a tokenizer.json and loaded. */
#include "text/text.h"

#include <string.h>

typedef struct word {
    int32_t *ids; /* [n], shrinking */
    size_t n;
    int64_t count;
} word;

typedef struct pair { /* two neighbours, their count, the words that have them */
    int32_t left, right;
    int64_t count;
    size_t *words; /* [n_words], ascending within one merge */
    size_t n_words, capacity;
    bool fresh; /* grew in this merge: is in trainer.fresh */
} pair;

typedef struct entry { /* in the queue; stale when count is no longer its pair's */
    int64_t count;
    size_t pair;
} entry;

typedef struct trainer {
    psoup_context *context;
    psoup_error *error;
    int32_t vocab_size, n_tokens;
    char **names; /* [vocab_size], n_tokens of them set */
    psoup__map *ids;  /* name → id */
    psoup__map *seen; /* word → its index */
    word *words;
    size_t n_words, words_capacity;
    pair *pairs;
    size_t n_pairs, pairs_capacity;
    psoup__pairs index; /* pair → its index */
    entry *heap;
    size_t n_heap, heap_capacity;
    size_t *fresh; /* pairs that grew in this merge */
    size_t n_fresh, fresh_capacity;
    int32_t (*merges)[2];
    size_t n_merges, merges_capacity;
} trainer;

/* ---- tokens and words ----------------------------------------------------------------------------- */

/* Adds a token, or finds it where two merges spell the same. */
static psoup_status add_token(trainer *t, const char *left, const char *right, int32_t *id) {
    int64_t known;
    char *name = psoup__format(t->context, t->error, "%s%s", left, right);
    if (name == NULL)
        return PSOUP_ERROR_MEMORY;
    if (psoup__map_get(t->ids, name, strlen(name), &known)) {
        psoup__free(t->context, name);
        *id = (int32_t)known;
        return PSOUP_OK;
    }
    *id = t->n_tokens;
    t->names[t->n_tokens++] = name;
    return psoup__map_set(t->ids, name, strlen(name), *id, NULL, t->error);
}

/* Bytes come in the order of their characters, as GPT-2 has them. */
static psoup_status add_bytes(trainer *t) {
    psoup_status status = PSOUP_OK;
    for (uint32_t code = 33; code < 0x100 + 68; code++) {
        char name[5] = {0};
        int32_t id;
        psoup__utf8_put(code, name);
        if (psoup__char_to_byte(code) >= 0)
            PSOUP__TRY(add_token(t, name, "", &id));
    }
fail:
    return status;
}

static psoup_status add_word(trainer *t, const char *text, size_t length) {
    psoup_status status = PSOUP_OK;
    int64_t index;
    if (psoup__map_get(t->seen, text, length, &index)) {
        t->words[index].count++;
        return PSOUP_OK;
    }
    PSOUP__TRY(psoup__reserve(t->context, &t->words, &t->words_capacity, t->n_words + 1,
                              sizeof *t->words, t->error));
    word *w = &t->words[t->n_words];
    *w = (word){.count = 1, .ids = psoup__alloc(t->context, length, sizeof *w->ids, t->error)};
    if (w->ids == NULL)
        return PSOUP_ERROR_MEMORY;
    t->n_words++;
    size_t used;
    for (size_t i = 0; i < length; i += used) {
        uint32_t code;
        used = psoup__utf8_next(text + i, length - i, &code);
        int64_t id = 0;
        psoup__map_get(t->ids, text + i, used, &id);
        w->ids[w->n++] = (int32_t)id;
    }
    PSOUP__TRY(psoup__map_set(t->seen, text, length, (int64_t)t->n_words - 1, NULL, t->error));
fail:
    return status;
}

/* ---- pairs and their queue ---------------------------------------------------------------------------- */

/* Most frequent first; among equals the lower pair of ids. */
static bool before(const trainer *t, entry a, entry b) {
    const pair *p = &t->pairs[a.pair], *q = &t->pairs[b.pair];
    if (a.count != b.count)
        return a.count > b.count;
    return p->left != q->left ? p->left < q->left : p->right < q->right;
}

static psoup_status push(trainer *t, size_t index) {
    entry item = {t->pairs[index].count, index};
    if (item.count <= 0)
        return PSOUP_OK;
    psoup_status status = psoup__reserve(t->context, &t->heap, &t->heap_capacity, t->n_heap + 1,
                                         sizeof *t->heap, t->error);
    if (status != PSOUP_OK)
        return status;
    size_t i = t->n_heap++;
    for (; i > 0 && before(t, item, t->heap[(i - 1) / 2]); i = (i - 1) / 2)
        t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = item;
    return PSOUP_OK;
}

static entry pop(trainer *t) {
    entry top = t->heap[0], last = t->heap[--t->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= t->n_heap)
            break;
        if (child + 1 < t->n_heap && before(t, t->heap[child + 1], t->heap[child]))
            child++;
        if (!before(t, t->heap[child], last))
            break;
        t->heap[i] = t->heap[child];
        i = child;
    }
    t->heap[i] = last;
    return top;
}

/* Counts `change` more of (left, right) in words[at]. */
static psoup_status count_pair(trainer *t, int32_t left, int32_t right, size_t at, int sign) {
    psoup_status status = PSOUP_OK;
    uint64_t index;
    if (!psoup__pairs_get(&t->index, left, right, &index)) {
        PSOUP__TRY(psoup__reserve(t->context, &t->pairs, &t->pairs_capacity, t->n_pairs + 1,
                                  sizeof *t->pairs, t->error));
        index = t->n_pairs;
        PSOUP__TRY(psoup__pairs_set(&t->index, left, right, index, t->error));
        t->pairs[t->n_pairs++] = (pair){.left = left, .right = right};
    }
    pair *p = &t->pairs[index];
    p->count += sign * t->words[at].count;
    if (sign < 0)
        return PSOUP_OK;
    if (p->n_words == 0 || p->words[p->n_words - 1] != at) {
        PSOUP__TRY(psoup__reserve(t->context, &p->words, &p->capacity, p->n_words + 1,
                                  sizeof *p->words, t->error));
        p->words[p->n_words++] = at;
    }
    if (!p->fresh) {
        PSOUP__TRY(psoup__reserve(t->context, &t->fresh, &t->fresh_capacity, t->n_fresh + 1,
                                  sizeof *t->fresh, t->error));
        t->fresh[t->n_fresh++] = (size_t)index;
        p->fresh = true;
    }
fail:
    return status;
}

/* Replaces (left, right) by id in words[at], left to right, and counts what changes around it. */
static psoup_status merge_word(trainer *t, size_t at, int32_t left, int32_t right, int32_t id) {
    psoup_status status = PSOUP_OK;
    word *w = &t->words[at];
    size_t n = 0; /* ids written */
    for (size_t i = 0; i < w->n; n++) {
        if (i + 1 >= w->n || w->ids[i] != left || w->ids[i + 1] != right) {
            w->ids[n] = w->ids[i++];
            continue;
        }
        if (n > 0) {
            PSOUP__TRY(count_pair(t, w->ids[n - 1], left, at, -1));
            PSOUP__TRY(count_pair(t, w->ids[n - 1], id, at, 1));
        }
        if (i + 2 < w->n) {
            PSOUP__TRY(count_pair(t, right, w->ids[i + 2], at, -1));
            PSOUP__TRY(count_pair(t, id, w->ids[i + 2], at, 1));
        }
        w->ids[n] = id;
        i += 2;
    }
    w->n = n;
fail:
    return status;
}

static psoup_status queue_fresh(trainer *t) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < t->n_fresh; i++) {
        t->pairs[t->fresh[i]].fresh = false;
        PSOUP__TRY(push(t, t->fresh[i]));
    }
    t->n_fresh = 0;
fail:
    return status;
}

static psoup_status learn(trainer *t) {
    psoup_status status = PSOUP_OK;
    for (size_t at = 0; at < t->n_words; at++)
        for (size_t i = 0; i + 1 < t->words[at].n; i++)
            PSOUP__TRY(count_pair(t, t->words[at].ids[i], t->words[at].ids[i + 1], at, 1));
    PSOUP__TRY(queue_fresh(t));
    while (t->n_tokens < t->vocab_size && t->n_heap > 0) {
        entry top = pop(t);
        pair p = t->pairs[top.pair];
        if (top.count != p.count) {
            if (p.count < top.count)
                PSOUP__TRY(push(t, top.pair));
            continue;
        }
        int32_t id;
        PSOUP__TRY(add_token(t, t->names[p.left], t->names[p.right], &id));
        PSOUP__TRY(psoup__reserve(t->context, &t->merges, &t->merges_capacity, t->n_merges + 1,
                                  sizeof *t->merges, t->error));
        t->merges[t->n_merges][0] = p.left;
        t->merges[t->n_merges++][1] = p.right;
        /* The pair is done with: what merging leaves of its count (in "aaa") must not come back. */
        t->pairs[top.pair].words = NULL;
        t->pairs[top.pair].n_words = t->pairs[top.pair].capacity = 0;
        for (size_t i = 0; i < p.n_words && status == PSOUP_OK; i++)
            status = merge_word(t, p.words[i], p.left, p.right, id);
        psoup__free(t->context, p.words);
        if (status == PSOUP_OK)
            status = queue_fresh(t);
        t->pairs[top.pair].count = 0;
        if (status != PSOUP_OK)
            goto fail;
    }
fail:
    return status;
}

/* ---- from texts to words ------------------------------------------------------------------------------- */

static psoup_status add_special(trainer *t, const char *const *special, size_t n,
                                psoup__trie *trie) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < n; i++) {
        int32_t id, expected = t->n_tokens;
        size_t length = strlen(special[i]), used;
        bool valid = length > 0;
        for (size_t b = 0; valid && b < length; b += used) {
            uint32_t code;
            used = psoup__utf8_next(special[i] + b, length - b, &code);
            valid = code != 0xFFFD;
        }
        if (valid)
            PSOUP__TRY(add_token(t, special[i], "", &id));
        if (!valid || id != expected)
            return psoup__fail(t->error, PSOUP_ERROR_ARGUMENT,
                               "special token %zu, \"%.80s\": expected a UTF-8 text that is not a "
                               "token yet",
                               i, special[i]);
        PSOUP__TRY(psoup__trie_add(t->context, trie, special[i], length, (int32_t)i, t->error));
    }
fail:
    return status;
}

static psoup_status count_words(trainer *t, const char *const *texts, size_t n, const char *pattern,
                                const psoup__trie *trie, const psoup__added *added) {
    psoup_status status = PSOUP_OK;
    psoup__step list[2] = {{.kind = PSOUP__STEP_SPLIT, .behavior = PSOUP__ISOLATED},
                           {.kind = PSOUP__STEP_BYTES}};
    psoup__steps steps = {list, 2, 2};
    psoup__spans spans = {.context = t->context};
    psoup__stage stage = {.text = {.context = t->context, .limit = SIZE_MAX}}, spare = stage;
    PSOUP__TRY(psoup__pattern_create(t->context, "pattern", pattern ? pattern : PSOUP__GPT2_PATTERN,
                                     false, &list[0].pattern, t->error));
    for (size_t i = 0; i < n; i++) {
        psoup__stage_clear(&stage);
        PSOUP__TRY(psoup__aligned_read(&stage.text, texts[i], strlen(texts[i]), t->error));
        PSOUP__TRY(psoup__stage_piece(&stage, 0, stage.text.length, -1, t->error));
        PSOUP__TRY(
            psoup__added_split(trie, added, false, NULL, &stage, &spare, &spans, t->error));
        PSOUP__TRY(psoup__steps_run(&steps, &stage, &spare, &spans, t->error));
        for (size_t p = 0; p < stage.n; p++)
            if (stage.pieces[p].id < 0)
                PSOUP__TRY(add_word(t, stage.text.bytes + stage.pieces[p].begin,
                                    stage.pieces[p].end - stage.pieces[p].begin));
    }
fail:
    psoup__pattern_free(list[0].pattern);
    psoup__stage_free(&stage);
    psoup__stage_free(&spare);
    psoup__spans_free(&spans);
    return status;
}

static void trainer_free(trainer *t) {
    for (int32_t i = 0; t->names != NULL && i < t->n_tokens; i++)
        psoup__free(t->context, t->names[i]);
    for (size_t i = 0; i < t->n_words; i++)
        psoup__free(t->context, t->words[i].ids);
    for (size_t i = 0; i < t->n_pairs; i++)
        psoup__free(t->context, t->pairs[i].words);
    psoup__map_free(t->ids);
    psoup__map_free(t->seen);
    psoup__pairs_free(&t->index);
    psoup__free(t->context, t->names);
    psoup__free(t->context, t->words);
    psoup__free(t->context, t->pairs);
    psoup__free(t->context, t->heap);
    psoup__free(t->context, t->fresh);
    psoup__free(t->context, t->merges);
}

psoup_status psoup_tokenizer_train(psoup_context *context, const char *const *texts, size_t n,
                                   int32_t vocab_size, const char *const *special, size_t n_special,
                                   const char *pattern, psoup_tokenizer **out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup__trie trie = {0};
    trainer t = {.context = context, .error = error, .vocab_size = vocab_size};
    psoup__added *added = NULL;
    *out = NULL;
    if (vocab_size < 256 || (size_t)vocab_size - 256 < n_special || vocab_size > PSOUP__MAX_ID)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "vocab_size %d: expected at least 256 bytes + %zu special tokens, at "
                           "most %d",
                           vocab_size, n_special, PSOUP__MAX_ID);
    t.index.context = context;
    t.names = psoup__alloc(context, (size_t)vocab_size, sizeof *t.names, error);
    added = psoup__alloc(context, n_special, sizeof *added, error); /* ids: any, not negative */
    if (t.names == NULL || added == NULL)
        goto fail;
    PSOUP__TRY(psoup__map_create(context, (size_t)vocab_size, &t.ids, error));
    PSOUP__TRY(psoup__map_create(context, 0, &t.seen, error));
    PSOUP__TRY(add_bytes(&t));
    PSOUP__TRY(add_special(&t, special, n_special, &trie));
    PSOUP__TRY(count_words(&t, texts, n, pattern, &trie, added));
    PSOUP__TRY(learn(&t));
    psoup_json *root = psoup__tokenizer_json((const char *const *)t.names, t.n_tokens, n_special,
                                             (const int32_t(*)[2])t.merges, t.n_merges, pattern);
    if (root == NULL)
        status = psoup__out_of_memory(error, 0);
    else
        status = psoup__tokenizer_build(context, root, "trained tokenizer", out, error);
fail:
    psoup__trie_free(context, &trie);
    psoup__free(context, added);
    trainer_free(&t);
    return status;
}
