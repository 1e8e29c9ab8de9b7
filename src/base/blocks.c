/* src/base/blocks.c: weights in blocks, in pieces for the threads. */
#include "base/blocks.h"

/* QLoRA, appendix E: the normal distribution's quantiles, those of its negative and of its positive half, scaled to
 * [−1, 1] and with a zero of their own. */
const float psoup__nf4_level[PSOUP__NF4_LEVELS] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

const psoup__block_kernels *psoup__block_kernels_of(const psoup_context *context) {
#if defined(__x86_64__)
    if (context->isa == PSOUP__ISA_AVX512)
        return &psoup__block_kernels_avx512;
    if (context->isa == PSOUP__ISA_AVX2)
        return &psoup__block_kernels_avx2;
#endif
    return &psoup__block_kernels_generic;
}

enum { PIECE = 1 << 16 }; /* elements: whole blocks */

typedef struct pieces {
    const psoup__block_kernels *kernels;
    psoup__blocks blocks;
    const float *in; /* to blocks when not NULL */
    uint8_t *codes;
    float *scales, *out;
    size_t at, n;
} pieces;

static void one_piece(void *arg, size_t task, int worker) {
    const pieces *p = arg;
    const size_t first = task * PIECE, n = p->n - first < PIECE ? p->n - first : PIECE;
    if (p->in != NULL)
        p->kernels->write(p->blocks.dtype, p->in + first, n, p->codes + psoup__block_bytes(p->blocks.dtype, first),
                          p->scales + first / PSOUP__BLOCK);
    else
        p->kernels->read(&p->blocks, p->at + first, n, p->out + first);
}

void psoup__blocks_write(psoup_context *context, psoup_dtype dtype, const float *in, size_t n, uint8_t *codes,
                         float *scales) {
    pieces p = {.kernels = psoup__block_kernels_of(context), .blocks = {.dtype = dtype}, .in = in,
                .codes = codes, .scales = scales, .n = n};
    psoup__parallel(context, n / PIECE + (n % PIECE != 0), one_piece, &p);
}

void psoup__blocks_read(psoup_context *context, const psoup__blocks *blocks, size_t at, size_t n, float *out) {
    pieces p = {.kernels = psoup__block_kernels_of(context), .blocks = *blocks, .out = out, .at = at, .n = n};
    psoup__parallel(context, n / PIECE + (n % PIECE != 0), one_piece, &p);
}
