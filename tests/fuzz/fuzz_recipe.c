/* Any text as a recipe, against the small models of tests/golden/merge, as far as the plan that it makes. */
#include <stdlib.h>
#include <string.h>

#include "merge/engine.h"
#include "merge/yaml.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

static void check_message(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK && (error->message[0] == '\0' || strchr(error->message, '\n') != NULL))
        abort();
}

static psoup_status plan(psoup_context *context, const char *text, size_t length, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup__yaml *yaml = NULL;
    psoup__plan made = {0};
    PSOUP__TRY(psoup_merger_create(context, NULL, &merger, error));
    PSOUP__TRY(psoup__yaml_parse(context, text, length, "fuzz", &yaml, error));
    PSOUP__TRY(psoup__recipe_apply(merger, psoup__yaml_root(yaml), "fuzz", error));
    PSOUP__TRY(psoup__plan_make(merger, &made, error));
    for (size_t i = 0; i < made.n; i++)
        if (made.results[i].input + made.results[i].inputs > made.n_inputs)
            abort();
fail:
    psoup__plan_free(&made);
    psoup__yaml_free(yaml);
    psoup_merger_free(merger);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length) {
    static psoup_context *context;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_error error = {0};
    options.threads = 1;
    if (context == NULL && psoup_context_create(&options, &context, &error) != PSOUP_OK)
        return 0;
    check_message(plan(context, (const char *)data, length, &error), &error);
    return 0;
}
