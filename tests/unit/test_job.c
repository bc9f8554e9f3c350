/* The state machine of jobs against QEMU's tables, the verbs, the events in their order, and the
 * groups, with a job that does what the test tells it. */
#include "unit.h"

#include "job/driver.h"
#include "rt/task.h"

#include <errno.h>
#include <stdio.h>

/* ---- a job that obeys ---- */

struct fake {
    struct job job;
    bool finish; /* run() returns this soon */
    int result;
    bool want_ready;
    int prepare_result;
    char trace[64]; /* r p c a l: run, prepare, commit, abort, clean */
};

static struct fake *fake_of(struct job *j)
{
    return (struct fake *)j;
}

static void note(struct job *j, char c)
{
    size_t n = strlen(fake_of(j)->trace);
    fake_of(j)->trace[n] = c;
}

static int fake_run(struct job *j, struct error *err)
{
    struct fake *f = fake_of(j);
    note(j, 'r');
    while (!f->finish) {
        if (f->want_ready && j->status == JOB_RUNNING)
            job_ready(j);
        if (job_idle(j) < 0)
            return 0;
    }
    return f->result;
}

static int fake_prepare(struct job *j, struct error *err)
{
    note(j, 'p');
    int r = task_yield();
    (void)r;
    return fake_of(j)->prepare_result;
}

static void fake_commit(struct job *j)
{
    note(j, 'c');
    int r = task_yield();
    (void)r;
}

static void fake_abort(struct job *j)
{
    note(j, j->started ? 'a' : 'n');
    for (int i = 0; i < 3; i++) {
        int r = task_yield();
        (void)r;
    }
}

static char last_trace[64];

static void fake_clean(struct job *j)
{
    note(j, 'l');
    strcpy(last_trace, fake_of(j)->trace);
}

static bool fake_cancel(struct job *j, bool force)
{
    return true;
}

static int fake_complete(struct job *j, struct error *err)
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

static void listen(void *opaque, const char *name, struct json_object *data)
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

static void settle(void)
{
    for (int i = 0; i < 20; i++)
        assert_int_equal(task_yield(), 0);
}

static void expect(const char *what)
{
    settle();
    assert_string_equal(events, what);
    events[0] = '\0';
}

static void begin(void)
{
    js = jobs_new(NULL);
    jobs_set_listener(js, listen, NULL);
    events[0] = last_trace[0] = '\0';
}

static void end(void)
{
    jobs_cancel_all(js);
    jobs_free(js);
}

static struct job *make(const char *id, struct job_options o)
{
    struct job *j = NULL;
    struct error err = ERROR_INIT;
    o.id = id;
    if (job_create(js, &fake_driver, &o, &j, &err) < 0)
        fail_msg("%s", err.text);
    return j;
}

static void finish(struct job *j, int result)
{
    fake_of(j)->finish = true;
    fake_of(j)->result = result;
    job_kick(j);
}

static int verb_text(const char *id, enum job_verb v, const char *text)
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

static void ok(const char *id, enum job_verb v)
{
    assert_int_equal(verb_text(id, v, ""), 0);
}

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
        assert_int_equal(loop_run(LOOP_AUTO, name##_task, NULL), 0);                               \
    }                                                                                              \
    static int name##_body(void)

/* ---- the tables, as QEMU 7.2 has them ---- */

static void the_tables_are_qemus(void **state)
{
    /* From the row's status to U C R P Y S W D X E N, in the order of enum JobStatus. */
    static const char *const moves[] = {
        "01000000000", "00100000101", "00011010100", "00100000000", "00000110100", "00001000000",
        "00000001100", "00000000110", "00000000110", "00000000001", "00000000000",
    };
    static const char *const verbs[] = {
        [JOB_VERB_CANCEL] = "01111111000",   [JOB_VERB_PAUSE] = "01111100000",
        [JOB_VERB_RESUME] = "01111100000",   [JOB_VERB_SET_SPEED] = "01111100000",
        [JOB_VERB_COMPLETE] = "00001100000", [JOB_VERB_FINALIZE] = "00000001000",
        [JOB_VERB_DISMISS] = "00000000010",  [JOB_VERB_CHANGE] = "01111100000", /* 8.2 */
    };
    for (int from = 0; from < JOB_STATUSES; from++) {
        for (int to = 0; to < JOB_STATUSES; to++)
            assert_int_equal(job_may_become(from, to), moves[from][to] == '1');
    }
    for (int v = 0; v < JOB_VERBS; v++) {
        for (int s = 0; s < JOB_STATUSES; s++)
            assert_int_equal(job_accepts(s, v), verbs[v][s] == '1');
    }
}

/* Brings a new job into STATUS. */
static struct job *job_in(enum job_status status)
{
    struct job *j = make(
        "j", (struct job_options){.manual_finalize = true, .manual_dismiss = true, .speed = 5});
    struct fake *f = fake_of(j);
    if (status == JOB_CREATED)
        return j;
    f->want_ready = status == JOB_READY || status == JOB_STANDBY;
    job_start(j);
    settle();
    if (status == JOB_PAUSED || status == JOB_STANDBY)
        ok("j", JOB_VERB_PAUSE);
    if (status == JOB_PENDING || status == JOB_CONCLUDED)
        finish(j, 0);
    settle();
    if (status == JOB_CONCLUDED)
        ok("j", JOB_VERB_FINALIZE);
    assert_int_equal(j->status, status);
    return j;
}

IN_LOOP(each_verb_in_each_state)
{
    static const enum job_status reachable[] = {
        JOB_CREATED, JOB_RUNNING, JOB_PAUSED, JOB_READY, JOB_STANDBY, JOB_PENDING, JOB_CONCLUDED,
    };
    for (unsigned i = 0; i < ARRAY_SIZE(reachable); i++) {
        for (int v = 0; v < JOB_VERBS; v++) {
            enum job_status s = reachable[i];
            struct job *j = job_in(s);
            bool paused = s == JOB_PAUSED || s == JOB_STANDBY;
            char text[200] = "";
            if (v == JOB_VERB_RESUME && !paused)
                strcpy(text, "Can't resume a job that was not paused");
            else if (!job_accepts(s, v))
                snprintf(text, sizeof text, "Job 'j' in state '%s' cannot accept command verb '%s'",
                         job_status_name(s), job_verb_name(v));
            else if (v == JOB_VERB_PAUSE && paused)
                strcpy(text, "Job is already paused");
            else if (v == JOB_VERB_CHANGE)
                strcpy(text, "Job type does not support change");
            int r = verb_text("j", v, text);
            assert_int_equal(r == 0, text[0] == '\0');
            if (r == 0 && v == JOB_VERB_SET_SPEED)
                assert_int_equal(j->speed, 7);
            jobs_cancel_all(js);
            bool block = v == JOB_VERB_SET_SPEED || v == JOB_VERB_CHANGE;
            verb_text("j", v, block ? "Block job 'j' not found" : "Job not found");
            events[0] = '\0';
        }
    }
    return 0;
}

/* ---- lives ---- */

IN_LOOP(a_job_succeeds)
{
    struct job *j = make("j", (struct job_options){0});
    expect("j:created ");
    job_start(j);
    expect("j:running ");
    finish(j, 0);
    expect("j:waiting j:pending j:COMPLETED j:concluded j:null ");
    assert_string_equal(last_trace, "rpcl");
    return 0;
}

IN_LOOP(a_job_fails)
{
    struct job *j = make("j", (struct job_options){.manual_dismiss = true});
    job_start(j);
    finish(j, -ENOSPC);
    expect("j:created j:running j:aborting j:COMPLETED(No space left on device) j:concluded ");
    assert_string_equal(last_trace, "ral");
    struct json_object *list = jobs_query_block(js);
    assert_string_equal(json_get_string(json_object_array_get_idx(list, 0), "error", ""),
                        "No space left on device");
    json_object_put(list);
    ok("j", JOB_VERB_DISMISS);
    expect("j:null ");
    return 0;
}

IN_LOOP(a_job_fails_at_the_last_moment)
{
    struct job *j = make("j", (struct job_options){0});
    fake_of(j)->prepare_result = -EIO;
    job_start(j);
    finish(j, 0);
    expect("j:created j:running j:waiting j:pending j:aborting j:COMPLETED(Input/output error) "
           "j:concluded j:null ");
    assert_string_equal(last_trace, "rpal");
    return 0;
}

IN_LOOP(a_job_is_cancelled_while_it_runs)
{
    struct job *j = make("j", (struct job_options){0});
    job_start(j);
    settle();
    ok("j", JOB_VERB_CANCEL);
    expect("j:created j:running j:aborting j:CANCELLED j:concluded j:null ");
    assert_string_equal(last_trace, "ral");
    return 0;
}

IN_LOOP(a_job_that_never_started_says_nothing)
{
    make("j", (struct job_options){0});
    ok("j", JOB_VERB_CANCEL);
    expect("j:created j:aborting j:concluded j:null ");
    assert_string_equal(last_trace, "nl");
    return 0;
}

IN_LOOP(a_pending_job_is_cancelled)
{
    struct job *j = make("j", (struct job_options){.manual_finalize = true});
    job_start(j);
    finish(j, 0);
    expect("j:created j:running j:waiting j:pending j:PENDING ");
    ok("j", JOB_VERB_CANCEL);
    expect("j:aborting j:CANCELLED j:concluded j:null ");
    assert_string_equal(last_trace, "ral");
    return 0;
}

IN_LOOP(a_paused_job_is_cancelled)
{
    struct job *j = make("j", (struct job_options){0});
    job_start(j);
    settle();
    ok("j", JOB_VERB_PAUSE);
    expect("j:created j:running j:paused ");
    struct error err = ERROR_INIT;
    assert_true(jobs_do_block(js, "j", JOB_VERB_CANCEL, false, &err) < 0);
    assert_string_equal(err.text, "The block job for device 'j' is currently paused");
    assert_int_equal(jobs_do_block(js, "j", JOB_VERB_CANCEL, true, NULL), 0);
    expect("j:running j:aborting j:CANCELLED j:concluded j:null ");
    return 0;
}

IN_LOOP(the_users_pause_is_not_the_machines)
{
    struct job *j = make("j", (struct job_options){0});
    job_start(j);
    settle();
    events[0] = '\0';
    job_pause(j);
    expect("j:paused ");
    assert_int_not_equal(verb_text("j", JOB_VERB_RESUME, "Can't resume a job that was not paused"),
                         0);
    ok("j", JOB_VERB_PAUSE);
    job_resume(j);
    expect("");
    ok("j", JOB_VERB_RESUME);
    expect("j:running ");
    return 0;
}

IN_LOOP(an_error_that_stops_shows_its_status_until_resumed)
{
    struct job *j = make("j", (struct job_options){0});
    job_start(j);
    settle();
    events[0] = '\0';
    assert_true(job_go_on_after(j, JOB_ON_ERROR_AUTO, false, ENOSPC));
    assert_string_equal(job_io_status_name(j), "nospace");
    job_kick(j);
    expect("j:ERROR j:paused ");
    assert_true(job_go_on_after(j, JOB_ON_ERROR_STOP, true, EIO));
    assert_string_equal(job_io_status_name(j), "nospace");
    assert_int_equal(j->pause_count, 1);
    ok("j", JOB_VERB_RESUME);
    assert_string_equal(job_io_status_name(j), "ok");
    expect("j:ERROR j:running ");
    assert_false(job_go_on_after(j, JOB_ON_ERROR_ENOSPC, true, EIO));
    assert_true(job_go_on_after(j, JOB_ON_ERROR_IGNORE, true, EIO));
    assert_int_equal(j->pause_count, 0);
    events[0] = '\0';
    return 0;
}

IN_LOOP(ids_are_checked)
{
    struct job *j;
    static const struct {
        const char *id, *text;
    } cases[] = {
        {NULL, "An explicit job ID is required"},
        {"", "Invalid job ID ''"},
        {"1a", "Invalid job ID '1a'"},
        {"a b", "Invalid job ID 'a b'"},
        {"#block1", "Invalid job ID '#block1'"},
        {"dup", "Job ID 'dup' already in use"},
        {"neg", "Parameter 'speed' expects a non-negative value"},
    };
    make("dup", (struct job_options){0});
    events[0] = '\0';
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct error err = ERROR_INIT;
        struct job_options o = {.id = cases[i].id, .speed = i == 6 ? -1 : 0};
        assert_true(job_create(js, &fake_driver, &o, &j, &err) < 0);
        assert_string_equal(err.text, cases[i].text);
    }
    expect("neg:created neg:null ");
    struct error err = ERROR_INIT;
    assert_true(jobs_do_block(js, "x", JOB_VERB_PAUSE, false, &err) < 0);
    assert_string_equal(err.text, "Block job 'x' not found");
    assert_int_equal(err.class, ERROR_DEVICE_NOT_ACTIVE);
    return 0;
}

IN_LOOP(queries_list_the_newest_first)
{
    make("a", (struct job_options){.speed = 9});
    make("b", (struct job_options){.manual_finalize = true});
    struct json_object *list = jobs_query(js);
    assert_int_equal(json_object_array_length(list), 2);
    struct json_object *b = json_object_array_get_idx(list, 0);
    assert_string_equal(json_get_string(b, "id", ""), "b");
    assert_string_equal(json_get_string(b, "type", ""), "mirror");
    assert_false(json_has(b, "error"));
    json_object_put(list);
    list = jobs_query_block(js);
    struct json_object *a = json_object_array_get_idx(list, 1);
    assert_string_equal(json_get_string(a, "device", ""), "a");
    assert_int_equal(json_get_int(a, "speed", 0), 9);
    assert_true(json_get_bool(a, "auto-finalize", false));
    assert_string_equal(json_get_string(a, "io-status", ""), "ok");
    json_object_put(list);
    return 0;
}

/* ---- groups ---- */

static struct job *a, *b;

static void pair(bool manual_a, bool manual_b)
{
    struct job_group *grp = job_group_new();
    a = make("a", (struct job_options){.group = grp, .manual_finalize = manual_a});
    b = make("b", (struct job_options){.group = grp, .manual_finalize = manual_b});
    job_group_unref(grp);
}

static void start_pair(bool manual_a, bool manual_b)
{
    pair(manual_a, manual_b);
    job_start(a);
    job_start(b);
    settle();
    events[0] = '\0';
}

IN_LOOP(a_pair_waits_for_both)
{
    start_pair(false, false);
    finish(a, 0);
    expect("a:waiting ");
    finish(b, 0);
    expect("b:waiting b:pending a:pending b:COMPLETED b:concluded b:null a:COMPLETED a:concluded "
           "a:null ");
    return 0;
}

IN_LOOP(one_fails_and_the_other_is_cancelled)
{
    start_pair(false, false);
    finish(b, -EIO);
    expect("b:aborting a:aborting b:COMPLETED(Input/output error) b:concluded b:null a:CANCELLED "
           "a:concluded a:null ");
    return 0;
}

IN_LOOP(one_fails_while_the_other_waits)
{
    start_pair(false, false);
    finish(a, 0);
    expect("a:waiting ");
    finish(b, -EIO);
    expect("b:aborting b:COMPLETED(Input/output error) b:concluded b:null a:aborting a:CANCELLED "
           "a:concluded a:null ");
    return 0;
}

IN_LOOP(both_fail_at_the_same_moment)
{
    start_pair(false, false);
    finish(a, -EIO);
    finish(b, -ENOSPC);
    settle();
    assert_true(strstr(events, "a:aborting "));
    assert_true(strstr(events, "b:aborting "));
    assert_true(strstr(events, "a:null "));
    assert_true(strstr(events, "b:null "));
    assert_null(strstr(events, "waiting"));
    return 0;
}

IN_LOOP(a_waiting_job_is_cancelled)
{
    start_pair(false, false);
    finish(a, 0);
    expect("a:waiting ");
    ok("a", JOB_VERB_CANCEL);
    settle();
    assert_true(strstr(events, "a:CANCELLED"));
    assert_true(strstr(events, "b:CANCELLED"));
    return 0;
}

IN_LOOP(finalize_of_any_member_finalizes_all)
{
    start_pair(true, false);
    finish(a, 0);
    finish(b, 0);
    settle();
    assert_true(strstr(events, "a:PENDING"));
    assert_null(strstr(events, "b:PENDING"));
    assert_null(strstr(events, "concluded"));
    events[0] = '\0';
    ok("b", JOB_VERB_FINALIZE);
    expect("b:COMPLETED b:concluded b:null a:COMPLETED a:concluded a:null ");
    return 0;
}

IN_LOOP(one_cannot_be_prepared_and_none_commits)
{
    start_pair(true, true);
    fake_of(a)->prepare_result = -EIO;
    finish(a, 0);
    finish(b, 0);
    settle();
    events[0] = '\0';
    ok("b", JOB_VERB_FINALIZE);
    settle();
    assert_true(strstr(events, "a:COMPLETED(Input/output error)"));
    assert_true(strstr(events, "b:CANCELLED"));
    return 0;
}

IN_LOOP(one_ends_before_its_sibling_starts)
{
    pair(false, false);
    events[0] = '\0';
    job_start(a);
    finish(a, 0);
    expect("a:running a:waiting ");
    job_start(b);
    finish(b, 0);
    settle();
    assert_true(strstr(events, "a:COMPLETED"));
    assert_true(strstr(events, "b:COMPLETED"));
    return 0;
}

IN_LOOP(a_failure_before_its_sibling_starts)
{
    pair(false, false);
    events[0] = '\0';
    job_start(a);
    finish(a, -EIO);
    expect("a:running a:aborting b:aborting b:concluded b:null a:COMPLETED(Input/output error) "
           "a:concluded a:null ");
    return 0;
}

IN_LOOP(a_paused_member_lets_itself_be_cancelled)
{
    start_pair(false, false);
    ok("a", JOB_VERB_PAUSE);
    settle();
    finish(b, -EIO);
    settle();
    assert_true(strstr(events, "a:paused b:aborting a:running a:aborting "));
    assert_true(strstr(events, "a:CANCELLED"));
    return 0;
}

struct late_verb {
    int result;
    struct error err;
};

static int late_verb_task(void *arg)
{
    struct late_verb *lv = arg;
    lv->result = jobs_do(js, "j", JOB_VERB_CANCEL, &lv->err);
    return 0;
}

IN_LOOP(a_verb_waits_for_a_job_that_is_being_concluded)
{
    struct job *j = make("j", (struct job_options){0});
    struct late_verb lv = {.result = 1};
    SCOPE(others);
    job_start(j);
    settle();
    finish(j, 0);
    while (j->status != JOB_PENDING) /* prepare and commit have waits of their own */
        assert_int_equal(task_yield(), 0);
    scope_spawn(&others, late_verb_task, &lv);
    expect("j:created j:running j:waiting j:pending j:COMPLETED j:concluded j:null ");
    assert_int_equal(scope_join(&others), 0);
    assert_string_equal(lv.err.text, "Job not found");
    return 0;
}

IN_LOOP(a_verb_waits_for_a_job_that_is_being_aborted)
{
    struct job *j = make("j", (struct job_options){0});
    struct late_verb lv = {.result = 1};
    SCOPE(others);
    job_start(j);
    settle();
    finish(j, -EIO);
    while (j->status != JOB_ABORTING)
        assert_int_equal(task_yield(), 0);
    scope_spawn(&others, late_verb_task, &lv);
    settle();
    assert_int_equal(scope_join(&others), 0);
    assert_string_equal(lv.err.text, "Job not found");
    return 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_tables_are_qemus),
    cmocka_unit_test(each_verb_in_each_state),
    cmocka_unit_test(a_job_succeeds),
    cmocka_unit_test(a_job_fails),
    cmocka_unit_test(a_job_fails_at_the_last_moment),
    cmocka_unit_test(a_job_is_cancelled_while_it_runs),
    cmocka_unit_test(a_job_that_never_started_says_nothing),
    cmocka_unit_test(a_pending_job_is_cancelled),
    cmocka_unit_test(a_paused_job_is_cancelled),
    cmocka_unit_test(the_users_pause_is_not_the_machines),
    cmocka_unit_test(an_error_that_stops_shows_its_status_until_resumed),
    cmocka_unit_test(ids_are_checked),
    cmocka_unit_test(queries_list_the_newest_first),
    cmocka_unit_test(a_pair_waits_for_both),
    cmocka_unit_test(one_fails_and_the_other_is_cancelled),
    cmocka_unit_test(one_fails_while_the_other_waits),
    cmocka_unit_test(both_fail_at_the_same_moment),
    cmocka_unit_test(a_waiting_job_is_cancelled),
    cmocka_unit_test(finalize_of_any_member_finalizes_all),
    cmocka_unit_test(one_cannot_be_prepared_and_none_commits),
    cmocka_unit_test(one_ends_before_its_sibling_starts),
    cmocka_unit_test(a_failure_before_its_sibling_starts),
    cmocka_unit_test(a_paused_member_lets_itself_be_cancelled),
    cmocka_unit_test(a_verb_waits_for_a_job_that_is_being_concluded),
    cmocka_unit_test(a_verb_waits_for_a_job_that_is_being_aborted),
};

UNIT_MAIN(tests)
