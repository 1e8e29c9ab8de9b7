/* Kernels by number, found in the images when they are first asked for. */
#include "gpu/internal.h"

#include <stdio.h>

static const char *const names[PSOUP__KERNEL_COUNT] = {
#define NAME(name, args) "psoup__" #name,
    PSOUP__KERNELS(NAME)
#undef NAME
};

static const size_t sizes[PSOUP__KERNEL_COUNT] = {
#define SIZE(name, args) sizeof(psoup__##args##_args),
    PSOUP__KERNELS(SIZE)
#undef SIZE
};

static psoup__cu_function find(psoup__gpu *gpu, psoup__kernel kernel) {
    psoup__cu_function *function = &gpu->functions[kernel];
    psoup__cu_result result = 0;
    for (int i = 0; !*function && i < gpu->n_modules; i++) {
        result = gpu->driver.module_function(function, gpu->modules[i], names[kernel]);
        if (result != 0)
            *function = NULL;
    }
    if (!*function)
        psoup__gpu_failed(gpu, result != 0 ? result : PSOUP__CU_OUT_OF_MEMORY, names[kernel]);
    return *function;
}

void psoup__gpu_launch(psoup__gpu *gpu, psoup__kernel kernel, psoup__grid grid, const void *args) {
    enum { USUAL_SHARED = 32 << 10 }; /* 48 KiB with the kernel's own; more must be asked for by name */
    if (gpu->failed.status != PSOUP_OK || grid.x == 0 || grid.y == 0 || grid.z == 0)
        return;
    gpu->cast.of = NULL;
    if (psoup__record_kernel(gpu, kernel, grid, args, sizes[kernel]))
        return;
    psoup__cu_function function = psoup__gpu_enter(gpu) ? find(gpu, kernel) : NULL;
    if (!function)
        return;
    if (grid.shared > USUAL_SHARED && grid.shared > gpu->dynamic_shared[kernel]) {
        if (psoup__gpu_failed(gpu, gpu->driver.function_set(function, PSOUP__CU_FUNCTION_DYNAMIC_SHARED,
                                                            (int)grid.shared),
                              names[kernel]))
            return;
        gpu->dynamic_shared[kernel] = grid.shared;
    }
    void *parameters[] = {(void *)(uintptr_t)args};
    psoup__gpu_failed(gpu, gpu->driver.launch(function, grid.x, grid.y, grid.z, grid.threads, 1, 1,
                                              grid.shared, gpu->stream, parameters, NULL),
                      names[kernel]);
}

psoup__grid psoup__gpu_flat(const psoup__gpu *gpu, size_t n, size_t each) {
    enum { WAVES = 8 }; /* blocks for each multiprocessor: all its threads, and some to even out */
    size_t work = (size_t)PSOUP__FLAT_THREADS * each, blocks = (n + work - 1) / work;
    size_t most = (size_t)gpu->processors * WAVES;
    return (psoup__grid){.x = (unsigned)(blocks < most ? blocks : most), .y = 1, .z = 1,
                         .threads = PSOUP__FLAT_THREADS};
}

psoup__grid psoup__gpu_rows(int32_t rows, int32_t items) {
    int32_t threads = items < PSOUP__FLAT_THREADS ? (items + 31) / 32 * 32 : PSOUP__FLAT_THREADS;
    return (psoup__grid){.x = (unsigned)rows, .y = 1, .z = 1, .threads = (unsigned)threads};
}

/* At least four rows to a block: ⌈rows / 4⌉ · width sums in f32 are no more than rows · width in 16 bits, once
 * there are two blocks. At most two blocks for each multiprocessor. */
psoup__row_sums psoup__gpu_row_sums(psoup__gpu *gpu, float *out, int32_t rows, int32_t width) {
    enum { LEAST = 4, WAVES = 2 };
    int32_t most = gpu->processors * WAVES, each = (rows + most - 1) / most;
    psoup__row_sums sums = {.out = out, .sums = out, .each = each > LEAST ? each : LEAST, .width = width};
    sums.blocks = (rows + sums.each - 1) / sums.each;
    if (sums.blocks < 2)
        return sums;
    sums.sums = (float *)(uintptr_t)gpu->room;
    if ((size_t)sums.blocks * (size_t)width * sizeof(float) > gpu->room_bytes &&
        gpu->failed.status == PSOUP_OK)
        psoup__fail(&gpu->failed, PSOUP_ERROR_STATE,
                    "GPU: no room was reserved for sums over %d rows of %d", (int)rows, (int)width);
    return sums;
}

void psoup__gpu_row_sums_end(psoup__gpu *gpu, const psoup__row_sums *sums) {
    const int32_t tiles = (sums->width + PSOUP__SUM_COLUMNS - 1) / PSOUP__SUM_COLUMNS;
    if (sums->blocks > 1)
        PSOUP__LAUNCH(gpu, column_sums, ((psoup__grid){(unsigned)tiles, 1, 1, PSOUP__FLAT_THREADS, 0}),
                      {sums->out, sums->sums, sums->blocks, sums->width});
}
