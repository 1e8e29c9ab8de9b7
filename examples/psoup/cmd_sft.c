/* psoup sft: supervised fine-tuning from a configuration file. */
#include "config.h"
#include "launch.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct sft_run {
    const char *model, *tokenizer, *device, *dtype, *data, *validation, *output, *adapter, *init, *template;
    int32_t threads;
    adapter_config lora;
    psoup_sft_options options;
} sft_run;

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(sft_run, member), NULL, help }
static const psoup_field sft_run_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory; required."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_STRING, data,
          "JSON Lines of prompt and completion, or of instruction, input and output; required."),
    FIELD(PSOUP_FIELD_STRING, validation, "The same, held out."),
    FIELD(PSOUP_FIELD_STRING, output, "Directory for the result; required."),
    FIELD(PSOUP_FIELD_STRING, adapter,
          "Name of the adapter to train; null trains the base itself."),
    FIELD(PSOUP_FIELD_STRING, init, "PEFT directory that the adapter starts from, with its rank, alpha and targets."),
    FIELD(PSOUP_FIELD_STRING, template, "tulu, alpaca, or a text with {instruction}."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_STRING, dtype,
          "The base in f32, f16 or bf16, or its linears in blocks of int8 or nf4; null: as stored."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD

static psoup_status read_examples(const sft_run *run, const cli_model *m, const char *path,
                                  psoup_json *rows, token_pool *pool, psoup_example **out,
                                  psoup_error *error) {
    size_t n = psoup_json_size(rows);
    psoup_status status = PSOUP_OK;
    *out = calloc(n + 1, sizeof **out);
    if (!*out)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        const psoup_json *row = psoup_json_at(rows, i);
        const char *prompt = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
        const char *completion = NULL, *input = NULL, *preference = NULL;
        char *filled = NULL;
        psoup_example *e = &(*out)[i];
        if (prompt)
            status = row_text(row, "completion", path, i, &completion, error);
        else {
            status = row_text(row, "instruction", path, i, &prompt, error);
            if (status == PSOUP_OK)
                status = row_text(row, "output", path, i, &completion, error);
            if (status == PSOUP_OK)
                status = row_option(row, "input", path, i, &input, error);
            if (status == PSOUP_OK)
                status = row_option(row, "preference", path, i, &preference, error);
            if (status == PSOUP_OK)
                status = psoup_template_fill(run->template, prompt, input, preference, &filled, error);
            prompt = filled;
        }
        if (status == PSOUP_OK)
            status = pool_encode_pair(pool, m->tokenizer, prompt, completion, run_end_token(m),
                                      &e->tokens, &e->n, &e->n_prompt, error);
        psoup_text_free(filled);
    }
    return status;
}

static bool same_directory(const char *a, const char *b) {
    struct stat one, other;
    return stat(a, &one) == 0 && stat(b, &other) == 0 && one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

static psoup_status sft(sft_run *run, const char *config_path, const plan_options *plan, psoup_error *error) {
    psoup_memory memory = {.size = sizeof memory};
    cli_model m = {0};
    token_pool pool = {0};
    psoup_json *rows[2] = {0};
    psoup_example *examples[2] = {0};
    psoup_status status = PSOUP_OK;
    if (!run->data || !run->output)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected \"data\" and \"output\"",
                           config_path);
    if (status == PSOUP_OK)
        status = adapter_config_finish(&run->lora, config_path, error);
    if (status == PSOUP_OK)
        status = run_open_ranks(run->model, run->tokenizer, run->device, run->dtype, run->threads, &m, error);
    if (status == PSOUP_OK)
        status = run_check_output(run->output, config_path, plan, error);
    if (status == PSOUP_OK && same_directory(run->output, run->model))
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: output \"%s\" is the model's own directory: expected another",
                           config_path, run->output);
    if (status == PSOUP_OK && run->init && !run->adapter)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: \"init\" needs an \"adapter\"",
                           config_path);
    if (status == PSOUP_OK && run->init)
        status = adapter_config_beside(&run->lora, m.context, run->init, config_path, error);
    if (status == PSOUP_OK && run->adapter)
        status = run->init
                     ? psoup_model_load_adapter(m.model, run->adapter, run->init, error)
                     : psoup_model_add_adapter(m.model, run->adapter, &run->lora.options, error);
    for (int k = 0; status == PSOUP_OK && k < 2; k++) {
        const char *path = k ? run->validation : run->data;
        status = read_rows(m.context, path, &rows[k], error);
        if (status == PSOUP_OK)
            status = read_examples(run, &m, path, rows[k], &pool, &examples[k], error);
    }
    run->options.comm = m.comm;
    if (status == PSOUP_OK)
        status = psoup_sft_memory(m.model, run->adapter, examples[0], psoup_json_size(rows[0]), examples[1],
                                  psoup_json_size(rows[1]), &run->options, &memory, error);
    if (status == PSOUP_OK)
        status = plan_work_fits(plan, config_path, "", PLAN_SFT, m.model, &memory, error);
    bool trains = status == PSOUP_OK && !plan->only;
    if (trains)
        status = psoup_sft(m.model, run->adapter, examples[0], psoup_json_size(rows[0]),
                           examples[1], psoup_json_size(rows[1]), &run->options, error);
    cli_progress_end();
    if (trains && status == PSOUP_OK && launch_rank() == 0)
        status = run->adapter ? psoup_model_save_adapter(m.model, run->adapter, run->output,
                                                         run->model, error)
                              : psoup_model_save(m.model, run->output, m.tokenizer, error);
    for (int k = 0; k < 2; k++) {
        psoup_json_free(rows[k]);
        free(examples[k]);
    }
    pool_free(&pool);
    status = launch_finish(m.comm, status, error);
    cli_close(&m);
    return status;
}

int cmd_sft(int argc, char **argv) {
    sft_run run = {.lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                   .options = PSOUP_SFT_OPTIONS_INIT};
    run_directory directory = {0};
    const config_section sections[] = {{"Files", sft_run_fields, &run},
                                       {"A directory of its own", run_dir_fields, &directory},
                                       {"A new adapter", adapter_fields, &run.lora},
                                       {"Training", psoup_sft_fields(), &run.options}};
    config c;
    int status;
    if (!config_read(
            argc, argv,
            "Usage: psoup sft --config FILE.json\n\nSupervised fine-tuning: the loss is on "
            "the completion's tokens, examples are packed\nwithout padding. Writes a PEFT "
            "directory, or with no \"adapter\" a whole model.\n" LAUNCH_HELP,
            sections, 4, &c, &status))
        return status;
    cli_training training = {.quiet = c.json};
    psoup_error error = {0};
    run.options.on_step = cli_training_step;
    run.options.user = &training;
    psoup_status done = run_directory_open(&directory, sections, 4, &c.plan, &training, &error);
    cli_training_begin(run.options.checkpoint_dir);
    if (done == PSOUP_OK)
        done = sft(&run, c.path, &c.plan, &error);
    status = done != PSOUP_OK ? config_fail(&c, &error)
             : c.plan.only    ? 0
                              : run_print_output(run.output, c.json);
    run_directory_close(&directory);
    config_free(&c);
    return status;
}
