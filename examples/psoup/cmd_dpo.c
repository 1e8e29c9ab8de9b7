/* psoup dpo: policies straight from comparisons. */
#include "config.h"
#include "launch.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_POLICIES = 64 };

typedef struct dpo_run {
    const char *model, *tokenizer, *device, *dtype, *data, *validation, *output, *name;
    int32_t per_preference, threads;
    float validation_fraction;
    adapter_config lora;
    psoup_dpo_options options;
} dpo_run;

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(dpo_run, member), NULL, help }
static const psoup_field dpo_run_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory; required. It is the reference too."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_STRING, data,
          "JSON Lines of user_input, completion_a (better), completion_b, preference; required."),
    FIELD(PSOUP_FIELD_STRING, validation, "The same, held out; null: a fraction of the data."),
    FIELD(PSOUP_FIELD_FLOAT, validation_fraction, "How much of the data is held out, by prompt."),
    FIELD(PSOUP_FIELD_STRING, output, "Directory; each policy goes to output/NAME; required."),
    FIELD(PSOUP_FIELD_BOOL, per_preference,
          "true: a policy for each \"preference\" of the rows, side by side; false: one for all."),
    FIELD(PSOUP_FIELD_STRING, name, "The one policy's name where per_preference is false."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_STRING, dtype,
          "The base in f32, f16 or bf16, or its linears in blocks of int8 or nf4; null: as stored."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD

/* The policies by name, made as the rows name them; the names are the rows'. */
typedef struct policy_set {
    const char *names[MAX_POLICIES];
    size_t n;
} policy_set;

static psoup_status policy_named(policy_set *set, const dpo_run *run, psoup_model *model,
                                 const char *name, int32_t *index, psoup_error *error) {
    for (size_t i = 0; i < set->n; i++)
        if (!strcmp(set->names[i], name))
            return *index = (int32_t)i, PSOUP_OK;
    if (set->n == MAX_POLICIES)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: more than %d preferences", run->data,
                         MAX_POLICIES);
    if (!*name || strchr(name, '/') || name[0] == '.')
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s: preference \"%s\" cannot name a directory",
                         run->data, name);
    *index = (int32_t)set->n;
    set->names[set->n++] = name;
    return psoup_model_add_adapter(model, name, &run->lora.options, error);
}

static psoup_status read_pairs(const dpo_run *run, const cli_model *m, const char *path,
                               const psoup_json *rows, policy_set *set, token_pool *pool,
                               psoup_dpo_pair *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < psoup_json_size(rows); i++) {
        const psoup_json *row = psoup_json_at(rows, i);
        const char *prompt, *better, *worse, *name = run->name;
        psoup_dpo_pair *pair = &out[i];
        size_t n = 0;
        int32_t end = run_end_token(m);
        status = row_text(row, "user_input", path, i, &prompt, error);
        if (status == PSOUP_OK)
            status = row_text(row, "completion_a", path, i, &better, error);
        if (status == PSOUP_OK)
            status = row_text(row, "completion_b", path, i, &worse, error);
        if (status == PSOUP_OK && run->per_preference)
            status = row_text(row, "preference", path, i, &name, error);
        if (status == PSOUP_OK)
            status = policy_named(set, run, m->model, name, &pair->policy, error);
        if (status == PSOUP_OK)
            status = pool_encode_pair(pool, m->tokenizer, prompt, worse, end, &pair->prompt, &n,
                                      &pair->n_prompt, error);
        if (status == PSOUP_OK) {
            pair->rejected = pair->prompt + pair->n_prompt;
            pair->n_rejected = n - pair->n_prompt;
            status = pool_encode_pair(pool, m->tokenizer, prompt, better, end, &pair->prompt, &n,
                                      &pair->n_prompt, error);
        }
        if (status == PSOUP_OK) {
            pair->chosen = pair->prompt + pair->n_prompt;
            pair->n_chosen = n - pair->n_prompt;
        }
    }
    return status;
}

static psoup_status dpo(dpo_run *run, const char *config_path, const plan_options *plan, psoup_error *error) {
    psoup_memory memory = {.size = sizeof memory};
    cli_model m = {0};
    token_pool pool = {0};
    policy_set set = {0};
    psoup_json *rows = NULL, *held = NULL;
    psoup_dpo_pair *all = NULL;
    psoup_status status = PSOUP_OK;
    size_t n = 0, n_held = 0;
    if (!run->data || !run->output)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected \"data\" and \"output\"",
                           config_path);
    if (status == PSOUP_OK && !(run->validation_fraction >= 0 && run->validation_fraction < 1))
        status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                           "%s: validation_fraction is %g, expected 0 to under 1", config_path,
                           run->validation_fraction);
    if (status == PSOUP_OK)
        status = adapter_config_finish(&run->lora, config_path, error);
    if (status == PSOUP_OK)
        status = run_open_ranks(run->model, run->tokenizer, run->device, run->dtype, run->threads, &m, error);
    if (status == PSOUP_OK)
        status = run_check_output(run->output, config_path, plan, error);
    if (status == PSOUP_OK)
        status = read_rows(m.context, run->data, &rows, error);
    if (status == PSOUP_OK)
        status = read_rows(m.context, run->validation, &held, error);
    if (status == PSOUP_OK) {
        n = psoup_json_size(rows);
        n_held = psoup_json_size(held);
        all = calloc(n + n_held + 1, sizeof *all);
        if (!all)
            status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    if (status == PSOUP_OK)
        status = read_pairs(run, &m, run->data, rows, &set, &pool, all, error);
    if (status == PSOUP_OK)
        status = read_pairs(run, &m, run->validation, held, &set, &pool, all + n, error);
    if (status == PSOUP_OK && !run->validation) {
        status = hold_out(rows, run->validation_fraction, all, sizeof *all, &n, error);
        n_held = psoup_json_size(rows) - n;
    }
    run->options.comm = m.comm;
    if (status == PSOUP_OK)
        status = psoup_dpo_memory(m.model, set.names, set.n, all, n, all + n, n_held, &run->options, &memory, error);
    if (status == PSOUP_OK)
        status = plan_work_fits(plan, config_path, "", PLAN_DPO, m.model, &memory, error);
    bool trains = status == PSOUP_OK && !plan->only;
    if (trains)
        status = psoup_dpo(m.model, set.names, set.n, all, n, all + n, n_held, &run->options, error);
    cli_progress_end();
    for (size_t i = 0; trains && status == PSOUP_OK && launch_rank() == 0 && i < set.n; i++) {
        char *path = join(run->output, set.names[i]);
        status = path ? psoup_model_save_adapter(m.model, set.names[i], path, run->model, error)
                      : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        free(path);
    }
    psoup_json_free(rows);
    psoup_json_free(held);
    free(all);
    pool_free(&pool);
    status = launch_finish(m.comm, status, error);
    cli_close(&m);
    return status;
}

int cmd_dpo(int argc, char **argv) {
    dpo_run run = {.name = "dpo",
                   .per_preference = 1,
                   .validation_fraction = 0.1f,
                   .lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                   .options = PSOUP_DPO_OPTIONS_INIT};
    run_directory directory = {0};
    const config_section sections[] = {{"Files", dpo_run_fields, &run},
                                       {"A directory of its own", run_dir_fields, &directory},
                                       {"New adapters", adapter_fields, &run.lora},
                                       {"Training", psoup_dpo_fields(), &run.options}};
    config c;
    int status;
    if (!config_read(
            argc, argv,
            "Usage: psoup dpo --config FILE.json\n\nDirect preference optimisation: policies from "
            "comparisons, with no reward model and no\nsampling; one per preference, side by side "
            "on one base, which is their reference. Writes\nPEFT directories.\n" LAUNCH_HELP,
            sections, 4, &c, &status))
        return status;
    cli_training training = {.quiet = c.json};
    psoup_error error = {0};
    run.options.on_step = cli_training_step;
    run.options.user = &training;
    psoup_status done = run_directory_open(&directory, sections, 4, &c.plan, &training, &error);
    cli_training_begin(run.options.checkpoint_dir);
    if (done == PSOUP_OK)
        done = dpo(&run, c.path, &c.plan, &error);
    status = done != PSOUP_OK ? config_fail(&c, &error)
             : c.plan.only    ? 0
                              : run_print_output(run.output, c.json);
    run_directory_close(&directory);
    config_free(&c);
    return status;
}
