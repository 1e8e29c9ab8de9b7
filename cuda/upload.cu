/* Host data that crosses inside a launch. */
#include "device.cuh"

PSOUP__KERNEL(carry, PSOUP__FLAT_THREADS) {
    for (int i = threadIdx.x; i < a.n; i += blockDim.x)
        a.out[i] = a.data[i];
}
