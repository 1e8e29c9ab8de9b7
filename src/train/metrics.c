/* Reports of a trainer's steps: to a JSON Lines file and to the caller. */
#include <assert.h>
#include <time.h>

#include "train/train.h"

void psoup__metric(psoup__metrics *metrics, const char *name, double value) {
    assert(metrics->n < PSOUP__MAX_METRICS);
    metrics->name[metrics->n] = name;
    metrics->value[metrics->n++] = value;
}

void psoup__metric_time(psoup__metrics *metrics, const char *name, double value) {
    assert(metrics->n_times < PSOUP__MAX_TIMES);
    metrics->time_name[metrics->n_times] = name;
    metrics->time[metrics->n_times++] = value;
}

void psoup__metric_speed(psoup__metrics *metrics, double since, size_t tokens) {
    double seconds = psoup__now() - since;
    psoup__metric_time(metrics, "seconds", seconds);
    psoup__metric_time(metrics, "tokens_per_second", seconds > 0.0 ? (double)tokens / seconds : 0.0);
}

double psoup__now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

psoup_status psoup__reporter_open(psoup__reporter *reporter, psoup__team *team, const char *path,
                                  psoup_step_fn on_step, void *user, psoup_error *error) {
    *reporter = (psoup__reporter){.team = team, .on_step = on_step, .user = user};
    return path && team->rank == 0 ? psoup_jsonl_create(team->context, path, 1, &reporter->writer, error)
                                   : PSOUP_OK;
}

void psoup__reporter_close(psoup__reporter *reporter) {
    psoup_jsonl_writer_free(reporter->writer);
    psoup_jsonl_writer_free(reporter->samples);
    reporter->writer = reporter->samples = NULL;
}

static psoup_status write_line(psoup_jsonl_writer *writer, const psoup_step *step,
                               psoup_error *error) {
    psoup_json *row = psoup_json_new_object();
    int failed = psoup_json_set(row, "phase", psoup_json_new_string(step->phase)) |
                 psoup_json_set(row, "subject", psoup_json_new_string(step->subject)) |
                 psoup_json_set(row, "step", psoup_json_new_integer(step->step)) |
                 psoup_json_set(row, "total", psoup_json_new_integer(step->total));
    for (size_t i = 0; i < step->n; i++)
        failed |= psoup_json_set(row, step->names[i], psoup_json_new_real(step->values[i]));
    psoup_status status = failed ? psoup__out_of_memory(error, sizeof(*step))
                                 : psoup_jsonl_write(writer, row, error);
    psoup_json_free(row);
    return status;
}

psoup_status psoup__report(psoup__reporter *reporter, const char *phase, const char *subject,
                           int64_t step, int64_t total, const psoup__metrics *metrics,
                           psoup_error *error) {
    psoup_step report = {.size = sizeof(report),
                         .phase = phase,
                         .subject = subject,
                         .step = step,
                         .total = total,
                         .n = metrics->n,
                         .names = metrics->name,
                         .values = metrics->value,
                         .n_times = metrics->n_times,
                         .time_names = metrics->time_name,
                         .times = metrics->time};
    psoup_status status = reporter->writer ? write_line(reporter->writer, &report, error) : PSOUP_OK;
    bool stop = status == PSOUP_OK && reporter->on_step && reporter->on_step(reporter->user, &report);
    status = psoup__team_vote(reporter->team, status, &stop, error);
    if (status != PSOUP_OK)
        return status;
    if (stop)
        return psoup__fail(error, PSOUP_ERROR_CANCELLED,
                           "training of '%s' was stopped at step %lld of %lld", subject,
                           (long long)step, (long long)total);
    return PSOUP_OK;
}
