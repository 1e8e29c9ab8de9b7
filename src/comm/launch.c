/* Who a process is among many, by the variables of what launched it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"
#include "psoup/comm.h"

typedef struct environment {
    psoup_variable_fn variable;
    void *user;
    psoup_error *error;
} environment;

static const char *get(const environment *e, const char *name) {
    const char *value = e->variable(e->user, name);
    return value && *value ? value : NULL;
}

/* A whole number from low to high; *out stays as it is where the variable is not there. */
static psoup_status number(const environment *e, const char *name, int32_t low, int32_t high, int32_t *out) {
    const char *text = get(e, name);
    char *end = NULL;
    if (!text)
        return PSOUP_OK;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (errno || end == text || *end || value < low || value > high)
        return psoup__fail(e->error, PSOUP_ERROR_ARGUMENT,
                           "%s is \"%.100s\": expected a whole number from %d to %d", name, text, low, high);
    *out = (int32_t)value;
    return PSOUP_OK;
}

/* The variables of one launcher; names that it has not are NULL. */
typedef struct launcher {
    const char *rank, *world, *local_rank, *local_world;
} launcher;

static psoup_status read_ranks(const environment *e, const launcher *l, psoup_comm_options *out) {
    psoup_status status = PSOUP_OK;
    if (!get(e, l->world))
        return psoup__fail(e->error, PSOUP_ERROR_ARGUMENT, "%s is set and %s is not: expected both", l->rank,
                           l->world);
    PSOUP__TRY(number(e, l->world, 1, INT32_MAX, &out->world));
    PSOUP__TRY(number(e, l->rank, 0, out->world - 1, &out->rank));
    PSOUP__TRY(number(e, l->local_rank, 0, out->world - 1, &out->local_rank));
    if (l->local_world)
        PSOUP__TRY(number(e, l->local_world, 1, out->world, &out->local_world));
fail:
    return status;
}

static psoup_status set_address(const environment *e, const char *text, size_t length,
                                psoup_comm_options *out) {
    if (length == 0 || length >= sizeof out->address)
        return psoup__fail(e->error, PSOUP_ERROR_ARGUMENT, "the address of rank 0, \"%.100s\", has %zu bytes: "
                           "expected 1 to %zu", text, length, sizeof out->address - 1);
    memcpy(out->address, text, length);
    out->address[length] = '\0';
    return PSOUP_OK;
}

/* The first host of Slurm's "node[003-010,12],other": node003. */
static psoup_status first_host(const environment *e, const char *list, psoup_comm_options *out) {
    size_t stem = strcspn(list, "[,");
    psoup_status status = PSOUP_OK;
    if (list[stem] != '[')
        return set_address(e, list, stem, out);
    const char *inside = list + stem + 1;
    size_t digits = strcspn(inside, "-,]");
    const char *close = strchr(inside, ']');
    size_t tail = close ? strcspn(close + 1, ",[") : 0;
    if (!close || digits == 0)
        return psoup__fail(e->error, PSOUP_ERROR_ARGUMENT, "Slurm's list of nodes, \"%.100s\", has no first one",
                           list);
    char *host = malloc(stem + digits + tail + 1);
    if (!host)
        return psoup__out_of_memory(e->error, stem + digits + tail + 1);
    memcpy(host, list, stem);
    memcpy(host + stem, inside, digits);
    memcpy(host + stem + digits, close + 1, tail);
    status = set_address(e, host, stem + digits + tail, out);
    free(host);
    return status;
}

/* "4(x2),3": how many tasks the machines have; taken where all have as many, which a list of one item says. */
static void tasks_of_node(const char *text, psoup_comm_options *out) {
    char *end;
    long tasks = text && !strchr(text, ',') ? strtol(text, &end, 10) : 0;
    if (tasks > 0 && tasks <= out->world)
        out->local_world = (int32_t)tasks;
}

static psoup_status slurm(const environment *e, psoup_comm_options *out) {
    static const launcher names = {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", NULL};
    psoup_status status = PSOUP_OK;
    int32_t job = 0, step = 0;
    PSOUP__TRY(read_ranks(e, &names, out));
    PSOUP__TRY(number(e, "SLURM_JOB_ID", 0, INT32_MAX, &job));
    PSOUP__TRY(number(e, "SLURM_STEP_ID", 0, INT32_MAX, &step));
    out->port = 10000 + (int32_t)(((int64_t)job + 97 * (int64_t)step) % 20000);
    tasks_of_node(get(e, "SLURM_STEP_TASKS_PER_NODE"), out);
    const char *nodes = get(e, "SLURM_STEP_NODELIST");
    nodes = nodes ? nodes : get(e, "SLURM_JOB_NODELIST");
    const char *launched = get(e, "SLURM_LAUNCH_NODE_IPADDR");
    if (nodes)
        PSOUP__TRY(first_host(e, nodes, out));
    else if (launched)
        PSOUP__TRY(set_address(e, launched, strlen(launched), out));
fail:
    return status;
}

static psoup_status mpirun(const environment *e, const launcher *names, psoup_comm_options *out) {
    psoup_status status = read_ranks(e, names, out);
    if (status == PSOUP_OK && out->local_world == out->world)
        strcpy(out->address, "127.0.0.1");
    return status;
}

static psoup_status torchrun(const environment *e, psoup_comm_options *out) {
    static const launcher names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};
    return read_ranks(e, &names, out);
}

psoup_status psoup_comm_launch(psoup_variable_fn variable, void *user, psoup_comm_options *out,
                               psoup_error *error) {
    static const launcher open_mpi = {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                                      "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"};
    static const launcher mpich = {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"};
    psoup_status status = PSOUP_OK;
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    if (!variable || !out || out->size != sizeof(*out))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_comm_launch: variable or out is NULL, or out->size is not set");
    const environment e = {variable, user, error};
    bool step = get(&e, "SLURM_STEP_ID") || get(&e, "SLURM_LAUNCH_NODE_IPADDR");
    if (get(&e, "RANK"))
        PSOUP__TRY(torchrun(&e, &o));
    else if (get(&e, "SLURM_PROCID") && get(&e, "SLURM_NTASKS") && step)
        PSOUP__TRY(slurm(&e, &o));
    else if (get(&e, open_mpi.rank))
        PSOUP__TRY(mpirun(&e, &open_mpi, &o));
    else if (get(&e, mpich.rank))
        PSOUP__TRY(mpirun(&e, &mpich, &o));
    const char *address = get(&e, "MASTER_ADDR"), *agent = get(&e, "TORCHELASTIC_USE_AGENT_STORE");
    if (address)
        PSOUP__TRY(set_address(&e, address, strlen(address), &o));
    PSOUP__TRY(number(&e, "MASTER_PORT", 1, 65534, &o.port));
    if (agent && strcmp(agent, "True") == 0)
        o.port++;
    if (o.world > 1 && !o.address[0])
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                             "rank %d of %d does not know where rank 0 is: MASTER_ADDR is not set", o.rank,
                             o.world);
    if (status == PSOUP_OK)
        *out = o;
fail:
    return status;
}
