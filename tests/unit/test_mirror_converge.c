/* Does a mirror become ready while guests write faster than it may copy? In virtual time: in the
 * background never, by write-blocking in the time that the disk takes at its speed. */
#include "mirrorutil.h"
#include "virtual.h"

#define VIRTUAL_TEST(name)                                                                         \
    static int name##_task(void *arg);                                                             \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
    }                                                                                              \
    JOB_TASK(name)

enum {
    SPEED = 1024 * 1024,         /* of the mirror, a second: the disk takes four */
    WRITE = 32768,               /* half a chunk, which so is never copied by the write alone */
    PATIENCE = 60,               /* seconds in which a mirror in the background gets nowhere */
    AT_SPEED = 2 * SIZE / SPEED, /* seconds in which any other is done, twice over */
};

struct steady {
    struct guest guest;
    bool stop;
    unsigned writes;
};

/* Twice the speed, all over the disk. */
static int write_steadily(void *arg)
{
    struct steady *st = arg;
    uint64_t due = clock_now_ns();
    while (!st->stop) {
        uint64_t at = rng_below(&st->guest.rng, SIZE / WRITE) * WRITE;
        write_at(st->guest.edge, at, WRITE, (uint8_t)++st->writes);
        due += NSEC_PER_SEC * WRITE / (2 * SPEED);
        CHECK(sleep_until(due) == 0);
    }
    return 0;
}

static bool ready_within(unsigned seconds)
{
    uint64_t end = clock_after_ns(seconds * NSEC_PER_SEC);
    while (!strstr(events, "j:READY") && clock_now_ns() < end)
        CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 100)) == 0);
    return strstr(events, "j:READY");
}

static void begin(struct graph *g, struct steady *st, struct scope *tasks, const char *mode)
{
    two_disks(g, SIZE, 0);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    *st = (struct steady){0};
    guest_on(&st->guest, s, 7);
    scope_spawn(tasks, write_steadily, st);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full','speed':%d,"
                    "'copy-mode':'%s'}",
                    SPEED, mode));
}

/* It still follows, and ends with the guest on the target. */
static void end(struct steady *st, struct scope *tasks)
{
    unsigned before = st->writes;
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:") && st->guest.edge->node == t);
    CHECK(st->writes - before < 2 * AT_SPEED * SPEED / WRITE);
    st->stop = true;
    CHECK(scope_join(tasks) == 0);
    edge_detach(st->guest.edge);
    close_disks();
}

VIRTUAL_TEST(in_the_background_only_when_guests_rest)
{
    struct steady st;
    SCOPE(tasks);
    begin(g, &st, &tasks, "background");
    CHECK(!ready_within(PATIENCE));
    CHECK(st.writes > PATIENCE * (2 * SPEED / WRITE) * 9 / 10);
    st.stop = true;
    CHECK(scope_join(&tasks) == 0);
    CHECK(ready_within(AT_SPEED));
    cancel_softly("j");
    wait_for("j", "null");
    CHECK(same(SIZE));
    edge_detach(st.guest.edge);
    close_disks();
}

VIRTUAL_TEST(write_blocking_converges)
{
    struct steady st;
    SCOPE(tasks);
    begin(g, &st, &tasks, "write-blocking");
    CHECK(ready_within(AT_SPEED));
    end(&st, &tasks);
}

VIRTUAL_TEST(also_when_it_is_chosen_later)
{
    struct steady st;
    struct error err = ERROR_INIT;
    SCOPE(tasks);
    begin(g, &st, &tasks, "background");
    CHECK(!ready_within(PATIENCE));
    CLEANUP(json_putp)
    struct json_object *o = parse("{'id':'j','type':'mirror','copy-mode':'write-blocking'}");
    int r = jobs_change(js, o, &err);
    CHECK_OK(r, err);
    CHECK(ready_within(AT_SPEED));
    end(&st, &tasks);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(in_the_background_only_when_guests_rest),
    cmocka_unit_test(write_blocking_converges),
    cmocka_unit_test(also_when_it_is_chosen_later),
};

UNIT_MAIN(tests)
