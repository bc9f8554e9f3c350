/* Requests: against a byte array, the gate, observers, sizes, flushes. */

#include "blockutil.h"

/* ---- random requests against a byte array ---- */

enum { DISK = 96 * 1024 };

static void compare_with_model(struct graph *g, const char *json, unsigned steps)
{
    struct rng rng = {test_seed()};
    struct test_user u;
    CLEANUP(node_unrefp) struct node *n = open_ok(g, json);
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    uint8_t *model = xcalloc(1, DISK), *buf = xcalloc(1, DISK);

    for (unsigned i = 0; i < steps; i++) {
        uint64_t start = rng_below(&rng, DISK), length = rng_below(&rng, DISK - start) + 1;
        if (rng_below(&rng, 2))
            length = min_u64(length, rng_below(&rng, 5000) + 1);
        if (rng_below(&rng, 4) == 0) {
            start = align_down(start, 4096);
            length = min_u64(align_up(length, 4096), DISK - start);
        }
        struct range r = range_make(start, length);
        unsigned skew = (unsigned)rng_below(&rng, DISK - length + 1);
        unsigned flags = rng_below(&rng, 8) ? 0 : REQ_FUA;

        switch (rng_below(&rng, 4)) {
        case 0:
            for (uint64_t k = 0; k < length; k++)
                buf[skew + k] = (uint8_t)rng_next(&rng);
            CHECK(edge_write(e, r, buf + skew, flags) == 0);
            memcpy(model + start, buf + skew, length);
            break;
        case 1:
            CHECK(edge_write_zeroes(e, r, flags | (rng_below(&rng, 2) ? REQ_MAY_UNMAP : 0)) == 0);
            memset(model + start, 0, length);
            break;
        case 2:
            memset(buf + skew, 0xee, length);
            CHECK(edge_read(e, r, buf + skew, 0) == 0);
            CHECK(!memcmp(model + start, buf + skew, length));
            break;
        case 3: {
            struct block_status st;
            CHECK(edge_status_above(e, NULL, true, r, &st) == 0);
            CHECK(st.length && st.length <= length);
            if (st.flags & STATUS_ZERO)
                for (uint64_t k = 0; k < st.length; k++)
                    CHECK(model[start + k] == 0);
            CHECK(!!(st.flags & STATUS_EOF) == (start + st.length == DISK));
            break;
        }
        }
    }
    CHECK(edge_read(e, range_make(0, DISK), buf, 0) == 0);
    CHECK(!memcmp(model, buf, DISK));
    free(model);
    free(buf);
    edge_detach(e);
}

TEST(random_requests_agree_with_a_byte_array)
{
    compare_with_model(g, "{'driver':'fake','size':98304}", 1500);
    compare_with_model(g, "{'driver':'fake','size':98304,'request-alignment':512}", 1500);
    compare_with_model(
        g, "{'driver':'fake','size':98304,'request-alignment':4096,'memory-alignment':512}", 1500);
    compare_with_model(g,
                       "{'driver':'fake','size':98304,'request-alignment':512,'max-transfer':8192,"
                       "'fua':true,'discard':'unmap','detect-zeroes':'unmap'}",
                       1500);
    compare_with_model(g,
                       "{'driver':'fakefilter','file':{'driver':'fakefilter','file':{"
                       "'driver':'fake','size':98304,'request-alignment':4096}}}",
                       1500);
    compare_with_model(g,
                       "{'driver':'raw','offset':4096,'size':98304,'file':{'driver':'fake',"
                       "'size':200704,'request-alignment':4096}}",
                       1500);
}

/* Many writers of single bytes in the same blocks: read-modify-write must not lose one. */
struct byte_writer {
    struct edge *e;
    unsigned first, step;
    uint8_t value;
};

static int write_bytes(void *arg)
{
    struct byte_writer *w = arg;

    for (unsigned at = w->first; at < 3 * 4096; at += w->step)
        CHECK(edge_write(w->e, range_make(at, 1), &w->value, 0) == 0);
    return 0;
}

TEST(unaligned_neighbours_do_not_lose_each_other)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','size':16384,'request-alignment':4096}");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    struct byte_writer w[7];
    uint8_t buf[3 * 4096];
    {
        SCOPE(s);
        for (unsigned i = 0; i < 7; i++) {
            w[i] = (struct byte_writer){e, i, 7, (uint8_t)(i + 1)};
            scope_spawn(&s, write_bytes, &w[i]);
        }
        CHECK(scope_join(&s) == 0);
    }
    CHECK(edge_read(e, range_make(0, sizeof buf), buf, 0) == 0);
    for (unsigned i = 0; i < sizeof buf; i++)
        CHECK(buf[i] == i % 7 + 1);
    edge_detach(e);
}

/* ---- limits of a request ---- */

TEST(ranges_and_permissions_are_checked)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'fake','size':4096}");
    CLEANUP(node_unrefp)
    struct node *ro = open_ok(g, "{'driver':'fake','size':4096,'read-only':true}");
    struct test_user u, v;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    struct edge *reader = attach(&v, ro, PERM_CONSISTENT_READ, PERM_ALL);
    uint8_t buf[8192] = {0};

    CHECK(edge_read(e, range_make(0, 4097), buf, 0) == -EIO);
    CHECK(edge_read(e, range_make(4096, 1), buf, 0) == -EIO);
    CHECK(edge_read(e, range_make(4096, 0), buf, 0) == 0);
    CHECK(edge_read(e, range_make(UINT64_MAX - 1, 4), buf, 0) == -EIO);
    CHECK(edge_write(e, range_make(4095, 2), buf, 0) == -EIO);
    CHECK(edge_write_zeroes(e, range_make(1, UINT64_MAX), 0) == -EIO);
    CHECK(edge_discard(e, range_make(4096, 512)) == -EIO);
    CHECK(edge_write(reader, range_make(0, 512), buf, 0) == -EPERM);
    CHECK(edge_flush(reader) == 0);
    edge_detach(reader);
    reader = attach(&v, n, PERM_CONSISTENT_READ, PERM_ALL);
    CHECK(edge_write(reader, range_make(0, 512), buf, 0) == -EPERM);
    edge_detach(reader);
    edge_detach(e);
}

TEST(zeroes_without_fallback)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','size':65536,'request-alignment':512}");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);

    CHECK(edge_write_zeroes(e, range_make(0, 4096), REQ_NO_FALLBACK) == 0);
    CHECK(fake_of(n)->zeroes == 1 && fake_of(n)->writes == 0);
    CHECK(edge_write_zeroes(e, range_make(100, 4096), REQ_NO_FALLBACK) == -ENOTSUP);
    CHECK(edge_write_zeroes(e, range_make(100, 4096), 0) == 0);
    CHECK(fake_of(n)->zeroes == 2 && fake_of(n)->writes == 2);
    n->write_zeroes_flags = 0;
    CHECK(edge_write_zeroes(e, range_make(0, 4096), REQ_NO_FALLBACK) == -ENOTSUP);
    edge_detach(e);
}

/* ---- the gate ---- */

struct one_write {
    struct edge *e;
    struct range r;
    uint8_t value;
    int result;
    bool done;
};

static int run_write(void *arg)
{
    struct one_write *w = arg;
    uint8_t *buf = malloc(w->r.length);

    memset(buf, w->value, w->r.length);
    w->result = edge_write(w->e, w->r, buf, 0);
    w->done = true;
    free(buf);
    return 0;
}

struct gate_test {
    struct graph *g;
    struct node *n, *filter;
    bool inside, done;
};

static int insert_filter(void *arg)
{
    struct gate_test *t = arg;
    struct error err = ERROR_INIT;
    CLEANUP(graph_unlockp) struct graph *locked = t->g;

    graph_lock(t->g);
    graph_quiesce_begin(t->g, &t->n, 1);
    t->inside = true;
    int r = node_insert_filter(t->filter, t->n, &err);
    CHECK_OK(r, err);
    CHECK(t->n->inside == 0);
    graph_quiesce_end(t->g, &t->n, 1);
    t->done = true;
    return 0;
}

static void let_others_run(unsigned rounds)
{
    while (rounds--)
        CHECK(task_yield() == 0);
}

TEST(a_write_in_flight_is_awaited_and_the_next_goes_through_the_filter)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *filter = open_ok(g, "{'driver':'fakefilter','node-name':'f','file':'disk'}");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    struct one_write first = {e, {0, 4096}, 1}, second = {e, {0, 4096}, 2};
    struct gate_test t = {g, n, filter};
    struct fakefilter_state *fs = filter->state;
    struct error err = ERROR_INIT;

    SCOPE(s);
    fake_of(n)->hold_writes = true;
    scope_spawn(&s, run_write, &first);
    let_others_run(5);
    CHECK(fake_of(n)->held == 1);

    scope_spawn(&s, insert_filter, &t);
    let_others_run(5);
    CHECK(!t.inside); /* the first write is still under way */
    scope_spawn(&s, run_write, &second);
    let_others_run(5);
    CHECK(fake_of(n)->held == 1 && !second.done);

    fake_release(n);
    CHECK(scope_join(&s) == 0);
    CHECK(t.done && first.result == 0 && second.result == 0);
    CHECK(e->node == filter && u.moved == 1);
    CHECK(fs->writes == 1); /* only the second */
    CHECK(fake_of(n)->bytes[0] == 2);
    CHECK(node_skip_filters(filter) == n);

    /* A second filter over the first, and both away again, the lower one first. */
    CLEANUP(node_unrefp)
    struct node *upper = open_ok(g, "{'driver':'fakefilter','node-name':'f2','file':'f'}");
    struct fakefilter_state *us = upper->state;
    int r = node_insert_filter(upper, filter, &err);
    CHECK_OK(r, err);
    CHECK(e->node == upper && upper->file->node == filter && u.moved == 2);
    CHECK(edge_write_zeroes(e, range_make(0, 512), 0) == 0);
    CHECK(us->writes == 1 && fs->writes == 2);

    r = node_remove_filter(filter, &err);
    CHECK_OK(r, err);
    CHECK(upper->file->node == n && TAILQ_EMPTY(&filter->parents));
    CHECK(edge_write_zeroes(e, range_make(0, 512), 0) == 0);
    CHECK(us->writes == 2 && fs->writes == 2);
    r = node_remove_filter(upper, &err);
    CHECK_OK(r, err);
    CHECK(e->node == n && u.moved == 3);
    edge_detach(e);
}

TEST(parents_are_quiesced_before_their_children)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *filter = open_ok(g, "{'driver':'fakefilter','node-name':'f','file':'disk'}");
    struct test_user u;
    struct edge *e = attach(&u, filter, PERM_WRITE, PERM_ALL);
    struct one_write w = {e, {0, 4096}, 1}, late = {e, {0, 4096}, 2};
    struct node *children_first[] = {n, filter};

    SCOPE(s);
    scope_spawn(&s, run_write, &w);
    let_others_run(1); /* inside the filter or below */
    graph_quiesce_begin(g, children_first, 2);
    CHECK(w.done && n->inside == 0 && filter->inside == 0);
    scope_spawn(&s, run_write, &late);
    let_others_run(5);
    CHECK(!late.done);
    /* Nested: the inner end opens nothing. */
    graph_quiesce_begin(g, &filter, 1);
    graph_quiesce_end(g, &filter, 1);
    let_others_run(5);
    CHECK(!late.done);
    graph_quiesce_end(g, children_first, 2);
    CHECK(scope_join(&s) == 0);
    CHECK(late.done && late.result == 0);
    edge_detach(e);
}

static int run_serialising(void *arg)
{
    struct one_write *w = arg;
    uint8_t buf[8192];

    memset(buf, w->value, sizeof buf);
    w->result = edge_write(w->e, w->r, buf, REQ_SERIALISING);
    w->done = true;
    return 0;
}

TEST(what_lies_between_is_quiesced_too)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *f = open_ok(g, "{'driver':'fakefilter','node-name':'f','file':'disk'}");
    CLEANUP(node_unrefp)
    struct node *top = open_ok(g, "{'driver':'fakefilter','node-name':'top','file':'f'}");
    struct test_user u;
    struct edge *e = attach(&u, f, PERM_WRITE, PERM_ALL);
    struct one_write w = {e, {0, 4096}, 1};
    struct node *ends[] = {top, n};

    SCOPE(s);
    graph_quiesce_begin(g, ends, 2);
    scope_spawn(&s, run_write, &w);
    let_others_run(5);
    CHECK(!w.done &&
          f->inside == 0); /* with a lock, say, that a flush of the upper end waits for */
    graph_quiesce_end(g, ends, 2);
    CHECK(scope_join(&s) == 0);
    CHECK(w.done && w.result == 0);
    edge_detach(e);
}

TEST(a_serialising_request_is_alone_on_its_range)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'fake','size':65536}");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    struct one_write a = {e, {0, 8192}, 1}, b = {e, {4096, 4096}, 2}, c = {e, {16384, 512}, 3};

    SCOPE(s);
    fake_of(n)->hold_writes = true;
    scope_spawn(&s, run_serialising, &a);
    let_others_run(3);
    scope_spawn(&s, run_write, &b);
    scope_spawn(&s, run_write, &c);
    let_others_run(3);
    CHECK(fake_of(n)->held == 2); /* a and c; b waits for a */
    fake_release(n);
    CHECK(scope_join(&s) == 0);
    CHECK(fake_of(n)->bytes[0] == 1 && fake_of(n)->bytes[4096] == 2);
    edge_detach(e);
}

/* ---- observers ---- */

struct watcher {
    struct write_observer o;
    char name;
    char *log;
    int refuse;
    uint64_t resized_to;
    struct node *disk;
};

static void note(struct watcher *w, char what)
{
    size_t n = strlen(w->log);

    w->log[n] = what;
    w->log[n + 1] = w->name;
    w->log[n + 2] = ' ';
    w->log[n + 3] = '\0';
}

static int watch_before(struct write_observer *o, struct range r)
{
    struct watcher *w = container_of(o, struct watcher, o);

    (void)r;
    CHECK(task_yield() == 0);
    note(w, 'b');
    return w->refuse;
}

static void watch_mark(struct write_observer *o, struct range r)
{
    struct watcher *w = container_of(o, struct watcher, o);

    /* Bits before data. */
    CHECK(fake_of(w->disk)->bytes[r.start] == 0);
    note(w, 'm');
}

static void watch_written(struct write_observer *o, struct range r, int result)
{
    (void)r;
    note(container_of(o, struct watcher, o), result ? 'f' : 'w');
}

static void watch_resized(struct write_observer *o, uint64_t from, uint64_t to)
{
    struct watcher *w = container_of(o, struct watcher, o);

    (void)from;
    w->resized_to = to;
    note(w, 'r');
}

TEST(observers_are_asked_all_before_any_marks_and_all_mark_before_the_data)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'fake','size':65536}");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE | PERM_RESIZE, PERM_ALL);
    char log[256] = "";
    struct watcher a = {{watch_before, watch_mark, watch_written, NULL, watch_resized}, 'A', log};
    struct watcher b = {{watch_before, watch_mark, watch_written, NULL, watch_resized}, 'B', log};
    uint8_t buf[512];
    struct error err = ERROR_INIT;

    memset(buf, 7, sizeof buf);
    a.disk = b.disk = n;
    node_observe(n, &a.o);
    node_observe(n, &b.o);

    CHECK(edge_write(e, range_make(512, 512), buf, 0) == 0);
    CHECK(!strcmp(log, "bA bB mA mB wA wB "));
    log[0] = '\0';
    CHECK(edge_write(e, range_make(512, 512), buf, REQ_WRITE_UNCHANGED) == 0);
    CHECK(edge_flush(e) == 0);
    CHECK(edge_read(e, range_make(512, 512), buf, 0) == 0);
    CHECK(edge_discard(e, range_make(0, 512)) == 0); /* discard=ignore changes nothing */
    CHECK(!strcmp(log, ""));

    b.refuse = -ENOSPC;
    CHECK(edge_write(e, range_make(1024, 512), buf, 0) == -ENOSPC);
    CHECK(!strcmp(log, "bA bB fA "));
    CHECK(fake_of(n)->bytes[1024] == 0);
    b.refuse = 0;
    log[0] = '\0';

    fake_of(n)->fail_write = -EIO;
    CHECK(edge_write(e, range_make(1024, 512), buf, 0) == -EIO);
    CHECK(!strcmp(log, "bA bB mA mB fA fB "));
    log[0] = '\0';

    int r = edge_truncate(e, 131072, true, &err);
    CHECK_OK(r, err);
    CHECK(!strcmp(log, "rA rB ") && a.resized_to == 131072 && node_size(n) == 131072);
    CHECK(u.resized == 1);
    log[0] = '\0';
    /* Beyond the end, by one who may: grows first, then marks. */
    CHECK(edge_write(e, range_make(131072, 512), buf, 0) == 0);
    CHECK(!strcmp(log, "rA rB bA bB mA mB wA wB ") && node_size(n) == 131584);

    node_unobserve(n, &a.o);
    node_unobserve(n, &b.o);
    edge_detach(e);
}

/* ---- flush ---- */

struct flush_watcher {
    struct write_observer o;
    unsigned flushed, marked;
};

static void count_mark(struct write_observer *o, struct range r)
{
    container_of(o, struct flush_watcher, o)->marked++;
}

static void count_flushed(struct write_observer *o)
{
    container_of(o, struct flush_watcher, o)->flushed++;
}

TEST(observers_hear_of_flushes_that_succeed)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'top','file':'disk'}");
    struct flush_watcher w = {{.mark = count_mark, .flushed = count_flushed}, 0, 0};
    struct test_user u;
    struct edge *e = attach(&u, raw, PERM_WRITE, PERM_ALL);
    uint8_t buf[512] = {1};

    node_observe(raw, &w.o);
    CHECK(edge_flush(e) == 0 && w.flushed == 1); /* also when there was nothing to flush */
    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0 && w.marked == 1);
    fake_of(n)->fail_flush = -EIO;
    CHECK(edge_flush(e) == -EIO && w.flushed == 1);
    CHECK(edge_flush(e) == 0 && w.flushed == 2);
    node_unobserve(raw, &w.o);
    edge_detach(e);
}

TEST(a_flush_with_nothing_written_costs_nothing)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'top','file':'disk'}");
    struct test_user u;
    struct edge *e = attach(&u, raw, PERM_WRITE, PERM_ALL);
    uint8_t buf[512] = {1};

    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 0);
    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 1);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 1);
    /* FUA, which the driver cannot do, is a flush afterwards. */
    CHECK(edge_write(e, range_make(0, 512), buf, REQ_FUA) == 0);
    CHECK(fake_of(n)->flushes == 2);
    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0);
    fake_of(n)->fail_flush = -EIO;
    CHECK(edge_flush(e) == -EIO);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 4); /* tried again */
    edge_detach(e);
}

TEST(what_was_not_to_be_flushed_is_flushed_when_it_is)
{
    static const char with[] = "[{\"driver\":\"fake\",\"node-name\":\"disk\",\"size\":65536}]";
    CLEANUP(node_unrefp)
    struct node *n =
        open_ok(g, "{'driver':'fake','node-name':'disk','size':65536,'cache':{'no-flush':true}}");
    CLEANUP(json_putp) struct json_object *options = json_tokener_parse(with);
    struct error err = ERROR_INIT;
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    uint8_t buf[512] = {1};

    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 0);
    CHECK_OK(graph_reopen(g, options, &err), err);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 1);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 1);
    edge_detach(e);
}

TEST(a_size_change_below_reaches_the_top)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'mid','file':'disk'}");
    CLEANUP(node_unrefp)
    struct node *top = open_ok(g, "{'driver':'fakefilter','node-name':'top','file':'mid'}");
    struct test_user u, v;
    struct error err = ERROR_INIT;
    struct edge *e = attach(&u, top, PERM_CONSISTENT_READ, PERM_ALL);
    struct edge *below = attach(&v, n, PERM_RESIZE | PERM_WRITE, PERM_ALL);

    int r = edge_truncate(below, 131072, true, &err);
    CHECK_OK(r, err);
    CHECK(node_size(raw) == 131072 && node_size(top) == 131072 && u.resized == 1);
    edge_detach(below);
    r = edge_set_perm(e, PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL, &err);
    CHECK_OK(r, err);
    r = edge_truncate(e, 32768, true, &err); /* a filter passes it down */
    CHECK_OK(r, err);
    CHECK(node_size(n) == 32768 && node_size(raw) == 32768 && node_size(top) == 32768);
    CHECK(u.resized == 2);
    edge_detach(e);
}

/* ---- changes of the graph under load ---- */

enum { LOAD_WRITERS = 6, LOAD_AREA = 16384 };

struct load {
    struct edge *e;
    unsigned id;
    uint64_t seed;
    const bool *stop;
    unsigned rounds;
};

/* Owns an area (with edges inside others' blocks) and knows what it holds. */
static int load_writer(void *arg)
{
    struct load *l = arg;
    struct rng rng = {l->seed};
    uint64_t base = (uint64_t)l->id * LOAD_AREA + 100;
    uint8_t model[LOAD_AREA] = {0}, buf[LOAD_AREA];

    while (!*l->stop) {
        uint64_t at = rng_below(&rng, LOAD_AREA), n = rng_below(&rng, LOAD_AREA - at) + 1;
        struct range r = range_make(base + at, n);
        switch (rng_below(&rng, 4)) {
        case 0:
            memset(buf, (int)rng_below(&rng, 255) + 1, n);
            CHECK(edge_write(l->e, r, buf, rng_below(&rng, 8) ? 0 : REQ_FUA) == 0);
            memcpy(model + at, buf, n);
            break;
        case 1:
            CHECK(edge_write_zeroes(l->e, r, 0) == 0);
            memset(model + at, 0, n);
            break;
        case 2:
            CHECK(edge_read(l->e, r, buf, 0) == 0);
            CHECK(!memcmp(buf, model + at, n));
            break;
        case 3:
            CHECK(edge_flush(l->e) == 0);
            break;
        }
        l->rounds++;
    }
    return 0;
}

static void check_perms(struct graph *g)
{
    for (struct node *n = graph_first(g); n; n = graph_next(n)) {
        struct edge *a, *b;
        CHECK(n->gate == 0);
        TAILQ_FOREACH (a, &n->parents, in_parents) {
            CHECK(a->node == n);
            TAILQ_FOREACH (b, &n->parents, in_parents)
                CHECK(a == b || !(b->perm & ~a->shared));
        }
    }
}

TEST(filters_come_and_go_under_load)
{
    struct rng rng = {test_seed()};
    CLEANUP(node_unrefp)
    struct node *disk = open_ok(g, "{'driver':'fake','node-name':'disk','size':131072,"
                                   "'request-alignment':4096,'max-transfer':8192}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'top',"
                                  "'file':'disk'}");
    struct test_user u[LOAD_WRITERS];
    struct load load[LOAD_WRITERS];
    struct node *filters[8] = {0};
    unsigned n_filters = 0, made = 0;
    bool stop = false;

    SCOPE(s);
    for (unsigned i = 0; i < LOAD_WRITERS; i++) {
        struct edge *e = attach(&u[i], raw, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        load[i] = (struct load){e, i, rng_next(&rng) | 1, &stop, 0};
        scope_spawn(&s, load_writer, &load[i]);
    }
    for (unsigned step = 0; step < 400; step++) {
        unsigned what = (unsigned)rng_below(&rng, 3);
        if (what == 0 && n_filters < 8) {
            /* Above any of the nodes that there are. */
            unsigned below = (unsigned)rng_below(&rng, n_filters + 2);
            struct node *n = below == 0 ? disk : below == 1 ? raw : filters[below - 2];
            CLEANUP(memory_freep)
            char *json = xasprintf("{'driver':'fakefilter','node-name':'f%u','file':'%s'}", made++,
                                   node_name(n));
            struct node *f = open_ok(g, json);
            CHECK(node_insert_filter(f, n, NULL) == 0);
            filters[n_filters++] = f;
        } else if (what == 1 && n_filters) {
            unsigned at = (unsigned)rng_below(&rng, n_filters);
            CHECK(node_remove_filter(filters[at], NULL) == 0);
            node_unref(filters[at]);
            filters[at] = filters[--n_filters];
        } else {
            struct node *all[] = {disk, raw};
            graph_quiesce_begin(g, all, 2);
            CHECK(disk->inside == 0 && raw->inside == 0);
            graph_quiesce_end(g, all, 2);
        }
        check_perms(g);
        let_others_run((unsigned)rng_below(&rng, 20));
    }
    stop = true;
    CHECK(scope_join(&s) == 0);
    for (unsigned i = 0; i < LOAD_WRITERS; i++) {
        CHECK(load[i].rounds > 20);
        edge_detach(load[i].e);
    }
    while (n_filters) {
        struct node *f = filters[--n_filters];
        CHECK(node_remove_filter(f, NULL) == 0);
        node_unref(f);
    }
}

TEST(requests_are_counted_and_cheap)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'null-co','size':1073741824}");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    static uint8_t buf[4096];
    uint64_t begin = clock_now_ns();
    enum { ROUNDS = 200000 };

    for (unsigned i = 0; i < ROUNDS; i++)
        CHECK(edge_write(e, range_make((uint64_t)(i % 1000) * 4096, 4096), buf, 0) == 0);
    uint64_t each = (clock_now_ns() - begin) / ROUNDS;
    print_message("a write costs %llu ns over the driver\n", (unsigned long long)each);
    CHECK(n->counters.wr_ops == ROUNDS && n->counters.wr_bytes == ROUNDS * 4096ull);
    CHECK(n->counters.wr_highest_offset == 4096000);
    edge_detach(e);
}

/* A backup's source, whose guest has gone: a flush must still reach what he wrote, through nodes
 * that need not be written to any more. */
TEST(a_flush_reaches_what_was_written_by_one_who_has_gone)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'top','file':'disk'}");
    CLEANUP(node_unrefp)
    struct node *filters =
        open_ok(g, "{'driver':'fakefilter','file':{'driver':'fakefilter','file':'top'}}");
    struct test_user u;
    uint8_t buf[512] = {1};

    struct edge *e = attach(&u, raw, PERM_WRITE, PERM_ALL);
    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0);
    edge_detach(e);
    e = attach(&u, filters, PERM_CONSISTENT_READ, PERM_ALL);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 1);
    CHECK(edge_flush(e) == 0 && fake_of(n)->flushes == 1);
    edge_detach(e);
}

struct shrinking {
    struct edge *write, *resize;
    uint64_t at;
    int result;
    bool done;
};

static int shrink_to_half(void *arg)
{
    struct shrinking *s = arg;

    CHECK(edge_truncate(s->resize, 32768, true, NULL) == 0);
    return 0;
}

static int write_there(void *arg)
{
    struct shrinking *s = arg;
    uint8_t buf[512] = {7};

    s->result = edge_write(s->write, range_make(s->at, 512), buf, 0);
    s->done = true;
    return 0;
}

TEST(a_write_that_waits_for_a_shrink_does_not_grow_the_node)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','node-name':'disk','size':65536}");
    struct test_user u, v;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    struct edge *resize = attach(&v, n, PERM_RESIZE, PERM_ALL);
    struct shrinking first = {e, resize, 0}, last = {e, resize, 65024};
    {
        SCOPE(s);
        fake_of(n)->hold_writes = true;
        scope_spawn(&s, write_there, &first);
        CHECK(task_yield() == 0);
        scope_spawn(&s, shrink_to_half, &first);
        CHECK(task_yield() == 0);
        scope_spawn(&s, write_there, &last);
        CHECK(task_yield() == 0);
        CHECK(!last.done && fake_of(n)->held == 1);
        fake_release(n);
        CHECK(scope_join(&s) == 0);
    }
    CHECK(first.result == 0 && last.done && last.result == -EIO);
    CHECK(n->size_bytes == 32768);
    edge_detach(e);
    edge_detach(resize);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(random_requests_agree_with_a_byte_array),
    cmocka_unit_test(unaligned_neighbours_do_not_lose_each_other),
    cmocka_unit_test(ranges_and_permissions_are_checked),
    cmocka_unit_test(zeroes_without_fallback),
    cmocka_unit_test(a_write_in_flight_is_awaited_and_the_next_goes_through_the_filter),
    cmocka_unit_test(parents_are_quiesced_before_their_children),
    cmocka_unit_test(what_lies_between_is_quiesced_too),
    cmocka_unit_test(a_serialising_request_is_alone_on_its_range),
    cmocka_unit_test(observers_are_asked_all_before_any_marks_and_all_mark_before_the_data),
    cmocka_unit_test(observers_hear_of_flushes_that_succeed),
    cmocka_unit_test(a_flush_with_nothing_written_costs_nothing),
    cmocka_unit_test(what_was_not_to_be_flushed_is_flushed_when_it_is),
    cmocka_unit_test(a_flush_reaches_what_was_written_by_one_who_has_gone),
    cmocka_unit_test(a_write_that_waits_for_a_shrink_does_not_grow_the_node),
    cmocka_unit_test(a_size_change_below_reaches_the_top),
    cmocka_unit_test(filters_come_and_go_under_load),
    cmocka_unit_test(requests_are_counted_and_cheap),
};

UNIT_MAIN(tests)
