/* Random histories of jobs, guests and faults against a model: see histories.h.
 *
 *     TEST_SEED=257 test_histories       one history, told step by step
 *     TEST_HISTORIES=100000              so many; TIDEMARK_SEED: the first one's seed
 *     TEST_HALF=1                        of them the first half, or the second
 *     TEST_DIES=abort@3                  history 3 dies on purpose (for the second test) */
#include "histories.h"

#include "../death.h"

#include "copy/copy.h"
#include "rt/clock.h"
#include "rt/world.h"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- the world: a clock that jumps ---- */

struct jumping {
    struct world world;
    uint64_t now_ns;
    struct rng rng;
};

static uint64_t now_ns(struct world *w)
{
    return container_of(w, struct jumping, world)->now_ns;
}

static uint64_t wall_us(struct world *w)
{
    return now_ns(w) / 1000;
}

static void random_of_seed(struct world *w, void *buf, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)buf)[i] = (uint8_t)rng_next(&container_of(w, struct jumping, world)->rng);
}

static int64_t perform(struct world *w, struct io_op *op)
{
    return -EOPNOTSUPP;
}

static bool turn(struct world *w, uint64_t deadline_ns)
{
    struct jumping *v = container_of(w, struct jumping, world);
    if (deadline_ns == NEVER_NS)
        return false;
    if (deadline_ns > v->now_ns)
        v->now_ns = deadline_ns;
    return true;
}

/* ---- however it ends, how to see it again ---- */

static void lives(uint64_t seed)
{
    snprintf(again, sizeof again, "\nagain: TEST_SEED=%llu %.500s\n", (unsigned long long)seed,
             program_invocation_name);
}

/* ---- saying what happened ---- */

struct history *history;
bool telling;
static char said[24000]; /* the last of it */
static size_t said_end;

void trace(const char *fmt, ...)
{
    char line[512];
    va_list ap;
    int n = snprintf(line, sizeof line, "%9.3f ms  ", (double)clock_now_ns() / MSEC);
    va_start(ap, fmt);
    vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, ap);
    va_end(ap);
    strcat(line, "\n");
    if (telling) {
        fputs(line, stderr);
        return;
    }
    size_t length = strlen(line);
    if (said_end + length >= sizeof said) {
        memmove(said, said + sizeof said / 2, said_end - sizeof said / 2);
        said_end -= sizeof said / 2;
    }
    memcpy(said + said_end, line, length + 1);
    said_end += length;
}

void wrong_at(const char *file, int line, const char *fmt, ...)
{
    va_list ap;
    fprintf(stderr, "%s%s:%d: history %llu: ", telling ? "" : said, file, line,
            (unsigned long long)history->seed);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    abort();
}

/* ---- on purpose ---- */

static void die(const char *how)
{
    volatile size_t after = 64;
    uint8_t *bytes = xcalloc(1, after);
    if (strcmp(how, "abort") == 0)
        abort();
    else if (strcmp(how, "overflow") == 0)
        bytes[after] = 1;
    else if (strcmp(how, "crash") == 0)
        raise(SIGSEGV);
    else if (strcmp(how, "wrong") == 0)
        WRONG("on purpose");
    fprintf(stderr, "hangs\n");
    for (;;)
        pause();
}

static void die_here(void)
{
    const char *when = getenv("TEST_DIES"), *at = when ? strchr(when, '@') : NULL;
    if (at && strtoull(at + 1, NULL, 0) == history->seed) {
        CLEANUP(memory_freep) char *how = xstrdup(when);
        how[at - when] = '\0';
        die(how);
    }
}

/* ---- one history ---- */

static void set_up(void)
{
    uint64_t size = 0;
    history->n_vdisks = 2 + (unsigned)dice(VDISKS_MAX - 1);
    for (unsigned i = 0; i < history->n_vdisks; i++) {
        if (i == 0 || one_in(3))
            size = SECTOR * (700 + dice(1200));
        struct disk *d = disk_new(size, 0);
        disk_fill(d);
        vdisk_init(&history->vdisks[i], d);
    }
}

static int live(void *arg)
{
    history->graph = graph_new();
    dirty_init(history->graph);
    copy_register_drivers(history->graph);
    graph_add_driver(history->graph, &history_disk);
    history->jobs = jobs_new(history->graph);
    jobs_set_listener(history->jobs, client_event, NULL);
    TAILQ_INIT(&history->works);
    set_up();
    die_here();
    {
        SCOPE(tasks);
        for (unsigned i = 0; i < history->n_vdisks; i++)
            guests_start(&history->vdisks[i], &tasks);
        for (uint64_t steps = 15 + dice(40); steps; steps--) {
            client_step();
            HOLDS(sleep_until(clock_after_ns(dice(one_in(4) ? 40 * MSEC : 3 * MSEC))) == 0);
            check_everything();
        }
        if (one_in(2)) { /* with guests, and then once more without */
            client_finish();
            history->serious = false;
        }
        history->stop = true;
        HOLDS(scope_join(&tasks) == 0);
    }
    client_finish();
    jobs_cancel_all(history->jobs);
    for (unsigned i = 0; i < history->n_vdisks; i++) {
        vdisk_check(&history->vdisks[i]);
        vdisk_fini(&history->vdisks[i]);
    }
    for (unsigned i = history->n_disks; i--;) /* overlays before what is behind them */
        disk_free(history->disks[i]);
    client_fini();
    jobs_free(history->jobs);
    graph_free(history->graph);
    return 0;
}

static void one_history(uint64_t seed)
{
    struct jumping v = {{"virtual", now_ns, wall_us, random_of_seed, perform, turn}, 0, {~seed}};
    struct history h = {.seed = seed, .rng = {seed}, .writes = 1};
    history = &h;
    said_end = 0;
    said[0] = '\0';
    lives(seed);
    if (loop_run_in(&v.world, live, NULL) != 0)
        WRONG("the loop ends early");
    again[0] = '\0';
}

static uint64_t number(const char *name, uint64_t fallback)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : fallback;
}

static void random_histories_agree_with_the_model(void **state)
{
    uint64_t first = number("TIDEMARK_SEED", 1);
    uint64_t n = number("TEST_HISTORIES", getenv("TIDEMARK_SOAK") ? 50000 : 1000);
    if (getenv("TEST_SEED")) {
        first = number("TEST_SEED", 1);
        n = 1;
        telling = true;
    } else if (getenv("TEST_HALF")) {
        n /= 2;
        first += n * (number("TEST_HALF", 1) - 1);
    }
    watch_for_death();
    for (uint64_t seed = first; seed < first + n; seed++)
        one_history(seed);
}

/* What this program says when its history 3 dies HOW. */
static void what_it_says(const char *how, char *said_then, size_t size)
{
    char path[400], dies[40];
    int out[2];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    assert_true(n > 0 && pipe(out) == 0);
    path[n] = '\0';
    snprintf(dies, sizeof dies, "%s@3", how);
    fflush(stderr);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(out[1], STDOUT_FILENO);
        dup2(out[1], STDERR_FILENO);
        close(out[0]);
        close(out[1]);
        unsetenv("TEST_SEED");
        unsetenv("TEST_HALF");
        unsetenv("TIDEMARK_SEED");
        setenv("TEST_HISTORIES", "5", true);
        setenv("TEST_DIES", dies, true);
        execl(path, "histories-of-death", "random_histories", NULL);
        _exit(99);
    }
    close(out[1]);
    size_t have = 0;
    bool hangs = strcmp(how, "hang") == 0;
    while ((n = read(out[0], said_then + have, size - 1 - have)) > 0) {
        have += (size_t)n;
        said_then[have] = '\0';
        if (hangs && strstr(said_then, "hangs\n")) {
            kill(pid, SIGTERM);
            hangs = false;
        }
    }
    said_then[have] = '\0';
    close(out[0]);
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(status != 0);
}

static void however_a_history_dies_its_seed_is_said(void **state)
{
    static const char *const ways[] = {"wrong", "abort", "crash", "hang", "overflow"};
    static char text[65536];
    for (size_t i = 0; i < ARRAY_SIZE(ways); i++) {
        if (strcmp(ways[i], "overflow") == 0 && !UNIT_SANITIZED)
            continue; /* nobody would notice */
        what_it_says(ways[i], text, sizeof text);
        const char *line = strstr(text, "\nagain: TEST_SEED=3 histories-of-death\n");
        if (!line || strstr(line + 2, "again: "))
            fail_msg("a history that dies by '%s' says%s:\n%s", ways[i],
                     line ? " it twice" : " no seed", text);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(random_histories_agree_with_the_model),
    cmocka_unit_test(however_a_history_dies_its_seed_is_said),
};

UNIT_MAIN(tests)
