/* The state machine of jobs against QEMU's tables, the verbs, and the events in their order, with a
 * job that does what the test tells it. Groups: test_job_group.c. */
#include "fakejob.h"

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

/* ---- verbs in the middle of an end ---- */

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
    cmocka_unit_test(a_verb_waits_for_a_job_that_is_being_concluded),
    cmocka_unit_test(a_verb_waits_for_a_job_that_is_being_aborted),
};

UNIT_MAIN(tests)
