/* The merger's handle: what is merged, with what weights and parameters, and the run. */
#include "merge/engine.h"

#include <math.h>
#include <string.h>
#include <sys/stat.h>

/* ---- names of methods -------------------------------------------------------------------------------- */

static const char *const factor_methods[] = {[PSOUP_MERGE_DELTA] = "delta", [PSOUP_MERGE_FACTORS] = "factors",
                                             [PSOUP_MERGE_SVD] = "svd",
                                             [PSOUP_MERGE_PEFT_LINEAR] = "peft_linear"};

const char *psoup_merge_method_name(int32_t method) {
    const psoup__method *whole = psoup__method_of((psoup_merge_method)method);
    if (whole != NULL)
        return whole->name;
    if (method < 0 || method > PSOUP_MERGE_PEFT_LINEAR || factor_methods[method] == NULL)
        return "?";
    return factor_methods[method];
}

psoup_status psoup_merge_method_parse(const char *name, int32_t *out, psoup_error *error) {
    for (int32_t i = 0; name != NULL && i <= PSOUP_MERGE_PEFT_LINEAR; i++)
        if (strcmp(name, psoup_merge_method_name(i)) == 0) {
            *out = i;
            return PSOUP_OK;
        }
    char known[512] = "";
    for (int32_t i = 0; i <= PSOUP_MERGE_PEFT_LINEAR; i++) {
        strncat(known, i > 0 ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, psoup_merge_method_name(i), sizeof known - strlen(known) - 1);
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "method \"%.60s\": expected %s",
                       name != NULL ? name : "", known);
}

/* ---- the handle ------------------------------------------------------------------------------------------ */

psoup_status psoup__options_check(const psoup_merger_options *o, psoup_error *error) {
    if (strcmp(psoup_merge_method_name(o->method), "?") == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: method %d; expected a psoup_merge_method", (int)o->method);
    if (o->method == PSOUP_MERGE_SVD && (o->svd_rank < 1 || o->svd_rank > 1 << 20))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: svd_rank %d; expected 1 to %d", (int)o->svd_rank, 1 << 20);
    if (o->svd_rank < 0 || o->svd_rank > 1 << 20)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merger_options: svd_rank %d; expected 0 to %d",
                           (int)o->svd_rank, 1 << 20);
    bool known = o->dtype == -1 || o->dtype == PSOUP_F32 || o->dtype == PSOUP_F16 || o->dtype == PSOUP_BF16 ||
                 o->dtype == PSOUP_F8_E4M3 || o->dtype == PSOUP_F8_E5M2 ||
                 (o->dtype == PSOUP_Q8_0 && o->format == PSOUP_MERGE_GGUF);
    if (!known)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: dtype %s; expected f32, f16, bf16, f8_e4m3, f8_e5m2, or "
                           "q8_0 in GGUF",
                           psoup_dtype_name((psoup_dtype)o->dtype));
    if (o->peer < PSOUP_MERGE_PAPER || o->peer > PSOUP_MERGE_PEFT || o->format < PSOUP_MERGE_AS_SOURCES ||
        o->format > PSOUP_MERGE_GGUF)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merger_options: peer %d, format %d",
                           (int)o->peer, (int)o->format);
    if (!isfinite(o->density) || !isfinite(o->gamma) || !isfinite(o->epsilon) || !isfinite(o->lambda) ||
        !isfinite(o->t) || !isfinite(o->strength))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: density, gamma, epsilon, lambda, t and strength must be finite");
    if (o->strength != 1 && o->method > PSOUP_MERGE_SVD && o->method != PSOUP_MERGE_PEFT_LINEAR)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: strength %g with method %s; expected delta, factors, svd or "
                           "peft_linear (others have lambda)",
                           o->strength, psoup_merge_method_name(o->method));
    if (o->keep_bytes < -1)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merger_options: keep_bytes %lld; expected -1, 0 or more",
                           (long long)o->keep_bytes);
    return PSOUP_OK;
}

psoup_status psoup_merger_create(psoup_context *context, const psoup_merger_options *options,
                                 psoup_merger **out, psoup_error *error) {
    psoup_status status;
    psoup_merger_options checked = PSOUP_MERGER_OPTIONS_INIT;
    *out = NULL;
    if (context == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merger_create: no context");
    PSOUP__TRY(psoup__options(&checked, sizeof checked, options, "psoup_merger_options", error));
    PSOUP__TRY(psoup__options_check(&checked, error));
    psoup_merger *merger = psoup__alloc(context, 1, sizeof *merger, error);
    if (merger == NULL)
        return PSOUP_ERROR_MEMORY;
    merger->context = context;
    merger->options = checked;
    *out = merger;
    return PSOUP_OK;
fail:
    return status;
}

void psoup_merger_free(psoup_merger *merger) {
    if (merger == NULL)
        return;
    psoup_context *context = merger->context;
    for (size_t i = 0; i < merger->n; i++)
        psoup__source_free(context, &merger->sources[i]);
    psoup__source_free(context, &merger->base);
    for (size_t i = 0; i < merger->n_slices; i++) {
        psoup__slice *slice = &merger->slices[i];
        for (size_t j = 0; j < slice->n; j++)
            psoup__settings_free(context, &slice->parts[j].settings);
        psoup__settings_free(context, &slice->settings);
        psoup__free(context, slice->parts);
    }
    psoup__settings_free(context, &merger->settings);
    psoup_json_free(merger->expected);
    psoup__free(context, merger->slices);
    psoup__free(context, merger->sources);
    psoup__free(context, merger->weights);
    psoup__free(context, merger->reference);
    psoup__free(context, merger->sidecars);
    psoup__free(context, merger->chat_template);
    psoup__free(context, merger);
}

psoup_status psoup__merger_slice(psoup_merger *merger, psoup__slice **out, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__reserve(merger->context, &merger->slices, &merger->slices_capacity,
                              merger->n_slices + 1, sizeof *merger->slices, error));
    *out = &merger->slices[merger->n_slices++];
    **out = (psoup__slice){0};
fail:
    return status;
}

psoup_status psoup__merger_slice_part(psoup_merger *merger, psoup__slice *slice, size_t source, int64_t first,
                                      int64_t end, psoup__slice_part **out, psoup_error *error) {
    psoup_status status;
    if (first < 0 || end <= first || end > 100000 ||
        (slice->n > 0 && end - first != slice->parts[0].end - slice->parts[0].first))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "layers %lld to %lld: expected some, as many as the slice's other sources have",
                           (long long)first, (long long)end);
    PSOUP__TRY(psoup__reserve(merger->context, &slice->parts, &slice->capacity, slice->n + 1,
                              sizeof *slice->parts, error));
    *out = &slice->parts[slice->n++];
    **out = (psoup__slice_part){.source = source, .first = first, .end = end};
fail:
    return status;
}

psoup__merge_source *psoup__merger_source(psoup_merger *merger, size_t index) {
    return index == PSOUP__NONE ? &merger->base : &merger->sources[index];
}

static void replace_base(psoup_merger *merger, const psoup__merge_source *base) {
    psoup__source_free(merger->context, &merger->base);
    merger->base = *base;
    merger->has_base = true;
}

psoup_status psoup_merger_set_base(psoup_merger *merger, const char *path, psoup_error *error) {
    psoup__merge_source base;
    psoup_status status = psoup__source_open(merger->context, path, true, NULL, &base, error);
    if (status == PSOUP_OK)
        replace_base(merger, &base);
    return status;
}

psoup_status psoup_merger_set_base_tensors(psoup_merger *merger, const psoup_merge_tensors *tensors,
                                           psoup_error *error) {
    psoup__merge_source base;
    psoup_status status = psoup__source_hold(merger->context, tensors, &base, error);
    if (status == PSOUP_OK)
        replace_base(merger, &base);
    return status;
}

psoup_status psoup_merger_set_reference(psoup_merger *merger, const char *model, psoup_error *error) {
    psoup_status status = psoup__merge_text(model, "reference", error);
    if (status != PSOUP_OK)
        return status;
    char *copy = psoup__strdup(merger->context, model, error);
    if (copy == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup__free(merger->context, merger->reference);
    merger->reference = copy;
    return PSOUP_OK;
}

/* Takes the source in any case. */
static psoup_status add_source(psoup_merger *merger, psoup__merge_source *source, double weight,
                               psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__reserve(merger->context, &merger->sources, &merger->sources_capacity, merger->n + 1,
                              sizeof *merger->sources, error));
    PSOUP__TRY(psoup__reserve(merger->context, &merger->weights, &merger->weights_capacity, merger->n + 1,
                              sizeof *merger->weights, error));
    merger->sources[merger->n] = *source;
    merger->weights[merger->n++] = weight;
    return PSOUP_OK;
fail:
    psoup__source_free(merger->context, source);
    return status;
}

psoup_status psoup_merger_add(psoup_merger *merger, const char *path, double weight, psoup_error *error) {
    psoup_status status;
    psoup__merge_source source;
    PSOUP__TRY(psoup__merge_check_weights(&weight, 1, true, error));
    const char *reference = merger->reference != NULL    ? merger->reference
                            : merger->base.model != NULL ? psoup__weights_path(merger->base.model)
                                                         : NULL;
    PSOUP__TRY(psoup__source_open(merger->context, path, false, reference, &source, error));
    PSOUP__TRY(add_source(merger, &source, weight, error));
fail:
    return status;
}

psoup_status psoup_merger_add_tensors(psoup_merger *merger, const psoup_merge_tensors *tensors,
                                      double weight, psoup_error *error) {
    psoup_status status;
    psoup__merge_source source;
    PSOUP__TRY(psoup__merge_check_weights(&weight, 1, true, error));
    PSOUP__TRY(psoup__source_hold(merger->context, tensors, &source, error));
    PSOUP__TRY(add_source(merger, &source, weight, error));
fail:
    return status;
}

psoup_status psoup_merger_set_weights(psoup_merger *merger, const double *weights, size_t n,
                                      psoup_error *error) {
    if (n != merger->n)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%zu weights for %zu sources", n, merger->n);
    bool sums = merger->options.method <= PSOUP_MERGE_SVD || merger->options.method == PSOUP_MERGE_PEFT_LINEAR;
    psoup_status status =
        psoup__merge_check_weights(weights, n, merger->options.any_sum || !sums, error);
    if (status == PSOUP_OK && n > 0) {
        memcpy(merger->weights, weights, n * sizeof *weights);
        merger->reweighs = true;
    }
    return status;
}

psoup_status psoup_merger_set_parameter(psoup_merger *merger, int64_t source, const char *parameter,
                                        const char *filter, const double *values, size_t n,
                                        psoup_error *error) {
    psoup__parameter which = psoup__parameter_named(parameter != NULL ? parameter : "");
    if (which == PSOUP__PARAMETERS)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "parameter \"%.60s\": expected weight, density, gamma, epsilon, scale, lambda, t, "
                           "normalize, rescale, vote, nuslerp_flatten, nuslerp_row_wise or filter_wise",
                           parameter != NULL ? parameter : "");
    if (source < -1 || source >= (int64_t)merger->n)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "parameter %s: source %lld of %zu", parameter,
                           (long long)source, merger->n);
    if (source >= 0 && which > PSOUP__SCALE)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "parameter %s is not of one source", parameter);
    if (n == 0 || n > 1 << 20 || values == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "parameter %s: expected values", parameter);
    for (size_t i = 0; i < n; i++)
        if (!isfinite(values[i]))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "parameter %s is %g; expected a finite number",
                               parameter, values[i]);
    for (size_t i = 0; which == PSOUP__VOTE && i < n; i++)
        if (values[i] != 0 && values[i] != 1)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "parameter vote is %g; expected 0 (total) or 1 (frequency)", values[i]);
    return psoup__settings_add(merger->context,
                               source < 0 ? &merger->settings : &merger->sources[source].settings, which,
                               filter, values, n, true, error);
}

/* ---- running --------------------------------------------------------------------------------------------- */

psoup_status psoup__merge_progress(psoup_merger *merger, size_t done, size_t total, psoup_error *error) {
    const psoup_merger_options *options = &merger->options;
    if (options->progress == NULL ||
        options->progress(options->progress_user, "merge", (int64_t)done, (int64_t)total) == 0)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_CANCELLED, "merging was cancelled after %zu of %zu", done, total);
}

/* Whether two names are one file or directory. */
static bool same_place(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* Whether a source's file is the result's place, or a .safetensors file in it, which the result could replace. */
static psoup_status check_file_place(psoup_context *context, const char *file, const char *place, bool *taken,
                                     psoup_error *error) {
    char *directory = psoup__strdup(context, file, error);
    if (directory == NULL)
        return PSOUP_ERROR_MEMORY;
    char *slash = strrchr(directory, '/');
    if (slash != NULL)
        slash[slash == directory] = '\0';
    *taken = same_place(file, place) ||
             (!psoup__is_gguf(file) && same_place(slash != NULL ? directory : ".", place));
    psoup__free(context, directory);
    return PSOUP_OK;
}

static psoup_status check_place(psoup_merger *merger, const char *place, psoup_error *error) {
    psoup_status status;
    for (size_t i = 0; i <= merger->n; i++) {
        const psoup__merge_source *source = i < merger->n ? &merger->sources[i] : &merger->base;
        for (size_t j = 0; j < source->n_files; j++) {
            bool taken;
            PSOUP__TRY(check_file_place(merger->context, source->files[j].file->path, place, &taken, error));
            if (taken)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: is a source's place; expected another for the result", place);
        }
    }
    return PSOUP_OK;
fail:
    return status;
}

static void report_errors(psoup_merger *merger, const psoup__certificate *certificate) {
    psoup_merge_report *report = &merger->report;
    const psoup__plan *plan = certificate->plan;
    double sum = 0;
    size_t n = 0;
    for (size_t i = 0; i < plan->n; i++) {
        double lost = certificate->made[i].error;
        if (lost < 0 || plan->results[i].kind == PSOUP__PAIR_B)
            continue;
        sum += lost;
        n++;
        if (lost > report->worst_error) {
            report->worst_error = lost;
            memset(report->worst_name, 0, sizeof report->worst_name);
            strncpy(report->worst_name, plan->results[i].module, sizeof report->worst_name - 1);
        }
    }
    report->tensors = plan->n;
    report->mean_error = n > 0 ? sum / (double)n : 0;
}

static psoup_status take_sha256(psoup_merger *merger, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__source_sha256(&merger->base, error));
    for (size_t i = 0; i < merger->n; i++)
        PSOUP__TRY(psoup__source_sha256(&merger->sources[i], error));
fail:
    return status;
}

static char *certificate_text(const psoup__certificate *certificate, psoup_error *error) {
    psoup_json *json = psoup__certificate_json(certificate, error);
    char *text = json != NULL ? psoup_json_text(json, 2) : NULL;
    psoup_json_free(json);
    if (text == NULL)
        psoup__out_of_memory(error, 0);
    return text;
}

/* All there is to write but fingerprints, which have their length. */
static psoup_status measure_certificate(const psoup__certificate *certificate, size_t *space,
                                        psoup_error *error) {
    char *text = certificate_text(certificate, error);
    if (text == NULL)
        return PSOUP_ERROR_MEMORY;
    *space = psoup__json_string_bytes(text) +
             (certificate->n + certificate->plan->n) * (PSOUP__HASH_TEXT - 1) +
             certificate->plan->n; /* an error's exponent may have a third digit */
    psoup_text_free(text);
    return PSOUP_OK;
}

/* Into a directory, or where that is NULL into a sink. */
static psoup_status run(psoup_merger *merger, const char *directory, const psoup_merge_sink *sink,
                        psoup_error *error) {
    psoup_status status;
    psoup__plan plan = {0};
    psoup__certificate certificate = {0};
    psoup__output *output = NULL;
    char *text = NULL;
    merger->ran = false;
    merger->report = (psoup_merge_report){.size = sizeof merger->report};
    for (size_t i = 0; i <= merger->n; i++)
        psoup__source_retry(i < merger->n ? &merger->sources[i] : &merger->base);
    PSOUP__TRY(psoup__plan_make(merger, &plan, error));
    if (directory != NULL)
        PSOUP__TRY(check_place(merger, directory, error));
    if (merger->options.sha256)
        PSOUP__TRY(take_sha256(merger, error));
    PSOUP__TRY(psoup__certificate_create(&plan, &certificate, error));
    if (directory != NULL && merger->options.format == PSOUP_MERGE_GGUF)
        PSOUP__TRY(psoup__output_gguf(&plan, directory, &output, error));
    else if (directory != NULL)
        PSOUP__TRY(psoup__output_directory(&plan, directory, &output, error));
    else
        PSOUP__TRY(psoup__output_sink(&plan, sink, &output, error));
    output->made = &certificate;
    PSOUP__TRY(measure_certificate(&certificate, &output->space, error));
    PSOUP__TRY(output->kind->begin(output, error));
    PSOUP__TRY(psoup__run(&plan, &certificate, output, error));
    if (output->kind->close != NULL)
        PSOUP__TRY(output->kind->close(output, error));
    if (merger->expected != NULL)
        PSOUP__TRY(psoup__certificate_compare(&certificate, merger->expected, error));
    if ((text = certificate_text(&certificate, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    PSOUP__TRY(output->kind->commit(output, text, error));
    report_errors(merger, &certificate);
    merger->ran = true;
fail:
    if (status != PSOUP_OK) /* what was read last was not looked at again */
        psoup__keep_forget(merger);
    psoup_text_free(text);
    if (output != NULL)
        output->kind->free(output);
    psoup__certificate_free(&certificate);
    psoup__plan_free(&plan);
    return status;
}

psoup_status psoup_merger_write(psoup_merger *merger, const char *directory, psoup_error *error) {
    if (directory == NULL || *directory == '\0')
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merger_write: no place for the result");
    return run(merger, directory, NULL, error);
}

psoup_status psoup_merger_run(psoup_merger *merger, const psoup_merge_sink *sink, psoup_error *error) {
    return run(merger, NULL, sink, error);
}

psoup_status psoup_merger_report(const psoup_merger *merger, psoup_merge_report *out, psoup_error *error) {
    size_t size = out->size;
    if (size < sizeof size)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_report: size %zu; expected sizeof(psoup_merge_report)", size);
    if (!merger->ran)
        return psoup__fail(error, PSOUP_ERROR_STATE, "nothing was merged yet");
    memset(out, 0, size);
    memcpy(out, &merger->report, size < sizeof merger->report ? size : sizeof merger->report);
    out->size = size;
    return PSOUP_OK;
}
