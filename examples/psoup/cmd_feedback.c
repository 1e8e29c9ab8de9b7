/* psoup feedback: candidates, a judge, comparisons. */
#include "config.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct feedback_run {
    const char *model, *tokenizer, *device, *dtype, *prompts, *preferences, *output, *template, *mix;
    const psoup_json *adapters, *judge;
    int32_t new_preferences, threads, any_sum, mix_method;
    float strength, judge_patience;
    uint64_t seed;
} feedback_run;

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(feedback_run, member), NULL, help }
static const psoup_field feedback_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory of the generator; required."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_JSON, adapters, "{\"NAME\": \"DIR\", …}: adapters of the generator."),
    FIELD(PSOUP_FIELD_STRING, mix, "\"NAME=W,…\": their weights; null: the base."),
    {"mix_method", PSOUP_FIELD_ENUM, offsetof(feedback_run, mix_method), "delta|factors|logits",
     "What is weighed, as by psoup generate --mix-method."},
    FIELD(PSOUP_FIELD_FLOAT, strength, "Multiplies the weights, which sum to 1 before."),
    FIELD(PSOUP_FIELD_BOOL, any_sum, "Whether weights that do not sum to 1 are accepted."),
    FIELD(PSOUP_FIELD_STRING, prompts, "JSON Lines of instruction (or prompt), input; required."),
    FIELD(
        PSOUP_FIELD_JSON, judge,
        "[\"PROGRAM\", \"ARG\", …]: reads questions and writes verdicts as JSON Lines; required."),
    FIELD(PSOUP_FIELD_FLOAT, judge_patience, "Seconds the judge may be silent; 0 waits for ever."),
    FIELD(PSOUP_FIELD_STRING, preferences, "Catalogue file; null: the paper's."),
    FIELD(PSOUP_FIELD_BOOL, new_preferences, "With the paper's catalogue: P3C and P3D too."),
    FIELD(PSOUP_FIELD_STRING, output, "JSON Lines file of comparisons; required."),
    FIELD(PSOUP_FIELD_STRING, template, "tulu, alpaca, or a text with {instruction}."),
    FIELD(PSOUP_FIELD_UINT64, seed, "Of the sampling, and of which positive meets whom."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_STRING, dtype,
          "The base in f32, f16 or bf16, or its linears in blocks of int8 or nf4; null: as stored."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD

static psoup_status open_judge(psoup_context *context, const char *config_path,
                               const psoup_json *words, psoup_judge **out, psoup_error *error) {
    const char *argv[64] = {0};
    size_t n = psoup_json_size(words);
    if (psoup_json_kind(words) != PSOUP_JSON_ARRAY || n == 0 || n > 63)
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: judge: expected a list of 1 to 63 texts, the program and its "
                         "arguments",
                         config_path);
    for (size_t i = 0; i < n; i++)
        if (!(argv[i] = psoup_json_string(psoup_json_at(words, i), NULL)))
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: judge[%zu]: expected a text",
                             config_path, i);
    return psoup_judge_command(context, argv, out, error);
}

static psoup_status read_instructions(const feedback_run *run, const psoup_json *rows,
                                      psoup_instruction *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < psoup_json_size(rows); i++) {
        const psoup_json *row = psoup_json_at(rows, i);
        out[i].instruction = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
        if (!out[i].instruction)
            status = row_text(row, "instruction", run->prompts, i, &out[i].instruction, error);
        if (status == PSOUP_OK)
            status = row_option(row, "input", run->prompts, i, &out[i].input, error);
        out[i].id = psoup_json_integer(psoup_json_get(row, "id"), (int64_t)i);
    }
    return status;
}

static psoup_status load_adapters(const feedback_run *run, const char *config_path,
                                  psoup_model *model, psoup_error *error) {
    psoup_json_type kind = psoup_json_kind(run->adapters);
    psoup_status status = PSOUP_OK;
    const psoup_json *directory;
    const char *name = NULL;
    if (kind != PSOUP_JSON_NULL && kind != PSOUP_JSON_OBJECT)
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: adapters: expected an object {\"NAME\": \"DIR\", …}", config_path);
    while (status == PSOUP_OK && (directory = psoup_json_next(run->adapters, &name)))
        status = psoup_json_string(directory, NULL)
                     ? psoup_model_load_adapter(model, name, psoup_json_string(directory, ""),
                                                error)
                     : cli_error(error, PSOUP_ERROR_ARGUMENT,
                                 "%s: adapters: \"%s\" is no text, expected a directory",
                                 config_path, name);
    return status;
}

static psoup_status feedback(const feedback_run *run, const sampling_config *candidates, const config *c,
                             psoup_feedback_counts *counts, psoup_error *error) {
    cli_model m = {0};
    psoup_json *rows = NULL;
    psoup_instruction *instructions = NULL;
    psoup_preferences *preferences = NULL;
    psoup_judge *judge = NULL;
    float *mix = NULL;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    psoup_status status;
    if (!run->prompts || !run->output)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected \"prompts\" and \"output\"",
                         c->path);
    status = run_open(run->model, run->tokenizer, run->device, run->dtype, run->threads, &m, error);
    if (status == PSOUP_OK)
        status = load_adapters(run, c->path, m.model, error);
    if (status == PSOUP_OK)
        status = open_judge(m.context, c->path, run->judge, &judge, error);
    if (status == PSOUP_OK)
        status = psoup_judge_set_patience(judge, (double)run->judge_patience, error);
    if (status == PSOUP_OK)
        status =
            run->preferences
                ? psoup_preferences_load(m.context, run->preferences, &preferences, error)
                : psoup_preferences_default(m.context, run->new_preferences, &preferences, error);
    if (status == PSOUP_OK)
        status = read_rows(m.context, run->prompts, &rows, error);
    if (status == PSOUP_OK) {
        instructions = calloc(psoup_json_size(rows) + 1, sizeof *instructions);
        mix = calloc((size_t)psoup_model_adapters(m.model) + 1, sizeof *mix);
        status = instructions && mix ? read_instructions(run, rows, instructions, error)
                                     : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    if (status == PSOUP_OK)
        status = psoup_model_parse_mix(m.model, run->mix ? run->mix : "", run->any_sum, mix, error);
    if (status == PSOUP_OK)
        status = cli_strengthen(&m, NULL, run->strength, NULL, 0, mix, error);
    if (status == PSOUP_OK) {
        sampling_config_to(candidates, &sampling);
        options.sampling = &sampling;
        options.prompt_template = run->template;
        options.mix = mix;
        options.mix_method = run->mix_method;
        options.max_sequences = candidates->max_sequences;
        options.seed = run->seed;
        options.progress = c->json ? NULL : cli_progress;
        status = psoup_feedback(m.model, m.tokenizer, preferences, instructions,
                                psoup_json_size(rows), judge, &options, run->output, counts, error);
        size_t asked = psoup_json_size(rows) * psoup_preferences_count(preferences);
        if (status == PSOUP_OK && counts->unparsed == asked) { /* a judge that speaks otherwise */
            unlink(run->output);
            status = cli_misunderstood(psoup_json_string(psoup_json_at(run->judge, 0), ""), asked, error);
        }
    }
    psoup_judge_free(judge);
    psoup_preferences_free(preferences);
    psoup_json_free(rows);
    free(instructions);
    free(mix);
    cli_close(&m);
    return status;
}

int cmd_feedback(int argc, char **argv) {
    feedback_run run = {.strength = 1.0f, .judge_patience = 600};
    sampling_config candidates = {.max_new_tokens = 512, .temperature = 1.0f, .top_p = 1.0f};
    psoup_feedback_counts counts = {.size = sizeof counts};
    const config_section sections[] = {{"Members", feedback_fields, &run}, {"Candidates", sampling_fields, &candidates}};
    config c;
    int status;
    if (!config_read(
            argc, argv,
            "Usage: psoup feedback --config FILE.json\n\n"
            "For each prompt and preference: samples two positives, a neutral and a negative, asks "
            "the\njudge which positive is better, and writes four comparisons for psoup reward.\n\n"
            "The judge is any program that reads, line by line,\n"
            "  {\"id\": 7, \"prompt\": \"…\", \"preference\": \"P1A\", \"criterion\": \"…\", "
            "\"a\": \"…\", \"b\": \"…\"}\n"
            "and answers each with {\"id\": 7, \"verdict\": \"a\" | \"b\" | \"tie\"}, in any order, "
            "without\nwaiting for its input to end (flush every line).\n",
            sections, 2, &c, &status))
        return status;
    psoup_error error = {0};
    if (feedback(&run, &candidates, &c, &counts, &error) != PSOUP_OK)
        status = config_fail(&c, &error);
    else if (c.json) {
        psoup_json *row = psoup_json_new_object();
        psoup_json_set(row, "output", psoup_json_new_string(run.output));
        psoup_json_set(row, "written", psoup_json_new_integer((int64_t)counts.written));
        psoup_json_set(row, "ties", psoup_json_new_integer((int64_t)counts.ties));
        psoup_json_set(row, "unparsed", psoup_json_new_integer((int64_t)counts.unparsed));
        status = cli_print_json(row);
    } else {
        cli_progress_end();
        printf("%s: %zu comparisons, %zu ties and %zu unparsed answers between positives\n",
               run.output, counts.written, counts.ties, counts.unparsed);
        status = 0;
    }
    config_free(&c);
    return status;
}
