/* libcuda.so.1 for machines without one: the calls that src/gpu makes, on the CPU.
 *
 * Work put into a stream waits there until somebody waits for it, as it may on a GPU: host memory that is
 * changed too early, or read too early, gives wrong results here too. Device memory is closed to the host
 * while no work runs, so that a stray access ends the process (not under ASan, where it is heap memory). As there,
 * a thread needs a context, and copies on the device know its memory from the host's.
 *
 *   PSOUP_HOST_ORDER=0|1|2     how the threads of a block, and the blocks, take turns (fibers.h)
 *   PSOUP_HOST_FAIL_ALLOC=+N   the Nth allocation of device memory after this was set fails
 *   PSOUP_HOST_ARCH=86         the compute capability, and a block's memory on such a device
 */
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "fibers.h"
#include "stream.h"

#if defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER 1
#endif
#endif

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600, PAGE = 4096 };
/* What a block may have without asking for it, less what a kernel may have besides, which nobody counts here; what
 * the driver takes of a block's memory. */
enum { USUAL_SHARED = 44 << 10, DRIVERS_SHARED = 1 << 10 };

typedef std::vector<std::function<bool()>> work; /* each item says whether it is done */

struct CUgraph_st {
    work list;
};
struct CUgraphExec_st {
    work list;
};
struct CUfunc_st {
    const host::entry *entry;
    size_t most_shared;
};
struct CUstream_st {
    work queue;
    bool capturing = false;
    work captured;
};
struct CUevent_st {
    CUstream_st *stream = nullptr;
    std::shared_ptr<double> passed = std::make_shared<double>(0); /* when the stream came past it, in ms */
};

namespace {

CUstream_st default_stream;
std::map<char *, size_t> device, pinned; /* base to bytes */
std::map<const host::entry *, std::unique_ptr<CUfunc_st>> functions;
thread_local void *current; /* context */
std::set<CUstream_st *> streams{&default_stream};
std::string failing; /* what PSOUP_HOST_FAIL_ALLOC was */
int until_failure;

/* At the head of a call. */
#define NEED_CONTEXT                                                                                       \
    if (!current)                                                                                          \
    return NO_CONTEXT

/* Whether so many bytes from here on are of one allocation. */
bool on_device(unsigned long long memory, size_t bytes) {
    char *start = (char *)memory;
    auto block = device.upper_bound(start);
    if (block == device.begin())
        return false;
    --block;
#ifdef ADDRESS_SANITIZER
    const size_t room = block->second;
#else
    const size_t room = (block->second + PAGE - 1) / PAGE * PAGE;
#endif
    return bytes <= room && (size_t)(start - block->first) <= room - bytes;
}

CUstream_st *of(CUstream_st *stream) { return stream ? stream : &default_stream; }

int number_of(const char *name, int otherwise) {
    const char *text = std::getenv(name);
    return text && *text ? std::atoi(text) : otherwise;
}

int architecture() { return number_of("PSOUP_HOST_ARCH", 90); }

/* CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" */
int most_shared() {
    const int arch = architecture();
    return ((arch == 80 || arch == 87 ? 164 : arch == 90 || arch == 100 || arch == 103 ? 228 : 100) << 10) -
           DRIVERS_SHARED;
}

[[maybe_unused]] size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
bool fails_now() {
    const char *text = std::getenv("PSOUP_HOST_FAIL_ALLOC");
    if (!text)
        text = "";
    if (failing != text) {
        failing = text;
        until_failure = *text ? std::atoi(text) : 0;
    }
    return until_failure > 0 && --until_failure == 0;
}


void open_memory(bool open) {
#ifndef ADDRESS_SANITIZER
    for (auto &d : device)
        mprotect(d.first, pages(d.second), open ? PROT_READ | PROT_WRITE : PROT_NONE);
#else
    (void)open;
#endif
}

void run_all(CUstream_st *stream) {
    if (stream->queue.empty())
        return;
    work queue;
    queue.swap(stream->queue);
    open_memory(true);
    for (auto &item : queue)
        while (!item())
            usleep(50);
    open_memory(false);
}

void put_until(CUstream_st *stream, std::function<bool()> item) {
    stream = of(stream);
    (stream->capturing ? stream->captured : stream->queue).push_back(std::move(item));
}

void put(CUstream_st *stream, std::function<void()> item) {
    put_until(stream, [item = std::move(item)] { return item(), true; });
}

bool is_pinned(const void *p) {
    for (auto &block : pinned)
        if ((const char *)p >= block.first && (const char *)p < block.first + block.second)
            return true;
    return false;
}

/* CUDA_MEMCPY2D */
struct plane {
    size_t x, y;
    int place; /* 1 host, 2 device */
    char *host;
    unsigned long long device;
    void *array;
    size_t pitch;
    char *data() const { return (place == 1 ? host : (char *)device) + y * pitch + x; }
};
struct copy_2d {
    plane in, out;
    size_t width, height;
};
void copy_plane(const copy_2d &c) {
    for (size_t row = 0; row < c.height; row++)
        std::memcpy(c.out.data() + row * c.out.pitch, c.in.data() + row * c.in.pitch, c.width);
}

} // namespace

extern "C" {

bool psoup_host_put(CUstream_st *stream, std::function<void()> item) {
    if (current)
        put(stream, std::move(item));
    return current != nullptr;
}

bool psoup_host_put_until(CUstream_st *stream, std::function<bool()> item) {
    if (current)
        put_until(stream, std::move(item));
    return current != nullptr;
}

int cuInit(unsigned) { return SUCCESS; }
int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory"
            : error == NO_CONTEXT  ? "invalid device context"
            : error == NOT_FOUND   ? "named symbol not found"
                                   : "invalid argument";
    return SUCCESS;
}
int cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}
int cuDeviceGetCount(int *count) {
    *count = 1;
    return SUCCESS;
}
int cuDeviceGet(int *out, int ordinal) {
    *out = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}
int cuDeviceGetName(char *name, int length, int) {
    std::snprintf(name, (size_t)length, "host driver");
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 16   ? 4
             : attribute == 75 ? architecture() / 10
             : attribute == 76 ? architecture() % 10
             : attribute == 97 ? most_shared()
                               : 0;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int) {
    *context = &default_stream;
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void *context) {
    current = context;
    return SUCCESS;
}
int cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}
int cuCtxSynchronize() {
    NEED_CONTEXT;
    for (CUstream_st *stream : streams)
        run_all(stream);
    return SUCCESS;
}
int cuMemGetInfo_v2(size_t *unused, size_t *total) {
    NEED_CONTEXT;
    *unused = *total = (size_t)1 << 32;
    return SUCCESS;
}

/* The end of an allocation, rounded up to what it is aligned to, is the end of a page, and after it comes one that is
 * never open. A sanitizer knows its end to the byte. */
int cuMemAlloc_v2(unsigned long long *out, size_t bytes) {
    NEED_CONTEXT;
    if (bytes == 0)
        return INVALID_VALUE;
    if (fails_now() || bytes > (size_t)1 << 36)
        return OUT_OF_MEMORY;
#ifdef ADDRESS_SANITIZER
    const size_t room = bytes;
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, room) != 0)
        return OUT_OF_MEMORY;
    char *base = static_cast<char *>(memory), *start = base;
#else
    const size_t room = (bytes + 255) / 256 * 256;
    char *base = static_cast<char *>(mmap(nullptr, pages(room) + PAGE, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED)
        return OUT_OF_MEMORY;
    char *start = base + pages(room) - room;
    mprotect(base + pages(room), PAGE, PROT_NONE);
#endif
    std::memset(start, 0xff, room); /* NaN: fresh memory holds anything */
    device[base] = room;
#ifndef ADDRESS_SANITIZER
    mprotect(base, pages(room), PROT_NONE);
#endif
    *out = (unsigned long long)start;
    return SUCCESS;
}

int cuMemFree_v2(unsigned long long memory) {
    NEED_CONTEXT;
    run_all(&default_stream);
    char *start = (char *)memory;
    auto block = device.upper_bound(start);
    if (block == device.begin())
        return INVALID_VALUE;
    --block;
#ifdef ADDRESS_SANITIZER
    std::free(block->first);
#else
    if (block->first + pages(block->second) - block->second != start)
        return INVALID_VALUE;
    munmap(block->first, pages(block->second) + PAGE);
#endif
    device.erase(block);
    return SUCCESS;
}

int cuMemHostAlloc(void **out, size_t bytes, unsigned) {
    NEED_CONTEXT;
    char *memory = static_cast<char *>(std::calloc(bytes, 1));
    pinned[memory] = bytes;
    *out = memory;
    return memory ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemFreeHost(void *memory) {
    NEED_CONTEXT;
    pinned.erase(static_cast<char *>(memory));
    std::free(memory);
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(unsigned long long out, const void *in, size_t bytes, CUstream_st *stream) {
    NEED_CONTEXT;
    if (!on_device(out, bytes))
        return INVALID_VALUE;
    if (is_pinned(in)) {
        put(stream, [=] { std::memcpy((void *)out, in, bytes); });
    } else {
        auto kept = std::make_shared<std::vector<char>>((const char *)in, (const char *)in + bytes);
        put(stream, [=] { std::memcpy((void *)out, kept->data(), bytes); });
    }
    return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void *out, unsigned long long in, size_t bytes, CUstream_st *stream) {
    NEED_CONTEXT;
    if (!on_device(in, bytes))
        return INVALID_VALUE;
    put(stream, [=] { std::memcpy(out, (const void *)in, bytes); });
    if (!is_pinned(out) && !of(stream)->capturing)
        run_all(of(stream));
    return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(unsigned long long out, unsigned long long in, size_t bytes, CUstream_st *stream) {
    NEED_CONTEXT;
    if (!on_device(out, bytes) || !on_device(in, bytes))
        return INVALID_VALUE;
    put(stream, [=] { std::memmove((void *)out, (const void *)in, bytes); });
    return SUCCESS;
}
int cuMemcpy2DAsync_v2(const copy_2d *given, CUstream_st *stream) {
    NEED_CONTEXT;
    copy_2d copy = *given;
    if (copy.in.pitch < copy.width || copy.out.pitch < copy.width || copy.in.place == copy.out.place)
        return INVALID_VALUE;
    if (copy.in.place == 1 && !is_pinned(copy.in.host)) {
        auto kept = std::make_shared<std::vector<char>>(copy.width * copy.height);
        copy_2d away = copy;
        away.out = plane{0, 0, 1, kept->data(), 0, nullptr, copy.width};
        copy_plane(away);
        copy.in = away.out;
        put(stream, [=] { (void)kept, copy_plane(copy); });
        return SUCCESS;
    }
    put(stream, [=] { copy_plane(copy); });
    if (copy.out.place == 1 && !is_pinned(copy.out.host) && !of(stream)->capturing)
        run_all(of(stream));
    return SUCCESS;
}
int cuMemsetD8Async(unsigned long long out, unsigned char value, size_t bytes, CUstream_st *stream) {
    NEED_CONTEXT;
    if (!on_device(out, bytes))
        return INVALID_VALUE;
    put(stream, [=] { std::memset((void *)out, value, bytes); });
    return SUCCESS;
}

int cuStreamCreate(CUstream_st **out, unsigned) {
    NEED_CONTEXT;
    streams.insert(*out = new CUstream_st);
    return SUCCESS;
}
int cuStreamDestroy_v2(CUstream_st *stream) {
    run_all(stream);
    streams.erase(stream);
    delete stream;
    return SUCCESS;
}
int cuStreamSynchronize(CUstream_st *stream) {
    NEED_CONTEXT;
    if (of(stream)->capturing)
        return 900; /* CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED */
    run_all(of(stream));
    return SUCCESS;
}
/* What can be done now is. */
int cuStreamQuery(CUstream_st *stream) {
    NEED_CONTEXT;
    work &queue = of(stream)->queue;
    size_t done = 0;
    open_memory(true);
    while (done < queue.size() && queue[done]())
        done++;
    open_memory(false);
    queue.erase(queue.begin(), queue.begin() + (long)done);
    return queue.empty() ? SUCCESS : NOT_READY;
}
int cuEventCreate(CUevent_st **out, unsigned) {
    NEED_CONTEXT;
    *out = new CUevent_st;
    return SUCCESS;
}
int cuEventDestroy_v2(CUevent_st *event) {
    delete event;
    return SUCCESS;
}
int cuEventRecord(CUevent_st *event, CUstream_st *stream) {
    NEED_CONTEXT;
    auto passed = event->passed = std::make_shared<double>(0);
    event->stream = of(stream);
    put(stream, [=] {
        using namespace std::chrono;
        *passed = duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
    });
    return SUCCESS;
}
int cuEventElapsedTime(float *milliseconds, CUevent_st *start, CUevent_st *end) {
    *milliseconds = (float)(*end->passed - *start->passed);
    return SUCCESS;
}
/* Asking moves nothing: what is in a stream stays there for as long as it may. */
int cuEventQuery(CUevent_st *event) { return event->stream && *event->passed == 0 ? NOT_READY : SUCCESS; }
int cuEventSynchronize(CUevent_st *event) {
    if (event->stream)
        run_all(event->stream);
    return SUCCESS;
}

/* The kernels are those compiled in here, whatever the image says. */
int cuModuleLoadData(void **out, const void *) {
    NEED_CONTEXT;
    *out = &functions;
    return SUCCESS;
}
int cuModuleUnload(void *) { return SUCCESS; }
int cuModuleGetFunction(CUfunc_st **out, void *, const char *name) {
    NEED_CONTEXT;
    const host::entry *entry = host::find(name);
    if (!entry)
        return NOT_FOUND;
    auto &function = functions[entry];
    if (!function)
        function.reset(new CUfunc_st{entry, USUAL_SHARED});
    *out = function.get();
    return SUCCESS;
}
int cuFuncSetAttribute(CUfunc_st *function, int attribute, int value) {
    NEED_CONTEXT;
    if (attribute != 8 || value > most_shared())
        return INVALID_VALUE;
    function->most_shared = (size_t)value;
    return SUCCESS;
}

int cuLaunchKernel(CUfunc_st *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, CUstream_st *stream, void **args, void **) {
    NEED_CONTEXT;
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_y > 65535 || grid_z > 65535 || block_x == 0 ||
        block_x > function->entry->most_threads || block_y != 1 || block_z != 1 || shared > function->most_shared)
        return INVALID_VALUE;
    const host::entry *entry = function->entry;
    auto kept = std::make_shared<std::vector<max_align_t>>(entry->args_size / sizeof(max_align_t) + 1);
    std::memcpy(kept->data(), args[0], entry->args_size);
    const int order = number_of("PSOUP_HOST_ORDER", 0);
    put(stream, [=] {
        host::run(entry, host::index{grid_x, grid_y, grid_z}, block_x, shared, kept->data(), order);
    });
    return SUCCESS;
}

int cuStreamBeginCapture_v2(CUstream_st *stream, int) {
    NEED_CONTEXT;
    if (!stream || stream->capturing)
        return INVALID_VALUE;
    stream->capturing = true;
    stream->captured.clear();
    return SUCCESS;
}
int cuStreamEndCapture(CUstream_st *stream, CUgraph_st **out) {
    stream->capturing = false;
    *out = new CUgraph_st{stream->captured};
    stream->captured.clear();
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(CUgraphExec_st **out, CUgraph_st *graph, unsigned long long) {
    NEED_CONTEXT;
    *out = new CUgraphExec_st{graph->list};
    return SUCCESS;
}
int cuGraphLaunch(CUgraphExec_st *graph, CUstream_st *stream) {
    NEED_CONTEXT;
    for (auto &item : graph->list)
        put(stream, item);
    return SUCCESS;
}
int cuGraphExecDestroy(CUgraphExec_st *graph) {
    delete graph;
    return SUCCESS;
}
int cuGraphDestroy(CUgraph_st *graph) {
    delete graph;
    return SUCCESS;
}

} // extern "C"
