/* src/merge/inspect.h: what the files of inspect share among themselves and with nobody else. */
#ifndef PSOUP__INSPECT_H
#define PSOUP__INSPECT_H

#include <pthread.h>

#include "blend/blend.h"
#include "format/format.h"

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
