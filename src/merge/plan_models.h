/* src/merge/plan_models.h: what the two files share that plan full models. */
#ifndef PSOUP__MERGE_PLAN_MODELS_H
#define PSOUP__MERGE_PLAN_MODELS_H

#include "merge/engine.h"

#define PSOUP__HEAD "lm_head.weight"
#define PSOUP__EMBEDDING "model.embed_tokens.weight"

/* Sources whose tensors stand for each other. In slices each counts its layers from its own first. */
typedef struct psoup__group {
    const psoup__slice *slice; /* NULL: all layers of all sources */
    size_t n;
    int64_t shift; /* the layer within the slice; 0 outside the layers and without slices */
    double t;
} psoup__group;

/* plan_tensor.c. name: of the result; like_name: in the plan's `like`, from which the sources' names are
 * made. */
psoup_status psoup__plan_tensor(psoup__plan *plan, const psoup__group *group, const char *name,
                                const char *like_name, psoup_error *error);
/* The tensor's name with another layer's number; freed by psoup__free. */
char *psoup__with_layer(psoup_context *context, const char *name, int64_t layer, psoup_error *error);

#endif
