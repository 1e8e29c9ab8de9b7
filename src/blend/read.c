/* One source's part of a tensor, as f32 blocks. */
#include "blend/blend.h"
#include "blend/method.h"

#include <string.h>

void psoup__merge_read(psoup_context *context, const psoup__merge_input *input, size_t at, size_t n,
                       float *out) {
    const psoup__tensor *tensor = input->tensor;
    if (tensor == NULL)
        memset(out, 0, n * sizeof *out);
    else
        psoup__tensor_read(context, tensor, at, n, out);
    if (input->n_factors > 0)
        psoup__fold_into(context, out, (int64_t)(at / (size_t)input->columns),
                         (int64_t)(n / (size_t)input->columns), input->columns, input->factors,
                         input->weights, input->n_factors);
}
