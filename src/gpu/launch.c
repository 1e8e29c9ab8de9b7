/* Kernels by number, found in the images when they are first asked for. */
#include "gpu/internal.h"

#include <stdio.h>

static const char *const names[PSOUP__KERNEL_COUNT] = {
#define NAME(name, args) "psoup__" #name,
    PSOUP__KERNELS(NAME)
#undef NAME
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
    enum { USUAL_SHARED = 48 << 10 }; /* more must be asked for by name */
    if (gpu->failed.status != PSOUP_OK || grid.x == 0 || grid.y == 0 || grid.z == 0)
        return;
    psoup__cu_function function = find(gpu, kernel);
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
