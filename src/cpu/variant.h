/* src/cpu, inside: every file but cpu.c is compiled once per instruction set and exports one function
 * that puts its ops into the table. */
#ifndef PSOUP__CPU_VARIANT_H
#define PSOUP__CPU_VARIANT_H

#include "ops.h"

#define PSOUP__CPU_DECLARE(variant)                                                                \
    void PSOUP__PASTE(psoup__cpu_fill_linear_mix, variant)(psoup__ops *ops);                       \
    void PSOUP__PASTE(psoup__cpu_fill_attention, variant)(psoup__ops *ops);                        \
    void PSOUP__PASTE(psoup__cpu_fill_layer, variant)(psoup__ops *ops);                            \
    void PSOUP__PASTE(psoup__cpu_fill_rows, variant)(psoup__ops *ops);                             \
    void PSOUP__PASTE(psoup__cpu_fill_loss, variant)(psoup__ops *ops);                             \
    void PSOUP__PASTE(psoup__cpu_fill_policy, variant)(psoup__ops *ops);                           \
    void PSOUP__PASTE(psoup__cpu_fill_sample, variant)(psoup__ops *ops);                           \
    void PSOUP__PASTE(psoup__cpu_fill_adamw, variant)(psoup__ops *ops);                            \
    /* log Σ exp(logits), loss.c; max-shifted, summed in one fixed order */                        \
    double PSOUP__PASTE(psoup__cpu_lse, variant)(const float *logits /* [vocab] */, int32_t vocab);

PSOUP__CPU_DECLARE(generic)
PSOUP__CPU_DECLARE(avx2)
PSOUP__CPU_DECLARE(avx512)

#endif
