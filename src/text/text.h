/* src/text: tokenizers. Stands on src/base alone.
 *
 * A tokenizer.json is read into five lists, and encoding runs through them in this order:
 *
 *   added tokens   found in the text before anything else        added.c
 *   steps          normalizer and pre-tokenizer, both made of    steps.c, normalize.c, pretokenize.c
 *                  the same few kinds of step
 *   bpe            merges each piece                             bpe.c
 *   trim, around   the post-processor                            tokenizer.c
 *   decoders       the way back                                  decode.c
 *
 * The text that runs through is an `aligned` text: every byte carries the range of source bytes it
 * came from, so that offsets survive any rewriting. The rules follow the `tokenizers` library
 * (huggingface/tokenizers 0.20), token by token and offset by offset.
 */
#ifndef PSOUP__TEXT_H
#define PSOUP__TEXT_H

#include "base/base.h"
#include "psoup/model.h"

/* ---- utf8.c -------------------------------------------------------------------------------- */

bool psoup__is_space(uint32_t code);                /* White_Space */

/* GPT-2's printable alphabet of bytes: byte → character, and back (−1: no byte's). */
uint32_t psoup__byte_to_char(unsigned char byte);
int psoup__char_to_byte(uint32_t code);

typedef struct psoup__aligned {
    psoup_context *context;
    char *bytes;          /* [length], UTF-8 */
    psoup_offset *source; /* [length] where in the source each byte came from */
    size_t length, bytes_capacity, source_capacity;
    size_t limit; /* more bytes than this are refused: a hostile file may multiply text */
} psoup__aligned;
psoup_status psoup__aligned_append(psoup__aligned *text, const char *bytes,
                                   const psoup_offset *source, size_t n, psoup_error *error);
/* The same source for all n bytes. */
psoup_status psoup__aligned_put(psoup__aligned *text, const char *bytes, size_t n,
                                psoup_offset source, psoup_error *error);
/* Appends a caller's text, made valid UTF-8. */
psoup_status psoup__aligned_read(psoup__aligned *text, const char *bytes, size_t n,
                                 psoup_error *error);
void psoup__aligned_free(psoup__aligned *text);

/* ---- pretokenize.c --------------------------------------------------------------------------- */

typedef struct psoup__pattern psoup__pattern; /* a literal or a regular expression; shareable */
typedef struct psoup__span {
    size_t begin, end;
    bool match;
} psoup__span;
typedef struct psoup__spans { /* one thread's scratch; start from {.context = …} */
    psoup_context *context;
    psoup__span *items; /* [n] */
    size_t n, capacity;
    void *match_data;
} psoup__spans;

/* `where` names file and field in messages; it is copied. */
psoup_status psoup__pattern_create(psoup_context *context, const char *where, const char *text,
                                   bool literal, psoup__pattern **out, psoup_error *error);
void psoup__pattern_free(psoup__pattern *pattern);
/* Cuts valid UTF-8 into matches and what lies between them, in order and without gaps. */
psoup_status psoup__pattern_spans(const psoup__pattern *pattern, const char *text, size_t length,
                                  psoup__spans *out, psoup_error *error);
void psoup__spans_free(psoup__spans *spans);
#define PSOUP__GPT2_PATTERN                                                                        \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
/* A character that can belong to a word, as Rust's regex crate has \w. */
#define PSOUP__WORD_CLASS "[\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200C}\\x{200D}\\x{24B6}-\\x{24E9}]"

/* ---- normalize.c, unicode.c --------------------------------------------------------------------- */

/* Unicode normal forms C and D; the result's sources are those `tokenizers` gives. */
psoup_status psoup__normalize(const char *bytes, const psoup_offset *source, size_t n,
                              bool compose, psoup__aligned *out, psoup_error *error);

/* Canonical decomposition into one or two characters (second 0: one); false: there is none. */
bool psoup__unicode_decompose(uint32_t code, uint32_t out[2]);
uint32_t psoup__unicode_compose(uint32_t first, uint32_t second); /* 0: they do not */
int psoup__unicode_class(uint32_t code);                          /* combining class */

/* ---- steps.c ------------------------------------------------------------------------------------ */

typedef enum psoup__step_kind {
    PSOUP__STEP_REPLACE, /* every match of pattern by content */
    PSOUP__STEP_PREPEND, /* content; see `missing` and `first` */
    PSOUP__STEP_STRIP,   /* white space at left and right */
    PSOUP__STEP_NFC,
    PSOUP__STEP_NFD,
    PSOUP__STEP_SPLIT, /* at matches of pattern, by behavior */
    PSOUP__STEP_BYTES, /* every byte becomes its character of GPT-2's alphabet */
    /* of decoders only */
    PSOUP__STEP_BYTE_LEVEL,    /* the characters back into bytes */
    PSOUP__STEP_BYTE_FALLBACK, /* runs of <0xNN> into text */
    PSOUP__STEP_FUSE,          /* all tokens into one */
    PSOUP__STEP_CUT,           /* up to start and stop times content at a token's ends */
    PSOUP__STEP_METASPACE      /* content to a space; in the first token to nothing where `first` */
} psoup__step_kind;

typedef enum psoup__behavior {
    PSOUP__REMOVED,
    PSOUP__ISOLATED,
    PSOUP__MERGED_WITH_PREVIOUS,
    PSOUP__MERGED_WITH_NEXT,
    PSOUP__CONTIGUOUS
} psoup__behavior;

typedef struct psoup__step {
    psoup__step_kind kind;
    psoup__pattern *pattern; /* owned */
    const char *content;     /* borrowed */
    psoup__behavior behavior;
    bool invert;      /* SPLIT: what lies between the matches are the matches */
    bool missing;     /* PREPEND: only where the piece does not start with content */
    bool first;       /* PREPEND: only where the piece is the source's beginning */
    bool left, right; /* STRIP */
    int64_t start, stop; /* CUT */
} psoup__step;

typedef struct psoup__steps {
    psoup__step *items;
    size_t n, capacity;
} psoup__steps;
void psoup__steps_free(psoup_context *context, psoup__steps *steps);

typedef struct psoup__piece {
    size_t begin, end; /* of the stage's text */
    int32_t id;        /* an added token's; −1: still text */
} psoup__piece;

/* What encoding has made of the text so far. */
typedef struct psoup__stage {
    psoup__aligned text;
    psoup__piece *pieces; /* [n] */
    size_t n, capacity;
} psoup__stage;
psoup_status psoup__stage_piece(psoup__stage *stage, size_t begin, size_t end, int32_t id,
                                psoup_error *error);
void psoup__stage_clear(psoup__stage *stage);
void psoup__stage_free(psoup__stage *stage);

/* Runs all steps over every piece of *stage that is still text; *spare is scratch. Pieces that become
 * empty are dropped. */
psoup_status psoup__steps_run(const psoup__steps *steps, psoup__stage *stage, psoup__stage *spare,
                              psoup__spans *spans, psoup_error *error);

/* ---- added.c --------------------------------------------------------------------------------------- */

typedef struct psoup__added {
    int32_t id;
    const char *content; /* borrowed */
    bool special, single_word, lstrip, rstrip, normalized;
} psoup__added;

typedef struct psoup__trie { /* of added tokens, by their bytes */
    struct psoup__trie_node *nodes;
    size_t n, capacity;
} psoup__trie;
psoup_status psoup__trie_add(psoup_context *context, psoup__trie *trie, const char *key,
                             size_t length, int32_t added, psoup_error *error);
void psoup__trie_free(psoup_context *context, psoup__trie *trie);

/* Cuts the added tokens of `trie` out of every text piece of `in`: the same text, more pieces.
 * plain_special leaves special tokens as text. word: one character of a word, or NULL. */
psoup_status psoup__added_split(const psoup__trie *trie, const psoup__added *added,
                                bool plain_special, const psoup__pattern *word, psoup__stage *stage,
                                psoup__stage *spare, psoup__spans *spans, psoup_error *error);

/* ---- bpe.c ----------------------------------------------------------------------------------------- */

/* Pairs of ids to a value; open addressing. */
typedef struct psoup__pairs {
    psoup_context *context;
    uint64_t *slots; /* [capacity, 2] key, value */
    size_t capacity, count;
} psoup__pairs;
psoup_status psoup__pairs_set(psoup__pairs *pairs, int32_t left, int32_t right, uint64_t value,
                              psoup_error *error);
bool psoup__pairs_get(const psoup__pairs *pairs, int32_t left, int32_t right, uint64_t *value);
void psoup__pairs_free(psoup__pairs *pairs);

#define PSOUP__DIRECT 512 /* characters below this are found without hashing */
#define PSOUP__ADDED (INT64_C(1) << 32) /* only a match of the whole token has it, never a word */
typedef struct psoup__bpe {
    psoup_context *context;
    psoup__map *vocab;            /* name → id; with PSOUP__ADDED where no model.vocab has it */
    psoup__pairs merges;          /* pair → rank << 32 | id */
    int32_t direct[PSOUP__DIRECT]; /* id of a one-character token; −1 */
    int32_t bytes[256];           /* id of <0xNN>; −1 */
    int32_t unk;                  /* −1: none */
    bool byte_fallback, fuse_unk, ignore_merges;
} psoup__bpe;

typedef struct psoup__token {
    int32_t id;
    size_t begin, end; /* of the stage's text; then of the source */
} psoup__token;

typedef struct psoup__bpe_work { /* one thread's scratch and result; start from {.context = …} */
    psoup_context *context;
    struct psoup__symbol *symbols;
    struct psoup__candidate *heap;
    psoup__token *tokens; /* [n] */
    size_t symbol_capacity, heap_n, heap_capacity, n, capacity;
} psoup__bpe_work;

/* After `vocab` and the flags are set: fills `direct` and `bytes`. */
void psoup__bpe_index(psoup__bpe *bpe);
/* Appends the tokens of word[0, length), whose place in the stage's text is `base`. */
psoup_status psoup__bpe_encode(const psoup__bpe *bpe, const char *word, size_t length, size_t base,
                               psoup__bpe_work *work, psoup_error *error);
psoup_status psoup__bpe_push(psoup__bpe_work *work, int32_t id, size_t begin, size_t end,
                             psoup_error *error);
void psoup__bpe_work_free(psoup__bpe_work *work);
void psoup__bpe_free(psoup__bpe *bpe);

/* ---- tokenizer.c, parse.c, decode.c -------------------------------------------------------------------- */

#define PSOUP__MAX_ID 4194303 /* 2²² − 1: far above any vocabulary, and no memory bomb */
#define PSOUP__MAX_TEMPLATE 8 /* the 8 of "4 · length + 8" */

struct psoup_tokenizer {
    psoup_context *context;
    psoup_json *root; /* owned: the file; names and contents are borrowed from it */
    char *name;       /* of the file, for messages */
    psoup__bpe bpe;
    const char **tokens; /* [vocab_size] by id; NULL: none */
    uint8_t *special;    /* [vocab_size] */
    int32_t vocab_size;
    psoup__added *added; /* [n_added] */
    size_t n_added;
    psoup__trie raw, normalized; /* of those found before and after the normalizer */
    psoup__pattern *word;        /* where some added token is single_word */
    psoup__steps normalizer, pre_tokenizer, decoder;
    bool no_decoder;
    bool trim_offsets, trim_keeps_first; /* a ByteLevel post-processor, its add_prefix_space */
    int32_t before[PSOUP__MAX_TEMPLATE], after[PSOUP__MAX_TEMPLATE]; /* the template's tokens */
    size_t n_before, n_after;
};

/* Builds a tokenizer from a tokenizer.json in memory, or from its parsed root, which it owns from
 * then on, also on failure. `name` stands for the file in messages. */
psoup_status psoup__tokenizer_parse(psoup_context *context, const char *text, size_t length,
                                    const char *name, psoup_tokenizer **out, psoup_error *error);
psoup_status psoup__tokenizer_build(psoup_context *context, psoup_json *root, const char *name,
                                    psoup_tokenizer **out, psoup_error *error);
/* The parts of build: model and added tokens (parse_model.c), the lists of steps (parse.c). */
psoup_status psoup__parse_vocabulary(psoup_tokenizer *tokenizer, psoup_error *error);
psoup_status psoup__parse_steps(psoup_tokenizer *tokenizer, psoup_error *error);

/* build.c: the tokenizer.json of a trained byte-level BPE: names[n] by id, of which n_special from 256
 * on are special; merges by rank; pattern NULL: GPT-2's. NULL when out of memory. */
psoup_json *psoup__tokenizer_json(const char *const *names, int32_t n, size_t n_special,
                                  const int32_t (*merges)[2], size_t n_merges, const char *pattern);

/* Turns the texts of tokens, texts[n], into bytes appended to *out. */
psoup_status psoup__decode(psoup_context *context, const psoup__steps *decoder, bool no_decoder,
                           const char *const *texts, size_t n, psoup__buffer *out,
                           psoup_error *error);

#endif
