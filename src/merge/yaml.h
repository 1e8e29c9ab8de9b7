/* src/merge/yaml.h: a YAML text as a tree that remembers its lines. yaml.c is the one file that knows
 * libyaml. */
#ifndef PSOUP__MERGE_YAML_H
#define PSOUP__MERGE_YAML_H

#include "base/base.h"

typedef enum psoup__yaml_kind { PSOUP__YAML_SCALAR, PSOUP__YAML_LIST, PSOUP__YAML_MAP } psoup__yaml_kind;

typedef struct psoup__yaml_node {
    psoup__yaml_kind kind;
    int line;         /* from 1 */
    bool plain;       /* a scalar without quotes, which may be a number, a bool or null */
    const char *text; /* of a scalar; NUL-terminated */
    struct psoup__yaml_link *first, *last;
    size_t n; /* elements of a list, members of a map */
    bool open; /* while it is read */
    size_t weight; /* nodes in it, itself counted, those behind aliases as often as they stand there */
} psoup__yaml_node;
typedef struct psoup__yaml_link {
    const psoup__yaml_node *key; /* of a map */
    const psoup__yaml_node *value;
    struct psoup__yaml_link *next;
} psoup__yaml_link;

typedef struct psoup__yaml psoup__yaml;
/* One document. Bounded: a megabyte, 64 levels, 100 000 nodes, aliases counted as what they stand for; aliases
 * may not lie in their own node; keys are scalars and there once; merge keys and tags are refused. `name`
 * stands for it in messages. */
psoup_status psoup__yaml_parse(psoup_context *context, const char *text, size_t length, const char *name,
                               psoup__yaml **out, psoup_error *error);
void psoup__yaml_free(psoup__yaml *yaml);
const psoup__yaml_node *psoup__yaml_root(const psoup__yaml *yaml);
/* The member of a map; NULL where there is none or node is no map. */
const psoup__yaml_node *psoup__yaml_get(const psoup__yaml_node *node, const char *key);
/* A plain scalar that is null, ~ or nothing; or no node. */
bool psoup__yaml_is_null(const psoup__yaml_node *node);
/* A finite number, or true and false as 1 and 0. */
bool psoup__yaml_number(const psoup__yaml_node *node, double *out);

#endif
