/* Writes what training found as a tokenizer.json. */
#include "text/text.h"

/* The builders hand a NULL on, but a failed set inside a list would go unseen: every call is counted. */
static int failed(int *failures, int result) {
    *failures += result != 0;
    return result;
}

static psoup_json *of_type(const char *type, int *failures) {
    psoup_json *object = psoup_json_new_object();
    failed(failures, psoup_json_set(object, "type", psoup_json_new_string(type)));
    return object;
}

static psoup_json *byte_level(int trim, int regex, int *failures) {
    psoup_json *object = of_type("ByteLevel", failures);
    failed(failures, psoup_json_set(object, "add_prefix_space", psoup_json_new_bool(0)));
    failed(failures, psoup_json_set(object, "trim_offsets", psoup_json_new_bool(trim)));
    failed(failures, psoup_json_set(object, "use_regex", psoup_json_new_bool(regex)));
    return object;
}

static psoup_json *pre_tokenizer(const char *pattern, int *failures) {
    if (pattern == NULL)
        return byte_level(1, 1, failures);
    psoup_json *regex = psoup_json_new_object(), *split = of_type("Split", failures);
    psoup_json *list = psoup_json_new_array(), *sequence = of_type("Sequence", failures);
    failed(failures, psoup_json_set(regex, "Regex", psoup_json_new_string(pattern)));
    failed(failures, psoup_json_set(split, "pattern", regex));
    failed(failures, psoup_json_set(split, "behavior", psoup_json_new_string("Isolated")));
    failed(failures, psoup_json_set(split, "invert", psoup_json_new_bool(0)));
    failed(failures, psoup_json_append(list, split));
    failed(failures, psoup_json_append(list, byte_level(1, 0, failures)));
    failed(failures, psoup_json_set(sequence, "pretokenizers", list));
    return sequence;
}

static psoup_json *added_tokens(const char *const *names, size_t n, int *failures) {
    static const char *const off[] = {"single_word", "lstrip", "rstrip", "normalized"};
    psoup_json *list = psoup_json_new_array();
    for (size_t i = 0; i < n; i++) {
        psoup_json *token = psoup_json_new_object();
        failed(failures, psoup_json_set(token, "id", psoup_json_new_integer(256 + (int64_t)i)));
        failed(failures, psoup_json_set(token, "content", psoup_json_new_string(names[256 + i])));
        for (size_t f = 0; f < sizeof off / sizeof *off; f++)
            failed(failures, psoup_json_set(token, off[f], psoup_json_new_bool(0)));
        failed(failures, psoup_json_set(token, "special", psoup_json_new_bool(1)));
        failed(failures, psoup_json_append(list, token));
    }
    return list;
}

static psoup_json *model(const char *const *names, int32_t n, const int32_t (*merges)[2],
                         size_t n_merges, int *failures) {
    static const char *const null[] = {"dropout", "unk_token", "continuing_subword_prefix",
                                       "end_of_word_suffix"};
    static const char *const off[] = {"fuse_unk", "byte_fallback", "ignore_merges"};
    psoup_json *object = of_type("BPE", failures), *vocab = psoup_json_new_object();
    psoup_json *list = psoup_json_new_array();
    for (size_t i = 0; i < sizeof null / sizeof *null; i++)
        failed(failures, psoup_json_set(object, null[i], psoup_json_new_null()));
    for (size_t i = 0; i < sizeof off / sizeof *off; i++)
        failed(failures, psoup_json_set(object, off[i], psoup_json_new_bool(0)));
    for (int32_t i = 0; i < n; i++)
        failed(failures, psoup_json_set(vocab, names[i], psoup_json_new_integer(i)));
    for (size_t i = 0; i < n_merges; i++) {
        psoup_json *pair = psoup_json_new_array();
        for (int side = 0; side < 2; side++)
            failed(failures,
                   psoup_json_append(pair, psoup_json_new_string(names[merges[i][side]])));
        failed(failures, psoup_json_append(list, pair));
    }
    failed(failures, psoup_json_set(object, "vocab", vocab));
    failed(failures, psoup_json_set(object, "merges", list));
    return object;
}

psoup_json *psoup__tokenizer_json(const char *const *names, int32_t n, size_t n_special,
                                  const int32_t (*merges)[2], size_t n_merges,
                                  const char *pattern) {
    int failures = 0;
    psoup_json *root = psoup_json_new_object();
    failed(&failures, psoup_json_set(root, "version", psoup_json_new_string("1.0")));
    failed(&failures, psoup_json_set(root, "truncation", psoup_json_new_null()));
    failed(&failures, psoup_json_set(root, "padding", psoup_json_new_null()));
    failed(&failures, psoup_json_set(root, "added_tokens", added_tokens(names, n_special, &failures)));
    failed(&failures, psoup_json_set(root, "normalizer", psoup_json_new_null()));
    failed(&failures, psoup_json_set(root, "pre_tokenizer", pre_tokenizer(pattern, &failures)));
    failed(&failures, psoup_json_set(root, "post_processor", psoup_json_new_null()));
    failed(&failures, psoup_json_set(root, "decoder", byte_level(1, 1, &failures)));
    failed(&failures, psoup_json_set(root, "model", model(names, n, merges, n_merges, &failures)));
    if (failures > 0) {
        psoup_json_free(root);
        return NULL;
    }
    return root;
}
