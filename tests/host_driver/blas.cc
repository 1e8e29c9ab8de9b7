/* libcublasLt.so.13 for machines without one: the calls that src/gpu makes, answered by libpsoup's own products. */
#include <cstdlib>
#include <vector>

#include "stream.h"

extern "C" {
#include "base/base.h"
}

namespace {

enum { SUCCESS = 0, INVALID = 7, FAILED = 13, UNSUPPORTED = 15, F32 = 0, F16 = 2, BF16 = 14 };

struct operation {
    int32_t transpose[2]; /* of its first and second operand */
};
struct layout {
    int type;
    uint64_t rows, columns; /* columns lie ld elements apart */
    int64_t ld;
};

psoup_context *context;
int handles; /* that use it */

psoup_dtype dtype_of(int type) { return type == F16 ? PSOUP_F16 : type == BF16 ? PSOUP_BF16 : PSOUP_F32; }

/* The operand as rows of f32, the way it is stored: stored column j is row j here. */
std::vector<float> read(const layout *l, const void *data) {
    std::vector<float> out((size_t)(l->rows * l->columns));
    const size_t item = psoup_dtype_size(dtype_of(l->type));
    for (uint64_t j = 0; j < l->columns; j++)
        psoup__to_f32(context, out.data() + j * l->rows, (const char *)data + j * (uint64_t)l->ld * item,
                      dtype_of(l->type), (size_t)l->rows);
    return out;
}

/* D = alpha · op(A) · op(B) + beta · C, column-major; so Dᵀ = op(B)ᵀ op(A)ᵀ in rows. */
void multiply(operation op, layout a, const void *a_data, layout b, const void *b_data, layout c, const void *c_data,
              void *d_data, float alpha, float beta) {
    const int64_t m = (int64_t)c.columns, n = (int64_t)c.rows;
    const int64_t k = (int64_t)(op.transpose[0] ? a.rows : a.columns);
    std::vector<float> x = read(&b, b_data), y = read(&a, a_data), product((size_t)(m * n));
    psoup__gemm_args args = {};
    args.m = m;
    args.n = n;
    args.k = k;
    args.c = product.data();
    args.c_stride = n;
    args.alpha = alpha;
    args.a = x.data(); /* element (i, p): b is [k, m] column-major, or [m, k] transposed */
    args.a_row = op.transpose[1] ? 1 : k;
    args.a_col = op.transpose[1] ? m : 1;
    args.b = y.data(); /* element (p, j): a is [n, k] column-major, or [k, n] transposed */
    args.b_dtype = PSOUP_F32;
    args.b_row = op.transpose[0] ? 1 : n;
    args.b_col = op.transpose[0] ? k : 1;
    psoup__gemm(context, &args);
    const float *old = static_cast<const float *>(c_data);
    float *out = static_cast<float *>(d_data);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            out[i * c.ld + j] = product[(size_t)(i * n + j)] + (beta == 0 ? 0 : beta * old[i * c.ld + j]);
}

bool fits(const operation *op, const layout *a, const layout *b, const layout *c) {
    const uint64_t n = op->transpose[0] ? a->columns : a->rows, k = op->transpose[0] ? a->rows : a->columns;
    const uint64_t m = op->transpose[1] ? b->rows : b->columns, k2 = op->transpose[1] ? b->columns : b->rows;
    return k == k2 && c->rows == n && c->columns == m && a->type == b->type && c->type == F32 &&
           (uint64_t)a->ld >= a->rows && (uint64_t)b->ld >= b->rows && (uint64_t)c->ld >= c->rows;
}

} // namespace

extern "C" {

int cublasLtCreate(void **handle) {
    psoup_context_options options = {};
    options.size = sizeof options;
    options.threads = 1;
    if (!context && psoup_context_create(&options, &context, nullptr) != PSOUP_OK)
        return 1;
    handles++;
    *handle = context;
    return SUCCESS;
}
int cublasLtDestroy(void *) {
    if (--handles > 0)
        return SUCCESS;
    psoup_context_free(context);
    context = nullptr;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(void **out, int compute, int scale) {
    *out = new operation{{0, 0}};
    return compute == 68 && scale == F32 ? SUCCESS : INVALID;
}
int cublasLtMatmulDescDestroy(void *op) {
    delete static_cast<operation *>(op);
    return SUCCESS;
}
int cublasLtMatmulDescSetAttribute(void *op, int attribute, const void *value, size_t bytes) {
    if ((attribute != 3 && attribute != 4) || bytes != sizeof(int32_t))
        return INVALID;
    static_cast<operation *>(op)->transpose[attribute - 3] = *static_cast<const int32_t *>(value);
    return SUCCESS;
}
int cublasLtMatrixLayoutCreate(void **out, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    *out = new layout{type, rows, columns, ld};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void *l) {
    delete static_cast<layout *>(l);
    return SUCCESS;
}
int cublasLtMatmulPreferenceCreate(void **out) {
    *out = new char;
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(void *preference) {
    delete static_cast<char *>(preference);
    return SUCCESS;
}
int cublasLtMatmulPreferenceSetAttribute(void *, int attribute, const void *, size_t bytes) {
    return attribute == 1 ? (bytes == 8 ? SUCCESS : INVALID)
                          : (attribute >= 5 && attribute <= 8 && bytes == 4 ? SUCCESS : INVALID);
}

struct answer {
    uint64_t algorithm[8];
    size_t room;
    int status;
    float waves;
    int reserved[4];
};
int cublasLtMatmulAlgoGetHeuristic(void *, void *op, void *a, void *b, void *c, void *, void *, int asked,
                                   void *results, int *found) {
    *found = 0;
    if (asked < 1 || !fits(static_cast<operation *>(op), static_cast<layout *>(a), static_cast<layout *>(b),
                           static_cast<layout *>(c)))
        return UNSUPPORTED;
    *static_cast<answer *>(results) = answer{};
    *found = 1;
    return SUCCESS;
}

int cublasLtMatmul(void *, void *op, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const void *beta, const void *c, void *c_layout, void *d, void *, const void *, void *, size_t,
                   CUstream_st *stream) {
    const operation o = *static_cast<operation *>(op);
    const layout la = *static_cast<layout *>(a_layout), lb = *static_cast<layout *>(b_layout);
    const layout lc = *static_cast<layout *>(c_layout);
    const float scale = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    if (!fits(&o, &la, &lb, &lc))
        return INVALID;
    return psoup_host_put(stream, [=] { multiply(o, la, a, lb, b, lc, c, d, scale, keep); }) ? SUCCESS : FAILED;
}

} // extern "C"
