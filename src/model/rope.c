/* Rotary positions: inverse frequencies and their scalings as transformers 4.46 computes them
 * (modeling_rope_utils.py), with its roundings to f32, so that far positions agree too. */
#include "model/model.h"

#include <math.h>

static const double PI = 3.14159265358979323846;

static float clamp01(float x) {
    return x < 0 ? 0 : x > 1 ? 1 : x;
}

/* Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended. */
static float llama3(const psoup_model_config *config, float frequency) {
    double length = config->rope_original_max_position;
    double low = config->rope_low_freq_factor, high = config->rope_high_freq_factor;
    double wavelength = 2 * PI / frequency;
    if (wavelength < length / high)
        return frequency;
    if (wavelength > length / low)
        return frequency / config->rope_factor;
    double smooth = (length / wavelength - low) / (high - low);
    return (float)((1 - smooth) * frequency / config->rope_factor + smooth * frequency);
}

/* YaRN (Peng et al. 2023): the dimension that turns `rotations` times within the trained length, which is
 * original_max_position_embeddings where that is given (transformers 4.46 overlooked it; later ones read
 * it) and max_position_embeddings where not. */
static double correction_dimension(const psoup_model_config *config, double rotations) {
    return config->head_dim * log(config->rope_original_max_position / (rotations * 2 * PI)) /
           (2 * log(config->rope_theta));
}

static float yarn(const psoup_model_config *config, float frequency, int32_t pair) {
    double low = floor(correction_dimension(config, config->rope_beta_fast));
    double high = ceil(correction_dimension(config, config->rope_beta_slow));
    low = low > 0 ? low : 0;
    high = high < config->head_dim - 1 ? high : config->head_dim - 1;
    if (low == high)
        high += 0.001;
    float keep = 1 - clamp01((float)((pair - low) / (high - low)));
    return frequency / config->rope_factor * (1 - keep) + frequency * keep;
}

static float inverse_frequency(const psoup_model_config *config, int32_t pair) {
    double base = config->rope_theta, width = config->head_dim;
    if (config->rope_scaling == PSOUP_ROPE_DYNAMIC && width > 2) {
        /* NTK at the length of the configuration, the longest that is ever run. */
        double factor = config->rope_factor, stretch = 1;
        base *= pow(factor * stretch - (factor - 1), width / (width - 2));
    }
    float exponent = (float)(2 * pair) / (float)width;
    float frequency = 1.0f / (float)pow(base, exponent);
    switch (config->rope_scaling) {
    case PSOUP_ROPE_LINEAR:
        return frequency / config->rope_factor;
    case PSOUP_ROPE_LLAMA3:
        return llama3(config, frequency);
    case PSOUP_ROPE_YARN:
        return yarn(config, frequency, pair);
    default:
        return frequency;
    }
}

/* table (host) [positions, head_dim]: head_dim/2 cosines, then as many sines, times the scaling's
 * attention factor. */
static void fill_table(const psoup_model_config *config, float *table, int32_t positions) {
    double scale = 1;
    if (config->rope_scaling == PSOUP_ROPE_YARN)
        scale = config->rope_attention_factor > 0 ? config->rope_attention_factor
                                                  : 0.1 * log(config->rope_factor) + 1;
    int32_t half = config->head_dim / 2;
    for (int32_t pair = 0; pair < half; pair++) {
        float frequency = inverse_frequency(config, pair);
        for (int32_t position = 0; position < positions; position++) {
            float angle = frequency * (float)position;
            float *row = table + (size_t)position * (size_t)config->head_dim;
            row[pair] = (float)(cos(angle) * scale);
            row[half + pair] = (float)(sin(angle) * scale);
        }
    }
}

psoup_status psoup__model_positions(psoup_model *model, int32_t n, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    int32_t longest = model->config.max_position_embeddings, positions = 512;
    if (n <= model->positions)
        return PSOUP_OK;
    while (positions < n)
        positions = positions < longest / 2 ? 2 * positions : n;
    positions = positions < longest ? positions : longest;
    size_t cells = (size_t)positions * (size_t)model->config.head_dim;
    float *device = NULL, *table = psoup__alloc(model->context, cells, sizeof *table, error);
    if (table)
        device = ops->alloc(model->be, cells, sizeof *device, error);
    if (device) {
        fill_table(&model->config, table, positions);
        ops->write(model->be, device, table, cells * sizeof *table);
        ops->release(model->be, model->cos_sin);
        model->cos_sin = device;
        model->positions = positions;
    }
    psoup__free(model->context, table);
    return device ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}
