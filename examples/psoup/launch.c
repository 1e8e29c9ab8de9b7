/* One run in several processes: who this one is, by what launched it, and how it reaches the others. The program
 * psoup-mpi is this one with MPI, which then is how they talk. */
#include "launch.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef PSOUP_MPI
#include "psoup/comm_mpi.h"
#endif

static psoup_comm_options who = PSOUP_COMM_OPTIONS_INIT;

int32_t launch_rank(void) { return who.rank; }
int32_t launch_world(void) { return who.world; }
int32_t launch_neighbours(void) { return who.local_world > 1 ? who.local_world : 1; }

#ifdef PSOUP_MPI
static bool by_mpi; /* MPI is initialised */

/* True where mpirun started more than this process. */
static bool look_at_mpi(void) {
    int rank, world, local_rank, local_world;
    MPI_Comm here;
    if (!by_mpi)
        MPI_Init(NULL, NULL);
    by_mpi = true;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (world == 1)
        return false;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_rank(here, &local_rank);
    MPI_Comm_size(here, &local_world);
    MPI_Comm_free(&here);
    who.rank = rank;
    who.world = world;
    who.local_rank = local_rank;
    who.local_world = local_world;
    return true;
}

/* Finalising waits for the others; one that is dead it would wait for without end. */
int launch_end(int status) {
    if (by_mpi) {
        alarm(30);
        MPI_Finalize();
        alarm(0);
    }
    return status;
}
#else
static bool look_at_mpi(void) { return false; }
int launch_end(int status) { return status; }
#endif

static const char *environment(void *user, const char *name) {
    (void)user;
    return getenv(name);
}

psoup_status launch_look(psoup_error *error) {
    if (look_at_mpi())
        return PSOUP_OK;
    return psoup_comm_launch(environment, NULL, &who, error);
}

/* Of the GPUs that CUDA_VISIBLE_DEVICES leaves, the one of this rank on its machine. */
const char *launch_device(const char *device, char out[LAUNCH_DEVICE]) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int count = 0;
    if (who.world == 1 || !device || strcmp(device, "cuda") != 0)
        return device;
    for (const char *c = visible; c && *c; c++)
        count += c == visible || c[-1] == ',';
    snprintf(out, LAUNCH_DEVICE, "cuda:%d", count ? who.local_rank % count : who.local_rank);
    return out;
}

/* The processors are shared with the other ranks of the machine, where the launcher has not shared them out. */
int32_t launch_threads(int32_t threads) {
    cpu_set_t set;
    long all = sysconf(_SC_NPROCESSORS_ONLN);
    if (threads != 0 || who.local_world < 2 || sched_getaffinity(0, sizeof set, &set) != 0 ||
        CPU_COUNT(&set) < all)
        return threads;
    return all > who.local_world ? (int32_t)(all / who.local_world) : 1;
}

psoup_status launch_connect(psoup_context *context, psoup_comm **out, psoup_error *error) {
    *out = NULL;
    if (who.world == 1)
        return PSOUP_OK;
#ifdef PSOUP_MPI
    int found = 0;
    if (by_mpi && MPI_Comm_size(MPI_COMM_WORLD, &found) == MPI_SUCCESS && found > 1)
        return psoup_comm_mpi_create(context, MPI_COMM_WORLD, out, error);
#endif
    return psoup_comm_tcp_create(context, &who, out, error);
}

psoup_status launch_join_gpus(cli_model *m, psoup_error *error) {
    psoup_comm *line = m->comm;
    psoup_status status = psoup_comm_nccl_create(m->context, line, &m->comm, error);
    m->line = status == PSOUP_OK ? line : NULL;
    if (status != PSOUP_OK)
        m->comm = line;
    if (status != PSOUP_ERROR_UNSUPPORTED)
        return status;
    cli_log(NULL, PSOUP_LOG_WARNING, error->message);
    cli_log(NULL, PSOUP_LOG_WARNING, "gradients go through the host's memory");
    return PSOUP_OK;
}

psoup_status launch_tell(const psoup_comm *comm, psoup_status status, const psoup_error *error) {
    if (comm && status != PSOUP_OK)
        comm->abort(comm->user, error->message);
    return status;
}

static bool agreed;
bool launch_agreed(void) { return agreed; }

/* The first rank that failed; the world where none did. */
static psoup_status find_failed(const psoup_comm *comm, bool failed, int32_t *first, psoup_error *error) {
    float *all = calloc((size_t)comm->world, sizeof *all);
    if (!all)
        return launch_tell(comm, cli_error(error, PSOUP_ERROR_MEMORY, "out of memory"), error);
    all[comm->rank] = failed;
    psoup_status status = comm->sum(comm->user, all, (size_t)comm->world, PSOUP_F32, error);
    for (*first = 0; *first < comm->world && all[*first] == 0;)
        ++*first;
    free(all);
    return status;
}

/* Its error to all: a sum in which the others have zeros. */
static psoup_status hear_of(const psoup_comm *comm, int32_t from, psoup_error *told, psoup_error *error) {
    enum { LENGTH = sizeof told->message };
    float text[1 + LENGTH] = {0};
    if (comm->rank == from) {
        text[0] = (float)told->status;
        for (size_t i = 0; i < LENGTH && told->message[i]; i++)
            text[1 + i] = (unsigned char)told->message[i];
    }
    psoup_status status = comm->sum(comm->user, text, 1 + LENGTH, PSOUP_F32, error);
    if (status != PSOUP_OK)
        return status;
    psoup_error heard = {.status = (psoup_status)text[0]};
    for (size_t i = 0; i + 1 < LENGTH; i++)
        heard.message[i] = (char)(unsigned char)text[1 + i];
    if (from > 0)
        cli_error(told, heard.status, "rank %d: %s", from, heard.message);
    else
        *told = heard;
    return PSOUP_OK;
}

psoup_status launch_agree(const psoup_comm *comm, psoup_status status, psoup_error *error) {
    psoup_error own = *error, trouble;
    int32_t first = 0;
    if (!comm)
        return status;
    own.status = error->status = status;
    psoup_status heard = find_failed(comm, status != PSOUP_OK, &first, &trouble);
    if (heard == PSOUP_OK && first == comm->world)
        return PSOUP_OK;
    if (heard == PSOUP_OK)
        heard = hear_of(comm, first, &own, &trouble);
    agreed = heard == PSOUP_OK;
    if (agreed || status == PSOUP_OK)
        *error = agreed ? own : trouble;
    return error->status;
}

psoup_status launch_finish(const psoup_comm *comm, psoup_status status, psoup_error *error) {
    char done = 1;
    if (comm && status == PSOUP_OK)
        return comm->broadcast(comm->user, &done, 1, error);
    return agreed ? status : launch_tell(comm, status, error);
}
