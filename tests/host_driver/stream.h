/* What libcublasLt's twin needs of libcuda's: its work goes into the same streams. */
#ifndef PSOUP__HOST_STREAM_H
#define PSOUP__HOST_STREAM_H

#include <functional>

struct CUstream_st;
#ifdef __clang__
#pragma clang diagnostic ignored "-Wreturn-type-c-linkage"
#endif
extern "C" bool psoup_host_put(CUstream_st *stream, std::function<void()> item); /* false: without a context */

#endif
