/* The certificate as JSON: everything that makes the merge again, and the fingerprints of what it read and
 * wrote. No times and no machine's names: the same merge gives the same text. */
#include "merge/engine.h"

#include <stdio.h>
#include <string.h>

#define KIND "psoup_merge"

/* ---- writing ----------------------------------------------------------------------------------------- */

static psoup_json *settings_json(const psoup__settings *settings) {
    psoup_json *list = psoup_json_new_array();
    int failed = 0;
    for (size_t i = 0; i < settings->n; i++) {
        const psoup__setting *s = &settings->items[i];
        psoup_json *one = psoup_json_new_object(), *values = psoup_json_new_array();
        for (size_t j = 0; j < s->n; j++)
            failed |= psoup_json_append(values, psoup_json_new_real(s->values[j]));
        failed |= psoup_json_set(one, "parameter",
                                 psoup_json_new_string(psoup__parameter_name(s->parameter)));
        if (s->filter != NULL)
            failed |= psoup_json_set(one, "filter", psoup_json_new_string(s->filter));
        failed |= psoup_json_set(one, "values", values);
        failed |= psoup_json_append(list, one);
    }
    if (!failed)
        return list;
    psoup_json_free(list);
    return NULL;
}

static psoup_json *source_json(const psoup__merge_source *source, const double *weight) {
    psoup_json *one = psoup_json_new_object(), *files = psoup_json_new_array();
    int failed = psoup_json_set(one, "path", psoup_json_new_string(source->path));
    if (weight != NULL)
        failed |= psoup_json_set(one, "weight", psoup_json_new_real(*weight));
    for (size_t i = 0; i < source->n_files; i++) {
        const psoup__source_file *from = &source->files[i];
        psoup_json *file = psoup_json_new_object();
        failed |= psoup_json_set(file, "path", psoup_json_new_string(from->file->path));
        failed |= psoup_json_set(file, "bytes", psoup_json_new_integer((int64_t)from->file->length));
        if (from->sha256[0] != '\0')
            failed |= psoup_json_set(file, "sha256", psoup_json_new_string(from->sha256));
        failed |= psoup_json_append(files, file);
    }
    failed |= psoup_json_set(one, "files", files);
    if (source->settings.n > 0)
        failed |= psoup_json_set(one, "settings", settings_json(&source->settings));
    if (!failed)
        return one;
    psoup_json_free(one);
    return NULL;
}

static int64_t source_number(size_t source) {
    return source == PSOUP__NONE ? -1 : (int64_t)source;
}

static psoup_json *slices_json(const psoup_merger *merger) {
    psoup_json *list = psoup_json_new_array();
    int failed = 0;
    for (size_t i = 0; i < merger->n_slices; i++) {
        const psoup__slice *slice = &merger->slices[i];
        psoup_json *one = psoup_json_new_object(), *parts = psoup_json_new_array();
        for (size_t j = 0; j < slice->n; j++) {
            const psoup__slice_part *p = &slice->parts[j];
            psoup_json *part = psoup_json_new_object(), *layers = psoup_json_new_array();
            failed |= psoup_json_set(part, "source", psoup_json_new_integer(source_number(p->source)));
            failed |= psoup_json_append(layers, psoup_json_new_integer(p->first));
            failed |= psoup_json_append(layers, psoup_json_new_integer(p->end));
            failed |= psoup_json_set(part, "layers", layers);
            failed |= psoup_json_set(part, "settings", settings_json(&p->settings));
            failed |= psoup_json_append(parts, part);
        }
        failed |= psoup_json_set(one, "sources", parts);
        failed |= psoup_json_set(one, "settings", settings_json(&slice->settings));
        failed |= psoup_json_append(list, one);
    }
    if (!failed)
        return list;
    psoup_json_free(list);
    return NULL;
}

static int add_options(psoup_json *root, const psoup_merger *merger) {
    const psoup_merger_options *o = &merger->options;
    psoup_json *json = psoup_json_new_object();
    const struct {
        const char *name;
        int64_t value;
    } integers[] = {{"svd_rank", o->svd_rank}, {"any_sum", o->any_sum}, {"peer", o->peer},
                    {"format", o->format}, {"shard_size", (int64_t)o->shard_size},
                    {"normalize", o->normalize}, {"rescale", o->rescale}, {"seed", (int64_t)o->seed}};
    const struct {
        const char *name;
        double value;
    } reals[] = {{"density", o->density}, {"gamma", o->gamma}, {"epsilon", o->epsilon},
                 {"lambda", o->lambda}, {"t", o->t}, {"strength", o->strength}};
    int failed = 0;
    if (o->dtype >= 0)
        failed |= psoup_json_set(json, "dtype", psoup_json_new_string(psoup_dtype_name((psoup_dtype)o->dtype)));
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++)
        failed |= psoup_json_set(json, integers[i].name, psoup_json_new_integer(integers[i].value));
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        if (reals[i].value != PSOUP_MERGE_UNSAID)
            failed |= psoup_json_set(json, reals[i].name, psoup_json_new_real(reals[i].value));
    return failed | psoup_json_set(root, "options", json);
}

bool psoup__result_lossy(const psoup__plan *plan, size_t index) {
    return plan->results[index].module != NULL && plan->merger->options.method != PSOUP_MERGE_DELTA;
}

static int add_inputs(psoup_json *root, const psoup__certificate *c) {
    psoup_json *list = psoup_json_new_array();
    int failed = 0;
    for (size_t i = 0; i < c->n; i++) {
        const psoup__entry *e = &c->entries[i];
        const char part[2] = {e->part, '\0'};
        psoup_json *one = psoup_json_new_object();
        failed |= psoup_json_set(one, "source", psoup_json_new_integer(source_number(e->source)));
        failed |= psoup_json_set(one, "tensor", psoup_json_new_string(e->name));
        if (e->part != 0)
            failed |= psoup_json_set(one, "factor", psoup_json_new_string(part));
        failed |= psoup_json_set(one, "xxh3", psoup_json_new_string(e->text));
        failed |= psoup_json_append(list, one);
    }
    return failed | psoup_json_set(root, "inputs", list);
}

static int add_results(psoup_json *root, const psoup__certificate *c, psoup_context *context) {
    psoup_json *list = psoup_json_new_array();
    int failed = 0;
    for (size_t i = 0; i < c->plan->n; i++) {
        const psoup__result *r = &c->plan->results[i];
        psoup_json *one = psoup_json_new_object(), *shape = psoup_json_new_array();
        for (int j = 0; j < r->rank; j++)
            failed |= psoup_json_append(shape, psoup_json_new_integer(r->shape[j]));
        failed |= psoup_json_set(one, "tensor", psoup_json_new_string(r->name));
        failed |= psoup_json_set(one, "dtype", psoup_json_new_string(psoup_dtype_name(r->dtype)));
        failed |= psoup_json_set(one, "shape", shape);
        if (psoup__result_lossy(c->plan, i)) { /* text, so that its length does not depend on it */
            double lost = c->made[i].error > 0 ? c->made[i].error : 0;
            char *text = psoup__format(context, NULL, "%.6e", lost);
            failed |= psoup_json_set(one, "error", text != NULL ? psoup_json_new_string(text) : NULL);
            psoup__free(context, text);
        }
        failed |= psoup_json_set(one, "xxh3", psoup_json_new_string(c->made[i].text));
        failed |= psoup_json_append(list, one);
    }
    return failed | psoup_json_set(root, "results", list);
}

psoup_json *psoup__certificate_json(const psoup__certificate *c, psoup_error *error) {
    const psoup_merger *merger = c->plan->merger;
    psoup_json *root = psoup_json_new_object(), *sources = psoup_json_new_array();
    int failed = psoup_json_set(root, KIND, psoup_json_new_integer(1));
    failed |= psoup_json_set(root, "version", psoup_json_new_string(psoup_version()));
    failed |= psoup_json_set(root, "isa", psoup_json_new_string(psoup_context_isa(merger->context)));
    failed |= psoup_json_set(root, "method",
                             psoup_json_new_string(psoup_merge_method_name(merger->options.method)));
    failed |= add_options(root, merger);
    failed |= psoup_json_set(root, "recipe", psoup_json_new_bool(merger->from_recipe));
    if (merger->has_base)
        failed |= psoup_json_set(root, "base", source_json(&merger->base, NULL));
    for (size_t i = 0; i < merger->n; i++)
        failed |= psoup_json_append(sources, source_json(&merger->sources[i], &merger->weights[i]));
    failed |= psoup_json_set(root, "sources", sources);
    if (merger->settings.n > 0)
        failed |= psoup_json_set(root, "settings", settings_json(&merger->settings));
    if (merger->n_slices > 0)
        failed |= psoup_json_set(root, "slices", slices_json(merger));
    if (merger->reference != NULL)
        failed |= psoup_json_set(root, "reference", psoup_json_new_string(merger->reference));
    if (merger->sidecars != NULL)
        failed |= psoup_json_set(root, "sidecars", psoup_json_new_string(merger->sidecars));
    if (merger->chat_template != NULL)
        failed |= psoup_json_set(root, "chat_template", psoup_json_new_string(merger->chat_template));
    failed |= add_inputs(root, c);
    failed |= add_results(root, c, merger->context);
    if (!failed)
        return root;
    psoup_json_free(root);
    psoup__out_of_memory(error, 0);
    return NULL;
}

/* ---- what a killed run knew ------------------------------------------------------------------------------ */

/* The fingerprints of a certificate whose merge is this one. An input that is not there was not read yet. */
psoup_status psoup__certificate_take(psoup__certificate *c, const psoup_json *json, psoup_error *error) {
    const psoup_json *inputs = psoup_json_get(json, "inputs"), *results = psoup_json_get(json, "results");
    if (psoup_json_size(inputs) != c->n || psoup_json_size(results) != c->plan->n)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "another merge's progress");
    for (size_t i = 0; i < c->n; i++) {
        const char *text = psoup_json_string(psoup_json_get(psoup_json_at(inputs, i), "xxh3"), "");
        if (strlen(text) == PSOUP__HASH_TEXT - 1) {
            memcpy(c->entries[i].text, text, PSOUP__HASH_TEXT);
            c->entries[i].claimed = true;
        }
    }
    for (size_t i = 0; i < c->plan->n; i++) {
        const psoup_json *one = psoup_json_at(results, i);
        const char *text = psoup_json_string(psoup_json_get(one, "xxh3"), "");
        const char *lost = psoup_json_string(psoup_json_get(one, "error"), NULL);
        if (strlen(text) == PSOUP__HASH_TEXT - 1)
            memcpy(c->made[i].text, text, PSOUP__HASH_TEXT);
        if (lost != NULL && psoup__result_lossy(c->plan, i) && sscanf(lost, "%lf", &c->made[i].error) != 1)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "progress: error \"%.40s\"", lost);
    }
    return PSOUP_OK;
}

/* ---- the same again -------------------------------------------------------------------------------------- */

static const char *path_of(psoup_merger *merger, size_t source) {
    return psoup__merger_source(merger, source)->path;
}

psoup_status psoup__certificate_compare(const psoup__certificate *c, const psoup_json *expected,
                                        psoup_error *error) {
    psoup_merger *merger = c->plan->merger;
    const psoup_json *inputs = psoup_json_get(expected, "inputs");
    const psoup_json *results = psoup_json_get(expected, "results");
    if (psoup_json_size(inputs) != c->n || psoup_json_size(results) != c->plan->n)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "replay: %zu inputs and %zu results; the certificate tells of %zu and %zu", c->n,
                           c->plan->n, psoup_json_size(inputs), psoup_json_size(results));
    for (size_t i = 0; i < c->n; i++) {
        const psoup__entry *e = &c->entries[i];
        const psoup_json *one = psoup_json_at(inputs, i);
        if (strcmp(psoup_json_string(psoup_json_get(one, "tensor"), ""), e->name) != 0 ||
            strcmp(psoup_json_string(psoup_json_get(one, "xxh3"), ""), e->text) != 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "replay: %s: tensor %.200s is not what it was when the certificate was "
                               "written",
                               path_of(merger, e->source), e->name);
    }
    const char *isa = psoup_json_string(psoup_json_get(expected, "isa"), "?");
    const char *version = psoup_json_string(psoup_json_get(expected, "version"), "?");
    for (size_t i = 0; i < c->plan->n; i++) {
        const psoup_json *one = psoup_json_at(results, i);
        const char *name = c->plan->results[i].name;
        if (strcmp(psoup_json_string(psoup_json_get(one, "tensor"), ""), name) != 0 ||
            strcmp(psoup_json_string(psoup_json_get(one, "xxh3"), ""), c->made[i].text) != 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "replay: the result %.200s has other bytes (the certificate was written by "
                               "%.40s on %.40s, this is %s on %s)",
                               name, version, isa, psoup_version(), psoup_context_isa(merger->context));
    }
    return PSOUP_OK;
}
