/* tests/host_driver/host_mma.h: tensor cores and asynchronous copies for cuda/mma.cuh, on the CPU. The
 * sum over k runs in ascending order in f32; a GPU's order and rounding inside one product are its own. */
#ifndef PSOUP__HOST_MMA_H
#define PSOUP__HOST_MMA_H

#include <cstdlib>
#include <deque>
#include <vector>

#include "host_device.h"

namespace host {
struct fragments {
    uint32_t a[4], b[2];
};
template <typename T> float half_of(uint32_t pair, int which) {
    T x;
    x.bits = (uint16_t)(pair >> (16 * which));
    return to_float(x);
}

struct copy {
    void *to;
    const void *from;
    size_t bytes;
    bool there;
};
/* The copies of each thread of the block by commit, the open one last; they happen when they are waited
 * for. */
inline std::deque<std::vector<copy>> &copies() {
    static std::deque<std::vector<copy>> of[1024];
    std::deque<std::vector<copy>> &mine = of[now->thread.x];
    if (mine.empty())
        mine.emplace_back();
    return mine;
}
inline void copy_later(void *to, const void *from, size_t bytes, bool there) {
    if (((uintptr_t)to | (there ? (uintptr_t)from : 0)) % bytes != 0)
        std::abort();
    copies().back().push_back(copy{to, from, bytes, there});
}
} // namespace host

template <typename T> void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    const host::fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const int parity = host::give(0xffffffffu, mine), g = host::now->lane / 4, t = host::now->lane % 4;
    for (int pair = 0; pair < 8; pair++) { /* k = 2 · pair, 2 · pair + 1 */
        const host::fragments row = host::take<host::fragments>(parity, g * 4 + pair % 4);
        for (int j = 0; j < 2; j++) {
            const host::fragments column = host::take<host::fragments>(parity, (2 * t + j) * 4 + pair % 4);
            for (int half = 0; half < 2; half++) {
                const float y = host::half_of<T>(column.b[pair / 4], half);
                d[j] += host::half_of<T>(row.a[pair / 4 * 2], half) * y;
                d[j + 2] += host::half_of<T>(row.a[pair / 4 * 2 + 1], half) * y;
            }
        }
    }
}

inline void load_matrices(uint32_t r[4], const void *row) {
    const int parity = host::give(0xffffffffu, row), g = host::now->lane / 4, t = host::now->lane % 4;
    for (int i = 0; i < 4; i++)
        std::memcpy(&r[i], host::take<const uint16_t *>(parity, i * 8 + g) + 2 * t, 4);
}

inline void load_matrices_transposed(uint32_t r[4], const void *row) {
    const int parity = host::give(0xffffffffu, row), g = host::now->lane / 4, t = host::now->lane % 4;
    for (int i = 0; i < 4; i++) {
        const uint32_t low = host::take<const uint16_t *>(parity, i * 8 + 2 * t)[g];
        r[i] = low | (uint32_t)host::take<const uint16_t *>(parity, i * 8 + 2 * t + 1)[g] << 16;
    }
}

inline void copy16(void *to, const void *from, bool there) { host::copy_later(to, from, 16, there); }
inline void copy8(void *to, const void *from, bool there) { host::copy_later(to, from, 8, there); }
inline void copy_commit() { host::copies().emplace_back(); }
template <size_t N> void copy_wait() {
    for (auto &mine = host::copies(); mine.size() > N + 1; mine.pop_front())
        for (const host::copy &c : mine.front())
            if (c.there)
                std::memcpy(c.to, c.from, c.bytes);
            else
                std::memset(c.to, 0, c.bytes);
}

#endif
