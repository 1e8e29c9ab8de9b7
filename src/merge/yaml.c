/* YAML through libyaml's events, so that nothing is built that was not counted first. */
#include <yaml.h>

#include "merge/yaml.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_BYTES = 1 << 20, MAX_DEPTH = 64, MAX_NODES = 100000, MAX_ANCHORS = 1000 };

typedef struct chunk { /* memory that goes all at once */
    struct chunk *next;
} chunk;

struct psoup__yaml {
    psoup_context *context;
    const char *name;
    chunk *chunks;
    psoup__yaml_node *root;
    size_t nodes;
    struct anchor {
        const char *name;
        psoup__yaml_node *node;
    } anchors[MAX_ANCHORS];
    size_t n_anchors;
    struct level {
        psoup__yaml_node *node;
        const psoup__yaml_node *key; /* of a map, when its value is to come */
    } levels[MAX_DEPTH];
    size_t depth;
};

static void *take(psoup__yaml *y, size_t bytes, psoup_error *error) {
    chunk *c = psoup__alloc(y->context, 1, sizeof *c + bytes, error);
    if (c == NULL)
        return NULL;
    c->next = y->chunks;
    y->chunks = c;
    return c + 1;
}

static psoup_status refuse(const psoup__yaml *y, size_t line, const char *what, psoup_error *error) {
    return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%zu: %s", y->name, line + 1, what);
}

/* Puts a node into what is open. */
static psoup_status place(psoup__yaml *y, psoup__yaml_node *node, size_t line, psoup_error *error) {
    if (y->depth == 0) {
        if (y->root != NULL)
            return refuse(y, line, "expected one document", error);
        y->root = node;
        return PSOUP_OK;
    }
    struct level *level = &y->levels[y->depth - 1];
    psoup__yaml_node *parent = level->node;
    if (parent->kind == PSOUP__YAML_MAP && level->key == NULL) {
        if (node->kind != PSOUP__YAML_SCALAR)
            return refuse(y, line, "expected a name as key", error);
        if (strcmp(node->text, "<<") == 0)
            return refuse(y, line, "merge keys (<<) are not supported", error);
        if (psoup__yaml_get(parent, node->text) != NULL)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%zu: %.100s is there twice", y->name, line + 1,
                               node->text);
        level->key = node;
        return PSOUP_OK;
    }
    psoup__yaml_link *link = take(y, sizeof *link, error);
    if (link == NULL)
        return PSOUP_ERROR_MEMORY;
    *link = (psoup__yaml_link){.key = level->key, .value = node};
    *(parent->last != NULL ? &parent->last->next : &parent->first) = link;
    parent->last = link;
    parent->n++;
    parent->weight += node->weight;
    level->key = NULL;
    return PSOUP_OK;
}

static psoup_status new_node(psoup__yaml *y, psoup__yaml_kind kind, const char *anchor, const char *tag,
                             size_t line, psoup__yaml_node **out, psoup_error *error) {
    if (++y->nodes > MAX_NODES)
        return refuse(y, line, "too many values", error);
    if (tag != NULL)
        return refuse(y, line, "tags are not supported", error);
    psoup__yaml_node *node = take(y, sizeof *node, error);
    if ((*out = node) == NULL)
        return PSOUP_ERROR_MEMORY;
    *node = (psoup__yaml_node){.kind = kind, .line = (int)line + 1, .open = kind != PSOUP__YAML_SCALAR,
                                .weight = 1};
    if (anchor == NULL)
        return PSOUP_OK;
    if (y->n_anchors == MAX_ANCHORS)
        return refuse(y, line, "too many anchors", error);
    char *name = take(y, strlen(anchor) + 1, error);
    if (name == NULL)
        return PSOUP_ERROR_MEMORY;
    memcpy(name, anchor, strlen(anchor) + 1);
    y->anchors[y->n_anchors++] = (struct anchor){name, node};
    return PSOUP_OK;
}

static psoup_status take_scalar(psoup__yaml *y, const yaml_event_t *e, psoup_error *error) {
    psoup_status status;
    psoup__yaml_node *node;
    size_t line = e->start_mark.line, length = e->data.scalar.length;
    const char *tag = (const char *)e->data.scalar.tag;
    PSOUP__TRY(new_node(y, PSOUP__YAML_SCALAR, (const char *)e->data.scalar.anchor, tag, line, &node, error));
    char *text = take(y, length + 1, error);
    if (text == NULL)
        return PSOUP_ERROR_MEMORY;
    memcpy(text, e->data.scalar.value, length);
    if (memchr(text, '\0', length) != NULL)
        return refuse(y, line, "a NUL in a text", error);
    node->text = text;
    node->plain = e->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    PSOUP__TRY(place(y, node, line, error));
fail:
    return status;
}

static psoup_status begin(psoup__yaml *y, psoup__yaml_kind kind, const char *anchor, const char *tag,
                          size_t line, psoup_error *error) {
    psoup_status status;
    psoup__yaml_node *node;
    PSOUP__TRY(new_node(y, kind, anchor, tag, line, &node, error));
    PSOUP__TRY(place(y, node, line, error));
    if (y->depth == MAX_DEPTH)
        return refuse(y, line, "too many levels", error);
    y->levels[y->depth++] = (struct level){node, NULL};
fail:
    return status;
}

static psoup_status take_alias(psoup__yaml *y, const char *name, size_t line, psoup_error *error) {
    for (size_t i = y->n_anchors; i-- > 0;) /* the latest of its name */
        if (strcmp(y->anchors[i].name, name) == 0) {
            if (y->anchors[i].node->open)
                return refuse(y, line, "an alias inside its own anchor", error);
            if ((y->nodes += y->anchors[i].node->weight) > MAX_NODES)
                return refuse(y, line, "too many values", error);
            return place(y, y->anchors[i].node, line, error);
        }
    return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%zu: no anchor %.60s", y->name, line + 1, name);
}

static psoup_status take_event(psoup__yaml *y, const yaml_event_t *e, psoup_error *error) {
    size_t line = e->start_mark.line;
    switch (e->type) {
    case YAML_SCALAR_EVENT:
        return take_scalar(y, e, error);
    case YAML_SEQUENCE_START_EVENT:
        return begin(y, PSOUP__YAML_LIST, (const char *)e->data.sequence_start.anchor,
                     (const char *)e->data.sequence_start.tag, line, error);
    case YAML_MAPPING_START_EVENT:
        return begin(y, PSOUP__YAML_MAP, (const char *)e->data.mapping_start.anchor,
                     (const char *)e->data.mapping_start.tag, line, error);
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT: {
        psoup__yaml_node *node = y->levels[--y->depth].node;
        node->open = false;
        if (y->depth > 0)
            y->levels[y->depth - 1].node->weight += node->weight - 1; /* 1 was added when it began */
        return PSOUP_OK;
    }
    case YAML_ALIAS_EVENT:
        return take_alias(y, (const char *)e->data.alias.anchor, line, error);
    default:
        return PSOUP_OK;
    }
}

static psoup_status read_events(psoup__yaml *y, yaml_parser_t *parser, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool more = true;
    while (more && status == PSOUP_OK) {
        yaml_event_t event;
        if (!yaml_parser_parse(parser, &event)) {
            if (parser->error == YAML_MEMORY_ERROR)
                return psoup__out_of_memory(error, 0);
            return refuse(y, parser->problem_mark.line,
                          parser->problem != NULL ? parser->problem : "is no YAML", error);
        }
        status = take_event(y, &event, error);
        more = event.type != YAML_STREAM_END_EVENT;
        yaml_event_delete(&event);
    }
    return status;
}

psoup_status psoup__yaml_parse(psoup_context *context, const char *text, size_t length, const char *name,
                               psoup__yaml **out, psoup_error *error) {
    psoup_status status;
    yaml_parser_t parser;
    *out = NULL;
    if (length > MAX_BYTES)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %zu bytes; expected at most %d", name, length,
                           MAX_BYTES);
    psoup__yaml *y = psoup__alloc(context, 1, sizeof *y, error);
    if (y == NULL)
        return PSOUP_ERROR_MEMORY;
    y->context = context;
    y->name = name;
    if (!yaml_parser_initialize(&parser)) {
        psoup__yaml_free(y);
        return psoup__out_of_memory(error, sizeof parser);
    }
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, length);
    status = read_events(y, &parser, error);
    yaml_parser_delete(&parser);
    if (status == PSOUP_OK && y->root == NULL)
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: is empty", name);
    if (status != PSOUP_OK) {
        psoup__yaml_free(y);
        return status;
    }
    *out = y;
    return PSOUP_OK;
}

void psoup__yaml_free(psoup__yaml *yaml) {
    if (yaml == NULL)
        return;
    while (yaml->chunks != NULL) {
        chunk *next = yaml->chunks->next;
        psoup__free(yaml->context, yaml->chunks);
        yaml->chunks = next;
    }
    psoup__free(yaml->context, yaml);
}

const psoup__yaml_node *psoup__yaml_root(const psoup__yaml *yaml) {
    return yaml->root;
}

const psoup__yaml_node *psoup__yaml_get(const psoup__yaml_node *node, const char *key) {
    if (node == NULL || node->kind != PSOUP__YAML_MAP)
        return NULL;
    for (const psoup__yaml_link *link = node->first; link != NULL; link = link->next)
        if (strcmp(link->key->text, key) == 0)
            return link->value;
    return NULL;
}

bool psoup__yaml_is_null(const psoup__yaml_node *node) {
    return node == NULL || (node->kind == PSOUP__YAML_SCALAR && node->plain &&
                            (*node->text == '\0' || strcmp(node->text, "~") == 0 ||
                             strcasecmp(node->text, "null") == 0));
}

bool psoup__yaml_number(const psoup__yaml_node *node, double *out) {
    char *end;
    if (node == NULL || node->kind != PSOUP__YAML_SCALAR || *node->text == '\0')
        return false;
    if (strcasecmp(node->text, "true") == 0 || strcasecmp(node->text, "false") == 0) {
        *out = strcasecmp(node->text, "true") == 0;
        return true;
    }
    *out = strtod(node->text, &end);
    return *end == '\0' && isfinite(*out) && strpbrk(node->text, "xX") == NULL;
}
