/* What libcublasLt's and libnccl's twins need of libcuda's: its work goes into the same streams. */
#ifndef PSOUP__HOST_STREAM_H
#define PSOUP__HOST_STREAM_H

#include <functional>

struct CUstream_st;
#ifdef __clang__
#pragma clang diagnostic ignored "-Wreturn-type-c-linkage"
#endif
extern "C" bool psoup_host_put(CUstream_st *stream, std::function<void()> item); /* false: without a context */
/* Work that is done when the item says so: it is asked again and again, and nothing behind it runs before. */
extern "C" bool psoup_host_put_until(CUstream_st *stream, std::function<bool()> item);

#endif
