/* The speed of jobs in virtual time: that it is what was asked for, that a change takes effect
 * within one slice (QEMU's is 100 ms), and what pauses and failures do to a job that waits for its
 * turn. */
#include "jobutil.h"
#include "job/mirror.h"
#include "virtual.h"

#define SLICE_NS (NSEC_PER_SEC / 10)
enum { SIZE = 16 * MiB, PIECE = MiB };

static struct node *s, *t;

/* Each test does the same to every kind of job that has a speed. */
static const char *kind;

#define EACH(name)                                                                                 \
    static int name##_task(void *arg);                                                             \
    static void name(void **state)                                                                 \
    {                                                                                              \
        kind = "blockdev-backup";                                                                  \
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
        kind = "mirror";                                                                           \
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
        kind = "x-tidemark-compare";                                                               \
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
    }                                                                                              \
    JOB_TASK(name)

static bool is_mirror(void)
{
    return strcmp(kind, "mirror") == 0;
}

static bool is_compare(void)
{
    return strcmp(kind, "x-tidemark-compare") == 0;
}

static void go(struct graph *g, uint64_t speed, const char *more)
{
    struct error err = ERROR_INIT;
    s = disk(g, "s", SIZE, 0);
    t = disk(g, "t", SIZE, 0);
    memset(mem_of(s)->bytes, 0x42, SIZE);
    if (is_compare()) {
        memset(mem_of(t)->bytes, 0x42, SIZE);
        command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    }
    struct json_object *o =
        parse("{'device':'s','target':'t','job-id':'j',%s,'speed':%llu%s}",
              is_compare() ? "'bitmap':'b'" : "'sync':'full'", (unsigned long long)speed, more);
    int r = is_mirror() ? mirror_blockdev(js, o, &err) : transaction_run_one(g, js, kind, o, &err);
    CHECK_OK(r, err);
    json_object_put(o);
}

static void let_go(void)
{
    jobs_cancel_all(js);
    node_unref(s);
    node_unref(t);
}

static uint64_t done(void)
{
    uint64_t bytes, total;
    CHECK(!TAILQ_EMPTY(&js->list));
    job_get_progress(TAILQ_FIRST(&js->list), &bytes, &total);
    return bytes;
}

static void pass(uint64_t ns)
{
    uint64_t end = clock_after_ns(ns);
    turns(50);
    CHECK(sleep_until(end) == 0);
    turns(50);
}

static void set_speed(int64_t speed)
{
    struct error err = ERROR_INIT;
    int r = jobs_set_speed(js, "j", speed, &err);
    CHECK_OK(r, err);
}

/* All that is to be copied has been, and the time that it took since BEGUN. */
static uint64_t until_copied(uint64_t begun)
{
    for (unsigned i = 0; !strstr(events, is_mirror() ? "j:READY" : "j:waiting"); i++) {
        CHECK(i < 100000);
        CHECK(sleep_until(clock_after_ns(i < 100 ? 0 : NSEC_PER_SEC / 100)) == 0);
    }
    return clock_now_ns() - begun;
}

EACH(a_job_takes_the_time_that_its_speed_gives_it)
{
    static const uint64_t speeds[] = {128 * 1024, MiB, 4 * MiB, 32 * MiB};
    for (unsigned i = 0; i < ARRAY_SIZE(speeds); i++) {
        events[0] = '\0';
        go(g, speeds[i], "");
        uint64_t took = until_copied(clock_now_ns());
        /* The first pieces are free, and so is what a slice allows at once. */
        uint64_t exact = (uint64_t)SIZE * NSEC_PER_SEC / speeds[i];
        CHECK(took <= exact + SLICE_NS && took + SLICE_NS + exact / 8 >= exact);
        let_go();
    }
}

EACH(a_higher_speed_takes_effect_within_a_slice)
{
    go(g, 1, "");
    pass(20 * NSEC_PER_SEC);
    uint64_t before = done();
    CHECK(before <= PIECE);
    set_speed(64 * MiB);
    pass(SLICE_NS);
    CHECK(done() - before >= 3 * PIECE && done() - before <= 14 * PIECE);
    CHECK(until_copied(clock_now_ns()) <= NSEC_PER_SEC);
    let_go();
}

EACH(a_lower_speed_takes_effect_within_a_slice)
{
    go(g, 8 * MiB, "");
    pass(NSEC_PER_SEC);
    uint64_t before = done();
    CHECK(before >= 7 * PIECE && before <= 10 * PIECE);
    set_speed(1024);
    pass(SLICE_NS);
    uint64_t after = done();
    CHECK(after - before <= 2 * PIECE);
    pass(100 * NSEC_PER_SEC);
    CHECK(done() - after <= PIECE);
    let_go();
}

EACH(no_limit_is_no_limit)
{
    go(g, 1, "");
    pass(NSEC_PER_SEC);
    set_speed(0);
    CHECK(until_copied(clock_now_ns()) <= SLICE_NS);
    let_go();
}

EACH(a_slow_job_pauses_and_ends_at_once)
{
    go(g, 1, "");
    pass(NSEC_PER_SEC);
    uint64_t before = clock_now_ns();
    events[0] = '\0';
    verb_ok("j", JOB_VERB_PAUSE);
    turns(50);
    CHECK(strcmp(events, "j:paused ") == 0);
    /* What it is told meanwhile holds when it goes on. */
    set_speed(0);
    turns(50);
    CHECK(strcmp(events, "j:paused ") == 0);
    set_speed(1);
    verb_ok("j", JOB_VERB_RESUME);
    turns(50);
    CHECK(strcmp(events, "j:paused j:running ") == 0);
    verb_ok("j", JOB_VERB_CANCEL);
    turns(100);
    CHECK(strcmp(events, "j:paused j:running j:aborting j:CANCELLED j:concluded j:null ") == 0);
    CHECK(clock_now_ns() == before);
    let_go();
}

/* A failure while the next piece waits for its turn is told at once, not at that turn. */
EACH(a_slow_job_fails_at_once)
{
    go(g, 1, ",'on-target-error':'stop'");
    mem_of(t)->bad_write = mem_of(t)->bad_read = range_make(0, SIZE);
    mem_of(t)->write_errno = mem_of(t)->read_errno = EIO;
    mem_of(t)->bad_times = 1;
    uint64_t before = clock_now_ns();
    turns(100);
    CHECK(strstr(events,
                 is_compare() ? "j:ERROR(read stop) j:paused " : "j:ERROR(write stop) j:paused "));
    CHECK(clock_now_ns() - before < SLICE_NS);
    set_speed(0);
    verb_ok("j", JOB_VERB_RESUME);
    until_copied(before);
    turns(100);
    CHECK(strcmp(kind, "blockdev-backup") || memcmp(mem_of(s)->bytes, mem_of(t)->bytes, SIZE) == 0);
    let_go();
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_job_takes_the_time_that_its_speed_gives_it),
    cmocka_unit_test(a_higher_speed_takes_effect_within_a_slice),
    cmocka_unit_test(a_lower_speed_takes_effect_within_a_slice),
    cmocka_unit_test(no_limit_is_no_limit),
    cmocka_unit_test(a_slow_job_pauses_and_ends_at_once),
    cmocka_unit_test(a_slow_job_fails_at_once),
};

UNIT_MAIN(tests)
