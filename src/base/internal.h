/* src/base/internal.h: what the files of this room share among themselves and with nobody else. */
#ifndef PSOUP__BASE_INTERNAL_H
#define PSOUP__BASE_INTERNAL_H

#include "base/base.h"

/* ---- thread.c */

/* context->threads − 1 workers beside the caller; where the system starts fewer, context->threads
 * is lowered to what there is. */
psoup_status psoup__pool_create(psoup_context *context, bool spin, psoup_error *error);
void psoup__pool_free(psoup_context *context);

/* ---- isa.c */

psoup_status psoup__isa_parse(const char *name /* NULL: the best */, psoup__isa *out,
                              psoup_error *error);
const char *psoup__isa_name(psoup__isa isa);

/* ---- json.c, json_parse.c */

/* psoup_json_parse for text that starts at `line` of its file. */
psoup_status psoup__json_parse_at(const char *text, size_t length, const char *name, int64_t line,
                                  psoup_json **out, psoup_error *error);
const char *psoup__json_kind_name(const psoup_json *value); /* "a string", "null", … */

/* ---- file.c */

bool psoup__is_zst(const char *path);
psoup_status psoup__write_all(int fd, const char *path, const void *data, size_t length,
                              psoup_error *error);

/* ---- zstd.c */

typedef struct psoup__unzstd psoup__unzstd;
psoup_status psoup__unzstd_create(psoup_context *context, const char *path, psoup__unzstd **out,
                                  psoup_error *error);
/* Takes from *in (advancing it), gives to out; *got may be 0 when more input is needed. */
psoup_status psoup__unzstd_step(psoup__unzstd *z, const unsigned char **in, size_t *in_length,
                                void *out, size_t capacity, size_t *got, psoup_error *error);
bool psoup__unzstd_at_end(const psoup__unzstd *z); /* at least one frame, and none half read */
void psoup__unzstd_free(psoup__unzstd *z);

typedef struct psoup__tozstd psoup__tozstd;
psoup_status psoup__tozstd_create(psoup_context *context, const char *path, psoup__tozstd **out,
                                  psoup_error *error);
/* As above the other way round; with `finish` and no input left, *done says that all is out. */
psoup_status psoup__tozstd_step(psoup__tozstd *z, const unsigned char **in, size_t *in_length,
                                bool finish, void *out, size_t capacity, size_t *got, bool *done,
                                psoup_error *error);
void psoup__tozstd_free(psoup__tozstd *z);

#endif
