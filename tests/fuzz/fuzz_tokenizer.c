/* libFuzzer entry: the first byte chooses. Even: the rest is a tokenizer.json, which then encodes and
 * decodes a short text. Odd: the rest is a text for one of the small tokenizers below; decoding what was
 * encoded must give offsets in order within the text. */
#include "text/text.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define VOCAB                                                                                      \
    "\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"fuse_unk\":true,\"byte_fallback\":true,"    \
    "\"vocab\":{\"?\":0,\"a\":1,\"b\":2,\"ab\":3,\"\\u0120\":4,\"\\u0120a\":5,\"\\u2581\":6,"      \
    "\"\\u2581a\":7,\"aba\":8,\"<0x0A>\":9,\"\\u00e9\":10},"                                       \
    "\"merges\":[\"a b\",\"\\u0120 a\",\"\\u2581 a\",[\"ab\",\"a\"]]},"                             \
    "\"added_tokens\":[{\"id\":11,\"content\":\"<s>\",\"special\":true,\"lstrip\":true},"          \
    "{\"id\":12,\"content\":\"abab\",\"single_word\":true,\"normalized\":true},"                   \
    "{\"id\":13,\"content\":\" \",\"rstrip\":true}]"

static const char *const small[] = {
    "{\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true},"
    "\"post_processor\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"ByteLevel\"}," VOCAB "}",
    "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Strip\"},"
    "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"\\\\s+|b*\"},\"content\":\"\\u2581\"}]},"
    "\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\"},"
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteFallback\"},"
    "{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\"},{\"type\":\"Fuse\"},"
    "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":1}]}," VOCAB "}",
    "{\"normalizer\":{\"type\":\"NFD\"},\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":["
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\p{L}+|\"},\"behavior\":\"MergedWithNext\"},"
    "{\"type\":\"Digits\",\"individual_digits\":true},{\"type\":\"Whitespace\"}]}," VOCAB "}",
};

static void use(psoup_tokenizer *t, const char *text, size_t length, uint32_t flags) {
    size_t capacity = 4 * length + 8, n, bytes;
    int32_t *ids = malloc(capacity * sizeof *ids);
    psoup_offset *offsets = malloc(capacity * sizeof *offsets);
    if (ids != NULL && offsets != NULL &&
        psoup_tokenizer_encode(t, text, length, flags, ids, offsets, capacity, &n, NULL) ==
            PSOUP_OK) {
        n = n < capacity ? n : capacity;
        for (size_t i = 0; i < n; i++)
            if (offsets[i].begin > offsets[i].end || offsets[i].end > length)
                abort();
        char out[64];
        psoup_tokenizer_decode(t, ids, n, flags & 1, out, sizeof out, &bytes, NULL);
    }
    free(ids);
    free(offsets);
}

/* The small tokenizers are read once: reading one takes longer than a text does. */
static psoup_tokenizer *small_tokenizer(psoup_context *context, int which) {
    static psoup_tokenizer *made[sizeof small / sizeof *small];
    if (made[which] == NULL && psoup__tokenizer_parse(context, small[which], strlen(small[which]),
                                                      "small", &made[which], NULL) != PSOUP_OK)
        abort();
    return made[which];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char text[] = " It's a b  abab <s>\xff caf\xc3\xa9 e\xcc\x81\n\t12";
    static psoup_context *context; /* made once: it is slower than all the rest */
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_tokenizer *t;
    options.threads = 1;
    if (size == 0 ||
        (context == NULL && psoup_context_create(&options, &context, NULL) != PSOUP_OK))
        return 0;
    const char *rest = (const char *)data + 1;
    if (data[0] % 2 == 1) {
        use(small_tokenizer(context, data[0] / 2 % 3), rest, size - 1, data[0] / 8 % 4);
    } else if (psoup__tokenizer_parse(context, rest, size - 1, "fuzz", &t, NULL) == PSOUP_OK) {
        use(t, text, sizeof text - 1, PSOUP_ADD_SPECIAL);
        psoup_tokenizer_free(t);
    }
    return 0;
}
