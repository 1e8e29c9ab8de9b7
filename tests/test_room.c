/* What memory there is for a program, in a machine and in control groups of both versions: read from files made up here. */
#include "../examples/psoup/room.h"
#include "base_case.h"

#include <sys/stat.h>

enum { KIB = 1024 };

static void make_all(char *path) {
    for (char *at = path + strlen(folder) + 1; (at = strchr(at, '/')); *at++ = '/') {
        *at = 0;
        mkdir(path, 0777);
    }
}

/* A file below the test's directory, and the directories it is in. */
static void write_text(const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    make_all(path);
    put(path, text, strlen(text));
}

static void group(const char *place, const char *limit, const char *used, const char *stat, bool second) {
    char name[256];
    snprintf(name, sizeof name, "sys/fs/cgroup/%s/%s", place, second ? "memory.max" : "memory.limit_in_bytes");
    write_text(name, limit);
    snprintf(name, sizeof name, "sys/fs/cgroup/%s/%s", place, second ? "memory.current" : "memory.usage_in_bytes");
    write_text(name, used);
    snprintf(name, sizeof name, "sys/fs/cgroup/%s/memory.stat", place);
    write_text(name, stat);
}

static void machine(const char *groups) {
    write_text("proc/meminfo", "MemTotal:        8000 kB\nMemFree:          900 kB\nMemAvailable:    4000 kB\nSwapFree: 7 kB\n");
    if (groups)
        write_text("proc/self/cgroup", groups);
}

static void expect(int64_t bytes, bool in_group) {
    bool grouped = !in_group;
    ck_assert_int_eq(room_for_program(folder, &grouped), bytes);
    ck_assert_int_eq(grouped, in_group);
}

static void clear_up(void) {
    char command[512];
    snprintf(command, sizeof command, "rm -rf '%s'/*", folder);
    ck_assert_int_eq(system(command), 0);
    tear_down();
}

START_TEST(a_machine) {
    expect(-1, false);
    machine(NULL);
    expect(4000 * KIB, false);
    machine("0::/\n");
    expect(4000 * KIB, false); /* the root has no limit */
}
END_TEST

START_TEST(a_group_of_the_second_version) {
    machine("0::/job/step\n");
    group("job/step", "max\n", "1000000\n", "anon 5\n", true);
    expect(4000 * KIB, false);
    group("job", "3000000\n", "1000000\n", "anon 300000\nfile 9\ninactive_file 200000\nactive_file 50000\n", true);
    expect(3000000 - 750000, true); /* what lies above limits too; read files make way */
    group("job/step", "1500000\n", "1400000\n", "inactive_file 0\nactive_file 0\n", true);
    expect(100000, true);
    group("job/step", "1500000\n", "1600000\n", "", true);
    expect(0, true); /* lowered below what is in use */
    group("job/step", "99999999999\n", "0\n", "", true);
    group("job", "99999999999\n", "0\n", "", true);
    expect(4000 * KIB, false);
}
END_TEST

START_TEST(a_group_of_the_first_version) {
    machine("9:name=systemd:/\n4:cpu,memory:/docker/a:b\n1:cpuset:/\n0::/\n");
    group("memory", "9223372036854771712\n", "5000000\n", "", false);
    expect(4000 * KIB, false);
    group("memory/docker/a:b", "2000000\n", "1500000\n", "inactive_file 7\ntotal_inactive_file 400000\n", false);
    expect(2000000 - 1100000, true);
}
END_TEST

/* In a container the path may be the host's, and the files those of the container alone. */
START_TEST(a_container) {
    machine("0::/kubepods/pod12\n");
    group(".", "1000000\n", "900000\n", "active_file 100000\n", true);
    expect(200000, true);
    machine("4:memory:/docker/12\n");
    group("memory", "600000\n", "500000\n", "", false);
    expect(100000, true);
}
END_TEST

START_TEST(odd_files) {
    machine("\n0\n0:\n0::\n0::relative\n:memory:/x\n7:memorable:/y\n");
    group("memory/y", "1\n", "1\n", "", false);
    expect(4000 * KIB, false);
    char lines[9000];
    memset(lines, 'a', sizeof lines);
    memcpy(lines, "0::/", 4);
    lines[sizeof lines - 1] = 0;
    machine(lines);
    expect(4000 * KIB, false);
    machine("0::/z\n");
    group("z", "123x\n", "what\n", "", true);
    expect(4000 * KIB, false);
}
END_TEST

int main(void) {
    Suite *s = suite_create("room");
    TCase *c = tcase_create("room");
    suite_add_tcase(s, c);
    tcase_add_checked_fixture(c, set_up, clear_up);
    tcase_add_test(c, a_machine);
    tcase_add_test(c, a_group_of_the_second_version);
    tcase_add_test(c, a_group_of_the_first_version);
    tcase_add_test(c, a_container);
    tcase_add_test(c, odd_files);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed > 0;
}
