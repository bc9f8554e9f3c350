/* The seam: a world made of nothing but this file, with a clock that jumps from deadline to
 * deadline, dice that a seed throws, and one file in memory. A day passes in no time, twice
 * the same. */
#include "unit.h"

#include "rt/clock.h"
#include "rt/sync.h"
#include "rt/world.h"
#include "seed.h"

#include <errno.h>
#include <time.h>

struct fake {
    struct world world;
    uint64_t now_ns;
    struct rng rng;
    char disk[4096];
    int turns, performed;
};

#define FAKE(w) container_of(w, struct fake, world)

static uint64_t fake_now(struct world *w)
{
    return FAKE(w)->now_ns;
}

static uint64_t fake_wall(struct world *w)
{
    return 1000000 + FAKE(w)->now_ns / 1000;
}

static void fake_random(struct world *w, void *buf, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)buf)[i] = (uint8_t)rng_next(&FAKE(w)->rng);
}

/* Each read or write of the disk takes between one and ten milliseconds. */
static int64_t fake_perform(struct world *w, struct io_op *op)
{
    struct fake *f = FAKE(w);
    f->performed++;
    switch (op->kind) {
    case IO_OPEN:
        return 12345;
    case IO_READ:
    case IO_WRITE: {
        SHIELD();
        assert_int_equal(op->fd, 12345);
        assert_int_equal(sleep_until(f->now_ns + (1 + rng_below(&f->rng, 10)) * 1000000), 0);
        if (!range_fits(op->offset, op->length, sizeof f->disk))
            return -EIO;
        if (op->kind == IO_READ)
            memcpy(op->buf, f->disk + op->offset, op->length);
        else
            memcpy(f->disk + op->offset, op->buf, op->length);
        return (int64_t)op->length;
    }
    case IO_WORKER:
        task_yield_uncancelled();
        return op->fn(op->ret);
    case IO_CLOSE:
        return 0;
    default:
        return -EOPNOTSUPP;
    }
}

static bool fake_turn(struct world *w, uint64_t deadline_ns)
{
    struct fake *f = FAKE(w);
    f->turns++;
    if (deadline_ns == NEVER_NS)
        return false;
    if (deadline_ns > f->now_ns)
        f->now_ns = deadline_ns;
    return true;
}

static struct fake fake_world(uint64_t seed)
{
    return (struct fake){
        .world = {"fake", fake_now, fake_wall, fake_random, fake_perform, fake_turn},
        .rng = {seed},
    };
}

static int sleeps_a_day(void *arg)
{
    for (int i = 0; i < 24; i++) {
        int r = sleep_until(clock_after_ns(3600 * NSEC_PER_SEC));
        if (r < 0)
            return r;
    }
    assert_int_equal(clock_now_ns(), 24 * 3600 * NSEC_PER_SEC);
    assert_int_equal(clock_wall_us(), 1000000 + UINT64_C(24) * 3600 * 1000000);
    struct event e;
    event_init(&e);
    assert_int_equal(event_wait_until(&e, clock_after_ns(NSEC_PER_SEC)), -ETIMEDOUT);
    assert_int_equal(clock_now_ns(), (24 * 3600 + 1) * NSEC_PER_SEC);
    assert_string_equal(loop_backend_name(), "fake");
    return 0;
}

static void a_day_passes_in_no_time(void **state)
{
    struct fake f = fake_world(1);
    time_t before = time(NULL);
    assert_int_equal(loop_run_in(&f.world, sleeps_a_day, NULL), 0);
    assert_true(time(NULL) - before < 60);
    assert_true(f.turns >= 25);
}

struct nap {
    uint64_t deadline_ns;
    int *turn, seen;
};

static int naps(void *arg)
{
    struct nap *n = arg;
    int r = sleep_until(n->deadline_ns);
    assert_int_equal(clock_now_ns(), n->deadline_ns);
    n->seen = (*n->turn)++;
    return r;
}

static int many_nap(void *arg)
{
    struct nap n[200];
    int turn = 0;
    SCOPE(s);
    for (int i = 0; i < 200; i++) {
        n[i] = (struct nap){1000 + (uint64_t)(i * 77 % 200), &turn, -1};
        scope_spawn(&s, naps, &n[i]);
    }
    assert_int_equal(scope_join(&s), 0);
    for (int i = 0; i < 200; i++)
        assert_int_equal(n[i].seen, i * 77 % 200);
    for (int i = 0; i < 200; i++) { /* at one moment: in the order in which they went to sleep */
        n[i].deadline_ns = 5000;
        scope_spawn(&s, naps, &n[i]);
    }
    turn = 0;
    assert_int_equal(scope_join(&s), 0);
    for (int i = 0; i < 200; i++)
        assert_int_equal(n[i].seen, i);
    return 0;
}

static void sleepers_wake_in_the_order_of_their_deadlines(void **state)
{
    struct fake f = fake_world(1);
    assert_int_equal(loop_run_in(&f.world, many_nap, NULL), 0);
}

struct story {
    char text[4096];
    size_t length;
};

struct writer {
    struct story *story;
    int fd, name;
};

static int writes_by_chance(void *arg)
{
    struct writer *w = arg;
    for (int i = 0; i < 10; i++) {
        uint8_t dice[2];
        random_bytes(dice, sizeof dice);
        int r = io_pwrite_full(w->fd, dice, sizeof dice, dice[0] * 8u, 0);
        if (r < 0)
            return r;
        w->story->length +=
            (size_t)snprintf(w->story->text + w->story->length, 40, "%d:%llu@%u ", w->name,
                             (unsigned long long)clock_now_ns() / 1000000, dice[0]);
    }
    return 0;
}

static int tells(void *arg)
{
    int fd = io_open("/no/such/file", 0, 0);
    if (fd < 0)
        return fd;
    struct writer w[5];
    SCOPE(s);
    for (int i = 0; i < 5; i++) {
        w[i] = (struct writer){arg, fd, i};
        scope_spawn(&s, writes_by_chance, &w[i]);
    }
    int r = scope_join(&s);
    io_close(fd);
    return r;
}

static void one_seed_is_one_history(void **state)
{
    static struct story a, b, c;
    struct fake f = fake_world(7), g = fake_world(7), h = fake_world(8);
    assert_int_equal(loop_run_in(&f.world, tells, &a), 0);
    assert_int_equal(loop_run_in(&g.world, tells, &b), 0);
    assert_int_equal(loop_run_in(&h.world, tells, &c), 0);
    assert_true(a.length > 300);
    assert_string_equal(a.text, b.text);
    assert_memory_equal(f.disk, g.disk, sizeof f.disk);
    assert_string_not_equal(a.text, c.text);
    assert_int_equal(f.performed, g.performed);
}

/* ---- a killed program ---- */

struct victim {
    struct fake *fake;
    int steps;
    bool in_turn;
};

static int dies_at_the_tenth(void *arg)
{
    struct victim *v = arg;
    SHIELD();
    while (sleep_until(clock_after_ns(1000)) == 0) {
        if (++v->steps == 10 && !v->in_turn)
            loop_die();
        assert_true(v->steps <= 10);
    }
    return 0;
}

static int spawns_victims(void *arg)
{
    SCOPE(s);
    for (int i = 0; i < 4; i++)
        scope_spawn(&s, dies_at_the_tenth, arg);
    int r = scope_join(&s);
    fail_msg("nobody comes back from the dead");
    return r;
}

static bool dying_turn(struct world *w, uint64_t deadline_ns)
{
    bool r = fake_turn(w, deadline_ns);
    if (FAKE(w)->turns == 3)
        loop_die();
    return r;
}

static void of_a_killed_program_nothing_runs_on(void **state)
{
    struct fake f = fake_world(1), g = fake_world(1);
    struct victim v = {&f}, in_turn = {.fake = &g, .in_turn = true};
    assert_int_equal(loop_run_in(&f.world, spawns_victims, &v), -EOWNERDEAD);
    assert_int_equal(v.steps, 10);
    g.world.turn = dying_turn;
    assert_int_equal(loop_run_in(&g.world, spawns_victims, &in_turn), -EOWNERDEAD);
    assert_int_equal(in_turn.steps, 8);
    struct fake h = fake_world(1); /* and the next one on this thread lives */
    assert_int_equal(loop_run_in(&h.world, sleeps_a_day, NULL), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_day_passes_in_no_time),
    cmocka_unit_test(sleepers_wake_in_the_order_of_their_deadlines),
    cmocka_unit_test(one_seed_is_one_history),
    cmocka_unit_test(of_a_killed_program_nothing_runs_on),
};
UNIT_MAIN(tests)
