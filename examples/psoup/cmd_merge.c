/* psoup merge: adapters and models into one, from sources on the command line, a recipe or a certificate. */
#include "cli.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct merge_arguments {
    const char *method, *base, *out, *dtype, *shard_size, *format, *peer, *seed, *replay, *verify,
        *reference;
    bool json, any_sum, sha256, resume;
    int32_t threads;
    float strength;
    cli_list sources, parameters;
} merge_arguments;

static const char about[] =
    "Usage: psoup merge [--base DIR] --out DIR DIR=WEIGHT…\n"
    "       psoup merge RECIPE.yaml --out DIR\n"
    "       psoup merge --replay CERTIFICATE --out DIR\n"
    "       psoup merge --verify DIR\n\n"
    "Adapters (PEFT directories, GGUF adapters) become one adapter, or with --base one full model;\n"
    "models (directories, .safetensors, .gguf) become one model; beside models an adapter counts as the\n"
    "base with its change. MODEL+ADAPTER is a model with an adapter folded in.\n\n"
    "Methods of adapters' factors:\n"
    "  delta        the weighted sum of their effective parameters, exact; the rank is the sum of ranks\n"
    "  factors      the A's and the B's averaged apart: has cross terms, keeps the rank\n"
    "  svd:RANK     the best approximation of delta at that rank\n"
    "  peft_linear  what PEFT's \"linear\" does, for comparison\n"
    "Methods of whole tensors (docs/merging.md has each with its source and parameters): linear,\n"
    "  task_arithmetic, ties, dare_linear, dare_ties, della, della_linear, breadcrumbs,\n"
    "  breadcrumbs_ties, magnitude_prune, slerp, nuslerp, model_stock, passthrough\n\n"
    "--param NAME=VALUE sets a parameter: density, gamma, epsilon, lambda, t, weight, scale, normalize,\n"
    "rescale. NAME@FILTER=VALUE only for tensors whose name contains FILTER (re:FILTER: an expression);\n"
    "NAME:N=VALUE only for source N (from 0); VALUE may be a gradient over the layers: 0,0.5,1.\n\n"
    "Examples:\n"
    "  psoup merge --out soup P1A=0.5 P2A=0.5\n"
    "  psoup merge --base llama --out soup P1A=0.5 P2A=0.3 P3A=0.2\n"
    "  psoup merge --base llama --method ties --param density=0.5 --out merged math=1 code=1\n"
    "  psoup merge --method slerp --param t@self_attn=0,0.5,1 --param t=0.5 --base A --out mix B=1\n"
    "  psoup merge --out f16 --dtype f16 --shard-size 2GB llama=1\n"
    "  psoup merge --out soup.gguf --reference llama P1A=0.5 P2A=0.5\n"
    "  psoup merge --out llama.gguf --dtype q8_0 llama=1\n"
    "  psoup merge recipe.yaml --out merged --sha256 --resume\n";

/* "svd:8" and "svd(8)" carry the rank. */
static psoup_status read_method(const char *name, psoup_merger_options *options, psoup_error *error) {
    char *end;
    if (!strncmp(name, "svd", 3) && (name[3] == ':' || name[3] == '(' || name[3] == '\0')) {
        long rank = name[3] ? strtol(name + 4, &end, 10) : 0;
        options->method = PSOUP_MERGE_SVD;
        options->svd_rank = (int32_t)rank;
        if (rank < 1 || rank > 65536 || end == name + 4 || (*end && strcmp(end, ")") != 0))
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "--method \"%s\": expected svd:RANK", name);
        return PSOUP_OK;
    }
    const char *colon = strchr(name, ':'); /* "ties:8": of adapters without a base, at that rank */
    char plain[64];
    snprintf(plain, sizeof plain, "%.*s", colon ? (int)(colon - name) : 60, name);
    if (colon) {
        long rank = strtol(colon + 1, &end, 10);
        options->svd_rank = (int32_t)rank;
        if (rank < 1 || rank > 65536 || *end)
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "--method \"%s\": expected METHOD:RANK", name);
    }
    return psoup_merge_method_parse(plain, &options->method, error);
}

/* "500MB", "2GB", "1048576": decimal, as Hugging Face's tools have it. */
static psoup_status read_size(const char *text, uint64_t *out, psoup_error *error) {
    char *end;
    double number = strtod(text, &end);
    double unit = 1;
    switch (toupper((unsigned char)*end)) {
    case 'K': unit = 1e3; break;
    case 'M': unit = 1e6; break;
    case 'G': unit = 1e9; break;
    case 'T': unit = 1e12; break;
    default: break;
    }
    if (unit > 1)
        end++;
    if (toupper((unsigned char)*end) == 'B')
        end++;
    if (end == text || *end || !(number * unit >= 1) || number * unit > 9e18)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "--shard-size \"%s\": expected a size as 2GB", text);
    *out = (uint64_t)(number * unit);
    return PSOUP_OK;
}

static psoup_status read_options(const merge_arguments *a, psoup_merger_options *options,
                                 psoup_error *error) {
    psoup_dtype dtype;
    psoup_status status = read_method(a->method ? a->method : "delta", options, error);
    options->any_sum = a->any_sum;
    options->strength = (double)a->strength;
    options->sha256 = a->sha256;
    options->resume = a->resume;
    options->progress = cli_progress;
    if (status == PSOUP_OK && a->dtype) {
        status = psoup_dtype_parse(a->dtype, &dtype, error);
        options->dtype = dtype;
    }
    if (status == PSOUP_OK && a->shard_size)
        status = read_size(a->shard_size, &options->shard_size, error);
    static const char *const peers[] = {"paper", "mergekit", "peft"};
    if (status == PSOUP_OK && a->peer) {
        options->peer = -1;
        for (int32_t i = 0; i < 3; i++)
            if (!strcmp(a->peer, peers[i]))
                options->peer = i;
        if (options->peer < 0)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "--peer \"%s\": expected paper, mergekit or peft", a->peer);
    }
    if (status == PSOUP_OK && a->format) {
        options->format = !strcmp(a->format, "gguf") ? PSOUP_MERGE_GGUF : PSOUP_MERGE_AS_SOURCES;
        if (strcmp(a->format, "gguf") != 0 && strcmp(a->format, "safetensors") != 0)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "--format \"%s\": expected safetensors or gguf", a->format);
    } else if (a->out && strlen(a->out) > 5 && !strcmp(a->out + strlen(a->out) - 5, ".gguf")) {
        options->format = PSOUP_MERGE_GGUF;
    }
    if (status == PSOUP_OK && a->seed) {
        char *end;
        options->seed = strtoull(a->seed, &end, 10);
        if (end == a->seed || *end)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT, "--seed \"%s\": expected a number", a->seed);
    }
    return status;
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

/* NAME[:SOURCE][@FILTER]=VALUE[,VALUE…] */
static psoup_status set_parameter(psoup_merger *merger, const char *text, psoup_error *error) {
    enum { MOST = 256 };
    double values[MOST];
    size_t n = 0;
    long source = -1;
    const char *equal = strrchr(text, '=');
    char *name = equal ? strndup(text, (size_t)(equal - text)) : NULL, *end;
    psoup_status status = PSOUP_OK;
    if (!equal)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "--param \"%s\": expected NAME=VALUE", text);
    if (!name)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    char *filter = strchr(name, '@'), *colon;
    if (filter)
        *filter++ = '\0';
    if ((colon = strchr(name, ':')) != NULL) {
        *colon = '\0';
        source = strtol(colon + 1, &end, 10);
        if (end == colon + 1 || *end || source < 0)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT, "--param \"%s\": expected NAME:SOURCE", text);
    }
    const bool words = equal && !strcmp(name, "vote");
    if (words && (!strcmp(equal, "=total") || !strcmp(equal, "=frequency"))) {
        values[n++] = !strcmp(equal, "=frequency");
        equal += strlen(equal);
    }
    for (const char *at = equal; status == PSOUP_OK && *at;) {
        if (n == MOST || !isfinite(values[n] = strtod(at + 1, &end)) || end == at + 1 ||
            (*end && *end != ','))
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "--param \"%s\": expected numbers, up to %d with commas between", text, MOST);
        n++;
        at = end;
    }
    if (status == PSOUP_OK)
        status = psoup_merger_set_parameter(merger, source, name, filter, values, n, error);
    free(name);
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

static bool is_recipe(const cli_list *sources) {
    if (sources->n != 1)
        return false;
    const char *dot = strrchr(sources->items[0], '.');
    return dot && (!strcmp(dot, ".yaml") || !strcmp(dot, ".yml"));
}

static int keep_nothing(void *user, uint64_t offset, const void *data, size_t bytes) {
    (void)user, (void)offset, (void)data, (void)bytes;
    return 0;
}

static psoup_status merge(psoup_context *context, const merge_arguments *a, psoup_merge_report *report,
                          psoup_error *error) {
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_status status = read_options(a, &options, error);
    if (status == PSOUP_OK)
        status = psoup_merger_create(context, &options, &merger, error);
    if (status == PSOUP_OK && a->replay)
        status = psoup_merger_load_certificate(merger, a->replay, error);
    if (status == PSOUP_OK && a->reference)
        status = psoup_merger_set_reference(merger, a->reference, error);
    if (status == PSOUP_OK && a->base)
        status = psoup_merger_set_base(merger, a->base, error);
    if (status == PSOUP_OK && is_recipe(&a->sources)) {
        if (a->base)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT, "--base: a recipe names its own base");
        else
            status = psoup_merger_load_recipe(merger, a->sources.items[0], error);
    } else
        for (size_t i = 0; status == PSOUP_OK && i < a->sources.n; i++)
            status = add_source(merger, a->sources.items[i], error);
    for (size_t i = a->parameters.n; status == PSOUP_OK && i-- > 0;) /* the first that fits is meant */
        status = set_parameter(merger, a->parameters.items[i], error);
    if (status == PSOUP_OK && a->out) {
        status = psoup_merger_write(merger, a->out, error);
    } else if (status == PSOUP_OK) { /* a replay that only compares */
        psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
        sink.write = keep_nothing;
        status = psoup_merger_run(merger, &sink, error);
    }
    if (status == PSOUP_OK)
        status = psoup_merger_report(merger, report, error);
    psoup_merger_free(merger);
    return status;
}

int cmd_merge(int argc, char **argv) {
    merge_arguments a = {.strength = 1};
    int status;
    const cli_option options[] = {
        {"--out", CLI_TEXT, &a.out, "DIR", "where the result goes; FILE.gguf for a GGUF file"},
        {"--base", CLI_TEXT, &a.base, "DIR", "the model that adapters change and differences are taken from"},
        {"--method", CLI_TEXT, &a.method, "M", "how (delta)"},
        {"--param", CLI_LIST, &a.parameters, "P=V", "a parameter of the method; may be given several times"},
        {"--peer", CLI_TEXT, &a.peer, "P", "whose definition where two differ: paper, mergekit, peft (paper)"},
        {"--seed", CLI_TEXT, &a.seed, "N", "of DARE and DELLA (0)"},
        {"--dtype", CLI_TEXT, &a.dtype, "T", "f32, f16, bf16, … (that of the base or first source)"},
        {"--shard-size", CLI_TEXT, &a.shard_size, "SIZE", "split a model into files of at most this: 2GB"},
        {"--format", CLI_TEXT, &a.format, "F", "safetensors or gguf (by the name of --out)"},
        {"--reference", CLI_TEXT, &a.reference, "DIR", "the model that adapters in GGUF are for"},
        {"--any-sum", CLI_FLAG, &a.any_sum, NULL, "accept weights that do not sum to 1"},
        {"--strength", CLI_FLOAT, &a.strength, "S", "multiplies adapters' weights, which sum to 1 before (1)"},
        {"--sha256", CLI_FLAG, &a.sha256, NULL, "put the SHA-256 of the sources into the certificate"},
        {"--resume", CLI_FLAG, &a.resume, NULL, "continue what a killed run began, from its finished shards"},
        {"--replay", CLI_TEXT, &a.replay, "FILE",
         "make a certificate's merge again and compare every tensor; without --out only compare"},
        {"--verify", CLI_TEXT, &a.verify, "DIR", "check a result against the certificate in it"},
        {"--threads", CLI_INT, &a.threads, "N", "0 is one per processor (0)"},
        {"--json", CLI_FLAG, &a.json, NULL, "print the report as one line of JSON"},
        {0}};
    if (!cli_parse(argc, argv, options, about, &a.sources, &status))
        return status;
    if (!a.verify && !a.replay && (!a.out || a.sources.n == 0))
        return cli_complain("merge: expected --out DIR and at least one DIR=WEIGHT, or a recipe");
    if ((a.verify && (a.out || a.replay || a.sources.n > 0)) || (a.replay && (a.sources.n > 0 || a.base)))
        return cli_complain("merge: --verify and --replay take no sources");
    bool how = a.method || a.peer;
    bool more = a.seed || a.dtype || a.shard_size || a.format || a.reference || a.any_sum || a.strength != 1 || a.parameters.n > 0;
    if (a.replay && (how || more))
        return cli_complain("merge: --replay does what the certificate says; beside it only --out, --threads, "
                            "--sha256 and --resume");
    if (is_recipe(&a.sources) && how)
        return cli_complain("merge: a recipe says its method itself, as mergekit has it; not --method or --peer");
    psoup_error error = {0};
    psoup_context *context = NULL;
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_merge_report report = {.size = sizeof report};
    settings.threads = a.threads;
    settings.log = cli_log;
    psoup_status done = psoup_context_create(&settings, &context, &error);
    if (done == PSOUP_OK && a.verify)
        done = psoup_merge_verify(context, a.verify, &report.tensors, &error);
    else if (done == PSOUP_OK)
        done = merge(context, &a, &report, &error);
    cli_progress_end();
    const char *what = a.verify ? a.verify : a.out ? a.out : a.replay;
    status = done == PSOUP_OK ? print_report(&report, what, a.json) : cli_fail(&error);
    psoup_context_free(context);
    return status;
}
