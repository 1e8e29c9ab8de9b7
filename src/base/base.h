/* src/base: the ground floor. Status, memory, tensors, JSON, files, threads, random words, matrix
 * products. Knows nothing of models. Everything above may include it; it includes nothing above.
 */
#ifndef PSOUP__BASE_H
#define PSOUP__BASE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "psoup/common.h"
#include "psoup/data.h"

/* ---- status.c ------------------------------------------------------------------------------ */

/* Writes the message, where `error` is not NULL, and returns `status`. Control characters in the
 * formatted text become '?', so that a hostile file name or key cannot break the line. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
psoup_status psoup__fail(psoup_error *error, psoup_status status, const char *format, ...);
psoup_status psoup__out_of_memory(psoup_error *error, size_t bytes); /* "out of memory: N bytes" */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
void psoup__log(psoup_context *context, psoup_log_level level, const char *format, ...);

/* Evaluates a call that returns a status; on failure keeps it in `status` and jumps to `fail`. */
#define PSOUP__TRY(call)                                                                           \
    do {                                                                                           \
        status = (call);                                                                           \
        if (status != PSOUP_OK)                                                                    \
            goto fail;                                                                             \
    } while (0)

/* Copies a caller's option struct over the library's defaults. `options` (may be NULL) starts with
 * its size_t size; `defaults` is this library's full struct of `full` bytes and receives the
 * result. Refuses a size of 0 and unknown non-zero tails, naming `what`. */
psoup_status psoup__options(void *defaults, size_t full, const void *options, const char *what,
                            psoup_error *error);

/* Whether all of a struct's words that are kept for later are 0, as they have to be. */
static inline bool psoup__all_zero(const void *words, size_t bytes) {
    const unsigned char *byte = (const unsigned char *)words; /* C++ reads this header too */
    unsigned char any = 0;
    for (size_t i = 0; i < bytes; i++)
        any |= byte[i];
    return any == 0;
}

/* ---- memory.c ------------------------------------------------------------------------------ */

/* count × size zeroed bytes, 64-byte aligned, from the context's allocator; NULL with *error set when
 * the product overflows or memory is out. count × size == 0 gives a unique pointer. */
void *psoup__alloc(psoup_context *context, size_t count, size_t size, psoup_error *error);
/* The same, of any values: for what is written whole before it is read. */
void *psoup__alloc_unset(psoup_context *context, size_t count, size_t size, psoup_error *error);
void psoup__free(psoup_context *context, void *memory); /* takes NULL */
char *psoup__strdup(psoup_context *context, const char *text, psoup_error *error);
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
char *psoup__format(psoup_context *context, psoup_error *error, const char *format, ...);
/* Makes room for at least `need` elements in *array, whose capacity is *capacity (doubling). */
psoup_status psoup__reserve(psoup_context *context, void *array /* T ** */, size_t *capacity,
                            size_t need, size_t size, psoup_error *error);
bool psoup__multiply(size_t a, size_t b, size_t *product); /* false on overflow */
bool psoup__add(size_t a, size_t b, size_t *sum);

/* A growing text or byte string. After a failed append `failed` stays set and appends do nothing. */
typedef struct psoup__buffer {
    psoup_context *context;
    char *data; /* NUL-terminated once anything was appended; NULL before */
    size_t length, capacity;
    bool failed;
} psoup__buffer;
void psoup__buffer_append(psoup__buffer *buffer, const void *data, size_t length);
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void psoup__buffer_print(psoup__buffer *buffer, const char *format, ...);
void psoup__buffer_free(psoup__buffer *buffer);

/* A map from byte strings to int64; open addressing, keys copied. */
typedef struct psoup__map psoup__map;
psoup_status psoup__map_create(psoup_context *context, size_t expected, psoup__map **out,
                               psoup_error *error);
/* Sets key to value; where the key is present, overwrites it. *fresh (may be NULL) says which. */
psoup_status psoup__map_set(psoup__map *map, const void *key, size_t length, int64_t value,
                            bool *fresh, psoup_error *error);
bool psoup__map_get(const psoup__map *map, const void *key, size_t length, int64_t *value);
void psoup__map_free(psoup__map *map);

/* ---- utf8.c -------------------------------------------------------------------------------- */

/* Reads one character of text[0, length), length > 0: returns its bytes. What is not UTF-8 reads as
 * U+FFFD, one for each maximal ill-formed part (Unicode 15, section 3.9; so does Python). */
size_t psoup__utf8_next(const char *text, size_t length, uint32_t *code);
size_t psoup__utf8_put(uint32_t code, char out[4]); /* returns its bytes */
bool psoup__is_utf8(const char *text);
/* Whether the bytes are U+FFFD itself, and not what is read as it. */
bool psoup__is_replacement(const char *bytes, size_t length);

/* ---- tensor.c ------------------------------------------------------------------------------ */

/* Where bytes come from that are not in memory: a file, or the caller. */
typedef struct psoup__pull {
    /* Bytes offset … offset + bytes − 1 of item `index`; 0, or it cannot. From any thread. */
    int (*read)(void *user, size_t index, uint64_t offset, size_t bytes, void *out);
    void *user;
    size_t index;
    int *failed; /* set to 1, from any thread, when it could not: the bytes are then zeros */
} psoup__pull;

#define PSOUP__MAX_RANK 8
typedef struct psoup__tensor {
    psoup_dtype dtype;
    int rank;
    int64_t shape[PSOUP__MAX_RANK];
    size_t bytes;
    const void *data; /* any alignment when it points into a file; NULL: by `pull` */
    int32_t heads; /* 0: the rows lie in order. Else each of so many heads' d rows lie as llama.cpp keeps
                    * rotated ones: row i · d/2 + j of a head at place 2j + i. Only psoup__tensor_read
                    * and psoup__tensor_row know: who takes `data` as it stands must refuse such a tensor. */
    const psoup__pull *pull;
    uint64_t at; /* its first byte, in what `pull` reads */
} psoup__tensor;
/* Whether there is one: a struct of zeros stands for a tensor that is absent. */
static inline bool psoup__tensor_is_there(const psoup__tensor *tensor) {
    return tensor->data != NULL || tensor->pull != NULL;
}

enum { PSOUP__Q8_BLOCK = 32, PSOUP__Q8_BYTES = 34 }; /* elements and bytes of a q8_0 block */

/* The bytes of so many elements; false when they overflow, or are no whole blocks of q8_0. Not of int8 and nf4. */
bool psoup__dtype_bytes(psoup_dtype dtype, size_t elements, size_t *bytes);
/* Whether psoup__to_f32 and psoup__from_f32 know it. */
bool psoup__dtype_is_float(psoup_dtype dtype);
/* The largest f32 that rounds to a finite value of a float dtype. */
float psoup__dtype_largest(psoup_dtype dtype);

/* Product of the shape; false when it is negative or overflows. */
bool psoup__tensor_elements(const psoup__tensor *tensor, size_t *elements);

/* Bytes offset … offset + bytes − 1 as they lie; zeros where `pull` could not give them, which it remembers. */
void psoup__tensor_bytes(const psoup__tensor *tensor, size_t offset, size_t bytes, void *out);
/* out[n] = elements at … at + n − 1 of a float tensor, in row-major order whatever order its rows lie
 * in; any range, of q8_0 too. From any thread. */
void psoup__tensor_read(psoup_context *context, const psoup__tensor *tensor, size_t at, size_t n,
                        float *out);
/* Where a row of the tensor lies in its data, counted in rows. */
size_t psoup__tensor_row(const psoup__tensor *tensor, size_t row);

/* Conversions of n elements; source and destination of any alignment, not overlapping. Both take the
 * dtypes of psoup__dtype_is_float, q8_0 in whole blocks; from_f32 rounds once, to nearest even (F64:
 * exact; F8: beyond the largest value as torch, e4m3 to NaN and e5m2 to infinity; Q8_0 as ggml's
 * reference, see convert.c). Vectorised per instruction set, the same bits on all. */
void psoup__to_f32(psoup_context *context, float *out, const void *in, psoup_dtype dtype, size_t n);
void psoup__from_f32(psoup_context *context, void *out, psoup_dtype dtype, const float *in,
                     size_t n);

/* ---- file.c, writer.c, jsonl.c ------------------------------------------------------------------------- */

/* A regular file that is open for reading. What others do to it meanwhile is found out: where it was cut short
 * a read fails, and psoup__file_check tells. */
typedef struct psoup__file {
    const unsigned char *data; /* [length] once it is mapped; NULL when length is 0 */
    size_t length;             /* when it was opened, as what follows: */
    int64_t seconds, nanoseconds; /* its time */
    uint64_t device, inode;
    char *path;
    bool open; /* fd is; no longer once it is mapped */
    int fd;
    psoup__pull pull;
    int failed, reason; /* a read did; errno, 0: the file was too short */
    uint64_t lost;      /* the first byte that it lacked */
} psoup__file;
psoup_status psoup__file_open(psoup_context *context, const char *path, psoup__file *out,
                              psoup_error *error);
/* From any thread; the bytes are zeros where it fails. */
bool psoup__file_at(psoup__file *file, uint64_t offset, size_t bytes, void *out);
/* The same as a pull; the file must stay where it is from now on. */
const psoup__pull *psoup__file_pull(psoup__file *file);
/* Refuses a file that is not what it was when it was opened, or could not be read: "PATH: PART…". */
psoup_status psoup__file_check(const psoup__file *file, const char *part, psoup_error *error);
/* A byte that is known to be missing: of a read that failed, or behind the file's new end; UINT64_MAX. */
uint64_t psoup__file_lost(const psoup__file *file);
/* Maps the whole file read-only, instead of keeping it open. Whoever truncates it then ends the program with a
 * SIGBUS, so it is for files of our own, and for weights that are read in place again and again. */
psoup_status psoup__file_map(psoup__file *file, psoup_error *error);
void psoup__file_close(psoup_context *context, psoup__file *file);
/* A whole file in memory, NUL-terminated past its length, decompressed where the name ends in
 * ".zst"; refuses more than `limit` bytes. Free *out with psoup__free. */
psoup_status psoup__file_read(psoup_context *context, const char *path, size_t limit, char **out,
                              size_t *length, psoup_error *error);
/* A file read in order, decompressed where its name ends in ".zst". */
typedef struct psoup__input psoup__input;
psoup_status psoup__input_open(psoup_context *context, const char *path, psoup__input **out,
                               psoup_error *error);
/* *got receives how many bytes were read: 0 only at the end. */
psoup_status psoup__input_read(psoup__input *input, void *out, size_t capacity, size_t *got,
                               psoup_error *error);
void psoup__input_free(psoup__input *input);
bool psoup__file_exists(const char *path);
bool psoup__is_directory(const char *path);
psoup_status psoup__make_directories(const char *path, psoup_error *error); /* like mkdir -p */
char *psoup__path_join(psoup_context *context, const char *directory, const char *name,
                       psoup_error *error);

/* Output that appears under its name only when it is whole: written beside, synced, renamed (the
 * directory synced too). Compressed where the name ends in ".zst". */
typedef struct psoup__writer psoup__writer;
psoup_status psoup__writer_create(psoup_context *context, const char *path, psoup__writer **out,
                                  psoup_error *error);
psoup_status psoup__writer_write(psoup__writer *writer, const void *data, size_t length,
                                 psoup_error *error);
psoup_status psoup__writer_commit(psoup__writer *writer, psoup_error *error);
void psoup__writer_free(psoup__writer *writer); /* removes the temporary file if not committed */

/* Of a JSON Lines file that is appended to: syncs it and tells its length; cuts it back to such a length.
 * What has none, a pipe, is of length −1, and is left alone. */
psoup_status psoup__jsonl_sync(psoup_jsonl_writer *writer, int64_t *length, psoup_error *error);
psoup_status psoup__jsonl_cut(psoup_jsonl_writer *writer, int64_t length, psoup_error *error);

/* ---- thread.c ------------------------------------------------------------------------------ */

/* Calls fn(arg, task, worker) for every task in [0, tasks), each once, from up to
 * psoup_context_threads(context) workers numbered from 0, and returns when all are done. While the
 * pool is in use, by another thread or by the job whose task this is called from, the caller's
 * thread does it all as worker 0. So fn must give the same result whichever worker takes which task.
 * Tasks begin in their order: one may wait for what an earlier one does. */
typedef void (*psoup__task_fn)(void *arg, size_t task, int worker);
void psoup__parallel(psoup_context *context, size_t tasks, psoup__task_fn fn, void *arg);

/* ---- philox.c ------------------------------------------------------------------------------ */

/* Philox4x32-10 (Salmon et al. 2011). Word `position` of stream `sequence` under `seed`, as cuRAND's
 * curand_init(seed, sequence, position) followed by curand() gives it. */
uint32_t psoup__philox_word(uint64_t seed, uint64_t sequence, uint64_t position);
void psoup__philox_block(uint64_t seed, uint64_t sequence, uint64_t block, uint32_t out[4]);
/* (word >> 8) · 2⁻²⁴, in [0, 1). */
static inline float psoup__uniform(uint32_t word) {
    return (float)(word >> 8) * 0x1p-24f;
}
/* A stream read in order. */
typedef struct psoup__random {
    uint64_t seed, sequence, position;
} psoup__random;
uint32_t psoup__random_word(psoup__random *random);
float psoup__random_uniform(psoup__random *random);           /* [0, 1) */
float psoup__random_normal(psoup__random *random);            /* Box–Muller, two words each */
/* The next n of them, from an even position: a block of four words is made once for two. */
void psoup__random_normals(psoup__random *random, float *out, size_t n);
uint32_t psoup__random_below(psoup__random *random, uint32_t n); /* [0, n), unbiased */
void psoup__random_shuffle(psoup__random *random, int32_t *items, size_t n);

/* ---- isa.c --------------------------------------------------------------------------------- */

/* The kernel sources (src/base/gemm_kernel.c, blocks_kernel.c, convert.c; src/cpu; src/blend/kernels.c) are compiled
 * once per instruction set with -DPSOUP__VARIANT=generic|avx2|avx512; each such file exports only
 * names made with PSOUP__NAME, so that psoup__gemm_kernel becomes psoup__gemm_kernel_avx2. */
typedef enum psoup__isa {
    PSOUP__ISA_GENERIC, /* the architecture's baseline; on aarch64 that includes NEON */
    PSOUP__ISA_AVX2,
    PSOUP__ISA_AVX512,
    PSOUP__ISA_COUNT
} psoup__isa;
psoup__isa psoup__isa_of(const psoup_context *context);
#define PSOUP__PASTE2(a, b) a##_##b
#define PSOUP__PASTE(a, b) PSOUP__PASTE2(a, b)
#define PSOUP__NAME(name) PSOUP__PASTE(name, PSOUP__VARIANT)

/* ---- blocks.c ------------------------------------------------------------------------------ */

/* A matrix in blocks: 64 neighbouring elements in row-major order, whatever its rows, share one f32 scale; the
 * last block may be shorter. The value of an element, rounded once:
 *
 *     NF4    level[code] · scale; codes of 4 bits, that of an even element in its byte's high half; scale = max|x|
 *     INT8   code · scale; codes are signed bytes; scale = max|x| / 127
 *
 * NF4 is the 4-bit NormalFloat of Dettmers et al. 2023 (arXiv 2305.14314, appendix E), its bytes and scales those
 * of bitsandbytes' quant_type "nf4" with blocksize 64. INT8's codes are those of bitsandbytes' int8_vectorwise_quant
 * with every block for a row; so a row-wise scale (LLM.int8(), arXiv 2208.07339) can be written with them too. */
enum { PSOUP__BLOCK = 64, PSOUP__NF4_LEVELS = 16 };
extern const float psoup__nf4_level[PSOUP__NF4_LEVELS]; /* ascending */
typedef struct psoup__blocks {
    psoup_dtype dtype;    /* INT8 or NF4 */
    const uint8_t *codes; /* [psoup__block_bytes] */
    const float *scales;  /* [psoup__block_count] */
} psoup__blocks;
static inline bool psoup__dtype_is_blocks(psoup_dtype dtype) {
    return dtype == PSOUP_INT8 || dtype == PSOUP_NF4;
}
/* Of n elements: bytes of their codes, and scales. */
static inline size_t psoup__block_bytes(psoup_dtype dtype, size_t n) {
    return dtype == PSOUP_NF4 ? n / 2 + n % 2 : n;
}
static inline size_t psoup__block_count(size_t n) {
    return n / PSOUP__BLOCK + (n % PSOUP__BLOCK != 0);
}
static inline float psoup__block_value(const psoup__blocks *blocks, size_t at) {
    const float scale = blocks->scales[at / PSOUP__BLOCK];
    if (blocks->dtype == PSOUP_INT8)
        return (float)(signed char)blocks->codes[at] * scale;
    return psoup__nf4_level[blocks->codes[at / 2] >> (at % 2 ? 0 : 4) & 15] * scale;
}
/* Writes the blocks of n elements to codes and scales. A block that holds a NaN or an infinity becomes NaN; one
 * of INT8 whose scale would be subnormal, zeros. */
void psoup__blocks_write(psoup_context *context, psoup_dtype dtype, const float *in, size_t n, uint8_t *codes,
                         float *scales);
/* out[n] = elements at … at + n − 1. */
void psoup__blocks_read(psoup_context *context, const psoup__blocks *blocks, size_t at, size_t n, float *out);

/* ---- gemm.c -------------------------------------------------------------------------------- */

/* C[m, n] = (accumulate ? C : 0) + A[m, k] · B[k, n]
 *
 * Every element is summed over k in ascending order by one thread, starting from 0 or from the old C:
 * its bits do not depend on m, on the row's place, on the threads, on packing ahead, nor on the
 * values in other rows. A NaN or infinity stays in its row (of A) or column (of B). k == 0 is legal.
 */
typedef struct psoup__gemm_room psoup__gemm_room;
typedef struct psoup__gemm_b { /* B packed once, in its own dtype */
    psoup_dtype dtype;
    int64_t k, n;
    void *panels;
    psoup__gemm_room *room; /* where they lie; NULL: their own memory */
} psoup__gemm_b;

typedef struct psoup__gemm_args {
    int64_t m, n, k;
    float *c; /* row i at c + (c_rows ? c_rows[i] : i) · c_stride; columns contiguous */
    int64_t c_stride;
    const int32_t *c_rows; /* NULL, or m distinct row numbers */
    bool accumulate;
    const float *a; /* element (i, p) at a[(a_rows ? a_rows[i] : i) · a_row + p · a_col] */
    int64_t a_row, a_col;
    const int32_t *a_rows; /* gathers along m; NULL: 0 … m−1 */
    const int32_t *a_depth; /* gathers along k: element (i, p) reads p' = a_depth[p]; NULL: p */
    const float *a_scale; /* multiplies A: row i by a_scale[row of A · a_scale_stride]; NULL: 1 */
    int64_t a_scale_stride;
    float alpha;           /* multiplies A too (with a_scale: the product first); usually 1 */
    bool a_scale_by_depth; /* a_scale is indexed by the depth (p' above), not by the row */
    const void *b; /* element (p, j) at b[(b_depth ? b_depth[p] : p) · b_row + j · b_col], in b_dtype */
    psoup_dtype b_dtype; /* F32, F16, BF16; INT8 or NF4 with b the codes of a matrix, and: */
    const float *b_scales; /* the scales of its blocks. The product has the bits of that with the blocks' values */
    int64_t b_row, b_col;
    const int32_t *b_depth;
    const psoup__gemm_b *packed; /* instead of b when not NULL */
} psoup__gemm_args;
void psoup__gemm(psoup_context *context, const psoup__gemm_args *args);
/* n products that have nothing to do with each other, to the same bits: of few rows all at once, so that threads wait
 * for one another once. */
void psoup__gemm_each(psoup_context *context, const psoup__gemm_args *args, size_t n);

/* Packs B (element (p, j) at b[p · b_row + j · b_col]) for later calls. */
psoup_status psoup__gemm_pack(psoup_context *context, const void *b, psoup_dtype dtype, int64_t k,
                              int64_t n, int64_t b_row, int64_t b_col, psoup__gemm_b **out,
                              psoup_error *error);
void psoup__gemm_b_free(psoup_context *context, psoup__gemm_b *packed);
/* Memory for several that are read in turn: one piece, which large pages hold, where theirs are too small for one
 * (generation of 16 sequences 1.05 times as fast; dim 256, Zen 4). It goes with the last of them once its maker has
 * dropped it. */
psoup_status psoup__gemm_room_create(psoup_context *context, size_t bytes, psoup__gemm_room **out, psoup_error *error);
void psoup__gemm_room_drop(psoup_context *context, psoup__gemm_room *room);
psoup_status psoup__gemm_pack_in(psoup_context *context, psoup__gemm_room *room /* with so many bytes left */,
                                 const void *b, psoup_dtype dtype, int64_t k, int64_t n, int64_t b_row, int64_t b_col,
                                 psoup__gemm_b **out, psoup_error *error);
/* Bytes that packing a [k, n] takes. */
size_t psoup__gemm_pack_bytes(const psoup_context *context, psoup_dtype dtype, int64_t k, int64_t n);

/* ---- context.c ----------------------------------------------------------------------------- */

struct psoup_context {
    psoup_allocator allocator;
    psoup_log_fn log;
    void *log_user;
    int threads;
    psoup__isa isa;
    int gpu;          /* the device's number, −1: the CPU */
    void *gpu_stream; /* the caller's CUstream, or NULL */
    struct psoup__pool *pool;   /* thread.c */
    struct psoup__gemm_space *gemm; /* gemm.c: packing buffers, sized at creation */
    struct psoup_merge_device *merge_device; /* psoup/merge.h: who works on the caller's device; or NULL */
};
struct psoup__gemm_space *psoup__gemm_space_create(psoup_context *context, psoup_error *error);
void psoup__gemm_space_free(psoup_context *context, struct psoup__gemm_space *space);

#endif
