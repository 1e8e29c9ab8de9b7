/* The words of cuda/philox.cuh, by cuRAND's function where its header is installed and by the twin of it,
 * beside those of src/base/philox.c. */
#include <cstdio>

#include "philox.cuh"

extern "C" void psoup__philox_block(uint64_t seed, uint64_t sequence, uint64_t block, uint32_t out[4]);

static int differ(uint64_t seed, uint64_t sequence, uint64_t block) {
    uint32_t want[4];
    psoup__philox_block(seed, sequence, block, want);
    const uint4 got = philox_block(seed, sequence, block);
    const uint4 twin = philox_twin(
        uint4{(unsigned)block, (unsigned)(block >> 32), (unsigned)sequence, (unsigned)(sequence >> 32)},
        uint2{(unsigned)seed, (unsigned)(seed >> 32)});
    if (std::memcmp(&got, want, sizeof want) == 0 && std::memcmp(&twin, want, sizeof want) == 0)
        return 0;
    std::printf("philox: seed %llx, sequence %llx, block %llx: the words differ\n", (unsigned long long)seed,
                (unsigned long long)sequence, (unsigned long long)block);
    return 1;
}

int main() {
    static const uint64_t edges[] = {0, 1, 0xffffffffu, 1ull << 32, ~0ull, 0x8000000080000000u};
    enum { EDGES = sizeof edges / sizeof *edges, RANDOM = 100000 };
    int failed = 0;
    for (int i = 0; i < EDGES * EDGES * EDGES; i++)
        failed |= differ(edges[i % EDGES], edges[i / EDGES % EDGES], edges[i / EDGES / EDGES]);
    uint64_t x = 1, part[3];
    for (int i = 0; i < RANDOM && !failed; i++) {
        for (uint64_t &p : part) /* Knuth's MMIX: x' = a x + c */
            p = x = x * 6364136223846793005u + 1442695040888963407u;
        failed = differ(part[0] ^ part[1] >> 32, part[1] ^ part[2] >> 32, part[2] ^ part[0] >> 32);
    }
    std::printf("philox: %d blocks, %s\n", EDGES * EDGES * EDGES + RANDOM,
                failed                ? "not the same"
                : PSOUP__CURAND != 0 ? "by cuRAND, by its twin and on the CPU the same"
                                      : "by the twin and on the CPU the same (cuRAND's header is not here)");
    return failed;
}
