/* A small world on disk and in memory, made through the public interface: a model directory with its
 * tokenizer (base), two adapters (P1A, P2A), and an empty directory (out). */
#ifndef WORLD_CASE_H
#define WORLD_CASE_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "psoup/psoup.h"

static psoup_context *context;
static psoup_error error;
static char home[200]; /* this run's own directory */
#define OK(call) ck_assert_msg((call) == PSOUP_OK, "%s: %s", #call, error.message)

/* A path in it; of the last eight calls. */
__attribute__((unused)) static const char *at(const char *name) {
    static char paths[8][512];
    static int turn;
    char *path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", home, name);
    return path;
}

enum { HIDDEN = 8, LAYERS = 1, RANK = 2 };

static psoup_model *model;
static psoup_tokenizer *tokenizer;
static psoup_reward *reward;

__attribute__((unused)) static void open_context(int threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    OK(psoup_context_create(&options, &context, &error));
}

__attribute__((unused)) static void release(void) {
    psoup_reward_free(reward);
    psoup_model_free(model);
    psoup_tokenizer_free(tokenizer);
    psoup_context_free(context);
    context = NULL;
    reward = NULL;
    model = NULL;
    tokenizer = NULL;
}

/* An adapter on disk as training leaves it: B is not zero. */
__attribute__((unused)) static void make_adapter(const char *name, uint64_t seed) {
    static float data[HIDDEN * RANK];
    static char names[4][128];
    static const int64_t shapes[2][2] = {{RANK, HIDDEN}, {HIDDEN, RANK}};
    psoup_named_tensor tensors[4];
    char file[80];
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    options.rank = RANK;
    options.seed = seed;
    OK(psoup_model_add_adapter(model, name, &options, &error));
    OK(psoup_model_save_adapter(model, name, at(name), "base", &error));
    for (int i = 0; i < HIDDEN * RANK; i++)
        data[i] = (float)((i * 37 + (int)seed * 11) % 19 - 9) / 16.0f;
    for (int i = 0; i < 4; i++) {
        snprintf(names[i], sizeof names[i],
                 "base_model.model.model.layers.0.self_attn.%c_proj.lora_%c.weight", "qv"[i / 2],
                 "AB"[i % 2]);
        tensors[i] = (psoup_named_tensor){names[i], PSOUP_F32, 2, shapes[i % 2], data};
    }
    snprintf(file, sizeof file, "%s/adapter_model.safetensors", name);
    OK(psoup_safetensors_write(context, at(file), tensors, 4, &error));
}

__attribute__((unused)) static void make_world(void) {
    static const char *const texts[] = {"Hello hello help", "soup, soups and souper"};
    static const char *const special[] = {"</s>"};
    const char *place = getenv("TMPDIR");
    if (place == NULL) /* nothing is synced there, and everything is synced here */
        place = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : P_tmpdir;
    snprintf(home, sizeof home, "%s/psoup-world-XXXXXX", place);
    ck_assert_ptr_nonnull(mkdtemp(home));
    open_context(1);
    OK(psoup_tokenizer_train(context, texts, 2, 262, special, 1, NULL, &tokenizer, &error));
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.vocab_size = psoup_tokenizer_vocab_size(tokenizer);
    config.hidden_size = HIDDEN;
    config.intermediate_size = 2 * HIDDEN;
    config.num_hidden_layers = LAYERS;
    config.num_attention_heads = 2;
    config.max_position_embeddings = 512;
    config.eos_token_id = 256;
    OK(psoup_model_create(context, &config, 5, &model, &error));
    OK(psoup_model_save(model, at("base"), tokenizer, &error));
    make_adapter("P1A", 1);
    make_adapter("P2A", 2);
    release();
    mkdir(at("out"), 0777);
}

__attribute__((unused)) static void end_world(void) {
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", home);
    ck_assert_int_eq(system(command), 0);
}

__attribute__((unused)) static void load(void) {
    open_context(1);
    OK(psoup_model_load(context, at("base"), &model, &error));
    OK(psoup_model_load_adapter(model, "P1A", at("P1A"), &error));
    OK(psoup_model_load_adapter(model, "P2A", at("P2A"), &error));
    OK(psoup_tokenizer_load(context, at("base"), &tokenizer, &error));
}

__attribute__((unused)) static void load_reward(void) {
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    load();
    options.rank = RANK;
    OK(psoup_reward_create(model, "R", &options, &reward, &error));
}

__attribute__((unused)) static void bare(void) {
    open_context(1);
}

#endif
