# libpsoup: build, demonstrate, check.
#
#   make            lib/libpsoup.a, lib/libpsoup.so, lib/libpsoup-merge.a, bin/psoup
#   make demo       the whole method on a small world, from a base model to a report (FULL=1: longer)
#   make check      the tests (under ten minutes on two cores)
#   make check-all  the same under ASan and UBSan, the long cases, the ABI, the fuzzers
#   make bench      our speed beside a peer's and the machine's limit, in one run
#   make install    into PREFIX (default /usr/local), under DESTDIR
#   make clean
#
# Choose a build with config=release (default), debug, sanitize or coverage, and a compiler with CC=.

config  ?= release
PREFIX  ?= /usr/local
CC      := $(if $(filter default,$(origin CC)),gcc,$(CC))
AR      ?= ar

# ---- what a fresh Debian or Ubuntu needs: the one list -----------------------------------------
PACKAGES      = gcc make binutils pkg-config libc6-dev libjansson-dev libpcre2-dev libzstd-dev
PACKAGES_TEST = check abigail-tools clang libclang-rt-dev
PACKAGES_BENCH = libopenblas-dev

# ---- flags --------------------------------------------------------------------------------------
B        = build/$(notdir $(CC))-$(config)
ARCH    := $(shell uname -m)
WARN     = -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith \
           -Wwrite-strings -Wno-unused-parameter
FLAGS_release  = -O2 -g
FLAGS_debug    = -O0 -g3
FLAGS_sanitize = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined \
                 -fno-omit-frame-pointer
FLAGS_coverage = -O0 -g --coverage
MODE     = $(FLAGS_$(config))
CPPFLAGS += -Iinclude -Isrc -D_GNU_SOURCE
CFLAGS   += -std=c11 $(MODE) $(WARN) -fPIC -fno-semantic-interposition -fno-math-errno -ffp-contract=off -pthread
LDFLAGS  += $(if $(filter sanitize coverage,$(config)),$(MODE)) -pthread
LIBS      = -ljansson -lpcre2-8 -lzstd -lm

# Kernel sources are compiled once per instruction set; see src/base/base.h, isa.c.
VARIANTS        = generic
ifeq ($(ARCH),x86_64)
VARIANTS       += avx2 avx512
endif
FLAGS_generic   =
FLAGS_avx2      = -mavx2 -mfma -mf16c -mbmi2
FLAGS_avx512    = $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
KERNEL_SRC      = src/base/gemm_kernel.c src/base/convert.c src/merge/kernels.c \
                  $(filter-out src/cpu/cpu.c,$(wildcard src/cpu/*.c))
KERNEL_OPT      = $(if $(filter release,$(config)),-O3)

SRC      = $(filter-out $(KERNEL_SRC),$(wildcard src/*/*.c))
OBJ      = $(SRC:%.c=$B/%.o) \
           $(foreach v,$(VARIANTS),$(patsubst %.c,$B/%.$v.o,$(wildcard $(KERNEL_SRC))))
MERGE_OBJ = $(filter $B/src/base/% $B/src/format/% $B/src/merge/%,$(OBJ))

TESTS    = $(patsubst tests/%.c,%,$(wildcard tests/test_*.c))
BENCHES  = $(patsubst tests/%.c,%,$(wildcard tests/bench_*.c))
EXAMPLES = $(patsubst examples/%.c,%,$(wildcard examples/*.c))

.PHONY: all lib demo check check-all bench install clean deps deps-test
.SECONDARY:
.DELETE_ON_ERROR:

all: lib bin/psoup

lib: lib/libpsoup.a

$B/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

define variant_rule
$B/%.$(1).o: %.c
	@mkdir -p $$(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) $(KERNEL_OPT) $(FLAGS_$(1)) -DPSOUP__VARIANT=$(1) -MMD -MP -c $$< -o $$@
endef
$(foreach v,$(VARIANTS),$(eval $(call variant_rule,$v)))

$B/libpsoup.a: $(OBJ)
	@mkdir -p $(@D)
	rm -f $@ && $(AR) rcs $@ $^

lib/libpsoup.a: $B/libpsoup.a
	cp $< $@

$B/tests/%: $B/tests/%.o $B/libpsoup.a
	$(CC) $(LDFLAGS) $< $(filter %.o,$(EXTRA_$*)) $B/libpsoup.a $(shell pkg-config --libs check) $(LIBS) $(LIBS_$*) -o $@

clean:
	rm -rf build bin lib/*.a lib/*.so*

-include $(shell find build -name '*.d' 2>/dev/null)
