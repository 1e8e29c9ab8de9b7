/* What memory the system could give this program now: of the machine's, and of the control groups that it is in (as those
 * of a container or of a Slurm job), which may have less. Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst
 * of Linux name the files. */
#include "room.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The value of a line "NAME VALUE …"; without a name, of the whole file. −1: it is not there or is no number ("max"). */
static int64_t value_of(const char *path, const char *name) {
    char line[256];
    long long value = -1;
    size_t n = strlen(name);
    FILE *file = fopen(path, "r");
    while (file && value < 0 && fgets(line, sizeof line, file))
        if (!strncmp(line, name, n) && sscanf(line + n, "%lld", &value) != 1)
            value = -1;
    if (file)
        fclose(file);
    return value;
}

/* How a version of control groups names what it counts. */
typedef struct naming {
    const char *where, *limit, *used, *inactive, *active;
} naming;
static const naming v1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                          "total_inactive_file ", "total_active_file "};
static const naming v2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ", "active_file "};

/* What a group has left; files it only keeps in memory are no loss to it. −1: it has no limit. */
static int64_t group_room(const char *group /* with a '/' at its end */, const naming *names) {
    char path[4096 + 64];
    const char *const stats[] = {names->inactive, names->active};
    snprintf(path, sizeof path, "%s%s", group, names->limit);
    int64_t limit = value_of(path, "");
    snprintf(path, sizeof path, "%s%s", group, names->used);
    int64_t used = limit < 0 ? -1 : value_of(path, "");
    if (used < 0)
        return -1;
    snprintf(path, sizeof path, "%smemory.stat", group);
    for (int i = 0; i < 2; i++) {
        int64_t files = value_of(path, stats[i]);
        used -= files > 0 ? files : 0;
    }
    used = used > 0 ? used : 0;
    return limit > used ? limit - used : 0;
}

/* The least of a group and all above it. Inside a container those that cannot be seen are passed over. */
static int64_t groups_room(const char *root, const naming *names, const char *path) {
    char group[4096];
    int64_t least = -1;
    int n = snprintf(group, sizeof group, "%s%s%s/", root, names->where, strcmp(path, "/") ? path : "");
    size_t top = strlen(root) + strlen(names->where);
    if (n < 0 || (size_t)n >= sizeof group)
        return -1;
    for (char *end = group + n - 1; end >= group + top; end--) {
        if (*end != '/')
            continue;
        end[1] = 0;
        int64_t room = group_room(group, names);
        least = room >= 0 && (least < 0 || room < least) ? room : least;
    }
    return least;
}

int64_t room_for_program(const char *root, bool *grouped) {
    char path[4096], line[4096];
    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    int64_t kib = value_of(path, "MemAvailable:"), least = kib < 0 ? -1 : kib * 1024;
    *grouped = false;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) { /* "4:cpu,memory:/job_7", "0::/job_7" */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group || group[1] != '/')
            continue;
        *group++ = 0;
        bool second = !*++controllers, memory = false;
        for (char *rest = controllers, *one; (one = strtok_r(rest, ",", &rest));)
            memory = memory || !strcmp(one, "memory");
        int64_t room = second || memory ? groups_room(root, second ? &v2 : &v1, group) : -1;
        if (room >= 0 && (least < 0 || room < least)) {
            least = room;
            *grouped = true;
        }
    }
    if (file)
        fclose(file);
    return least;
}
