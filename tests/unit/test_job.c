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

/* ---- every verb in every state ---- */

enum place { /* the states, and who has paused it */
             IN_CREATED,
             IN_RUNNING,
             IN_PAUSED,
             IN_PAUSED_INTERNALLY,
             IN_READY,
             IN_STANDBY,
             IN_STANDBY_INTERNALLY,
             IN_READY_ENDING, /* cancelled without force, and still at it */
             IN_WAITING,
             IN_PENDING,
             IN_CONCLUDED,
             IN_FAILED,
             PLACES,
};

static const struct {
    enum job_status status;
    bool user, internal; /* paused by */
    /* Of `answers`, to: job-cancel, block-job-cancel without force and with it; pause, resume,
     * set-speed, set-speed to -1, complete, finalize, dismiss, change. */
    const char *codes;
} matrix[PLACES] = {
    [IN_CREATED] = {JOB_CREATED, 0, 0, "....r.-NNNx"},
    [IN_RUNNING] = {JOB_RUNNING, 0, 0, "....r.-NNNx"},
    [IN_PAUSED] = {JOB_PAUSED, 1, 0, ".c.p..-NNNx"},
    [IN_PAUSED_INTERNALLY] = {JOB_PAUSED, 0, 1, "....r.-NNNx"},
    [IN_READY] = {JOB_READY, 0, 0, "....r.-.NNx"},
    [IN_STANDBY] = {JOB_STANDBY, 1, 0, ".c.p..-.NNx"},
    [IN_STANDBY_INTERNALLY] = {JOB_STANDBY, 0, 1, "....r.-.NNx"},
    [IN_READY_ENDING] = {JOB_READY, 0, 0, "....r.-fNNx"},
    [IN_WAITING] = {JOB_WAITING, 0, 0, "...NrNNNNNN"},
    [IN_PENDING] = {JOB_PENDING, 0, 0, "...NrNNN.NN"},
    [IN_CONCLUDED] = {JOB_CONCLUDED, 0, 0, "NNNNrNNNN.N"},
    [IN_FAILED] = {JOB_CONCLUDED, 0, 0, "NNNNrNNNN.N"},
};

static const struct {
    char code;
    const char *text;
} answers[] = {
    {'.', ""},   /* taken */
    {'N', NULL}, /* the state does not allow it */
    {'p', "Job is already paused"},
    {'r', "Can't resume a job that was not paused"},
    {'c', "The block job for device 'j' is currently paused"},
    {'f', "The active block job 'j' cannot be completed"},
    {'-', "Parameter 'speed' expects a non-negative value"},
    {'x', "Job type does not support change"},
};

static struct job *job_in(enum place p)
{
    CLEANUP(job_group_unrefp) struct job_group *grp = job_group_new();
    struct job *j =
        make("j", (struct job_options){
                      .manual_finalize = true, .manual_dismiss = true, .speed = 5, .group = grp});
    struct fake *f = fake_of(j);
    enum job_status s = matrix[p].status;
    f->want_ready = s == JOB_READY || s == JOB_STANDBY;
    f->soft_cancel = true;
    if (p == IN_WAITING)
        make("sibling", (struct job_options){.group = grp});
    if (s != JOB_CREATED)
        job_start(j);
    settle();
    if (matrix[p].user)
        ok("j", JOB_VERB_PAUSE);
    if (matrix[p].internal)
        job_pause(j);
    if (p == IN_READY_ENDING) {
        f->linger_ns = 1000000000;
        assert_int_equal(jobs_do_block(js, "j", JOB_VERB_CANCEL, false, NULL), 0);
    }
    if (s == JOB_WAITING || s == JOB_PENDING || s == JOB_CONCLUDED)
        finish(j, p == IN_FAILED ? -ENOSPC : 0);
    settle();
    if (p == IN_CONCLUDED)
        ok("j", JOB_VERB_FINALIZE);
    assert_int_equal(j->status, s);
    events[0] = '\0';
    return j;
}

/* NAME: the verb by one of its names. */
static int by_name(unsigned name, struct error *err)
{
    static const enum job_verb verbs[] = {JOB_VERB_PAUSE, JOB_VERB_RESUME, JOB_VERB_COMPLETE,
                                          JOB_VERB_FINALIZE, JOB_VERB_DISMISS};
    switch (name) {
    case 0:
        return jobs_do(js, "j", JOB_VERB_CANCEL, err);
    case 1:
    case 2:
        return jobs_do_block(js, "j", JOB_VERB_CANCEL, name == 2, err);
    case 3:
        return jobs_set_speed(js, "j", 7, err);
    case 4:
        return jobs_set_speed(js, "j", -1, err);
    case 5: {
        CLEANUP(json_putp) struct json_object *options = json_object_new_object();
        json_add_string(options, "id", "j");
        json_add_string(options, "type", "mirror");
        return jobs_change(js, options, err);
    }
    default:
        return name % 2 ? jobs_do_block(js, "j", verbs[(name - 6) / 2], false, err)
                        : jobs_do(js, "j", verbs[(name - 6) / 2], err);
    }
}

enum { NAMES = 16 };

/* What taking it must lead to, once the loop has gone round. */
static void check_taken(enum place p, unsigned name, struct job *j)
{
    bool was_ready = matrix[p].status == JOB_READY || matrix[p].status == JOB_STANDBY;
    enum job_status paused = was_ready ? JOB_STANDBY : JOB_PAUSED;
    const char *ended = "";
    switch (name) {
    case 0:
    case 2:
        ended = "j:CANCELLED j:concluded ";
        break;
    case 1: /* a gentle cancel of a ready one lets it end well, when it is not held up */
        ended = !was_ready ? "j:CANCELLED j:concluded " : "";
        if (was_ready)
            assert_true(j->cancelled && !j->force_cancel);
        if (p == IN_READY || p == IN_READY_ENDING)
            assert_int_equal(j->status, JOB_PENDING);
        break;
    case 3:
        assert_int_equal(j->speed, 7);
        break;
    case 6: /* pause */
    case 7:
        assert_true(j->user_paused);
        if (p == IN_RUNNING || p == IN_READY || matrix[p].internal)
            assert_int_equal(j->status, paused);
        assert_int_equal(j->pause_count, 1 + (matrix[p].internal || p == IN_CREATED));
        break;
    case 8: /* resume */
    case 9:
        assert_int_equal(j->status, was_ready ? JOB_READY : JOB_RUNNING);
        break;
    case 10: /* complete */
    case 11:
        assert_int_equal(j->status, p == IN_READY ? JOB_PENDING : JOB_STANDBY);
        break;
    case 12: /* finalize */
    case 13:
        assert_string_equal(events, "j:COMPLETED j:concluded ");
        break;
    case 14: /* dismiss */
    case 15:
        assert_string_equal(events, "j:null ");
        break;
    }
    if (p == IN_CREATED && *ended)
        ended = "j:concluded "; /* one that never ran says nothing of it */
    assert_non_null(strstr(events, ended));
}

IN_LOOP(each_verb_in_each_state_by_each_name)
{
    for (int p = 0; p < PLACES; p++) {
        static const unsigned which[NAMES] = {0, 1, 2, 5, 6, 10, 3, 3, 4, 4, 7, 7, 8, 8, 9, 9};
        static const char *const verbs[NAMES] = {
            "cancel",   "cancel",   "cancel",  "set-speed", "set-speed", "change",
            "pause",    "pause",    "resume",  "resume",    "complete",  "complete",
            "finalize", "finalize", "dismiss", "dismiss",
        };
        for (unsigned name = 0; name < NAMES; name++) {
            struct error err = ERROR_INIT;
            struct job *j = job_in((enum place)p);
            enum job_status was = j->status;
            char text[200] = "no such code", code = matrix[p].codes[which[name]];
            for (unsigned i = 0; i < ARRAY_SIZE(answers); i++) {
                if (answers[i].code == code && answers[i].text)
                    strcpy(text, answers[i].text);
            }
            if (code == 'N')
                snprintf(text, sizeof text, "Job 'j' in state '%s' cannot accept command verb '%s'",
                         job_status_name(was), verbs[name]);
            job_ref(j);
            int r = by_name(name, &err);
            if (strcmp(err.text, text) != 0 || (r == 0) != (code == '.'))
                fail_msg("%s %s by name %u: %d '%s'", job_status_name(was), verbs[name], name, r,
                         err.text);
            settle();
            if (r == 0) {
                if (p == IN_READY_ENDING)
                    assert_int_equal(sleep_until(clock_after_ns(2000000000)), 0);
                check_taken((enum place)p, name, j);
            } else {
                assert_string_equal(events, "");
                assert_int_equal(j->status, was);
                assert_int_equal(j->speed, 5);
                assert_int_equal(j->user_paused, matrix[p].user);
            }
            jobs_cancel_all(js);
            job_unref(j);
            error_clear(&err);
            assert_true(by_name(name, &err) < 0);
            bool block = name == 1 || name == 2 || name == 3 || name == 4 || name == 5 ||
                         (name > 5 && name % 2);
            assert_string_equal(err.text, block ? "Block job 'j' not found" : "Job not found");
            assert_int_equal(err.class, block ? ERROR_DEVICE_NOT_ACTIVE : ERROR_GENERIC);
        }
    }
    return 0;
}

/* What queries tell of a job in each state. */
IN_LOOP(each_state_in_queries)
{
    for (int p = 0; p < PLACES; p++) {
        job_in((enum place)p);
        CLEANUP(json_putp) struct json_object *list = jobs_query(js);
        CLEANUP(json_putp) struct json_object *block = jobs_query_block(js);
        size_t last = json_object_array_length(list) - 1; /* the oldest */
        struct json_object *info = json_object_array_get_idx(list, last);
        struct json_object *binfo = json_object_array_get_idx(block, last);
        enum job_status s = matrix[p].status;
        assert_string_equal(json_get_string(info, "id", ""), "j");
        assert_string_equal(json_get_string(binfo, "device", ""), "j");
        assert_string_equal(json_get_string(info, "status", ""), job_status_name(s));
        assert_string_equal(json_get_string(binfo, "status", ""), job_status_name(s));
        assert_int_equal(json_get_bool(binfo, "paused", false),
                         matrix[p].user || matrix[p].internal || s == JOB_CREATED);
        assert_int_equal(json_get_bool(binfo, "ready", false), s == JOB_READY || s == JOB_STANDBY);
        assert_string_equal(json_get_string(binfo, "io-status", ""), "ok");
        assert_false(json_get_bool(binfo, "auto-finalize", true));
        assert_false(json_get_bool(binfo, "auto-dismiss", true));
        const char *error = p == IN_FAILED ? "No space left on device" : "";
        assert_string_equal(json_get_string(info, "error", ""), error);
        assert_string_equal(json_get_string(binfo, "error", ""), error);
        assert_int_equal(json_has(binfo, "error"), p == IN_FAILED);
        jobs_cancel_all(js);
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
    unsigned name;
    int result;
    bool answered;
    struct error err;
};

static int late_verb_task(void *arg)
{
    struct late_verb *lv = arg;
    lv->result = by_name(lv->name, &lv->err);
    lv->answered = true;
    return 0;
}

/* JOB is about to end; once it is in STATUS every verb comes, and waits until it has ended. */
static void late_verbs(struct job *j, enum job_status status, bool dismissed)
{
    struct late_verb lv[NAMES];
    SCOPE(others);
    while (j->status != status)
        yield(1);
    for (unsigned i = 0; i < NAMES; i++) {
        lv[i] = (struct late_verb){.name = i};
        scope_spawn(&others, late_verb_task, &lv[i]);
    }
    yield(1);
    for (unsigned i = 0; i < NAMES; i++)
        assert_false(lv[i].answered);
    assert_int_equal(scope_join(&others), 0);
    for (unsigned i = 0; i < NAMES; i++) {
        const char *state = strstr(lv[i].err.text, "'concluded'");
        if (dismissed)
            assert_non_null(strstr(lv[i].err.text, "ob not found")
                                ?: strstr(lv[i].err.text, "ob 'j' not found"));
        else if (i == 8 || i == 9)
            assert_string_equal(lv[i].err.text, "Can't resume a job that was not paused");
        else if (i == 14)
            assert_int_equal(lv[i].result, 0);
        else
            assert_non_null(i == 15 ? strstr(lv[i].err.text, "ob 'j' not found") : state);
    }
}

IN_LOOP(verbs_wait_for_a_job_that_is_being_concluded)
{
    for (int dismissed = 0; dismissed < 2; dismissed++) {
        struct job *j = make("j", (struct job_options){.manual_dismiss = !dismissed});
        job_start(j);
        settle();
        events[0] = '\0';
        finish(j, 0);
        late_verbs(j, JOB_PENDING, dismissed);
        expect("j:waiting j:pending j:COMPLETED j:concluded j:null ");
    }
    return 0;
}

IN_LOOP(verbs_wait_for_a_job_that_is_being_aborted)
{
    for (int dismissed = 0; dismissed < 2; dismissed++) {
        struct job *j = make("j", (struct job_options){.manual_dismiss = !dismissed});
        job_start(j);
        settle();
        events[0] = '\0';
        finish(j, -EIO);
        late_verbs(j, JOB_ABORTING, dismissed);
        expect("j:aborting j:COMPLETED(Input/output error) j:concluded j:null ");
    }
    return 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_tables_are_qemus),
    cmocka_unit_test(each_verb_in_each_state_by_each_name),
    cmocka_unit_test(each_state_in_queries),
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
    cmocka_unit_test(verbs_wait_for_a_job_that_is_being_concluded),
    cmocka_unit_test(verbs_wait_for_a_job_that_is_being_aborted),
};

UNIT_MAIN(tests)
