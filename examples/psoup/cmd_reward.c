/* psoup reward: reward models from comparisons. */
#include "config.h"
#include "launch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_REWARDS = 64 };

typedef struct reward_run {
    const char *model, *tokenizer, *device, *dtype, *data, *validation, *output, *name;
    int32_t per_preference, threads;
    float validation_fraction;
    adapter_config lora;
    psoup_reward_options options;
} reward_run;

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(reward_run, member), NULL, help }
static const psoup_field reward_run_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory; required."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_STRING, data,
          "JSON Lines of user_input, completion_a (better), completion_b, preference, and margin where the pair "
          "has one; required."),
    FIELD(PSOUP_FIELD_STRING, validation, "The same, held out; null: a fraction of the data."),
    FIELD(PSOUP_FIELD_FLOAT, validation_fraction, "How much of the data is held out, by prompt."),
    FIELD(PSOUP_FIELD_STRING, output, "Directory; each model goes to output/NAME; required."),
    FIELD(PSOUP_FIELD_BOOL, per_preference,
          "true: a model for each \"preference\" of the rows, side by side; false: one for all."),
    FIELD(PSOUP_FIELD_STRING, name, "The one model's name where per_preference is false."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_STRING, dtype,
          "The base in f32, f16 or bf16, or its linears in blocks of int8 or nf4; null: as stored."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD

/* The reward models by name, made as the rows name them. */
typedef struct reward_set {
    psoup_reward *items[MAX_REWARDS];
    size_t n;
} reward_set;

static psoup_status reward_named(reward_set *set, const reward_run *run, psoup_model *model,
                                 const char *name, int32_t *index, psoup_error *error) {
    for (size_t i = 0; i < set->n; i++)
        if (!strcmp(psoup_reward_name(set->items[i]), name))
            return *index = (int32_t)i, PSOUP_OK;
    if (set->n == MAX_REWARDS)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: more than %d preferences", run->data,
                         MAX_REWARDS);
    if (!*name || strchr(name, '/') || name[0] == '.')
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s: preference \"%s\" cannot name a directory",
                         run->data, name);
    *index = (int32_t)set->n;
    return psoup_reward_create(model, name, &run->lora.options, &set->items[set->n++], error);
}

static psoup_status row_margin(const psoup_json *row, const char *path, size_t i, float *out,
                               psoup_error *error) {
    const psoup_json *margin = psoup_json_get(row, "margin");
    double value = psoup_json_real(margin, margin ? NAN : 0.0);
    if (!isfinite((float)value))
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s: row %zu: margin: expected a number", path, i + 1);
    *out = (float)value;
    return PSOUP_OK;
}

static psoup_status read_comparisons(const reward_run *run, const cli_model *m, const char *path,
                                     const psoup_json *rows, reward_set *set, token_pool *pool,
                                     psoup_comparison *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < psoup_json_size(rows); i++) {
        const psoup_json *row = psoup_json_at(rows, i);
        const char *prompt, *better, *worse, *name = run->name;
        size_t n_prompt;
        psoup_comparison *c = &out[i];
        int32_t end = run_end_token(m);
        status = row_text(row, "user_input", path, i, &prompt, error);
        if (status == PSOUP_OK)
            status = row_text(row, "completion_a", path, i, &better, error);
        if (status == PSOUP_OK)
            status = row_text(row, "completion_b", path, i, &worse, error);
        if (status == PSOUP_OK && run->per_preference)
            status = row_text(row, "preference", path, i, &name, error);
        if (status == PSOUP_OK)
            status = reward_named(set, run, m->model, name, &c->reward, error);
        if (status == PSOUP_OK)
            status = pool_encode_pair(pool, m->tokenizer, prompt, better, end, &c->chosen,
                                      &c->n_chosen, &n_prompt, error);
        if (status == PSOUP_OK)
            status = pool_encode_pair(pool, m->tokenizer, prompt, worse, end, &c->rejected,
                                      &c->n_rejected, &n_prompt, error);
        if (status == PSOUP_OK)
            status = row_margin(row, path, i, &c->margin, error);
    }
    return status;
}

/* How the trained models do on what was held out. */
typedef struct reward_result {
    size_t held_out;
    double accuracy, loss;
} reward_result;

static psoup_status reward(reward_run *run, const char *config_path, const plan_options *plan, reward_result *result,
                           psoup_error *error) {
    psoup_memory memory = {.size = sizeof memory};
    cli_model m = {0};
    token_pool pool = {0};
    reward_set set = {0};
    psoup_json *rows = NULL, *held = NULL;
    psoup_comparison *all = NULL;
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
        status = read_comparisons(run, &m, run->data, rows, &set, &pool, all, error);
    if (status == PSOUP_OK)
        status = read_comparisons(run, &m, run->validation, held, &set, &pool, all + n, error);
    if (status == PSOUP_OK && !run->validation) {
        status = hold_out(rows, run->validation_fraction, all, sizeof *all, &n, error);
        n_held = psoup_json_size(rows) - n;
    }
    run->options.comm = m.comm;
    if (status == PSOUP_OK)
        status = psoup_reward_memory(set.items, set.n, all, n, all + n, n_held, &run->options, &memory, error);
    if (status == PSOUP_OK)
        status = plan_work_fits(plan, config_path, "", PLAN_REWARDS, m.model, &memory, error);
    bool trains = status == PSOUP_OK && !plan->only;
    if (trains)
        status =
            psoup_reward_train(set.items, set.n, all, n, all + n, n_held, &run->options, error);
    cli_progress_end();
    for (size_t i = 0; trains && status == PSOUP_OK && launch_rank() == 0 && i < set.n; i++) {
        char *path = join(run->output, psoup_reward_name(set.items[i]));
        status = path ? psoup_reward_save(set.items[i], path, run->model, error)
                      : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        free(path);
    }
    result->held_out = n_held;
    if (trains && status == PSOUP_OK && launch_rank() == 0 && n_held > 0)
        status = psoup_reward_accuracy(set.items, set.n, all + n, n_held, &result->accuracy,
                                       &result->loss, error);
    for (size_t i = 0; i < set.n; i++)
        psoup_reward_free(set.items[i]);
    psoup_json_free(rows);
    psoup_json_free(held);
    free(all);
    pool_free(&pool);
    status = launch_finish(m.comm, status, error);
    cli_close(&m);
    return status;
}

static int print_result(const char *output, const reward_result *result, bool json) {
    if (launch_rank() > 0)
        return 0;
    if (!json) {
        if (result->held_out)
            printf("accuracy %.4f, loss %.4f on %zu held-out comparisons\n", result->accuracy,
                   result->loss, result->held_out);
        return run_print_output(output, false);
    }
    psoup_json *row = psoup_json_new_object();
    psoup_json_set(row, "output", psoup_json_new_string(output));
    psoup_json_set(row, "held_out", psoup_json_new_integer((int64_t)result->held_out));
    if (result->held_out) {
        psoup_json_set(row, "accuracy", psoup_json_new_real(result->accuracy));
        psoup_json_set(row, "loss", psoup_json_new_real(result->loss));
    }
    return cli_print_json(row);
}

int cmd_reward(int argc, char **argv) {
    reward_run run = {.name = "reward",
                      .per_preference = 1,
                      .validation_fraction = 0.1f,
                      .lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                      .options = PSOUP_REWARD_OPTIONS_INIT};
    run.lora.options.rank = 8; /* the paper's reward models */
    run.options.margins = 1;   /* of rows that have one */
    run_directory directory = {0};
    const config_section sections[] = {{"Files", reward_run_fields, &run},
                                       {"A directory of its own", run_dir_fields, &directory},
                                       {"New adapters", adapter_fields, &run.lora},
                                       {"Training", psoup_reward_fields(), &run.options}};
    config c;
    int status;
    if (!config_read(
            argc, argv,
            "Usage: psoup reward --config FILE.json\n\nBradley-Terry reward models from "
            "comparisons: one per preference, trained side by side\non one base, or one for "
            "all, told by the preference prompt in its input. Writes PEFT\ndirectories of "
            "task type SEQ_CLS.\n" LAUNCH_HELP,
            sections, 4, &c, &status))
        return status;
    cli_training training = {.quiet = c.json};
    psoup_error error = {0};
    reward_result result = {0};
    run.options.on_step = cli_training_step;
    run.options.user = &training;
    psoup_status done = run_directory_open(&directory, sections, 4, &c.plan, &training, &error);
    cli_training_begin(run.options.checkpoint_dir);
    if (done == PSOUP_OK)
        done = reward(&run, c.path, &c.plan, &result, &error);
    status = done != PSOUP_OK ? config_fail(&c, &error)
             : c.plan.only    ? 0
                              : print_result(run.output, &result, c.json);
    run_directory_close(&directory);
    config_free(&c);
    return status;
}
