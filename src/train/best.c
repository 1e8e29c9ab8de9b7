/* Keeps the best weights of a run on the host. */
#include "train/train.h"

psoup_status psoup__best_offer(psoup__best *best, psoup__backend *be, const float *p, size_t n,
                               double value, double tie, int64_t step, psoup_error *error) {
    if (value != value || tie != tie)
        return PSOUP_OK;
    bool better = !best->data || value > best->value || (value == best->value && tie > best->tie);
    if (!better)
        return PSOUP_OK;
    float *data = best->data;
    if (!data) {
        data = psoup__alloc(be->context, n, sizeof(float), error);
        if (!data)
            return PSOUP_ERROR_MEMORY;
    }
    psoup_status status = be->ops->read(be, data, p, n * sizeof(float), error);
    if (status != PSOUP_OK) {
        psoup__free(be->context, data); /* half-read weights are nobody's best */
        best->data = NULL;
        return status;
    }
    *best = (psoup__best){.data = data, .n = n, .value = value, .tie = tie, .step = step};
    return PSOUP_OK;
}

void psoup__best_restore(const psoup__best *best, psoup__backend *be, float *p) {
    if (best->data)
        be->ops->write(be, p, best->data, best->n * sizeof(float));
}

void psoup__best_tell(const psoup__best *best, const psoup__team *team, const char *trainer, const char *subject,
                      int64_t total) {
    if (best->data && team->rank == 0)
        psoup__log(team->context, PSOUP_LOG_INFO,
                   "%s: '%s' ends with the weights of step %lld of %lld, the best in validation", trainer, subject,
                   (long long)best->step, (long long)total);
}

void psoup__best_free(psoup__best *best, psoup_context *context) {
    psoup__free(context, best->data);
    best->data = NULL;
}
