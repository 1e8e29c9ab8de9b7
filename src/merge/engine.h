/* src/merge/engine.h: sources → plan → executor → output. The room's other files share this and nobody else
 * does.
 *
 * A plan is a list of results: each says what it is called, what it looks like, and what it is made of, with
 * every parameter resolved. The executor makes results block by block and hands them to an output, which
 * knows nothing of methods, as methods know nothing of files. Converting is a merge of one.
 */
#ifndef PSOUP__MERGE_ENGINE_H
#define PSOUP__MERGE_ENGINE_H

#include <dirent.h>

#include "blend/blend.h"
#include "blend/method.h"
#include "format/format.h"
#include "merge/hash.h"

#define PSOUP__NONE SIZE_MAX

/* ---- settings.c: parameters by tensor ---------------------------------------------------------------- */

typedef enum psoup__parameter {
    PSOUP__WEIGHT, PSOUP__DENSITY, PSOUP__GAMMA, PSOUP__EPSILON, PSOUP__SCALE, /* of one input */
    PSOUP__LAMBDA, PSOUP__T, PSOUP__NORMALIZE, PSOUP__RESCALE, PSOUP__VOTE, PSOUP__FLATTEN,
    PSOUP__ROW_WISE, PSOUP__FILTER_WISE, /* of a tensor */
    PSOUP__PARAMETERS
} psoup__parameter;

typedef struct psoup__setting {
    psoup__parameter parameter;
    char *filter;   /* NULL: all tensors */
    double *values; /* [n] a gradient over depth; [1] a number */
    size_t n;
} psoup__setting;
typedef struct psoup__settings { /* the first that fits is taken */
    psoup__setting *items;
    size_t n, capacity;
} psoup__settings;

/* PSOUP__PARAMETERS for a name that is none. */
psoup__parameter psoup__parameter_named(const char *name);
const char *psoup__parameter_name(psoup__parameter parameter);
/* The bit of PSOUP__USES_…, by which methods say what they read. */
uint32_t psoup__parameter_bit(psoup__parameter parameter);
/* Appends, or with `first` puts before all others. Copies; refuses filters that are no expressions. */
psoup_status psoup__settings_add(psoup_context *context, psoup__settings *settings,
                                 psoup__parameter parameter, const char *filter, const double *values,
                                 size_t n, bool first, psoup_error *error);
void psoup__settings_free(psoup_context *context, psoup__settings *settings);
/* Whether a setting fits the tensor; *out receives its value at depth t in [0, 1]. */
bool psoup__settings_find(const psoup__settings *settings, psoup__parameter parameter, const char *tensor,
                          double t, double *out);

/* ---- source.c: what is merged -------------------------------------------------------------------------- */

/* A tensor of a source that the caller holds, or gives piece by piece. */
typedef struct psoup__held {
    char *name;
    psoup__tensor tensor;
    psoup__pull pull; /* the tensor's, where its data is NULL */
} psoup__held;

typedef struct psoup__source_file {
    psoup__file *file; /* borrowed from the source's model or adapter */
    char sha256[PSOUP__SHA256_TEXT]; /* "" until asked for */
} psoup__source_file;

typedef struct psoup__kept { /* a factor that stays in memory between runs */
    float *values; /* NULL: it does not */
    char text[PSOUP__HASH_TEXT]; /* its fingerprint; "" until it is read */
} psoup__kept;

typedef struct psoup__merge_source {
    char *path;             /* as the caller said it, for messages and the certificate */
    psoup__weights *model;  /* one of model, adapter (or both: model with the adapter folded in), held */
    psoup__peft *adapter;
    psoup__held *held;      /* [n_held] */
    size_t n_held;
    psoup__map *held_names;
    int *pull_failed; /* what the caller gives piece by piece could not be given */
    psoup__source_file *files; /* [n_files] that it is read from */
    size_t n_files;
    bool read;         /* an adapter: from its files, in this run */
    psoup__kept *kept; /* [2 adapter->n] a and b of its pairs in turn; NULL: none */
    char architecture[64];  /* config.json's model_type, or "" */
    psoup__settings settings;
} psoup__merge_source;

/* Refuses a name that is no UTF-8: certificates could not say it. */
psoup_status psoup__merge_text(const char *text, const char *what, psoup_error *error);
/* reference: the model that an adapter in GGUF is for, or NULL. */
psoup_status psoup__source_open(psoup_context *context, const char *path, bool base, const char *reference,
                                psoup__merge_source *out, psoup_error *error);
psoup_status psoup__source_hold(psoup_context *context, const psoup_merge_tensors *tensors,
                                psoup__merge_source *out, psoup_error *error);
/* A PEFT directory, or a GGUF file of an adapter. */
psoup_status psoup__path_is_adapter(psoup_context *context, const char *path, bool *adapter,
                                    psoup_error *error);
void psoup__source_free(psoup_context *context, psoup__merge_source *source);
bool psoup__source_is_adapter(const psoup__merge_source *source); /* and no model */
/* The pair of an adapter that changes "<module>.weight", its name being length bytes; or NULL. */
const psoup__peft_pair *psoup__peft_find(const psoup__peft *peft, const char *module, size_t length);
/* Tensors of a model or of what the caller holds. */
size_t psoup__source_count(const psoup__merge_source *source);
const char *psoup__source_name(const psoup__merge_source *source, size_t index);
bool psoup__source_index(const psoup__merge_source *source, const char *name, size_t *index);
const psoup__tensor *psoup__source_tensor(const psoup__merge_source *source, size_t index);
/* Refuses a source that could not be read, or whose files are not what they were when they were opened. */
psoup_status psoup__source_check(const psoup__merge_source *source, psoup_error *error);
/* What could not be read once may be there now. */
void psoup__source_retry(psoup__merge_source *source);
psoup_status psoup__source_sha256(psoup__merge_source *source, psoup_error *error);

/* ---- merger.c ------------------------------------------------------------------------------------------ */

/* Layers taken from sources to stand in the result, as mergekit's slices. */
typedef struct psoup__slice_part {
    size_t source; /* PSOUP__NONE: the base */
    int64_t first, end; /* layers */
    psoup__settings settings;
} psoup__slice_part;
typedef struct psoup__slice {
    psoup__slice_part *parts;
    size_t n, capacity;
    psoup__settings settings;
} psoup__slice;

struct psoup_merger {
    psoup_context *context;
    psoup_merger_options options;
    psoup__merge_source base;
    bool has_base;
    psoup__merge_source *sources; /* [n] */
    double *weights;              /* [n] */
    size_t n, sources_capacity, weights_capacity;
    psoup__settings settings;
    psoup__slice *slices; /* [n_slices]; none: all layers of all sources */
    size_t n_slices, slices_capacity;
    char *reference;       /* a model whose heads an adapter in GGUF is for; NULL: not said */
    char *sidecars;        /* whose tokenizer and templates go along; NULL: the base's or first model's */
    char *chat_template;   /* instead of theirs */
    bool same_tokenizers;  /* a tokenizer was asked for: all sources' must be the same */
    bool from_recipe;      /* weights are what the recipe says and need not sum to 1 */
    psoup_json *expected;  /* the certificate that a replay must reproduce */
    bool reweighs;         /* its weights were changed */
    size_t kept_bytes;     /* of all sources' factors that are kept */
    bool ran;
    psoup_merge_report report;
};
psoup_status psoup__options_check(const psoup_merger_options *options, psoup_error *error);
psoup_status psoup__merger_slice(psoup_merger *merger, psoup__slice **out, psoup_error *error);
/* Layers first … end − 1 of a source (PSOUP__NONE: the base); as many as the slice's other parts have. */
psoup_status psoup__merger_slice_part(psoup_merger *merger, psoup__slice *slice, size_t source, int64_t first,
                                      int64_t end, psoup__slice_part **out, psoup_error *error);
psoup__merge_source *psoup__merger_source(psoup_merger *merger, size_t index); /* PSOUP__NONE: the base */
psoup_status psoup__merge_progress(psoup_merger *merger, size_t done, size_t total, psoup_error *error);

/* ---- recipe.c -------------------------------------------------------------------------------------------- */

struct psoup__yaml_node;
/* Takes what a recipe says into a fresh merger; `path` for messages. */
psoup_status psoup__recipe_apply(psoup_merger *merger, const struct psoup__yaml_node *root, const char *path,
                                 psoup_error *error);

/* ---- plan.c, plan_models.c, plan_tensor.c, plan_adapters.c ---------------------------------------- */

typedef struct psoup__plan_part { /* one adapter's pair of factors, with its weight */
    size_t source;
    const psoup__peft_pair *pair;
    double weight;
    size_t entries[2]; /* of a and b in the certificate */
} psoup__plan_part;

typedef struct psoup__plan_input { /* tensor + Σ parts */
    size_t source; /* PSOUP__NONE: the base */
    const char *name; /* of the tensor in it */
    const psoup__tensor *tensor; /* NULL: zeros */
    size_t part, parts; /* in the plan's parts */
    double values[PSOUP__SCALE + 1]; /* by psoup__parameter */
    size_t entry; /* of the tensor in the certificate; PSOUP__NONE where it is not read */
} psoup__plan_input;

typedef enum psoup__result_kind {
    PSOUP__SUM,  /* Σ weight · input, of bytes as they are: the fast way */
    PSOUP__MADE, /* by a method */
    PSOUP__KEPT, /* no floats: the same in all inputs */
    PSOUP__PAIR_A, /* merged factors: a, */
    PSOUP__PAIR_B  /* and b, which follows its a */
} psoup__result_kind;

typedef struct psoup__result {
    psoup__result_kind kind;
    char *name;
    psoup_dtype dtype;
    int rank;
    int64_t shape[PSOUP__MAX_RANK];
    size_t n, bytes;
    size_t input, inputs; /* in the plan's inputs; pairs have one, whose parts are merged */
    size_t base;          /* in the plan's inputs; PSOUP__NONE: none */
    const psoup__method *method;
    double values[PSOUP__PARAMETERS];
    const char *module; /* of a pair, borrowed from its source */
} psoup__result;

typedef struct psoup__plan {
    psoup_merger *merger;
    psoup__result *results;
    psoup__plan_input *inputs;
    psoup__plan_part *parts;
    size_t n, n_inputs, n_parts, results_capacity, inputs_capacity, parts_capacity;
    bool adapter; /* the results are an adapter's */
    int32_t rank; /* of its pairs, the largest */
    const psoup__merge_source *like; /* whose config and other files go with a model */
    int64_t depth;  /* layers of the sources, for gradients */
    int64_t layers; /* of a result made of slices; −1: as in `like` */
    bool untied;    /* has a head that `like` takes from its embedding */
} psoup__plan;

psoup_status psoup__plan_make(psoup_merger *merger, psoup__plan *out, psoup_error *error);
void psoup__plan_free(psoup__plan *plan);
/* What the two kinds of plans are made with. */
psoup_status psoup__plan_models(psoup__plan *plan, psoup_error *error);
psoup_status psoup__plan_adapters(psoup__plan *plan, psoup_error *error);
psoup_status psoup__plan_result(psoup__plan *plan, psoup__result_kind kind, const char *name,
                                psoup__result **out, psoup_error *error);
psoup_status psoup__plan_input_add(psoup__plan *plan, psoup__plan_input **out, psoup_error *error);
psoup_status psoup__plan_part_add(psoup__plan *plan, psoup__plan_input *input, size_t source,
                                  const psoup__peft_pair *pair, double weight, psoup_error *error);
/* Sets shape, n and bytes. */
psoup_status psoup__result_shape(psoup__result *result, psoup_dtype dtype, int rank, const int64_t *shape,
                                 psoup_error *error);
/* A weight that settings give a source for a tensor or module goes before the one it was added with. */
void psoup__plan_weight(const psoup__plan *plan, size_t source, const char *tensor, double *weight);
/* Whether all sources' weights for a tensor sum to 1, where they must. */
psoup_status psoup__plan_check_sum(const psoup__plan *plan, const char *tensor, psoup_error *error);
/* The number of the layer that a tensor's or module's name is of, and where its digits stand in the name;
 * −1 for one outside the layers. */
int64_t psoup__layer_of(const char *name, size_t *begin, size_t *end);
/* Where a layer stands in the model: 0 the first, 1 the last (and the only one), 0 outside. */
double psoup__depth_of(int64_t layer, int64_t layers);
/* An adapter's change as an input of a method of whole tensors, with its own parameters; parts follow. */
psoup_status psoup__plan_task_vector(psoup__plan *plan, size_t source, const char *module,
                                     psoup__plan_input **out, psoup_error *error);
bool psoup__plan_counts(const psoup__plan *plan, const psoup__plan_input *input);
/* The parameters of a result of adapters alone whose method and inputs are there. */
psoup_status psoup__plan_method(psoup__plan *plan, psoup__result *result, const char *name,
                                psoup_error *error);
bool psoup__dtype_mergeable(psoup_dtype dtype); /* floats of a file */
psoup_dtype psoup__result_dtype(const psoup_merger *merger, psoup_dtype dtype);

/* ---- keep.c: adapters' factors that stay in memory between runs ------------------------------------------- */

/* A part's a (0) or b (1) where it is kept, as f32 in its own order; or NULL. */
const psoup__kept *psoup__keep_find(psoup_merger *merger, const psoup__plan_part *of, int part);
/* Room for it [n]; NULL where it cannot be kept. psoup__keep_read says that it is there, and its fingerprint. */
float *psoup__keep_room(psoup_merger *merger, const psoup__plan_part *of, int part, size_t n);
void psoup__keep_read(psoup_merger *merger, const psoup__plan_part *of, int part, const char *text);
void psoup__keep_free(psoup_context *context, psoup__merge_source *source);
void psoup__keep_forget(psoup_merger *merger); /* all of them */

/* ---- certificate.c: what went in and what came out --------------------------------------------------------- */

typedef struct psoup__entry { /* one tensor that is read */
    size_t source;    /* PSOUP__NONE: the base */
    const char *name; /* borrowed from the source: of a tensor, or the module of a factor: */
    char part;        /* 0, or 'A' or 'B' */
    bool claimed;     /* somebody hashes it */
    char text[PSOUP__HASH_TEXT];
} psoup__entry;
typedef struct psoup__made { /* one result */
    char text[PSOUP__HASH_TEXT];
    double error; /* ‖merged − exact‖ / ‖exact‖; −1: exact but for the last rounding */
} psoup__made;
typedef struct psoup__certificate {
    const psoup__plan *plan;
    psoup__entry *entries;
    psoup__made *made; /* [plan->n] */
    size_t n, capacity;
} psoup__certificate;
/* Finds the tensors that the plan reads, and says so in its inputs and parts. */
psoup_status psoup__certificate_create(psoup__plan *plan, psoup__certificate *out, psoup_error *error);
void psoup__certificate_free(psoup__certificate *certificate);
/* certificate_json.c. Fingerprints that are not known yet are "". */
psoup_json *psoup__certificate_json(const psoup__certificate *certificate, psoup_error *error);
/* Whether a result's error belongs into the certificate. */
bool psoup__result_lossy(const psoup__plan *plan, size_t index);
/* The fingerprints that a killed run of the same merge knew. */
psoup_status psoup__certificate_take(psoup__certificate *certificate, const psoup_json *json,
                                     psoup_error *error);
/* Refuses what is not as `expected` has it, naming file and tensor. */
psoup_status psoup__certificate_compare(const psoup__certificate *certificate, const psoup_json *expected,
                                        psoup_error *error);
/* certificate_read.c: of a tensor's bytes in row-major order, whatever order its rows lie in. */
psoup_status psoup__hash_tensor(psoup_context *context, const psoup__tensor *tensor,
                                char out[PSOUP__HASH_TEXT], psoup_error *error);
/* Where the certificate of a result is. */
char *psoup__certificate_path(psoup_context *context, const char *result, psoup_error *error);

/* ---- output.c: where results go ----------------------------------------------------------------------------- */

typedef struct psoup__output psoup__output;
typedef struct psoup__output_kind {
    bool any_thread;
    /* Everything is known but the numbers. */
    psoup_status (*begin)(psoup__output *output, psoup_error *error);
    /* Result `index` begins; not called for what is there already (resumed). */
    psoup_status (*tensor)(psoup__output *output, size_t index, psoup_error *error);
    /* Its next bytes, in order. From any thread where `any_thread` says so, one at a time. */
    psoup_status (*write)(psoup__output *output, size_t index, const void *data, size_t bytes,
                          psoup_error *error);
    psoup_status (*finish)(psoup__output *output, size_t index, psoup_error *error); /* all of it is written */
    /* Every result is written, and its fingerprint known but where this says another. NULL: nothing to do. */
    psoup_status (*close)(psoup__output *output, psoup_error *error);
    /* Makes the whole appear, with this certificate. */
    psoup_status (*commit)(psoup__output *output, const char *certificate, psoup_error *error);
    void (*free)(psoup__output *output); /* removes what is not committed */
    /* After a round: what is written is hashed too. NULL: nothing to do. */
    psoup_status (*settle)(psoup__output *output, psoup_error *error);
} psoup__output_kind;
/* Freed by kind->free. */
struct psoup__output { /* each kind's struct begins with it */
    const psoup__output_kind *kind;
    const psoup__plan *plan;
    psoup__certificate *made; /* what is known of it so far */
    size_t space; /* bytes that its text can take inside a JSON string */
    bool *there; /* [plan->n] results that need not be made; NULL: none */
};

/* Into a directory: safetensors in one file or in shards, or a PEFT adapter. */
psoup_status psoup__output_directory(const psoup__plan *plan, const char *directory, psoup__output **out,
                                     psoup_error *error);
/* Into one GGUF file. */
psoup_status psoup__output_gguf(const psoup__plan *plan, const char *path, psoup__output **out,
                                psoup_error *error);
/* To the caller's functions. */
psoup_status psoup__output_sink(const psoup__plan *plan, const psoup_merge_sink *sink, psoup__output **out,
                                psoup_error *error);
/* config.json and what goes with it, into a directory; says the results' dtype, layers and head. */
psoup_status psoup__write_sidecars(const psoup__plan *plan, const char *directory, psoup_error *error);

/* ---- staging.c: a directory that appears when it is whole --------------------------------------------------- */

typedef struct psoup__staging {
    psoup_context *context;
    char *target; /* where the result shall be */
    char *work;   /* where it grows: beside the target, or inside it where that is a directory already */
    bool inside, committed;
    bool keep; /* leave finished files where a run fails */
    int lock;  /* held as long as a merge works there */
    DIR *directory; /* the work directory */
} psoup__staging;
/* With `keep` takes what an earlier run left; otherwise begins afresh. Refuses where another merge works. */
psoup_status psoup__staging_open(psoup_context *context, const char *target, bool keep,
                                 psoup__staging *out, psoup_error *error);
/* Removes from `work` what an earlier run left, but for these names. */
void psoup__staging_keep(const psoup__staging *staging, const char *const *names, size_t n);
/* Everything that is in `work` to the target; of several files `entry`, by which readers find the others,
 * goes away first and comes last, so that the result is absent or complete. */
psoup_status psoup__staging_commit(psoup__staging *staging, const char *entry, psoup_error *error);
void psoup__staging_free(psoup__staging *staging); /* removes what is not committed nor kept */

/* ---- work.c, work_factors.c, work_block.c: one result in the making ------------------------------ */

typedef struct psoup__stream { /* what is hashed while a result is made: an input, or the result */
    psoup__hash *hash;
    size_t input; /* PSOUP__NONE: the result */
    size_t at;    /* elements that are hashed */
    char *to;     /* where its fingerprint goes */
} psoup__stream;

typedef struct psoup__desk { /* a worker's: the job, with the blocks that it reads in their tensors' places */
    psoup__method_job job;
    psoup__merge_input *inputs; /* [inputs], then the base */
    psoup__tensor *tensors;     /* likewise, of those that are read */
} psoup__desk;

typedef struct psoup__work {
    psoup_merger *merger;
    const psoup__plan *plan;
    psoup__certificate *certificate;
    const psoup__result *result;
    size_t index;
    const void **in; /* [workers, inputs]: where a worker has the bytes of its block; NULL: nowhere */
    size_t staged;   /* bytes that an element of all inputs takes which are read into scratch */
    /* PSOUP__SUM */
    psoup_dtype *dtypes; /* [inputs] */
    double *values[PSOUP__SCALE + 1]; /* each [inputs] */
    /* PSOUP__MADE */
    psoup__method_job job;
    void *state;
    psoup__merge_input *inputs; /* [inputs], then the base */
    psoup__desk *desks;         /* [workers]; NULL where nothing is read a block at a time */
    bool folds; /* an input has factors: blocks are whole rows */
    psoup_lora_factors *factors; /* [parts] */
    double *weights;             /* [parts] */
    psoup_lora_factors merged;   /* all of them as one, by a method of factors */
    float *memory, *merged_memory;
    char *name; /* that the method draws by, where it is not the result's */
    psoup__stream *streams; /* [n_streams] */
    size_t n_streams;
    size_t planned, written; /* elements */
    size_t block;            /* elements of one block */
    int bad;                 /* a number is not finite, or too large: atomic */
    struct psoup__work *pair; /* of PSOUP__PAIR_B: the work of its a */
    struct psoup__work *next; /* the executor's list */
} psoup__work;
/* `pair`: of PSOUP__PAIR_B, the work of its a, which must outlive this. */
psoup_status psoup__work_open(const psoup__plan *plan, size_t index, psoup__certificate *certificate,
                              psoup__work *pair, psoup__work **out, psoup_error *error);
void psoup__work_free(psoup__work *work);
/* Reads and fingerprints the factors of so many parts into work->factors, with their weights. */
psoup_status psoup__work_factors(psoup__work *work, const psoup__plan_part *parts, size_t n,
                                 psoup_error *error);
/* Whether the pair is for a weight that lies the other way round: (B A)ᵀ = Aᵀ Bᵀ. */
bool psoup__work_is_across(const psoup__work *work, const psoup__peft_pair *pair);
size_t psoup__work_inputs(const psoup__work *work); /* the base too */
const psoup__plan_input *psoup__work_input(const psoup__work *work, size_t i); /* the base last */
/* Whether a block of the input is read before a method works on it; others are read as it asks for them. */
bool psoup__work_stages(const psoup__work *work, size_t input);
/* Floats of scratch that a block needs. */
size_t psoup__work_scratch(const psoup__work *work);
/* out = elements at … at + n − 1 in the result's dtype; sets work->bad. From any worker. */
void psoup__work_block(psoup__work *work, size_t at, size_t n, void *out, float *scratch, int worker);
/* The bytes of the block that the worker has made go into the stream's hash, in order. */
void psoup__stream_update(const psoup__work *work, psoup__stream *stream, size_t n, const void *out,
                          int worker);
/* Why a result is bad: a source that was not finite, or a dtype that is too small. */
psoup_status psoup__work_blame(const psoup__work *work, psoup_error *error);

/* ---- run.c --------------------------------------------------------------------------------------------------- */

/* Makes every result that `output` does not have yet. */
psoup_status psoup__run(const psoup__plan *plan, psoup__certificate *certificate, psoup__output *output,
                        psoup_error *error);

#endif
