/* Weights: safetensors that the library wrote (tests/golden/format.py), our own read back, files that lie,
 * and directories of shards. */
#include "format_case.h"

/* ---- safetensors -------------------------------------------------------------------------------- */

static const psoup__tensor *find(const psoup__safetensors *file, const char *name) {
    for (size_t i = 0; i < psoup__safetensors_count(file); i++)
        if (strcmp(psoup__safetensors_name(file, i), name) == 0)
            return psoup__safetensors_tensor(file, i);
    ck_abort_msg("no tensor %s", name);
    return NULL;
}

START_TEST(reads_what_the_library_wrote) {
    psoup__safetensors *file;
    ck_ok(psoup__safetensors_open(context, GOLDEN "basic.safetensors", &file, &error));
    ck_ok(psoup__safetensors_map(file, &error));
    ck_assert_uint_eq(psoup__safetensors_count(file), 13);
    ck_assert_str_eq(
        psoup_json_string(psoup_json_get(psoup__safetensors_metadata(file), "note"), ""), "ü");
    static const struct {
        const char *name;
        psoup_dtype dtype;
    } floats[] = {{"f32", PSOUP_F32}, {"f16", PSOUP_F16}, {"bf16", PSOUP_BF16}, {"f64", PSOUP_F64}};
    for (int i = 0; i < 4; i++) {
        float values[6];
        const psoup__tensor *tensor = find(file, floats[i].name);
        ck_assert_int_eq(tensor->dtype, floats[i].dtype);
        ck_assert_int_eq(tensor->rank, 2);
        ck_assert_int_eq(tensor->shape[0], 2);
        ck_assert_int_eq(tensor->shape[1], 3);
        psoup__to_f32(context, values, tensor->data, tensor->dtype, 6);
        for (int k = 0; k < 6; k++)
            ck_assert_float_eq(values[k], (float)(k - 2));
    }
    int64_t big;
    memcpy(&big, (const char *)find(file, "i64")->data + 8, sizeof big);
    ck_assert_int_eq(big, -1);
    ck_assert_int_eq(((const signed char *)find(file, "i8")->data)[0], -2);
    ck_assert_int_eq(((const unsigned char *)find(file, "u8")->data)[5], 5);
    ck_assert_int_eq(find(file, "bool")->dtype, PSOUP_BOOL);
    ck_assert_int_eq(find(file, "i16")->dtype, PSOUP_I16);
    ck_assert_int_eq(find(file, "i32")->dtype, PSOUP_I32);
    ck_assert_int_eq(find(file, "scalar")->rank, 0);
    ck_assert_uint_eq(find(file, "scalar")->bytes, 4);
    ck_assert_uint_eq(find(file, "empty")->bytes, 0);
    find(file, "naïve \"quoted\"\\名");
    for (size_t i = 1; i < psoup__safetensors_count(file); i++)
        ck_assert((const char *)psoup__safetensors_tensor(file, i - 1)->data <=
                  (const char *)psoup__safetensors_tensor(file, i)->data);
    psoup__safetensors_free(file);
}
END_TEST

START_TEST(writes_and_reads_back) {
    psoup__safetensors_writer *writer;
    psoup__safetensors *file;
    const float values[6] = {0, 0.5f, 1, 1.5f, 2, 2.5f}, answer = 42;
    const uint16_t halves[2] = {0x3c00, 0xc000};
    const int64_t matrix[2] = {2, 3}, two[1] = {2}, none[2] = {0, 3};
    ck_ok(psoup__safetensors_create(context, in_scratch("ours.safetensors"), &writer, &error));
    ck_ok(psoup__safetensors_metadata_set(writer, "a key", "a \"value\"", &error));
    ck_ok(psoup__safetensors_declare(writer, "f16", PSOUP_F16, 1, two, &error));
    ck_ok(psoup__safetensors_declare(writer, "f32", PSOUP_F32, 2, matrix, &error));
    ck_ok(psoup__safetensors_declare(writer, "empty", PSOUP_BF16, 2, none, &error));
    ck_ok(psoup__safetensors_declare(writer, "scalar", PSOUP_F32, 0, NULL, &error));
    ck_assert_int_ne(psoup__safetensors_declare(writer, "f16", PSOUP_F16, 1, two, &error), PSOUP_OK);
    ck_ok(psoup__safetensors_begin(writer, &error));
    ck_ok(psoup__safetensors_write(writer, halves, 4, &error));
    ck_ok(psoup__safetensors_write(writer, values, 10, &error)); /* in parts of any size */
    ck_ok(psoup__safetensors_write(writer, (const char *)values + 10, 14, &error));
    ck_assert_int_eq(psoup__safetensors_commit(writer, &error), PSOUP_ERROR_STATE);
    ck_assert_int_eq(psoup__safetensors_write(writer, values, 5, &error), PSOUP_ERROR_STATE);
    ck_ok(psoup__safetensors_write(writer, &answer, 4, &error));
    ck_assert(!psoup__file_exists(in_scratch("ours.safetensors")));
    ck_ok(psoup__safetensors_commit(writer, &error));
    psoup__safetensors_writer_free(writer);

    unsigned char head[9];
    FILE *raw = fopen(in_scratch("ours.safetensors"), "rb");
    ck_assert_uint_eq(fread(head, 1, 9, raw), 9);
    fclose(raw);
    ck_assert_int_eq(head[0] % 8, 0); /* the data begin at a multiple of 8 */
    ck_assert_int_eq(head[8], '{');
    ck_ok(psoup__safetensors_open(context, in_scratch("ours.safetensors"), &file, &error));
    ck_ok(psoup__safetensors_map(file, &error));
    ck_assert_uint_eq(psoup__safetensors_count(file), 4);
    ck_assert_mem_eq(find(file, "f32")->data, values, sizeof values);
    ck_assert_mem_eq(find(file, "f16")->data, halves, sizeof halves);
    ck_assert_mem_eq(find(file, "scalar")->data, &answer, sizeof answer);
    psoup__safetensors_free(file);
}
END_TEST

/* Each: the header, how many bytes of data follow, and what the message must name. */
static const struct {
    const char *header;
    size_t data;
    const char *says;
} lies[] = {
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4, "within the file's 4 bytes"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 12, "end at byte 8"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8, "need 12"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "a hole"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}", 12, "tensor y begins at byte 8"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
     "\"y\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "overlap"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "overlap"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "overflows"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0, "overflows"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,0]}}", 0, "natural"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "natural"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4, "natural"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "shape"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":1,\"data_offsets\":[0,4]}}", 4, "shape"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "data_offsets"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "data_offsets"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 8, "data_offsets"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}", 8, "span 8 bytes, its dtype and shape need 4"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "span 4 bytes, its dtype and shape need 8"},
    {"{\"x\":{\"dtype\":\"F8_E8M0\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "F8_E8M0"},
    {"{\"x\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "dtype"},
    {"{\"x\":[]}", 0, "object"},
    {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "duplicate"},
    {"{\"__metadata__\":{\"a\":1}}", 0, "__metadata__"},
    {"{\"__metadata__\":[]}", 0, "__metadata__"},
    {"{\"x\":\"\xff\"}", 0, "decode"},
    {"{\"x\"", 0, ":"},
    {"{} {}", 0, "lie:"},
    {"[]", 0, "'{'"},
    {" {}", 0, "'{'"},
    {"", 0, "'{'"},
};

static psoup_status parse(const char *header, size_t header_length, uint64_t said, size_t data) {
    size_t length = 8 + header_length + data;
    unsigned char *bytes = calloc(length, 1); /* exactly: a reader past the end meets the sanitizer */
    psoup__safetensors *file;
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)(said >> (8 * i));
    if (header_length > 0)
        memcpy(bytes + 8, header, header_length);
    memset(&error, 0, sizeof error);
    psoup_status status = psoup__safetensors_parse(context, bytes, length, "lie", &file, &error);
    ck_assert((file != NULL) == (status == PSOUP_OK));
    psoup__safetensors_free(file);
    free(bytes);
    return status;
}

START_TEST(refuses_a_lie) {
    size_t length = strlen(lies[_i].header);
    ck_assert_int_ne(parse(lies[_i].header, length, length, lies[_i].data), PSOUP_OK);
    ck_assert_msg(strncmp(error.message, "lie:", 4) == 0 &&
                      strstr(error.message, lies[_i].says) != NULL &&
                      strchr(error.message, '\n') == NULL,
                  "%s", error.message);
}
END_TEST

START_TEST(refuses_lengths_and_depths) {
    static const char good[] = "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
    size_t n = sizeof good - 1;
    ck_ok(parse(good, n, n, 4));
    ck_ok(parse("{}", 2, 2, 0));
    ck_assert_int_ne(parse(good, n, n + 5, 4), PSOUP_OK);
    ck_assert_int_ne(parse(good, n, n - 1, 4), PSOUP_OK);
    ck_assert_int_ne(parse(good, n, UINT64_MAX, 4), PSOUP_OK);
    ck_assert_int_ne(parse(good, n, UINT64_MAX - 7, 4), PSOUP_OK);
    ck_assert_int_ne(parse(good, n, 100000001, 4), PSOUP_OK);
    ck_assert_int_ne(parse(good, n, 100000001, 100000001), PSOUP_OK); /* there is as much, and it is too much */
    ck_assert_msg(strstr(error.message, "at most 100000000 ") != NULL, "%s", error.message);
    for (size_t cut = 0; cut < n; cut++)
        ck_assert_int_ne(parse(good, cut, n, 0), PSOUP_OK);
    psoup__safetensors *file;
    for (size_t length = 0; length < 8; length++)
        ck_assert_int_eq(psoup__safetensors_parse(context, "\0\0\0\0\0\0\0", length, "short", &file,
                                                  &error),
                         PSOUP_ERROR_FORMAT);
    enum { DEPTH = 200000 };
    char *deep = malloc(DEPTH + 5);
    memcpy(deep, "{\"x\":", 5);
    memset(deep + 5, '[', DEPTH);
    ck_assert_int_eq(parse(deep, DEPTH + 5, DEPTH + 5, 0), PSOUP_ERROR_FORMAT);
    free(deep);
    ck_assert_int_eq(psoup__safetensors_open(context, in_scratch("nothing"), &file, &error),
                     PSOUP_ERROR_IO);
    write_file("void.safetensors", "", 0);
    ck_assert_int_eq(psoup__safetensors_open(context, in_scratch("void.safetensors"), &file, &error),
                     PSOUP_ERROR_FORMAT);
}
END_TEST

/* ---- directories of weights -------------------------------------------------------------------- */

START_TEST(reads_shards) {
    psoup__weights *weights;
    psoup_json *sums;
    ck_ok(psoup__weights_map(context, GOLDEN "sharded", "model", &weights, &error));
    ck_ok(psoup_json_read(context, GOLDEN "sums.json", &sums, &error));
    ck_assert_uint_eq(psoup__weights_count(weights), psoup_json_size(sums));
    const char *name = NULL;
    for (const psoup_json *sum; (sum = psoup_json_next(sums, &name)) != NULL;) {
        const psoup__tensor *tensor = psoup__weights_find(weights, name);
        ck_assert_msg(tensor != NULL && tensor->dtype == PSOUP_F32, "%s", name);
        double total = 0;
        for (size_t i = 0; i < tensor->bytes / 4; i++) {
            float x;
            memcpy(&x, (const char *)tensor->data + 4 * i, 4);
            total += (double)x;
        }
        ck_assert_double_eq_tol(total, psoup_json_real(sum, NAN), 1e-9);
    }
    ck_assert_ptr_null(psoup__weights_find(weights, "no such tensor"));
    psoup_json_free(sums);
    psoup__weights_free(weights);
}
END_TEST

static psoup_status open_weights(const char *name) {
    psoup__weights *weights;
    psoup_status status = psoup__weights_map(context, in_scratch(name), "model", &weights, &error);
    ck_assert((weights != NULL) == (status == PSOUP_OK));
    psoup__weights_free(weights);
    return status;
}

static void write_one(const char *path, const char *tensor) {
    psoup__safetensors_writer *writer;
    const int64_t one = 1;
    ck_ok(psoup__safetensors_create(context, path, &writer, &error));
    ck_ok(psoup__safetensors_declare(writer, tensor, PSOUP_F32, 1, &one, &error));
    ck_ok(psoup__safetensors_begin(writer, &error));
    ck_ok(psoup__safetensors_write(writer, "\0\0\0", 4, &error));
    ck_ok(psoup__safetensors_commit(writer, &error));
    psoup__safetensors_writer_free(writer);
}

START_TEST(refuses_bad_indices) {
    static const struct {
        const char *index, *says;
    } bad[] = {
        {"{\"weight_map\":{\"x\":\"../a.safetensors\"}}", "same directory"},
        {"{\"weight_map\":{\"x\":\"/etc/passwd\"}}", "same directory"},
        {"{\"weight_map\":{\"x\":\"..\"}}", "same directory"},
        {"{\"weight_map\":{\"x\":\"b\\\\a\"}}", "same directory"},
        {"{\"weight_map\":{\"x\":\"\"}}", "same directory"},
        {"{\"weight_map\":{\"x\":3}}", "same directory"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{}", "weight_map"},
        {"{\"weight_map\":{\"x\":\"a.safetensors\",\"z\":\"a.safetensors\"}}", "tensor z is not in"},
        {"{\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"a.safetensors\",\"w\":\"b.safetensors\"}}",
         "tensor y is not in"},
        {"{\"weight_map\":{\"x\":\"a.safetensors\",\"w\":\"twice.safetensors\"}}", "another shard"},
        {"{\"weight_map\":{\"x\":\"missing.safetensors\"}}", "missing.safetensors"},
        {"{", "model.safetensors.index.json"},
    };
    make_directory("bad");
    write_one(in_scratch("bad/a.safetensors"), "x");
    write_one(in_scratch("bad/b.safetensors"), "w");
    write_one(in_scratch("bad/twice.safetensors"), "x");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_file("bad/model.safetensors.index.json", bad[i].index, strlen(bad[i].index));
        ck_assert_int_ne(open_weights("bad"), PSOUP_OK);
        ck_assert_msg(strstr(error.message, bad[i].says) != NULL, "%s: %s", bad[i].index,
                      error.message);
    }
    static const char good[] =
        "{\"weight_map\":{\"x\":\"a.safetensors\",\"w\":\"b.safetensors\"}}";
    write_file("bad/model.safetensors.index.json", good, sizeof good - 1);
    ck_ok(open_weights("bad"));

    make_directory("pickle");
    ck_assert_int_eq(open_weights("pickle"), PSOUP_ERROR_IO);
    write_file("pickle/pytorch_model.bin", "x", 1);
    ck_assert_int_eq(open_weights("pickle"), PSOUP_ERROR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.message, "save_pretrained"));
    ck_assert_int_eq(open_weights("pickle/pytorch_model.bin"), PSOUP_ERROR_UNSUPPORTED);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("format");
    TCase *tests = tcase_create("format");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, reads_what_the_library_wrote);
    tcase_add_test(tests, writes_and_reads_back);
    tcase_add_loop_test(tests, refuses_a_lie, 0, (int)(sizeof lies / sizeof *lies));
    tcase_add_test(tests, refuses_lengths_and_depths);
    tcase_add_test(tests, reads_shards);
    tcase_add_test(tests, refuses_bad_indices);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
