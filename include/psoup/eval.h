/* psoup/eval.h: preferences, prompts, feedback, judges and win rates. */
#ifndef PSOUP_EVAL_H
#define PSOUP_EVAL_H

#include "psoup/data.h"
#include "psoup/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- preferences --------------------------------------------------------------------------------- */

typedef struct psoup_preference {
    const char *symbol;    /* "P1A" */
    const char *dimension; /* "expertise" */
    const char *prompt;    /* "Generate a response that …" */
    const char *criterion; /* "Choose a response that …", for judges */
    const char *opposite;  /* symbol of the preference that negatives are sampled with; NULL: none */
} psoup_preference;

/* A catalogue of preferences; read-only after loading. */
typedef struct psoup_preferences psoup_preferences;
/* The paper's (its table 4 and appendix B.2): P1A … P3B, and P3C, P3D where with_new is not 0. */
psoup_status psoup_preferences_default(psoup_context *context, int with_new,
                                       psoup_preferences **out, psoup_error *error);
/* From JSON: [{"symbol", "dimension", "prompt", "opposite"?, "criterion"?}, …] or JSON Lines of the
 * same. A missing criterion is the prompt with "Generate" replaced by "Choose". */
psoup_status psoup_preferences_load(psoup_context *context, const char *path,
                                    psoup_preferences **out, psoup_error *error);
void psoup_preferences_free(psoup_preferences *preferences);
size_t psoup_preferences_count(const psoup_preferences *preferences);
const psoup_preference *psoup_preferences_get(const psoup_preferences *preferences, size_t index);
int32_t psoup_preferences_find(const psoup_preferences *preferences, const char *symbol); /* or −1 */
/* Users: one preference of each dimension, dimensions and preferences in the catalogue's order, the
 * last dimension fastest: 8 for the paper's six, 16 with the two new ones. psoup_user_get writes
 * psoup_user_size indices, and the user's name ("AAB": the symbols' last letters). */
size_t psoup_users_count(const psoup_preferences *preferences);
size_t psoup_user_size(const psoup_preferences *preferences); /* number of dimensions */
psoup_status psoup_user_get(const psoup_preferences *preferences, size_t user, int32_t *members,
                            char *name, size_t name_size, psoup_error *error);

/* Fills a prompt template: {instruction}, {input} and {preference} are replaced, surplus blanks
 * between them dropped. NULL template: Tulu's "<|user|>\n{instruction} {input} {preference}\n
 * <|assistant|>\n"; "alpaca" and "tulu" by name, anything with {instruction} is a template itself.
 * input and preference may be NULL. Free with psoup_text_free. */
psoup_status psoup_template_fill(const char *name_or_template, const char *instruction,
                                 const char *input, const char *preference, char **out,
                                 psoup_error *error);

/* ---- judges ----------------------------------------------------------------------------------------- */

typedef struct psoup_question {
    int64_t id;           /* the caller's */
    const char *prompt;   /* the instruction and its input, without preference prompts */
    const psoup_preference *preference; /* the criterion; NULL: general helpfulness */
    const char *a, *b;    /* the two responses */
    uint64_t reserved[2]; /* 0 */
} psoup_question;

enum { PSOUP_A_WINS = 1, PSOUP_TIE = 0, PSOUP_B_WINS = -1, PSOUP_UNPARSED = 2 };

/* Answers n questions at once; return non-zero on failure. */
typedef int (*psoup_judge_fn)(void *user, const psoup_question *questions, size_t n,
                              int32_t *verdicts);

typedef struct psoup_judge psoup_judge;
psoup_status psoup_judge_create(psoup_context *context, psoup_judge_fn fn, void *user,
                                psoup_judge **out, psoup_error *error);
/* Any executable that speaks JSON Lines: it is started once, reads
 *   {"id": 7, "prompt": "…", "preference": "P1A" | null, "criterion": "…", "a": "…", "b": "…"}
 * and writes, for each, {"id": 7, "verdict": "a" | "b" | "tie"} in any order; anything else counts as
 * PSOUP_UNPARSED. argv is NULL-terminated, searched on PATH, run without a shell. */
psoup_status psoup_judge_command(psoup_context *context, const char *const *argv,
                                 psoup_judge **out, psoup_error *error);
/* How long a command may be silent, in seconds, while it is asked; then asking fails with PSOUP_ERROR_IO.
 * 0, the default, waits for ever. Without effect on a callback. */
psoup_status psoup_judge_set_patience(psoup_judge *judge, double seconds, psoup_error *error);
psoup_status psoup_judge_ask(psoup_judge *judge, const psoup_question *questions, size_t n,
                             int32_t *verdicts, psoup_error *error);
void psoup_judge_free(psoup_judge *judge);

/* ---- feedback ------------------------------------------------------------------------------------------ */

typedef struct psoup_instruction {
    const char *instruction;
    const char *input; /* NULL: none */
    int64_t id;
} psoup_instruction;

typedef struct psoup_feedback_options {
    size_t size;
    const char *prompt_template; /* see psoup_template_fill */
    const float *mix;            /* of the generator, [its adapters]; NULL: its base */
    const psoup_sampling *sampling; /* NULL: defaults */
    int32_t max_sequences;       /* decoding together; 0: 64 */
    uint64_t seed;               /* of the sampling and of which positive meets whom */
    psoup_progress_fn progress;
    void *user;
    int32_t mix_method; /* since 0.5: psoup_mix_method, how the mix weighs */
    int32_t reserved;   /* 0 */
} psoup_feedback_options;
#define PSOUP_FEEDBACK_OPTIONS_INIT {.size = sizeof(psoup_feedback_options)}

/* For each instruction and preference samples two positives (with the preference prompt), a neutral
 * (without) and a negative (with the opposite preference's prompt), asks the judge which positive is
 * better by that one preference, and writes four comparisons as JSON Lines rows
 *   {"id", "preference", "kind", "instruction", "user_input", "completion_a", "completion_b"}
 * completion_a being the better: kinds "positive-positive", "positive-neutral", "positive-negative",
 * "neutral-negative"; user_input is the filled template with the preference prompt. Which positive
 * meets the neutral and the negative is random. A tie or unparsed verdict between the positives drops
 * that comparison and is counted. The generator may be another model than the policy. */
typedef struct psoup_feedback_counts {
    size_t size;
    size_t written, ties, unparsed;
} psoup_feedback_counts;
psoup_status psoup_feedback(psoup_model *generator, const psoup_tokenizer *tokenizer,
                            const psoup_preferences *preferences,
                            const psoup_instruction *instructions, size_t n, psoup_judge *judge,
                            const psoup_feedback_options *options, const char *path,
                            psoup_feedback_counts *counts, psoup_error *error);

/* ---- win rates ------------------------------------------------------------------------------------------ */

/* One comparison of responses A and B to one prompt for one user. */
typedef struct psoup_duel {
    int64_t prompt;             /* which prompt: intervals resample prompts, not rows */
    int64_t user;               /* which user */
    const int32_t *preferences; /* [n] indices of the user's criteria, any stable numbering */
    const int32_t *verdicts;    /* [n] PSOUP_A_WINS, …, one per criterion */
    size_t n;
    int32_t helpfulness; /* verdict on general helpfulness; PSOUP_UNPARSED where not asked */
    uint64_t reserved[2]; /* 0 */
} psoup_duel;

typedef struct psoup_rate {
    double rate;      /* wins / (wins + losses), of a criterion the users' mean; NaN when all tie */
    double low, high; /* 95 % interval: bootstrap over prompts, 2.5 and 97.5 percentiles */
    int64_t wins, ties, losses, unparsed;
    double reserved[4]; /* 0 */
} psoup_rate;

/* Aggregate: the sign of the sum of a duel's verdicts (an unparsed verdict counts 0 there and is
 * counted apart). */
psoup_status psoup_winrate_aggregate(psoup_context *context, const psoup_duel *duels, size_t n,
                                     uint64_t seed, psoup_rate *out, psoup_error *error);
/* One criterion over the duels that contain it: the mean of its users' rates (the paper's mean over the
 * combinations that contain the criterion), each wins / (wins + losses) of that user's duels. */
psoup_status psoup_winrate_criterion(psoup_context *context, const psoup_duel *duels, size_t n,
                                     int32_t preference, uint64_t seed, psoup_rate *out,
                                     psoup_error *error);
psoup_status psoup_winrate_helpfulness(psoup_context *context, const psoup_duel *duels, size_t n,
                                       uint64_t seed, psoup_rate *out, psoup_error *error);
/* Asks the judge about each duel's criteria, and where `helpfulness` is not 0 about that. With `swap`
 * every question is asked in both orders and a verdict that changes sides is a tie. verdicts
 * [Σ n_i] and helpful [n] (may be NULL) receive the answers. */
psoup_status psoup_judge_duels(psoup_judge *judge, const psoup_preferences *preferences,
                               const char *const *prompts, const char *const *a,
                               const char *const *b, const psoup_duel *duels, size_t n, int swap,
                               int32_t *verdicts, int32_t *helpful, psoup_error *error);

#ifdef __cplusplus
}
#endif
#endif
