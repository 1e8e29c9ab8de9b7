/* Prompt templates: text with {instruction}, {input} and {preference} in it. */
#include "eval/eval.h"

#include <stdlib.h>
#include <string.h>

/* allenai/open-instruct's Tulu format, with the paper's order of parts. */
static const char tulu[] = "<|user|>\n{instruction} {input} {preference}\n<|assistant|>\n";
/* tatsu-lab/stanford_alpaca's prompt without an input field; the parts share its instruction. */
static const char alpaca[] =
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction} {input} {preference}\n\n### Response:\n";

typedef struct text {
    char *data; /* NULL while only measuring */
    size_t length;
} text;

static void put(text *to, const char *from, size_t length) {
    if (to->data)
        memcpy(to->data + to->length, from, length);
    to->length += length;
}

/* A part that is empty takes the blank before it away, or at the start of a line the one after. */
static void fill(text *to, const char *template, const char *const *keys,
                 const char *const *values) {
    char last = '\n';
    for (const char *c = template; *c;) {
        int part = -1;
        for (int i = 0; i < 3 && part < 0; i++)
            if (!strncmp(c, keys[i], strlen(keys[i])))
                part = i;
        if (part < 0 && *c == ' ') { /* a blank stays only if something follows it on this line */
            const char *next = c + 1;
            for (int i = 0; i < 3; i++)
                if (!strncmp(next, keys[i], strlen(keys[i])) && !*values[i])
                    part = i;
            if (part >= 0) {
                c = next + strlen(keys[part]);
                continue;
            }
        }
        if (part < 0) {
            put(to, c, 1);
            last = *c++;
            continue;
        }
        c += strlen(keys[part]);
        put(to, values[part], strlen(values[part]));
        if (*values[part])
            last = 'x';
        else if (last == '\n' && *c == ' ')
            c++;
    }
}

psoup_status psoup_template_fill(const char *name, const char *instruction, const char *input,
                                 const char *preference, char **out, psoup_error *error) {
    static const char *const keys[] = {"{instruction}", "{input}", "{preference}"};
    const char *values[] = {instruction, input ? input : "", preference ? preference : ""};
    const char *template = name;
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
    text result = {NULL, 0};
    fill(&result, template, keys, values);
    size_t length = result.length;
    result = (text){malloc(length + 1), 0};
    if (!result.data)
        return psoup__out_of_memory(error, length + 1);
    fill(&result, template, keys, values);
    result.data[length] = 0;
    *out = result.data;
    return PSOUP_OK;
}
