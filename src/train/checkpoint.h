/* src/train/checkpoint.h: a trainer's run in a file, so that it can go on with the same bytes.
 *
 * A trainer says what its run is (what must be the same for it to go on) and lists the pieces of its
 * state, once; the same list is written and read. A file is of the moment after a step and the validation
 * that is due there; or, where the run was told to stop in between, before that, as the state says. Of a step in
 * progress it may hold what was begun.
 */
#ifndef PSOUP__CHECKPOINT_H
#define PSOUP__CHECKPOINT_H

#include "merge/hash.h"
#include "train/train.h"

/* What a step in progress has made so far: as many numbers as it has come to. */
typedef struct psoup__begun {
    int32_t *data; /* [n] */
    size_t n, capacity;
} psoup__begun;

/* Numbers of a run's state, where they live. */
typedef struct psoup__piece {
    const char *name;
    psoup_dtype dtype;  /* F32, F64, I32, I64 (of either sign), U8 */
    void *data;         /* [n] */
    size_t n;
    psoup__backend *be; /* whose memory data is; NULL: the host's */
    psoup__best *best;  /* whose data it is then: [n], or none yet */
    psoup__begun *begun; /* whose data it is then: n at most */
    size_t owner;       /* which learner or policy it belongs to, */
    size_t part;        /* and to which of its adapters */
} psoup__piece;

typedef struct psoup__checkpoint {
    psoup_context *context;
    psoup__team *team;
    const char *directory; /* borrowed; NULL: no checkpoints are made, or rank 0 makes them */
    bool kept;             /* somebody makes them */
    int32_t every, keep;
    bool resume;
    bool join;     /* policies that a checkpoint has not yet may begin: */
    size_t before; /* those from this one on, once one was read */
    int lock; /* the directory, held by flock */
    psoup__reporter *reporter;
    int64_t metrics, samples; /* bytes of its files; −1: none */
    psoup_json *run; /* what the run is: texts and numbers by name */
    psoup__piece *pieces;
    size_t n, capacity;
    float *buffer; /* [PSOUP__PIECE] */
} psoup__checkpoint;

/* Takes the directory, which nobody else may be using; of several ranks rank 0 does. Without a directory they
 * still compare what each one's run is. */
static inline bool psoup__checkpoint_wanted(const char *directory, const psoup__team *team) {
    return directory || team->comm;
}
psoup_status psoup__checkpoint_open(psoup__checkpoint *c, psoup_context *context,
                                    psoup__reporter *reporter, const char *directory, int32_t every,
                                    int32_t keep, bool resume, psoup_error *error);
void psoup__checkpoint_close(psoup__checkpoint *c); /* takes a zeroed struct */

/* What the run is. Keys are "WHAT" or, of one learner or policy, "WHAT OWNER". */
#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
psoup_status psoup__run_text(psoup__checkpoint *c, const char *key, psoup_error *error,
                             const char *format, ...);
/* The options, but those that say where files are and how the run is kept. */
psoup_status psoup__run_options(psoup__checkpoint *c, const psoup_field *fields, const void *options,
                                psoup_error *error);
psoup_status psoup__run_base(psoup__checkpoint *c, const char *key, const psoup_model *model,
                             psoup_error *error);
/* Name, shape and scales of an adapter; with `weights` those too, where they are not the run's state. */
psoup_status psoup__run_adapter(psoup__checkpoint *c, const char *key, const psoup_model *model,
                                const psoup__adapter *adapter, bool weights, psoup_error *error);
/* "N WHAT, FINGERPRINT" of what was hashed. */
psoup_status psoup__run_rows(psoup__checkpoint *c, const char *key, size_t n, const psoup__hash *hash,
                             psoup_error *error);
void psoup__hash_tokens(psoup__hash *hash, const int32_t *tokens, size_t n);

/* What its state is. */
psoup_status psoup__checkpoint_add(psoup__checkpoint *c, size_t owner, const psoup__piece *pieces,
                                   size_t n, psoup_error *error);
psoup_status psoup__checkpoint_add_learner(psoup__checkpoint *c, size_t owner, psoup__optimizer *o,
                                           psoup__best *best, psoup_error *error);
/* The same of one of its adapters, where it has several: `part` from 0. */
psoup_status psoup__checkpoint_add_part(psoup__checkpoint *c, size_t owner, size_t part,
                                        psoup__optimizer *o, psoup__best *best, psoup_error *error);

/* Reads the newest checkpoint into the state, or where there is none writes that of step 0. Of several ranks
 * all have to be of one run, and have rank 0's state afterwards. */
psoup_status psoup__checkpoint_start(psoup__checkpoint *c, psoup_error *error);
/* After a step's reports, which came to `told`: writes a checkpoint when one is due, it was the last step,
 * the run was told to stop, or a rank is gone, when the state is that of the step before. Returns `told`, or why it could not be written. */
psoup_status psoup__checkpoint_after(psoup__checkpoint *c, psoup_status told, int64_t step, bool last,
                                     psoup_error *error);
/* The same where those who moved are not at the step that the file is called by: they joined later. */
psoup_status psoup__checkpoint_at(psoup__checkpoint *c, psoup_status told, int64_t step, int64_t moved,
                                  bool last, psoup_error *error);
/* Writes one now, of a step in progress; on rank 0, where it keeps the run. */
psoup_status psoup__checkpoint_now(psoup__checkpoint *c, int64_t step, psoup_error *error);
/* ranks.c: refuses ranks that are of another run than rank 0, naming the difference. */
psoup_status psoup__ranks_agree(psoup__checkpoint *c, psoup_error *error);
/* Rank 0's state to all. */
psoup_status psoup__ranks_share(psoup__checkpoint *c, psoup_error *error);

/* Refuses a state that was read and makes no sense. */
psoup_status psoup__checkpoint_expect(const psoup__checkpoint *c, bool sense, const char *what,
                                      psoup_error *error);

#endif
