/* A decoding batch from one step to the next. */
#include "gpu/internal.h"

#define SAME(type, twin, field)                                                                            \
    _Static_assert(offsetof(psoup__##type, field) == offsetof(psoup__device_##twin, field), #field)
SAME(decoding, decoding, length);
SAME(decoding, decoding, stop);
SAME(decoding, decoding, banned);
SAME(decoding, decoding, logprob);
SAME(decoding, decoding, ended);
SAME(draw, draw, top_p);
SAME(draw, draw, position);
SAME(draw, draw, n_banned);
_Static_assert(sizeof(psoup__decoding) == sizeof(psoup__device_decoding), "psoup__decoding");
_Static_assert(sizeof(psoup__draw) == sizeof(psoup__device_draw), "psoup__draw");
_Static_assert(sizeof(psoup__span) == sizeof(psoup__device_span), "psoup__span");

static void advance(psoup__backend *be, const psoup__decode_state *state, const int32_t *token,
                    const float *logprob, const psoup__keys *cache, int32_t n) {
    PSOUP__LAUNCH(psoup__gpu_of(be), advance,
                  ((psoup__grid){(unsigned)n, 1, 1, PSOUP__ADVANCE_THREADS, 0}),
                  {(psoup__device_decoding *)state->decoding, (psoup__device_draw *)state->draw, state->first,
                   state->token, state->position, state->place, (psoup__device_span *)state->span, token, logprob,
                   cache->pages, cache->pages ? be->ops->page : 0});
}

void psoup__gpu_fill_advance(psoup__ops *ops) {
    ops->advance = advance;
}
