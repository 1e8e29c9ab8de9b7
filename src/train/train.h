/* src/train: optimiser, passes, checkpoints; supervised fine-tuning, reward models, DPO. Stands on src/model and
 * calls ops only for the optimiser and to move what a pass reads.
 *
 * Side by side. Reward models and policies train in shared passes, or a small base's in lanes of their own
 * (passes.c), and yet each must carry the bits it would have alone. Three rules give that: every model's rows keep their
 * own order and are cut into chunks and lanes by their own lengths alone; its sums, normalisers and optimiser are its
 * own; and its random words come from its own seed and its own counters, never from a shared stream.
 */
#ifndef PSOUP__TRAIN_H
#define PSOUP__TRAIN_H

#include "model/model.h"
#include "psoup/train.h"

/* ---- random words ---------------------------------------------------------------------------- */

typedef enum psoup__purpose { /* what a trainer draws; each has a Philox key of its own */
    PSOUP__FOR_SAMPLING,      /* the caller's seed itself */
    PSOUP__FOR_ORDER,
    PSOUP__FOR_MINI_BATCHES,
    PSOUP__FOR_LIMITS,
    PSOUP__FOR_LORA_DROPOUT,
    PSOUP__FOR_HEAD_DROPOUT,
    PSOUP__FOR_VALIDATION,
    PSOUP__FOR_SAMPLES,
    PSOUP__FOR_MIXES
} psoup__purpose;
static inline uint64_t psoup__seed_for(uint64_t seed, psoup__purpose purpose) {
    return seed ^ (UINT64_C(0x9E3779B97F4A7C15) * (uint64_t)purpose);
}
/* order = a permutation of 0 … n−1, the same for equal (seed, sequence). */
void psoup__permutation(int32_t *order /* [n] */, size_t n, uint64_t seed, uint64_t sequence);

/* ---- optim.c ----------------------------------------------------------------------------------- */

/* AdamW over one flat buffer. */
typedef struct psoup__optimizer {
    psoup__backend *be;
    float *p, *g;  /* device [n], borrowed */
    int32_t gradients; /* how many g's lie one after another, `stride` floats apart; 0 is 1 */
    size_t stride;
    float *m, *v;  /* device [n] */
    size_t n;
    int64_t steps; /* made so far */
    float beta1, beta2, epsilon, weight_decay, max_grad_norm, max_grad_value;
} psoup__optimizer;
/* p, g, n and the hyperparameters are set by the caller; this adds the moments. */
psoup_status psoup__optimizer_start(psoup__optimizer *optimizer, psoup__backend *be,
                                    psoup_error *error);
void psoup__optimizer_end(psoup__optimizer *optimizer); /* takes a zeroed struct */
void psoup__optimizer_zero(psoup__optimizer *optimizer); /* all g = 0 */
void psoup__optimizer_gather(psoup__optimizer *optimizer); /* g = the sum of all, in their order */
/* One step at rate `lr`, with g clipped to max_grad_value and then max_grad_norm; *norm is g's before both. A
 * gradient that is not finite steps nothing: *stepped is false and p, m, v and the counter are as they were. */
psoup_status psoup__optimizer_step(psoup__optimizer *optimizer, float lr, double *norm,
                                   bool *stepped, psoup_error *error);
/* The same of n of them as if their buffers were one: clipped by their common norm, and stepped all or
 * none. */
psoup_status psoup__optimizers_step(psoup__optimizer *const *optimizers, size_t n, float lr,
                                    double *norm, bool *stepped, psoup_error *error);
/* The rate of step `step` (from 1) of `total`: warm-up from 0, then the schedule. */
float psoup__learning_rate(float peak, psoup_schedule schedule, int64_t warmup, int64_t step,
                           int64_t total);

/* An optimiser's weights and moments on the host, to go back to. */
typedef struct psoup__snapshot {
    float *data; /* [3n]; NULL: none */
    int64_t steps;
} psoup__snapshot;
psoup_status psoup__snapshot_take(psoup__snapshot *snapshot, const psoup__optimizer *optimizer,
                                  psoup_error *error);
void psoup__snapshot_restore(const psoup__snapshot *snapshot, psoup__optimizer *optimizer);
void psoup__snapshot_free(psoup__snapshot *snapshot, psoup_context *context);

/* ---- team.c: one rank's part in a run of several ----------------------------------------------- */

typedef struct psoup__team {
    psoup_context *context;
    const psoup_comm *comm; /* NULL: one process alone */
    int32_t rank, world;
    int64_t *load; /* [world] rows dealt to each */
    float *piece;  /* [PSOUP__PIECE] */
    bool lost;     /* a call failed: some rank is gone, and nothing works any more */
    psoup_status agreed; /* how the run ends, where all ranks know that; PSOUP_OK: it goes on */
} psoup__team;
psoup_status psoup__team_join(psoup__team *team, psoup_context *context, const psoup_comm *comm,
                              psoup_error *error);
void psoup__team_leave(psoup__team *team); /* takes a zeroed struct */
/* After a failure that the others do not know of, tells them: they are not kept waiting. */
void psoup__team_tell(psoup__team *team, psoup_status status, const psoup_error *error);
/* Shares rows out: every rank deals the same items in the same order, each of which goes to the one that has
 * the fewest rows so far; true where that is this one. */
void psoup__team_deal(psoup__team *team);
bool psoup__team_mine(psoup__team *team, int64_t rows);
/* x[i] ← Σ over ranks; of host memory, or of an optimiser's gradients, gathered first. */
psoup_status psoup__team_sum(psoup__team *team, double *x, size_t n, psoup_error *error);
psoup_status psoup__team_sum_floats(psoup__team *team, float *x, size_t n, psoup_error *error);
psoup_status psoup__team_sum_gradient(psoup__team *team, psoup__optimizer *optimizer, psoup_error *error);
psoup_status psoup__team_sum_ids(psoup__team *team, int32_t *x, size_t n, psoup_error *error); /* exact */
psoup_status psoup__team_max(psoup__team *team, double *x, psoup_error *error); /* over ranks */
psoup_status psoup__team_count(psoup__team *team, size_t *n, psoup_error *error);
/* Whether any rank says stop; or where what rank 0 did alone before has failed, its status and error to all. */
psoup_status psoup__team_vote(psoup__team *team, psoup_status own, bool *stop, psoup_error *error);
psoup_status psoup__team_broadcast(psoup__team *team, void *data, size_t bytes, psoup_error *error);
/* What came of something that rank 0 did alone: its status, and its error, to all. */
psoup_status psoup__team_outcome(psoup__team *team, psoup_status status, psoup_error *error);

/* optim.c: psoup__optimizer_step for a loss, which must be finite too. Rank 0's log tells that nothing was stepped. */
psoup_status psoup__guarded_step(const psoup__team *team, psoup__optimizer *optimizer, float lr, double loss,
                                 const char *trainer, const char *subject, int64_t step, double *norm,
                                 bool *stepped, psoup_error *error);

/* ---- best.c ------------------------------------------------------------------------------------ */

/* The best weights so far, on the host. */
typedef struct psoup__best {
    float *data; /* [n]; NULL until something was kept */
    size_t n;
    double value, tie; /* larger value is better; among equals larger tie */
    int64_t step;
} psoup__best;
/* Keeps p (device [n]) when (value, tie) beats what is kept; NaN never does. */
psoup_status psoup__best_offer(psoup__best *best, psoup__backend *be, const float *p, size_t n,
                               double value, double tie, int64_t step, psoup_error *error);
void psoup__best_restore(const psoup__best *best, psoup__backend *be, float *p);
/* Rank 0's log tells of which step they are, where any were kept. */
void psoup__best_tell(const psoup__best *best, const psoup__team *team, const char *trainer, const char *subject,
                      int64_t total);
void psoup__best_free(psoup__best *best, psoup_context *context);

/* ---- metrics.c --------------------------------------------------------------------------------- */

#define PSOUP__MAX_SOUP 64 /* adapters of a soup that is trained as one */
#define PSOUP__MAX_SOURCES 64 /* rewards of a policy */
#define PSOUP__MAX_METRICS (24 + PSOUP__MAX_SOURCES)
#define PSOUP__MAX_TIMES 8
typedef struct psoup__metrics {
    const char *name[PSOUP__MAX_METRICS];
    double value[PSOUP__MAX_METRICS];
    size_t n;
    const char *time_name[PSOUP__MAX_TIMES]; /* what the clock says: not for the file */
    double time[PSOUP__MAX_TIMES];
    size_t n_times;
} psoup__metrics;
void psoup__metric(psoup__metrics *metrics, const char *name, double value);
void psoup__metric_time(psoup__metrics *metrics, const char *name, double value);
/* "seconds" and "tokens_per_second" of a step that began at `since`. */
void psoup__metric_speed(psoup__metrics *metrics, double since, size_t tokens);
double psoup__now(void); /* seconds, of a clock that only goes forward */

typedef struct psoup__reporter {
    psoup__team *team;
    psoup_jsonl_writer *writer; /* NULL: no file */
    psoup_jsonl_writer *samples; /* the same of the policies' samples */
    psoup_step_fn on_step;
    void *user;
} psoup__reporter;
/* The file is rank 0's alone. */
psoup_status psoup__reporter_open(psoup__reporter *reporter, psoup__team *team, const char *path,
                                  psoup_step_fn on_step, void *user, psoup_error *error);
/* Writes the line, then calls back; PSOUP_ERROR_CANCELLED when the callback says so, of any rank. Where the line
 * cannot be written all ranks learn why. */
psoup_status psoup__report(psoup__reporter *reporter, const char *phase, const char *subject,
                           int64_t step, int64_t total, const psoup__metrics *metrics,
                           psoup_error *error);
void psoup__reporter_close(psoup__reporter *reporter);
/* Adds what one learner's part came to. All of them are told of a step, also when one of them said stop, or when a
 * rank is gone, as rank 0 then keeps the run as it is after this step; any other failure ends it at once. */
static inline bool psoup__goes_on(const psoup__team *team, psoup_status *status, psoup_status one) {
    if (one != PSOUP_OK)
        *status = one;
    return one == PSOUP_OK || one == PSOUP_ERROR_CANCELLED || team->lost;
}

/* ---- options.c --------------------------------------------------------------------------------- */

psoup_status psoup__sft_check(const psoup_sft_options *options, psoup_error *error);
/* sft.c: refuses examples that make no sense. */
psoup_status psoup__sft_check_examples(const psoup_example *examples, size_t n, const char *what,
                                       psoup_error *error);
psoup_status psoup__reward_check(const psoup_reward_options *options, psoup_error *error);
psoup_status psoup__dpo_check(const psoup_dpo_options *options, psoup_error *error);

/* ---- pair_loss.c -------------------------------------------------------------------------------- */

/* −log σ(w − l − margin) + centering (w + l)², and its derivatives by w and l. */
double psoup__bradley_terry(double w, double l, double margin, double centering, double *dw,
                            double *dl);

/* DPO's loss of a pair; w and l are log π − log π_ref of the chosen and the rejected response. *dw is its
 * derivative by w, and −*dw that by l. */
double psoup__dpo_loss(double w, double l, double beta, double smoothing, double *dw);

/* ---- pack.c: what runs in one pass -------------------------------------------------------------- */

#define PSOUP__PASS_TOKENS 4096 /* of a pass where no option says */

/* Assigns items (in order of owner) to passes of at most `bound` rows; a longer item runs alone. An
 * owner's items are cut into chunks by their own lengths alone; chunks of several owners share a pass
 * where they fit, and those of one owner run in their order. */
psoup_status psoup__plan(psoup_context *context, const int32_t *rows /* [n] */,
                         const int32_t *owner /* [n], ascending */, size_t n, int64_t bound,
                         int32_t *pass /* [n] */, int32_t *passes, psoup_error *error);

/* A sequence in two pieces: a prompt and what follows. */
typedef struct psoup__sequence {
    const int32_t *first, *then;
    size_t n_first, n_then;
    int32_t adapter;       /* its mix is one-hot here; −1: the base */
    uint64_t seed, stream; /* of dropout */
    const int32_t *adapters; /* [n_adapters] or, where not NULL, its mix is over these: */
    const float *weight;     /* [n_adapters] */
    size_t n_adapters;
} psoup__sequence;

/* A pass being filled, run, and differentiated. */
typedef struct psoup__pack {
    psoup_model *model;
    psoup__tape *tape;
    /* sequences */
    size_t n, rows, sequence_capacity, row_capacity, mix_capacity;
    int32_t *tokens;         /* [rows] */
    int32_t *start;          /* [n + 1] */
    uint64_t *seed, *stream; /* [n] */
    float *mix;              /* [n, n_adapters] */
    /* log-probs that are read */
    size_t reads, read_capacity;
    int32_t *row, *target;     /* [reads] */
    float *logprob, *dlogprob; /* [reads] */
    /* values that are read: each the weighted sum of heads' outputs on a row */
    size_t values, value_capacity;
    float *value, *dvalue; /* [values] */
    /* those outputs; one list per run of equal adapters */
    size_t head_reads, head_capacity, lists, list_capacity;
    int32_t *head_row;                               /* [head_reads] */
    int32_t *head_at;                                /* [head_reads] which value it is part of, */
    float *head_weight;                              /* [head_reads] and by what weight */
    uint64_t *head_seed, *head_stream, *head_offset; /* [head_reads] */
    psoup__head_rows *list;                           /* [lists] */
    psoup__dropout *list_dropout;                     /* [lists] */
    /* what was read, and the loss's gradient by it, where the pass ran */
    struct {
        float *logprob, *dlogprob; /* device [reads] */
        float *value, *dvalue;     /* device [values] */
        float *memory;
        size_t capacity;
    } device;
} psoup__pack;
/* recompute: see psoup__tape_recompute. */
psoup_status psoup__pack_create(psoup_model *model, bool recompute, psoup__pack **out, psoup_error *error);
void psoup__pack_free(psoup__pack *pack);
void psoup__pack_clear(psoup__pack *pack);
/* *row receives the sequence's first row. */
psoup_status psoup__pack_sequence(psoup__pack *pack, const psoup__sequence *sequence, int32_t *row,
                                  psoup_error *error);
psoup_status psoup__pack_read(psoup__pack *pack, int32_t row, int32_t target, psoup_error *error);
/* Values to come, of no heads yet; *first receives the first one's place. */
psoup_status psoup__pack_values(psoup__pack *pack, size_t n, size_t *first, psoup_error *error);
/* Adds weight · the adapter's head on a row to a value. */
psoup_status psoup__pack_head(psoup__pack *pack, const psoup__adapter *adapter, int32_t row,
                              size_t value, float weight, uint64_t seed, uint64_t stream,
                              uint64_t offset, psoup_error *error);
/* A value that is one head's output, without dropout. */
psoup_status psoup__pack_score(psoup__pack *pack, const psoup__adapter *adapter, int32_t row,
                               psoup_error *error);
/* Runs it: the device then has log-probs and values. */
psoup_status psoup__pack_forward(psoup__pack *pack, bool save, float lora_dropout,
                                 float head_dropout, psoup_error *error);
/* From the device's dlogprob and dvalue to the gradients of the adapters (or the base). */
psoup_status psoup__pack_backward(psoup__pack *pack, psoup_error *error);
/* For losses that the host computes: fills logprob and value from the device, and waits for it; gives it dlogprob and
 * dvalue, which are 0 where nothing was written. */
psoup_status psoup__pack_fetch(psoup__pack *pack, psoup_error *error);
void psoup__pack_send(psoup__pack *pack);

/* ---- passes.c ------------------------------------------------------------------------------------ */

typedef struct psoup__runner { /* of one thread */
    psoup__pack *pack; /* made when it first has a pass */
    psoup_status status;
    psoup_error error;
} psoup__runner;

/* The passes of a list of items. */
typedef struct psoup__passes {
    psoup_model *model;
    bool recompute, small, in_lanes, learn; /* small: of a model that runs in lanes; in_lanes: and these passes do */
    int32_t runners, n, lanes, longest; /* n: passes; longest: rows of an item */
    int64_t at_once;                    /* lanes, at most */
    psoup__runner *runner; /* [runners] */
    size_t capacity;
    size_t *begin, *end; /* [n] a pass's items are those of [begin, end) whose `pass` it is */
    int32_t *first;      /* [lanes + 1] lane k runs passes first[k] … first[k + 1] − 1 */
    int32_t *gradient;   /* [lanes] which of its adapters' gradients it adds to */
} psoup__passes;
/* recompute: see psoup__tape_recompute. */
psoup_status psoup__passes_create(psoup_model *model, bool recompute, psoup__passes **out, psoup_error *error);
void psoup__passes_free(psoup__passes *passes);
/* Assigns items, in order of owner, to passes, as psoup__plan does; or of a model that runs in lanes, to smaller ones,
 * of which so many run at once that they have no more than `bound` rows. `learn`: there will be a backward. */
psoup_status psoup__passes_plan(psoup__passes *passes, const int32_t *rows /* [n] */, const int32_t *owner /* [n] */,
                                size_t n, int64_t bound, bool learn, int32_t *pass /* [n] */, psoup_error *error);
/* How many passes of so many items of equal length run at once, and the *rows of the largest. */
int64_t psoup__passes_at_once(const psoup_model *model, int64_t owners, int64_t items, int64_t length, int64_t bound,
                              bool learn, int64_t *rows);
/* Fills an empty pack with a pass, runs it, and takes what came of it. In lanes several are called at once: one
 * writes where no other writes or reads. */
typedef psoup_status (*psoup__pass_fn)(void *user, psoup__pack *pack, int32_t pass, psoup_error *error);
psoup_status psoup__passes_run(psoup__passes *passes, psoup__pass_fn fn, void *user, psoup_error *error);

/* ---- reward.c ---------------------------------------------------------------------------------- */

struct psoup_reward {
    psoup_model *model;
    char *name;
    psoup__passes *passes; /* of psoup_reward_score; made when first needed */
};
/* The adapter and its number; PSOUP_ERROR_STATE when it is gone or has lost its head. */
psoup_status psoup__reward_adapter(const psoup_reward *reward, psoup__adapter **adapter,
                                   int32_t *index, psoup_error *error);
psoup_status psoup__reward_passes(psoup_reward *reward, psoup__passes **passes, psoup_error *error);
/* out[i] = the head of sequences[i].adapter on its last token. */
psoup_status psoup__score_sequences(psoup__passes *passes, const psoup__sequence *sequences, size_t n,
                                    float *out, psoup_error *error);

#endif
