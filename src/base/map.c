/* src/base/map.c: byte strings to int64, open addressing with linear probing. Every map has a hash of its
 * own, which nobody who writes a file can know: keys that all fall into one place would take quadratic time.
 * Maps are not walked, so nothing that is made with one differs between runs. */
#include "base/base.h"

#include <string.h>
#include <sys/random.h>

typedef struct slot {
    uint64_t hash;
    size_t key; /* 1 + offset in keys; 0: an empty slot */
    size_t length;
    int64_t value;
} slot;

struct psoup__map {
    psoup_context *context;
    slot *slots; /* [mask + 1] */
    size_t mask, used;
    uint64_t seed;
    psoup__buffer keys; /* all keys, one after another */
};

/* The 128-bit product of both, folded: the mixing step of the wyhash family. */
static uint64_t fold(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t hash_bytes(uint64_t seed, const unsigned char *key, size_t length) {
    /* odd constants: the fractions of the golden ratio and of √2 */
    const uint64_t first = 0x9e3779b97f4a7c15u ^ seed, second = 0x6a09e667f3bcc909u;
    uint64_t hash = fold(length ^ first, second);
    while (length > 0) {
        uint64_t word = 0;
        size_t take = length < 8 ? length : 8;
        memcpy(&word, key, take);
        hash = fold(hash ^ word ^ first, hash + second);
        key += take, length -= take;
    }
    return fold(hash ^ first, second);
}

psoup_status psoup__map_create(psoup_context *context, size_t expected, psoup__map **out,
                               psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup__map *map = psoup__alloc(context, 1, sizeof *map, error);
    if (map == NULL)
        return status;
    map->context = map->keys.context = context;
    size_t slots = 16;
    while (slots / 2 < expected && slots <= SIZE_MAX / 4)
        slots *= 2;
    map->slots = psoup__alloc(context, slots, sizeof(slot), error);
    if (map->slots == NULL)
        goto fail;
    map->mask = slots - 1;
    if (getrandom(&map->seed, sizeof map->seed, GRND_NONBLOCK) != (ssize_t)sizeof map->seed)
        map->seed = (uint64_t)(uintptr_t)map * 0x9e3779b97f4a7c15u;
    *out = map;
    return PSOUP_OK;
fail:
    psoup__map_free(map);
    return status;
}

/* The key's slot, or the empty one where it belongs. */
static slot *find(const psoup__map *map, const void *key, size_t length, uint64_t hash) {
    for (size_t i = hash & map->mask;; i = (i + 1) & map->mask) {
        slot *s = &map->slots[i];
        if (s->key == 0 || (s->hash == hash && s->length == length &&
                            (length == 0 || memcmp(map->keys.data + s->key - 1, key, length) == 0)))
            return s;
    }
}

static psoup_status grow(psoup__map *map, psoup_error *error) {
    size_t old = map->mask + 1;
    slot *slots =
        psoup__alloc(map->context, old <= SIZE_MAX / 2 ? old * 2 : SIZE_MAX, sizeof(slot), error);
    if (slots == NULL)
        return PSOUP_ERROR_MEMORY;
    size_t mask = old * 2 - 1;
    for (size_t i = 0; i < old; i++) {
        if (map->slots[i].key == 0)
            continue;
        size_t to = map->slots[i].hash & mask;
        while (slots[to].key != 0)
            to = (to + 1) & mask;
        slots[to] = map->slots[i];
    }
    psoup__free(map->context, map->slots);
    map->slots = slots;
    map->mask = mask;
    return PSOUP_OK;
}

psoup_status psoup__map_set(psoup__map *map, const void *key, size_t length, int64_t value,
                            bool *fresh, psoup_error *error) {
    uint64_t hash = hash_bytes(map->seed, key, length);
    slot *s = find(map, key, length, hash);
    bool is_new = s->key == 0;
    if (is_new) {
        if (map->used >= map->mask / 4 * 3) {
            if (grow(map, error) != PSOUP_OK)
                return PSOUP_ERROR_MEMORY;
            s = find(map, key, length, hash);
        }
        size_t at = map->keys.length;
        psoup__buffer_append(&map->keys, key, length);
        if (map->keys.failed) {
            map->keys.failed = false; /* the keys so far are whole */
            return psoup__out_of_memory(error, at + length + 1);
        }
        *s = (slot){.hash = hash, .key = at + 1, .length = length};
        map->used++;
    }
    s->value = value;
    if (fresh != NULL)
        *fresh = is_new;
    return PSOUP_OK;
}

bool psoup__map_get(const psoup__map *map, const void *key, size_t length, int64_t *value) {
    const slot *s = find(map, key, length, hash_bytes(map->seed, key, length));
    if (s->key != 0 && value != NULL)
        *value = s->value;
    return s->key != 0;
}

void psoup__map_free(psoup__map *map) {
    if (map == NULL)
        return;
    psoup__buffer_free(&map->keys);
    psoup__free(map->context, map->slots);
    psoup__free(map->context, map);
}
