/* The factors of a result's adapters: read once, fingerprinted, and checked, all in parallel. */
#include "merge/engine.h"

#include <string.h>

typedef struct factor {
    const psoup__tensor *tensor; /* NULL: of weight 0, and not read */
    size_t n;
    float *from; /* [n] as it lies, read or kept */
    float *at;   /* [n] as it is used: `from`, or where it is `across`, that turned */
    bool across, finite;
    bool kept, keeps; /* `from` is there already; `from` stays */
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

/* out [columns, rows] = x [rows, columns] across. */
static void transpose(float *out, const float *x, size_t rows, size_t columns) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++)
            out[j * rows + i] = x[i * columns + j];
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
        psoup__tensor_read(context, tensor, 0, f->n, f->from);
    } else if (tensor->dtype == PSOUP_F32) {
        psoup__tensor_bytes(tensor, 0, tensor->bytes, f->from);
        psoup__hash_update(f->hash, f->from, tensor->bytes);
    } else {
        for (size_t done = 0; done < f->n; done += PIECE / size) {
            size_t n = f->n - done < PIECE / size ? f->n - done : PIECE / size;
            psoup__tensor_bytes(tensor, done * size, n * size, piece);
            psoup__hash_update(f->hash, piece, n * size);
            psoup__to_f32(context, f->from + done, piece, tensor->dtype, n);
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
    if (!f->kept) {
        read_factor(r->context, f);
        f->finite = psoup__merge_finite(r->context, f->from, f->n, PSOUP_F32);
    }
    if (f->across)
        transpose(f->at, f->from, (size_t)f->tensor->shape[0], (size_t)f->tensor->shape[1]);
}

/* Where its numbers come from: an earlier run, or the file, and then they may stay. */
static psoup_status find_factor(psoup__work *work, const psoup__plan_part *part, int which, factor *f,
                                psoup_error *error) {
    psoup_merger *merger = work->merger;
    const size_t at = part->entries[which];
    psoup__entry *entry = at != PSOUP__NONE ? &work->certificate->entries[at] : NULL;
    const psoup__kept *kept = psoup__keep_find(merger, part, which);
    const bool tells = entry != NULL && !entry->claimed;
    if (tells) {
        entry->claimed = true;
        f->to = entry->text;
    }
    if (kept != NULL) {
        f->from = kept->values;
        f->kept = f->finite = true;
        if (tells)
            memcpy(f->to, kept->text, sizeof kept->text);
        return PSOUP_OK;
    }
    psoup__merger_source(merger, part->source)->read = true;
    if (!tells)
        return PSOUP_OK;
    if ((f->hash = psoup__hash_create(merger->context, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    f->from = psoup__keep_room(merger, part, which, f->n);
    f->keeps = f->from != NULL;
    return PSOUP_OK;
}

/* Floats of the work's own memory that it takes. */
static size_t own_floats(const factor *f) {
    return f->tensor == NULL ? 0 : (f->from == NULL ? f->n : 0) + (f->across ? f->n : 0);
}

/* *need: floats of all. */
static psoup_status list_factors(psoup__work *work, const psoup__plan_part *parts, size_t n, factor *factors,
                                 size_t *need, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < 2 * n; i++) {
        const psoup__plan_part *part = &parts[i / 2];
        factor *f = &factors[i];
        if (part->weight == 0)
            continue;
        f->tensor = i % 2 == 0 ? &part->pair->a : &part->pair->b;
        f->across = psoup__work_is_across(work, part->pair);
        psoup__tensor_elements(f->tensor, &f->n);
        PSOUP__TRY(find_factor(work, part, (int)(i % 2), f, error));
        if (f->n > SIZE_MAX / 2 || !psoup__add(*need, own_floats(f), need))
            return psoup__out_of_memory(error, SIZE_MAX);
    }
fail:
    return status;
}

/* Where the numbers of the factors that are not kept go. */
static void place_factors(factor *factors, size_t n, float *memory) {
    for (size_t i = 0; i < n; i++) {
        factor *f = &factors[i];
        float *const end = memory + own_floats(f);
        if (f->tensor == NULL)
            continue;
        if (f->from == NULL)
            f->from = end - f->n;
        f->at = f->across ? memory : f->from;
        memory = end;
    }
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
    if ((work->memory = psoup__alloc_unset(context, need, sizeof *work->memory, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    place_factors(r.factors, 2 * n, work->memory);
    for (size_t i = 0; i < n; i++) {
        const factor *a = &r.factors[2 * i], *b = a + 1;
        work->weights[i] = parts[i].weight;
        work->factors[i] = (psoup_lora_factors){.rank = parts[i].pair->rank, .scale = parts[i].pair->scale};
        if (a->tensor == NULL)
            continue;
        work->factors[i].a = a->across ? b->at : a->at;
        work->factors[i].b = a->across ? a->at : b->at;
    }
    psoup__parallel(context, 2 * n, factor_task, &r);
    PSOUP__TRY(check_factors(work, parts, n, r.factors, error));
    for (size_t i = 0; i < 2 * n; i++)
        if (r.factors[i].keeps)
            psoup__keep_read(work->merger, &parts[i / 2], (int)(i % 2), r.factors[i].to);
fail:
    for (size_t i = 0; i < 2 * n && r.factors != NULL; i++)
        psoup__free(context, r.factors[i].hash);
    psoup__free(context, r.factors);
    return status;
}
