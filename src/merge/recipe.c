/* mergekit's YAML recipes (its config.py says what may be in one, plan.py what it means). */
#include "merge/engine.h"
#include "merge/yaml.h"

#include <math.h>
#include <string.h>
#include <strings.h>

typedef struct recipe {
    psoup_merger *merger;
    const char *path;
    const char *base; /* the reference as written, or NULL */
    const psoup__method *method;
} recipe;

static psoup_status refuse(const recipe *r, const psoup__yaml_node *node, psoup_status status,
                           const char *field, const char *why, psoup_error *error) {
    return psoup__fail(error, status, "%s:%d: %.100s: %s", r->path, node->line, field, why);
}

/* Keys that are none of `known` are refused by name; known ones that we lack, too. */
static psoup_status check_keys(const recipe *r, const psoup__yaml_node *map, const char *const *known,
                               psoup_error *error) {
    if (map->kind != PSOUP__YAML_MAP)
        return refuse(r, map, PSOUP_ERROR_FORMAT, "this", "expected names with values", error);
    for (const psoup__yaml_link *link = map->first; link != NULL; link = link->next) {
        size_t i = 0;
        while (known[i] != NULL && strcmp(known[i], link->key->text) != 0)
            i++;
        if (known[i] == NULL && !psoup__yaml_is_null(link->value))
            return refuse(r, link->key, PSOUP_ERROR_UNSUPPORTED, link->key->text, "is not supported", error);
    }
    return PSOUP_OK;
}

static psoup_status scalar(const recipe *r, const psoup__yaml_node *node, const char *field, const char **out,
                           psoup_error *error) {
    *out = NULL;
    if (psoup__yaml_is_null(node))
        return PSOUP_OK;
    if (node->kind != PSOUP__YAML_SCALAR)
        return refuse(r, node, PSOUP_ERROR_FORMAT, field, "expected a name", error);
    *out = node->text;
    return PSOUP_OK;
}

/* A model by "path", "path+adapter", or as {model: {path: …}, lora: {path: …}}. */
static psoup_status reference(const recipe *r, const psoup__yaml_node *node, const char **out,
                              psoup_error *error) {
    const psoup__yaml_node *inner = psoup__yaml_get(node, "model");
    if (node->kind == PSOUP__YAML_MAP && inner != NULL && psoup__yaml_get(node, "lora") == NULL &&
        psoup__yaml_get(node, "override_architecture") == NULL)
        node = psoup__yaml_get(inner, "path") != NULL ? psoup__yaml_get(inner, "path") : inner;
    if (node->kind != PSOUP__YAML_SCALAR || *node->text == '\0')
        return refuse(r, node, PSOUP_ERROR_UNSUPPORTED, "model", "expected a path, or MODEL+ADAPTER", error);
    *out = node->text;
    return PSOUP_OK;
}

/* ---- parameters ---------------------------------------------------------------------------------------- */

/* A number, a gradient, or one of them with a filter. */
static psoup_status add_value(const recipe *r, psoup__settings *settings, psoup__parameter parameter,
                              const char *filter, const psoup__yaml_node *node, psoup_error *error) {
    enum { MOST = 1024 };
    double values[MOST];
    size_t n = 0;
    const char *name = psoup__parameter_name(parameter);
    if (node->kind == PSOUP__YAML_LIST) {
        for (const psoup__yaml_link *link = node->first; link != NULL; link = link->next) {
            if (n == MOST || !psoup__yaml_number(link->value, &values[n]))
                return refuse(r, link->value, PSOUP_ERROR_FORMAT, name, "expected numbers", error);
            n++;
        }
    } else if (psoup__yaml_number(node, &values[0])) {
        n = 1;
    }
    if (n == 0)
        return refuse(r, node, PSOUP_ERROR_FORMAT, name, "expected a number or a list of numbers", error);
    return psoup__settings_add(r->merger->context, settings, parameter, filter, values, n, false, error);
}

static psoup_status add_conditional(const recipe *r, psoup__settings *settings, psoup__parameter parameter,
                                    const psoup__yaml_node *node, psoup_error *error) {
    static const char *const known[] = {"filter", "value", NULL};
    psoup_status status;
    const char *filter;
    const psoup__yaml_node *value = psoup__yaml_get(node, "value");
    PSOUP__TRY(check_keys(r, node, known, error));
    PSOUP__TRY(scalar(r, psoup__yaml_get(node, "filter"), "filter", &filter, error));
    if (value == NULL)
        return refuse(r, node, PSOUP_ERROR_FORMAT, psoup__parameter_name(parameter), "expected a value",
                      error);
    if (filter != NULL && strncmp(filter, "re:", 3) == 0)
        return refuse(r, node, PSOUP_ERROR_UNSUPPORTED, "filter", "a mergekit filter is a part of a name", error);
    PSOUP__TRY(add_value(r, settings, parameter, filter, value, error));
fail:
    return status;
}

static psoup_status add_parameters(const recipe *r, const psoup__yaml_node *map, psoup__settings *settings,
                                   psoup_error *error) {
    psoup_status status;
    if (psoup__yaml_is_null(map))
        return PSOUP_OK;
    if (map->kind != PSOUP__YAML_MAP)
        return refuse(r, map, PSOUP_ERROR_FORMAT, "parameters", "expected names with values", error);
    for (const psoup__yaml_link *link = map->first; link != NULL; link = link->next) {
        const char *name = link->key->text;
        const psoup__yaml_node *value = link->value;
        psoup__parameter parameter = psoup__parameter_named(name);
        if (settings->n > 100000)
            return refuse(r, link->key, PSOUP_ERROR_FORMAT, name, "too many parameters", error);
        if (strcmp(name, "int8_mask") == 0 || psoup__yaml_is_null(value))
            continue; /* int8_mask: in how many bytes mergekit keeps a mask; the result is the same */
        if (parameter == PSOUP__PARAMETERS || parameter == PSOUP__VOTE)
            return refuse(r, link->key, PSOUP_ERROR_UNSUPPORTED, name, "is not supported", error);
        bool conditions = value->kind == PSOUP__YAML_LIST && value->first != NULL &&
                          value->first->value->kind == PSOUP__YAML_MAP;
        if (value->kind == PSOUP__YAML_MAP)
            PSOUP__TRY(add_conditional(r, settings, parameter, value, error));
        else if (!conditions)
            PSOUP__TRY(add_value(r, settings, parameter, NULL, value, error));
        for (const psoup__yaml_link *one = conditions ? value->first : NULL; one != NULL; one = one->next)
            PSOUP__TRY(add_conditional(r, settings, parameter, one->value, error));
    }
    return PSOUP_OK;
fail:
    return status;
}

/* ---- sources ---------------------------------------------------------------------------------------------- */

/* Methods that take differences from the base, or begin at it, have it as base and not as a source. */
static bool is_base(const recipe *r, const char *model) {
    return r->base != NULL && strcmp(model, r->base) == 0 &&
           (r->method->needs_base || r->method->method == PSOUP_MERGE_SLERP ||
            r->method->method == PSOUP_MERGE_NUSLERP);
}

/* The number of a source, which is opened where it is new; PSOUP__NONE: it is the base. */
static psoup_status find_source(const recipe *r, const char *model, bool again, size_t *out,
                                psoup_error *error) {
    psoup_merger *merger = r->merger;
    *out = PSOUP__NONE;
    if (is_base(r, model))
        return PSOUP_OK;
    for (size_t i = 0; again && i < merger->n; i++)
        if (strcmp(merger->sources[i].path, model) == 0) {
            *out = i;
            return PSOUP_OK;
        }
    psoup_status status = psoup_merger_add(merger, model, 1, error);
    if (status != PSOUP_OK)
        return status;
    *out = merger->n - 1;
    merger->weights[*out] = PSOUP_MERGE_UNSAID;
    return PSOUP_OK;
}

static psoup_status read_models(const recipe *r, const psoup__yaml_node *list, psoup_error *error) {
    static const char *const known[] = {"model", "parameters", NULL};
    psoup_status status;
    if (list->kind != PSOUP__YAML_LIST || list->n == 0)
        return refuse(r, list, PSOUP_ERROR_FORMAT, "models", "expected a list", error);
    for (const psoup__yaml_link *link = list->first; link != NULL; link = link->next) {
        const psoup__yaml_node *one = link->value, *model = psoup__yaml_get(one, "model");
        const char *name;
        size_t source;
        PSOUP__TRY(check_keys(r, one, known, error));
        if (model == NULL)
            return refuse(r, one, PSOUP_ERROR_FORMAT, "models", "expected model", error);
        PSOUP__TRY(reference(r, model, &name, error));
        PSOUP__TRY(find_source(r, name, false, &source, error));
        if (source != PSOUP__NONE)
            PSOUP__TRY(add_parameters(r, psoup__yaml_get(one, "parameters"),
                                      &r->merger->sources[source].settings, error));
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status read_layers(const recipe *r, const psoup__yaml_node *node, int64_t *first, int64_t *end,
                                psoup_error *error) {
    double a = -1, b = -1;
    if (node == NULL || node->kind != PSOUP__YAML_LIST || node->n != 2 ||
        !psoup__yaml_number(node->first->value, &a) || !psoup__yaml_number(node->first->next->value, &b) ||
        a < 0 || b <= a || b > 100000 || a != floor(a) || b != floor(b))
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%d: layer_range: expected [FIRST, END]", r->path,
                           node != NULL ? node->line : 0);
    *first = (int64_t)a;
    *end = (int64_t)b;
    return PSOUP_OK;
}

static psoup_status read_slice(const recipe *r, const psoup__yaml_node *node, psoup_error *error) {
    static const char *const known[] = {"sources", "parameters", "base_model", NULL};
    static const char *const known_source[] = {"model", "layer_range", "parameters", NULL};
    psoup_status status;
    psoup__slice *slice;
    const psoup__yaml_node *sources = psoup__yaml_get(node, "sources"), *base;
    const char *name;
    PSOUP__TRY(check_keys(r, node, known, error));
    if (sources == NULL || sources->kind != PSOUP__YAML_LIST || sources->n == 0)
        return refuse(r, node, PSOUP_ERROR_FORMAT, "slices", "expected sources", error);
    if (!psoup__yaml_is_null(base = psoup__yaml_get(node, "base_model"))) {
        PSOUP__TRY(reference(r, base, &name, error));
        if (r->base == NULL || strcmp(name, r->base) != 0)
            return refuse(r, base, PSOUP_ERROR_UNSUPPORTED, "base_model",
                          "of a slice: another than the merge's is not supported", error);
    }
    PSOUP__TRY(psoup__merger_slice(r->merger, &slice, error));
    PSOUP__TRY(add_parameters(r, psoup__yaml_get(node, "parameters"), &slice->settings, error));
    for (const psoup__yaml_link *link = sources->first; link != NULL; link = link->next) {
        const psoup__yaml_node *one = link->value, *model = psoup__yaml_get(one, "model");
        psoup__slice_part *part;
        int64_t first = 0, end = 0;
        size_t source;
        PSOUP__TRY(check_keys(r, one, known_source, error));
        if (model == NULL)
            return refuse(r, one, PSOUP_ERROR_FORMAT, "sources", "expected model", error);
        PSOUP__TRY(reference(r, model, &name, error));
        PSOUP__TRY(read_layers(r, psoup__yaml_get(one, "layer_range"), &first, &end, error));
        PSOUP__TRY(find_source(r, name, true, &source, error));
        PSOUP__TRY(psoup__merger_slice_part(r->merger, slice, source, first, end, &part, error));
        PSOUP__TRY(add_parameters(r, psoup__yaml_get(one, "parameters"), &part->settings, error));
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status read_slices(const recipe *r, const psoup__yaml_node *list, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (list->kind != PSOUP__YAML_LIST || list->n == 0)
        return refuse(r, list, PSOUP_ERROR_FORMAT, "slices", "expected a list", error);
    for (const psoup__yaml_link *link = list->first; link != NULL && status == PSOUP_OK; link = link->next)
        status = read_slice(r, link->value, error);
    return status;
}

/* The one module that the models we know have. */
static psoup_status read_module(const recipe *r, const psoup__yaml_node *modules,
                                const psoup__yaml_node **out, psoup_error *error) {
    static const char *const known[] = {"default", NULL}, *const inside[] = {"slices", "models", "parameters",
                                                                             NULL};
    psoup_status status;
    PSOUP__TRY(check_keys(r, modules, known, error));
    if ((*out = psoup__yaml_get(modules, "default")) == NULL)
        return refuse(r, modules, PSOUP_ERROR_FORMAT, "modules", "expected default", error);
    PSOUP__TRY(check_keys(r, *out, inside, error));
fail:
    return status;
}

/* ---- the rest ------------------------------------------------------------------------------------------------ */

static psoup_status read_dtype(const recipe *r, const psoup__yaml_node *root, psoup_error *error) {
    static const struct {
        const char *name;
        psoup_dtype dtype;
    } names[] = {{"float32", PSOUP_F32}, {"float16", PSOUP_F16}, {"bfloat16", PSOUP_BF16}};
    const psoup__yaml_node *dtype = psoup__yaml_get(root, "dtype"), *out = psoup__yaml_get(root, "out_dtype");
    const psoup__yaml_node *two[2] = {dtype, out}; /* sums are made in f32 whatever the first says */
    for (int i = 0; i < 2; i++) {
        if (psoup__yaml_is_null(two[i]))
            continue;
        const char *text = two[i]->kind == PSOUP__YAML_SCALAR ? two[i]->text : "";
        if (strncmp(text, "torch.", 6) == 0)
            text += 6;
        size_t j = 0;
        while (j < 3 && strcmp(text, names[j].name) != 0)
            j++;
        if (j == 3)
            return refuse(r, two[i], PSOUP_ERROR_UNSUPPORTED, i == 0 ? "dtype" : "out_dtype",
                          "expected float32, float16 or bfloat16", error);
        r->merger->options.dtype = (int32_t)names[j].dtype;
    }
    return PSOUP_OK;
}

/* Whose tokenizer goes along. Other tokenizers than the embeddings' would need their rows moved. */
static psoup_status read_tokenizer(const recipe *r, const psoup__yaml_node *root, psoup_error *error) {
    static const char *const known[] = {"source", NULL};
    psoup_status status;
    const psoup__yaml_node *source = psoup__yaml_get(root, "tokenizer_source");
    const psoup__yaml_node *tokenizer = psoup__yaml_get(root, "tokenizer");
    const char *name;
    if (!psoup__yaml_is_null(tokenizer)) {
        PSOUP__TRY(check_keys(r, tokenizer, known, error));
        source = psoup__yaml_get(tokenizer, "source");
    }
    if (psoup__yaml_is_null(source))
        return PSOUP_OK;
    PSOUP__TRY(reference(r, source, &name, error));
    if (strcmp(name, "union") == 0)
        return refuse(r, source, PSOUP_ERROR_UNSUPPORTED, "tokenizer_source",
                      "union is not supported: expected base or a model", error);
    if (strcmp(name, "base") == 0) {
        if (r->base == NULL)
            return refuse(r, source, PSOUP_ERROR_FORMAT, "tokenizer_source", "base: there is no base_model",
                          error);
        name = r->base;
    }
    bool found = r->base != NULL && strcmp(name, r->base) == 0;
    for (size_t i = 0; i < r->merger->n; i++)
        found |= strcmp(name, r->merger->sources[i].path) == 0;
    if (!found)
        return refuse(r, source, PSOUP_ERROR_UNSUPPORTED, "tokenizer_source", "expected base or a model of the "
                      "recipe", error);
    if ((r->merger->sidecars = psoup__strdup(r->merger->context, name, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    r->merger->same_tokenizers = true;
fail:
    return status;
}

static psoup_status read_template(const recipe *r, const psoup__yaml_node *root, psoup_error *error) {
    const psoup__yaml_node *node = psoup__yaml_get(root, "chat_template");
    if (psoup__yaml_is_null(node))
        return PSOUP_OK;
    if (node->kind != PSOUP__YAML_SCALAR || strchr(node->text, '{') == NULL)
        return refuse(r, node, PSOUP_ERROR_UNSUPPORTED, "chat_template",
                      "named templates are not supported: expected the template's own text", error);
    r->merger->chat_template = psoup__strdup(r->merger->context, node->text, error);
    return r->merger->chat_template != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

static psoup_status read_method(recipe *r, const psoup__yaml_node *root, psoup_error *error) {
    psoup_status status;
    const psoup__yaml_node *node = psoup__yaml_get(root, "merge_method"), *base;
    const char *name = NULL;
    if (psoup__yaml_is_null(node))
        return refuse(r, root, PSOUP_ERROR_FORMAT, "merge_method", "is not there", error);
    PSOUP__TRY(scalar(r, node, "merge_method", &name, error));
    r->method = psoup__method_named(name);
    if (r->method == NULL)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s:%d: merge_method: %.60s is not supported",
                           r->path, node->line, name);
    r->merger->options.method = r->method->method;
    r->merger->options.peer = PSOUP_MERGE_MERGEKIT;
    if (!psoup__yaml_is_null(base = psoup__yaml_get(root, "base_model"))) {
        PSOUP__TRY(reference(r, base, &r->base, error));
        PSOUP__TRY(psoup_merger_set_base(r->merger, r->base, error));
    }
fail:
    return status;
}

psoup_status psoup__recipe_apply(psoup_merger *merger, const psoup__yaml_node *root, const char *path,
                                 psoup_error *error) {
    static const char *const known[] = {"merge_method", "base_model", "models", "slices", "modules",
                                        "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
                                        "chat_template", "name", NULL};
    psoup_status status;
    recipe r = {.merger = merger, .path = path};
    const psoup__yaml_node *module = root, *modules = psoup__yaml_get(root, "modules");
    PSOUP__TRY(check_keys(&r, root, known, error));
    PSOUP__TRY(read_method(&r, root, error));
    if (!psoup__yaml_is_null(modules))
        PSOUP__TRY(read_module(&r, modules, &module, error));
    const psoup__yaml_node *models = psoup__yaml_get(module, "models");
    const psoup__yaml_node *slices = psoup__yaml_get(module, "slices");
    bool outside = module != root && (!psoup__yaml_is_null(psoup__yaml_get(root, "models")) ||
                                      !psoup__yaml_is_null(psoup__yaml_get(root, "slices")));
    if (psoup__yaml_is_null(models) == psoup__yaml_is_null(slices) || outside)
        return refuse(&r, root, PSOUP_ERROR_FORMAT, "models, slices, modules", "expected one of them", error);
    PSOUP__TRY(psoup__yaml_is_null(models) ? read_slices(&r, slices, error) : read_models(&r, models, error));
    if (module != root) /* a module's go before those of all */
        PSOUP__TRY(add_parameters(&r, psoup__yaml_get(module, "parameters"), &merger->settings, error));
    PSOUP__TRY(add_parameters(&r, psoup__yaml_get(root, "parameters"), &merger->settings, error));
    PSOUP__TRY(read_dtype(&r, root, error));
    PSOUP__TRY(read_tokenizer(&r, root, error));
    PSOUP__TRY(read_template(&r, root, error));
    merger->from_recipe = true;
fail:
    return status;
}

psoup_status psoup_merger_load_recipe(psoup_merger *merger, const char *path, psoup_error *error) {
    psoup_status status;
    char *text = NULL;
    size_t length;
    psoup__yaml *yaml = NULL;
    if (merger->n > 0 || merger->has_base || merger->n_slices > 0 || merger->settings.n > 0)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: a recipe goes into a fresh merger", path);
    PSOUP__TRY(psoup__file_read(merger->context, path, 1 << 20, &text, &length, error));
    PSOUP__TRY(psoup__yaml_parse(merger->context, text, length, path, &yaml, error));
    PSOUP__TRY(psoup__recipe_apply(merger, psoup__yaml_root(yaml), path, error));
fail:
    psoup__yaml_free(yaml);
    psoup__free(merger->context, text);
    return status;
}
