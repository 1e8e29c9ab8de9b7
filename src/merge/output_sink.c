/* Results to the caller's functions. */
#include "merge/engine.h"

typedef struct sink_output {
    psoup__output output;
    psoup_merge_sink sink;
    uint64_t at; /* bytes of the tensor */
} sink_output;

static psoup_status stopped(const psoup__output *output, size_t index, psoup_error *error) {
    return psoup__fail(error, PSOUP_ERROR_CANCELLED, "the sink stopped the merge at tensor %.200s",
                       output->plan->results[index].name);
}

static psoup_status begin(psoup__output *output, psoup_error *error) {
    (void)output, (void)error;
    return PSOUP_OK;
}

static psoup_status tensor(psoup__output *output, size_t index, psoup_error *error) {
    sink_output *o = (sink_output *)output;
    const psoup__result *r = &output->plan->results[index];
    o->at = 0;
    if (o->sink.tensor != NULL && o->sink.tensor(o->sink.user, r->name, r->dtype, r->rank, r->shape) != 0)
        return stopped(output, index, error);
    return PSOUP_OK;
}

static psoup_status put(psoup__output *output, size_t index, const void *data, size_t bytes,
                        psoup_error *error) {
    sink_output *o = (sink_output *)output;
    if (o->sink.write(o->sink.user, o->at, data, bytes) != 0)
        return stopped(output, index, error);
    o->at += bytes;
    return PSOUP_OK;
}

static psoup_status finish(psoup__output *output, size_t index, psoup_error *error) {
    (void)output, (void)index, (void)error;
    return PSOUP_OK;
}

static psoup_status commit(psoup__output *output, const char *certificate, psoup_error *error) {
    (void)output, (void)certificate, (void)error;
    return PSOUP_OK;
}

static void sink_free(psoup__output *output) {
    psoup__free(output->plan->merger->context, output);
}

psoup_status psoup__output_sink(const psoup__plan *plan, const psoup_merge_sink *sink, psoup__output **out,
                                psoup_error *error) {
    static const psoup__output_kind kind = {false, begin, tensor, put, finish, NULL, commit, sink_free, NULL};
    psoup_merge_sink checked = PSOUP_MERGE_SINK_INIT;
    psoup_status status = psoup__options(&checked, sizeof checked, sink, "psoup_merge_sink", error);
    *out = NULL;
    if (status != PSOUP_OK)
        return status;
    if (checked.write == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merge_sink: expected write");
    sink_output *o = psoup__alloc(plan->merger->context, 1, sizeof *o, error);
    if (o == NULL)
        return PSOUP_ERROR_MEMORY;
    o->output = (psoup__output){.kind = &kind, .plan = plan};
    o->sink = checked;
    *out = &o->output;
    return PSOUP_OK;
}
