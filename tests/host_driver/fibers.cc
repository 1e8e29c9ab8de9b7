/* Threads as fibers. A block's warps run one after another, each until all its lanes wait for the block or have
 * returned; then the block's barrier opens. */
#include "fibers.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host {

fiber *now;
index block, grid, block_size;
char *shared;

namespace {

enum { READY, IN_WARP, IN_BLOCK, RETURNED };
enum { STACK = 256 * 1024, MOST_THREADS = 1024, WARPS = MOST_THREADS / 32, MOST_SHARED = 232448 };

fiber fibers[MOST_THREADS];
char *stacks; /* [MOST_THREADS][STACK] */
alignas(64) char slots[WARPS][2][32][64];
void *scheduler;
kernel body;
const void *body_args;

#if defined(__x86_64__)
extern "C" void psoup_host_switch(void **from, void *to);
__asm__(".text\n"
        ".type psoup_host_switch, @function\n"
        "psoup_host_switch:\n"
        "    push %rbp\n    push %rbx\n    push %r12\n    push %r13\n    push %r14\n    push %r15\n"
        "    mov %rsp, (%rdi)\n    mov %rsi, %rsp\n"
        "    pop %r15\n    pop %r14\n    pop %r13\n    pop %r12\n    pop %rbx\n    pop %rbp\n"
        "    ret\n");
void leave() { psoup_host_switch(&now->stack_pointer, scheduler); }
void enter(fiber *f) {
    now = f;
    psoup_host_switch(&scheduler, f->stack_pointer);
}
#else
ucontext_t contexts[MOST_THREADS], scheduler_context;
void leave() { swapcontext(&contexts[now - fibers], &scheduler_context); }
void enter(fiber *f) {
    now = f;
    swapcontext(&scheduler_context, &contexts[f - fibers]);
}
#endif

void start() {
    body(body_args);
    now->state = RETURNED;
    leave();
    std::abort();
}

void prepare(fiber *f, unsigned number) {
    f->thread = index{number, 0, 0};
    f->lane = (int)number % 32;
    f->warp = (int)number / 32;
    f->state = READY;
    f->parity = 0;
    char *stack = stacks + (size_t)number * STACK;
#if defined(__x86_64__)
    void **top = reinterpret_cast<void **>(stack + STACK - 16);
    *--top = nullptr; /* start never returns */
    *--top = reinterpret_cast<void *>(start);
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    f->stack_pointer = top;
#else
    ucontext_t *c = &contexts[number];
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = STACK;
    c->uc_link = nullptr;
    makecontext(c, start, 0);
#endif
}

[[noreturn]] void die(const char *kernel, const char *what) {
    std::fprintf(stderr, "host driver: %s, block (%u, %u, %u): %s\n", kernel, block.x, block.y, block.z, what);
    std::abort();
}

/* One warp until every lane waits for the block or has returned. */
void run_warp(const char *name, unsigned first, unsigned end, int order) {
    for (;;) {
        for (unsigned i = 0; i < end - first; i++) {
            fiber *f = &fibers[order == 0 ? first + i : end - 1 - i];
            if (f->state == READY)
                enter(f);
        }
        unsigned waiting = 0, asked = 0;
        for (unsigned i = first; i < end; i++)
            if (fibers[i].state == IN_WARP) {
                waiting |= 1u << (i - first);
                asked |= fibers[i].mask;
            }
        if (!waiting)
            return;
        const unsigned whole = end - first == 32 ? ~0u : (1u << (end - first)) - 1;
        if ((asked & whole) != waiting)
            die(name, "a warp function that some lanes of its mask do not reach");
        for (unsigned i = first; i < end; i++)
            if (fibers[i].state == IN_WARP)
                fibers[i].state = READY;
    }
}

/* Whose turn is the ith of n. */
size_t turn(size_t i, size_t n, int order) {
    return order == 0 ? i : order == 1 ? n - 1 - i : (i ^ 1) < n ? i ^ 1 : i;
}

void run_block(const char *name, unsigned threads, int order) {
    const unsigned warps = (threads + 31) / 32;
    for (unsigned i = 0; i < threads; i++)
        prepare(&fibers[i], i);
    for (;;) {
        unsigned waiting = 0, returned = 0;
        for (unsigned k = 0; k < warps; k++) {
            const unsigned w = (unsigned)turn(k, warps, order);
            run_warp(name, w * 32, min(w * 32 + 32, threads), order);
        }
        for (unsigned i = 0; i < threads; i++) {
            waiting += fibers[i].state == IN_BLOCK;
            returned += fibers[i].state == RETURNED;
        }
        if (returned == threads)
            return;
        if (waiting + returned != threads || returned > 0)
            die(name, "a __syncthreads that some threads do not reach");
        for (unsigned i = 0; i < threads; i++)
            fibers[i].state = READY;
    }
}

std::vector<entry> &entries() {
    static std::vector<entry> all;
    return all;
}

} // namespace

void wait_block() {
    now->state = IN_BLOCK;
    leave();
}

void wait_warp(unsigned mask) {
    now->state = IN_WARP;
    now->mask = mask;
    leave();
}

void *slot(int parity, int lane) { return slots[now->warp][parity][lane]; }

registration::registration(const char *name, size_t args_size, unsigned most_threads, kernel call) {
    entries().push_back(entry{name, args_size, most_threads, call});
}

const entry *find(const char *name) {
    for (const entry &e : entries())
        if (std::strcmp(e.name, name) == 0)
            return &e;
    return nullptr;
}

void run(const entry *kernel, index blocks, unsigned threads, size_t shared_bytes, const void *args, int order) {
    if (!stacks) {
        stacks = static_cast<char *>(mmap(nullptr, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED)
            die(kernel->name, "no memory for the fibers' stacks");
    }
    body = kernel->call;
    body_args = args;
    grid = blocks;
    block_size = index{threads, 1, 1};
    void *room = nullptr; /* its own allocation, so that a sanitizer sees its end */
    if (posix_memalign(&room, 128, shared_bytes) != 0)
        die(kernel->name, "no memory for what a block shares");
    shared = static_cast<char *>(room);
    const size_t n = (size_t)blocks.x * blocks.y * blocks.z;
    for (size_t i = 0; i < n; i++) {
        const size_t at = turn(i, n, order);
        block = index{(unsigned)(at % blocks.x), (unsigned)(at / blocks.x % blocks.y),
                      (unsigned)(at / blocks.x / blocks.y)};
        std::memset(room, 0xff, shared_bytes); /* NaN: shared memory begins with anything */
        run_block(kernel->name, threads, order);
    }
    std::free(room);
}

} // namespace host

/* IEEE 754 binary16, by its definition. */
float host_to_float(f16 x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31)
        return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexpf((float)(fraction + 1024), exponent - 25) : ldexpf((float)fraction, -24));
}

f16 host_to_f16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = fabsf(x);
    if (std::isnan(x))
        return f16{0x7fff};
    if (size >= 65520)
        return f16{(uint16_t)(sign | 0x7c00)};
    if (size == 0)
        return f16{sign};
    int exponent;
    frexpf(size, &exponent); /* size < 2^exponent */
    const int place = max(exponent - 11, -24);
    const float units = nearbyintf(ldexpf(size, -place)); /* to nearest even */
    const int count = (int)units;
    if (place == -24)
        return f16{(uint16_t)(sign | count)}; /* subnormal, or the smallest normal */
    return count == 2048 ? f16{(uint16_t)(sign | (exponent + 15) << 10)}
                         : f16{(uint16_t)(sign | (exponent + 14) << 10 | (count - 1024))};
}
