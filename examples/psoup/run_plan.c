/* psoup run: what its stages will take of memory, said before any begins, and refused where there is less. */
#include "run.h"

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

bool run_parse_size(const char *text, int64_t *bytes) {
    static const char units[] = "KMGT";
    char *end;
    double size = strtod(text, &end);
    const char *unit = *end ? strchr(units, *end) : NULL;
    for (const char *u = units; unit && u <= unit; u++)
        size *= 1024;
    *bytes = size >= 1 && size < 1e18 ? (int64_t)size : 0;
    return end != text && isfinite(size) && *bytes > 0 && (!*end || (unit && !end[1]));
}

/* What the system could give a program now; −1 where it does not say. */
static int64_t available(void) {
    char line[128];
    long long kib = -1;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %lld kB", &kib) == 1)
            break;
    if (file)
        fclose(file);
    return kib < 0 ? -1 : (int64_t)kib * 1024;
}

/* ---- the plan -------------------------------------------------------------------------------------- */

typedef struct part {
    const char *name;
    int64_t bytes;
} part;
enum { PARTS = 7 };

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

static void print_stage(const run *r, FILE *out, const char *stage, const psoup_memory *m) {
    char size[24];
    part parts[PARTS];
    parts_of(m, parts);
    if (r->quiet && out == stderr)
        return;
    fprintf(out, "memory of %s: %s", stage, size_text(m->host + m->device, size));
    if (m->device)
        fprintf(out, ", %s of it on the GPU", size_text(m->device, size));
    for (int i = 0; i < PARTS; i++)
        fprintf(out, "%s%s %s", i ? ", " : ": ", parts[i].name, size_text(parts[i].bytes, size));
    if (m->mapped)
        fprintf(out, "; %s of weights are read where they lie", size_text(m->mapped, size));
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    psoup_error error;
    if (psoup_model_get_config(r->m.model, &c, &error) == PSOUP_OK)
        fprintf(out, "; the base is %s%s%s", psoup_dtype_name((psoup_dtype)c.torch_dtype),
                c.linear_dtype ? ", its linears " : "",
                c.linear_dtype ? psoup_dtype_name((psoup_dtype)c.linear_dtype) : "");
    fputc('\n', out);
}

/* What is the most of it, and what makes it less. */
static const char *advice(const run *r, const char *stage, const psoup_memory *m) {
    part parts[PARTS];
    int most = 0;
    parts_of(m, parts);
    for (int i = 1; i < PARTS; i++)
        most = parts[i].bytes > parts[most].bytes ? i : most;
    if (!strcmp(parts[most].name, "cache"))
        return !strcmp(stage, "responses") ? "generate.max_sequences makes it less" : "ppo.max_sequences makes it less";
    if (!strcmp(parts[most].name, "activations") && !strcmp(stage, "policies"))
        return r->method->supervised ? "sft.batch_tokens and sft.gradient_checkpointing make it less"
                                     : "ppo.micro_batch_tokens and ppo.gradient_checkpointing make it less";
    if (!strcmp(parts[most].name, "activations") && !strcmp(stage, "rewards"))
        return "reward.batch_size and reward.max_tokens make it less";
    if (!strcmp(parts[most].name, "rows") && !strcmp(stage, "policies"))
        return "ppo.batch_size makes it less";
    return "most of it is the model itself";
}

static psoup_status check_stage(const run *r, const char *stage, const psoup_memory *m, psoup_error *error) {
    bool device = m->device > 0;
    int64_t all = device ? m->device : m->host, free_now = device ? m->device_free : available();
    int64_t limit = r->memory_limit ? r->memory_limit : free_now < 0 ? INT64_MAX : free_now + m->held;
    char need[24], have[24], sizes[PARTS][24];
    part p[PARTS];
    if (all <= limit)
        return PSOUP_OK;
    parts_of(m, p);
    for (int i = 0; i < PARTS; i++)
        size_text(p[i].bytes, sizes[i]);
    return cli_error(error, PSOUP_ERROR_MEMORY,
                     "%s: %s need %s%s (%s %s, %s %s, %s %s, %s %s, %s %s, %s %s, %s %s), %s %s: %s", r->config_path,
                     stage, size_text(all, need), device ? " on the GPU" : "", p[0].name, sizes[0], p[1].name, sizes[1],
                     p[2].name, sizes[2], p[3].name, sizes[3], p[4].name, sizes[4], p[5].name, sizes[5], p[6].name,
                     sizes[6], r->memory_limit ? "--memory-limit is" : "there are", size_text(limit, have),
                     advice(r, stage, m));
}

psoup_status run_plan_stage(run *r, const char *stage, psoup_error *error) {
    const run_config *c = &r->c;
    psoup_memory m = {.size = sizeof m};
    psoup_status status;
    if (!strcmp(stage, "rewards"))
        status = psoup_reward_memory(r->handles, r->n_rewards, r->comparisons, r->n_comparisons,
                                     r->comparisons + r->n_comparisons, r->n_comparisons_held, &c->reward, &m, error);
    else if (!strcmp(stage, "responses"))
        status = run_responses_memory(r, &m, error);
    else if (r->method->supervised)
        status = psoup_sft_memory(r->m.model, r->policies[0].name, r->examples, r->n_examples,
                                  r->examples + r->n_examples, r->n_examples_held, &c->sft, &m, error);
    else
        status = run_policies_memory(r, &m, error);
    if (status != PSOUP_OK)
        return status;
    print_stage(r, r->plan_only ? stdout : stderr, stage, &m);
    return check_stage(r, stage, &m, error);
}
