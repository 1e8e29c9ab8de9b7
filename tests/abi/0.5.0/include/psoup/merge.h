/* psoup/merge.h: merging models and adapters, from files to files and in the caller's memory.
 *
 * The merger stands alone: libpsoup-merge.a holds it without the model, and a program that only
 * merges needs nothing else. Sums are accumulated in f32 and rounded once, to nearest even; results
 * carry the same bits for any number of threads.
 *
 * What "merging the LoRAs" means, by name (w_i weights, s_i scales):
 *   delta    Σ w_i s_i B_i A_i, the weighted sum of the policies' effective parameters (Jang et al.
 *            2023, equation 5). As an adapter: exact, of rank Σ r_i (PEFT calls it "cat").
 *   factors  s (Σ w_i B_i)(Σ w_j A_j): what the paper's released code and LoRAX do. Has cross terms;
 *            needs equal ranks and equal scales.
 *   svd(r)   the best rank-r approximation of delta in the Frobenius norm, computed from the small
 *            factors.
 */
#ifndef PSOUP_MERGE_H
#define PSOUP_MERGE_H

#include "psoup/data.h" /* psoup_named_tensor */

#ifdef __cplusplus
extern "C" {
#endif

typedef enum psoup_merge_method {
    PSOUP_MERGE_DELTA = 0,
    PSOUP_MERGE_FACTORS = 1,
    PSOUP_MERGE_SVD = 2,
    /* Of whole tensors; each is defined, with its source, in docs/merging.md. */
    PSOUP_MERGE_LINEAR = 3,
    PSOUP_MERGE_TASK_ARITHMETIC = 4,
    PSOUP_MERGE_TIES = 5,
    PSOUP_MERGE_DARE_LINEAR = 6,
    PSOUP_MERGE_DARE_TIES = 7,
    PSOUP_MERGE_DELLA = 8,
    PSOUP_MERGE_DELLA_LINEAR = 9,
    PSOUP_MERGE_BREADCRUMBS = 10,
    PSOUP_MERGE_BREADCRUMBS_TIES = 11,
    PSOUP_MERGE_SLERP = 12,
    PSOUP_MERGE_NUSLERP = 13,
    PSOUP_MERGE_MODEL_STOCK = 14,
    PSOUP_MERGE_PASSTHROUGH = 15,
    PSOUP_MERGE_MAGNITUDE_PRUNE = 16,
    /* Of factors, for parity: Σ √(w_i s_i) on both, which does not preserve Σ w = 1. */
    PSOUP_MERGE_PEFT_LINEAR = 17
} psoup_merge_method;

/* Whose definition of a method, where two projects give one name two meanings. */
typedef enum psoup_merge_peer {
    PSOUP_MERGE_PAPER = 0,
    PSOUP_MERGE_MERGEKIT = 1,
    PSOUP_MERGE_PEFT = 2
} psoup_merge_peer;

/* What a result is written as. */
typedef enum psoup_merge_format {
    PSOUP_MERGE_AS_SOURCES = 0, /* adapters: a PEFT directory; else safetensors */
    PSOUP_MERGE_GGUF = 1        /* one file, DIRECTORY then being its name: of a model, or of an adapter */
} psoup_merge_format;

/* The name of a method ("dare_ties"; borrowed, static; "?" for a value that is none), and back. */
const char *psoup_merge_method_name(int32_t method);
psoup_status psoup_merge_method_parse(const char *name, int32_t *out, psoup_error *error);

/* Fields after progress_user are since 0.2. What the numbers mean is in docs/merging.md, by method. Each is
 * the value where nothing more special was said with psoup_merger_set_parameter. */
typedef struct psoup_merger_options {
    size_t size;
    int32_t method;   /* psoup_merge_method. The three of factors, and peft_linear, are of adapters;
                       * PSOUP_MERGE_DELTA of full models is their weighted sum */
    int32_t svd_rank; /* for PSOUP_MERGE_SVD, and for methods of whole tensors that make one adapter of
                       * adapters */
    int32_t any_sum;  /* accept weights that do not sum to 1 within 1e-6; methods of task vectors, and
                       * those that normalise, always do */
    int32_t dtype;    /* psoup_dtype of the output; −1: that of the base or first source */
    psoup_progress_fn progress; /* called from the thread that merges */
    void *progress_user;
    int32_t peer;        /* psoup_merge_peer */
    int32_t format;      /* psoup_merge_format */
    uint64_t shard_size; /* most bytes of tensors in one safetensors file; 0: one file */
    double density;      /* the part of a task vector that stays, 0 to 1 */
    double gamma;        /* breadcrumbs: the part that is cut off as the largest */
    double epsilon;      /* della: the half width of the densities around density */
    double lambda;       /* multiplies the merged task vector */
    double t;            /* slerp: 0 is the first, 1 the second; PSOUP_MERGE_UNSAID, which slerp refuses */
    int32_t normalize;   /* 0, 1, or −1: as the peer has it */
    int32_t rescale;     /* 0, 1, or −1: as the peer has it */
    uint64_t seed;       /* of DARE and DELLA */
    int32_t sha256;      /* put the SHA-256 of every source file into the certificate: reads them once more */
    int32_t resume;      /* continue from the shards that a killed run of the same merge has finished, and
                          * keep finished shards where this run fails; of tensors that the caller holds,
                          * which may be others now, none is taken over */
    int64_t keep_bytes;  /* most bytes of adapters' factors (f32) that stay in memory from one run to the next; 0:
                          * none. −1: 64 MiB, and 1 GiB from the first psoup_merger_set_weights on. Since 0.4 */
    double strength;     /* of delta, factors, svd and peft_linear of adapters: multiplies the weights, whose sum is
                          * checked before. What a scalar head (score) is merged by it leaves alone. Methods of task
                          * vectors have `lambda`. Since 0.4 */
} psoup_merger_options;
#define PSOUP_MERGER_OPTIONS_INIT                                                                          \
    {.size = sizeof(psoup_merger_options), .dtype = -1, .density = 1, .gamma = 0.01, .epsilon = 0.15,      \
     .lambda = 1, .t = PSOUP_MERGE_UNSAID, .normalize = -1, .rescale = -1, .keep_bytes = -1,    \
     .strength = 1}
#define PSOUP_MERGE_UNSAID (-1e308)

typedef struct psoup_merger psoup_merger;

psoup_status psoup_merger_create(psoup_context *context, const psoup_merger_options *options,
                                 psoup_merger **out, psoup_error *error);
void psoup_merger_free(psoup_merger *merger);

/* Sets the base: a model directory, .safetensors or .gguf file. With a base and adapters the result is a
 * full model; without a base, one adapter. Methods of task vectors take the sources' differences from it. */
psoup_status psoup_merger_set_base(psoup_merger *merger, const char *path, psoup_error *error);
/* Adds a source and its weight: a PEFT directory or GGUF adapter, a model directory, .safetensors or .gguf
 * file. Its files stay open until the merger is freed (one descriptor each); nothing is mapped. Every run reads
 * models anew, and of adapters the factors that it needs and that no run before it kept (`keep_bytes`). Where a
 * file that is read was truncated, written to, replaced or removed since it was added, this run and those after
 * it fail (PSOUP_ERROR_IO); where one cannot be read, this run. The error names the file, and the tensor whose
 * bytes are missing. Of an adapter whose factors are all kept the files are not looked at: results are made of
 * what was read and fingerprinted, whatever became of them; a merger that shall see new ones is a new merger.
 * A run that fails keeps nothing.
 * Adapters alone become one adapter, or with a base a full model. Beside full models an adapter stands for the
 * base with its change, and the base must be set.
 * "MODEL+ADAPTER" names a full model that is MODEL with the adapter folded in. */
psoup_status psoup_merger_add(psoup_merger *merger, const char *path, double weight,
                              psoup_error *error);
/* The model that adapters in GGUF files are for, a directory or .gguf file: its heads say how rows of q and k
 * are ordered. Not needed where a base is set, where the file says it itself, or where adapter_config.json
 * names a directory that is here. Before the adapters are added. */
psoup_status psoup_merger_set_reference(psoup_merger *merger, const char *model, psoup_error *error);
/* New weights for the sources in the order they were added. Nothing is opened or parsed again. Of adapters the next
 * runs read what was not kept yet (psoup_merger_options' keep_bytes), once; of models all that they need, from the
 * system's page cache where it is still there. */
psoup_status psoup_merger_set_weights(psoup_merger *merger, const double *weights, size_t n,
                                      psoup_error *error);

/* A parameter by its name in docs/merging.md ("weight", "density", "gamma", "epsilon", "lambda", "t",
 * "normalize", "rescale", "vote" (0 total, 1 frequency), "scale", "filter_wise", "nuslerp_flatten",
 * "nuslerp_row_wise"), for one source (its number in the order added) or for all (−1). `filter` says for which
 * tensors: NULL all; "re:" and an expression as PEFT's rank_pattern has them, which must match the end of the name from its beginning or
 * after a dot; otherwise any tensor whose name contains it. n values are a gradient over the depth, as
 * mergekit has it: the first layer has the first value, the last the last, those between are interpolated;
 * tensors outside the layers have the first. What is said later goes before what was said earlier, a
 * source's before that of all. Values are copied. */
psoup_status psoup_merger_set_parameter(psoup_merger *merger, int64_t source, const char *parameter,
                                        const char *filter, const double *values, size_t n,
                                        psoup_error *error);

/* Merges into a directory: model.safetensors (or shards and their index) with the config and tokenizer files
 * of the base (or of the first model), or a PEFT directory; with PSOUP_MERGE_GGUF into a file. The
 * certificate psoup-merge.json is written beside, or NAME.psoup-merge.json beside NAME.gguf. The result
 * appears when it is whole: until then it grows in DIRECTORY.psoup-partial, or in DIRECTORY/.psoup-partial
 * where the directory is there already. */
psoup_status psoup_merger_write(psoup_merger *merger, const char *directory, psoup_error *error);

/* Receives the results instead of files, in order, all from the thread that calls. Functions return 0, or
 * anything else to stop (PSOUP_ERROR_CANCELLED). */
typedef struct psoup_merge_sink {
    size_t size;
    void *user;
    /* A tensor begins: row-major, little-endian; name and shape are borrowed for the call. */
    int (*tensor)(void *user, const char *name, psoup_dtype dtype, int32_t rank, const int64_t *shape);
    /* The next bytes of it, borrowed for the call; `offset` counts from its beginning. */
    int (*write)(void *user, uint64_t offset, const void *data, size_t bytes);
} psoup_merge_sink;
#define PSOUP_MERGE_SINK_INIT {.size = sizeof(psoup_merge_sink)}
psoup_status psoup_merger_run(psoup_merger *merger, const psoup_merge_sink *sink, psoup_error *error);

/* A full model that the caller holds. Tensors are described once, under Hugging Face's names; data NULL
 * means that `read` gives them. */
typedef struct psoup_merge_tensors {
    size_t size;
    const char *name;                    /* of the source, for messages; copied */
    const psoup_named_tensor *tensors; /* [n]; names and shapes are copied, data borrowed
                                          * until the merger is freed */
    size_t n;
    /* Bytes offset … offset + bytes − 1 of tensor `index` into out; 0, or anything else for "cannot". Called
     * from several threads at once, and more than once for the same bytes where a method needs it. */
    int (*read)(void *user, size_t index, uint64_t offset, size_t bytes, void *out);
    void *user;
} psoup_merge_tensors;
#define PSOUP_MERGE_TENSORS_INIT {.size = sizeof(psoup_merge_tensors)}
psoup_status psoup_merger_add_tensors(psoup_merger *merger, const psoup_merge_tensors *source,
                                      double weight, psoup_error *error);
/* The base in the same way. */
psoup_status psoup_merger_set_base_tensors(psoup_merger *merger, const psoup_merge_tensors *base,
                                           psoup_error *error);

/* Takes everything from a mergekit YAML file: method, base, sources, parameters, slices, dtypes. Into a
 * fresh merger only, whose options say the rest (shards, format, seed, progress). Paths are relative to the
 * working directory, as mergekit has them. What psoup lacks is refused with its line. */
psoup_status psoup_merger_load_recipe(psoup_merger *merger, const char *path, psoup_error *error);
/* Takes everything from a certificate: the merge that it tells of, into a fresh merger. A run then stops
 * where an input or a result differs from it, naming file and tensor. */
psoup_status psoup_merger_load_certificate(psoup_merger *merger, const char *path, psoup_error *error);
/* Checks a result (a directory, or a .gguf file) against the certificate beside it: every tensor, and the
 * text in the files' metadata. *tensors (may be NULL) receives how many. */
psoup_status psoup_merge_verify(psoup_context *context, const char *path, size_t *tensors,
                                psoup_error *error);

/* How good a lossy result is, after a run. */
typedef struct psoup_merge_report {
    size_t size;
    size_t tensors;       /* results written */
    double worst_error;   /* the largest ‖merged − exact‖ / ‖exact‖ over the adapters' linears, */
    char worst_name[256]; /* and where; 0 and "" when the method is exact */
    double mean_error;
} psoup_merge_report;
psoup_status psoup_merger_report(const psoup_merger *merger, psoup_merge_report *out,
                                 psoup_error *error);

/* In memory. out[j] = Σ_i weights[i] · in[i][j] for j < n: f32 accumulation in the order of i,
 * rounded once to out_dtype. Each in[i] has dtype in_dtype (F32, F16, BF16). out may be one of the
 * inputs where their dtypes are equal. A weight of zero skips its input. */
psoup_status psoup_merge_sum(psoup_context *context, void *out, psoup_dtype out_dtype,
                             const void *const *in, psoup_dtype in_dtype, const double *weights,
                             size_t count, size_t n, psoup_error *error);

/* One adapter's factors for one linear, f32. */
typedef struct psoup_lora_factors {
    const float *a; /* [rank, in] */
    const float *b; /* [out, rank] */
    int32_t rank;
    float scale;
} psoup_lora_factors;
/* out[out_features, in_features] = base + Σ_i weights[i] · scale_i · B_i A_i, rounded once. Always
 * from the pristine base: there is no unmerge. out may be base. */
psoup_status psoup_merge_fold(psoup_context *context, void *out, const void *base,
                              psoup_dtype dtype, int64_t out_features, int64_t in_features,
                              const psoup_lora_factors *factors, const double *weights,
                              size_t count, psoup_error *error);
/* Merges factors into factors a_out [rank, in], b_out [out, rank], to be used with scale 1.
 * PSOUP_MERGE_DELTA: rank = Σ rank_i. PSOUP_MERGE_FACTORS: rank = the common rank.
 * PSOUP_MERGE_SVD: any rank ≥ 1. *relative_error (may be NULL) receives ‖merged − exact‖/‖exact‖. */
psoup_status psoup_merge_factors(psoup_context *context, psoup_merge_method method, float *a_out,
                                 float *b_out, int32_t rank, int64_t out_features,
                                 int64_t in_features, const psoup_lora_factors *factors,
                                 const double *weights, size_t count, double *relative_error,
                                 psoup_error *error);

/* ---- slices of tensors, on the host or on a device ---------------------------------------------------- */

typedef enum psoup_merge_place { PSOUP_MERGE_HOST = 0, PSOUP_MERGE_DEVICE = 1 } psoup_merge_place;

/* Rows × columns of a larger tensor that the caller holds: a whole one, or the shard of a tensor-parallel
 * rank. Nothing is owned. An input is only read. */
typedef struct psoup_merge_view {
    void *data;         /* of the first element; any alignment. May be NULL where there is none */
    int32_t dtype;      /* psoup_dtype: f32, f16, bf16, f64, f8_e4m3, f8_e5m2, q8_0 */
    int32_t place;      /* psoup_merge_place */
    int64_t rows, columns;
    int64_t row_stride; /* elements from row to row, at least `columns`; 0 means `columns`. Of q8_0 the
                         * columns and the stride are whole blocks of 32 */
    uint64_t reserved[3]; /* 0 */
} psoup_merge_view;

/* out = Σ weights[i] · in[i], every view of one shape and of its own dtype and stride: accumulated in f32 in
 * the order of i, rounded once; the same bits for any threads, strides and slices. A weight of zero skips
 * its input, which may then be anything. out may be one of the inputs, with the same data, dtype and stride;
 * it may not overlap an input otherwise (columns of one tensor side by side do not overlap). All views are in
 * one place. */
psoup_status psoup_merge_views(psoup_context *context, const psoup_merge_view *out,
                               const psoup_merge_view *in, const double *weights, size_t count,
                               psoup_error *error);

/* out = base + Σ_i weights[i] · scale_i · B_i A_i for the slice of a linear [out_features, in_features] that
 * begins at first_row and first_column (a rank of a column-parallel linear holds some of its rows, of a
 * row-parallel one some of its columns). The factors are those of the whole linear, where out is. The bits
 * are those that psoup_merge_fold gives the same elements. out may be base, or not overlap it. */
psoup_status psoup_merge_fold_view(psoup_context *context, const psoup_merge_view *out,
                                   const psoup_merge_view *base, int64_t first_row, int64_t first_column,
                                   int64_t out_features, int64_t in_features,
                                   const psoup_lora_factors *factors, const double *weights, size_t count,
                                   psoup_error *error);

/* The elements of one view to another of the same shape and dtype, wherever the two are. */
psoup_status psoup_merge_copy(psoup_context *context, const psoup_merge_view *out,
                              const psoup_merge_view *in, psoup_error *error);

/* What works on views whose place is PSOUP_MERGE_DEVICE: psoup_merge_views, psoup_merge_fold_view and
 * psoup_merge_copy check their arguments and hand them over, device pointers untouched (psoup_lora_factors
 * too are then on the device). Each returns a status and writes the error on failure; a call has finished
 * when it returns, or is ordered before what the caller does next with the device. */
typedef struct psoup_merge_device {
    size_t size;
    void *user;
    psoup_status (*sum)(void *user, const psoup_merge_view *out, const psoup_merge_view *in,
                        const double *weights, size_t count, psoup_error *error);
    psoup_status (*fold)(void *user, const psoup_merge_view *out, const psoup_merge_view *base,
                         int64_t first_row, int64_t first_column, int64_t in_features,
                         const psoup_lora_factors *factors, const double *weights, size_t count,
                         psoup_error *error);
    psoup_status (*copy)(void *user, const psoup_merge_view *out, const psoup_merge_view *in,
                         psoup_error *error);
} psoup_merge_device;
/* Gives the context a device, or with NULL takes it away. The table is copied; all three functions are
 * needed. Not while another thread uses the context. */
psoup_status psoup_merge_set_device(psoup_context *context, const psoup_merge_device *device,
                                    psoup_error *error);

/* ---- new weights for a whole adapter ------------------------------------------------------------------ */

/* One module of a batch: the same with its own factors, weights (which modules may share) and results. */
typedef struct psoup_merge_module {
    const psoup_lora_factors *factors; /* [count] */
    const double *weights;             /* [count] */
    size_t count;
    int64_t out_features, in_features;
    float *a_out; /* [rank, in]. PSOUP_MERGE_DELTA takes NULL: A is left as it was, for it does not change
                   * with the weights while the same of them are 0 */
    float *b_out; /* [out, rank] */
    int32_t rank;
    int32_t reserved32;    /* 0 */
    double relative_error; /* receives ‖merged − exact‖/‖exact‖ where `errors` is set, else 0 */
    uint64_t reserved[4];  /* 0 */
} psoup_merge_module;
/* New weights for a whole adapter: every module as psoup_merge_factors merges it, all in parallel. With
 * errors = 0 the error of a lossy method is not computed, which takes longer than the merge itself
 * (PSOUP_MERGE_SVD knows it anyway). All modules are checked before the first is written. */
psoup_status psoup_merge_factors_batch(psoup_context *context, psoup_merge_method method,
                                       psoup_merge_module *modules, size_t n, int32_t errors,
                                       psoup_error *error);

/* What n adapters (PEFT directories or GGUF adapters) have to do with each other, from their small factors
 * alone: nothing of the size of ΔW is formed. weights [n] are the soup's, NULL: 1/n each; any sum. *out is
 * an object, to be freed with psoup_json_free; matrices are arrays of rows in the order of the adapters,
 * numbers that are not defined (an adapter without the module, or 0 there) are null:
 *   adapters  [{path, modules, parameters, least_rank, largest_rank}]
 *   norms [n], gram [n][n] = Σ over modules ⟨ΔW_i, ΔW_j⟩, cosine [n][n]
 *   interference [n][n]: ⟨ΔW_i, ΔW_j⟩ / ‖ΔW_i‖²: what a whole j adds to, or takes from, i along i's own
 *   direction; opposed [n][n]: the share of common modules where the inner product is negative
 *   soup      {weights, norm, factors: {error, worst_error, worst_module} or null where ranks, scales or
 *             modules differ, svd: [{rank, energy, error, least_energy, least_module}]}: the energy that
 *             the best approximation of each module at that rank keeps (empty where Σ rank exceeds 1024)
 *   layers    [{layer, norms, cosine}]; modules [{name, layer, norms, gram, cosine, soup_norm,
 *             factors_error, singular_values}]: of the soup
 *   warnings  [text]: where `factors` or a truncation to the largest rank would be poor
 * Refuses a factor with a NaN or infinity, naming file and tensor. */
psoup_status psoup_merge_inspect(psoup_context *context, const char *const *adapters, size_t n,
                                 const double *weights, psoup_json **out, psoup_error *error);
/* A heat map of an inspection as an SVG file: adapters × adapters, layers × pairs, the energy by rank.
 * `names` [n] label the adapters; NULL: the last parts of their paths. */
psoup_status psoup_merge_inspect_plot(psoup_context *context, const psoup_json *inspection,
                                      const char *const *names, const char *path, psoup_error *error);

#ifdef __cplusplus
}
#endif
#endif
