/* Prompt templates: text with {instruction}, {input} and {preference} in it. */
#include "eval/eval.h"

#include <string.h>

/* allenai/open-instruct's Tulu format, with the paper's order of parts. */
static const char tulu[] = "<|user|>\n{instruction} {input} {preference}\n<|assistant|>\n";
/* tatsu-lab/stanford_alpaca's prompt without an input field; the parts share its instruction. */
static const char alpaca[] =
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction} {input} {preference}\n\n### Response:\n";

enum { PARTS = 3 };
static const char *const keys[PARTS] = {"{instruction}", "{input}", "{preference}"};

static int part_at(const char *c) {
    for (int i = 0; i < PARTS; i++)
        if (!strncmp(c, keys[i], strlen(keys[i])))
            return i;
    return -1;
}

/* An empty part takes the blank before it away, or at the start of a line the one after. */
static void fill(psoup__buffer *to, const char *template, const char *const *values) {
    for (const char *c = template; *c;) {
        size_t blank = *c == ' ';
        int part = part_at(c + blank);
        if (part < 0) {
            psoup__buffer_append(to, c++, 1);
            continue;
        }
        const char *value = values[part];
        if (*value) {
            psoup__buffer_append(to, c, blank);
            psoup__buffer_append(to, value, strlen(value));
        }
        c += blank + strlen(keys[part]);
        if (!*value && !blank && *c == ' ' && (!to->length || to->data[to->length - 1] == '\n'))
            c++;
    }
}

psoup_status psoup_template_fill(const char *name, const char *instruction, const char *input,
                                 const char *preference, char **out, psoup_error *error) {
    const char *values[PARTS] = {instruction, input ? input : "", preference ? preference : ""};
    const char *template = name;
    if (!out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "template: out is NULL");
    *out = NULL;
    if (!instruction)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "template: the instruction is NULL");
    if (!name || !strcmp(name, "tulu"))
        template = tulu;
    else if (!strcmp(name, "alpaca"))
        template = alpaca;
    else if (!strstr(name, "{instruction}"))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "template \"%s\": expected \"tulu\", \"alpaca\" or a text that holds "
                           "{instruction}",
                           name);
    psoup__buffer result = {0}; /* without a context, as psoup_text_free expects */
    psoup__buffer_append(&result, "", 0);
    fill(&result, template, values);
    if (result.failed) {
        size_t length = result.length;
        psoup__buffer_free(&result);
        return psoup__out_of_memory(error, length);
    }
    *out = result.data;
    return PSOUP_OK;
}
