/* Drawing tokens. Nothing is sorted and nothing allocated: where the cumulative probability crosses a
 * target in descending order of the logits is found by histograms, the first over the distance from the
 * maximum, the next ones over the bits of the few logits in the bin that was hit. A token's mass is a whole
 * number, so that its sums are exact in any order: cuda/sample.cu draws the same token from the same logits. */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { CHUNK = 2048, BIN_BITS = 11, BINS = 1 << BIN_BITS };

typedef struct sample_row {
    const float *logits; /* [vocab] */
    size_t vocab;
    const psoup__draw *draw;
    float max;      /* of the logits not banned; its token has the mass `unit` */
    float unit;     /* a power of two; vocab times it is at most 2⁶² */
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

/* exp((logit − max) / temperature) of a unit. */
static inline float share_of(const sample_row *row, float logit) {
    return exp_float((logit - row->max) / row->draw->temperature) * row->unit;
}

static inline int64_t mass_of(const sample_row *row, float logit) {
    return (int64_t)share_of(row, logit);
}

static float unit_of(size_t vocab) {
    int bits = 0;
    while ((size_t)1 << bits < vocab)
        bits++;
    return (float)((int64_t)1 << (62 - bits));
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
static void first_histogram(const sample_row *row, bool count, int64_t hist[BINS]) {
    memset(hist, 0, BINS * sizeof *hist);
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK], share[CHUNK];
        uint32_t bin[CHUNK];
        size_t n;
        const float *logits = chunk_of(row, start, room, &n);
        for (size_t i = 0; i < n; i++) {
            bin[i] = bin_of(row, logits[i]);
            share[i] = count ? 1 : share_of(row, logits[i]);
            share[i] = key_of(logits[i]) >= row->floor ? share[i] : 0;
        }
        for (size_t i = 0; i < n; i++)
            hist[bin[i]] += (int64_t)share[i];
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
                            int64_t hist[BINS]) {
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
    uint32_t key;  /* the largest whose mass, with that of all larger keys, exceeds the target */
    int64_t above; /* the mass of the larger keys */
} sample_cut;

/* The first bin with which the mass exceeds the target. */
static uint32_t cross(sample_cut *cut, const int64_t hist[BINS], int64_t target) {
    uint32_t bin = 0;
    for (; cut->above + hist[bin] <= target; bin++)
        cut->above += hist[bin];
    return bin;
}

/* `first` is the first histogram; its sum exceeds the target. */
static sample_cut find_cut(const sample_row *row, bool count, const int64_t first[BINS],
                           int64_t target) {
    sample_cut cut = {0};
    key_range range = range_of(row, cross(&cut, first, target));
    while (range.low < range.high) {
        int64_t hist[BINS];
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

/* The first token in descending probability, ties by ascending id, whose cumulative mass exceeds `target`. */
static int32_t find_token(const sample_row *row, const int64_t first[BINS], int64_t target) {
    const sample_cut cut = find_cut(row, false, first, target);
    int64_t before = (target - cut.above) / mass_of(row, key_float(cut.key)); /* tokens of the same key */
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float room[CHUNK];
        size_t n;
        const float *logits = chunk_of(row, start, room, &n);
        for (size_t i = 0; i < n; i++)
            if (key_of(logits[i]) == cut.key && before-- == 0)
                return (int32_t)(start + i);
    }
    return -1;
}

/* What top-p leaves of the total: whole tokens, each while the mass before it is below p of it. */
static int64_t keep_top_p(const sample_row *row, const int64_t first[BINS], int64_t total) {
    const int64_t part = (int64_t)__builtin_ceil((double)row->draw->top_p * (double)total);
    const int64_t target = part > 1 ? part - 1 : 0;
    const sample_cut cut = find_cut(row, false, first, target);
    const int64_t mass = mass_of(row, key_float(cut.key));
    return cut.above + ((target - cut.above) / mass + 1) * mass;
}

/* u · total, rounded down, of the 24 bits u is made of. */
static int64_t part_of(int64_t total, uint32_t word) {
    const int64_t u = word >> 8;
    return u * (total >> 32) * 256 + (u * (total & 0xffffffff) >> 24);
}

/* transformers' order and rules (generation/logits_process.py): TopKLogitsWarper keeps what is not
 * below the k-th largest; TopPLogitsWarper keeps a token while the mass before it is below p. */
static int32_t draw_token(sample_row *row) {
    const psoup__draw *draw = row->draw;
    const int32_t best = argmax(row);
    if (best < 0 || draw->temperature == 0)
        return best;
    int64_t first[BINS], total = 0;
    if (draw->top_k > 0 && (size_t)draw->top_k < row->vocab) {
        first_histogram(row, true, first);
        row->floor = find_cut(row, true, first, draw->top_k - 1).key;
    }
    first_histogram(row, false, first);
    for (int bin = 0; bin < BINS; bin++)
        total += first[bin];
    if (draw->top_p < 1)
        total = keep_top_p(row, first, total);
    return find_token(row, first,
                      part_of(total, psoup__philox_word(draw->seed, draw->sequence, draw->position)));
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
    const size_t vocab = (size_t)job->vocab;
    sample_row row = {.logits = job->logits + i * vocab, .vocab = vocab, .draw = &job->draw[i],
                      .unit = unit_of(vocab)};
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
