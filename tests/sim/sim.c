/* sim: histories of the real program on a simulated machine (history.h).
 *
 *     sim [--seed N] [--offset N] [--count N] [--trace] [--no-faults] [--persist] [--groups]
 *         [--strict] [--twice] [--quiet] [--kill-at EVENT] [--small] [--exhaustive N|all]
 *         [--qemu-img DIR [EVERY]]
 *
 *     --seed N       the first seed ($TIDEMARK_SEED, or 1)
 *     --offset N     is added to it
 *     --count N      so many, one after the other; the first violation ends the run (1)
 *     --trace        each event, as a line
 *     --twice        each one twice: the hash of its trace must be the same
 *     --no-faults    no I/O errors
 *     --persist      persistent bitmaps on raw images, too
 *     --groups       several raw disks, whose bitmaps change together; some are absent at times
 *     --strict       a bitmap must come through a kill
 *     --kill-at E    the first life after the images are made dies at its event E
 *     --small        a disk of 16 sectors (groups: two), one guest, few writes, no backups
 *     --exhaustive N the one life is killed at each of its events, and then all that the kill, or a
 * loss of power then, can leave, one after the other; at most N of each event (all: all of them)
 *     --qemu-img D   in directory D, qemu-img check judges every 50th (or EVERYth) image, too */
#include "history.h"

#include "../death.h"

#include "base/log.h"

#include <time.h>

static int usage(void)
{
    fprintf(stderr, "usage: sim [--seed N] [--offset N] [--count N] [--trace] [--no-faults] "
                    "[--persist] [--groups] [--strict] [--twice] [--quiet]"
                    " [--kill-at EVENT] [--small] [--exhaustive N|all] [--qemu-img DIR [EVERY]]\n");
    return 2;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* A violation says its seed by itself (history.c). ARGV as it was, but for which history. */
static void lives(uint64_t seed, char **argv)
{
    size_t n = (size_t)snprintf(again, sizeof again, "sim: seed %llu: died\nrepeat with: %s",
                                (unsigned long long)seed, argv[0]);
    for (char **a = argv + 1; *a && n < sizeof again; a++)
        if (a[1] && (!strcmp(*a, "--seed") || !strcmp(*a, "--offset") || !strcmp(*a, "--count")))
            a++;
        else
            n += (size_t)snprintf(again + n, sizeof again - n, " %s", *a);
    if (n < sizeof again)
        snprintf(again + n, sizeof again - n, " --seed %llu\n", (unsigned long long)seed);
}

/* Events at which there was more than was tried; and the most that was tried at one. */
static uint64_t cut_short, at_most;

/* The row of choices is enumerated by running the history anew for each. */
static uint64_t exhaust(uint64_t seed, uint64_t most, struct history *totals)
{
    uint64_t runs = 0;
    for (settings.kill_at = 1;; settings.kill_at++) {
        struct choices c = {.exhaustive = true};
        uint64_t n = 0;
        bool more;
        settings.exhaustive = &c;
        do {
            history_run(seed, totals);
            n++;
            more = choices_next(&c);
        } while (more && n < most);
        cut_short += more;
        if (n > at_most)
            at_most = n;
        choices_fini(&c);
        runs += n;
        if (totals->last_life_events < settings.kill_at)
            break;
    }
    return runs;
}

int main(int argc, char **argv)
{
    uint64_t seed = 1, offset = 0, count = 1, exhaustive = 0, runs = 0;
    bool twice = false, quiet = false;
    const char *from_test = getenv("TIDEMARK_SEED"), *histories = getenv("TEST_HISTORIES");
    if (from_test)
        seed = strtoull(from_test, NULL, 0);
    if (histories)
        count = strtoull(histories, NULL, 0);
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "--trace"))
            settings.tracing = true;
        else if (!strcmp(argv[i], "--no-faults"))
            settings.no_faults = true;
        else if (!strcmp(argv[i], "--persist"))
            settings.persist = true;
        else if (!strcmp(argv[i], "--groups"))
            settings.groups = settings.persist = true;
        else if (!strcmp(argv[i], "--small"))
            settings.small = true;
        else if (!strcmp(argv[i], "--strict"))
            settings.strict = true;
        else if (!strcmp(argv[i], "--twice"))
            twice = true;
        else if (!strcmp(argv[i], "--quiet"))
            quiet = true;
        else if (!strcmp(argv[i], "--seed") && next)
            seed = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--offset") && next)
            offset = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--count") && next)
            count = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--exhaustive") && next)
            exhaustive = strcmp(argv[++i], "all") ? strtoull(argv[i], NULL, 0) : UINT64_MAX;
        else if (!strcmp(argv[i], "--kill-at") && next)
            settings.kill_at = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--qemu-img") && next) {
            settings.qemu_img = argv[++i];
            settings.qemu_img_every = 50;
            if (i + 1 < argc && argv[i + 1][0] != '-')
                settings.qemu_img_every = (unsigned)strtoul(argv[++i], NULL, 0);
        } else {
            return usage();
        }
    }
    seed += offset;
    if (!settings.tracing) /* what fails was made to fail */
        log_set_level((enum log_level)(LOG_LEVEL_ERROR + 1));
    struct history totals = {0};
    double began = seconds();
    watch_for_death();
    for (uint64_t i = 0; i < count; i++) {
        lives(seed + i, argv);
        if (exhaustive) {
            runs += exhaust(seed + i, exhaustive, &totals);
            continue;
        }
        uint64_t hash = history_run(seed + i, &totals);
        if (twice && history_run(seed + i, &totals) != hash) {
            fprintf(stderr, "sim: seed %llu: the second run differs from the first\n",
                    (unsigned long long)(seed + i));
            return 1;
        }
        if (count == 1 && !quiet)
            printf("trace %016llx\n", (unsigned long long)hash);
    }
    again[0] = '\0';
    double took = seconds() - began;
    if (runs)
        count = runs;
    if (!quiet)
        printf("[  PASSED  ] %llu histories in %.1f s (%.0f a second): %llu events, %llu writes, "
               "%llu flushes, "
               "%llu jobs, %llu kills, %llu power losses (and %llu imagined), %llu I/O errors; no "
               "violation\n",
               (unsigned long long)count, took, (double)count / took,
               (unsigned long long)totals.m.events, (unsigned long long)totals.writes,
               (unsigned long long)totals.flushes, (unsigned long long)totals.jobs,
               (unsigned long long)totals.kills, (unsigned long long)totals.power_losses,
               (unsigned long long)totals.glimpses, (unsigned long long)totals.m.n_faults);
    if (!quiet)
        printf("checkpoints in lives that ended well: %llu idle, %llu of a period, %llu after a "
               "flush; %llu regions left\n",
               (unsigned long long)totals.checkpoints_done.idle,
               (unsigned long long)totals.checkpoints_done.period,
               (unsigned long long)totals.checkpoints_done.flush,
               (unsigned long long)totals.checkpoints_done.left);
    if (!quiet && exhaustive)
        printf("of a crash at each event at most %llu outcomes were tried, which were %s\n",
               (unsigned long long)at_most, cut_short ? "not always all" : "all that there are");
    if (!quiet && settings.groups)
        printf("%llu changes of several disks, %llu bitmaps found in doubt\n",
               (unsigned long long)totals.groups, (unsigned long long)totals.doubts);
    static const char *const lefts[] = {"clean closes", "failing closes", "kills", "power losses"};
    for (int i = 0; i < LEFTS && !quiet; i++)
        printf("persistent bitmaps good after %s: %llu of %llu\n", lefts[i],
               (unsigned long long)totals.bitmaps[i].good,
               (unsigned long long)totals.bitmaps[i].before);
    return 0;
}
