/* One source's part of a tensor, as f32 blocks. */
#include "blend/blend.h"
#include "blend/method.h"

#include <string.h>

enum { PIECE = 1 << 14 }; /* bytes asked of a caller at a time */

/* Elements at … of a tensor that the caller gives piece by piece; q8_0 in whole blocks. */
static void read_pulled(psoup_context *context, const psoup__merge_input *input, size_t at, size_t n,
                        float *out) {
    psoup__tensor piece = *input->tensor;
    const psoup__merge_pull *pull = input->pull;
    bool blocks = piece.dtype == PSOUP_Q8_0;
    size_t unit = blocks ? PSOUP__Q8_BLOCK : 1;
    size_t size = blocks ? PSOUP__Q8_BYTES : psoup_dtype_size(piece.dtype);
    unsigned char bytes[PIECE];
    piece.data = bytes;
    while (n > 0) {
        size_t first = at / unit, skip = at % unit, most = PIECE / size * unit - skip;
        size_t take = n < most ? n : most, units = (skip + take + unit - 1) / unit;
        if (pull->read(pull->user, pull->index, (uint64_t)first * size, units * size, bytes) == 0) {
            psoup__tensor_read(context, &piece, skip, take, out);
        } else {
            memset(out, 0, take * sizeof *out);
            __atomic_store_n(pull->failed, 1, __ATOMIC_RELAXED);
        }
        at += take;
        n -= take;
        out += take;
    }
}

void psoup__merge_read(psoup_context *context, const psoup__merge_input *input, size_t at, size_t n,
                       float *out) {
    const psoup__tensor *tensor = input->tensor;
    if (tensor == NULL)
        memset(out, 0, n * sizeof *out);
    else if (input->pull != NULL)
        read_pulled(context, input, at, n, out);
    else
        psoup__tensor_read(context, tensor, at, n, out);
    if (input->n_factors > 0)
        psoup__fold_into(context, out, (int64_t)(at / (size_t)input->columns),
                         (int64_t)(n / (size_t)input->columns), input->columns, input->factors,
                         input->weights, input->n_factors);
}
