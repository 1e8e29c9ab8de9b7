/* Added tokens: found in the text by a trie, leftmost first and longest among those. */
#include "text/text.h"

#include <string.h>

struct psoup__trie_node {
    int32_t child, sibling; /* 0: none; node 0 is the root */
    int32_t added;          /* index of the token that ends here; −1 */
    unsigned char byte;
};

static psoup_status new_node(psoup_context *context, psoup__trie *trie, unsigned char byte,
                             int32_t *out, psoup_error *error) {
    if (trie->n >= INT32_MAX)
        return psoup__out_of_memory(error, trie->n);
    psoup_status status = psoup__reserve(context, &trie->nodes, &trie->capacity, trie->n + 1,
                                         sizeof *trie->nodes, error);
    if (status != PSOUP_OK)
        return status;
    trie->nodes[trie->n] = (struct psoup__trie_node){.added = -1, .byte = byte};
    *out = (int32_t)trie->n++;
    return PSOUP_OK;
}

static int32_t child_of(const psoup__trie *trie, int32_t node, unsigned char byte) {
    int32_t child = trie->nodes[node].child;
    while (child != 0 && trie->nodes[child].byte != byte)
        child = trie->nodes[child].sibling;
    return child;
}

psoup_status psoup__trie_add(psoup_context *context, psoup__trie *trie, const char *key,
                             size_t length, int32_t added, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t node = 0;
    if (trie->n == 0)
        PSOUP__TRY(new_node(context, trie, 0, &node, error));
    for (size_t i = 0; i < length; i++) {
        unsigned char byte = (unsigned char)key[i];
        int32_t child = child_of(trie, node, byte);
        if (child == 0) {
            PSOUP__TRY(new_node(context, trie, byte, &child, error));
            trie->nodes[child].sibling = trie->nodes[node].child;
            trie->nodes[node].child = child;
        }
        node = child;
    }
    if (length > 0 && trie->nodes[node].added < 0)
        trie->nodes[node].added = added;
fail:
    return status;
}

void psoup__trie_free(psoup_context *context, psoup__trie *trie) {
    psoup__free(context, trie->nodes);
    *trie = (psoup__trie){0};
}

/* The longest token at the start of text; −1: none. */
static int32_t longest(const psoup__trie *trie, const char *text, size_t length, size_t *used) {
    int32_t node = 0, best = -1;
    for (size_t i = 0; i < length; i++) {
        node = child_of(trie, node, (unsigned char)text[i]);
        if (node == 0)
            break;
        if (trie->nodes[node].added >= 0) {
            best = trie->nodes[node].added;
            *used = i + 1;
        }
    }
    return best;
}

/* Start of the character that ends at `end` (> 0) in valid UTF-8. */
static size_t back(const char *text, size_t end) {
    do
        end--;
    while (end > 0 && ((unsigned char)text[end] & 0xC0) == 0x80);
    return end;
}

static psoup_status is_word(const psoup__pattern *word, const char *text, size_t length,
                            psoup__spans *spans, bool *out, psoup_error *error) {
    psoup_status status = psoup__pattern_spans(word, text, length, spans, error);
    *out = status == PSOUP_OK && spans->n > 0 && spans->items[0].match;
    return status;
}

/* Whether the token at [begin, end) stands alone, neither preceded nor followed by a word's character. */
static psoup_status stands_alone(const psoup__pattern *word, const char *text, size_t length,
                                 size_t begin, size_t end, psoup__spans *spans, bool *out,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool left = false, right = false;
    if (begin > 0) {
        size_t start = back(text, begin);
        PSOUP__TRY(is_word(word, text + start, begin - start, spans, &left, error));
    }
    if (end < length) {
        uint32_t code;
        size_t used = psoup__utf8_next(text + end, length - end, &code);
        PSOUP__TRY(is_word(word, text + end, used, spans, &right, error));
    }
fail:
    *out = !left && !right;
    return status;
}

/* Spaces around a token that asks for them; not those of the token before. */
static void widen(const psoup__added *token, const char *text, size_t length, size_t done,
                  size_t *begin, size_t *end) {
    uint32_t code;
    while (token->lstrip && *begin > done) {
        size_t start = back(text, *begin);
        psoup__utf8_next(text + start, *begin - start, &code);
        if (!psoup__is_space(code))
            break;
        *begin = start;
    }
    while (token->rstrip && *end < length) {
        size_t used = psoup__utf8_next(text + *end, length - *end, &code);
        if (!psoup__is_space(code))
            break;
        *end += used;
    }
    if (*begin < done) /* an rstrip before has taken this token's own leading spaces */
        *begin = done;
}

psoup_status psoup__added_split(const psoup__trie *trie, const psoup__added *added,
                                bool plain_special, const psoup__pattern *word, psoup__stage *stage,
                                psoup__stage *spare, psoup__spans *spans, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (trie->n == 0)
        return PSOUP_OK;
    spare->n = 0;
    for (size_t p = 0; p < stage->n; p++) {
        psoup__piece piece = stage->pieces[p];
        if (piece.id >= 0) {
            PSOUP__TRY(psoup__stage_piece(spare, piece.begin, piece.end, piece.id, error));
            continue;
        }
        const char *text = stage->text.bytes + piece.begin;
        size_t length = piece.end - piece.begin, done = 0, used = 0;
        for (size_t i = 0; i < length;) {
            int32_t at = longest(trie, text + i, length - i, &used);
            size_t begin = i, end = i + used;
            if (at < 0) {
                i++;
                continue;
            }
            i = end; /* matches do not overlap, whether they are kept or not */
            bool alone = true;
            if ((added[at].special && plain_special) || end <= done)
                continue;
            if (added[at].single_word)
                PSOUP__TRY(stands_alone(word, text, length, begin, end, spans, &alone, error));
            if (!alone)
                continue;
            widen(&added[at], text, length, done, &begin, &end);
            if (done < begin)
                PSOUP__TRY(psoup__stage_piece(spare, piece.begin + done, piece.begin + begin, -1,
                                              error));
            PSOUP__TRY(psoup__stage_piece(spare, piece.begin + begin, piece.begin + end,
                                          added[at].id, error));
            done = end;
        }
        if (done < length)
            PSOUP__TRY(
                psoup__stage_piece(spare, piece.begin + done, piece.begin + length, -1, error));
    }
    psoup__piece *pieces = stage->pieces;
    size_t capacity = stage->capacity;
    stage->pieces = spare->pieces;
    stage->n = spare->n;
    stage->capacity = spare->capacity;
    spare->pieces = pieces;
    spare->capacity = capacity;
    spare->n = 0;
fail:
    return status;
}
