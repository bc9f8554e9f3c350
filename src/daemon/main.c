/* tidemarkd: the life of the process.
 *
 *     scan options -> (background) -> loop: make everything -> apply options in order -> pidfile
 *     -> ready -> ... until `quit`, SIGTERM, SIGINT or SIGHUP ...
 *     -> exports closed -> jobs cancelled -> images closed, bitmaps saved -> last answers -> end
 *
 * Commands are not executed any more once the end has begun. The clean end is bounded by the
 * requests under way; a second signal does not hurry it. */
#include "daemon/daemon.h"

#include "base/log.h"
#include "block/throttle_group.h"
#include "copy/copy.h"
#include "dirty/dirty.h"
#include "persist/persist.h"
#include "rt/io.h"
#include "rt/process.h"

#include <signal.h>
#include <stdio.h>

struct start {
    struct options options;
    struct daemon daemon;
};

static int wait_for_signal(void *arg)
{
    struct daemon *d = arg;
    static const int signals[] = {SIGTERM, SIGINT, SIGHUP};

    task_set_name("signals");
    int fd = io_signal_open(signals, ARRAY_SIZE(signals));
    if (fd < 0)
        return fd;
    if (io_signal_wait(fd) > 0)
        event_set(&d->qmp->quit);
    io_close(fd);
    return 0;
}

static void make_everything(struct daemon *d, bool daemonized)
{
    d->graph = graph_new();
    dirty_init(d->graph);
    persist_init(d->graph);
    CLEANUP(memory_freep) char *runtime = runtime_path();
    persist_set_runtime(d->graph, runtime);
    copy_register_drivers(d->graph);
    d->jobs = jobs_new(d->graph);
    d->exports = exports_new(d->graph);
    d->qmp = qmp_new(d->graph, d->jobs, d->exports);
    d->chardevs = chardevs_new(daemonized);
    exports_set_accepting(d->exports, false);
    scope_init(&d->monitors);
}

static int cancel_jobs(void *arg)
{
    jobs_cancel_all(arg);
    return 0;
}

/* Exports, so that nothing is written any more; and jobs, so that nobody holds a node (both at
 * once: a guest's write may wait for the target of a job, and that may hang); then the images with
 * their bitmaps. Clients hear of all this before they are let go. */
static void end_everything(struct daemon *d)
{
    SHIELD();
    SCOPE(jobs);

    throttle_groups_lift(d->graph);        /* from here on haste is better than limits */
    jobs_give_up(d->jobs);                 /* one that hangs may hold up the command that ends it */
    mutex_lock_shielded(&d->qmp->in_band); /* for good: no command begins any more */
    scope_spawn(&jobs, cancel_jobs, d->jobs);
    exports_close_all(d->exports);
    int r = scope_join(&jobs);
    assert(r == 0);
    graph_close_all(d->graph);
    qmp_farewell(d->qmp);
    chardevs_free(d->chardevs);
    scope_fini(&d->monitors);
    mutex_unlock(&d->qmp->in_band);
    qmp_free(d->qmp);
    exports_free(d->exports);
    jobs_free(d->jobs);
    graph_free(d->graph);
    pidfile_remove(d->pidfile);
    json_object_put(d->persist);
}

static int start(struct start *s, bool *exit, struct error *err)
{
    struct daemon *d = &s->daemon;

    int r = options_apply(&s->options, d, exit, err);
    if (r >= 0 && !*exit && s->options.image_count)
        r = serve_images(d, s->options.images, s->options.image_count, err);
    if (r >= 0 && !*exit && s->options.pidfile)
        r = pidfile_create(s->options.pidfile, &d->pidfile, err);
    return r;
}

static int run(void *arg)
{
    struct start *s = arg;
    struct daemon *d = &s->daemon;
    struct error err = ERROR_INIT;
    bool exit = false;
    SCOPE(signals);

    make_everything(d, s->options.daemonize);
    scope_spawn(&signals, wait_for_signal, d);
    (void)task_yield(); /* who hears that we are ready may send one at once */
    int r = start(s, &exit, &err);
    if (r < 0) {
        log_line(LOG_LEVEL_INFO, "%s", err.text);
    } else if (!exit) {
        process_background_ready();
        exports_set_accepting(d->exports, true);
        chardevs_start(d->chardevs);
        r = event_wait(&d->qmp->quit);
    }
    end_everything(d);
    return r;
}

int main(int argc, char **argv)
{
    struct start s = {.options = {.argc = argc, .argv = argv}};
    struct error err = ERROR_INIT;

    log_set_program("tidemarkd");
    process_keep_memory();
    options_scan(&s.options);
    if (s.options.daemonize && process_background_begin(&err) < 0) {
        log_error("going to the background: %s", err.text);
        return EXIT_FAILURE;
    }
    int r = loop_run(LOOP_AUTO, run, &s);
    if (r < 0 && !s.daemon.graph)
        log_error("no way to wait for I/O: %s", strerror(-r));
    free(s.options.images);
    return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
