#!/bin/sh
# What a caller meets: the library installed into a root of its own, programs in C and C++ built there by
# pkg-config's word alone, and every header on its own in both languages.
#   sh tests/install.sh ROOT PREFIX      with CC, CXX and LDFLAGS; make check-install runs it
set -eu
root=$(cd "$1" && pwd) prefix=$2
: "${CC:=cc}" "${CXX:=c++}" "${LDFLAGS=}"
PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_LIBDIR=$root$prefix/lib/pkgconfig
export PKG_CONFIG_SYSROOT_DIR PKG_CONFIG_LIBDIR
lib=$root$prefix/lib
mkdir "$root/work"
examples=$(cd "$(dirname "$0")/../examples" && pwd)
readme=$(cd "$(dirname "$0")/../bindings/cpp" && pwd)/README.md
cpp_test=$(cd "$(dirname "$0")" && pwd)/cpp/soup.cc
cd "$root/work"

cat >soup.c <<'END'
#include <psoup/psoup.h>
#include <stdio.h>
#include <string.h>

/* A GPU may be asked for where there is none: one line says why there is none. */
static int without_a_gpu(const psoup_model_config *config) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_error error = {0};
    psoup_context *context = NULL;
    psoup_model *model = NULL;
    options.device = "cuda:0";
    psoup_status status = psoup_context_create(&options, &context, &error);
    if (status == PSOUP_OK)
        status = psoup_model_create(context, config, 7, &model, &error);
    psoup_model_free(model);
    psoup_context_free(context);
    return status == PSOUP_OK || (status == PSOUP_ERROR_UNSUPPORTED && strncmp(error.message, "no GPU: ", 8) == 0 &&
                                  strchr(error.message, '\n') == NULL);
}

int main(void) {
    psoup_error error = {0};
    psoup_context *context = NULL;
    psoup_model *model = NULL;
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    const int32_t tokens[] = {3, 1, 4, 1, 5};
    const psoup_row row = {.tokens = tokens, .n = 5};
    float logprobs[4];
    config.vocab_size = config.intermediate_size = 24;
    config.hidden_size = 16;
    config.num_hidden_layers = config.num_attention_heads = 2;
    if (psoup_context_create(NULL, &context, &error) != PSOUP_OK ||
        psoup_model_create(context, &config, 7, &model, &error) != PSOUP_OK ||
        psoup_model_logprobs(model, &row, 1, logprobs, &error) != PSOUP_OK)
        return fprintf(stderr, "%s\n", error.message), 1;
    psoup_model_free(model);
    psoup_context_free(context);
    return logprobs[0] < 0 && logprobs[3] < 0 && without_a_gpu(&config) ? 0 : 1;
}
END
cat >soup.cc <<'END'
#include <psoup/psoup.h>
#include <cstdio>
#include <memory>
#include <string>

int main() {
    psoup_error error{};
    psoup_context_options options{};
    options.size = sizeof options;
    options.threads = 1;
    psoup_context *context = nullptr;
    psoup_tokenizer *tokenizer = nullptr;
    const char *const texts[] = {"soup of the day, soup of the house"};
    const std::string text = "soup";
    std::int32_t ids[8];
    std::size_t n = 0;
    if (psoup_context_create(&options, &context, &error) != PSOUP_OK ||
        psoup_tokenizer_train(context, texts, 1, 270, nullptr, 0, nullptr, &tokenizer, &error) != PSOUP_OK ||
        psoup_tokenizer_encode(tokenizer, text.data(), text.size(), 0, ids, nullptr, 8, &n, &error) != PSOUP_OK)
        return std::fprintf(stderr, "%s\n", error.message), 1;
    psoup_tokenizer_free(tokenizer);
    psoup_context_free(context);
    return n == 1 ? 0 : 1; /* one token: what training is for */
}
END
cat >merge.c <<'END'
#include <psoup/merge.h>
#include <stdio.h>

int main(void) {
    psoup_error error = {0};
    psoup_context *context = NULL;
    const float a[3] = {1, 2, 3}, b[3] = {3, 2, 1};
    const void *const in[2] = {a, b};
    const double weights[2] = {0.25, 0.75};
    float out[3];
    if (psoup_context_create(NULL, &context, &error) != PSOUP_OK ||
        psoup_merge_sum(context, out, PSOUP_F32, in, PSOUP_F32, weights, 2, 3, &error) != PSOUP_OK)
        return fprintf(stderr, "%s\n", error.message), 1;
    psoup_context_free(context);
    return out[0] == 2.5f && out[1] == 2 && out[2] == 1.5f ? 0 : 1;
}
END

cat >merge.cc <<'END'
#include <psoup/merge.hpp>

int main() {
    auto context = psoup::context::create();
    const float a[3] = {1, 2, 3}, b[3] = {3, 2, 1};
    const void *const in[2] = {a, b};
    const double weights[2] = {0.25, 0.75};
    float out[3];
    if (!context || !psoup::merge_sum(*context, out, PSOUP_F32, in, PSOUP_F32, weights, 3)) return 1;
    return out[0] == 2.5f && out[1] == 2 && out[2] == 1.5f ? 0 : 1;
}
END

# c FILE PACKAGE ARGUMENT… and cxx the same: compile strictly with what pkg-config says of the package.
# Its words are many, and split on purpose.
# shellcheck disable=SC2046,SC2086
c() {
    file=$1 package=$2
    shift 2
    $CC -std=c11 -Wall -Wextra -pedantic -Werror $(pkg-config --cflags "$package") "$file" "$@" $LDFLAGS
}
# shellcheck disable=SC2046,SC2086
cxx() {
    file=$1 package=$2
    shift 2
    $CXX -std=c++17 -Wall -Wextra -pedantic -Werror $(pkg-config --cflags "$package") "$file" "$@" $LDFLAGS
}
has_cxx() { command -v "$CXX" >/dev/null; }

include=$root$prefix/include
for header in "$include"/psoup/*.h; do
    case $header in */comm_mpi.h) continue ;; esac # needs MPI's
    echo "#include <psoup/$(basename "$header")>" | tee alone.cc >alone.c
    c alone.c psoup -fsyntax-only
    ! has_cxx || cxx alone.cc psoup -fsyntax-only
done

# What needs MPI is apart, and a program of the library has nothing of it.
if test -e "$include/psoup/comm_mpi.h"; then
    printf '#include <psoup/comm_mpi.h>\nint main(void) { return psoup_comm_mpi_create(0, MPI_COMM_NULL, 0, 0) == 0; }\n' >mpi.c
    # shellcheck disable=SC2046
    OMPI_CC=$CC mpicc -std=c11 -Wall -Wextra -Werror $(pkg-config --cflags psoup) mpi.c -L"$root$prefix/lib" -lpsoup-mpi \
        $LDFLAGS $(pkg-config --static --libs psoup) -o mpi
    test -x "$root$prefix/bin/psoup-mpi"
fi
if ldd "$root$prefix/bin/psoup" "$root$prefix"/lib/libpsoup.so | grep -i 'mpi'; then
    echo "the library or psoup needs MPI"
    exit 1
fi

# The C++ binding has every function of C, or the one that says more (psoup_model_logits_mixed).
for f in $(cat $(ls "$include"/psoup/*.h | grep -v comm_mpi) | tr -d '\n' | sed 's|/\*|\n|g' | sed 's|^.*\*/||' |
    grep -o '\bpsoup_[a-z0-9_]*(' | tr -d '(' | sort -u); do
    grep -q -E "\b$f(_mixed)?\b" "$include"/psoup/*.hpp || { echo "psoup.hpp has no $f"; exit 1; }
done

# cpp NAME COMPILER FLAG…: the binding's own test, compiled strictly and run.
# shellcheck disable=SC2046,SC2086
cpp() {
    name=$1 compiler=$2
    shift 2
    command -v "$compiler" >/dev/null || return 0
    $compiler "$@" -Wall -Wextra -pedantic -Werror $(pkg-config --cflags psoup) "$cpp_test" -o "$name" \
        $LDFLAGS $(pkg-config --static --libs psoup)
    ./"$name"
    compiled="$compiled $compiler"
}

# shellcheck disable=SC2046
{
    c soup.c psoup -o shared $(pkg-config --libs psoup)
    LD_LIBRARY_PATH=$lib ./shared
    rm "$lib"/libpsoup.so* # from here on only the archives are left
    c soup.c psoup -o soup $(pkg-config --static --libs psoup)
    ./soup
    c merge.c psoup-merge -o merge $(pkg-config --static --libs psoup-merge)
    ./merge
    c "$examples/embed_engine.c" psoup-merge -o engine $(pkg-config --static --libs psoup-merge)
    ./engine >engine.log
    # Each library that it names is one that the archive needs.
    for l in $(pkg-config --static --libs-only-l psoup-merge); do
        case $l in -lpsoup-merge | -lm) continue ;; esac
        ! c merge.c psoup-merge -o less -Wl,--whole-archive -L"$lib" -lpsoup-merge -Wl,--no-whole-archive \
            $(pkg-config --static --libs-only-l psoup-merge | sed "s/-lpsoup-merge//; s/$l\\b//") 2>less.log ||
            { echo "psoup-merge.pc names $l, which the archive does not need"; exit 1; }
    done
    if has_cxx; then
        cxx soup.cc psoup -o soup++ $(pkg-config --static --libs psoup)
        ./soup++
        cxx merge.cc psoup-merge -o merge++ $(pkg-config --static --libs psoup-merge)
        ./merge++
        sed -n '/^```cpp/,/^```$/{/^```/d;p}' "$readme" >readme.cc
        cxx readme.cc psoup -o readme $(pkg-config --static --libs psoup)
        ./readme >readme.log
        grep -q '^1: [0-9]' readme.log
        compiled=
        cpp soup17 "$CXX" -std=c++17
        cpp soup17n "$CXX" -std=c++17 -fno-exceptions
        case $CXX in *clang*) other=g++ ;; *) other=clang++ ;; esac
        cpp soup20 $other -std=c++20 -DPSOUP_CPP_EXCEPTIONS
        third="one in C++, psoup.hpp's test by$compiled"
    else
        third="C++ skipped: there is no $CXX"
    fi
}
"$root$prefix/bin/psoup" --help >help
grep -q generate help
echo "install: programs in C, shared and static, a merge-only one, $third; every header alone"
