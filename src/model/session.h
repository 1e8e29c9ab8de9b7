/* What a session is, for session.c and window.c. */
#ifndef PSOUP__SESSION_H
#define PSOUP__SESSION_H

#include "model/tape.h"

/* One sequence, waiting or running. */
typedef struct sequence {
    struct sequence *next; /* in the queue */
    int64_t id;
    uint64_t stream;
    psoup_sampling sampling; /* stop_tokens is ours */
    int32_t *stop, n_stop;
    int32_t *tokens; /* [prompt + room]: prompt, then output */
    int32_t prompt, length, room;
    int32_t past; /* tokens whose keys and values the cache holds */
    int32_t *pages, n_pages; /* of the cache, [n_views, n_pages]; it has them while it runs */
    float *mix; /* [n_adapters] */
    int32_t method; /* psoup_mix_method */
    psoup__view *views; /* [n_views]: whose logits are mixed, each with keys and values of its own */
    int32_t n_views;    /* 1: the mix itself has the logits, or one policy alone */
    uint64_t edition; /* of the model's adapters */
    int32_t *banned; /* [n_stop + prompt + room] */
} sequence;

/* What a sequence does in this step. */
typedef struct part {
    sequence *s;
    int32_t take;    /* rows */
    int32_t view;    /* which of the sequence's; its parts follow one another */
    bool ready;      /* its last row gives logits */
    int32_t last;    /* that row */
    int32_t sampled; /* of view 0: the sequence's place among those that get a token; else −1 */
} part;

/* What decodes on the device by itself (window.c); device memory, for as many sequences as there are places, sized at
 * the first use. */
typedef struct psoup__window {
    psoup__decoding *decoding;        /* [places]; NULL: there is no memory yet */
    psoup__draw *draw;
    int32_t *history, *banned, *stop; /* [places, max_tokens], [places, MOST_STOP + max_tokens], [places, MOST_STOP] */
    int32_t *drawn, *token;           /* [places]; [places, steps], what the steps drew */
    float *drawn_logprob, *logprob;
    int32_t *first;                   /* [places + 1]: of a sequence's rows, whose logits are summed by weight */
    float *weight;                    /* [places] */
} psoup__window;

struct psoup_session {
    psoup_model *model;
    psoup__tape *tape;
    int32_t places, max_tokens, prefill_rows;
    psoup__cache *cache;
    sequence **running; /* [places], in order of admission */
    int32_t n_running, views_running; /* sequences, and places that they take: one for each view */
    sequence *first_waiting, *last_waiting;
    size_t n_waiting;
    /* The step's batch: host arrays, sized once. */
    part *parts;                      /* [places] */
    int32_t *tokens;                  /* [prefill_rows + places] */
    int32_t *start, *past;            /* [places + 1], [places] */
    int32_t **pages;                  /* [places] */
    float *mix;                       /* [places, n_adapters] */
    size_t mix_capacity;
    int32_t *method;                  /* [places] */
    int32_t *sample_row, *sample_first; /* [places], [places + 1]: see psoup__mixtures */
    float *sample_weight;             /* [places] */
    psoup__draw *draws;               /* [places] */
    psoup__draw *device_draws;        /* device [chunk_rows] */
    int32_t *device_banned;           /* device [banned_capacity]: of all of a chunk's rows in turn */
    size_t banned_capacity;
    int32_t *drawn;                   /* [places] */
    float *logprobs;                  /* [places] */
    int32_t *device_token;            /* device [chunk_rows] */
    float *device_logprob;            /* device [chunk_rows] */
    int32_t steps;                    /* tokens that a window decodes at most; 1: there are no windows */
    psoup__window window;
};

psoup_status psoup__session_check(const psoup_session_options *options, psoup_error *error);
psoup_status psoup__sampling_check(const psoup_model *model, const psoup_sampling *sampling, psoup_error *error);

/* submit.c; takes NULL. */
void psoup__sequence_free(psoup_context *context, sequence *s);

/* Hands out what the parts drew in one step (drawn, logprobs, by part), and leaves in `parts` those that go on. */
psoup_status psoup__session_deliver(psoup_session *session, int32_t *parts, psoup_token_fn on_token, void *user,
                                    psoup_error *error);

/* window.c: decodes up to session->steps tokens of every sequence, of which each part takes one row and each draws one
 * token. */
bool psoup__window_fits(const psoup_session *session, const psoup__batch *batch, int32_t samples);
psoup_status psoup__window_run(psoup_session *session, psoup__batch *batch, int32_t samples, psoup_token_fn on_token,
                               void *user, psoup_error *error);
void psoup__window_free(psoup_session *session);

#endif
