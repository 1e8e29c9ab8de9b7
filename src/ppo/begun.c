/* Responses of a step in progress, as checkpoints hold them. */
#include <string.h>

#include "ppo/rollout.h"

psoup_status psoup__begun_keep(psoup__begun *begun, const psoup__rollouts *rollouts, psoup_context *context,
                               psoup_error *error) {
    size_t n = rollouts->n, count = 2 * n + rollouts->tokens;
    psoup_status status = psoup__reserve(context, &begun->data, &begun->capacity, count, sizeof(*begun->data), error);
    if (status != PSOUP_OK)
        return status;
    for (size_t i = 0; i < n; i++) {
        begun->data[2 * i] = rollouts->start[i + 1] - rollouts->start[i];
        begun->data[2 * i + 1] = (int32_t)rollouts->finish[i];
    }
    if (rollouts->tokens)
        memcpy(begun->data + 2 * n, rollouts->response, rollouts->tokens * sizeof(*begun->data));
    begun->n = count;
    return PSOUP_OK;
}

bool psoup__begun_fits(const psoup__begun *begun, size_t n, size_t most, int32_t vocab_size) {
    size_t tokens = 0;
    if (begun->n == 0)
        return true;
    if (begun->n < 2 * n)
        return false;
    for (size_t i = 0; i < n; i++) {
        int32_t length = begun->data[2 * i], finish = begun->data[2 * i + 1];
        if (length < 0 || (size_t)length > most || finish < PSOUP_FINISH_NONE || finish > PSOUP_FINISH_ERROR ||
            (length == 0 && (finish == PSOUP_FINISH_STOP || finish == PSOUP_FINISH_LENGTH)))
            return false;
        tokens += (size_t)length;
    }
    if (begun->n != 2 * n + tokens)
        return false;
    for (size_t t = 2 * n; t < begun->n; t++)
        if (begun->data[t] < 0 || begun->data[t] >= vocab_size)
            return false;
    return true;
}
