# libpsoup: build, demonstrate, check.
#
#   make            lib/libpsoup.a, lib/libpsoup.so, lib/libpsoup-merge.a, bin/psoup; and where mpicc is,
#                   lib/libpsoup-mpi.a, bin/psoup-mpi
#   make demo       the whole method on a small world, from a base model to a report (FULL=1: longer)
#   make check      the tests (under ten minutes on two cores)
#   make check-all  the same under ASan and UBSan, the long cases, clang, the fuzzers, the story
#   make coverage   what share of the library's lines the tests run, file by file
#   make bench      our speed beside a peer's and the machine's limit, in one run
#   make bench-gpu  every op on the GPU beside what the device copies and multiplies at most
#   make gpu        the GPU backend measured, on a machine with one (docs/gpu.md); STAGE= names some of it
#   make wheel      the Python package with the library in it, for pip
#   make install    into PREFIX (default /usr/local), under DESTDIR
#   make clean
#
# Choose a build with config=release (default), debug, sanitize or coverage, and a compiler with CC=.
# V=1 shows the commands; with WERROR=-Werror a warning is an error.
# make, make lib, make install and make wheel have the GPU's kernels for every architecture; other goals those that were
# built last, or, where none were, for 8.0 and PTX, which takes a sixth of the time. GPU_ARCHS= says otherwise.

config  ?= release
PREFIX  ?= /usr/local
CC      := $(if $(filter default,$(origin CC)),gcc,$(CC))
AR      ?= ar
PYTHON  ?= python3

# ---- what a fresh Debian or Ubuntu needs: the one list -----------------------------------------
PACKAGES      = gcc make binutils pkg-config libc6-dev libjansson-dev libpcre2-dev libzstd-dev libyaml-dev \
                libxxhash-dev libmd-dev
PACKAGES_TEST = check abigail-tools g++ clang libclang-rt-dev python3 python3-venv python3-numpy \
                libopenmpi-dev openmpi-bin iproute2
PACKAGES_BENCH = libopenblas-dev

# ---- flags --------------------------------------------------------------------------------------
B        = build/$(notdir $(CC))-$(config)
ARCH    := $(shell uname -m)
WARN     = -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith \
           -Wwrite-strings -Wno-unused-parameter $(WERROR)
FLAGS_release  = -O2 -g -DNDEBUG
FLAGS_debug    = -O0 -g3
FLAGS_sanitize = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined \
                 -fno-omit-frame-pointer
FLAGS_coverage = -O0 -g --coverage
MODE     = $(FLAGS_$(config))
CPPFLAGS += -Iinclude -Isrc -D_GNU_SOURCE
CFLAGS   += -std=c11 $(MODE) $(WARN) -fPIC -fno-semantic-interposition -fno-math-errno -ffp-contract=off -pthread
LDFLAGS  += $(if $(filter sanitize coverage,$(config)),$(MODE)) -pthread
LIBS      = -ljansson -lpcre2-8 -lzstd -lyaml -lmd -lm

# Kernel sources are compiled once per instruction set; see src/base/base.h, isa.c.
VARIANTS        = generic
ifeq ($(ARCH),x86_64)
VARIANTS       += avx2 avx512
endif
FLAGS_generic   =
FLAGS_avx2      = -mavx2 -mfma -mf16c -mbmi2
FLAGS_avx512    = $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
KERNEL_SRC      = src/base/gemm_kernel.c src/base/blocks_kernel.c src/base/convert.c src/blend/kernels.c src/blend/fold_kernel.c \
                  src/blend/method_kernels.c src/blend/dense_kernels.c \
                  src/merge/hash_kernel.c \
                  $(filter-out src/cpu/cpu.c,$(wildcard src/cpu/*.c))
KERNEL_OPT      = $(if $(filter release,$(config)),-O3)

SRC      = $(filter-out $(KERNEL_SRC),$(wildcard src/*/*.c))
OBJ      = $(SRC:%.c=$B/%.o) $B/src/gpu/image.o \
           $(foreach v,$(VARIANTS),$(patsubst %.c,$B/%.$v.o,$(wildcard $(KERNEL_SRC))))
MERGE_OBJ = $(filter $B/src/base/% $B/src/format/% $B/src/blend/% $B/src/merge/%,$(OBJ))

# The GPU's kernels, one fatbin for each file: machine code for GPU_ARCHS ("all", or a list) and, for what is newer,
# PTX of the last. Where nvcc is missing the library has none, and says so when a GPU is asked for.
NVCC      ?= $(firstword $(wildcard $(shell command -v nvcc) /usr/local/cuda/bin/nvcc))
CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(NVCC))
CUDA_FLAGS = $(if $(CUDA_HOME),-idirafter $(CUDA_HOME)/include -idirafter $(CUDA_HOME)/include/cccl)
GPU_ALL    = 80 86 89 90 100 120
GPU_GIVEN  = all lib mpi install wheel gpu-images lib/% bin/% # goals that others are given
GPU_LAST   = $(subst -, ,$(shell sed -n '1s|.*cuda-\([0-9-]*\)/.*|\1|p' $B/src/gpu/images.inc 2>/dev/null))
ifndef GPU_ARCHS
GPU_ARCHS := $(if $(filter $(GPU_GIVEN),$(or $(MAKECMDGOALS),all)),all,$(or $(GPU_LAST),80))
endif
export GPU_ARCHS
GPU_LIST  := $(if $(filter all,$(GPU_ARCHS)),$(GPU_ALL),$(GPU_ARCHS))
GPU_CODE   = $(foreach a,$(GPU_LIST),-gencode arch=compute_$a,code=sm_$a) \
             -gencode arch=compute_$(lastword $(GPU_LIST)),code=compute_$(lastword $(GPU_LIST))
GPU_LINES  = # -lineinfo, for who measures
NVCCFLAGS  = -O3 -std=c++17 $(GPU_LINES) --compress-mode=size -Werror all-warnings -Xptxas -v
GPU_B      = build/cuda-$(subst $() ,-,$(strip $(GPU_LIST)))$(if $(GPU_LINES),-lines)
GPU_SRC    = $(wildcard cuda/*.cu)
GPU_IMAGES = $(if $(NVCC),$(GPU_SRC:cuda/%.cu=$(GPU_B)/%.fatbin),build/cuda-none/none)

TESTS    = $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
HELPERS  = judge make_tiny
BENCHES  = $(patsubst tests/%.c,%,$(wildcard tests/bench_*.c))
FUZZERS  = $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))

SONAME   = libpsoup.so.0
VERSION  = 0.5.0

.PHONY: all lib mpi demo check check-all bench bench-gpu gpu install clean deps deps-test deps-bench host_driver gpu-images \
        test-programs run-tests check-house check-names check-abi check-install check-python check-gpu wheel fuzz run-fuzzers coverage abi-baseline
.PRECIOUS: $B/%.o
.DELETE_ON_ERROR:

all: lib bin/psoup bin/personalized_soup mpi

# What check, demo and their like build, they build on every core; a -j of the caller's own stands.
JOBS    ?= $(shell nproc 2>/dev/null || echo 1)
PARALLEL = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(JOBS))
BUILD    = $(MAKE) --no-print-directory $(PARALLEL)

# ---- the library --------------------------------------------------------------------------------
lib: lib/libpsoup.a lib/libpsoup.so lib/libpsoup-merge.a

Q = $(if $(V),,@)

$B/%.o: %.c
	@mkdir -p $(@D)
	@echo "  CC   $<"
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

define variant_rule
$B/%.$(1).o: %.c
	@mkdir -p $$(@D)
	@echo "  CC   $$< ($(1))"
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(KERNEL_OPT) $(FLAGS_$(1)) -DPSOUP__VARIANT=$(1) -MMD -MP -c $$< -o $$@
endef
$(foreach v,$(VARIANTS),$(eval $(call variant_rule,$v)))

# Registers that spill to memory are reported, and fail the build but in files that say "spills allowed".
$(GPU_B)/%.fatbin: cuda/%.cu $(wildcard cuda/*.cuh cuda/*.h) include/psoup/common.h src/base/f8.h src/base/policy.h
	@mkdir -p $(@D)
	@echo "  NVCC $< ($(GPU_LIST))"
	$(Q)$(NVCC) $(NVCCFLAGS) $(GPU_CODE) -fatbin $< -o $@ > $(@:.fatbin=.log) 2>&1 || { cat $(@:.fatbin=.log); exit 1; }
	@! grep -B2 ' [1-9][0-9]* bytes spill' $(@:.fatbin=.log) || grep -q 'spills allowed' $< || { rm $@; exit 1; }

gpu-images: $(GPU_IMAGES)

build/cuda-none/none:
	@mkdir -p $(@D)
	@echo "  nvcc is not here: the library is built without GPU kernels"
	@printf none > $@

$B/src/gpu/images.inc: FORCE
	@mkdir -p $(@D)
	@printf 'PSOUP__IMAGE("%s")\n' $(GPU_IMAGES) > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$B/src/gpu/image.o: src/gpu/image.S $B/src/gpu/images.inc $(GPU_IMAGES)
	$(Q)$(CC) -DPSOUP__IMAGES='"$(CURDIR)/$B/src/gpu/images.inc"' -c $< -o $@

$B/libpsoup.a: $(OBJ)
	@mkdir -p $(@D)
	@echo "  AR   $@"
	$(Q)rm -f $@ && $(AR) rcs $@ $^

$B/libpsoup-merge.a: $(MERGE_OBJ)
	@mkdir -p $(@D)
	@echo "  AR   $@"
	$(Q)rm -f $@ && $(AR) rcs $@ $^

$B/libpsoup.so: $(OBJ) lib/psoup.map
	@echo "  LINK $@"
	$(Q)$(CC) -shared $(LDFLAGS) -Wl,-soname,$(SONAME) -Wl,--version-script=lib/psoup.map \
	    $(if $(filter sanitize,$(config)),,-Wl,--no-undefined) $(OBJ) $(LIBS) -o $@

# What was last asked for, whichever configuration and compiler it is of; touched only when it differs.
lib/%: $B/% FORCE
	@cmp -s $< $@ || { echo "cp $< $@"; cp $< $@; }
FORCE:

# ---- programs -----------------------------------------------------------------------------------
PSOUP_OBJ = $(patsubst %.c,$B/%.o,$(wildcard examples/psoup/*.c))
DEMO_OBJ  = $(patsubst %.c,$B/%.o,$(wildcard examples/demo/*.c))
WORLD_OBJ = $(patsubst %.c,$B/%.o,$(filter-out examples/demo/demo.c,$(wildcard examples/demo/*.c)))

$B/psoup: $(PSOUP_OBJ) $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

# The program whose processes talk by MPI, and what of it is a library. MPI's flags are mpicc's own, so that any
# compiler may be CC.
MPICC     ?= $(shell command -v mpicc)
MPI_FLAGS  = $(patsubst -I%,-isystem %,$(filter -I%,$(shell $(MPICC) -show)))
MPI_LIBS   = $(filter -L% -l% -Wl%,$(shell $(MPICC) -show))
MPI_OBJ    = $(filter-out %/launch.o,$(PSOUP_OBJ)) $B/mpi/launch.o
ifneq ($(MPICC),)
mpi: lib/libpsoup-mpi.a bin/psoup-mpi
else
mpi:
	@echo "  mpicc is not here: no libpsoup-mpi.a and no psoup-mpi"
endif

$B/mpi/%.o: bindings/mpi/%.c
	@mkdir -p $(@D)
	@echo "  CC   $<"
	$(Q)$(CC) $(CPPFLAGS) -Ibindings/mpi $(MPI_FLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

$B/mpi/launch.o: examples/psoup/launch.c
	@mkdir -p $(@D)
	@echo "  CC   $< (MPI)"
	$(Q)$(CC) $(CPPFLAGS) -DPSOUP_MPI -Ibindings/mpi $(MPI_FLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

$B/libpsoup-mpi.a: $B/mpi/comm_mpi.o
	@echo "  AR   $@"
	$(Q)rm -f $@ && $(AR) rcs $@ $^

$B/psoup-mpi: $(MPI_OBJ) $B/libpsoup-mpi.a $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LIBS) $(MPI_LIBS) -o $@

$B/psoup-demo: $(DEMO_OBJ) $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

$B/personalized_soup: $B/examples/personalized_soup.o $(WORLD_OBJ) $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LIBS) -o $@

bin/%: $B/% FORCE
	@mkdir -p bin
	@cmp -s $< $@ || { echo "cp $< $@"; cp $< $@; }

# The example inside llama.cpp, where that is: LLAMA_CPP_DIR is its source tree or where it was installed.
ifdef LLAMA_CPP_DIR
LLAMA_FLAGS = -I$(LLAMA_CPP_DIR)/include -I$(LLAMA_CPP_DIR)/ggml/include
LLAMA_LIBS  = $(foreach d,lib build/bin,-L$(LLAMA_CPP_DIR)/$d -Wl,-rpath,$(abspath $(LLAMA_CPP_DIR)/$d)) -lllama -lggml -lggml-base
LLAMA_HEADER = $(LLAMA_CPP_DIR)/include/llama.h
else ifeq ($(shell pkg-config --exists llama 2>/dev/null && echo yes),yes)
LLAMA_FLAGS = $(shell pkg-config --cflags llama)
LLAMA_LIBS  = $(shell pkg-config --libs llama) -Wl,-rpath,$(shell pkg-config --variable=libdir llama)
LLAMA_HEADER = $(shell pkg-config --variable=includedir llama)/llama.h
endif
LLAMA_OLD   = $(if $(LLAMA_HEADER),$(shell grep -q llama_set_adapters_lora $(LLAMA_HEADER) || echo -DPSOUP_OLD_LLAMA))

$B/embed_llama_cpp: examples/embed_llama_cpp/soup.c $B/libpsoup-merge.a
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(LLAMA_FLAGS) $(LLAMA_OLD) $(LDFLAGS) $^ $(LLAMA_LIBS) $(filter-out -lpcre2-8,$(LIBS)) -o $@

demo: deps
	@$(BUILD) bin/psoup-demo lib/libpsoup.a bin/psoup
	bin/psoup-demo --out build/demo $(if $(FULL),--full)

# ---- tests --------------------------------------------------------------------------------------
$B/tests/%: $B/tests/%.o $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(shell pkg-config --libs check) $(LIBS) $(LIBS_$*) \
	    -Wl,-rpath,$(CURDIR)/$(HOST_B) -o $@

$B/tests/test_room: $B/examples/psoup/room.o

# Every op on every backend against float64; see tests/checkops/checkops.h.
CHECKOPS = $(patsubst %.c,$B/%.o,$(wildcard tests/checkops/*.c))
$B/tests/checkops/checkops: $(CHECKOPS) $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $(CHECKOPS) $B/libpsoup.a $(LIBS) -Wl,-rpath,$(CURDIR)/$(HOST_B) -o $@

# A LLaMA-7B on a GPU; see tests/gpu/run.py.
$B/tests/gpu/llama: $B/tests/gpu/llama.o $B/libpsoup.a
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LIBS) -Wl,-rpath,$(CURDIR)/$(HOST_B) -o $@

# The library with the names inside it, for tests/gpu/correct_ops.py.
$B/tests/gpu/libops.so: $(OBJ)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) -shared $(LDFLAGS) $(OBJ) $(LIBS) -o $@

# The words of cuda/philox.cuh; and where CUDA's headers are, what src/gpu says of them.
$B/tests/philox: tests/philox.cc $B/src/base/philox.o
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CXX) $(HOST_FLAGS) $< $B/src/base/philox.o -o $@

$B/tests/driver_header.o: CPPFLAGS += $(CUDA_FLAGS)
$B/tests/driver_header.o: CFLAGS += -Werror
DRIVER_HEADER = $(if $(wildcard $(CUDA_HOME)/include/cublasLt.h),$B/tests/driver_header.o)

LIBS_bench_gemm = -l:libopenblas.so.0

# ---- a GPU on the CPU -----------------------------------------------------------------------------
# libcuda.so.1, libcublasLt.so.13 and libnccl.so.2: the kernels are those of cuda/, compiled for the CPU. See tests/host_driver.
# Programs of tests/ look for them there; others are told by LD_LIBRARY_PATH.
CXX        := $(if $(filter default,$(origin CXX)),$(if $(findstring clang,$(CC)),clang++,g++),$(CXX))
HOST_B      = $B/host_driver
HOST_FLAGS  = -std=c++17 $(if $(filter release,$(config)),-O2 -g,$(MODE)) -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter \
              -fPIC -ffp-contract=off -MMD -MP -Itests/host_driver -Icuda $(CUDA_FLAGS)
HOST_OBJ    = $(patsubst cuda/%.cu,$(HOST_B)/%.cu.o,$(GPU_SRC)) $(HOST_B)/fibers.o $(HOST_B)/driver.o
host_driver: $(HOST_B)/libcuda.so.1 $(HOST_B)/libcublasLt.so.13 $(HOST_B)/libnccl.so.2

$(HOST_B)/%.cu.o: cuda/%.cu
	@mkdir -p $(@D)
	@echo "  CXX  $<"
	$(Q)$(CXX) $(HOST_FLAGS) -x c++ -c $< -o $@

$(HOST_B)/%.o: tests/host_driver/%.cc
	@mkdir -p $(@D)
	@echo "  CXX  $<"
	$(Q)$(CXX) $(CPPFLAGS) $(HOST_FLAGS) -c $< -o $@

$(HOST_B)/libcuda.so.1: $(HOST_OBJ)
	@echo "  LINK $@"
	$(Q)$(CXX) -shared $(filter -fsanitize% --coverage,$(MODE)) -Wl,-soname,libcuda.so.1 $^ -o $@

# The engine of examples/ that has its weights on a GPU.
$B/embed_engine_gpu: $B/examples/embed_engine_gpu.o $B/libpsoup.a $(HOST_B)/libcuda.so.1
	@echo "  LINK $@"
	$(Q)$(CC) $(LDFLAGS) $^ $(LIBS) -Wl,-rpath,$(CURDIR)/$(HOST_B) -o $@

$(HOST_B)/libnccl.so.2: $(HOST_B)/nccl.o $(HOST_B)/libcuda.so.1
	@echo "  LINK $@"
	$(Q)$(CXX) -shared $(filter -fsanitize% --coverage,$(MODE)) -Wl,-soname,libnccl.so.2 $^ -o $@

$(HOST_B)/libcublasLt.so.13: $(HOST_B)/blas.o $(HOST_B)/libcuda.so.1 $B/libpsoup-merge.a
	@echo "  LINK $@"
	$(Q)$(CXX) -shared $(filter -fsanitize% --coverage,$(MODE)) -Wl,-soname,libcublasLt.so.13 $(HOST_B)/blas.o $(HOST_B)/libcuda.so.1 \
	    -Wl,--exclude-libs,ALL $B/libpsoup-merge.a -pthread -o $@

# The tests of one build; every program prints Check's own line of counts.
test-programs: $(TESTS:%=$B/tests/%) $(if $(MPICC),$B/psoup-mpi) $B/tests/checkops/checkops $B/tests/philox host_driver \
               $(DRIVER_HEADER) $(HELPERS:%=$B/tests/%) $B/embed_engine_gpu $B/psoup

run-tests: test-programs
	@set -e; export LD_LIBRARY_PATH=$(CURDIR)/$(HOST_B); \
	    for t in $(TESTS); do echo "== $$t"; $B/tests/$$t; done; \
	    echo "== every op on every backend"; $B/tests/philox; $B/tests/checkops/checkops; \
	    echo "== the ops' bench, in tiny shapes"; $B/tests/checkops/checkops --bench --force --json > $B/bench.json; \
	    echo "$$(wc -l < $B/bench.json) times taken"; \
	    if $B/tests/checkops/checkops --bench 2>/dev/null; then echo "the host driver was timed"; exit 1; fi; \
	    echo "== an engine on a GPU"; $B/embed_engine_gpu
	@echo "== the program"; sh tests/cli.sh $B/psoup
	@echo "== the program in two processes"; sh tests/ranks.sh $B/psoup $(if $(MPICC),$B/psoup-mpi)
	@echo "== a training, seen"; PYTHON=$(PYTHON) sh tests/seen.sh $B/psoup
	@echo "== the methods, end to end"; sh tests/run.sh $B/psoup

check: deps-test
	@$(BUILD) all test-programs $B/tests/gpu/llama
	@$(MAKE) --no-print-directory all check-house run-tests check-names check-abi check-install check-python check-gpu

# The same under ASan and UBSan with the long cases, a build by clang (nothing of which runs: unoptimised), the GPU's kernels
# for every architecture and with their threads in other orders, a short run of each fuzzer.
check-all: deps-test
	@$(BUILD) CC=clang WERROR=-Werror MODE="-O0 -DNDEBUG" KERNEL_OPT= B=build/clang-check \
	    $(addprefix build/clang-check/,libpsoup.a libpsoup.so libpsoup-merge.a psoup psoup-demo personalized_soup)
	@$(BUILD) bin/personalized_soup test-programs
	@PSOUP_LONG=1 $B/tests/test_alloc
	bin/personalized_soup
	@$(BUILD) GPU_ARCHS=all $B/libpsoup.a
	@[ -z "$(NVCC)" ] || $(PYTHON) -B tests/gpu/images.py $B/libpsoup.a $(GPU_ALL)
	@set -e; for order in 1 2; do for t in checkops/checkops test_gpu test_gpu_quant test_gpu_train test_gpu_merge; do \
	    echo "== $$t, the threads of a block in order $$order"; PSOUP_HOST_ORDER=$$order $B/tests/$$t; done; done
	@echo "== every op and the model against float64 PyTorch, on the CPU"; \
	if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    $(MAKE) --no-print-directory $B/tests/gpu/libops.so $B/libpsoup.so; export PYTHONPATH=bindings/python; \
	    $(PYTHON) -B tests/gpu/correct_ops.py $B/tests/gpu/libops.so --device cpu && \
	    PSOUP_LIBRARY=$(abspath $B/libpsoup.so) $(PYTHON) -B tests/gpu/correct.py --device cpu; \
	else echo "skipped: $(PYTHON) has no torch"; fi
	@$(BUILD) config=sanitize test-programs
	@PSOUP_LONG=1 $(MAKE) --no-print-directory config=sanitize run-tests
	@$(MAKE) --no-print-directory fuzz

# What share of the library's lines the tests run, file by file, the least first; a line compiled for
# several instruction sets is run when one of them runs it.
coverage: deps-test
	@find build/gcc-coverage -name '*.gcda' -delete 2>/dev/null || true
	@$(BUILD) CC=gcc config=coverage test-programs
	@$(MAKE) --no-print-directory CC=gcc config=coverage run-tests
	@gcov -t $$(find build/gcc-coverage/src -name '*.gcno') 2>/dev/null | awk -F: ' \
	    $$2 ~ /^ *0$$/ && $$3 == "Source" { file = $$4 } \
	    file ~ /^src\/.*\.c$$/ && $$2 + 0 > 0 && $$1 !~ /-$$/ { run[file ":" $$2] += $$1 !~ /[#=]/ } \
	    END { for (line in run) { file = line; sub(/:.*/, "", file); n[file]++; ran[file] += run[line] > 0 } \
	          form = "%5.1f %% %5d of %5d  %s\n"; \
	          for (file in n) { printf form, 100 * ran[file] / n[file], ran[file], n[file], file | "sort -n"; \
	                            all += n[file]; done += ran[file] } \
	          close("sort -n"); printf form, 100 * done / all, done, all, "total" }'

# ---- the binary interface -------------------------------------------------------------------------
# What a library that neither exits, aborts nor prints, and that keeps no global state, does not need
# (release; debug and sanitize have their asserts).
FORBIDDEN = exit|_exit|_Exit|quick_exit|atexit|abort|raise|__assert_fail|__assert|err|errx|warn|perror|v?f?printf|__v?f?printf_chk|puts|fputs|putchar|putc|fputc|fwrite|std(in|out|err)|getenv|secure_getenv|setenv|putenv|system|signal|sigaction|srand|rand|random|strtok|setlocale|strerror|json_set_alloc_funcs|json_object_seed

# Names: the shared library exports psoup_* and nothing else, and exactly what lib/psoup.names
# lists; the archive's other names all begin with psoup__.
check-names: $B/libpsoup.so $B/libpsoup.a
	@nm -D --defined-only $B/libpsoup.so | awk '{print $$3}' | sed 's/@.*//' | grep -v '^PSOUP_' | LC_ALL=C sort > $B/names
	@diff lib/psoup.names $B/names || { echo "exported names differ from lib/psoup.names: add with a new minor version; removal needs a new soname"; exit 1; }
	@! nm -g --defined-only $B/libpsoup.a | awk 'NF == 3 {print $$3}' | grep -v '^psoup_' || { echo "names outside psoup_ above"; exit 1; }
	@! nm -A -u $B/libpsoup.a | grep -E ' ($(FORBIDDEN))(@|$$)' || { echo "the library must not call the above: it neither exits, aborts, prints nor has global state"; exit 1; }
	@echo "names: $$(wc -l < $B/names) exported, all psoup_*"

check-abi: $B/libpsoup.so
	@mkdir -p $B/abi
	abidiff --headers-dir2 include --no-added-syms lib/psoup.abi $B/libpsoup.so
	@set -e; for old in tests/abi/*/; do \
	    $(CC) -std=c11 -I$$old/include $$old/program.c -L$B -Wl,-rpath,$(CURDIR)/$B -l:libpsoup.so -o $B/abi/program; \
	    ln -sf libpsoup.so $B/$(SONAME); \
	    $B/abi/program && echo "abi: a program of $$(basename $$old) runs"; done

# After a deliberate addition: the new baseline, and the headers that VERSION is kept with. Fields are only
# appended, so a program built against what was kept before still runs.
abi-baseline: $B/libpsoup.so
	nm -D --defined-only $B/libpsoup.so | awk '{print $$3}' | sed 's/@.*//' | grep -v '^PSOUP_' | LC_ALL=C sort > lib/psoup.names
	abidw --headers-dir include --no-corpus-path --no-comp-dir-path $B/libpsoup.so > lib/psoup.abi
	mkdir -p tests/abi/$(VERSION)/include/psoup && cp include/psoup/*.h tests/abi/$(VERSION)/include/psoup

# Rooms, and what may include what.
check-house:
	@sh tests/house.sh

# ---- as a caller has it ---------------------------------------------------------------------------
# Installed into a root of its own, and programs built against that.
check-install: lib bin/psoup mpi
	@rm -rf $B/root
	@$(MAKE) --no-print-directory -s install DESTDIR=$(abspath $B/root) PREFIX=/opt/psoup >/dev/null
	@CC=$(CC) CXX=$(if $(findstring clang,$(CC)),clang++,g++) LDFLAGS="$(LDFLAGS)" \
	    sh tests/install.sh $B/root /opt/psoup

# ---- Python -----------------------------------------------------------------------------------------
# The wheel's library has the others in it, so that it needs nothing but the C library.
$B/wheel/libpsoup.so: $(OBJ) lib/psoup.map
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) -shared $(LDFLAGS) -Wl,-soname,$(SONAME) -Wl,--version-script=lib/psoup.map -Wl,--no-undefined \
	    -s $(OBJ) -Wl,-Bstatic $(filter-out -lm,$(LIBS)) -Wl,-Bdynamic -lm -o $@

wheel: $B/wheel/libpsoup.so
	@rm -f $B/wheel/psoup-*.whl
	@$(PYTHON) bindings/python/backend.py $B/wheel/libpsoup.so $B/wheel

# From the source tree with lib/libpsoup.so's twin, and as pip installs it, without a network.
check-python: $B/libpsoup.so wheel host_driver $(if $(LLAMA_LIBS),$B/embed_llama_cpp)
	@echo "== Python, from the source tree"
	@cd bindings/python && PSOUP_TEST_BUILD=$(abspath $B) PSOUP_LIBRARY=$(abspath $B/libpsoup.so) CC="$(CC)" $(PYTHON) -B -m unittest discover -t . -s tests
	@echo "== Python, installed from the wheel"
	@rm -rf $B/venv && $(PYTHON) -m venv --system-site-packages $B/venv
	@$B/venv/bin/pip install -q --disable-pip-version-check --no-index --no-deps $B/wheel/psoup-*.whl
	@cd bindings/python && PSOUP_TEST_INSTALLED=1 CC="$(CC)" $(abspath $B/venv)/bin/python -B -m unittest discover -t . -s tests

# ---- fuzzing ------------------------------------------------------------------------------------
FUZZ_SECONDS ?= 10
# Kernels, which take clang minutes with sanitizers, are run under them by the tests.
fuzz:
	@$(BUILD) -s CC=clang config=sanitize MODE="$(FLAGS_sanitize) -fsanitize=fuzzer-no-link" WARN=-w B=build/fuzz \
	    KERNEL_OPT=-fno-sanitize=all run-fuzzers

# What they find stays in $B/corpus/NAME for the next run; an input that ends badly in $B/NAME-*.
run-fuzzers: $(FUZZERS:%=run-%)
run-fuzz_%: $B/fuzz_%
	@mkdir -p $B/corpus/fuzz_$*; sh tests/fuzz/seeds.sh fuzz_$* $B/seeds/fuzz_$*
	@$< -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
	    -artifact_prefix=$B/fuzz_$*- $B/corpus/fuzz_$* $B/seeds/fuzz_$* > $B/fuzz_$*.log 2>&1 || { tail -40 $B/fuzz_$*.log; exit 1; }
	@echo "fuzz_$*: $$(sed -n 's/.*number_of_executed_units: *//p' $B/fuzz_$*.log) inputs"

$B/fuzz_%: $B/tests/fuzz/fuzz_%.o $B/libpsoup.a
	$(Q)$(CC) $(LDFLAGS) -fsanitize=fuzzer $^ $(LIBS) -o $@

# ---- speed --------------------------------------------------------------------------------------
# PyTorch, where PYTHON has it, is the peer of the model's bench.
bench: deps-bench
	@$(MAKE) --no-print-directory $(BENCHES:%=$B/tests/%)
	@set -e; for b in $(BENCHES); do echo "== $$b"; \
	    $B/tests/$$b $(PYTHON) tests/$$(echo $$b | sed 's/model/torch/; s/_files//').py; done

bench-gpu: $B/tests/checkops/checkops
	$B/tests/checkops/checkops --bench

# ---- on a GPU -----------------------------------------------------------------------------------
# A build of its own, for the GPU that is here, and with no host driver beside it.
GPU_HERE = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
gpu:
	@$(PYTHON) -B tests/gpu/run.py build/gpu --check $(STAGE)
	@$(MAKE) --no-print-directory deps
	@$(MAKE) --no-print-directory B=build/gpu GPU_ARCHS="$(GPU_HERE)" GPU_LINES=-lineinfo \
	    $(addprefix build/gpu/,libpsoup.so tests/checkops/checkops tests/gpu/libops.so tests/gpu/llama)
	@$(PYTHON) -B tests/gpu/run.py build/gpu $(STAGE)

# What of it is ours, in tiny shapes, on the host driver: every goal is measured for and stands in the table.
# Where PYTHON has PyTorch, transformers and peft, what is measured beside it runs too, on the CPU, and the checks against it.
check-gpu: $B/tests/checkops/checkops $B/tests/gpu/llama $B/tests/gpu/libops.so $B/libpsoup.so host_driver
	@echo "== what make gpu measures, in tiny shapes"
	@$(PYTHON) -B tests/gpu/run.py $B --tiny --check device ops
	@LD_LIBRARY_PATH=$(CURDIR)/$(HOST_B) $(PYTHON) -B tests/gpu/run.py $B --tiny --out $B/gpu > $B/gpu.log || \
	    { tail -20 $B/gpu.log; exit 1; }
	@grep '^skipped' $B/gpu.log || true

# ---- what the system must have ------------------------------------------------------------------
# Installs what is missing when run as root; otherwise prints the one line that does.
define install_missing
@missing=; for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q ' installed' || missing="$$missing $$p"; done; \
if [ -n "$$missing" ]; then \
    if ! command -v apt-get >/dev/null; then echo "please install:$$missing (Debian's names)"; exit 1; \
    elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
    else echo "please run: sudo apt-get install$$missing"; exit 1; fi; \
fi
endef

deps:
	$(call install_missing,$(PACKAGES))
deps-test:
	$(call install_missing,$(PACKAGES) $(PACKAGES_TEST))
deps-bench:
	$(call install_missing,$(PACKAGES) $(PACKAGES_BENCH))

# ---- installing -----------------------------------------------------------------------------------
install: lib bin/psoup mpi
	install -d $(DESTDIR)$(PREFIX)/include/psoup $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/bin
	install -m 644 include/psoup/*.h bindings/cpp/psoup/*.hpp $(DESTDIR)$(PREFIX)/include/psoup
	install -m 644 bindings/cpp/psoup.hpp $(DESTDIR)$(PREFIX)/include
	install -m 644 lib/libpsoup.a lib/libpsoup-merge.a $(DESTDIR)$(PREFIX)/lib
	install -m 755 lib/libpsoup.so $(DESTDIR)$(PREFIX)/lib/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(PREFIX)/lib/libpsoup.so
	for f in psoup psoup-merge; do \
	    sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' pkgconfig/$$f.pc.in > $(DESTDIR)$(PREFIX)/lib/pkgconfig/$$f.pc; done
	install -m 755 bin/psoup $(DESTDIR)$(PREFIX)/bin/psoup
ifneq ($(MPICC),)
	install -m 644 bindings/mpi/psoup/comm_mpi.h $(DESTDIR)$(PREFIX)/include/psoup
	install -m 644 lib/libpsoup-mpi.a $(DESTDIR)$(PREFIX)/lib
	install -m 755 bin/psoup-mpi $(DESTDIR)$(PREFIX)/bin/psoup-mpi
endif
	@[ -n "$(DESTDIR)" ] || [ "$$(id -u)" != 0 ] || ldconfig

clean:
	rm -rf build bin lib/*.a lib/*.so*

-include $(shell find $B -name '*.d' 2>/dev/null)
