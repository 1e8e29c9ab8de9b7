/* The matrix product: what to copy, how to cut C into tiles, and who computes which.
 *
 * After Goto and van de Geijn (2008): B is copied to panels that every worker reads, A to blocks of
 * a worker's own, each where that pays, and the kernel multiplies a block with a panel over DEPTH
 * depths at a time. C keeps the sums in f32 between such steps, so cutting the depth does not change
 * them; and as no depth is ever shared between workers, each element is summed in ascending order.
 */
#include "base/blocks.h"
#include "base/gemm.h"

#include <assert.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

enum {
    DEPTH = PSOUP__GEMM_DEPTH,
    TILE_ROWS = PSOUP__GEMM_ROWS,
    BLOCK_DEPTH = 128,  /* of one step where a panel is made from blocks for one tile: it stays in an L1 cache */
    FEW_ROWS = 64,      /* whose product takes hardly longer than threads need to meet */
    FEW = 4,            /* register tiles that share a panel */
    LOW = 4,            /* parts that a tile is cut into where a product ends (2048 × 688 × 256: 1.03; Zen 5) */
    SET_FLOATS = 1024,  /* rows of A that are a multiple of it long share few sets of a cache */
    TILES = 4,          /* per worker: the fewest that even out a worker that falls behind */
    ALONE = 1 << 18     /* multiply-adds that are done before another thread has woken up */
};

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int64_t round_up(int64_t a, int64_t unit) {
    return divide_up(a, unit) * unit;
}

/* ---- the product ----------------------------------------------------------------------------- */

/* Where the kernel reads B. */
enum b_place {
    B_PACKED, /* in args->packed */
    B_THERE,  /* where the caller has it */
    B_BLOCKS, /* in slot->panel, one panel [step, columns] at a time, made from blocks by who multiplies with it */
    B_COPIED  /* in slot->b, one chunk [k_chunk, n_chunk] at a time */
};

struct job {
    const psoup__gemm_args *args;
    const psoup__gemm_kernels *kernel;
    const psoup__block_kernels *blocks;
    psoup__gemm_slot *slot;
    enum b_place place;
    bool copies_a;
    bool one_panel; /* of a packed B, and all rows, which are few, make a tile: B is read once, in memory's order */
    bool high;      /* by the kernel's high tile */
    int64_t step;   /* depths multiplied at a time */
    int64_t n_chunk, k_chunk;        /* n_chunk: whole panels, but for the last chunk */
    int64_t tile_rows, tile_columns; /* whole register tiles, whole panels */
    int64_t tall, low_rows;          /* how many of a column's tiles are so high, and the height of those after them */
    atomic_size_t claimed, done;     /* units of work */
};

/* Part of B: depths [k0, k1) of columns [n0, n1). */
struct chunk {
    int64_t n0, n1, k0, k1;
};

/* The panel at column j of the chunk where B is copied. */
static float *copied_panel(const struct job *job, const struct chunk *chunk, int64_t j) {
    return job->slot->b + (j - chunk->n0) * (chunk->k1 - chunk->k0);
}

/* One unit: DEPTH depths of one panel. */
static void copy_b(const struct job *job, const struct chunk *chunk, size_t unit) {
    const psoup__gemm_args *args = job->args;
    const int64_t steps = divide_up(chunk->k1 - chunk->k0, DEPTH);
    const int64_t j = chunk->n0 + (int64_t)unit / steps * job->kernel->columns;
    const int64_t k = chunk->k0 + (int64_t)unit % steps * DEPTH;
    const int64_t columns = least(job->kernel->columns, chunk->n1 - j);
    const int64_t width = round_up(columns, job->kernel->vector);
    if (psoup__dtype_is_blocks(args->b_dtype)) {
        job->blocks->pack(copied_panel(job, chunk, j) + (k - chunk->k0) * width, args, k,
                          least(DEPTH, chunk->k1 - k), j, columns);
        return;
    }
    const psoup__gemm_source source = {args->b, args->b_dtype, args->b_row, args->b_col,
                                       args->b_depth};
    job->kernel->pack_b(copied_panel(job, chunk, j) + (k - chunk->k0) * width, &source, k,
                        least(DEPTH, chunk->k1 - k), j, columns);
}

/* Points the strip at depths [k, k + depth) of the panel at column j. */
static void find_panel(const struct job *job, const struct chunk *chunk, int64_t j, int64_t k,
                       int worker, psoup__gemm_strip *strip) {
    const psoup__gemm_args *args = job->args;
    const int64_t width = round_up(strip->columns, job->kernel->vector);
    strip->b_dtype = args->b_dtype;
    strip->b_step = width;
    strip->b_vector = job->kernel->vector;
    if (job->place == B_COPIED) {
        strip->b = copied_panel(job, chunk, j) + (k - chunk->k0) * width;
        strip->b_dtype = PSOUP_F32;
        return;
    }
    if (job->place == B_BLOCKS) {
        float *panel = job->slot->panel + worker * DEPTH * job->kernel->columns;
        job->blocks->pack(panel, args, k, strip->depth, j, strip->columns);
        strip->b = panel;
        strip->b_dtype = PSOUP_F32;
        return;
    }
    if (job->place == B_THERE) {
        strip->b_step = args->b_row;
        strip->b = (const char *)args->b +
                   (size_t)(k * args->b_row + j) * psoup_dtype_size(args->b_dtype);
        return;
    }
    const psoup__gemm_b *packed = args->packed;
    const size_t size = psoup_dtype_size(packed->dtype);
    const int64_t vector = job->kernel->vector;
    strip->b_dtype = packed->dtype;
    strip->b = (const char *)packed->panels + (size_t)(j * packed->k + k * vector) * size;
    strip->b_step = vector;
    strip->b_vector = packed->k * vector;
    /* Converting in the kernel is repeated for every register tile; from the third on, converting
     * first costs less. */
    if (packed->dtype != PSOUP_F32 && strip->rows > 2 * job->kernel->rows && strip->turned == NULL) {
        float *panel = job->slot->panel + worker * DEPTH * job->kernel->columns;
        for (int64_t v = 0; v < width / vector; v++) {
            const psoup__gemm_source source = {(const char *)strip->b + (size_t)(v * strip->b_vector) * size,
                                               packed->dtype, 0, 1, NULL};
            job->kernel->pack_b(panel + v * strip->depth * vector, &source, 0, 1, 0, strip->depth * vector);
        }
        strip->b = panel;
        strip->b_vector = strip->depth * vector;
        strip->b_dtype = PSOUP_F32;
    }
}

/* The panel after the strip's, of a tile or of the next, where one register tile reads it as it was packed: between
 * two panels the hardware's own prefetcher starts anew (one row of A, bf16: 36 → 45 GB/s; Sapphire Rapids, two
 * threads). Of more tiles, those after the first read the panel nearby and leave it the time. */
static const char *next_panel(const struct job *job, const psoup__gemm_strip *strip, bool more) {
    const psoup__gemm_b *packed = job->args->packed;
    if (job->place != B_PACKED || strip->rows > job->kernel->rows || !more)
        return NULL;
    return (const char *)strip->b +
           (size_t)(strip->columns * packed->k) * psoup_dtype_size(packed->dtype);
}

/* The strip's rows at all depths, turned over in the worker's block, which is filled once for neighbours that read
 * one A. */
static const float *turn_a(const struct job *job, const float *const *a, int64_t rows, int worker) {
    const psoup__gemm_args *args = job->args, *there = job->slot->worker[worker].turned;
    const bool same = there != NULL && there->m == args->m && there->k == args->k && there->a == args->a &&
                      there->a_row == args->a_row && there->a_col == args->a_col && there->a_rows == args->a_rows;
    float *block = job->slot->a + worker * TILE_ROWS * DEPTH;
    if (!same)
        job->kernel->turn_a(block, a, args->a_col, rows, args->k);
    job->slot->worker[worker].turned = args;
    return block;
}

/* Tiles one below the other. */
static int64_t tiles_down(const struct job *job) {
    return job->tall + divide_up(most(job->args->m - job->tall * job->tile_rows, 0), job->low_rows);
}

/* One unit: a tile of C over the depths of the chunk. */
static void multiply_tile(const struct job *job, const struct chunk *chunk, size_t unit, int worker,
                          bool goes_on) {
    const psoup__gemm_args *args = job->args;
    const int64_t across = divide_up(chunk->n1 - chunk->n0, job->tile_columns);
    const int64_t down = (int64_t)unit / across, low = most(down - job->tall, 0);
    const int64_t i0 = (down - low) * job->tile_rows + low * job->low_rows;
    const int64_t j0 = chunk->n0 + (int64_t)unit % across * job->tile_columns;
    const int64_t j1 = least(j0 + job->tile_columns, chunk->n1);
    const float *a[TILE_ROWS];
    float *c[TILE_ROWS];
    const int64_t rows = least(down < job->tall ? job->tile_rows : job->low_rows, args->m - i0);
    psoup__gemm_strip strip = {.rows = rows, .a = a, .c = c};
    for (int64_t i = 0; i < strip.rows; i++) {
        c[i] = args->c + (args->c_rows == NULL ? i0 + i : args->c_rows[i0 + i]) * args->c_stride;
        a[i] = args->a + (args->a_rows == NULL ? i0 + i : args->a_rows[i0 + i]) * args->a_row;
    }
    strip.a_step = args->a_col;
    if (job->place == B_BLOCKS && strip.rows <= job->blocks->few && !job->copies_a && job->blocks->is_whole(args) &&
        j1 - j0 == job->kernel->columns) {
        job->blocks->multiply(args, c, a, strip.rows, j0);
        return;
    }
    if (job->high)
        strip.turned = turn_a(job, a, strip.rows, worker);
    for (int64_t k = chunk->k0; k < chunk->k1; k += strip.depth) {
        strip.depth = least(job->step, chunk->k1 - k);
        strip.a_first = k;
        strip.resume = args->accumulate || k > 0;
        if (job->copies_a) {
            job->slot->worker[worker].turned = NULL; /* which lay there */
            job->kernel->pack_a(job->slot->a + worker * TILE_ROWS * DEPTH, a, &strip.a_step, args,
                                i0, strip.rows, k, strip.depth);
            strip.a_first = 0;
        }
        for (int64_t j = j0; j < j1; j += strip.columns) {
            strip.columns = least(job->kernel->columns, j1 - j);
            strip.c_first = j;
            find_panel(job, chunk, j, k, worker, &strip);
            strip.next = next_panel(job, &strip, j1 - j > strip.columns || goes_on);
            job->kernel->multiply(&strip);
        }
    }
}

static void wait_for(struct job *job, size_t units) {
    for (unsigned spin = 0; atomic_load_explicit(&job->done, memory_order_acquire) < units; spin++)
        if (spin >= 1000)
            sched_yield();
}

/* What every worker does: claim the next unit until none is left. The units of all chunks are
 * numbered in the order copy, multiply, copy, multiply, …; a unit waits until all of the phases
 * before its own are done. They were claimed earlier, so somebody is at them, however many of the
 * workers are running. */
static void work(void *arg, size_t task, int worker) {
    struct job *job = arg;
    const psoup__gemm_args *args = job->args;
    size_t unit = atomic_fetch_add(&job->claimed, 1), first = 0, end;
    for (struct chunk chunk = {0}; chunk.n0 < args->n; chunk.n0 = chunk.n1) {
        chunk.n1 = least(chunk.n0 + job->n_chunk, args->n);
        for (chunk.k0 = 0; chunk.k0 < args->k; chunk.k0 = chunk.k1) {
            chunk.k1 = least(chunk.k0 + job->k_chunk, args->k);
            const int64_t columns = chunk.n1 - chunk.n0;
            for (int copying = job->place == B_COPIED; copying >= 0; copying--, first = end) {
                const int64_t units =
                    copying ? divide_up(columns, job->kernel->columns) *
                                  divide_up(chunk.k1 - chunk.k0, DEPTH)
                            : tiles_down(job) * divide_up(columns, job->tile_columns);
                end = first + (size_t)units;
                for (; unit < end; unit = atomic_fetch_add(&job->claimed, 1)) {
                    wait_for(job, first);
                    if (copying)
                        copy_b(job, &chunk, unit - first);
                    else
                        multiply_tile(job, &chunk, unit - first, worker, false);
                    atomic_fetch_add_explicit(&job->done, 1, memory_order_release);
                }
            }
        }
    }
}

/* ---- the plan -------------------------------------------------------------------------------- */

static enum b_place place_b(const psoup__gemm_args *args, const psoup__gemm_kernels *kernel) {
    if (args->packed != NULL)
        return B_PACKED;
    if (psoup__dtype_is_blocks(args->b_dtype)) /* one tile high: no panel is made twice */
        return args->m <= TILE_ROWS ? B_BLOCKS : B_COPIED;
    /* A copy earns its cost only where many register tiles read it: four read [2048, 2048] in place
     * 1.7 times as fast (Zen 4, one thread). */
    if (args->m <= 4 * kernel->rows && args->b_col == 1 && args->b_depth == NULL &&
        args->n % kernel->vector == 0)
        return B_THERE;
    return B_COPIED;
}

/* Rows will do where they are, but if they meet in the same sets of a cache. */
static bool copy_a_pays(const psoup__gemm_args *args, const psoup__gemm_kernels *kernel) {
    if (args->a_col == 1 && args->a_row % SET_FLOATS != 0)
        return false;
    return args->m > kernel->rows && args->n > 4 * kernel->columns;
}

static void plan_chunks(struct job *job) {
    const psoup__gemm_args *args = job->args;
    job->n_chunk = round_up(args->n, job->kernel->columns);
    job->k_chunk = args->k;
    if (job->place != B_COPIED)
        return;
    const int64_t size = (int64_t)job->slot->b_size, shallow = least(args->k, DEPTH);
    if (job->n_chunk > size / shallow)
        job->n_chunk = size / shallow / job->kernel->columns * job->kernel->columns;
    if (job->k_chunk > size / job->n_chunk)
        job->k_chunk = size / job->n_chunk / DEPTH * DEPTH;
}

/* Cuts C into tiles: high ones first, then along the columns, then lower ones. Of few rows each panel is
 * read by one worker: it comes from far, and a product of 16 rows is bound by that. */
static void plan_tiles(struct job *job) {
    const int64_t rows = divide_up(job->args->m, job->kernel->rows);
    const int64_t columns = divide_up(least(job->n_chunk, job->args->n), job->kernel->columns);
    const int64_t highest = TILE_ROWS / job->kernel->rows;
    int64_t want = job->slot->workers == 1 ? 1 : TILES * job->slot->workers;
    int64_t down = divide_up(rows, highest), across = 1;
    if (job->place == B_BLOCKS) { /* a panel to a tile, so that its codes are read in order */
        across = columns;
        want = down;
    }
    if (down < want)
        down = most(down, least(want, rows / (highest / 2)));
    if (down < want)
        across = least(columns, divide_up(want, down));
    if (down * across < want && (rows > FEW || across < job->slot->workers))
        down = least(rows, divide_up(want, across));
    job->tile_rows = divide_up(rows, down) * job->kernel->rows;
    job->tile_columns = divide_up(columns, across) * job->kernel->columns;
}

/* Cuts the last tiles into low ones, so that no worker has long to wait for the others' last. */
static void plan_end(struct job *job) {
    const int64_t across = divide_up(least(job->n_chunk, job->args->n), job->tile_columns);
    const int64_t workers = job->slot->workers, cut = divide_up(workers, across);
    if (workers == 1 || job->tall < 2 * cut || job->tile_rows <= FEW_ROWS)
        return;
    job->tall -= cut;
    job->low_rows = round_up(job->tile_rows / LOW, job->kernel->rows);
}

static struct job plan_job(const psoup_context *context, const psoup__gemm_args *args, psoup__gemm_slot *slot) {
    struct job job = {.args = args, .kernel = psoup__gemm_kernels_of(context), .slot = slot,
                      .blocks = psoup__block_kernels_of(context)};
    job.place = place_b(args, job.kernel);
    job.copies_a = args->a_scale != NULL || args->alpha != 1.0f || args->a_depth != NULL;
    job.high = job.place == B_PACKED && !job.copies_a && args->m > job.kernel->rows &&
               args->m <= job.kernel->high && args->k * job.kernel->high <= TILE_ROWS * DEPTH;
    job.one_panel = job.high || (job.place == B_PACKED && !job.copies_a && args->m <= job.kernel->rows);
    job.copies_a |= !job.one_panel && copy_a_pays(args, job.kernel);
    job.step = job.place == B_BLOCKS ? BLOCK_DEPTH : job.one_panel ? args->k : DEPTH;
    plan_chunks(&job);
    plan_tiles(&job);
    if (job.one_panel) {
        job.tile_rows = divide_up(args->m, job.kernel->rows) * job.kernel->rows;
        job.tile_columns = job.kernel->columns;
    }
    job.low_rows = job.tile_rows;
    job.tall = args->m / job.tile_rows;
    return job;
}

void psoup__gemm(psoup_context *context, const psoup__gemm_args *args) {
    assert(args->m >= 0 && args->n >= 0 && args->k >= 0);
    assert(args->packed == NULL || (args->packed->k == args->k && args->packed->n == args->n));
    if (args->m == 0 || args->n == 0)
        return;
    if (args->k == 0) {
        for (int64_t i = 0; i < args->m && !args->accumulate; i++)
            memset(args->c + (args->c_rows == NULL ? i : args->c_rows[i]) * args->c_stride, 0,
                   (size_t)args->n * sizeof(float));
        return;
    }
    if (args->packed != NULL && args->m <= FEW_ROWS) {
        psoup__gemm_each(context, args, 1);
        return;
    }
    const double products = (double)args->m * (double)args->n * (double)args->k;
    struct job job = plan_job(context, args, psoup__gemm_take(context->gemm, products >= ALONE));
    plan_end(&job);
    atomic_init(&job.claimed, 0);
    atomic_init(&job.done, 0);
    if (job.slot->workers == 1)
        work(&job, 0, 0);
    else
        psoup__parallel(context, (size_t)job.slot->workers, work, &job);
    psoup__gemm_give(context->gemm, job.slot);
}

/* ---- several at once ------------------------------------------------------------------------- */

enum { AT_ONCE = 16 };

struct batch {
    struct job jobs[AT_ONCE];
    size_t first[AT_ONCE + 1]; /* of each one's tiles */
};

static void batch_tile(const struct batch *batch, size_t task, int worker, size_t end) {
    size_t i = 0;
    while (task >= batch->first[i + 1])
        i++;
    const struct job *job = &batch->jobs[i];
    const struct chunk all = {0, job->args->n, 0, job->args->k};
    multiply_tile(job, &all, task - batch->first[i], worker, task + 1 < end && task + 1 < batch->first[i + 1]);
}

/* Each worker takes its own share, and what is left of the others'. So the same core reads the same panels step after
 * step, and knows what it reads next. */
static void batch_task(void *arg, size_t task, int worker) {
    const struct batch *batch = arg;
    psoup__gemm_slot *slot = batch->jobs[0].slot;
    for (int i = 0; i < slot->workers; i++) {
        psoup__gemm_worker *share = &slot->worker[(worker + i) % slot->workers];
        size_t tile;
        while ((tile = atomic_fetch_add(&share->next, 1)) < share->end)
            batch_tile(batch, tile, worker, share->end);
    }
}

/* Few rows, no empty sum, and no B that is copied: that would take a slot while it has one, and wait for ever where all
 * do. */
static bool can_batch(const psoup_context *context, const psoup__gemm_args *args, size_t n) {
    bool can = n > 1 || (n == 1 && args[0].packed != NULL);
    for (size_t i = 0; i < n; i++)
        can &= args[i].m > 0 && args[i].m <= FEW_ROWS && args[i].n > 0 && args[i].k > 0 &&
               place_b(&args[i], psoup__gemm_kernels_of(context)) != B_COPIED;
    return can;
}

void psoup__gemm_each(psoup_context *context, const psoup__gemm_args *args, size_t n) {
    for (; n > AT_ONCE; args += AT_ONCE, n -= AT_ONCE)
        psoup__gemm_each(context, args, AT_ONCE);
    if (!can_batch(context, args, n)) {
        for (size_t i = 0; i < n; i++)
            psoup__gemm(context, &args[i]);
        return;
    }
    struct batch batch = {.first = {0}};
    double products = 0;
    for (size_t i = 0; i < n; i++)
        products += (double)args[i].m * (double)args[i].n * (double)args[i].k;
    psoup__gemm_slot *slot = psoup__gemm_take(context->gemm, products >= ALONE);
    for (size_t i = 0; i < n; i++) {
        struct job *job = &batch.jobs[i];
        *job = plan_job(context, &args[i], slot);
        const int64_t tiles = tiles_down(job) * divide_up(args[i].n, job->tile_columns);
        batch.first[i + 1] = batch.first[i] + (size_t)tiles;
    }
    const size_t workers = (size_t)slot->workers, tiles = batch.first[n];
    for (size_t w = 0; w < workers; w++) {
        atomic_init(&slot->worker[w].next, tiles * w / workers);
        slot->worker[w].end = tiles * (w + 1) / workers;
    }
    if (workers > 1)
        psoup__parallel(context, workers, batch_task, &batch);
    else
        batch_task(&batch, 0, 0);
    psoup__gemm_give(context->gemm, slot);
}
