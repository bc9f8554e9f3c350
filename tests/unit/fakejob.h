/* A job that does what the test tells it, a stage to put it on, and its events as text. */
#pragma once

#include "unit.h"

#include "job/driver.h"
#include "rt/clock.h"
#include "rt/task.h"
#include "virtual.h"

#include <errno.h>
#include <stdio.h>

/* ---- a job that obeys ---- */

struct fake {
    struct job job;
    bool finish; /* run() returns this soon */
    int result;
    uint64_t linger_ns; /* so long after it has been told to end */
    bool want_ready;
    bool soft_cancel; /* when it is ready, as mirror's: without force it ends well */
    int prepare_result;
    char trace[64]; /* r p c a n l: run, prepare, commit, abort, abort of one that never ran, clean
                     */
};

static char history[4096]; /* the same of all jobs, in their order, "id:p " */
static char last_trace[64];

static inline struct fake *fake_of(struct job *j)
{
    return (struct fake *)j;
}

static inline void note(struct job *j, char c)
{
    char text[32];
    size_t n = strlen(fake_of(j)->trace);
    fake_of(j)->trace[n] = c;
    snprintf(text, sizeof text, "%s:%c ", j->id, c);
    if (strlen(history) + strlen(text) < sizeof history)
        strcat(history, text);
}

static inline void yield(unsigned n)
{
    while (n--) {
        int r = task_yield();
        (void)r;
    }
}

static inline int fake_run(struct job *j, struct error *err)
{
    struct fake *f = fake_of(j);
    note(j, 'r');
    while (!f->finish && !(j->cancelled && !j->force_cancel)) {
        if (f->want_ready && j->status == JOB_RUNNING)
            job_ready(j);
        if (job_idle(j) < 0)
            break;
    }
    if (f->linger_ns)
        assert_int_equal(sleep_until(clock_after_ns(f->linger_ns)), 0);
    return f->finish ? f->result : 0;
}

static inline int fake_prepare(struct job *j, struct error *err)
{
    note(j, 'p');
    yield(1);
    return fake_of(j)->prepare_result;
}

static inline void fake_commit(struct job *j)
{
    note(j, 'c');
    yield(1);
}

static inline void fake_abort(struct job *j)
{
    note(j, j->started ? 'a' : j->held ? 'h' : 'n');
    yield(3);
}

static inline void fake_clean(struct job *j)
{
    note(j, 'l');
    strcpy(last_trace, fake_of(j)->trace);
}

static inline bool fake_cancel(struct job *j, bool force)
{
    bool ready = j->status == JOB_READY || j->status == JOB_STANDBY;
    return force || !fake_of(j)->soft_cancel || !ready;
}

static inline int fake_complete(struct job *j, struct error *err)
{
    fake_of(j)->finish = true;
    job_kick(j);
    return 0;
}

static const struct job_driver fake_driver = {
    .type = "mirror",
    .size = sizeof(struct fake),
    .block_job = true,
    .run = fake_run,
    .prepare = fake_prepare,
    .commit = fake_commit,
    .abort = fake_abort,
    .clean = fake_clean,
    .cancel = fake_cancel,
    .complete = fake_complete,
};

/* ---- the stage ---- */

static struct jobs *js;
static char events[4096];

static inline void on_event(void *opaque, const char *name, struct json_object *data)
{
    char line[256];
    const char *id = json_get_string(data, "id", json_get_string(data, "device", "?"));
    if (strcmp(name, "JOB_STATUS_CHANGE") == 0)
        snprintf(line, sizeof line, "%s:%s ", id, json_get_string(data, "status", "?"));
    else if (json_has(data, "error"))
        snprintf(line, sizeof line, "%s:%s(%s) ", id, name + strlen("BLOCK_JOB_"),
                 json_get_string(data, "error", ""));
    else
        snprintf(line, sizeof line, "%s:%s ", id, name + strlen("BLOCK_JOB_"));
    assert_true(strlen(events) + strlen(line) < sizeof events);
    strcat(events, line);
}

static inline void settle(void)
{
    yield(20);
}

static inline void expect(const char *what)
{
    settle();
    assert_string_equal(events, what);
    events[0] = '\0';
}

static inline void begin(void)
{
    js = jobs_new(NULL);
    jobs_set_listener(js, on_event, NULL);
    events[0] = history[0] = last_trace[0] = '\0';
}

static inline void end(void)
{
    jobs_cancel_all(js);
    jobs_free(js);
}

/* ID is lent for the job's life. */
static inline struct job *make(const char *id, struct job_options o)
{
    struct job *j = NULL;
    struct error err = ERROR_INIT;
    o.id = id;
    if (job_create(js, &fake_driver, &o, &j, &err) < 0)
        fail_msg("%s", err.text);
    return j;
}

static inline void finish(struct job *j, int result)
{
    fake_of(j)->finish = true;
    fake_of(j)->result = result;
    job_kick(j);
}

/* VERB on ID, under the name job-VERB (block-job-VERB where only that exists). */
static inline int verb_text(const char *id, enum job_verb v, const char *text)
{
    struct error err = ERROR_INIT;
    int r;
    if (v == JOB_VERB_CHANGE) {
        CLEANUP(json_putp) struct json_object *options = json_object_new_object();
        json_add_string(options, "id", id);
        json_add_string(options, "type", "mirror");
        r = jobs_change(js, options, &err);
    } else {
        r = v == JOB_VERB_SET_SPEED ? jobs_set_speed(js, id, 7, &err) : jobs_do(js, id, v, &err);
    }
    assert_string_equal(err.text, text);
    return r;
}

static inline void ok(const char *id, enum job_verb v)
{
    assert_int_equal(verb_text(id, v, ""), 0);
}

/* IN_LOOP(name) { ...; return 0; }: a test on an empty stage, in virtual time. */
#define IN_LOOP(name)                                                                              \
    static int name##_body(void);                                                                  \
    static int name##_task(void *arg)                                                              \
    {                                                                                              \
        begin();                                                                                   \
        name##_body();                                                                             \
        end();                                                                                     \
        return 0;                                                                                  \
    }                                                                                              \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
    }                                                                                              \
    static int name##_body(void)
