/* Steps that repeat, as CUDA graphs. While a step is recorded its launches are noted, with all their arguments, and
 * not done. If the notes are those of a graph that is kept, byte for byte, that graph is launched; else they are
 * captured as a new one. So nothing but the notes themselves says when a graph is still good. */
#include "gpu/record.h"

#include <string.h>

#include "gpu/internal.h"

typedef struct note {
    int32_t kind; /* psoup__kernel, or below */
    psoup__grid grid;
    uint64_t bytes; /* of what follows, without padding to 8 */
} note;
enum { PRODUCT = -1, COPY = -2, ZERO = -3 };

typedef struct noted_product {
    psoup__product product;
    float *c;
    const void *a, *b;
} noted_product;

typedef struct noted_copy {
    psoup__cu_pointer out, in;
    size_t bytes;
} noted_copy;

static void put(psoup__gpu *gpu, const note *head, const void *body) {
    static const char zeros[8];
    psoup__buffer *notes = &gpu->record.notes;
    psoup__buffer_append(notes, head, sizeof *head);
    psoup__buffer_append(notes, body, head->bytes);
    psoup__buffer_append(notes, zeros, (8 - head->bytes % 8) % 8);
}

/* Bodies are compared as bytes: they have no padding (cuda/kernels.h). */
bool psoup__record_kernel(psoup__gpu *gpu, psoup__kernel kernel, psoup__grid grid, const void *args, size_t bytes) {
    if (!gpu->record.on)
        return false;
    note head;
    memset(&head, 0, sizeof head);
    head.kind = (int32_t)kernel;
    head.grid = grid;
    head.bytes = bytes;
    put(gpu, &head, args);
    return true;
}

bool psoup__record_product(psoup__gpu *gpu, const psoup__product *product, float *c, const void *a, const void *b) {
    if (!gpu->record.on)
        return false;
    note head;
    noted_product body;
    memset(&head, 0, sizeof head);
    memset(&body, 0, sizeof body);
    head.kind = PRODUCT;
    head.bytes = sizeof body;
    body.product.m = product->m;
    body.product.n = product->n;
    body.product.k = product->k;
    body.product.dtype = product->dtype;
    body.product.transpose_a = product->transpose_a;
    body.product.transpose_b = product->transpose_b;
    body.product.lda = product->lda;
    body.product.ldb = product->ldb;
    body.product.ldc = product->ldc;
    body.product.alpha = product->alpha;
    body.product.beta = product->beta;
    body.c = c;
    body.a = a;
    body.b = b;
    put(gpu, &head, &body);
    return true;
}

bool psoup__record_copy(psoup__gpu *gpu, psoup__cu_pointer out, psoup__cu_pointer in, size_t bytes) {
    gpu->cast.of = NULL;
    if (!gpu->record.on)
        return false;
    note head;
    const noted_copy body = {out, in, bytes};
    memset(&head, 0, sizeof head);
    head.kind = in ? COPY : ZERO;
    head.bytes = sizeof body;
    put(gpu, &head, &body);
    return true;
}

bool psoup__record_refuse(psoup__gpu *gpu) {
    gpu->record.refused = gpu->record.refused || gpu->record.on;
    return gpu->record.on;
}

/* ---- graphs -------------------------------------------------------------------------------------------- */

static void drop(psoup__gpu *gpu, psoup__graph *graph) {
    if (graph->exec)
        gpu->driver.graph_exec_destroy(graph->exec);
    psoup__buffer_free(&graph->notes);
    *graph = (psoup__graph){.exec = NULL};
}

void psoup__record_free(psoup__gpu *gpu) {
    for (int i = 0; i < PSOUP__GRAPHS; i++)
        drop(gpu, &gpu->record.graphs[i]);
    psoup__buffer_free(&gpu->record.notes);
}

static void run_note(psoup__gpu *gpu, const note *head, const char *body) {
    noted_product product;
    noted_copy copy;
    switch (head->kind) {
    case PRODUCT:
        memcpy(&product, body, sizeof product);
        psoup__blas_run(gpu, &product.product, product.c, product.a, product.b);
        return;
    case COPY:
        memcpy(&copy, body, sizeof copy);
        psoup__gpu_failed(gpu, gpu->driver.copy(copy.out, copy.in, copy.bytes, gpu->stream), "a copy");
        return;
    case ZERO:
        memcpy(&copy, body, sizeof copy);
        psoup__gpu_failed(gpu, gpu->driver.set(copy.out, 0, copy.bytes, gpu->stream), "zeroing");
        return;
    default:
        psoup__gpu_launch(gpu, (psoup__kernel)head->kind, head->grid, body);
    }
}

/* What was noted, put into the stream. */
static void run_notes(psoup__gpu *gpu, const psoup__buffer *notes) {
    for (size_t at = 0; at < notes->length;) {
        note head;
        memcpy(&head, notes->data + at, sizeof head);
        run_note(gpu, &head, notes->data + at + sizeof head);
        at += sizeof head + (head.bytes + 7) / 8 * 8;
    }
}

/* The notes as a graph; they become its key. Captured in a stream apart, as the caller's may be one that cannot be;
 * relaxed, as kernels and cuBLASLt's are loaded when they are first asked for. */
static void capture(psoup__gpu *gpu, psoup__graph *graph) {
    static const char what[] = "recording a step";
    psoup__cu_stream stream = gpu->stream;
    psoup__cu_graph captured = NULL;
    if (psoup__gpu_failed(gpu, gpu->driver.stream_create(&gpu->stream, PSOUP__CU_STREAM_NON_BLOCKING), what)) {
        gpu->stream = stream;
        return;
    }
    if (!psoup__gpu_failed(gpu, gpu->driver.capture_begin(gpu->stream, PSOUP__CU_CAPTURE_RELAXED), what)) {
        run_notes(gpu, &gpu->record.notes);
        psoup__gpu_failed(gpu, gpu->driver.capture_end(gpu->stream, &captured), what);
    }
    gpu->driver.stream_destroy(gpu->stream);
    gpu->stream = stream;
    if (gpu->failed.status == PSOUP_OK)
        psoup__gpu_failed(gpu, gpu->driver.graph_instantiate(&graph->exec, captured, 0), what);
    if (captured)
        gpu->driver.graph_destroy(captured);
    graph->notes = gpu->record.notes;
    gpu->record.notes = (psoup__buffer){.context = gpu->base.context};
}

/* The graph of these notes, or the one that was not used for longest, to be captured anew. */
static psoup__graph *find(psoup__gpu *gpu, bool *known) {
    psoup__record *r = &gpu->record;
    psoup__graph *oldest = &r->graphs[0];
    for (int i = 0; i < PSOUP__GRAPHS; i++) {
        psoup__graph *graph = &r->graphs[i];
        *known = graph->exec && graph->notes.length == r->notes.length &&
                 memcmp(graph->notes.data, r->notes.data, r->notes.length) == 0;
        if (*known)
            return graph;
        if (graph->used < oldest->used)
            oldest = graph;
    }
    drop(gpu, oldest);
    return oldest;
}

void psoup__gpu_record(psoup__backend *be) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    gpu->record.notes.length = 0;
    gpu->record.notes.failed = false;
    gpu->record.notes.context = be->context;
    gpu->record.on = true;
    gpu->cast.of = NULL; /* a graph depends on nothing before it */
    gpu->record.refused = false;
}

psoup_status psoup__gpu_replay(psoup__backend *be, int32_t times, psoup_error *error) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    psoup__record *r = &gpu->record;
    bool known = false;
    r->on = false;
    gpu->cast.of = NULL;
    if (!psoup__gpu_enter(gpu))
        return psoup__gpu_tell(gpu, error);
    if (r->refused)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "GPU: this step cannot be recorded");
    if (r->notes.failed)
        return psoup__out_of_memory(error, r->notes.length);
    psoup__graph *graph = find(gpu, &known);
    graph->used = ++r->clock;
    if (!known)
        capture(gpu, graph);
    for (int32_t i = 0; i < times && gpu->failed.status == PSOUP_OK; i++)
        psoup__gpu_failed(gpu, gpu->driver.graph_launch(graph->exec, gpu->stream), "a recorded step");
    if (gpu->failed.status == PSOUP_OK)
        return PSOUP_OK;
    drop(gpu, graph);
    return psoup__gpu_tell(gpu, error);
}
