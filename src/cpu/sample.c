/* Drawing tokens. Nothing is sorted and nothing allocated: where the cumulative probability crosses a
 * target in descending order of the logits is found by histograms, the first over the distance from the
 * maximum, the next ones over the bits of the few logits in the bin that was hit. */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { CHUNK = 2048, BIN_BITS = 11, BINS = 1 << BIN_BITS };

typedef struct sample_row {
    const float *logits; /* [vocab] */
    size_t vocab;
    const psoup__draw *draw;
    float max;      /* of the logits not banned */
    uint32_t floor; /* keys below it were filtered out */
} sample_row;

/* An integer that orders as the float does; −0 is 0. */
static inline uint32_t key_of(float x) {
    const uint32_t bits = float_bits(x + 0.0f);
    return bits ^ ((uint32_t)-(int32_t)(bits >> 31) | 0x80000000u);
}

static inline float key_float(uint32_t key) {
    return bits_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

static inline float mass_of(const sample_row *row, float logit) {
    return exp_float((logit - row->max) / row->draw->temperature);
}

/* A bin of the first histogram: 1/64 of the logarithm of a mass, the last all that is below 2⁻⁴⁶. It never
 * falls as the logit falls. */
static inline uint32_t bin_of(const sample_row *row, float logit) {
    const float bin = (row->max - logit) * (64 / row->draw->temperature);
    return bin < BINS - 1 ? (uint32_t)(int32_t)bin : BINS - 1;
}

/* The `n` logits from `start` on, the banned ones −∞. */
static const float *chunk_of(const sample_row *row, size_t start, float room[CHUNK], size_t *n) {
    *n = least(CHUNK, row->vocab - start);
    if (row->draw->n_banned == 0)
        return row->logits + start;
    memcpy(room, row->logits + start, *n * sizeof *room);
    for (int32_t i = 0; i < row->draw->n_banned; i++) {
        const size_t banned = (size_t)row->draw->banned[i];
        if (banned >= start && banned - start < *n)
            room[banned - start] = -__builtin_inff();
    }
    return room;
}

/* Finds the maximum and where it is first; −1 when a logit is NaN or the maximum is not finite. */
static int32_t argmax(sample_row *row) {
    int32_t best = -1;
    row->max = -__builtin_inff();
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK];
        size_t n, i = 0;
        const float *logits = chunk_of(row, start, room, &n);
        int nan = 0;
        for (size_t j = 0; j < n; j++)
            nan |= row->logits[start + j] != row->logits[start + j];
        if (nan)
            return -1;
        vec most = splat(row->max);
        for (; i + LANES <= n; i += LANES)
            most = vec_max(load(logits + i), most);
        float max = max_lanes(most);
        for (; i < n; i++)
            max = logits[i] > max ? logits[i] : max;
        if (max > row->max) {
            for (i = 0; logits[i] != max;)
                i++;
            row->max = max;
            best = (int32_t)(start + i);
        }
    }
    return row->max <= 3.402823466e38f ? best : -1;
}

/* Sets hist[bin] to the mass, or the count, of every token that was not filtered out. Neighbours seldom
 * fall into the same bin, so that one sum need not wait for the other. */
static void first_histogram(const sample_row *row, bool count, double hist[BINS]) {
    memset(hist, 0, BINS * sizeof *hist);
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK], mass[CHUNK];
        uint32_t bin[CHUNK];
        size_t n;
        const float *logits = chunk_of(row, start, room, &n);
        for (size_t i = 0; i < n; i++) {
            bin[i] = bin_of(row, logits[i]);
            mass[i] = count ? 1 : mass_of(row, logits[i]);
            mass[i] = key_of(logits[i]) >= row->floor ? mass[i] : 0;
        }
        for (size_t i = 0; i < n; i++)
            hist[bin[i]] += mass[i];
    }
}

/* Keys low … high. */
typedef struct key_range {
    uint32_t low, high;
} key_range;

/* The keys of a bin that has any. */
static key_range range_of(const sample_row *row, uint32_t bin) {
    key_range range = {~0u, 0};
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK];
        size_t n;
        const float *logits = chunk_of(row, start, room, &n);
        for (size_t i = 0; i < n; i++) {
            const uint32_t key = key_of(logits[i]);
            const bool in = bin_of(row, logits[i]) == bin && key >= row->floor;
            const uint32_t low = in ? key : ~0u, high = in ? key : 0;
            range.low = low < range.low ? low : range.low;
            range.high = high > range.high ? high : range.high;
        }
    }
    return range;
}

/* Sets hist[(high − key) >> shift] to the mass, or the count, of the keys of the range. They are few: eight
 * flags at a time are looked at, and so branches mispredicted seldom. */
static void range_histogram(const sample_row *row, bool count, key_range range, int shift,
                            double hist[BINS]) {
    memset(hist, 0, BINS * sizeof *hist);
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK];
        uint8_t in[CHUNK + 8] = {0};
        size_t n;
        const float *logits = chunk_of(row, start, room, &n);
        for (size_t i = 0; i < n; i++)
            in[i] = range.high - key_of(logits[i]) <= range.high - range.low;
        for (size_t i = 0; i < n; i += 8) {
            uint64_t flags;
            memcpy(&flags, in + i, sizeof flags);
            for (size_t j = i; flags; j++, flags >>= 8)
                if (flags & 1)
                    hist[(range.high - key_of(logits[j])) >> shift] +=
                        count ? 1 : mass_of(row, logits[j]);
        }
    }
}

typedef struct sample_cut {
    uint32_t key; /* the largest whose mass, with that of all larger keys, exceeds the target */
    double above; /* the mass of the larger keys */
    double here;  /* the mass of the key, all its tokens together */
} sample_cut;

/* The first bin with which the mass exceeds the target, or the last with any, when rounding keeps the sum
 * from it. */
static uint32_t cross(sample_cut *cut, const double hist[BINS], double target) {
    uint32_t bin = 0, chosen = 0;
    double sum = cut->above;
    for (; bin < BINS && sum <= target; bin++) {
        chosen = hist[bin] > 0 ? bin : chosen;
        cut->above = hist[bin] > 0 ? sum : cut->above;
        sum += hist[bin];
    }
    cut->here = hist[chosen];
    return chosen;
}

/* `first` is the first histogram. */
static sample_cut find_cut(const sample_row *row, bool count, const double first[BINS],
                           double target) {
    sample_cut cut = {0};
    key_range range = range_of(row, cross(&cut, first, target));
    while (range.low < range.high) {
        double hist[BINS];
        const int bits = 32 - __builtin_clz(range.high - range.low);
        const int shift = bits > BIN_BITS ? bits - BIN_BITS : 0;
        range_histogram(row, count, range, shift, hist);
        range.high -= cross(&cut, hist, target) << shift;
        const uint32_t most = (1u << shift) - 1;
        range.low = range.high - range.low > most ? range.high - most : range.low;
    }
    cut.key = range.high;
    return cut;
}

/* The first token in descending probability, ties by ascending id, whose cumulative mass exceeds
 * `target`, but none after the first `ties` of key `last`. */
static int32_t find_token(const sample_row *row, const double first[BINS], double target,
                          uint32_t last, double ties) {
    const sample_cut cut = find_cut(row, false, first, target);
    const double mass = mass_of(row, key_float(cut.key));
    double sum = cut.above, seen = 0;
    int32_t token = -1;
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK];
        size_t n;
        const float *logits = chunk_of(row, start, room, &n);
        for (size_t i = 0; i < n; i++) {
            if (key_of(logits[i]) != cut.key)
                continue;
            token = (int32_t)(start + i);
            sum += mass;
            seen += 1;
            if (sum > target || (cut.key == last && seen >= ties))
                return token;
        }
    }
    return token;
}

/* transformers' order and rules (generation/logits_process.py): TopKLogitsWarper keeps what is not
 * below the k-th largest; TopPLogitsWarper keeps a token while the mass before it is below p. */
static int32_t draw_token(sample_row *row) {
    const psoup__draw *draw = row->draw;
    const int32_t best = argmax(row);
    if (best < 0 || draw->temperature == 0)
        return best;
    double first[BINS], part[8] = {0}, total = 0, ties = (double)row->vocab;
    if (draw->top_k > 0 && (size_t)draw->top_k < row->vocab) {
        first_histogram(row, true, first);
        row->floor = find_cut(row, true, first, draw->top_k - 1).key;
    }
    first_histogram(row, false, first);
    for (int bin = 0; bin < BINS; bin += 8)
        for (int l = 0; l < 8; l++)
            part[l] += first[bin + l];
    for (int l = 0; l < 8; l++)
        total += part[l];
    uint32_t last = 0;
    if (draw->top_p < 1) {
        const double target = draw->top_p * total;
        const sample_cut cut = find_cut(row, false, first, target);
        const double mass = mass_of(row, key_float(cut.key));
        ties = cut.above < target ? __builtin_ceil((target - cut.above) / mass) : 0;
        if (ties < 1 && cut.above == 0)
            ties = 1;
        last = cut.key;
        total = cut.above + (ties * mass < cut.here ? ties * mass : cut.here);
    }
    const float u = psoup__uniform(psoup__philox_word(draw->seed, draw->sequence, draw->position));
    return find_token(row, first, u * total, last, ties);
}

typedef struct sample_job {
    int32_t *token;          /* [rows] */
    float *logprob;          /* [rows] */
    const float *logits;     /* [rows, vocab] */
    const psoup__draw *draw; /* [rows] */
    int32_t vocab;
} sample_job;

static void sample_task(void *arg, size_t i, int worker) {
    const sample_job *job = arg;
    sample_row row = {job->logits + i * (size_t)job->vocab, (size_t)job->vocab, &job->draw[i], 0, 0};
    const int32_t token = draw_token(&row);
    job->token[i] = token;
    job->logprob[i] =
        token < 0 ? __builtin_nanf("")
                  : (float)(row.logits[token] - PSOUP__NAME(psoup__cpu_lse)(row.logits, job->vocab));
}

static void sample(psoup__backend *be, int32_t *token, float *logprob, const float *logits,
                   const psoup__draw *draw, int32_t rows, int32_t vocab) {
    sample_job job = {token, logprob, logits, draw, vocab};
    psoup__parallel(be->context, (size_t)rows, sample_task, &job);
}

void PSOUP__NAME(psoup__cpu_fill_sample)(psoup__ops *ops) {
    ops->sample = sample;
}
