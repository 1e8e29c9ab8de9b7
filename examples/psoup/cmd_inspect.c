/* psoup inspect: what adapters have to do with each other. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *name_of(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

/* "0.5,0.3,0.2", one for each adapter. */
static psoup_status read_weights(const char *text, size_t n, double *weights, psoup_error *error) {
    const char *at = text;
    for (size_t i = 0; i < n; i++) {
        char *end;
        weights[i] = strtod(at, &end);
        if (end == at || !isfinite(weights[i]) || (i + 1 < n ? *end != ',' : *end != '\0'))
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "--weights \"%s\": expected %zu numbers with commas between them", text, n);
        at = end + 1;
    }
    return PSOUP_OK;
}

static void print_matrix(const char *title, const char *key, const psoup_json *found,
                         const cli_list *paths) {
    printf("\n%s\n%-16s", title, "");
    for (size_t j = 0; j < paths->n; j++)
        printf(" %10.10s", name_of(paths->items[j]));
    putchar('\n');
    for (size_t i = 0; i < paths->n; i++) {
        printf("%-16.16s", name_of(paths->items[i]));
        for (size_t j = 0; j < paths->n; j++) {
            const psoup_json *value =
                psoup_json_at(psoup_json_at(psoup_json_get(found, key), i), j);
            if (psoup_json_kind(value) == PSOUP_JSON_NULL)
                printf(" %10s", "–");
            else
                printf(" %10.4f", psoup_json_real(value, 0));
        }
        putchar('\n');
    }
}

static void print_found(const psoup_json *found, const cli_list *paths) {
    const psoup_json *soup = psoup_json_get(found, "soup"), *svd = psoup_json_get(soup, "svd");
    const psoup_json *factors = psoup_json_get(soup, "factors");
    const psoup_json *warnings = psoup_json_get(found, "warnings");
    printf("%-16s %10s %10s %12s %10s\n", "adapter", "modules", "rank", "parameters", "‖ΔW‖");
    for (size_t i = 0; i < paths->n; i++) {
        const psoup_json *one = psoup_json_at(psoup_json_get(found, "adapters"), i);
        printf("%-16.16s %10lld %10lld %12lld %10.4g\n", name_of(paths->items[i]),
               (long long)psoup_json_integer(psoup_json_get(one, "modules"), 0),
               (long long)psoup_json_integer(psoup_json_get(one, "largest_rank"), 0),
               (long long)psoup_json_integer(psoup_json_get(one, "parameters"), 0),
               psoup_json_real(psoup_json_at(psoup_json_get(found, "norms"), i), 0));
    }
    print_matrix("cosine of the changes", "cosine", found, paths);
    print_matrix("interference: what the column's adapter adds along the row's own direction",
                 "interference", found, paths);
    print_matrix("share of modules where the two oppose each other", "opposed", found, paths);
    printf("\nthe soup's norm is %.4g", psoup_json_real(psoup_json_get(soup, "norm"), 0));
    if (psoup_json_kind(factors) != PSOUP_JSON_NULL)
        printf("; method factors would be off by %.3g of it",
               psoup_json_real(psoup_json_get(factors, "error"), 0));
    printf("\nenergy that svd(r) keeps:");
    for (size_t k = 0; k < psoup_json_size(svd); k++)
        printf(" %lld: %.1f %%",
               (long long)psoup_json_integer(psoup_json_get(psoup_json_at(svd, k), "rank"), 0),
               100 * psoup_json_real(psoup_json_get(psoup_json_at(svd, k), "energy"), 0));
    putchar('\n');
    for (size_t k = 0; k < psoup_json_size(warnings); k++)
        printf("warning: %s\n", psoup_json_string(psoup_json_at(warnings, k), ""));
}

int cmd_inspect(int argc, char **argv) {
    const char *weights_text = NULL, *plot = NULL;
    bool json = false;
    int32_t threads = 0;
    cli_list paths = {0};
    int status;
    const cli_option options[] = {
        {"--weights", CLI_TEXT, &weights_text, "W,W,…", "the soup's weights (all the same)"},
        {"--plot", CLI_TEXT, &plot, "FILE.svg", "write a heat map"},
        {"--threads", CLI_INT, &threads, "N", "0 is one per processor (0)"},
        {"--json", CLI_FLAG, &json, NULL, "print everything, module by module, as one line of JSON"},
        {0}};
    if (!cli_parse(argc, argv, options,
                   "Usage: psoup inspect A B C… [--weights W,W,…]\n\n"
                   "Norms, angles and interference of adapters (PEFT directories or GGUF adapters), the\n"
                   "norm of their soup, and how good a cheaper form of it would be: from the small\n"
                   "factors alone.\n",
                   &paths, &status))
        return status;
    if (paths.n == 0)
        return cli_complain("inspect: expected at least one adapter");
    psoup_error error = {0};
    psoup_context *context = NULL;
    psoup_json *found = NULL;
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    double weights[sizeof paths.items / sizeof *paths.items];
    settings.threads = threads;
    settings.log = cli_log;
    psoup_status done = psoup_context_create(&settings, &context, &error);
    if (done == PSOUP_OK && weights_text)
        done = read_weights(weights_text, paths.n, weights, &error);
    if (done == PSOUP_OK)
        done = psoup_merge_inspect(context, paths.items, paths.n, weights_text ? weights : NULL, &found,
                                   &error);
    if (done == PSOUP_OK && plot)
        done = psoup_merge_inspect_plot(context, found, NULL, plot, &error);
    if (done != PSOUP_OK) {
        status = cli_fail(&error);
        psoup_json_free(found);
    } else if (json) {
        status = cli_print_json(found);
    } else {
        print_found(found, &paths);
        psoup_json_free(found);
        status = 0;
    }
    psoup_context_free(context);
    return status;
}
