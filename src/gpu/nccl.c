/* Ranks that add up in their GPUs' memory, by NCCL; all else goes by another way to talk. */
#include "gpu/nccl.h"

#include <dlfcn.h>
#include <string.h>
#include <time.h>

#include "base/base.h"
#include "gpu/driver.h"
#include "psoup/comm.h"

typedef struct library {
    void *handle;
#define FIELD(field, symbol, parameters) int(*field) parameters;
    PSOUP__NCCL_CALLS(FIELD)
#undef FIELD
    const char *(*error_string)(int result);
} library;

typedef struct nccl {
    psoup_comm comm; /* first: what the caller has */
    psoup_context *context;
    const psoup_comm *host;
    library lib;
    psoup__driver driver;
    psoup__cu_device device;
    psoup__cu_context primary, before; /* before: the thread's, which it gets back */
    psoup__cu_stream stream;
    void *ranks; /* ncclComm_t; NULL: none, or it was aborted */
} nccl;

/* ---- opening ------------------------------------------------------------------------------------------ */

/* NODELETE, as for the driver. */
static psoup_status open_library(library *lib, psoup_error *error) {
    const char *missing = NULL;
    void *address;
    lib->handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!lib->handle)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "NCCL is not here: %s", dlerror());
#define FIND(field, symbol, parameters)                                                                    \
    address = dlsym(lib->handle, #symbol);                                                                 \
    missing = address || missing ? missing : #symbol;                                                      \
    memcpy(&lib->field, &address, sizeof address);
    PSOUP__NCCL_CALLS(FIND)
    FIND(error_string, ncclGetErrorString, )
#undef FIND
    return missing ? psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                 "libnccl.so.2 has no %s: NCCL 2.14 or later is needed", missing)
                   : PSOUP_OK;
}

static psoup_status driver_fails(const nccl *c, psoup__cu_result result, psoup_error *error) {
    const char *text = NULL;
    return psoup__fail(error, PSOUP_ERROR_STATE, "GPU: %s",
                       c->driver.error_string(result, &text) == 0 && text ? text : "unknown error");
}

static psoup_status enter(nccl *c, psoup_error *error) {
    psoup__cu_result result = c->driver.context_get(&c->before);
    if (result == 0)
        result = c->driver.context_set(c->primary);
    return result == 0 ? PSOUP_OK : driver_fails(c, result, error);
}

static psoup_status open_device(nccl *c, psoup_error *error) {
    psoup_status status = psoup__driver_open(&c->driver, error);
    if (status != PSOUP_OK)
        return status;
    psoup__cu_result result = c->driver.device_get(&c->device, c->context->gpu);
    if (result == 0)
        result = c->driver.context_retain(&c->primary, c->device);
    if (result != 0)
        return driver_fails(c, result, error);
    status = enter(c, error);
    if (status == PSOUP_OK) {
        result = c->driver.stream_create(&c->stream, PSOUP__CU_STREAM_NON_BLOCKING);
        status = result == 0 ? PSOUP_OK : driver_fails(c, result, error);
        c->driver.context_set(c->before);
    }
    return status;
}

/* ---- waiting: calls return at once, and what became of them is asked for ---------------------------------- */

/* NCCL does not say which rank is gone: the host does, as soon as it knows. */
static psoup_status ask_host(const nccl *c, int result, psoup_error *error) {
    const struct timespec moment = {.tv_nsec = 10000000};
    psoup_status status = PSOUP_OK;
    for (int tries = 0; status == PSOUP_OK && tries < 100; tries++) {
        status = c->host->failed(c->host->user, error);
        if (status == PSOUP_OK)
            nanosleep(&moment, NULL);
    }
    return status != PSOUP_OK ? status
                              : psoup__fail(error, PSOUP_ERROR_IO, "NCCL: %s", c->lib.error_string(result));
}

/* What NCCL has not noticed the host may know. */
static psoup_status progress(nccl *c, int result, bool *done, psoup_error *error) {
    int state = result;
    *done = false;
    if ((result == PSOUP__NCCL_SUCCESS || result == PSOUP__NCCL_IN_PROGRESS) && c->ranks)
        result = c->lib.async_error(c->ranks, &state);
    if (result == PSOUP__NCCL_SUCCESS || result == PSOUP__NCCL_IN_PROGRESS)
        result = state;
    *done = result == PSOUP__NCCL_SUCCESS;
    if (result == PSOUP__NCCL_SUCCESS || result == PSOUP__NCCL_IN_PROGRESS)
        return c->host->failed(c->host->user, error);
    return ask_host(c, result, error);
}

static void rest(int tries) {
    const struct timespec moment = {.tv_nsec = tries < 1000 ? 1000 : 100000};
    if (tries > 100)
        nanosleep(&moment, NULL);
}

/* Until a call's `result` is no longer that it goes on. */
static psoup_status finish_call(nccl *c, int result, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool done = false;
    for (int tries = 0; status == PSOUP_OK && !done; tries++) {
        status = progress(c, result, &done, error);
        result = PSOUP__NCCL_IN_PROGRESS;
        if (!done)
            rest(tries);
    }
    return status;
}

/* Until the stream is empty. */
static psoup_status finish_work(nccl *c, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__cu_result result = PSOUP__CU_NOT_READY;
    bool done;
    for (int tries = 0; status == PSOUP_OK && result == PSOUP__CU_NOT_READY; tries++) {
        result = c->driver.stream_query(c->stream);
        if (result != PSOUP__CU_NOT_READY)
            break;
        status = progress(c, PSOUP__NCCL_SUCCESS, &done, error);
        rest(tries);
    }
    if (status == PSOUP_OK && result == 0) /* work that was given up ends too */
        status = progress(c, PSOUP__NCCL_SUCCESS, &done, error);
    return status != PSOUP_OK || result == 0 ? status : driver_fails(c, result, error);
}

/* What is under way ends, on the GPU too, and the others hear why. */
static psoup_status give_up(nccl *c, psoup_status status, psoup_error *error) {
    if (c->ranks)
        c->lib.abort(c->ranks);
    c->ranks = NULL;
    if (error)
        c->host->abort(c->host->user, error->message);
    return status;
}

/* ---- the table ------------------------------------------------------------------------------------------- */

static psoup_status nccl_sum_device(void *user, float *x, size_t n, psoup_error *error) {
    nccl *c = user;
    psoup_error why = {0};
    if (!c->ranks && c->host->failed(c->host->user, error) == PSOUP_OK)
        return psoup__fail(error, PSOUP_ERROR_STATE, "NCCL: a call before has failed");
    if (!c->ranks)
        return PSOUP_ERROR_IO;
    psoup_status status = enter(c, &why);
    if (status == PSOUP_OK) {
        int result = c->lib.all_reduce(x, x, n, PSOUP__NCCL_F32, PSOUP__NCCL_SUM, c->ranks, c->stream);
        status = finish_call(c, result, &why);
        if (status == PSOUP_OK)
            status = finish_work(c, &why);
        if (status != PSOUP_OK)
            give_up(c, status, &why);
        c->driver.context_set(c->before);
    }
    return status == PSOUP_OK ? status : psoup__fail(error, status, "%s", why.message);
}

static psoup_status nccl_sum(void *user, void *x, size_t n, psoup_dtype dtype, psoup_error *error) {
    const nccl *c = user;
    return c->host->sum(c->host->user, x, n, dtype, error);
}

static psoup_status nccl_broadcast(void *user, void *data, size_t bytes, psoup_error *error) {
    const nccl *c = user;
    return c->host->broadcast(c->host->user, data, bytes, error);
}

static psoup_status nccl_failed(void *user, psoup_error *error) {
    const nccl *c = user;
    return c->host->failed(c->host->user, error);
}

static void nccl_abort(void *user, const char *reason) {
    nccl *c = user;
    psoup_error why;
    psoup__fail(&why, PSOUP_ERROR_STATE, "%s", reason);
    give_up(c, PSOUP_OK, &why);
}

static void nccl_free(void *user) {
    nccl *c = user;
    if (c->primary && c->driver.context_get(&c->before) == 0 && c->driver.context_set(c->primary) == 0) {
        if (c->ranks && finish_call(c, c->lib.finalize(c->ranks), NULL) == PSOUP_OK)
            c->lib.destroy(c->ranks);
        else if (c->ranks)
            c->lib.abort(c->ranks);
        if (c->stream)
            c->driver.stream_destroy(c->stream);
        c->driver.context_set(c->before);
        c->driver.context_release(c->device);
    }
    psoup__driver_close(&c->driver);
    psoup__free(c->context, c);
}

/* ---- meeting ---------------------------------------------------------------------------------------------- */

/* Rank 0 makes the name by which NCCL's ranks find each other; all of them go there. */
static psoup_status meet(nccl *c, psoup_error *error) {
    psoup__nccl_config config = PSOUP__NCCL_CONFIG;
    struct {
        psoup__nccl_id id;
        int result;
    } name = {.result = PSOUP__NCCL_SUCCESS};
    psoup_status status = PSOUP_OK;
    if (c->host->rank == 0)
        name.result = c->lib.unique_id(&name.id);
    PSOUP__TRY(c->host->broadcast(c->host->user, &name, sizeof name, error));
    if (name.result != PSOUP__NCCL_SUCCESS)
        return psoup__fail(error, PSOUP_ERROR_IO, "NCCL: %s", c->lib.error_string(name.result));
    PSOUP__TRY(enter(c, error));
    int result = c->lib.init(&c->ranks, c->host->world, name.id, c->host->rank, &config);
    status = finish_call(c, result, error);
    c->driver.context_set(c->before);
fail:
    return status;
}

/* Only where all ranks can; else all return one status: UNSUPPORTED, or what is worse. *agreed: all know it. */
static psoup_status all_ready(const psoup_comm *host, psoup_status own, bool *agreed, psoup_error *error) {
    enum { STATUSES = PSOUP_ERROR_CANCELLED + 1 };
    double ranks[STATUSES] = {0}; /* that have each status */
    psoup_error trouble = {0};
    psoup_status worst = PSOUP_OK;
    ranks[own] = 1.0;
    psoup_status status = host->sum(host->user, ranks, STATUSES, PSOUP_F64, &trouble);
    *agreed = status == PSOUP_OK;
    if (status != PSOUP_OK)
        return own != PSOUP_OK ? own : psoup__fail(error, status, "%s", trouble.message);
    for (int s = 1; s < STATUSES; s++)
        if (ranks[s] > 0.0 && (worst == PSOUP_OK || worst == PSOUP_ERROR_UNSUPPORTED))
            worst = (psoup_status)s;
    if (own == worst)
        return own;
    return psoup__fail(error, worst, worst == PSOUP_ERROR_UNSUPPORTED ? "%.0f of %d ranks have no NCCL"
                                                                      : "%.0f of %d ranks cannot begin with NCCL: %s",
                       ranks[worst], host->world, psoup_status_name(worst));
}

/* What a rank needs of its own, before the others are asked; *out may be made where this fails. */
static psoup_status open_all(psoup_context *context, const psoup_comm *host, psoup_comm **comm, nccl **out,
                             psoup_error *error) {
    if (!context || !comm)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_nccl_create: context or out is NULL");
    if (context->gpu < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_nccl_create: the context is the CPU's");
    nccl *c = *out = psoup__alloc(context, 1, sizeof *c, error);
    if (!c)
        return PSOUP_ERROR_MEMORY;
    c->context = context;
    c->host = host;
    c->comm = (psoup_comm){.size = sizeof c->comm, .user = c, .rank = host->rank, .world = host->world,
                           .sum = nccl_sum, .sum_device = nccl_sum_device, .broadcast = nccl_broadcast,
                           .failed = nccl_failed, .abort = nccl_abort, .free = nccl_free};
    psoup_status status = open_library(&c->lib, error);
    return status == PSOUP_OK ? open_device(c, error) : status;
}

psoup_status psoup_comm_nccl_create(psoup_context *context, const psoup_comm *host, psoup_comm **out,
                                    psoup_error *error) {
    psoup_error trouble = {0};
    psoup_status status;
    nccl *c = NULL;
    bool agreed;
    if (out)
        *out = NULL;
    if (!host)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_nccl_create: host is NULL");
    status = open_all(context, host, out, &c, &trouble);
    status = all_ready(host, status, &agreed, &trouble);
    if (status == PSOUP_OK) {
        agreed = false;
        status = meet(c, &trouble);
    }
    if (status == PSOUP_OK) {
        *out = &c->comm;
        return PSOUP_OK;
    }
    if (c && !agreed)
        give_up(c, status, &trouble);
    if (c)
        nccl_free(c);
    return psoup__fail(error, status, "%s", trouble.message);
}
