/* The simulated machine itself: what a kill keeps, and what a power loss may leave, all of it, by
 * exhaustion. A simulator that is too kind finds nothing; one that is too cruel finds what cannot
 * be. */
#include "../unit/unit.h"

#include "machine.h"
#include "rt/io.h"
#include "rt/task.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#define TRUE_HERE(cond)                                                                            \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: %s is not so\n", __FILE__, __LINE__, #cond);                   \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static struct machine m;

static uint8_t a_sector[SIM_SECTOR] __attribute__((aligned(SIM_SECTOR)));

static int write_sector(int fd, uint64_t number, uint8_t value, int flags)
{
    memset(a_sector, value, sizeof a_sector);
    return io_pwrite_full(fd, a_sector, sizeof a_sector, number * SIM_SECTOR, flags);
}

/* The first bytes of the first sectors of PATH, as text; "-": no such file. */
static const char *now(const char *path)
{
    static char text[64];
    uint64_t size;
    uint8_t *bytes = machine_dump(&m, path, &size);
    size_t n = 0;
    if (!bytes)
        return "-";
    for (uint64_t at = 0; at < size; at += SIM_SECTOR) {
        for (uint64_t i = at; i < min_u64(size, at + SIM_SECTOR); i++)
            TRUE_HERE(bytes[i] == bytes[at]); /* a sector is whole */
        text[n++] = bytes[at] ? (char)bytes[at] : '.';
    }
    text[n] = '\0';
    free(bytes);
    return text;
}

/* All that can be left of PATH after MAIN's life (killed at KILL_AT, 0: not) and, with POWER, a
 * loss of power: sorted, once each. */
static const char *all(const char *path, task_fn *main, uint64_t kill_at, bool power)
{
    static char text[64 * 65];
    char seen[64][64];
    size_t n = 0;
    struct choices c = {.exhaustive = true};
    do {
        machine_init(&m, 1);
        m.choices = c;
        (void)!machine_live(&m, kill_at, main, NULL);
        if (power)
            machine_lose_power(&m);
        const char *one = now(path);
        size_t at = 0;
        while (at < n && strcmp(seen[at], one) < 0)
            at++;
        if (at == n || strcmp(seen[at], one)) {
            TRUE_HERE(n < 64);
            memmove(seen[at + 1], seen[at], (n - at) * sizeof seen[0]);
            snprintf(seen[at], sizeof seen[at], "%s", one);
            n++;
        }
        c = m.choices;
        m.choices = (struct choices){0};
        machine_fini(&m);
    } while (choices_next(&c));
    choices_fini(&c);
    text[0] = '\0';
    for (size_t i = 0; i < n; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", i ? " " : "", seen[i]);
    return text;
}

static int make_file(const char *path)
{
    int fd = io_open(path, O_RDWR | O_CREAT, 0600);
    TRUE_HERE(fd >= 0);
    TRUE_HERE(write_sector(fd, 0, 'a', 0) == 0 && write_sector(fd, 1, 'b', 0) == 0);
    TRUE_HERE(io_fsync(fd) == 0 && io_sync_dir_of(path) == 0);
    return fd;
}

static int writes_two(void *arg)
{
    int fd = make_file("/d/f");
    TRUE_HERE(write_sector(fd, 0, 'A', 0) == 0 && write_sector(fd, 1, 'B', 0) == 0);
    machine_kill(&m);
    return 0;
}

static int writes_twice(void *arg)
{
    int fd = make_file("/d/f");
    TRUE_HERE(write_sector(fd, 0, 'x', 0) == 0 && write_sector(fd, 0, 'y', 0) == 0);
    TRUE_HERE(write_sector(fd, 1, 'z', RWF_DSYNC) == 0);
    return 0;
}

static void a_kill_keeps_the_page_cache_a_power_loss_any_of_it(void **state)
{
    assert_string_equal(all("/d/f", writes_two, 0, false), "AB");
    assert_string_equal(all("/d/f", writes_two, 0, true), "AB Ab aB ab");
    assert_string_equal(all("/d/f", writes_twice, 0, true), "az xz yz");
}

static int one_long_write(void *arg)
{
    uint8_t buf[2 * SIM_SECTOR];
    int fd = make_file("/d/f");
    memset(buf, 'W', sizeof buf);
    m.kill_at = m.events + 1; /* by its submission */
    (void)!io_pwrite_full(fd, buf, sizeof buf, 0, 0);
    TRUE_HERE(false);
    return 0;
}

static void what_is_in_flight_lands_sector_by_sector(void **state)
{
    assert_string_equal(all("/d/f", one_long_write, 0, false), "WW Wb aW ab");
    assert_string_equal(all("/d/f", one_long_write, 0, true), "WW Wb aW ab");
}

static int grows(void *arg)
{
    int fd = make_file("/d/f");
    TRUE_HERE(write_sector(fd, 2, 'c', 0) == 0 && write_sector(fd, 3, 'd', 0) == 0);
    return 0;
}

static int shrinks_and_grows(void *arg)
{
    int fd = make_file("/d/f");
    TRUE_HERE(io_ftruncate(fd, SIM_SECTOR) == 0 && io_ftruncate(fd, 2 * SIM_SECTOR) == 0);
    return 0;
}

static void a_size_is_a_beginning_of_its_changes(void **state)
{
    assert_string_equal(all("/d/f", grows, 0, true), "ab ab. ab.. ab.d abc abc. abcd");
    assert_string_equal(all("/d/f", shrinks_and_grows, 0, true), "a a. ab");
}

static int fails_to_sync(void *arg)
{
    int fd = make_file("/d/f");
    TRUE_HERE(write_sector(fd, 0, 'A', 0) == 0);
    m.faults.sync = 10000;
    TRUE_HERE(io_fdatasync(fd) == -EIO);
    m.faults.sync = 0;
    TRUE_HERE(write_sector(fd, 1, 'B', 0) == 0);
    TRUE_HERE(io_fdatasync(fd) == 0); /* and says that all is well */
    return 0;
}

static void a_failed_sync_is_not_made_good_by_the_next(void **state)
{
    assert_string_equal(all("/d/f", fails_to_sync, 0, false),
                        "AB aB"); /* the page may be dropped */
    assert_string_equal(all("/d/f", fails_to_sync, 0, true), "AB aB");
}

static int replaces(void *arg)
{
    make_file("/d/f");
    int fd = io_open("/d/new", O_RDWR | O_CREAT | O_EXCL, 0600);
    TRUE_HERE(write_sector(fd, 0, 'n', 0) == 0 && io_fsync(fd) == 0);
    TRUE_HERE(io_rename("/d/new", "/d/f") == 0);
    TRUE_HERE(io_open("/d/new", O_RDONLY, 0) == -ENOENT);
    if (arg)
        TRUE_HERE(io_sync_dir_of("/d/f") == 0);
    return 0;
}

static int replaces_and_syncs(void *arg)
{
    return replaces(&m);
}

static int makes_and_removes(void *arg)
{
    int fd = make_file("/d/f");
    TRUE_HERE(io_link("/d/f", "/d/g") == 0 && io_unlink("/d/f") == 0);
    TRUE_HERE(io_open("/d/f", O_RDONLY, 0) == -ENOENT && io_pread(fd, a_sector, 1, 0) == 1);
    return 0;
}

static void a_name_is_durable_when_its_directory_is_synced(void **state)
{
    assert_string_equal(all("/d/f", replaces, 0, false), "n");
    assert_string_equal(all("/d/f", replaces, 0, true), "ab n");
    assert_string_equal(all("/d/new", replaces, 0, true), "- n"); /* made, not yet renamed */
    assert_string_equal(all("/d/f", replaces_and_syncs, 0, true), "n");
    assert_string_equal(all("/d/new", replaces_and_syncs, 0, true), "-");
    assert_string_equal(all("/d/f", makes_and_removes, 0, true), "- ab");
    assert_string_equal(all("/d/g", makes_and_removes, 0, true), "- ab");
}

/* ---- what a boot has ---- */

static uint8_t boot[BOOT_ID_BYTES];
static int segment_result;

static int makes_a_segment(void *arg)
{
    void *at;
    struct statfs fs;
    int fd = io_open("/run/segment", O_RDWR | O_CREAT | O_EXCL, 0600);
    TRUE_HERE(fd >= 0 && io_map(fd, 8192, &at) < 0); /* nothing is reserved */
    TRUE_HERE(io_fallocate(fd, 0, 0, 8192) == 0 && io_map(fd, 8192, &at) == 0);
    TRUE_HERE(io_fstatfs(fd, &fs) == 0 && fs.f_type == 0x01021994);
    strcpy((char *)at + 5000, "tide");
    TRUE_HERE(io_boot_id(boot) == 0);
    TRUE_HERE(io_lock(fd, F_WRLCK, 0, 0) == 0);
    int other = io_open("/run/segment", O_RDWR, 0);
    TRUE_HERE(io_lock(other, F_WRLCK, 100, 1) == -EAGAIN &&
              io_lock_test(other, F_RDLCK, 0, 1) == 1);
    machine_kill(&m);
    return 0;
}

static int finds_a_segment(void *arg)
{
    void *at;
    uint8_t id[BOOT_ID_BYTES];
    uint64_t since;
    TRUE_HERE(io_boot_id(id) == 0 && io_boot_us(&since) == 0 && since < clock_wall_us());
    int fd = io_open("/run/segment", O_RDWR, 0);
    if (fd < 0) {
        TRUE_HERE(memcmp(id, boot, sizeof id) != 0);
        segment_result = fd;
        return 0;
    }
    TRUE_HERE(!memcmp(id, boot, sizeof id));
    TRUE_HERE(io_lock(fd, F_WRLCK, 0, 0) == 0); /* the killed one's went with it */
    TRUE_HERE(io_map(fd, 8192, &at) == 0);
    segment_result = strcmp((char *)at + 5000, "tide");
    io_unmap(at, 8192);
    io_close(fd);
    return 0;
}

static void a_mapped_segment_outlives_the_program_but_not_the_power(void **state)
{
    machine_init(&m, 3);
    assert_int_equal(machine_live(&m, 0, makes_a_segment, NULL), -EOWNERDEAD);
    assert_int_equal(machine_live(&m, 0, finds_a_segment, NULL), 0);
    assert_int_equal(segment_result, 0);
    machine_lose_power(&m);
    assert_int_equal(machine_live(&m, 0, finds_a_segment, NULL), 0);
    assert_int_equal(segment_result, -ENOENT);
    machine_fini(&m);
}

static int fills_the_disk(void *arg)
{
    struct statx before, after;
    int fd = make_file("/d/f");
    TRUE_HERE(io_fstatx(fd, &before) == 0 && before.stx_btime.tv_sec > 0);
    TRUE_HERE(sleep_until(clock_after_ns(NSEC_PER_SEC)) == 0);
    m.store.free_blocks = 2;
    TRUE_HERE(io_fallocate(fd, 0, SIM_BLOCK, SIM_BLOCK) == 0);
    TRUE_HERE(write_sector(fd, 8, 'x', 0) == 0); /* there is its block */
    TRUE_HERE(write_sector(fd, 16, 'x', 0) == 0);
    TRUE_HERE(write_sector(fd, 24, 'x', 0) == -ENOSPC && write_sector(fd, 1, 'x', 0) == 0);
    TRUE_HERE(io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 4096) == 0);
    TRUE_HERE(write_sector(fd, 24, 'x', 0) == 0);
    TRUE_HERE(io_seek(fd, 8192, SEEK_DATA) == 12288 && io_seek(fd, 0, SEEK_HOLE) == 8192);
    struct range data[2];
    TRUE_HERE(io_data(fd, range_make(512, 16384), data, 2) == 2 && data[0].start == 512 &&
              range_end(data[0]) == 8192 && data[1].start == 12288 && data[1].length == 512);
    TRUE_HERE(io_data(fd, range_make(512, 16384), data, 1) == 1 &&
              io_data(fd, range_make(8192, 4096), data, 2) == 0);
    TRUE_HERE(io_fstatx(fd, &after) == 0 && after.stx_mtime.tv_sec > before.stx_mtime.tv_sec &&
              after.stx_btime.tv_sec == before.stx_btime.tv_sec &&
              after.stx_mtime.tv_nsec % 4000000 == 0);
    int direct = io_open("/d/f", O_RDWR | O_DIRECT, 0);
    TRUE_HERE(io_pread(direct, a_sector, 100, 0) == -EINVAL);
    TRUE_HERE(io_pread(direct, a_sector, SIM_SECTOR, SIM_SECTOR) == SIM_SECTOR);
    TRUE_HERE(a_sector[0] == 'x');
    return 0;
}

static void blocks_and_times_are_counted(void **state)
{
    machine_init(&m, 4);
    assert_int_equal(machine_live(&m, 0, fills_the_disk, NULL), 0);
    machine_fini(&m);
}

/* ---- a life's memory ---- */

static void *kept[100];

static int allocates(void *arg)
{
    for (int i = 0; i < 100; i++) {
        kept[i] = malloc((size_t)1 << i % 20);
        memset(kept[i], i, (size_t)1 << i % 20);
        if (i % 3 == 0)
            free(kept[i]);
        else
            kept[i] = realloc(kept[i], (size_t)3 << i % 19);
    }
    void *aligned = NULL;
    TRUE_HERE(posix_memalign(&aligned, 4096, 10000) == 0 && !((uintptr_t)aligned & 4095));
    memset(aligned, 1, 10000);
    free(aligned);
    if (arg)
        machine_kill(&m);
    return 0;
}

static void a_life_takes_its_memory_with_it(void **state)
{
    machine_init(&m, 5);
    for (int i = 0; i < 200; i++)
        assert_int_equal(machine_live(&m, 0, allocates, i % 2 ? &m : NULL),
                         i % 2 ? -EOWNERDEAD : 0);
    machine_fini(&m);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_kill_keeps_the_page_cache_a_power_loss_any_of_it),
    cmocka_unit_test(what_is_in_flight_lands_sector_by_sector),
    cmocka_unit_test(a_size_is_a_beginning_of_its_changes),
    cmocka_unit_test(a_failed_sync_is_not_made_good_by_the_next),
    cmocka_unit_test(a_name_is_durable_when_its_directory_is_synced),
    cmocka_unit_test(a_mapped_segment_outlives_the_program_but_not_the_power),
    cmocka_unit_test(blocks_and_times_are_counted),
    cmocka_unit_test(a_life_takes_its_memory_with_it),
};
UNIT_MAIN(tests)
