/* psoup/common.h: status, errors, dtypes and the context that every handle is made from.
 *
 * Conventions of the whole interface
 *   - Functions that can fail return a psoup_status and take a `psoup_error *error` last. It may be
 *     NULL; otherwise it receives one line that names the file, the field or tensor, the value and
 *     what was expected. It is written on failure only.
 *   - A result comes back through a `**out`; it is owned by the caller and freed by the matching
 *     psoup_noun_free, which takes NULL. On failure *out is set to NULL. A pointer that a function
 *     returns directly is borrowed from the handle it was asked of.
 *   - Options are structs whose first field is their own size. Start from the INIT macro and set
 *     what you need; NULL means all defaults. A library newer than the caller's header gives the
 *     fields the caller did not know their defaults; a library older than it refuses fields it does
 *     not know unless they are zero.
 *   - One handle, one thread at a time; different handles in parallel. A context may be shared by
 *     handles that run in parallel. Exceptions are noted at the function.
 *   - The library keeps no global mutable state, never exits, never aborts on any input, and prints
 *     nothing except through the context's log function.
 */
#ifndef PSOUP_COMMON_H
#define PSOUP_COMMON_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PSOUP_VERSION_MAJOR 0
#define PSOUP_VERSION_MINOR 5
#define PSOUP_VERSION_PATCH 0

/* "0.5.0"; borrowed, static. */
const char *psoup_version(void);

typedef enum psoup_status {
    PSOUP_OK = 0,
    PSOUP_ERROR_ARGUMENT = 1,    /* the caller passed something the function cannot accept */
    PSOUP_ERROR_MEMORY = 2,      /* an allocation failed */
    PSOUP_ERROR_IO = 3,          /* the operating system refused to open, read or write */
    PSOUP_ERROR_FORMAT = 4,      /* a file or text is not what its format says */
    PSOUP_ERROR_UNSUPPORTED = 5, /* understood, but this library does not do it */
    PSOUP_ERROR_STATE = 6,       /* the handle is not in a state for this call */
    PSOUP_ERROR_CANCELLED = 7    /* a callback asked to stop */
} psoup_status;

/* "invalid argument", "out of memory", …; borrowed, static. */
const char *psoup_status_name(psoup_status status);

typedef struct psoup_error {
    psoup_status status;
    char message[1020]; /* one line, UTF-8, NUL-terminated */
} psoup_error;

typedef enum psoup_dtype {
    PSOUP_F32 = 0,
    PSOUP_F16 = 1,
    PSOUP_BF16 = 2,
    PSOUP_F64 = 3,
    PSOUP_I8 = 4,
    PSOUP_U8 = 5,
    PSOUP_I16 = 6,
    PSOUP_I32 = 7,
    PSOUP_I64 = 8,
    PSOUP_BOOL = 9,
    PSOUP_F8_E4M3 = 10, /* torch's float8_e4m3fn: no infinity, the largest value is 448 */
    PSOUP_F8_E5M2 = 11,
    PSOUP_Q8_0 = 12, /* ggml's: blocks of 32 values, 34 bytes: an f16 scale, then 32 signed bytes */
    PSOUP_INT8 = 13, /* since 0.4: how a loaded model may keep its linears, never a dtype of a tensor: blocks of 64 */
    PSOUP_NF4 = 14   /* values with an f32 scale, of signed bytes or of 4-bit normal floats: see psoup/model.h */
} psoup_dtype;

/* Bytes of one element; 0 for q8_0, whose 32 elements take 34 bytes together, for int8 and nf4, and for a value
 * that is no dtype. */
size_t psoup_dtype_size(psoup_dtype dtype);
/* "f32", "bf16", …; borrowed, static; "?" for a value that is no dtype. */
const char *psoup_dtype_name(psoup_dtype dtype);
/* The dtype of a name as above, any case; PSOUP_ERROR_ARGUMENT for another. */
psoup_status psoup_dtype_parse(const char *name, psoup_dtype *out, psoup_error *error);

/* Memory comes from these two. alloc returns `bytes` bytes aligned to `alignment` (a power of two
 * of at most 64), or NULL; free takes NULL. Both may be called from any thread. */
typedef struct psoup_allocator {
    void *user;
    void *(*alloc)(void *user, size_t bytes, size_t alignment);
    void (*free)(void *user, void *memory);
} psoup_allocator;

typedef enum psoup_log_level { PSOUP_LOG_INFO = 0, PSOUP_LOG_WARNING = 1 } psoup_log_level;
/* Receives one line without a newline. Called from the thread that made the call. */
typedef void (*psoup_log_fn)(void *user, psoup_log_level level, const char *line);

typedef struct psoup_context psoup_context;

typedef struct psoup_context_options {
    size_t size;
    const char *device; /* "cpu", "cuda" (the first GPU) or "cuda:N"; NULL means "cpu". A GPU is opened by
                         * what first uses it, a model or a merger: there it is told why it cannot be */
    int32_t threads;    /* worker threads; 0 means one per processor that the process may use */
    int32_t reserved;   /* 0 */
    const char *isa;    /* "generic", "avx2", "avx512" (x86-64), "neon" (aarch64): the instruction set
                         * of the CPU kernels; NULL means the best the machine has. Results carry the
                         * same bits for equal input, build and instruction set. */
    psoup_allocator allocator; /* all zero: malloc and free */
    psoup_log_fn log;          /* NULL: silence */
    void *log_user;
    void *stream; /* since 0.3: the CUstream (or cudaStream_t) that all work on the GPU is put into, which the
                   * caller keeps; NULL: each handle has one of its own */
} psoup_context_options;

#define PSOUP_CONTEXT_OPTIONS_INIT {.size = sizeof(psoup_context_options)}

/* Creates a context. It must outlive every handle made from it. options may be NULL. */
psoup_status psoup_context_create(const psoup_context_options *options, psoup_context **out,
                                  psoup_error *error);
void psoup_context_free(psoup_context *context);
/* The threads and the instruction set in use; the name is borrowed, static. */
int32_t psoup_context_threads(const psoup_context *context);
const char *psoup_context_isa(const psoup_context *context);

/* Long work reports through one of these: `done` of `total` units (total 0: unknown), with a short
 * label. Return non-zero to stop: the call then returns PSOUP_ERROR_CANCELLED. */
typedef int (*psoup_progress_fn)(void *user, const char *label, int64_t done, int64_t total);

#ifdef __cplusplus
}
#endif
#endif
