/* Checkpoints of a kept disk on a simulated machine: each reason in the machine's time, to the
 * millisecond; what a power loss then adds; and small histories, cut anywhere, in which regions
 * leave all the time. */
#include "../unit/unit.h"

#include "base/log.h"
#include "block/block.h"
#include "copy/copy.h"
#include "dirty/dirty.h"
#include "job/transaction.h"
#include "machine.h"
#include "persist/persist.h"
#include "rt/io.h"
#include "rt/task.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#define TRUE_HERE(cond)                                                                            \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: seed %llu: %s is not so\n", __FILE__, __LINE__,                \
                    (unsigned long long)seed, #cond);                                              \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

enum { GRANULE = 512, MS = 1000000 };
#define SECOND (1000ull * MS)

static struct machine m;
static uint64_t seed;

/* ---- a life with one disk ---- */

static struct {
    const char *options; /* of x-tidemark-persist, JSON */
    unsigned region_bits, slots;
    uint64_t size;
    uint64_t idle_ns, period_ns, rest_ns; /* with short_times: instead of what options say */
    bool short_times;
    void (*body)(void);
    struct graph *g;
    struct node *n;
    struct edge *e;
    struct user user;
} now;

static char *describe(struct user *u)
{
    return xstrdup("guest");
}

static void ignore_edge(struct user *u, struct edge *e)
{
}

static const struct user_ops user_ops = {describe, ignore_edge, ignore_edge};

static void make_image(void)
{
    int fd = io_open("/d/a.raw", O_RDWR | O_CREAT, 0600);
    TRUE_HERE(fd >= 0 && io_ftruncate(fd, now.size) == 0 && io_fsync(fd) == 0);
    TRUE_HERE(io_sync_dir_of("/d/a.raw") == 0);
    io_close(fd);
}

/* WHAT: "add" or "remove". */
static void do_bitmap(const char *what, const char *name)
{
    struct error err = ERROR_INIT;
    struct jobs *js = jobs_new(now.g);
    char command[40], text[100];

    snprintf(command, sizeof command, "block-dirty-bitmap-%s", what);
    snprintf(text, sizeof text, "{\"node\":\"d\",\"name\":\"%s\"%s}", name,
             strcmp(what, "add") ? "" : ",\"persistent\":true,\"granularity\":512");
    TRUE_HERE(transaction_run_one(now.g, js, command, json_tokener_parse(text), &err) == 0);
    jobs_free(js);
}

static int live(void *arg)
{
    struct error err = ERROR_INIT;
    char json[400];
    struct stat st;

    now.g = graph_new();
    dirty_init(now.g);
    persist_init(now.g);
    copy_register_drivers(now.g);
    persist_set_limits(now.g, now.region_bits, now.slots, now.slots);
    if (now.short_times)
        persist_set_checkpoints(now.g, now.idle_ns, now.period_ns, now.rest_ns);
    bool new = io_stat("/d/a.raw", &st) == -ENOENT;
    if (new)
        make_image();
    snprintf(json, sizeof json,
             "{\"driver\":\"raw\",\"node-name\":\"d\",\"x-tidemark-persist\":{%s},"
             "\"file\":{\"driver\":\"file\",\"filename\":\"/d/a.raw\"}}",
             now.options);
    CLEANUP(json_putp) struct json_object *o = json_tokener_parse(json);
    TRUE_HERE(o && graph_open(now.g, o, &now.n, &err) == 0);
    now.user = (struct user){&user_ops};
    TRUE_HERE(edge_attach_user(&now.user, now.n, "root", PERM_CONSISTENT_READ | PERM_WRITE,
                               PERM_ALL, &now.e, &err) == 0);
    if (new)
        do_bitmap("add", "b");
    now.body();
    edge_detach(now.e);
    node_unref(now.n);
    graph_free(now.g);
    return 0;
}

static int one_life(void (*body)(void), uint64_t kill_at)
{
    now.body = body;
    int r = machine_live(&m, kill_at, live, NULL);
    TRUE_HERE(r == 0 || r == -EOWNERDEAD);
    return r;
}

static void begin(const char *options, unsigned slots)
{
    log_set_level(LOG_LEVEL_ERROR);
    memset(&now, 0, sizeof now);
    now.options = options;
    now.region_bits = 12;
    now.slots = slots;
    now.size = 256 * 4096;
    machine_init(&m, 1);
}

static int write_granule(uint64_t at)
{
    uint8_t buf[GRANULE];

    memset(buf, 1, sizeof buf);
    return edge_write(now.e, range_make(at, sizeof buf), buf, 0);
}

static void write_region(unsigned i)
{
    TRUE_HERE(write_granule((uint64_t)i << now.region_bits) == 0);
}

static void rest(uint64_t ns)
{
    TRUE_HERE(sleep_until(clock_after_ns(ns)) == 0);
}

static uint64_t count(const char *what)
{
    CLEANUP(json_putp) struct json_object *info = persist_hot_info(now.n);

    TRUE_HERE(info && json_has(info, what));
    return json_get_uint(info, what, 0);
}

static uint64_t dirty_bytes(void)
{
    return bitmap_count(dirty_bits(dirty_find(now.n, "b")));
}

/* ---- what is found after a power loss ---- */

static uint64_t expected_added, expected_dirty;

static void look(void)
{
    CLEANUP(json_putp) struct json_object *info = persist_info(now.n);

    TRUE_HERE(!strcmp(json_get_string(info, "state", ""), "superset"));
    TRUE_HERE(json_get_uint(info, "bytes-added", 1) == expected_added);
    TRUE_HERE(dirty_bytes() == expected_dirty);
}

static void power_fails_then(uint64_t added, uint64_t dirty)
{
    machine_lose_power(&m);
    expected_added = added;
    expected_dirty = dirty;
    one_life(look, 0);
    machine_fini(&m);
}

/* ---- idle ---- */

static void five_regions_and_rest(void)
{
    for (unsigned i = 0; i < 5; i++)
        write_region(i);
    rest(1900ull * MS);
    TRUE_HERE(count("hot") == 5 && count("idle-checkpoints") == 0);
    rest(200ull * MS);
    TRUE_HERE(count("hot") == 0 && count("left") == 5 && count("idle-checkpoints") == 1);
    /* There is nothing more to do, and no timer for it. */
    uint64_t commits = count("commits"), events = m.events;
    rest(3600 * SECOND);
    TRUE_HERE(count("commits") == commits && m.events == events);
    machine_kill(&m);
}

static void at_rest_a_power_loss_adds_nothing(void **state)
{
    begin("", 16);
    one_life(five_regions_and_rest, 0);
    power_fails_then(0, 5 * GRANULE);
}

static void five_regions_and_no_rest(void)
{
    for (unsigned i = 0; i < 5; i++)
        write_region(i);
    for (unsigned i = 0; i < 20; i++) {
        rest(SECOND);
        write_region(0);
    }
    TRUE_HERE(count("hot") == 5 && count("idle-checkpoints") == 0);
    machine_kill(&m);
}

static void while_somebody_writes_a_disk_is_not_idle(void **state)
{
    begin("", 16);
    one_life(five_regions_and_no_rest, 0);
    power_fails_then(5 * 4096, 5 * 4096);
}

static void rests_again(void)
{
    write_region(0);
    rest(3 * SECOND);
    write_region(1);
    TRUE_HERE(count("hot") == 1);
    rest(3 * SECOND);
    TRUE_HERE(count("hot") == 0 && count("idle-checkpoints") == 2);
}

static void each_rest_has_its_checkpoint(void **state)
{
    begin("", 16);
    TRUE_HERE(one_life(rests_again, 0) == 0); /* and the close is a clean one */
    machine_fini(&m);
}

/* ---- the close ---- */

static uint64_t writes_before;

static void is_clean_with(unsigned granules)
{
    CLEANUP(json_putp) struct json_object *info = persist_info(now.n);

    TRUE_HERE(!strcmp(json_get_string(info, "state", ""), "clean"));
    TRUE_HERE(dirty_bytes() == granules * GRANULE);
}

static void five_regions_are_copied(void)
{
    for (unsigned i = 0; i < 5; i++)
        write_region(i);
    rest(3 * SECOND);
    writes_before = m.counts[IO_WRITE];
}

static void two_more_are_not(void)
{
    is_clean_with(5);
    write_region(7);
    write_region(200);
    writes_before = m.counts[IO_WRITE];
}

static void all_are_there(void)
{
    is_clean_with(7);
}

/* All bits of this disk are in one block. */
static void a_close_writes_the_bits_that_no_copy_has(void **state)
{
    begin("", 16);
    now.region_bits = 14;
    now.size = 256 << now.region_bits;
    TRUE_HERE(one_life(five_regions_are_copied, 0) == 0);
    TRUE_HERE(m.counts[IO_WRITE] - writes_before == 1); /* the superblock */
    TRUE_HERE(one_life(two_more_are_not, 0) == 0);
    TRUE_HERE(m.counts[IO_WRITE] - writes_before == 2);
    TRUE_HERE(one_life(all_are_there, 0) == 0);
    machine_fini(&m);
}

/* ---- period ---- */

static void two_periods(void)
{
    write_region(7);
    for (unsigned i = 0; i < 25; i++) {
        write_region(8);
        TRUE_HERE(i == 20 || count("hot") == (i < 20 ? 2 : 1));
        rest(SECOND);
    }
    TRUE_HERE(count("period-checkpoints") == 1 && count("left") == 1 && count("entered") == 2);
    rest(30 * SECOND);
    TRUE_HERE(count("hot") == 0 && count("period-checkpoints") == 2);
    uint64_t events = m.events;
    rest(3600 * SECOND);
    TRUE_HERE(m.events == events);
    machine_kill(&m);
}

static void what_is_not_used_leaves_after_a_period(void **state)
{
    begin("\"checkpoint-idle\":0,\"checkpoint-period\":10000", 16);
    one_life(two_periods, 0);
    power_fails_then(0, 2 * GRANULE);
}

/* ---- amount ---- */

static void too_many(void)
{
    for (unsigned i = 0; i < 8; i++)
        write_region(i);
    rest(SECOND);
    TRUE_HERE(count("marked") == 8 && count("cleanings") == 0);
    write_region(8);
    rest(SECOND);
    TRUE_HERE(count("marked") <= 1 && count("amount-cleanings") == 1 && count("hot") == 9);
    TRUE_HERE(count("left") == 0);
}

static void more_than_half_of_the_slots_are_not_without_copies(void **state)
{
    begin("\"checkpoint-idle\":0,\"checkpoint-period\":0", 16);
    TRUE_HERE(one_life(too_many, 0) == 0);
    machine_fini(&m);
}

/* ---- flushes ---- */

static int slow_write(void *arg)
{
    write_region(100);
    return 0;
}

static void flushes(void)
{
    write_region(0);
    TRUE_HERE(edge_flush(now.e) == 0);
    TRUE_HERE(count("hot") == 1); /* the guest has its answer first */
    rest(100 * MS);
    TRUE_HERE(count("hot") == 0 && count("flush-checkpoints") == 1);
    write_region(1);
    TRUE_HERE(edge_flush(now.e) == 0);
    rest(800 * MS);
    TRUE_HERE(count("hot") == 1); /* not more than one a second */
    rest(100 * MS);
    TRUE_HERE(edge_flush(now.e) == 0);
    rest(200 * MS);
    TRUE_HERE(count("hot") == 0 && count("flush-checkpoints") == 2);

    /* Not with a write under way. */
    rest(SECOND);
    {
        SCOPE(tasks);
        scope_spawn(&tasks, slow_write, NULL);
        TRUE_HERE(task_yield() == 0 && edge_flush(now.e) == 0 && scope_join(&tasks) == 0);
    }
    rest(100 * MS);
    TRUE_HERE(count("flush-checkpoints") == 2 && count("hot") == 1);
    /* Nor with more regions than a transaction takes. */
    for (unsigned i = 2; i < 67; i++)
        write_region(i);
    TRUE_HERE(edge_flush(now.e) == 0);
    rest(100 * MS);
    TRUE_HERE(count("flush-checkpoints") == 2 && count("hot") == 66);
    machine_kill(&m);
}

static void after_a_flush_if_it_is_cheap(void **state)
{
    begin("\"checkpoint-idle\":0,\"checkpoint-period\":0", 200);
    one_life(flushes, 0);
    power_fails_then(66 * 4096, 66 * 4096 + 2 * GRANULE);
}

static void writes_on_at_once(void)
{
    for (unsigned i = 0; i < 100; i++) {
        TRUE_HERE(write_granule(i * GRANULE % 4096) == 0);
        TRUE_HERE(edge_flush(now.e) == 0);
        rest(10 * MS * (i % 2));
    }
    TRUE_HERE(count("entered") == 1 + count("left"));
    TRUE_HERE(count("left") <= 1);
}

static void who_writes_on_after_a_flush_seldom_waits(void **state)
{
    begin("\"checkpoint-idle\":0,\"checkpoint-period\":0", 16);
    TRUE_HERE(one_life(writes_on_at_once, 0) == 0);
    machine_fini(&m);
}

/* ---- what is durably dirty ---- */

static void write_what_is_known(void)
{
    write_region(0);
    write_region(1);
    rest(3 * SECOND);
    TRUE_HERE(count("hot") == 0 && count("entered") == 2 && count("passed") == 0);
    write_region(0);
    TRUE_HERE(count("hot") == 0 && count("passed") == 1);
    /* It is one granule that is known, and all of a write must be. */
    TRUE_HERE(write_granule(GRANULE) == 0);
    TRUE_HERE(count("hot") == 1 && count("passed") == 1);
    write_region(0);
    TRUE_HERE(count("hot") == 1 && count("passed") == 2);
    uint8_t buf[2 * GRANULE] = {1};
    TRUE_HERE(edge_write(now.e, range_make(4096, sizeof buf), buf, 0) == 0);
    TRUE_HERE(count("hot") == 2 && count("passed") == 2);
    rest(3 * SECOND);
    TRUE_HERE(edge_write(now.e, range_make(4096, sizeof buf), buf, 0) == 0);
    TRUE_HERE(count("hot") == 0 && count("passed") == 3);
    /* Any superblock may name other areas. */
    do_bitmap("add", "a");
    write_region(0);
    TRUE_HERE(count("hot") == 1 && count("passed") == 3);
    rest(3 * SECOND);
    write_region(0);
    TRUE_HERE(count("hot") == 0 && count("passed") == 4);
    write_region(1); /* dirty in "b", and not in "a" */
    TRUE_HERE(count("hot") == 1 && count("passed") == 4);
    machine_kill(&m);
}

static void what_is_durably_dirty_needs_no_region(void **state)
{
    begin("\"checkpoint-period\":0", 16);
    one_life(write_what_is_known, 0);
    power_fails_then(2 * 4096 - 2 * GRANULE, 4096 + 2 * GRANULE); /* "a" has none of it */
}

static void command(struct jobs *js, const char *type, const char *data)
{
    struct error err = ERROR_INIT;

    int r = transaction_run_one(now.g, js, type, json_tokener_parse(data), &err);
    if (r < 0)
        fprintf(stderr, "%s\n", err.text);
    TRUE_HERE(r == 0);
}

/* What was dirty before the job is not known in the successor, which is what writes mark. */
static void write_while_a_job_runs(void)
{
    struct error err = ERROR_INIT;
    struct jobs *js = jobs_new(now.g);
    struct node *target;

    TRUE_HERE(write_granule(0) == 0 && write_granule(5 * GRANULE) == 0);
    write_region(100); /* which keeps the job busy */
    write_region(200);
    int fd = io_open("/d/target", O_RDWR | O_CREAT, 0600);
    TRUE_HERE(fd >= 0 && io_ftruncate(fd, now.size) == 0);
    io_close(fd);
    CLEANUP(json_putp)
    struct json_object *o =
        json_tokener_parse("{\"driver\":\"file\",\"node-name\":\"t\",\"filename\":\"/d/target\"}");
    TRUE_HERE(graph_open(now.g, o, &target, &err) == 0);
    command(js, "blockdev-backup",
            "{\"job-id\":\"j\",\"device\":\"d\",\"target\":\"t\",\"sync\":\"incremental\","
            "\"bitmap\":\"b\",\"speed\":1}");
    TRUE_HERE(write_granule(0) == 0);
    rest(3 * SECOND);
    TRUE_HERE(count("hot") == 0 && dirty_busy(dirty_find(now.n, "b")));
    TRUE_HERE(write_granule(0) == 0);
    TRUE_HERE(count("hot") == 0 && count("passed") == 1);
    TRUE_HERE(write_granule(5 * GRANULE) == 0);
    TRUE_HERE(count("hot") == 1 && count("passed") == 1);
    machine_kill(&m);
}

static void what_a_busy_bitmap_knows_is_of_its_successor(void **state)
{
    begin("\"checkpoint-period\":0", 16);
    one_life(write_while_a_job_runs, 0);
    machine_fini(&m);
}

/* ---- off ---- */

static void everything(void)
{
    for (unsigned i = 0; i < 10; i++)
        write_region(i);
    TRUE_HERE(edge_flush(now.e) == 0);
    uint64_t events = m.events;
    rest(3600 * SECOND);
    TRUE_HERE(count("hot") == 10 && count("left") == 0 && m.events == events);
    machine_kill(&m);
}

static void each_can_be_switched_off(void **state)
{
    begin("\"checkpoint-idle\":0,\"checkpoint-period\":0,\"checkpoint-amount\":0,"
          "\"checkpoint-flush\":false",
          32);
    one_life(everything, 0);
    power_fails_then(10 * 4096, 10 * 4096);
}

static void level_process(void)
{
    write_region(0);
    TRUE_HERE(edge_flush(now.e) == 0);
    rest(5 * SECOND);
    TRUE_HERE(!persist_hot_info(now.n));
}

static void level_process_has_nothing_hot(void **state)
{
    begin("\"level\":\"process\"", 16);
    TRUE_HERE(one_life(level_process, 0) == 0);
    machine_fini(&m);
}

/* ---- cut anywhere ---- */

enum { REGIONS = 10, PER_REGION = 32, GUESTS = 8 };

static struct {
    struct dice dice;
    bool written[REGIONS * PER_REGION]; /* the guest has its answer */
    unsigned flushes, naps;             /* one in so many */
    unsigned guests;                    /* that have not ended */
    bool others;                        /* bitmaps that come and go */
} h;

/* Other bitmaps come and go, so that their places in the superblock change. */
static int random_client(void *arg)
{
    static const char *const names[] = {"a", "c"};

    while (h.guests) {
        const char *name = names[dice_below(&h.dice, 2)];
        rest(dice_below(&h.dice, 2 * MS));
        do_bitmap(dirty_find(now.n, name) ? "remove" : "add", name);
    }
    return 0;
}

static int random_guest(void *arg)
{
    for (unsigned n = 0; n < 40; n++) {
        unsigned g = (unsigned)dice_below(&h.dice, ARRAY_SIZE(h.written));
        if (one_in(&h.dice, h.flushes))
            TRUE_HERE(edge_flush(now.e) == 0);
        if (one_in(&h.dice, h.naps))
            rest(dice_below(&h.dice, 2 * MS));
        TRUE_HERE(write_granule((uint64_t)g * GRANULE) == 0);
        h.written[g] = true;
    }
    h.guests--;
    return 0;
}

static void nobody_writes(void)
{
}

static void guests_write(void)
{
    SCOPE(guests);
    h.guests = GUESTS;
    for (unsigned i = 0; i < GUESTS; i++)
        scope_spawn(&guests, random_guest, NULL);
    if (h.others)
        scope_spawn(&guests, random_client, NULL);
    TRUE_HERE(scope_join(&guests) == 0);
}

/* A bit is durable before the data that it speaks for is written: so whoever has had an answer, and
 * whoever's data is there, has it. */
static void nothing_is_forgotten(void)
{
    struct dirty_bitmap *bm = dirty_find(now.n, "b");
    uint8_t buf[GRANULE];

    TRUE_HERE(bm && !dirty_inconsistent(bm));
    for (unsigned g = 0; g < ARRAY_SIZE(h.written); g++) {
        struct range r = range_make((uint64_t)g * GRANULE, GRANULE);
        TRUE_HERE(edge_read(now.e, r, buf, 0) == 0);
        if (h.written[g] || buf[0])
            TRUE_HERE(bitmap_get(dirty_bits(bm), r.start));
    }
}

static void histories(void **state)
{
    static const uint64_t times_us[] = {0, 10, 100, 300, 1000, 3000};
    const char *histories = getenv("TEST_HISTORIES"), *first = getenv("TEST_SEED");
    uint64_t n = histories ? strtoull(histories, NULL, 0) : 400;
    uint64_t from = first ? strtoull(first, NULL, 0) : 1;

    for (seed = from; seed < from + n; seed++) {
        begin("", 4 + (unsigned)(seed % 4));
        memset(&h, 0, sizeof h);
        h.dice.state = seed;
        h.flushes = 2 + (unsigned)dice_below(&h.dice, 8);
        h.naps = 1 + (unsigned)dice_below(&h.dice, 6);
        h.others = one_in(&h.dice, 3);
        now.region_bits = 14;
        now.size = REGIONS * PER_REGION * GRANULE;
        now.short_times = true;
        now.idle_ns = 1000 * times_us[dice_below(&h.dice, ARRAY_SIZE(times_us))];
        now.period_ns = 1000 * times_us[dice_below(&h.dice, ARRAY_SIZE(times_us))];
        now.rest_ns = 1000 * times_us[dice_below(&h.dice, ARRAY_SIZE(times_us))];
        machine_fini(&m);
        machine_init(&m, seed);
        one_life(nobody_writes, 0);
        for (unsigned life = 0; life < 3; life++) {
            if (one_life(guests_write, 1 + dice_below(&h.dice, 1200)) < 0)
                machine_lose_power(&m);
            one_life(nothing_is_forgotten, 0);
        }
        machine_fini(&m);
    }
    seed = 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(at_rest_a_power_loss_adds_nothing),
    cmocka_unit_test(while_somebody_writes_a_disk_is_not_idle),
    cmocka_unit_test(each_rest_has_its_checkpoint),
    cmocka_unit_test(a_close_writes_the_bits_that_no_copy_has),
    cmocka_unit_test(what_is_not_used_leaves_after_a_period),
    cmocka_unit_test(more_than_half_of_the_slots_are_not_without_copies),
    cmocka_unit_test(after_a_flush_if_it_is_cheap),
    cmocka_unit_test(who_writes_on_after_a_flush_seldom_waits),
    cmocka_unit_test(what_is_durably_dirty_needs_no_region),
    cmocka_unit_test(what_a_busy_bitmap_knows_is_of_its_successor),
    cmocka_unit_test(each_can_be_switched_off),
    cmocka_unit_test(level_process_has_nothing_hot),
    cmocka_unit_test(histories),
};
UNIT_MAIN(tests)
