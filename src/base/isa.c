/* src/base/isa.c: which instruction set the kernels use, and the conversions' way to theirs. */
#include "base/internal.h"

#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

typedef void (*to_f32_fn)(float *out, const void *in, psoup_dtype dtype, size_t n);
typedef void (*from_f32_fn)(void *out, psoup_dtype dtype, const float *in, size_t n);

void psoup__to_f32_kernel_generic(float *out, const void *in, psoup_dtype dtype, size_t n);
void psoup__from_f32_kernel_generic(void *out, psoup_dtype dtype, const float *in, size_t n);
#ifdef __x86_64__
void psoup__to_f32_kernel_avx2(float *out, const void *in, psoup_dtype dtype, size_t n);
void psoup__from_f32_kernel_avx2(void *out, psoup_dtype dtype, const float *in, size_t n);
void psoup__to_f32_kernel_avx512(float *out, const void *in, psoup_dtype dtype, size_t n);
void psoup__from_f32_kernel_avx512(void *out, psoup_dtype dtype, const float *in, size_t n);
#endif

static const struct {
    to_f32_fn to_f32;
    from_f32_fn from_f32;
} kernels[PSOUP__ISA_COUNT] = {
    [PSOUP__ISA_GENERIC] = {psoup__to_f32_kernel_generic, psoup__from_f32_kernel_generic},
#ifdef __x86_64__
    [PSOUP__ISA_AVX2] = {psoup__to_f32_kernel_avx2, psoup__from_f32_kernel_avx2},
    [PSOUP__ISA_AVX512] = {psoup__to_f32_kernel_avx512, psoup__from_f32_kernel_avx512},
#endif
};

/* What the flags of the Makefile's variants let the compiler use. */
static bool machine_has(psoup__isa isa) {
    if (isa == PSOUP__ISA_GENERIC)
        return true;
#ifdef __x86_64__
    unsigned a, b, c, d;
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2") && f16c;
    if (isa == PSOUP__ISA_AVX2)
        return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

static const struct {
    const char *name;
    psoup__isa isa;
    bool here; /* on this architecture */
} names[] = {
#ifdef __aarch64__
    {"neon", PSOUP__ISA_GENERIC, true}, /* first: the name that is shown */
#else
    {"neon", PSOUP__ISA_GENERIC, false},
#endif
    {"generic", PSOUP__ISA_GENERIC, true},
#ifdef __x86_64__
    {"avx2", PSOUP__ISA_AVX2, true},
    {"avx512", PSOUP__ISA_AVX512, true},
#else
    {"avx2", PSOUP__ISA_AVX2, false},
    {"avx512", PSOUP__ISA_AVX512, false},
#endif
};
enum { NAMES = sizeof names / sizeof names[0] };

psoup_status psoup__isa_parse(const char *name, psoup__isa *out, psoup_error *error) {
    if (name == NULL) {
        *out = machine_has(PSOUP__ISA_AVX512) ? PSOUP__ISA_AVX512
               : machine_has(PSOUP__ISA_AVX2) ? PSOUP__ISA_AVX2
                                              : PSOUP__ISA_GENERIC;
        return PSOUP_OK;
    }
    for (size_t i = 0; i < NAMES; i++) {
        if (strcmp(name, names[i].name) != 0)
            continue;
        if (!names[i].here || !machine_has(names[i].isa))
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "context options: isa \"%s\": this machine does not have it", name);
        *out = names[i].isa;
        return PSOUP_OK;
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "context options: isa \"%s\": expected generic, avx2, avx512 or neon", name);
}

const char *psoup__isa_name(psoup__isa isa) {
    for (size_t i = 0; i < NAMES; i++)
        if (names[i].here && names[i].isa == isa)
            return names[i].name;
    return "?";
}

psoup__isa psoup__isa_of(const psoup_context *context) {
    return context->isa;
}

/* ---- conversions, in pieces for the threads ---------------------------------------------- */

enum { PIECE = 1 << 16 }; /* elements */

typedef struct conversion {
    psoup__isa isa;
    psoup_dtype dtype;
    float *to; /* to f32 when not NULL */
    const float *from;
    const char *in; /* [n] of dtype */
    char *out;      /* [n] of dtype */
    size_t n;
} conversion;

static void convert_piece(void *arg, size_t task, int worker) {
    const conversion *c = arg;
    (void)worker;
    size_t at = task * PIECE, n = c->n - at < PIECE ? c->n - at : PIECE;
    size_t byte;
    psoup__dtype_bytes(c->dtype, at, &byte); /* PIECE is whole blocks */
    /* byte pointers, for the floats may lie at any address */
    if (c->to != NULL)
        kernels[c->isa].to_f32((float *)(void *)((char *)c->to + at * 4), c->in + byte, c->dtype,
                               n);
    else
        kernels[c->isa].from_f32(c->out + byte, c->dtype,
                                 (const float *)(const void *)((const char *)c->from + at * 4), n);
}

void psoup__to_f32(psoup_context *context, float *out, const void *in, psoup_dtype dtype,
                   size_t n) {
    conversion c = {.isa = context->isa, .dtype = dtype, .to = out, .in = in, .n = n};
    if (n > 0)
        psoup__parallel(context, (n - 1) / PIECE + 1, convert_piece, &c);
}

void psoup__from_f32(psoup_context *context, void *out, psoup_dtype dtype, const float *in,
                     size_t n) {
    conversion c = {.isa = context->isa, .dtype = dtype, .from = in, .out = out, .n = n};
    if (n > 0)
        psoup__parallel(context, (n - 1) / PIECE + 1, convert_piece, &c);
}
