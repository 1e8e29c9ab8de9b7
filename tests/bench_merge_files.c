/* Merging from file to file beside mergekit and cat, and new weights for an open merger. Peers and limits take turns
 * with ours in the same run; every figure is the best of a few.
 *
 *   bench_merge_files [PYTHON SCRIPT [MILLIONS [PARTS]]]   e.g. bench_merge_files python3 tests/bench_merge.py 250 open
 *
 * MILLIONS of parameters (250): the files take 8 bytes each on disk under $TMPDIR and again in /dev/shm. PARTS are of
 * files, open (which takes 0.3 GB of /dev/shm); all of them. Run it on a machine that does nothing else. */
#include "bench_peer.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

static char directory[400];

/* ---- from file to file ------------------------------------------------------------------------------- */

__attribute__((format(printf, 1, 2))) static void shell(const char *format, ...) {
    char command[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    if (system(command) != 0) {
        fprintf(stderr, "bench_merge_files: failed: %s\n", command);
        exit(1);
    }
}

/* A LLaMA of so many layers in bf16, as a directory. */
static double write_model(psoup_context *context, const char *name, int layers, int value) {
    static char names[22 * LINEARS + 64][80];
    psoup_named_tensor tensors[22 * LINEARS + 64];
    static const int64_t table[2] = {VOCAB, HIDDEN}, vector[1] = {HIDDEN};
    int64_t shapes[LINEARS][2];
    size_t n = 0, bytes = 0;
    char path[600];
    psoup_error error;
    char *data = buffer((size_t)VOCAB * HIDDEN * 2, value);
    for (size_t i = 0; i < (size_t)VOCAB * HIDDEN; i++)
        data[2 * i] = (char)(i * 2654435761u >> 9);
    for (int l = 0; l < layers; l++) {
        for (int k = 0; k < LINEARS; k++, n++) {
            shapes[k][0] = linears[k].rows;
            shapes[k][1] = linears[k].columns;
            snprintf(names[n], sizeof *names, "model.layers.%d.%s.weight", l, linears[k].name);
            tensors[n] = (psoup_named_tensor){names[n], PSOUP_BF16, 2, shapes[k], data};
            bytes += (size_t)(linears[k].rows * linears[k].columns) * 2;
        }
        for (int k = 0; k < 2; k++, n++) {
            snprintf(names[n], sizeof *names, "model.layers.%d.%s.weight", l,
                     k == 0 ? "input_layernorm" : "post_attention_layernorm");
            tensors[n] = (psoup_named_tensor){names[n], PSOUP_BF16, 1, vector, data};
        }
    }
    tensors[n++] = (psoup_named_tensor){"model.norm.weight", PSOUP_BF16, 1, vector, data};
    tensors[n++] = (psoup_named_tensor){"model.embed_tokens.weight", PSOUP_BF16, 2, table, data};
    tensors[n++] = (psoup_named_tensor){"lm_head.weight", PSOUP_BF16, 2, table, data};
    bytes += 2 * (size_t)VOCAB * HIDDEN * 2;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/config.json", directory, name);
    FILE *config = fopen(path, "w");
    fprintf(config,
            "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": %d, "
            "\"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": 32, "
            "\"num_key_value_heads\": 4, \"vocab_size\": %d, \"rms_norm_eps\": 1e-05, \"hidden_act\": \"silu\", "
            "\"max_position_embeddings\": 2048, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}\n",
            HIDDEN, FFN, layers, VOCAB);
    fclose(config);
    snprintf(path, sizeof path, "%s/%s/model.safetensors", directory, name);
    must(psoup_safetensors_write(context, path, tensors, n, &error), &error);
    free(data);
    return (double)bytes;
}

/* The sources out of the page cache. */
static void make_cold(void) {
    for (const char *name = "abc"; *name; name++) {
        char path[600];
        snprintf(path, sizeof path, "%s/%c/model.safetensors", directory, *name);
        int fd = open(path, O_RDONLY);
        if (fd >= 0) {
            fsync(fd);
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            close(fd);
        }
    }
}

typedef struct cost {
    double wall, cpu, mib; /* mib: the most RssAnon */
} cost;

static void keep(cost *best, cost one) {
    if (best->wall == 0 || one.wall < best->wall)
        *best = one;
}

/* Runs in a child and watches it. */
static cost watch(void (*work)(void)) {
    char path[64], line[128];
    int status = 0;
    struct rusage usage;
    cost spent = {0};
    fflush(stdout);
    double start = now();
    pid_t child = fork();
    if (child == 0) {
        work();
        _exit(0);
    }
    snprintf(path, sizeof path, "/proc/%d/status", (int)child);
    while (wait4(child, &status, WNOHANG, &usage) == 0) {
        FILE *file = fopen(path, "r");
        while (file != NULL && fgets(line, sizeof line, file) != NULL)
            if (strncmp(line, "RssAnon:", 8) == 0 && strtod(line + 8, NULL) / 1024 > spent.mib)
                spent.mib = strtod(line + 8, NULL) / 1024;
        if (file != NULL)
            fclose(file);
        usleep(2000);
    }
    spent.wall = now() - start;
    spent.cpu = (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
                1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
    if (status != 0) {
        fprintf(stderr, "bench_merge_files: a child failed\n");
        exit(1);
    }
    return spent;
}

static void merge_ours(void) {
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_context *context;
    psoup_merger *merger;
    psoup_error error;
    char path[600];
    settings.threads = THREADS;
    options.method = PSOUP_MERGE_LINEAR;
    options.normalize = 0;
    must(psoup_context_create(&settings, &context, &error), &error);
    must(psoup_merger_create(context, &options, &merger, &error), &error);
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%c", directory, 'a' + i);
        must(psoup_merger_add(merger, path, i == 0 ? 0.6 : i == 1 ? 0.3 : 0.1, &error), &error);
    }
    snprintf(path, sizeof path, "%s/ours", directory);
    must(psoup_merger_write(merger, path, &error), &error);
    psoup_merger_free(merger);
    psoup_context_free(context);
}

/* The same bytes in and out. */
static void cat(void) {
    shell("cat %s/b/model.safetensors %s/c/model.safetensors > /dev/null && "
          "cat %s/a/model.safetensors > %s/cat", directory, directory, directory, directory);
}

static void cat_synced(void) {
    char path[600];
    cat();
    snprintf(path, sizeof path, "%s/cat", directory);
    int fd = open(path, O_RDWR);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

static void tell(const char *what, cost c, const char *more) {
    printf("  %-34s %9.3f s   CPU %6.3f s   RssAnon %5.0f MiB   %s\n", what, c.wall, c.cpu, c.mib, more);
}

/* In one place; `on_disk`: cold too, and what is written is synced. */
static void bench_files(psoup_context *context, const char *parent, int layers, bool on_disk) {
    cost ours = {0}, limits = {0}, cold = {0}, cold_limit = {0}, theirs = {0};
    char question[900], more[160];
    snprintf(directory, sizeof directory, "%s/psoup-bench-XXXXXX", parent);
    if (mkdtemp(directory) == NULL) {
        printf("\nfile to file in %s: cannot write there\n", parent);
        return;
    }
    double bytes = 0;
    for (int i = 0; i < 3; i++) {
        const char name[2] = {(char)('a' + i), 0};
        bytes = write_model(context, name, layers, 0x3c);
    }
    for (int turn = 0; turn < 4; turn++) {
        shell("rm -rf %s/ours %s/cat", directory, directory);
        keep(&limits, watch(on_disk ? cat_synced : cat));
        shell("rm -rf %s/ours %s/cat", directory, directory);
        keep(&ours, watch(merge_ours));
    }
    for (int turn = 0; turn < 2 && on_disk; turn++) {
        shell("rm -rf %s/ours %s/cat", directory, directory);
        make_cold();
        keep(&cold_limit, watch(cat_synced));
        shell("rm -rf %s/ours %s/cat", directory, directory);
        make_cold();
        keep(&cold, watch(merge_ours));
    }
    snprintf(question, sizeof question, "%s/recipe.yaml", directory);
    FILE *recipe = fopen(question, "w");
    fprintf(recipe, "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\nparameters: {normalize: false}\nmodels:\n");
    for (int i = 0; i < 3; i++)
        fprintf(recipe, "  - {model: %s/%c, parameters: {weight: %s}}\n", directory, 'a' + i,
                i == 0 ? "0.6" : i == 1 ? "0.3" : "0.1");
    fclose(recipe);
    snprintf(question, sizeof question, "merge %s/recipe.yaml %s/theirs", directory, directory);
    const char *answer = ask(question);
    bool there = sscanf(answer, "%lf %lf %lf", &theirs.wall, &theirs.cpu, &theirs.mib) == 3;
    printf("\nfile to file, 3 × %.2f GB of bf16 → %.2f GB, linear, in %s%s\n", bytes / 1e9, bytes / 1e9, parent,
           on_disk ? ": on disk, results synced" : ": in memory, nothing to sync");
    snprintf(more, sizeof more, "%.2f GB/s in and out; %.2f of cat (goal 0.7)", 4 * bytes / ours.wall / 1e9,
             limits.wall / ours.wall);
    tell(on_disk ? "ours, warm, with its sync" : "ours, warm", ours, more);
    tell(on_disk ? "limit: cat of the bytes, synced" : "limit: cat of the bytes", limits, "");
    if (there) {
        snprintf(more, sizeof more, "ours is %.1f times as fast (goal 3)", theirs.wall / ours.wall);
        tell(on_disk ? "mergekit, warm, not synced" : "mergekit, warm", theirs, more);
    } else {
        printf("  mergekit: %s\n", answer);
    }
    if (on_disk) {
        snprintf(more, sizeof more, "%.2f of cat", cold_limit.wall / cold.wall);
        tell("ours, cold, with its sync", cold, more);
        tell("limit: cat, cold, synced", cold_limit, "");
    }
    shell("rm -rf %s", directory);
}

/* ---- an open merger -------------------------------------------------------------------------------------- */

enum { SOUP = 8, MODULES = 64, DIM = 4096 };

/* r = 16 on q and v of 32 layers, as PEFT writes it. */
static void write_adapter(psoup_context *context, const char *name) {
    static char names[2 * MODULES][120];
    psoup_named_tensor tensors[2 * MODULES];
    static const int64_t a[2] = {RANK, DIM}, b[2] = {DIM, RANK};
    float *data = buffer((size_t)DIM * RANK * sizeof *data, 0);
    char path[1100];
    psoup_error error;
    for (size_t i = 0; i < (size_t)DIM * RANK; i++)
        data[i] = (float)(int32_t)((uint32_t)i * 2654435761u) * 0x1p-37f;
    for (int i = 0; i < 2 * MODULES; i++) {
        snprintf(names[i], sizeof *names, "base_model.model.model.layers.%d.self_attn.%c_proj.lora_%c.weight", i / 4,
                 "qv"[i / 2 % 2], "AB"[i % 2]);
        tensors[i] = (psoup_named_tensor){names[i], PSOUP_F32, 2, i % 2 == 0 ? a : b, data};
    }
    snprintf(path, sizeof path, "%s/%s", directory, name);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/adapter_config.json", directory, name);
    FILE *config = fopen(path, "w");
    fprintf(config, "{\"peft_type\": \"LORA\", \"task_type\": \"CAUSAL_LM\", \"r\": %d, \"lora_alpha\": %d, "
                    "\"target_modules\": [\"q_proj\", \"v_proj\"]}\n", RANK, 2 * RANK);
    fclose(config);
    snprintf(path, sizeof path, "%s/%s/adapter_model.safetensors", directory, name);
    must(psoup_safetensors_write(context, path, tensors, 2 * MODULES, &error), &error);
    free(data);
}

static int take_bytes(void *user, uint64_t offset, const void *data, size_t bytes) {
    (void)offset, (void)data;
    *(size_t *)user += bytes;
    return 0;
}

/* New weights and a run, with what was read kept and without, in turn. */
static void bench_open(psoup_context *context, const char *parent) {
    static const int64_t bounds[2] = {0, -1};
    psoup_merger *mergers[2];
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    size_t made = 0;
    double weights[SOUP], first[2] = {0}, later[2] = {0};
    char path[600];
    psoup_error error;
    snprintf(directory, sizeof directory, "%s/psoup-bench-XXXXXX", parent);
    if (mkdtemp(directory) == NULL)
        return;
    sink.user = &made;
    sink.write = take_bytes;
    for (int i = 0; i < SOUP; i++) {
        snprintf(path, sizeof path, "a%d", i);
        write_adapter(context, path);
    }
    for (int k = 0; k < 2; k++) {
        options.keep_bytes = bounds[k];
        must(psoup_merger_create(context, &options, &mergers[k], &error), &error);
        for (int i = 0; i < SOUP; i++) {
            snprintf(path, sizeof path, "%s/a%d", directory, i);
            must(psoup_merger_add(mergers[k], path, 1.0 / SOUP, &error), &error);
        }
    }
    for (int turn = 0; turn < 9; turn++)
        for (int k = 0; k < 2; k++) {
            for (int i = 0; i < SOUP; i++)
                weights[i] = i == turn % SOUP ? 0.3 : 0.1;
            must(psoup_merger_set_weights(mergers[k], weights, SOUP, &error), &error);
            double start = now();
            must(psoup_merger_run(mergers[k], &sink, &error), &error);
            least(turn == 0 ? &first[k] : &later[k], now() - start);
        }
    printf("\nnew weights for an open merger: 8 adapters, r = 16, q and v of 7B, f32, %.0f MB of results into a sink\n",
           (double)made / 18 / 1e6);
    printf("  %-34s %9.1f ms, the first run %.1f ms\n", "ours, factors kept", later[1] * 1e3, first[1] * 1e3);
    printf("  %-34s %9.1f ms, the first run %.1f ms\n", "ours, files read again", later[0] * 1e3, first[0] * 1e3);
    psoup_merger_free(mergers[0]);
    psoup_merger_free(mergers[1]);
    shell("rm -rf %s", directory);
}

int main(int argc, char **argv) {
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    int millions = argc > 3 ? atoi(argv[3]) : 250;
    if (argc > 2) {
        python = argv[1];
        script = argv[2];
    }
    if (millions < 1 || millions > 1100) {
        fprintf(stderr, "bench_merge_files: %d million parameters; expected 1 to 1100\n", millions);
        return 2;
    }
    int layers = millions > 180 ? (millions - 131) / 44 : 1; /* 44 million each, and the two tables */
    layers = layers > 22 ? 22 : layers;
    setvbuf(stdout, NULL, _IOLBF, 0);
    settings.threads = THREADS;
    must(psoup_context_create(&settings, &context, &error), &error);
    start_peer();
    printf("%d threads, %s\n", THREADS, psoup_context_isa(context));
    const char *parts = argc > 4 ? argv[4] : "files,open";
    if (strstr(parts, "files") != NULL && access("/dev/shm", W_OK) == 0)
        bench_files(context, "/dev/shm", layers, false);
    if (strstr(parts, "files") != NULL)
        bench_files(context, getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir, layers, true);
    if (strstr(parts, "open") != NULL && access("/dev/shm", W_OK) == 0)
        bench_open(context, "/dev/shm");
    psoup_context_free(context);
    return 0;
}
