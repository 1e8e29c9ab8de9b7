/* src/gpu, inside: the device a backend works on, and how an op puts work into its stream. */
#ifndef PSOUP__GPU_INTERNAL_H
#define PSOUP__GPU_INTERNAL_H

#include "../../cuda/kernels.h"
#include "gpu/blas.h"
#include "gpu/driver.h"
#include "gpu/record.h"
#include "ops.h"

enum { PSOUP__GPU_IMAGES = 32 };

/* Memory that host data crosses through: pinned on the host, with a twin on the device, used round and
 * round in two halves. The host's half is filled again when what was copied out of it has arrived; until then the device's
 * is filled by launches that carry the bytes in their arguments, so that nobody waits. */
enum { PSOUP__UPLOAD_BYTES = 8 << 20 };
typedef struct psoup__upload {
    char *host;
    psoup__cu_pointer device;
    size_t used;
    psoup__cu_event left[2]; /* recorded when a half is full */
    bool pending[2];         /* it was not seen to have passed */
} psoup__upload;

/* The input of a linear layer that was last rounded to 16 bits: the copy begins gpu->room. Whatever may write
 * activations or the room forgets it: every launch, but those of linear_mix.c. */
typedef struct psoup__cast {
    const float *of; /* NULL: there is none */
    size_t n;
    psoup_dtype dtype;
} psoup__cast;

/* Zeros with which the blocks of a kernel count who is last; zeros again when it ends. */
enum { PSOUP__GPU_COUNTERS = 1 << 14 };

typedef struct psoup__gpu {
    psoup__backend base; /* first: a psoup__backend * of ours is a psoup__gpu * */
    psoup__ops ops;
    psoup__driver driver;
    psoup__cu_device device;
    psoup__cu_context context; /* the device's primary one, shared with CUDA's runtime */
    psoup__cu_context before;  /* the thread's when it was opened, or is freed */
    psoup__cu_stream stream;
    bool own_stream;
    int processors;    /* streaming multiprocessors */
    int capability;    /* 90: compute capability 9.0 */
    int shared_memory; /* bytes a block may ask for */
    psoup__cu_module modules[PSOUP__GPU_IMAGES];
    int n_modules;
    psoup__cu_function functions[PSOUP__KERNEL_COUNT];
    unsigned dynamic_shared[PSOUP__KERNEL_COUNT]; /* most asked for so far */
    psoup__blas blas;
    psoup__upload upload;
    psoup__record record;
    psoup__cu_pointer room; /* what ops take beside their arguments: see ops->reserve */
    size_t room_bytes;
    psoup__cu_pointer matrix; /* a weight in blocks, while it is multiplied: see blocks.c */
    size_t matrix_bytes;
    psoup__cast cast;
    psoup__cu_pointer counters; /* uint32_t [PSOUP__GPU_COUNTERS] */
    psoup_error failed; /* the first failure that nobody was told of; status PSOUP_OK while there is none */
} psoup__gpu;

static inline psoup__gpu *psoup__gpu_of(psoup__backend *be) {
    return (psoup__gpu *)be;
}

static inline psoup__cu_pointer psoup__gpu_address(const void *memory) {
    return (psoup__cu_pointer)(uintptr_t)memory;
}

/* ---- gpu.c ---------------------------------------------------------------------------------------------- */

/* What psoup__gpu_create makes; matrix products by cuBLASLt only where they are asked for. */
psoup_status psoup__gpu_open(psoup_context *context, bool products, psoup__gpu **out, psoup_error *error);
/* Makes the device's context the thread's, which may never have seen the device: before whatever goes into the
 * stream. False after a failure. */
bool psoup__gpu_enter(psoup__gpu *gpu);
/* What has gone wrong since this was last asked: a failure is told once, and what comes after it is done. */
psoup_status psoup__gpu_tell(psoup__gpu *gpu, psoup_error *error);
/* Waits for the stream and tells what went wrong in it. */
psoup_status psoup__gpu_finish(psoup__gpu *gpu, psoup_error *error);
/* Every op reports what the driver says through these two. */
/* Keeps the first failure of a call named `what`; returns whether there was one. */
bool psoup__gpu_failed(psoup__gpu *gpu, psoup__cu_result result, const char *what);
/* "no GPU memory: 12 bytes", or what else the driver says. */
psoup_status psoup__gpu_fail(psoup__gpu *gpu, psoup__cu_result result, const char *what, psoup_error *error);
/* Makes sure that gpu->room has so many bytes; what was in it is lost. */
psoup_status psoup__gpu_make_room(psoup__gpu *gpu, size_t bytes, psoup_error *error);

/* ---- blocks.c ------------------------------------------------------------------------------------------- */

/* Makes sure of the room that a weight in blocks takes while it is multiplied. */
psoup_status psoup__gpu_reserve_matrix(psoup__gpu *gpu, const psoup__weight *weight, psoup_error *error);
/* A weight [out, in] in psoup__weight_dtype: itself, or in the room, until the next one. NULL after a failure. */
const void *psoup__gpu_matrix(psoup__gpu *gpu, const psoup__weight *weight);
/* y = (y +) x Wᵀ of few rows, x in 16 bits, straight from the blocks. False, and nothing done, where no kernel is made
 * for it. */
bool psoup__gpu_multiply_blocks(psoup__gpu *gpu, const psoup__weight *weight, float *y, const void *x, int32_t rows,
                                bool add);

/* ---- launch.c ------------------------------------------------------------------------------------------- */

/* Puts a kernel into the stream. Nothing happens where a dimension of the grid is 0. */
void psoup__gpu_launch(psoup__gpu *gpu, psoup__kernel kernel, psoup__grid grid, const void *args);
#define PSOUP__LAUNCH(gpu, name, grid, ...)                                                                \
    psoup__gpu_launch(gpu, PSOUP__KERNEL_##name, grid, &(psoup__##name##_args)__VA_ARGS__)
/* A grid of one dimension whose blocks walk over n elements, `each` to a thread and step. */
psoup__grid psoup__gpu_flat(const psoup__gpu *gpu, size_t n, size_t each);
/* A block to a row, of as many warps as a row's `items` give work to, a FLAT_THREADS at most. */
psoup__grid psoup__gpu_rows(int32_t rows, int32_t items);

/* Sums over rows, in one order: blocks of `each` rows write theirs to `sums` [blocks, width], and
 * gpu_row_sums_end adds those up. One block alone adds to `out` itself. They take what reserve(rows, width)
 * gives. */
typedef struct psoup__row_sums {
    float *out, *sums;
    int32_t each, blocks, width;
} psoup__row_sums;
psoup__row_sums psoup__gpu_row_sums(psoup__gpu *gpu, float *out, int32_t rows, int32_t width);
void psoup__gpu_row_sums_end(psoup__gpu *gpu, const psoup__row_sums *sums);

/* ---- upload.c --------------------------------------------------------------------------------------------- */

psoup_status psoup__upload_create(psoup__gpu *gpu, psoup_error *error);
void psoup__upload_free(psoup__gpu *gpu);
/* Host data for the kernels that follow, at most half of PSOUP__UPLOAD_BYTES: where it is on the device. It
 * stays there for as long as the same bytes again are staged after it. NULL after a failure. */
const void *psoup__gpu_stage(psoup__gpu *gpu, const void *host, size_t bytes);
/* Any number of bytes to device memory of the caller; the host's are free at once. More than half of
 * PSOUP__UPLOAD_BYTES may wait for pinned memory, which carries them faster than launches do. */
void psoup__gpu_write(psoup__gpu *gpu, psoup__cu_pointer out, const void *host, size_t bytes);

/* ---- attention_decode.c ----------------------------------------------------------------------------------- */

/* Attends for the spans of one query, and leaves out the others. False, and nothing done, where no kernel is made
 * for the shape. */
bool psoup__gpu_attention_decode(psoup__gpu *gpu, float *out, const float *q, const psoup__keys *keys,
                                 const psoup__spans *spans, const psoup__attention_shape *shape);

/* ---- the parts of the table, each file filling its own ------------------------------------------------- */

void psoup__gpu_fill_layer(psoup__ops *ops);
void psoup__gpu_fill_rows(psoup__ops *ops);
void psoup__gpu_fill_attention(psoup__ops *ops);
void psoup__gpu_fill_linear_mix(psoup__ops *ops);
void psoup__gpu_fill_loss(psoup__ops *ops);
void psoup__gpu_fill_policy(psoup__ops *ops);
void psoup__gpu_fill_sample(psoup__ops *ops);
void psoup__gpu_fill_advance(psoup__ops *ops);
void psoup__gpu_fill_adamw(psoup__ops *ops);

/* image.S: the kernels, each file's as a fatbin, 0 at the end. Where nvcc was missing there is one, "none". */
extern const void *const psoup__gpu_images[];

#endif
