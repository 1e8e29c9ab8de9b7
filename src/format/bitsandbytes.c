/* Linears that transformers saved in bitsandbytes' formats, nf4 and LLM.int8(). Names and meanings of the tensors:
 * bitsandbytes, functional.py (QuantState.as_dict, from_dict) and nn/modules.py (Linear8bitLt). */
#include "format/format.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const nf4_parts[] = {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
                                        ".quant_state.bitsandbytes__nf4"};
static const char *const int8_parts[] = {"SCB", "weight_format"};
enum { NESTED = 256, STATE_LIMIT = 1 << 16 };

static bool ends_with(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && strcmp(text + a - b, end) == 0;
}

bool psoup__bnb_part(const char *name, char *weight, size_t size) {
    for (size_t i = 0; i < sizeof nf4_parts / sizeof *nf4_parts; i++)
        if (ends_with(name, nf4_parts[i]))
            return (size_t)snprintf(weight, size, "%.*s", (int)(strlen(name) - strlen(nf4_parts[i])), name) < size;
    for (size_t i = 0; i < sizeof int8_parts / sizeof *int8_parts; i++)
        if (ends_with(name, int8_parts[i]))
            return (size_t)snprintf(weight, size, "%.*sweight", (int)(strlen(name) - strlen(int8_parts[i])), name) <
                   size;
    return false;
}

/* The tensor of such a name, where it is of that dtype and has so many elements. */
static psoup_status find(const psoup__weights *weights, const char *name, psoup_dtype dtype, size_t elements,
                         const psoup__tensor **out, psoup_error *error) {
    const char *path = psoup__weights_path(weights);
    size_t found = 0;
    *out = psoup__weights_find(weights, name);
    if (*out == NULL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s is missing", path, name);
    if (!psoup__tensor_elements(*out, &found) || found != elements || (*out)->dtype != dtype)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s has %zu elements of %s, expected %zu of %s",
                           path, name, found, psoup_dtype_name((*out)->dtype), elements, psoup_dtype_name(dtype));
    return PSOUP_OK;
}

/* The JSON that says how codes are to be read. */
static psoup_status read_state(psoup_context *context, const psoup__weights *weights, const char *name, int64_t out,
                               int64_t in, psoup__bnb *linear, psoup_error *error) {
    const char *path = psoup__weights_path(weights);
    const psoup__tensor *tensor = psoup__weights_find(weights, name);
    psoup_json *state = NULL;
    psoup_status status = PSOUP_ERROR_MEMORY;
    if (tensor == NULL || tensor->dtype != PSOUP_U8 || tensor->bytes > STATE_LIMIT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s: expected the bytes of a JSON object", path,
                           name);
    char *text = psoup__alloc(context, tensor->bytes + 1, 1, error);
    char *where = psoup__format(context, error, "%s: tensor %s", path, name);
    if (text == NULL || where == NULL)
        goto fail;
    psoup__tensor_bytes(tensor, 0, tensor->bytes, text);
    PSOUP__TRY(psoup_json_parse(text, tensor->bytes, where, &state, error));
    const psoup_json *shape = psoup_json_get(state, "shape");
    const char *kind = psoup_json_string(psoup_json_get(state, "quant_type"), "");
    const int64_t block = psoup_json_integer(psoup_json_get(state, "blocksize"), -1);
    const int64_t nested = psoup_json_integer(psoup_json_get(state, "nested_blocksize"), NESTED);
    const double offset = psoup_json_real(psoup_json_get(state, "nested_offset"), 0);
    status = PSOUP_ERROR_UNSUPPORTED;
    if (strcmp(kind, "nf4") != 0 || block != PSOUP__BLOCK || nested != NESTED || !(fabs(offset) < HUGE_VALF))
        psoup__fail(error, status,
                    "%s: tensor %s: \"%.40s\" in blocks of %lld, nested %lld, offset %g; expected nf4 in blocks of %d, "
                    "nested %d",
                    path, name, kind, (long long)block, (long long)nested, offset, PSOUP__BLOCK, NESTED);
    else if (psoup_json_size(shape) != 2 || psoup_json_integer(psoup_json_at(shape, 0), -1) != out ||
             psoup_json_integer(psoup_json_at(shape, 1), -1) != in)
        status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                             "%s: tensor %s: its shape is not [%lld, %lld], as config.json asks", path, name,
                             (long long)out, (long long)in);
    else
        status = PSOUP_OK;
    linear->offset = (float)offset;
fail:
    psoup_json_free(state);
    psoup__free(context, where);
    psoup__free(context, text);
    return status;
}

/* Refuses levels that are not nf4's. */
static psoup_status check_levels(psoup_context *context, const psoup__weights *weights, const char *name,
                                 psoup_error *error) {
    const psoup__tensor *tensor;
    float level[PSOUP__NF4_LEVELS];
    psoup_status status = find(weights, name, PSOUP_F32, PSOUP__NF4_LEVELS, &tensor, error);
    if (status != PSOUP_OK)
        return status;
    psoup__tensor_read(context, tensor, 0, PSOUP__NF4_LEVELS, level);
    for (int i = 0; i < PSOUP__NF4_LEVELS; i++)
        if (level[i] != psoup__nf4_level[i])
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: tensor %s: [%d] is %.9g; nf4's is %.9g",
                               psoup__weights_path(weights), name, i, (double)level[i],
                               (double)psoup__nf4_level[i]);
    return PSOUP_OK;
}

psoup_status psoup__bnb_find(psoup_context *context, const psoup__weights *weights, const char *weight,
                             psoup_dtype dtype, int64_t out, int64_t in, psoup__bnb *linear, psoup_error *error) {
    psoup_status status;
    char name[160];
    const psoup__tensor *tensor;
    const size_t n = (size_t)out * (size_t)in, blocks = psoup__block_count(n), stem = strlen(weight) - strlen("weight");
    *linear = (psoup__bnb){.dtype = dtype, .in = in};
    PSOUP__TRY(find(weights, weight, dtype == PSOUP_NF4 ? PSOUP_U8 : PSOUP_I8, psoup__block_bytes(dtype, n),
                    &linear->codes, error));
    if (dtype == PSOUP_INT8) {
        if (in % PSOUP__BLOCK != 0)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: tensor %s: int8 rows of %lld; expected a multiple of %d",
                               psoup__weights_path(weights), weight, (long long)in, PSOUP__BLOCK);
        snprintf(name, sizeof name, "%.*sSCB", (int)stem, weight);
        PSOUP__TRY(find(weights, name, PSOUP_F32, (size_t)out, &linear->scales, error));
        snprintf(name, sizeof name, "%.*sweight_format", (int)stem, weight);
        uint8_t format = 0; /* of rows, one after another; the others are a GPU's tiles */
        if (psoup__weights_find(weights, name) != NULL) {
            PSOUP__TRY(find(weights, name, PSOUP_U8, 1, &tensor, error));
            psoup__tensor_bytes(tensor, 0, 1, &format);
        }
        if (format != 0)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: tensor %s: %d; only 0, rows, is supported",
                               psoup__weights_path(weights), name, (int)format);
        return PSOUP_OK;
    }
    snprintf(name, sizeof name, "%s.quant_map", weight);
    PSOUP__TRY(check_levels(context, weights, name, error));
    snprintf(name, sizeof name, "%s%s", weight, nf4_parts[4]);
    PSOUP__TRY(read_state(context, weights, name, out, in, linear, error));
    snprintf(name, sizeof name, "%s.nested_absmax", weight);
    const bool nested = psoup__weights_find(weights, name) != NULL;
    if (nested) {
        PSOUP__TRY(find(weights, name, PSOUP_F32, blocks / NESTED + (blocks % NESTED != 0), &linear->nested, error));
        snprintf(name, sizeof name, "%s.nested_quant_map", weight);
        PSOUP__TRY(find(weights, name, PSOUP_F32, NESTED, &tensor, error));
        psoup__tensor_read(context, tensor, 0, NESTED, linear->level);
    }
    snprintf(name, sizeof name, "%s.absmax", weight);
    return find(weights, name, nested ? PSOUP_U8 : PSOUP_F32, blocks, &linear->scales, error);
fail:
    return status;
}

void psoup__bnb_read(psoup_context *context, const psoup__bnb *linear, size_t first, size_t n, uint8_t *codes,
                     float *scales) {
    const size_t block = first / PSOUP__BLOCK, blocks = psoup__block_count(n);
    psoup__tensor_bytes(linear->codes, psoup__block_bytes(linear->dtype, first), psoup__block_bytes(linear->dtype, n),
                        codes);
    if (linear->dtype == PSOUP_INT8) {
        const size_t in_row = (size_t)linear->in / PSOUP__BLOCK;
        float scale = 0;
        for (size_t i = 0; i < blocks; i++) {
            if (i == 0 || (block + i) % in_row == 0)
                psoup__tensor_read(context, linear->scales, (block + i) / in_row, 1, &scale);
            scales[i] = scale / 127.0f;
        }
        return;
    }
    if (linear->nested == NULL) {
        psoup__tensor_read(context, linear->scales, block, blocks, scales);
        return;
    }
    for (size_t i = 0; i < blocks; i++) { /* QLoRA's double quantisation: absmax in blocks of its own */
        uint8_t code;
        float absmax;
        psoup__tensor_bytes(linear->scales, block + i, 1, &code);
        psoup__tensor_read(context, linear->nested, (block + i) / NESTED, 1, &absmax);
        scales[i] = linear->level[code] * absmax + linear->offset;
    }
}
