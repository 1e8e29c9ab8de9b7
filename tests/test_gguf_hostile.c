/* GGUF files that lie: one for every rule of the format, each refused in one line that says why; files cut
 * at every byte and changed at every byte; memory that runs out anywhere. */
#include "format_case.h"

#define GGUF "tests/golden/gguf/"

typedef struct bytes {
    unsigned char data[8192];
    size_t n;
} bytes;

static void put(bytes *b, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++)
        b->data[b->n++] = (unsigned char)(value >> (8 * i));
}

static void put_raw(bytes *b, const void *data, size_t n) {
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

/* A file in parts, each of which a case may change. */
typedef struct spec {
    uint32_t magic, version;
    uint64_t tensors, values;
    char key[100];
    uint64_t key_length;
    bytes value;          /* of the first key, its type in front */
    const char *key2;     /* "general.alignment" */
    uint32_t type2;
    uint64_t value2;
    char name[2][100];
    uint64_t name_length[2];
    uint32_t dimensions[2], type[2];
    uint64_t size[2][5], offset[2];
    size_t data, padding; /* bytes after the infos, of which the first are padding */
    int whole_padding;    /* as the alignment asks */
} spec;

static spec good(void) {
    spec s = {.magic = 0x46554747, .version = 3, .tensors = 2, .values = 2, .key = "general.architecture",
              .key_length = 20, .key2 = "general.alignment", .type2 = 4, .value2 = 64,
              .name = {"token_embd.weight", "output_norm.weight"}, .name_length = {17, 18},
              .dimensions = {2, 1}, .size = {{8, 4}, {8}}, .offset = {0, 128}, .data = 160,
              .whole_padding = 1};
    put(&s.value, 8, 4);
    put(&s.value, 5, 8);
    put_raw(&s.value, "llama", 5);
    return s;
}

static void build(const spec *s, bytes *b) {
    b->n = 0;
    put(b, s->magic, 4);
    put(b, s->version, 4);
    put(b, s->tensors, 8);
    put(b, s->values, 8);
    put(b, s->key_length, 8);
    put_raw(b, s->key, strlen(s->key) > 0 ? strlen(s->key) : 3);
    put_raw(b, s->value.data, s->value.n);
    put(b, strlen(s->key2), 8);
    put_raw(b, s->key2, strlen(s->key2));
    put(b, s->type2, 4);
    put(b, s->value2, 4);
    for (int t = 0; t < 2; t++) {
        put(b, s->name_length[t], 8);
        put_raw(b, s->name[t], strlen(s->name[t]));
        put(b, s->dimensions[t], 4);
        for (uint32_t i = 0; i < s->dimensions[t] && i < 5; i++)
            put(b, s->size[t][i], 8);
        put(b, s->type[t], 4);
        put(b, s->offset[t], 8);
    }
    if (s->whole_padding)
        while (b->n % 64 != 0)
            put(b, 0, 1);
    for (size_t i = 0; i < s->data; i++)
        put(b, 0, 1);
}

static psoup_status parse(const bytes *b) {
    psoup__gguf *file;
    /* exactly so many bytes, so that the sanitizer sees a read past them */
    unsigned char *data = malloc(b->n + 1);
    memcpy(data, b->data, b->n);
    psoup_status status = psoup__gguf_parse(context, data, b->n, "lie", &file, &error);
    if (status == PSOUP_OK) /* all that is said to be there can be touched */
        for (size_t i = 0; i < psoup__gguf_count(file); i++) {
            const psoup__tensor *t = psoup__gguf_tensor(file, i);
            volatile unsigned char sum = 0;
            for (size_t j = 0; j < t->bytes; j++)
                sum = (unsigned char)(sum + ((const unsigned char *)t->data)[j]);
        }
    psoup__gguf_free(file);
    free(data);
    return status;
}

static void array(bytes *value, uint32_t element, uint64_t count) {
    value->n = 0;
    put(value, 9, 4);
    put(value, element, 4);
    put(value, count, 8);
}

static const char *const says[] = {
    /* the header */
    "\"GGUF\"", "version 1", "version 4", "big-endian", "claims", "claims", "claims",
    /* keys and values */
    "claims", "a key of 0 bytes", "a NUL", "UTF-8", "there twice", "value type 13", "claims", "a bool is 2",
    "values of type float64", "nested deeper", "value type 99", "values of type uint64", "claims",
    /* alignment */
    "power of two", "power of two", "power of two",
    /* tensors */
    "name has 0", "name has 64", "UTF-8", "there twice", "5 dimensions", "too large", "overflows", "overflows",
    "type Q4_K is not", "type 4 is unknown", "type 1000 is unknown", "whole blocks", "no multiple of the alignment",
    "bytes of data", "bytes of data", "share bytes", "share bytes", "bytes of data", "the file ends",
    "the padding",
    /* what is well formed and not ours */
    "one part of 3"};
enum { LIES = sizeof says / sizeof *says };

static void lie(int which, spec *s) {
    switch (which) {
    case 0: s->magic = 0x4747; break;
    case 1: s->version = 1; break;
    case 2: s->version = 4; break;
    case 3: s->version = 0x03000000; break;
    case 4: s->tensors = UINT64_MAX; break;
    case 5: s->values = 1 << 20; break;
    case 6: s->tensors = 1 << 16; break;
    case 7: s->key_length = UINT64_MAX - 4; break;
    case 8: s->key_length = 0; break;
    case 9: s->key[3] = '\0'; s->key_length = 3; memset(s->key, 0, sizeof s->key); break;
    case 10: s->key[0] = '\xff'; break;
    case 11: snprintf(s->key, sizeof s->key, "general.alignment"); s->key_length = 17; s->value.n = 0;
             put(&s->value, 4, 4); put(&s->value, 64, 4); break;
    case 12: s->value.data[0] = 13; break;
    case 13: s->value.data[11] = 0x7f; break;
    case 14: s->value.n = 0; put(&s->value, 7, 4); put(&s->value, 2, 1); break;
    case 15: array(&s->value, 12, 1 << 20); break;
    case 16:
        array(&s->value, 9, 1);
        for (int i = 0; i < 5; i++) {
            put(&s->value, 9, 4);
            put(&s->value, 1, 8);
        }
        break;
    case 17: array(&s->value, 99, 1); break;
    case 18: array(&s->value, 10, UINT64_MAX / 8 + 2); break;
    case 19: array(&s->value, 8, 2); put(&s->value, 0, 8); put(&s->value, 1 << 20, 8); break;
    case 20: s->value2 = 0; break;
    case 21: s->value2 = 48; break;
    case 22: s->type2 = 5; break;
    case 23: s->name_length[0] = 0; s->name[0][0] = '\0'; break;
    case 24: memset(s->name[0], 'x', 64); s->name_length[0] = 64; break;
    case 25: s->name[0][0] = '\xc3'; s->name[0][1] = 'x'; break;
    case 26: memcpy(s->name[1], s->name[0], 100); s->name_length[1] = 17; break;
    case 27: s->dimensions[0] = 5; break;
    case 28: s->size[0][0] = UINT64_MAX; break;
    case 29: s->size[0][0] = s->size[0][1] = 1ull << 40; break;
    case 30: s->size[0][0] = INT64_MAX; s->size[0][1] = 0; s->size[0][2] = INT64_MAX; s->dimensions[0] = 3; break;
    case 31: s->type[0] = 12; break;
    case 32: s->type[0] = 4; break;
    case 33: s->type[0] = 1000; break;
    case 34: s->type[0] = 8; break;
    case 35: s->offset[1] = 130; break;
    case 36: s->offset[1] = 1 << 20; break;
    case 37: s->offset[0] = UINT64_MAX - 63; break;
    case 38: s->offset[1] = 64; break;
    case 39: s->offset[1] = 0; break;
    case 40: s->data = 159; break;
    case 41: s->tensors = 3; s->data = 0; s->whole_padding = 0; break;
    case 42: s->data = 1; s->whole_padding = 0; break;
    default: /* split.count, uint16 */
        snprintf(s->key, sizeof s->key, "split.count");
        s->key_length = 11;
        s->value.n = 0;
        put(&s->value, 2, 4);
        put(&s->value, 3, 2);
    }
}

START_TEST(refuses_lies) {
    spec s = good();
    static bytes b;
    build(&s, &b);
    ck_assert_msg(parse(&b) == PSOUP_OK, "%s", error.message);
    lie(_i, &s);
    build(&s, &b);
    if (_i == 9) /* a NUL within a key of three bytes */
        ck_assert_int_eq(b.data[32], 0);
    ck_assert_int_ne(parse(&b), PSOUP_OK);
    ck_assert_msg(strstr(error.message, says[_i]) != NULL, "%d: %s", _i, error.message);
    ck_assert_ptr_null(strchr(error.message, '\n'));
    ck_assert(strncmp(error.message, "lie: ", 5) == 0);
}
END_TEST

/* What the format allows is taken: version 2, no tensors, an empty array, nested arrays, gaps, scalars. */
START_TEST(takes_what_is_legal) {
    static bytes b;
    spec s = good();
    s.version = 2;
    array(&s.value, 9, 1);
    put(&s.value, 9, 4);
    put(&s.value, 1, 8);
    put(&s.value, 4, 4);
    put(&s.value, 0, 8);
    s.offset[1] = 192; /* a gap */
    s.data = 256;
    s.dimensions[1] = 0;
    build(&s, &b);
    ck_assert_msg(parse(&b) == PSOUP_OK, "%s", error.message);
    s = good();
    s.type[0] = s.type[1] = 30;
    s.size[0][0] = 0;
    build(&s, &b);
    ck_assert_msg(parse(&b) == PSOUP_OK, "%s", error.message);
    b.n = 0;
    put(&b, 0x46554747, 4);
    put(&b, 3, 4);
    put(&b, 0, 8);
    put(&b, 0, 8);
    ck_assert_msg(parse(&b) == PSOUP_OK, "%s", error.message);
}
END_TEST

START_TEST(cut_and_changed) {
    static bytes b, changed;
    spec s = good();
    build(&s, &b);
    size_t full = b.n;
    for (size_t n = 0; n < full; n++) { /* the second tensor ends at byte 160 of the data */
        b.n = n;
        ck_assert_msg(parse(&b) != PSOUP_OK, "cut at %zu", n);
    }
    b.n = full;
    for (size_t at = 0; at < full - 160; at++)
        for (int bit = 0; bit < 8; bit++) { /* any answer, but no reading past the end */
            changed = b;
            changed.data[at] ^= (unsigned char)(1 << bit);
            parse(&changed);
        }
}
END_TEST

/* ---- what a model or an adapter may not be -------------------------------------------------------- */

START_TEST(strange_models) {
    static bytes b;
    psoup__weights *weights;
    static const struct {
        const char *architecture, *name, *says;
    } cases[] = {{"bert", "token_embd.weight", "expected llama or qwen2"},
                 {"llama", "blk.0.ssm_in.weight", "no counterpart"},
                 {"llama", "blk.0.attn_q.weight", "head_count"},
                 {"llama", "blk.0.attn_k.bias", "head_count"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        spec s = good();
        s.value.n = 0;
        put(&s.value, 8, 4);
        put(&s.value, strlen(cases[i].architecture), 8);
        put_raw(&s.value, cases[i].architecture, strlen(cases[i].architecture));
        snprintf(s.name[0], sizeof s.name[0], "%s", cases[i].name);
        s.name_length[0] = strlen(cases[i].name);
        build(&s, &b);
        write_file("strange.gguf", b.data, b.n);
        ck_assert_int_ne(psoup__weights_map(context, in_scratch("strange.gguf"), "model", &weights, &error),
                         PSOUP_OK);
        ck_assert_msg(strstr(error.message, cases[i].says) != NULL, "%s", error.message);
    }
    /* six rows are no four heads of an even size */
    spec s = good();
    s.key2 = "llama.attention.head_count";
    s.value2 = 4;
    snprintf(s.name[0], sizeof s.name[0], "blk.0.attn_q.weight");
    s.name_length[0] = strlen(s.name[0]);
    s.size[0][1] = 4;
    build(&s, &b);
    write_file("strange.gguf", b.data, b.n);
    ck_assert_int_ne(psoup__weights_map(context, in_scratch("strange.gguf"), "model", &weights, &error),
                     PSOUP_OK);
    ck_assert_msg(strstr(error.message, "no 4 heads") != NULL, "%s", error.message);
}
END_TEST

/* ---- memory that runs out ------------------------------------------------------------------------- */

static psoup_status everything(void) {
    psoup_status status;
    psoup__weights *weights = NULL;
    psoup__peft *peft = NULL;
    psoup__gguf_writer *writer = NULL;
    PSOUP__TRY(psoup__weights_map(context, GGUF "llama-q8_0.gguf", "model", &weights, &error));
    PSOUP__TRY(psoup__hf_copy_sidecars(context, GGUF "llama-q8_0.gguf", in_scratch("hf"), &error));
    PSOUP__TRY(psoup__hf_copy_sidecars(context, GGUF "qwen2-f32.gguf", in_scratch("hf"), &error));
    PSOUP__TRY(psoup__gguf_create(context, in_scratch("out.gguf"), &writer, &error));
    PSOUP__TRY(psoup__gguf_metadata_from(writer, in_scratch("hf"), PSOUP_F32, &error));
    PSOUP__TRY(psoup__gguf_begin(writer, &error));
    PSOUP__TRY(psoup__gguf_commit(writer, &error));
    psoup__gguf_writer_free(writer);
    writer = NULL;
    PSOUP__TRY(psoup__gguf_create(context, in_scratch("copy.gguf"), &writer, &error));
    PSOUP__TRY(psoup__gguf_metadata_from(writer, GGUF "llama3-f16.gguf", PSOUP_F32, &error));
    PSOUP__TRY(psoup__peft_open_heads(context, GGUF "adapter_llama.gguf", 4, 2, &peft, &error));
    const psoup__peft_output out = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 5};
    PSOUP__TRY(psoup__gguf_adapter_write(context, in_scratch("adapter.gguf"), &out, "llama", 4, 2, &error));
fail:
    psoup__gguf_writer_free(writer);
    psoup__peft_free(peft);
    psoup__weights_free(weights);
    return status;
}

START_TEST(memory_runs_out) {
    int steps = getenv("PSOUP_LONG") != NULL ? 1 : 37;
    ck_assert_int_eq(psoup__make_directories(in_scratch("hf"), &error), PSOUP_OK);
    allocations = 0;
    fail_at = INT32_MAX;
    ck_assert_msg(everything() == PSOUP_OK, "%s", error.message);
    int all = allocations, before = live;
    ck_assert_int_gt(all, 100);
    for (int n = _i; n < all; n += steps) {
        allocations = 0;
        fail_at = n;
        psoup_status status = everything();
        fail_at = -1;
        ck_assert_msg(status == PSOUP_ERROR_MEMORY, "allocation %d of %d: %s", n, all, error.message);
        ck_assert_int_eq(live, before);
    }
    fail_at = -1;
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gguf_hostile");
    TCase *c = tcase_create("gguf_hostile");
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_set_timeout(c, 600);
    tcase_add_loop_test(c, refuses_lies, 0, LIES);
    tcase_add_test(c, takes_what_is_legal);
    tcase_add_test(c, cut_and_changed);
    tcase_add_test(c, strange_models);
    tcase_add_loop_test(c, memory_runs_out, 0, 1);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
