/* Groups of jobs by themselves: members wait for each other, end alike, and report in a known
 * order, in whatever state each is when something happens. Jobs that obey, in virtual time. */
#include "fakejob.h"
#include "seed.h"

enum { MOST = 3 };
static const char *const ids[MOST] = {"a", "b", "c"};
static struct job *member[MOST];
static struct job *a, *b; /* the first two */

/* ---- a group ---- */

struct member_options {
    bool manual_finalize, manual_dismiss;
};

static void group_of(unsigned n, const struct member_options *o)
{
    CLEANUP(job_group_unrefp) struct job_group *grp = job_group_new();
    for (unsigned i = 0; i < n; i++)
        member[i] = make(ids[i], (struct job_options){.group = grp,
                                                      .manual_finalize = o[i].manual_finalize,
                                                      .manual_dismiss = o[i].manual_dismiss});
    a = member[0];
    b = member[1];
}

static void pair(bool manual_a, bool manual_b)
{
    group_of(
        2, (struct member_options[]){{.manual_finalize = manual_a}, {.manual_finalize = manual_b}});
}

static void start_pair(bool manual_a, bool manual_b)
{
    pair(manual_a, manual_b);
    job_start(a);
    job_start(b);
    settle();
    events[0] = '\0';
}

/* Brings a created member to STATUS; waiting becomes pending when it is the last. */
static void bring(struct job *j, enum job_status status)
{
    if (status == JOB_CREATED)
        return;
    fake_of(j)->want_ready = status == JOB_READY || status == JOB_STANDBY;
    job_start(j);
    settle();
    if (status == JOB_PAUSED || status == JOB_STANDBY)
        ok(j->id, JOB_VERB_PAUSE);
    if (status == JOB_WAITING)
        finish(j, 0);
    settle();
}

/* What has been said of ID, without its name. */
static const char *events_of(const char *id)
{
    static char text[1024];
    CLEANUP(memory_freep) char *copy = xstrdup(events);
    size_t n = strlen(id);
    text[0] = '\0';
    for (char *p = copy, *next; *p; p = next) {
        /* Names have no blanks, but texts of errors have. */
        next = p + 1;
        while (*next && !(next[-1] == ' ' && strchr("abc", next[0]) && next[1] == ':'))
            next++;
        if (strncmp(p, id, n) == 0 && p[n] == ':')
            strncat(text, p + n + 1, (size_t)(next - p) - n - 1);
    }
    return text;
}

static void expect_of(const char *id, const char *what, const char *where)
{
    if (strcmp(events_of(id), what) != 0)
        fail_msg("%s: of %s came '%s', not '%s'; all: %s", where, id, events_of(id), what, events);
}

/* Has anybody done this: ":c ", committed? */
static bool did(const char *what)
{
    return strstr(history, what);
}

static unsigned count_jobs(void)
{
    unsigned n = 0;
    struct job *j;
    TAILQ_FOREACH (j, &js->list, in_jobs)
        n++;
    return n;
}

/* ---- in short ---- */

IN_LOOP(a_pair_waits_for_both)
{
    start_pair(false, false);
    finish(a, 0);
    expect("a:waiting ");
    finish(b, 0);
    expect("b:waiting b:pending a:pending b:COMPLETED b:concluded b:null a:COMPLETED a:concluded "
           "a:null ");
    assert_string_equal(history, "a:r b:r b:p a:p b:c b:l a:c a:l ");
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

IN_LOOP(a_waiting_job_is_cancelled)
{
    start_pair(false, false);
    finish(a, 0);
    expect("a:waiting ");
    ok("a", JOB_VERB_CANCEL);
    expect("b:aborting b:CANCELLED b:concluded b:null a:aborting a:CANCELLED a:concluded a:null ");
    return 0;
}

IN_LOOP(a_pending_member_is_cancelled)
{
    start_pair(true, true);
    finish(a, 0);
    finish(b, 0);
    expect("a:waiting b:waiting b:pending b:PENDING a:pending a:PENDING ");
    ok("a", JOB_VERB_CANCEL);
    expect("b:aborting b:CANCELLED b:concluded b:null a:aborting a:CANCELLED a:concluded a:null ");
    assert_false(did(":p "));
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
    expect("b:running b:waiting b:pending a:pending b:COMPLETED b:concluded b:null a:COMPLETED "
           "a:concluded a:null ");
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
    expect("a:paused b:aborting a:running a:aborting b:COMPLETED(Input/output error) b:concluded "
           "b:null a:CANCELLED a:concluded a:null ");
    return 0;
}

/* ---- one ends badly, in each state of each ---- */

enum how { BY_JOB_CANCEL, BY_BLOCK_JOB_CANCEL, BY_FAILURE, HOWS };

/* What is to be said of a job from STATUS on. */
static const char *the_end(enum job_status status, bool failed, bool dismissed)
{
    static char text[128];
    bool started = status != JOB_CREATED;
    snprintf(text, sizeof text, "%saborting %sconcluded %s",
             status == JOB_PAUSED    ? "running "
             : status == JOB_STANDBY ? "ready "
                                     : "",
             !started ? ""
             : failed ? "COMPLETED(Input/output error) "
                      : "CANCELLED ",
             dismissed || !started ? "null " : "");
    return text;
}

static void check_query(const struct job *j, const char *error)
{
    CLEANUP(json_putp) struct json_object *list = jobs_query(js);
    for (size_t i = 0; i < json_object_array_length(list); i++) {
        struct json_object *info = json_object_array_get_idx(list, i);
        if (strcmp(json_get_string(info, "id", ""), j->id) == 0) {
            assert_string_equal(json_get_string(info, "status", ""), job_status_name(j->status));
            assert_string_equal(json_get_string(info, "error", ""), error);
            return;
        }
    }
    fail_msg("'%s' is not listed", j->id);
}

static void end_badly(unsigned n, const enum job_status *status, unsigned victim, enum how how,
                      bool manual_dismiss)
{
    char where[128] = "";
    struct member_options o[MOST];
    enum job_status was[MOST];
    for (unsigned i = 0; i < n; i++)
        o[i] = (struct member_options){true, manual_dismiss};
    group_of(n, o);
    for (unsigned i = 0; i < n; i++)
        bring(member[i], status[i]);
    for (unsigned i = 0; i < n; i++) {
        was[i] = member[i]->status;
        snprintf(where + strlen(where), 16, "%s ", job_status_name(was[i]));
    }
    snprintf(where + strlen(where), 32, "victim %u how %d", victim, (int)how);
    events[0] = history[0] = '\0';

    if (how == BY_JOB_CANCEL)
        ok(ids[victim], JOB_VERB_CANCEL);
    else if (how == BY_BLOCK_JOB_CANCEL)
        assert_int_equal(jobs_do_block(js, ids[victim], JOB_VERB_CANCEL, true, NULL), 0);
    else
        finish(member[victim], -EIO);
    settle();
    yield(20);
    for (unsigned i = 0; i < n; i++) {
        bool failed = how == BY_FAILURE && i == victim;
        expect_of(ids[i], the_end(was[i], failed, !manual_dismiss), where);
        if (was[i] != JOB_CREATED && manual_dismiss) {
            check_query(member[i], failed ? "Input/output error" : "Operation canceled");
            assert_null(member[i]->group);
            ok(ids[i], JOB_VERB_DISMISS);
        }
    }
    assert_false(did(":c ") || did(":p "));
    assert_int_equal(count_jobs(), 0);
}

IN_LOOP(each_member_ends_badly_in_each_state)
{
    static const enum job_status states[] = {JOB_CREATED, JOB_RUNNING, JOB_PAUSED,
                                             JOB_READY,   JOB_STANDBY, JOB_WAITING};
    for (unsigned n = 1; n <= MOST; n++) {
        unsigned combinations = 1, tried = 0;
        for (unsigned i = 0; i < n; i++)
            combinations *= ARRAY_SIZE(states);
        for (unsigned c = 0; c < combinations; c++) {
            enum job_status s[MOST];
            for (unsigned i = 0, rest = c; i < n; i++, rest /= ARRAY_SIZE(states))
                s[i] = states[rest % ARRAY_SIZE(states)];
            for (unsigned v = 0; v < n; v++) {
                for (int how = 0; how < HOWS; how++) {
                    if (how == BY_FAILURE && s[v] != JOB_RUNNING && s[v] != JOB_READY)
                        continue;
                    end_badly(n, s, v, (enum how)how, (c + v) % 2);
                    tried++;
                }
            }
        }
        assert_true(tried > combinations);
    }
    return 0;
}

/* The same, when the last flush of one fails: all had been pending. */
IN_LOOP(one_cannot_be_prepared_and_none_commits)
{
    for (unsigned n = 1; n <= MOST; n++) {
        for (unsigned bad = 1; bad < 1u << n; bad++) {
            for (unsigned finalized = 0; finalized < n; finalized++) {
                group_of(n, (struct member_options[MOST]){{true, false}, {true, false}, {true}});
                unsigned first = 0; /* they are prepared from the newest on */
                for (unsigned i = 0; i < n; i++) {
                    fake_of(member[i])->prepare_result = bad & (1u << i) ? -EIO : 0;
                    if (bad & (1u << i))
                        first = i;
                    bring(member[i], JOB_WAITING);
                }
                events[0] = history[0] = '\0';
                ok(ids[finalized], JOB_VERB_FINALIZE);
                for (unsigned i = 0; i < n; i++)
                    expect_of(ids[i], the_end(JOB_PENDING, i == first, true), "unprepared");
                assert_false(did(":c "));
                assert_int_equal(count_jobs(), 0);
            }
        }
    }
    return 0;
}

/* ---- all end well ---- */

static void end_well(unsigned n, unsigned order, unsigned manual, unsigned finalizer, bool late,
                     bool dismissed)
{
    static const unsigned permutations[6][MOST] = {{0, 1, 2}, {1, 0, 2}, {0, 2, 1},
                                                   {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    const unsigned *turn = permutations[order];
    struct member_options o[MOST];
    for (unsigned i = 0; i < n; i++)
        o[i] = (struct member_options){manual & (1u << i), !dismissed};
    events[0] = history[0] = '\0';
    group_of(n, o);
    for (unsigned i = 0; i < n && !late; i++)
        job_start(member[i]);
    for (unsigned i = 0; i < n; i++) { /* LATE: each starts when the one before has ended */
        if (late)
            job_start(member[turn[i]]);
        settle();
        finish(member[turn[i]], 0);
        settle();
        assert_int_equal(did(":p "), i + 1 == n && !manual);
    }
    if (manual) {
        for (unsigned i = 0; i < n; i++)
            assert_int_equal(member[i]->status, JOB_PENDING);
        ok(ids[finalizer], JOB_VERB_FINALIZE);
    }
    settle();
    for (unsigned i = 0; i < n; i++) {
        char text[128];
        snprintf(text, sizeof text, "created running waiting pending %sCOMPLETED concluded %s",
                 manual & (1u << i) ? "PENDING " : "", dismissed ? "null " : "");
        expect_of(ids[i], text, "well");
        assert_true(dismissed || member[i]->result == 0);
        if (!dismissed)
            ok(ids[i], JOB_VERB_DISMISS);
    }
    /* Prepared and committed from the newest on, and none before all are prepared. */
    static const char *const ends[] = {
        "a:p a:c a:l ",
        "b:p a:p b:c b:l a:c a:l ",
        "c:p b:p a:p c:c c:l b:c b:l a:c a:l ",
    };
    assert_string_equal(strstr(history, &ends[n - 1][0]), ends[n - 1]);
    assert_int_equal(count_jobs(), 0);
}

IN_LOOP(members_wait_until_all_are_ready_and_any_finalizes_all)
{
    static const unsigned orders[MOST] = {1, 2, 6};
    for (unsigned n = 1; n <= MOST; n++) {
        for (unsigned order = 0; order < orders[n - 1]; order++) {
            for (unsigned manual = 0; manual < 1u << n; manual++) {
                for (unsigned finalizer = 0; finalizer < n; finalizer++) {
                    end_well(n, order, manual, finalizer, false, true);
                    end_well(n, order, manual, finalizer, true, finalizer % 2);
                }
            }
        }
    }
    return 0;
}

/* ---- at the same instant ---- */

IN_LOOP(members_that_end_at_the_same_instant)
{
    static const int results[] = {0, -EIO, -ENOSPC};
    for (unsigned n = 2; n <= MOST; n++) {
        for (unsigned c = 0; c < (n == 2 ? 9 : 27); c++) {
            int result[MOST];
            unsigned first = MOST; /* who fails first: they run in the order of being woken */
            group_of(n, (struct member_options[MOST]){{0}, {0}, {0}});
            for (unsigned i = 0, rest = c; i < n; i++, rest /= 3) {
                result[i] = results[rest % 3];
                if (result[i] && first == MOST)
                    first = i;
                job_start(member[i]);
            }
            settle();
            events[0] = history[0] = '\0';
            for (unsigned i = 0; i < n; i++)
                finish(member[i], result[i]);
            settle();
            yield(20);
            for (unsigned i = 0; i < n; i++) {
                char text[128];
                if (first == MOST)
                    strcpy(text, "waiting pending COMPLETED concluded null ");
                else if (i == first)
                    snprintf(text, sizeof text, "aborting COMPLETED(%s) concluded null ",
                             strerror(-result[i]));
                else
                    snprintf(text, sizeof text, "%saborting CANCELLED concluded null ",
                             i < first ? "waiting " : "");
                expect_of(ids[i], text, "same instant");
            }
            assert_int_equal(did(":c "), first == MOST);
            assert_int_equal(did(":a "), first != MOST);
            assert_int_equal(count_jobs(), 0);
        }
    }
    return 0;
}

struct client {
    const char *id;
    enum job_verb verb;
    int result;
    struct error err;
    bool answered;
};

static int client_task(void *arg)
{
    struct client *c = arg;
    error_clear(&c->err);
    c->result = jobs_do(js, c->id, c->verb, &c->err);
    c->answered = true;
    return 0;
}

/* Two clients, one verb each on a pending group, as nearly at once as can be: the second is
 * answered when the group has ended. */
static void two_clients(bool manual_dismiss, struct client one, struct client two, const char *text)
{
    SCOPE(clients);
    group_of(2, (struct member_options[]){{true, manual_dismiss}, {true, manual_dismiss}});
    bring(a, JOB_WAITING);
    bring(b, JOB_WAITING);
    events[0] = history[0] = '\0';
    scope_spawn(&clients, client_task, &one);
    scope_spawn(&clients, client_task, &two);
    assert_int_equal(scope_join(&clients), 0);
    assert_int_equal(one.result, 0);
    assert_true(two.result < 0);
    assert_string_equal(two.err.text, text);
    for (unsigned i = 0; i < 2; i++) {
        bool well = one.verb == JOB_VERB_FINALIZE;
        expect_of(ids[i],
                  well ? manual_dismiss ? "COMPLETED concluded " : "COMPLETED concluded null "
                       : the_end(JOB_PENDING, false, !manual_dismiss),
                  "two clients");
        if (manual_dismiss)
            ok(ids[i], JOB_VERB_DISMISS);
    }
}

IN_LOOP(the_second_of_two_clients_comes_too_late)
{
    for (unsigned i = 0; i < 4; i++) {
        struct client cancel = {.id = ids[i % 2], .verb = JOB_VERB_CANCEL};
        struct client cancel2 = {.id = ids[i / 2], .verb = JOB_VERB_CANCEL};
        struct client finalize = {.id = ids[i % 2], .verb = JOB_VERB_FINALIZE};
        struct client finalize2 = {.id = ids[i / 2], .verb = JOB_VERB_FINALIZE};
        char text[128];
        two_clients(false, cancel, cancel2, "Job not found");
        two_clients(false, finalize, finalize2, "Job not found");
        two_clients(false, finalize, cancel2, "Job not found");
        snprintf(text, sizeof text, "Job '%s' in state 'concluded' cannot accept command verb '%s'",
                 ids[i / 2], "cancel");
        two_clients(true, cancel, cancel2, text);
        two_clients(true, finalize, cancel2, text);
        snprintf(text, sizeof text, "Job '%s' in state 'concluded' cannot accept command verb '%s'",
                 ids[i / 2], "finalize");
        two_clients(true, finalize, finalize2, text);
    }
    return 0;
}

/* ---- a member that takes its time ---- */

IN_LOOP(a_group_waits_for_a_member_that_is_slow_to_stop)
{
    struct client cancel = {.id = "a", .verb = JOB_VERB_CANCEL}, late = cancel;
    late.id = "b";
    SCOPE(clients);
    start_pair(false, false);
    fake_of(b)->linger_ns = 5 * UINT64_C(1000000000);
    finish(a, 0);
    expect("a:waiting ");
    uint64_t begun = clock_now_ns();
    scope_spawn(&clients, client_task, &cancel);
    settle();
    scope_spawn(&clients, client_task, &late);
    settle();
    /* Nobody has ended, and that can be seen. */
    assert_true(!cancel.answered && !late.answered);
    check_query(a, "");
    check_query(b, "");
    assert_int_equal(a->status, JOB_WAITING);
    assert_int_equal(b->status, JOB_RUNNING);
    assert_int_equal(scope_join(&clients), 0);
    assert_true(clock_now_ns() - begun >= 5 * UINT64_C(1000000000));
    assert_int_equal(cancel.result, 0);
    assert_string_equal(late.err.text, "Job not found");
    expect("b:aborting b:CANCELLED b:concluded b:null a:aborting a:CANCELLED a:concluded a:null ");
    return 0;
}

/* It does not notice, and ends well: too late. */
IN_LOOP(success_after_the_group_has_failed_is_none)
{
    start_pair(false, false);
    fake_of(a)->linger_ns = 1000000000;
    fake_of(b)->linger_ns = 2 * UINT64_C(1000000000);
    finish(b, 0);
    finish(a, -EIO);
    assert_int_equal(sleep_until(clock_after_ns(3 * UINT64_C(1000000000))), 0);
    expect("a:aborting b:aborting b:CANCELLED b:concluded b:null a:COMPLETED(Input/output error) "
           "a:concluded a:null ");
    assert_false(did(":p ") || did(":c "));
    return 0;
}

/* ---- dismissal ---- */

IN_LOOP(each_member_is_dismissed_by_its_own_rule)
{
    for (unsigned kept = 0; kept < 8; kept++) {
        for (int how = 0; how < 3; how++) { /* success, failure, one not started */
            struct member_options o[MOST];
            for (unsigned i = 0; i < MOST; i++)
                o[i].manual_finalize = false, o[i].manual_dismiss = kept & (1u << i);
            group_of(MOST, o);
            for (unsigned i = 0; i < MOST; i++)
                bring(member[i], how == 2 && i == 1 ? JOB_CREATED : JOB_RUNNING);
            finish(a, how ? -EIO : 0);
            if (how == 0) {
                finish(b, 0);
                finish(member[2], 0);
            }
            settle();
            yield(20);
            for (unsigned i = 0; i < MOST; i++) {
                bool stays = (kept & (1u << i)) && !(how == 2 && i == 1);
                verb_text(ids[i], JOB_VERB_DISMISS, stays ? "" : "Job not found");
                verb_text(ids[i], JOB_VERB_DISMISS, "Job not found");
            }
            events[0] = history[0] = '\0';
        }
    }
    return 0;
}

IN_LOOP(a_concluded_member_is_dismissed_while_its_sibling_ends)
{
    SCOPE(clients);
    struct client dismiss = {.id = "b", .verb = JOB_VERB_DISMISS};
    group_of(2, (struct member_options[]){{false, true}, {false, true}});
    job_start(a);
    job_start(b);
    settle();
    finish(a, 0);
    finish(b, -EIO);
    while (b->status != JOB_CONCLUDED)
        yield(1);
    scope_spawn(&clients, client_task, &dismiss);
    yield(1);
    assert_true(dismiss.answered && dismiss.result == 0);
    assert_int_not_equal(a->status, JOB_CONCLUDED);
    assert_int_equal(scope_join(&clients), 0);
    settle();
    assert_int_equal(a->status, JOB_CONCLUDED);
    ok("a", JOB_VERB_DISMISS);
    return 0;
}

/* ---- given up by its transaction ---- */

IN_LOOP(a_group_is_given_up_before_it_starts)
{
    for (unsigned first = 0; first < MOST; first++) {
        CLEANUP(job_group_unrefp) struct job_group *grp = job_group_new();
        struct client late = {.id = ids[first], .verb = JOB_VERB_PAUSE};
        SCOPE(clients);
        for (unsigned i = 0; i < MOST; i++)
            member[i] = make(
                ids[i], (struct job_options){.group = grp, .held = true, .manual_dismiss = true});
        scope_spawn(&clients, client_task, &late);
        settle();
        assert_false(late.answered);
        history[0] = '\0';
        job_cancel_and_wait(member[first]); /* ends the others, too: no transaction has one alone */
        assert_int_equal(count_jobs(), 0);
        assert_string_equal(history, "c:h c:l b:h b:l a:h a:l ");
        for (unsigned i = 0; i < MOST; i++)
            expect_of(ids[i], "created aborting concluded null ", "given up");
        assert_int_equal(scope_join(&clients), 0);
        assert_string_equal(late.err.text, "Job not found");
        events[0] = '\0';
    }
    return 0;
}

/* ---- each alone ---- */

IN_LOOP(individual_jobs_leave_each_other_alone)
{
    static const enum job_status states[] = {JOB_CREATED, JOB_RUNNING, JOB_PAUSED,
                                             JOB_READY,   JOB_STANDBY, JOB_WAITING};
    for (unsigned s = 0; s < ARRAY_SIZE(states); s++) {
        for (int how = 0; how < HOWS; how++) {
            struct job *one = make("a", (struct job_options){0});
            struct job *other = make("b", (struct job_options){.manual_finalize = true});
            bring(one, JOB_RUNNING);
            bring(other, states[s]);
            enum job_status was = other->status;
            events[0] = '\0';
            if (how == BY_JOB_CANCEL)
                ok("a", JOB_VERB_CANCEL);
            else
                finish(one, how == BY_FAILURE ? -EIO : 0);
            settle();
            assert_true(strstr(events, "a:null "));
            assert_null(strstr(events, "b:"));
            assert_int_equal(other->status, was);
            ok("b", JOB_VERB_CANCEL);
            settle();
        }
    }
    return 0;
}

/* ---- the end of the program ---- */

IN_LOOP(all_are_cancelled_in_whatever_state)
{
    static const enum job_status states[] = {JOB_CREATED, JOB_RUNNING, JOB_PAUSED,
                                             JOB_READY,   JOB_STANDBY, JOB_WAITING};
    for (unsigned x = 0; x < ARRAY_SIZE(states); x++) {
        for (unsigned y = 0; y < ARRAY_SIZE(states); y++) {
            group_of(2, (struct member_options[]){{true, true}, {true, false}});
            bring(a, states[x]);
            bring(b, states[y]);
            history[0] = '\0';
            jobs_cancel_all(js);
            assert_int_equal(count_jobs(), 0);
            assert_false(did(":c "));
            events[0] = '\0';
        }
    }
    return 0;
}

/* ---- anything, in any order ---- */

/* Whatever clients and jobs do: a group commits wholly or not at all, none before all are
 * prepared; each member that ran is aborted or committed once, then cleaned up; and all end. */
static void check_history(unsigned n)
{
    unsigned committed = 0, ended = 0;
    const char *first_commit = strstr(history, ":c ");
    for (unsigned i = 0; i < n; i++) {
        unsigned commits = 0, aborts = 0, cleans = 0;
        for (const char *p = history; *p; p += 4) {
            if (p[0] != ids[i][0])
                continue;
            commits += p[2] == 'c';
            aborts += p[2] == 'a' || p[2] == 'n';
            cleans += p[2] == 'l';
            assert_true(p[2] != 'p' || !first_commit || p < first_commit);
        }
        assert_true(commits + aborts == 1 && cleans == 1);
        committed += commits;
        ended++;
    }
    assert_true(committed == 0 || committed == ended);
}

static void random_history(uint64_t seed)
{
    static const enum job_verb verbs[] = {JOB_VERB_CANCEL,   JOB_VERB_PAUSE,    JOB_VERB_RESUME,
                                          JOB_VERB_COMPLETE, JOB_VERB_FINALIZE, JOB_VERB_DISMISS};
    struct rng rng = {seed};
    struct member_options o[MOST];
    struct client clients[40];
    unsigned n = 1 + (unsigned)rng_below(&rng, MOST), asked = 0;
    SCOPE(tasks);
    events[0] = history[0] = '\0';
    for (unsigned i = 0; i < n; i++)
        o[i] = (struct member_options){rng_below(&rng, 2), rng_below(&rng, 2)};
    group_of(n, o);
    for (unsigned i = 0; i < n; i++) {
        struct fake *f = fake_of(member[i]);
        job_ref(member[i]);
        f->want_ready = rng_below(&rng, 2);
        f->soft_cancel = rng_below(&rng, 2);
        f->linger_ns = rng_below(&rng, 3) ? 0 : rng_below(&rng, 5000000);
        f->prepare_result = rng_below(&rng, 8) ? 0 : -EIO;
    }
    for (unsigned step = 0; step < 60; step++) {
        unsigned i = (unsigned)rng_below(&rng, n);
        struct job *j = member[i];
        switch (rng_below(&rng, 8)) {
        case 0:
            if (j->status == JOB_CREATED)
                job_start(j);
            break;
        case 1:
            if (j->started && !fake_of(j)->finish)
                finish(j, rng_below(&rng, 4) ? 0 : -EIO);
            break;
        case 2:
            assert_int_equal(sleep_until(clock_after_ns(rng_below(&rng, 2000000))), 0);
            break;
        case 3:
        case 4:
            if (asked < ARRAY_SIZE(clients)) {
                struct client *c = &clients[asked++];
                /* Most verbs are no cancel, or no history would be long. */
                enum job_verb v = verbs[rng_below(&rng, 4) ? 1 + rng_below(&rng, 5) : 0];
                *c = (struct client){.id = ids[i], .verb = v};
                scope_spawn(&tasks, client_task, c);
            }
            break;
        default:
            yield((unsigned)rng_below(&rng, 6));
        }
    }
    assert_int_equal(scope_join(&tasks), 0);
    jobs_cancel_all(js);
    assert_int_equal(count_jobs(), 0);
    check_history(n);
    for (unsigned i = 0; i < n; i++) {
        assert_int_equal(member[i]->status, JOB_NULL);
        job_unref(member[i]);
    }
}

IN_LOOP(a_group_commits_wholly_or_not_at_all)
{
    uint64_t seed = test_seed();
    unsigned whole = 0, none = 0;
    for (unsigned i = 0; i < 3000; i++) {
        random_history(seed + i);
        if (did(":c "))
            whole++;
        else
            none++;
    }
    assert_true(whole > 100 && none > 100);
    return 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_pair_waits_for_both),
    cmocka_unit_test(one_fails_and_the_other_is_cancelled),
    cmocka_unit_test(one_fails_while_the_other_waits),
    cmocka_unit_test(a_waiting_job_is_cancelled),
    cmocka_unit_test(a_pending_member_is_cancelled),
    cmocka_unit_test(one_ends_before_its_sibling_starts),
    cmocka_unit_test(a_failure_before_its_sibling_starts),
    cmocka_unit_test(a_paused_member_lets_itself_be_cancelled),
    cmocka_unit_test(each_member_ends_badly_in_each_state),
    cmocka_unit_test(one_cannot_be_prepared_and_none_commits),
    cmocka_unit_test(members_wait_until_all_are_ready_and_any_finalizes_all),
    cmocka_unit_test(members_that_end_at_the_same_instant),
    cmocka_unit_test(the_second_of_two_clients_comes_too_late),
    cmocka_unit_test(a_group_waits_for_a_member_that_is_slow_to_stop),
    cmocka_unit_test(success_after_the_group_has_failed_is_none),
    cmocka_unit_test(each_member_is_dismissed_by_its_own_rule),
    cmocka_unit_test(a_concluded_member_is_dismissed_while_its_sibling_ends),
    cmocka_unit_test(a_group_is_given_up_before_it_starts),
    cmocka_unit_test(individual_jobs_leave_each_other_alone),
    cmocka_unit_test(all_are_cancelled_in_whatever_state),
    cmocka_unit_test(a_group_commits_wholly_or_not_at_all),
};

UNIT_MAIN(tests)
