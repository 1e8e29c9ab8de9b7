/* src/merge/inspect.h: what the files of inspect share among themselves and with nobody else. */
#ifndef PSOUP__INSPECT_H
#define PSOUP__INSPECT_H

#include <pthread.h>

#include "merge/merge.h"

/* ---- inspect_math.c: small dense problems on Gram matrices, f64 ----------------------------------- */

/* One module: the factors of n adapters, absent ones of rank 0. */
typedef struct psoup__inspect_module {
    const psoup_lora_factors *factors; /* [n] */
    size_t n;
    int64_t out, in;
    int64_t total; /* Σ rank */
} psoup__inspect_module;

/* gram[total, total] of A's rows, or of B's columns. */
psoup_status psoup__inspect_gram(psoup_context *context, const psoup__inspect_module *module, bool of_b,
                                 double *gram, psoup_error *error);
/* inner[n, n]: ⟨ΔW_i, ΔW_j⟩ = s_i s_j tr((B_iᵀ B_j)(A_j A_iᵀ)). */
void psoup__inspect_inner(const psoup__inspect_module *module, const double *gram_a, const double *gram_b,
                          double *inner);
/* ‖factors − delta‖² for the weights: the Frobenius norm of B_cat C A_cat, where C has the blocks
 * (s w_i w_j − [i = j] w_i s) I. All adapters have the same rank and scale. scratch: [2 · total²]. */
double psoup__inspect_cross(const psoup__inspect_module *module, const double *gram_a, const double *gram_b,
                            const double *weights, double *scratch);
/* squares[total]: the squared singular values of Σ w_i ΔW_i, descending. scratch: [3 · total²]. */
void psoup__inspect_spectrum(const psoup__inspect_module *module, const double *gram_a, const double *gram_b,
                             const double *weights, double *squares, double *scratch);

/* ---- inspect.c finds, inspect_answer.c tells ------------------------------------------------------ */

/* What is known of one module. */
typedef struct psoup__finding {
    const char *name; /* borrowed from the first adapter that has it */
    int64_t layer;    /* −1: in none */
    double *inner;    /* [n, n]; zeros for absent adapters */
    uint8_t *there;   /* [n] */
    double *squares;  /* [total], descending; NULL where the ranks are too many */
    int64_t total;
    bool equal;      /* all adapters have it, with one rank and scale: `factors` can be used */
    double cross;    /* ‖factors − delta‖² */
    double exact;    /* ‖delta‖² of the soup */
} psoup__finding;

typedef struct psoup__inspection {
    psoup_context *context;
    psoup__peft **adapters; /* [n] */
    size_t n, modules;
    double *weights; /* [n] */
    psoup__finding *found;  /* [modules], by layer, then by name */
    pthread_mutex_t lock;
    size_t failed; /* the first module that did; SIZE_MAX: none */
    psoup_status status;
    psoup_error error;
    bool broken; /* a part of the answer could not be made: out of memory */
} psoup__inspection;

psoup_status psoup__inspect_answer(psoup__inspection *x, psoup_json **out, psoup_error *error);

#endif
