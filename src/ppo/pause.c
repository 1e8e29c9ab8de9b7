/* What may come between two tokens, or two phases of a step: to be told to stop, and to keep the responses so far. */
#include "ppo/ppo.h"

/* The first n active policies do it: a step; or between two steps, a validation or samples. */
static psoup_step moment(const psoup_ppo *ppo, bool stepping) {
    const psoup__policy *policy = ppo->active[0];
    return (psoup_step){.size = sizeof(psoup_step), .phase = "pause", .subject = policy->name,
                        .step = policy->state.step + stepping, .total = policy->total};
}

static bool told_to_stop(psoup_ppo *ppo, bool stepping) {
    const psoup__reporter *r = &ppo->reporter;
    psoup_step step = moment(ppo, stepping);
    ppo->pauses.asked = psoup__now();
    return r->on_step && r->on_step(r->user, &step) != 0;
}

static psoup__answer ask(void *user) {
    psoup_ppo *ppo = user;
    psoup__pauses *p = &ppo->pauses;
    double now = psoup__now();
    if (now - p->asked >= p->ask_every && told_to_stop(ppo, p->n > 0))
        return PSOUP__STOP;
    bool due = p->n && ppo->checkpoint.directory && now - p->kept >= p->keep_every &&
               now - p->kept >= PSOUP__KEEP_SHARE * p->cost;
    return due ? PSOUP__KEEP : PSOUP__GO_ON;
}

static psoup_status note(psoup_ppo *ppo, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t k = 0; status == PSOUP_OK && k < ppo->pauses.n; k++)
        status = psoup__begun_keep(&ppo->active[k]->begun, &ppo->active[k]->experience.rollouts, ppo->model->context,
                                   error);
    return status;
}

static psoup_status keep(void *user, psoup_error *error) {
    psoup_ppo *ppo = user;
    psoup_status status = note(ppo, error);
    double now = psoup__now();
    if (status == PSOUP_OK)
        status = psoup__checkpoint_now(&ppo->checkpoint, psoup__ppo_steps_done(ppo), error);
    ppo->pauses.kept = psoup__now();
    ppo->pauses.cost = ppo->pauses.kept - now;
    return status;
}

/* Whether any rank was told to stop; own: how what rank 0 may have done alone before came out. */
static psoup_status agree(psoup_ppo *ppo, psoup_status own, bool stop, bool stepping, psoup_error *error) {
    psoup_step at = moment(ppo, stepping);
    psoup_status status = psoup__team_vote(&ppo->team, own, &stop, error);
    if (status != PSOUP_OK || !stop)
        return status;
    return psoup__fail(error, PSOUP_ERROR_CANCELLED, "training of '%s' was stopped %s step %lld of %lld", at.subject,
                       stepping ? "in" : "after", (long long)at.step, (long long)at.total);
}

psoup_status psoup__ppo_pause(psoup_ppo *ppo, size_t n, psoup_error *error) {
    return n && ppo->checkpoint.kept ? agree(ppo, PSOUP_OK, told_to_stop(ppo, true), true, error) : PSOUP_OK;
}

psoup_status psoup__ppo_draw(psoup_ppo *ppo, size_t n, bool stepping, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool kept = n && ppo->checkpoint.kept;
    double began = psoup__now();
    psoup__pause pause = {.ask = ask, .keep = keep, .user = ppo};
    ppo->pauses.n = stepping ? n : 0;
    ppo->pauses.kept = began;
    PSOUP__TRY(psoup__sample_rollouts(ppo->model, &ppo->team, &ppo->options, ppo->requests, n, kept ? &pause : NULL,
                                      error));
    if (!kept)
        return PSOUP_OK;
    PSOUP__TRY(note(ppo, error));
    bool stop = pause.stopped || (stepping && told_to_stop(ppo, true));
    bool late = stepping && !stop && psoup__now() - began >= ppo->pauses.keep_every;
    /* What took so long is kept before it is learnt from. */
    status = late && ppo->checkpoint.directory ? keep(ppo, error) : PSOUP_OK;
    status = agree(ppo, status, stop, stepping, error);
fail:
    return status;
}
