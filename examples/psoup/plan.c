/* What a command will take of memory, by the library's measure of it. */
#include "plan.h"
#include "launch.h"
#include "room.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- sizes ----------------------------------------------------------------------------------------- */

/* "1.5 GiB" */
static const char *size_text(int64_t bytes, char text[24]) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double size = (double)bytes;
    int unit = 0;
    for (; size >= 1024 && unit < 4; unit++)
        size /= 1024;
    snprintf(text, 24, size < 10 && unit ? "%.1f %s" : "%.0f %s", size, units[unit]);
    return text;
}

bool plan_parse_size(const char *text, int64_t *bytes) {
    static const char units[] = "KMGT";
    char *end;
    double size = strtod(text, &end);
    const char *unit = *end ? strchr(units, *end) : NULL;
    for (const char *u = units; unit && u <= unit; u++)
        size *= 1024;
    *bytes = size >= 1 && size < 1e18 ? (int64_t)size : 0;
    return end != text && isfinite(size) && *bytes > 0 && (!*end || (unit && !end[1]));
}

/* ---- the plan -------------------------------------------------------------------------------------- */

typedef struct part {
    const char *name;
    int64_t bytes;
} part;
enum { BASE, ADAPTERS, LEARNING, ACTIVATIONS, LOGITS, CACHE, ROWS, PARTS };

static void parts_of(const psoup_memory *m, part parts[PARTS]) {
    const part all[PARTS] = {{"base", m->base},
                             {"adapters", m->adapters},
                             {"learning", m->learning},
                             {"activations", m->activations},
                             {"logits", m->logits},
                             {"cache", m->cache},
                             {"rows", m->rows}};
    memcpy(parts, all, sizeof all);
}

/* What each work is called, and the options that make its parts less. */
static const struct {
    const char *name, *need;
    const char *less[PARTS][3];
} works[] = {
    [PLAN_SFT] = {"training", "needs", {[ACTIVATIONS] = {"batch_tokens", "gradient_checkpointing"}}},
    [PLAN_REWARDS] = {"rewards", "need", {[ACTIVATIONS] = {"batch_size", "max_tokens", "gradient_checkpointing"}}},
    [PLAN_DPO] = {"policies", "need", {[ACTIVATIONS] = {"batch_size", "max_tokens", "gradient_checkpointing"}}},
    [PLAN_PPO] = {"policies", "need",
                  {[ACTIVATIONS] = {"micro_batch_tokens", "gradient_checkpointing"},
                   [CACHE] = {"max_sequences"},
                   [ROWS] = {"batch_size"}}},
    [PLAN_RESPONSES] = {"responses", "need", {[CACHE] = {"max_sequences"}}},
    [PLAN_ANSWERS] = {"answers", "need", {[CACHE] = {"batch"}, [ROWS] = {"max-new-tokens"}}},
};

static void print_text(FILE *out, const char *name, const psoup_model *model, const psoup_memory *m) {
    char size[24];
    part parts[PARTS];
    parts_of(m, parts);
    fprintf(out, "memory of %s: %s", name, size_text(m->host + m->device, size));
    if (m->device)
        fprintf(out, ", %s of it on the GPU", size_text(m->device, size));
    for (int i = 0; i < PARTS; i++)
        fprintf(out, "%s%s %s", i ? ", " : ": ", parts[i].name, size_text(parts[i].bytes, size));
    if (m->mapped)
        fprintf(out, "; %s of weights are read where they lie", size_text(m->mapped, size));
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    psoup_error error;
    if (psoup_model_get_config(model, &c, &error) == PSOUP_OK)
        fprintf(out, "; the base is %s%s%s", psoup_dtype_name((psoup_dtype)c.torch_dtype),
                c.linear_dtype ? ", its linears " : "",
                c.linear_dtype ? psoup_dtype_name((psoup_dtype)c.linear_dtype) : "");
    fputc('\n', out);
}

/* {"memory": "policies", "host": BYTES, "device": BYTES, "mapped": BYTES, "base": BYTES, …} */
static void print_json(const char *name, const psoup_memory *m) {
    psoup_json *row = psoup_json_new_object();
    part parts[PARTS];
    parts_of(m, parts);
    psoup_json_set(row, "memory", psoup_json_new_string(name));
    psoup_json_set(row, "host", psoup_json_new_integer(m->host));
    psoup_json_set(row, "device", psoup_json_new_integer(m->device));
    psoup_json_set(row, "mapped", psoup_json_new_integer(m->mapped));
    for (int i = 0; i < PARTS; i++)
        psoup_json_set(row, parts[i].name, psoup_json_new_integer(parts[i].bytes));
    cli_print_json(row);
}

/* What the most of it is, and what makes that less: "ppo.batch_size makes it less". */
static void advise(const char *prefix, plan_work work, const psoup_memory *m, char text[160]) {
    part parts[PARTS];
    int most = 0, n = 0;
    parts_of(m, parts);
    for (int i = 1; i < PARTS; i++)
        most = parts[i].bytes > parts[most].bytes ? i : most;
    const char *const *less = works[work].less[most];
    snprintf(text, 160, "most of it is %s", most == BASE ? "the model itself" : parts[most].name);
    for (size_t at = 0; n < 3 && less[n]; n++)
        at += (size_t)snprintf(text + at, 160 - at, "%s%s%s", n ? " and " : "", prefix, less[n]);
    if (n)
        strcat(text, n == 1 ? " makes it less" : " make it less");
}

static psoup_status check(const plan_options *o, const char *where, const char *prefix, plan_work work,
                          const psoup_memory *m, psoup_error *error) {
    bool device = m->device > 0, grouped = false;
    int64_t ranks = device ? 1 : launch_neighbours();
    int64_t all = device ? m->device : m->host, free_now = device ? m->device_free : room_for_program("", &grouped);
    int64_t limit = o->limit ? o->limit : free_now < 0 ? INT64_MAX : free_now + m->held;
    char need[24], have[24], size[24], parts_text[256] = "", advice[160], shared[48] = "";
    part parts[PARTS];
    if (all <= limit / ranks)
        return PSOUP_OK;
    parts_of(m, parts);
    for (int i = 0; i < PARTS; i++) {
        size_t at = strlen(parts_text);
        snprintf(parts_text + at, sizeof parts_text - at, "%s%s %s", i ? ", " : "", parts[i].name,
                 size_text(parts[i].bytes, size));
    }
    if (ranks > 1)
        snprintf(shared, sizeof shared, " for %lld ranks", (long long)ranks);
    advise(prefix, work, m, advice);
    return cli_error(error, PSOUP_ERROR_MEMORY, "%s: %s %s %s%s (%s), %s %s%s%s: %s", where, works[work].name,
                     works[work].need, size_text(all, need), device ? " on the GPU" : "", parts_text,
                     o->limit ? "--memory-limit is" : "there are", size_text(limit, have),
                     grouped && !o->limit ? " in its control group" : "", shared, advice);
}

psoup_status plan_work_fits(const plan_options *o, const char *where, const char *prefix, plan_work work,
                            const psoup_model *model, const psoup_memory *memory, psoup_error *error) {
    if (launch_rank() == 0 && o->only && o->json)
        print_json(works[work].name, memory);
    else if (launch_rank() == 0 && (o->only || (!o->json && work != PLAN_ANSWERS)))
        print_text(o->only ? stdout : stderr, works[work].name, model, memory);
    return check(o, where, prefix, work, memory, error);
}
