/* psoup merge: adapters or models into one. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static psoup_status read_method(const char *name, psoup_merger_options *options,
                                psoup_error *error) {
    char *end;
    if (!strcmp(name, "delta"))
        options->method = PSOUP_MERGE_DELTA;
    else if (!strcmp(name, "factors"))
        options->method = PSOUP_MERGE_FACTORS;
    else if (!strncmp(name, "svd", 3) && (name[3] == ':' || name[3] == '(')) {
        long rank = strtol(name + 4, &end, 10);
        options->method = PSOUP_MERGE_SVD;
        options->svd_rank = (int32_t)rank;
        if (end == name + 4 || rank < 1 || rank > 65536 || (*end && strcmp(end, ")") != 0))
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "--method \"%s\": expected svd:RANK",
                             name);
    } else
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "--method \"%s\": expected delta, factors or svd:RANK", name);
    return PSOUP_OK;
}

static psoup_status add_source(psoup_merger *merger, const char *text, psoup_error *error) {
    const char *equal = strrchr(text, '=');
    char *end = NULL;
    double weight = equal ? strtod(equal + 1, &end) : 0;
    if (!equal || equal == text || end == equal + 1 || *end || !isfinite(weight))
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "\"%s\": expected DIR=WEIGHT", text);
    char *path = strndup(text, (size_t)(equal - text));
    if (!path)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    psoup_status status = psoup_merger_add(merger, path, weight, error);
    free(path);
    return status;
}

static int print_report(const psoup_merge_report *report, const char *out, bool json) {
    if (json) {
        psoup_json *row = psoup_json_new_object();
        psoup_json_set(row, "out", psoup_json_new_string(out));
        psoup_json_set(row, "tensors", psoup_json_new_integer((int64_t)report->tensors));
        psoup_json_set(row, "worst_error", psoup_json_new_real(report->worst_error));
        psoup_json_set(row, "worst_name", psoup_json_new_string(report->worst_name));
        psoup_json_set(row, "mean_error", psoup_json_new_real(report->mean_error));
        return cli_print_json(row);
    }
    printf("%s: %zu tensors", out, report->tensors);
    if (report->worst_error > 0)
        printf("; ‖merged − exact‖/‖exact‖: mean %.3g, worst %.3g in %s", report->mean_error,
               report->worst_error, report->worst_name);
    putchar('\n');
    return 0;
}

int cmd_merge(int argc, char **argv) {
    const char *method = "delta", *base = NULL, *out = NULL, *dtype = NULL;
    bool json = false, any_sum = false;
    int32_t threads = 0;
    cli_list sources = {0};
    int status;
    const cli_option options[] = {
        {"--out", CLI_TEXT, &out, "DIR", "where the result goes"},
        {"--base", CLI_TEXT, &base, "DIR", "fold the adapters into this model"},
        {"--method", CLI_TEXT, &method, "M", "delta, factors or svd:RANK (delta)"},
        {"--dtype", CLI_TEXT, &dtype, "T", "f32, f16 or bf16 (that of the base or first source)"},
        {"--any-sum", CLI_FLAG, &any_sum, NULL, "accept weights that do not sum to 1"},
        {"--threads", CLI_INT, &threads, "N", "0 is one per processor (0)"},
        {"--json", CLI_FLAG, &json, NULL, "print the report as one line of JSON"},
        {0}};
    if (!cli_parse(
            argc, argv, options,
            "Usage: psoup merge [--base DIR] --out DIR DIR=WEIGHT…\n\n"
            "Adapters (PEFT directories) become one adapter, or with --base one full model; "
            "models\n"
            "become one model. Methods for adapters:\n"
            "  delta     the weighted sum of their effective parameters, exact; rank is the sum\n"
            "  factors   the A's and the B's averaged apart: has cross terms, keeps the rank\n"
            "  svd:RANK  the best approximation of delta at that rank\n",
            &sources, &status))
        return status;
    if (!out || sources.n == 0)
        return cli_complain("merge: expected --out DIR and at least one DIR=WEIGHT");
    psoup_error error = {0};
    psoup_context *context = NULL;
    psoup_merger *merger = NULL;
    psoup_merger_options merging = PSOUP_MERGER_OPTIONS_INIT;
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_merge_report report = {.size = sizeof report};
    psoup_dtype type;
    settings.threads = threads;
    settings.log = cli_log;
    merging.any_sum = any_sum;
    merging.progress = cli_progress;
    psoup_status done = read_method(method, &merging, &error);
    if (done == PSOUP_OK && dtype) {
        done = psoup_dtype_parse(dtype, &type, &error);
        merging.dtype = type;
    }
    if (done == PSOUP_OK)
        done = psoup_context_create(&settings, &context, &error);
    if (done == PSOUP_OK)
        done = psoup_merger_create(context, &merging, &merger, &error);
    if (done == PSOUP_OK && base)
        done = psoup_merger_set_base(merger, base, &error);
    for (size_t i = 0; done == PSOUP_OK && i < sources.n; i++)
        done = add_source(merger, sources.items[i], &error);
    if (done == PSOUP_OK)
        done = psoup_merger_write(merger, out, &error);
    if (done == PSOUP_OK)
        done = psoup_merger_report(merger, &report, &error);
    cli_progress_end();
    status = done == PSOUP_OK ? print_report(&report, out, json) : cli_fail(&error);
    psoup_merger_free(merger);
    psoup_context_free(context);
    return status;
}
