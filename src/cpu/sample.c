/* Drawing tokens. Nothing is sorted and nothing allocated: where the cumulative probability crosses a
 * target in descending order of the logits is found by descending a histogram over the logits' bits,
 * eleven at a time. */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { CHUNK = 2048, BINS = 2048 };

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

/* The logits from `start` on, the banned ones −∞; returns how many. */
static size_t chunk_of(const sample_row *row, size_t start, float logits[CHUNK]) {
    const size_t n = least(CHUNK, row->vocab - start);
    memcpy(logits, row->logits + start, n * sizeof *logits);
    for (int32_t i = 0; i < row->draw->n_banned; i++) {
        const size_t banned = (size_t)row->draw->banned[i];
        if (banned >= start && banned - start < n)
            logits[banned - start] = -__builtin_inff();
    }
    return n;
}

/* Finds the maximum and where it is first; −1 when a logit is NaN or the maximum is not finite. */
static int32_t argmax(sample_row *row) {
    int32_t best = -1;
    row->max = -__builtin_inff();
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float logits[CHUNK + LANES];
        const size_t n = chunk_of(row, start, logits);
        int nan = 0;
        for (size_t i = 0; i < n; i++)
            nan |= row->logits[start + i] != row->logits[start + i];
        if (nan)
            return -1;
        store(logits + n, splat(-__builtin_inff()));
        vec most = splat(row->max);
        for (size_t i = 0; i < n; i += LANES)
            most = vec_max(load(logits + i), most);
        const float max = max_lanes(most);
        if (max > row->max) {
            size_t i = 0;
            while (logits[i] != max)
                i++;
            row->max = max;
            best = (int32_t)(start + i);
        }
    }
    return row->max <= 3.402823466e38f ? best : -1;
}

/* Sets hist[digit] to the mass, or the count, of every token whose key begins with `prefix`, above
 * bit `shift + width`. Few do after the first digit: eight flags at a time are looked at, and so branches
 * mispredicted seldom (which, with the shared first histogram, halved the time of a draw). */
static void histogram(const sample_row *row, bool count, uint32_t prefix, int shift, int width,
                      double hist[BINS]) {
    const uint32_t most = 0xffffffffu >> (32 - shift - width), digit = (1u << width) - 1;
    const bool all = shift + width == 32;
    memset(hist, 0, BINS * sizeof *hist);
    for (size_t start = 0; start < row->vocab; start += CHUNK) {
        float logits[CHUNK], mass[CHUNK];
        uint32_t key[CHUNK];
        uint8_t fits[CHUNK + 8] = {0};
        const size_t n = chunk_of(row, start, logits);
        for (size_t i = 0; i < n; i++) {
            key[i] = key_of(logits[i]);
            fits[i] = (key[i] >= row->floor) & ((key[i] ^ prefix) <= most);
        }
        for (size_t i = 0; i < n && all && !count; i++)
            mass[i] = mass_of(row, logits[i]);
        for (size_t i = 0; i < n && all; i++)
            hist[key[i] >> shift & digit] += fits[i] ? count ? 1 : mass[i] : 0;
        for (size_t i = 0; i < n && !all; i += 8) {
            uint64_t flags;
            memcpy(&flags, fits + i, sizeof flags);
            for (size_t j = i; flags; j++, flags >>= 8)
                if (flags & 1)
                    hist[key[j] >> shift & digit] += count ? 1 : mass_of(row, logits[j]);
        }
    }
}

typedef struct sample_cut {
    uint32_t key; /* the largest whose mass, with that of all larger keys, exceeds the target */
    double above; /* the mass of the larger keys */
    double here;  /* the mass of the key, all its tokens together */
} sample_cut;

static const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};

/* `first` is the histogram of the first digit. */
static sample_cut find_cut(const sample_row *row, bool count, const double first[BINS],
                           double target) {
    sample_cut cut = {0};
    for (int digit = 0; digit < 3; digit++) {
        double room[BINS];
        const double *hist = digit ? room : first;
        if (digit)
            histogram(row, count, cut.key, shifts[digit], widths[digit], room);
        int chosen = 0;
        double chosen_above = cut.above;
        for (int bin = (1 << widths[digit]) - 1; bin >= 0; bin--) {
            if (hist[bin] == 0)
                continue;
            chosen = bin; /* when rounding keeps the sum from the target: the last with any mass */
            chosen_above = cut.above;
            if (cut.above + hist[bin] > target)
                break;
            cut.above += hist[bin];
        }
        cut.key |= (uint32_t)chosen << shifts[digit];
        cut.above = chosen_above;
        cut.here = hist[chosen];
    }
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
        float logits[CHUNK];
        const size_t n = chunk_of(row, start, logits);
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
    double first[BINS], total = 0, ties = (double)row->vocab;
    if (draw->top_k > 0 && (size_t)draw->top_k < row->vocab) {
        histogram(row, true, 0, shifts[0], widths[0], first);
        row->floor = find_cut(row, true, first, draw->top_k - 1).key;
    }
    histogram(row, false, 0, shifts[0], widths[0], first);
    for (int bin = BINS - 1; bin >= 0; bin--)
        total += first[bin];
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
