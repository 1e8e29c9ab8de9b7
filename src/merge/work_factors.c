/* The factors of a result's adapters: read once, fingerprinted, and checked, all in parallel. */
#include "merge/engine.h"

#include <string.h>

typedef struct factor {
    const psoup__tensor *tensor; /* NULL: of weight 0, and not read */
    size_t n;
    float *at; /* [n], and as much again to turn it where it is `across` */
    bool across, finite;
    psoup__hash *hash; /* NULL: somebody else's */
    char *to;
} factor;

typedef struct reading {
    psoup_context *context;
    factor *factors; /* [2 parts], a and b in turn */
} reading;

bool psoup__work_is_across(const psoup__work *work, const psoup__peft_pair *pair) {
    return pair->transposed && work->result->kind == PSOUP__MADE;
}

/* x [rows, columns] across, where it stands; room is as large. */
static void transpose(float *x, float *room, size_t rows, size_t columns) {
    memcpy(room, x, rows * columns * sizeof *x);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++)
            x[j * rows + i] = room[i * columns + j];
}

/* Of plain numbers each byte is read once, for the hash and for the number. */
static void read_factor(psoup_context *context, const factor *f) {
    enum { PIECE = 1 << 14 };
    const psoup__tensor *tensor = f->tensor;
    const size_t size = psoup_dtype_size(tensor->dtype);
    char piece[PIECE];
    if (f->hash == NULL || tensor->heads != 0 || tensor->dtype == PSOUP_Q8_0) {
        if (f->hash != NULL)
            psoup__hash_bytes(f->hash, tensor, 0, tensor->bytes);
        psoup__tensor_read(context, tensor, 0, f->n, f->at);
    } else if (tensor->dtype == PSOUP_F32) {
        psoup__tensor_bytes(tensor, 0, tensor->bytes, f->at);
        psoup__hash_update(f->hash, f->at, tensor->bytes);
    } else {
        for (size_t done = 0; done < f->n; done += PIECE / size) {
            size_t n = f->n - done < PIECE / size ? f->n - done : PIECE / size;
            psoup__tensor_bytes(tensor, done * size, n * size, piece);
            psoup__hash_update(f->hash, piece, n * size);
            psoup__to_f32(context, f->at + done, piece, tensor->dtype, n);
        }
    }
    if (f->hash != NULL)
        psoup__hash_text(f->hash, f->to);
}

static void factor_task(void *arg, size_t task, int worker) {
    const reading *r = arg;
    factor *f = &r->factors[task];
    (void)worker;
    if (f->tensor == NULL)
        return;
    read_factor(r->context, f);
    f->finite = psoup__merge_finite(r->context, f->at, f->n, PSOUP_F32);
    if (f->across)
        transpose(f->at, f->at + f->n, (size_t)f->tensor->shape[0], (size_t)f->tensor->shape[1]);
}

/* *need: floats of all. */
static psoup_status list_factors(psoup__work *work, const psoup__plan_part *parts, size_t n, factor *factors,
                                 size_t *need, psoup_error *error) {
    for (size_t i = 0; i < 2 * n; i++) {
        const psoup__plan_part *part = &parts[i / 2];
        const size_t at = part->entries[i % 2];
        psoup__entry *entry = at != PSOUP__NONE ? &work->certificate->entries[at] : NULL;
        factor *f = &factors[i];
        if (part->weight == 0)
            continue;
        f->tensor = i % 2 == 0 ? &part->pair->a : &part->pair->b;
        f->across = psoup__work_is_across(work, part->pair);
        psoup__tensor_elements(f->tensor, &f->n);
        if (!psoup__add(*need, f->n, need) || (f->across && !psoup__add(*need, f->n, need)))
            return psoup__out_of_memory(error, SIZE_MAX);
        if (entry == NULL || entry->claimed)
            continue;
        entry->claimed = true;
        f->to = entry->text;
        if ((f->hash = psoup__hash_create(work->merger->context, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
    }
    return PSOUP_OK;
}

static psoup_status check_factors(const psoup__work *work, const psoup__plan_part *parts, size_t n,
                                  const factor *factors, psoup_error *error) {
    for (size_t i = 0; i < 2 * n; i++)
        if (factors[i].tensor != NULL && !factors[i].finite)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %.200s.lora_%c holds a NaN or infinity",
                               psoup__merger_source(work->merger, parts[i / 2].source)->path,
                               parts[i / 2].pair->module, "AB"[i % 2]);
    return PSOUP_OK;
}

/* Those of weight 0 keep their rank and are not read. */
psoup_status psoup__work_factors(psoup__work *work, const psoup__plan_part *parts, size_t n,
                                 psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_context *context = work->merger->context;
    size_t need = 0;
    reading r = {.context = context, .factors = psoup__alloc(context, n, 2 * sizeof(factor), error)};
    if (r.factors == NULL || (work->factors = psoup__alloc(context, n, sizeof *work->factors, error)) == NULL ||
        (work->weights = psoup__alloc(context, n, sizeof *work->weights, error)) == NULL)
        goto fail;
    PSOUP__TRY(list_factors(work, parts, n, r.factors, &need, error));
    if ((work->memory = psoup__alloc(context, need, sizeof *work->memory, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    float *at = work->memory;
    for (size_t i = 0; i < n; i++) {
        factor *a = &r.factors[2 * i], *b = a + 1;
        a->at = at;
        b->at = a->at + (a->across ? 2 : 1) * a->n;
        at = b->at + (b->across ? 2 : 1) * b->n;
        work->weights[i] = parts[i].weight;
        work->factors[i] = (psoup_lora_factors){.rank = parts[i].pair->rank, .scale = parts[i].pair->scale};
        if (a->tensor == NULL)
            continue;
        work->factors[i].a = a->across ? b->at : a->at;
        work->factors[i].b = a->across ? a->at : b->at;
    }
    psoup__parallel(context, 2 * n, factor_task, &r);
    PSOUP__TRY(check_factors(work, parts, n, r.factors, error));
fail:
    for (size_t i = 0; i < 2 * n && r.factors != NULL; i++)
        psoup__free(context, r.factors[i].hash);
    psoup__free(context, r.factors);
    return status;
}
