/* The small files that make a model directory whole. */
#include "merge/engine.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* torch's name of the dtype that most of the results' bytes have. */
static const char *torch_dtype(const psoup__plan *plan) {
    static const struct {
        psoup_dtype dtype;
        const char *name;
    } names[] = {{PSOUP_F32, "float32"}, {PSOUP_F16, "float16"}, {PSOUP_BF16, "bfloat16"},
                 {PSOUP_F64, "float64"}};
    uint64_t most = 0;
    const char *name = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        uint64_t bytes = 0;
        for (size_t j = 0; j < plan->n; j++)
            bytes += plan->results[j].dtype == names[i].dtype ? plan->results[j].bytes : 0;
        if (bytes > most) {
            most = bytes;
            name = names[i].name;
        }
    }
    return name;
}

/* config.json says the dtype, and what slices and untying changed. */
static psoup_status change_config(const psoup__plan *plan, const char *path, psoup_error *error) {
    psoup_status status;
    psoup_context *context = plan->merger->context;
    psoup_json *config = NULL, *changed = NULL;
    PSOUP__TRY(psoup_json_read(context, path, &config, error));
    const char *dtype = torch_dtype(plan);
    const char *field = psoup_json_get(config, "dtype") != NULL ? "dtype" : "torch_dtype";
    const char *was = psoup_json_string(psoup_json_get(config, field), "");
    bool retype = dtype != NULL && strcmp(was, dtype) != 0 &&
                  (plan->merger->options.dtype >= 0 || psoup_json_get(config, field) != NULL);
    bool untie = plan->untied && psoup_json_bool(psoup_json_get(config, "tie_word_embeddings"), 0);
    if (!retype && !untie && plan->layers < 0)
        goto fail;
    int failed = 0;
    changed = psoup_json_copy(config);
    if (retype)
        failed |= psoup_json_set(changed, field, psoup_json_new_string(dtype));
    if (untie)
        failed |= psoup_json_set(changed, "tie_word_embeddings", psoup_json_new_bool(0));
    if (plan->layers >= 0)
        failed |= psoup_json_set(changed, "num_hidden_layers", psoup_json_new_integer(plan->layers));
    status = failed || changed == NULL ? psoup__out_of_memory(error, 0)
                                       : psoup_json_write(context, path, changed, error);
fail:
    psoup_json_free(changed);
    psoup_json_free(config);
    return status;
}

/* A directory's name of a source; files of a MODEL+ADAPTER are the model's. */
static const char *place_of(const psoup__merge_source *source) {
    return source->model != NULL ? psoup__weights_path(source->model) : NULL;
}

psoup_status psoup__write_sidecars(const psoup__plan *plan, const char *directory, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = plan->merger->context;
    const char *from = place_of(plan->like);
    if (from == NULL)
        return PSOUP_OK;
    char *path = psoup__path_join(context, directory, "config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__hf_copy_sidecars(context, from, directory, error));
    if (psoup__file_exists(path))
        PSOUP__TRY(change_config(plan, path, error));
fail:
    psoup__free(context, path);
    return status;
}
