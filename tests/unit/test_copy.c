/* The copy engine and its two filters, against the bytes that the disk had at the instant. */
#include "jobutil.h"

#include "copy/rate.h"

/* Puts a filter over SOURCE as the backup job does, with the source quiesced. */
static struct node *insert(struct graph *g, struct node *source, struct node *target)
{
    struct error err = ERROR_INIT;
    struct node *f = NULL;
    graph_quiesce_begin(g, &source, 1);
    int r = cbw_insert(source, target, NULL, &f, &err);
    CHECK_OK(r, err);
    graph_quiesce_end(g, &source, 1);
    return f;
}

static void let_in(struct graph *g, struct node *f)
{
    graph_quiesce_end(g, &f, 1);
}

static void take_out(struct graph *g, struct node *f)
{
    GRAPH_LOCKED(g);
    cbw_remove(f);
}

/* ---- the whole of it ---- */

static unsigned copy_under_writes(struct graph *g, uint64_t size, uint64_t cluster, uint64_t seed)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", size, 0), *t = disk(g, "t", size, cluster);
    struct guest guests[3];
    uint8_t *then = xcalloc(1, size);
    bool read_failed;

    fill_disk(s, seed);
    mem_of(s)->yields = 3;
    mem_of(t)->yields = 5;
    mem_of(t)->check_once = cluster <= 65536 && size % 65536 == 0;
    memcpy(then, mem_of(s)->bytes, size);
    SCOPE(tasks);
    for (int i = 0; i < 3; i++)
        guest_on(&guests[i], s, seed + i);
    struct node *f = insert(g, s, t);
    struct copy *c = cbw_copy(f);
    CHECK(guests[0].edge->node == f);
    for (int i = 0; i < 3; i++)
        scope_spawn(&tasks, guest_task, &guests[i]);
    let_in(g, f);

    struct copy_limits limits = {.max_workers = 1 + (unsigned)(seed % 7)};
    if (seed % 3)
        limits.max_run_bytes = copy_chunk_bytes(c);
    CHECK(copy_run(c, &limits, &read_failed) == 0);
    CHECK(bitmap_count(copy_remaining(c)) == 0);
    struct copy_progress p = copy_progress(c);
    CHECK(p.done == p.total && p.total == align_up(size, copy_chunk_bytes(c)));
    CHECK(memcmp(then, mem_of(t)->bytes, size) == 0);
    unsigned done = 0;
    for (int i = 0; i < 3; i++) {
        guests[i].stop = true;
        done += guests[i].done;
        CHECK(guests[i].failed == 0);
    }
    CHECK(scope_join(&tasks) == 0);
    CHECK(memcmp(then, mem_of(t)->bytes, size) == 0);
    take_out(g, f);
    for (int i = 0; i < 3; i++) {
        CHECK(guests[i].edge->node == s);
        edge_detach(guests[i].edge);
    }
    CHECK(dirty_first(s) == NULL);
    free(then);
    return done;
}

JOB_TEST(the_target_is_the_disk_at_its_instant)
{
    unsigned writes = 0;
    for (uint64_t seed = 1; seed < 12; seed++) {
        writes += copy_under_writes(g, 4 * MiB, 65536, seed);
        writes += copy_under_writes(g, 3 * MiB + 512 * 5, 4096, seed);
        writes += copy_under_writes(g, 7 * MiB, 2 * MiB, seed);
    }
    CHECK(writes > 500);
}

JOB_TEST(a_copy_of_a_set_takes_that_alone)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", 8 * MiB, 0), *t = disk(g, "t", 8 * MiB, 0);
    bool read_failed;
    memset(mem_of(s)->bytes, 0x11, 8 * MiB);
    memset(mem_of(t)->bytes, 0xee, 8 * MiB);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    struct copy *c = cbw_copy(f);
    bitmap_clear_all(copy_remaining(c));
    bitmap_mark(copy_remaining(c), range_make(3 * MiB + 7, 1));
    bitmap_mark(copy_remaining(c), range_make(5 * MiB, MiB));
    CHECK(copy_run(c, NULL, &read_failed) == 0);
    for (uint64_t i = 0; i < 8 * MiB; i += 4096) {
        bool in = (i >= 3 * MiB && i < 3 * MiB + 65536) || (i >= 5 * MiB && i < 6 * MiB);
        CHECK(mem_of(t)->bytes[i] == (in ? 0x11 : 0xee));
    }
    take_out(g, f);
}

/* ---- who waits for what ---- */

struct one_write {
    struct edge *edge;
    struct range range;
    bool done;
    int result;
};

static int write_once(void *arg)
{
    struct one_write *w = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, w->range.length);
    memset(buf, 0x77, w->range.length);
    w->result = edge_write(w->edge, w->range, buf, 0);
    w->done = true;
    free(buf);
    return 0;
}

JOB_TEST(a_guest_waits_for_its_own_chunk_only)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", 4 * MiB, 0), *t = disk(g, "t", 4 * MiB, 0);
    struct guest gu;
    struct event hold;
    event_init(&hold);
    memset(mem_of(s)->bytes, 0x11, 4 * MiB);
    guest_on(&gu, s, 1);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    mem_of(t)->hold = &hold;
    mem_of(t)->held = range_make(65536, 65536);

    SCOPE(tasks);
    struct one_write stuck = {gu.edge, range_make(65536 + 512, 512)};
    struct one_write same = {gu.edge, range_make(65536 + 4096, 512)};
    struct one_write other = {gu.edge, range_make(2 * 65536, 512)};
    scope_spawn(&tasks, write_once, &stuck);
    scope_spawn(&tasks, write_once, &same);
    scope_spawn(&tasks, write_once, &other);
    turns(30);
    CHECK(other.done && other.result == 0);
    CHECK(!stuck.done && !same.done && mem_of(t)->holding == 1);
    CHECK(mem_of(s)->bytes[65536 + 512] == 0x11);
    event_set(&hold);
    CHECK(scope_join(&tasks) == 0);
    CHECK(stuck.done && same.done && mem_of(t)->written[1] == 1);
    CHECK(mem_of(t)->bytes[65536 + 512] == 0x11);
    CHECK(mem_of(s)->bytes[65536 + 512] == 0x77);
    take_out(g, f);
    edge_detach(gu.edge);
}

JOB_TEST(a_guests_flush_does_not_wait_for_the_target)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct guest gu;
    guest_on(&gu, s, 1);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    struct one_write w = {gu.edge, range_make(0, 512)};
    write_once(&w);
    CHECK(edge_flush(gu.edge) == 0);
    CHECK(mem_of(s)->flushes == 1 && mem_of(t)->flushes == 0);
    CHECK(cbw_flush_target(f) == 0 && mem_of(t)->flushes == 1);
    take_out(g, f);
    edge_detach(gu.edge);
}

/* ---- failures ---- */

JOB_TEST(a_chunk_whose_copy_failed_remains)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", 4 * MiB, 0), *t = disk(g, "t", 4 * MiB, 0);
    struct rng rng = {5};
    bool read_failed;
    fill_random(&rng, mem_of(s)->bytes, 4 * MiB);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    struct copy *c = cbw_copy(f);
    struct copy_limits limits = {.max_workers = 1, .max_run_bytes = 65536};

    mem_of(s)->bad_read = range_make(MiB + 5, 1);
    mem_of(s)->read_errno = EILSEQ;
    CHECK(copy_run(c, &limits, &read_failed) == -EILSEQ && read_failed);
    CHECK(bitmap_count(copy_remaining(c)) == 3 * MiB && bitmap_get(copy_remaining(c), MiB));
    mem_of(s)->bad_read = range_make(0, 0);
    mem_of(t)->bad_write = range_make(3 * MiB, 512);
    mem_of(t)->write_errno = ENOSPC;
    CHECK(copy_run(c, &limits, &read_failed) == -ENOSPC && !read_failed);
    CHECK(bitmap_get(copy_remaining(c), 3 * MiB) && !bitmap_get(copy_remaining(c), MiB));
    mem_of(t)->bad_write = range_make(0, 0);
    CHECK(copy_run(c, &limits, &read_failed) == 0);
    CHECK(memcmp(mem_of(s)->bytes, mem_of(t)->bytes, 4 * MiB) == 0);
    take_out(g, f);
}

JOB_TEST(a_save_that_failed_fails_the_guest_and_remains)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct guest gu;
    bool read_failed;
    memset(mem_of(s)->bytes, 0x11, MiB);
    guest_on(&gu, s, 1);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    mem_of(t)->bad_write = range_make(0, 512);
    mem_of(t)->write_errno = EIO;
    mem_of(t)->bad_times = 1;
    struct one_write w = {gu.edge, range_make(512, 512)};
    write_once(&w);
    CHECK(w.result == -EIO);
    CHECK(bitmap_get(copy_remaining(cbw_copy(f)), 0));
    CHECK(mem_of(s)->bytes[512] == 0x11);
    CHECK(copy_run(cbw_copy(f), NULL, &read_failed) == 0);
    CHECK(memcmp(mem_of(s)->bytes, mem_of(t)->bytes, MiB) == 0);
    take_out(g, f);
    edge_detach(gu.edge);
}

/* ---- speed ---- */

static void speed_is_what_was_asked(void **state)
{
    struct rate r = {0};
    CHECK(rate_ready_at(&r, 1000) == 0);
    rate_spend(&r, 1000, 1 << 30);
    rate_set(&r, 10 * 1000 * 1000);
    uint64_t now = 5000, sent = 0;
    for (int i = 0; i < 1000; i++) {
        uint64_t at = rate_ready_at(&r, now);
        if (at) {
            CHECK(at > now);
            now = at;
            continue;
        }
        rate_spend(&r, now, 300000);
        sent += 300000;
    }
    double seconds = (double)(now - 5000) / NSEC_PER_SEC;
    CHECK((double)sent / seconds < 10.5e6 && (double)sent / seconds > 9e6);
    rate_set(&r, 1);
    rate_spend(&r, now, MiB);
    CHECK(rate_ready_at(&r, now) > now + 100000 * NSEC_PER_SEC);
    rate_set(&r, 1000 * MiB);
    CHECK(rate_ready_at(&r, now) == 0 || rate_ready_at(&r, now) <= now + NSEC_PER_SEC / 10);
}

static int run_copy(void *arg)
{
    bool read_failed;
    SHIELD();
    int r = copy_run(arg, NULL, &read_failed);
    CHECK(r == 0 || r == -EINTR);
    return 0;
}

JOB_TEST(a_slow_job_holds_up_no_guest_and_hears_at_once)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", 8 * MiB, 0), *t = disk(g, "t", 8 * MiB, 0);
    struct guest gu;
    memset(mem_of(s)->bytes, 0x11, 8 * MiB);
    guest_on(&gu, s, 1);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    struct copy *c = cbw_copy(f);
    copy_set_speed(c, 1);
    SCOPE(tasks);
    scope_spawn(&tasks, run_copy, c);
    turns(50);
    CHECK(copy_progress(c).done == MiB && copy_progress(c).total == 8 * MiB);
    struct one_write w = {gu.edge, range_make(7 * MiB, 65536)};
    write_once(&w);
    CHECK(w.result == 0 && copy_progress(c).done == MiB + 65536);
    copy_interrupt(c);
    CHECK(scope_join(&tasks) == 0);
    copy_resume(c);
    scope_spawn(&tasks, run_copy, c);
    turns(50);
    CHECK(copy_progress(c).done == MiB + 65536);
    copy_set_speed(c, 0);
    CHECK(scope_join(&tasks) == 0); /* (a byte a second would take days) */
    CHECK(copy_progress(c).done == 8 * MiB);
    take_out(g, f);
    edge_detach(gu.edge);
}

/* ---- the filters by themselves: fleecing ---- */

static struct node *open_json(struct graph *g, struct json_object *o)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    int r = graph_open(g, o, &n, &err);
    CHECK_OK(r, err);
    json_object_put(o);
    return n;
}

struct reader {
    struct edge *edge;
    const uint8_t *then;
    struct rng rng;
    unsigned reads;
    bool stop;
};

static int reader_task(void *arg)
{
    struct reader *rd = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, 200000);
    while (!rd->stop) {
        uint64_t size = node_size(rd->edge->node), start = rng_below(&rd->rng, size);
        uint64_t length = 1 + rng_below(&rd->rng, min_u64(size - start, 200000));
        CHECK(edge_read(rd->edge, range_make(start, length), buf, 0) == 0);
        CHECK(memcmp(buf, rd->then + start, length) == 0);
        rd->reads++;
        CHECK(task_yield() == 0);
    }
    free(buf);
    return 0;
}

JOB_TEST(snapshot_access_reads_the_old_state)
{
    enum { SIZE = 4 * 1024 * 1024 };
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", SIZE, 0), *t = disk(g, "t", SIZE, 0);
    fill_disk(s, 3);
    uint8_t *then = xcalloc(1, SIZE);
    memcpy(then, mem_of(s)->bytes, SIZE);
    mem_of(s)->yields = mem_of(t)->yields = 3;
    {
        CLEANUP(node_unrefp)
        struct node *f = open_json(g, parse("{'driver':'copy-before-write','node-name':'f',"
                                            "'file':'s','target':'t'}"));
        CLEANUP(node_unrefp)
        struct node *a =
            open_json(g, parse("{'driver':'snapshot-access','node-name':'a','file':'f'}"));
        struct guest gu[2];
        struct test_user u;
        struct reader rd[3];
        for (int i = 0; i < 2; i++)
            guest_on(&gu[i], f, 40 + i);
        struct edge *e = attach(&u, a, PERM_CONSISTENT_READ, PERM_ALL);
        SCOPE(tasks);
        for (int i = 0; i < 3; i++) {
            rd[i] = (struct reader){e, then, {70 + i}};
            scope_spawn(&tasks, reader_task, &rd[i]);
        }
        for (int i = 0; i < 2; i++) {
            gu[i].writes = 150;
            scope_spawn(&tasks, guest_task, &gu[i]);
        }
        while (gu[0].done < 150 || gu[1].done < 150)
            turns(1);
        for (int i = 0; i < 3; i++)
            rd[i].stop = true;
        CHECK(scope_join(&tasks) == 0);
        CHECK(rd[0].reads > 5 && gu[0].failed == 0);
        CHECK(memcmp(then, mem_of(s)->bytes, SIZE) != 0);

        /* Queries: what may be read, then what was held; newest first. */
        struct dirty_bitmap *readable = dirty_first(f), *held = dirty_next(readable);
        CHECK(bitmap_count(dirty_bits(readable)) == SIZE && bitmap_count(dirty_bits(held)) > 0);
        CHECK(!dirty_name(readable) && !dirty_next(held));

        /* What nobody wants any more cannot be read. */
        CHECK(edge_discard(e, range_make(0, 65536)) == 0);
        uint8_t byte;
        struct block_status st;
        CHECK(edge_status_above(e, NULL, true, range_make(65536, SIZE - 65536), &st) == 0);
        CHECK(st.length > 0);
        CHECK(edge_write(e, range_make(65536, 512), then, 0) < 0);
        if (a->discard_unmap)
            CHECK(edge_read(e, range_make(0, 1), &byte, 0) == -EACCES);
        edge_detach(e);
        for (int i = 0; i < 2; i++)
            edge_detach(gu[i].edge);
    }
    free(then);
}

static int read_once(void *arg)
{
    struct reader *rd = arg;
    SHIELD();
    uint8_t buf[512];
    CHECK(edge_read(rd->edge, range_make(512, 512), buf, 0) == 0);
    CHECK(memcmp(buf, rd->then + 512, 512) == 0);
    rd->reads++;
    return 0;
}

JOB_TEST(a_guests_write_waits_for_who_reads_the_old_state)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct event hold;
    struct guest gu;
    struct test_user u;
    event_init(&hold);
    memset(mem_of(s)->bytes, 0x11, MiB);
    uint8_t *then = xcalloc(1, MiB);
    memset(then, 0x11, MiB);
    CLEANUP(node_unrefp)
    struct node *f = open_json(
        g, parse("{'driver':'copy-before-write','node-name':'f','file':'s','target':'t'}"));
    CLEANUP(node_unrefp)
    struct node *a = open_json(g, parse("{'driver':'snapshot-access','node-name':'a','file':'f'}"));
    guest_on(&gu, f, 1);
    struct reader rd = {attach(&u, a, PERM_CONSISTENT_READ, PERM_ALL), then, {1}};
    struct one_write w = {gu.edge, range_make(0, 4096)};

    SCOPE(tasks);
    mem_of(s)->hold_read = &hold;
    mem_of(s)->held = range_make(512, 512);
    scope_spawn(&tasks, read_once, &rd);
    turns(5);
    mem_of(s)->hold_read = NULL; /* the save may read, the write may write */
    scope_spawn(&tasks, write_once, &w);
    turns(30);
    CHECK(mem_of(t)->bytes[512] == 0x11 && mem_of(s)->bytes[512] == 0x11 && !w.done);
    event_set(&hold);
    CHECK(scope_join(&tasks) == 0);
    CHECK(w.done && rd.reads == 1 && mem_of(s)->bytes[512] == 0x77);
    edge_detach(rd.edge);
    edge_detach(gu.edge);
    free(then);
}

struct removal {
    struct graph *graph;
    struct node *filter;
    bool done;
};

static int take_out_task(void *arg)
{
    struct removal *rm = arg;
    SHIELD();
    take_out(rm->graph, rm->filter);
    rm->done = true;
    return 0;
}

JOB_TEST(a_filter_does_not_go_while_somebody_reads_the_old_state_through_it)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct event hold;
    struct guest gu;
    struct test_user u;
    event_init(&hold);
    memset(mem_of(s)->bytes, 0x11, MiB);
    uint8_t *then = xcalloc(1, MiB);
    memset(then, 0x11, MiB);
    guest_on(&gu, s, 1);
    struct node *f = insert(g, s, t);
    let_in(g, f);
    struct one_write w = {gu.edge, range_make(0, 4096)};
    write_once(&w); /* the old state is on the target */
    edge_detach(gu.edge);
    CLEANUP(node_unrefp)
    struct node *a = open_json(
        g, parse("{'driver':'snapshot-access','node-name':'a','file':'%s'}", node_name(f)));
    struct reader rd = {attach(&u, a, PERM_CONSISTENT_READ, PERM_ALL), then, {1}};
    struct removal rm = {g, f};

    SCOPE(tasks);
    mem_of(t)->hold_read = &hold;
    mem_of(t)->held = range_make(512, 512);
    scope_spawn(&tasks, read_once, &rd);
    turns(5);
    scope_spawn(&tasks, take_out_task, &rm);
    turns(20);
    CHECK(!rm.done && !rd.reads);
    event_set(&hold);
    CHECK(scope_join(&tasks) == 0);
    CHECK(rm.done && rd.reads == 1);
    uint8_t buf[512];
    CHECK(edge_read(rd.edge, range_make(0, 512), buf, 0) == -ENOTSUP);
    edge_detach(rd.edge);
    free(then);
}

/* A backup by bitmap, or of the top layer, saves a part only. */
JOB_TEST(what_was_not_saved_and_is_overwritten_cannot_be_read)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct guest gu;
    struct test_user u;
    uint8_t buf[4096];
    memset(mem_of(s)->bytes, 0x11, MiB);
    memset(mem_of(t)->bytes, 0xee, MiB);
    guest_on(&gu, s, 1);
    struct node *f = insert(g, s, t);
    bitmap_clear_all(copy_remaining(cbw_copy(f)));
    bitmap_mark(copy_remaining(cbw_copy(f)), range_make(3 * 65536, 65536));
    let_in(g, f);
    struct node *a = open_json(
        g, parse("{'driver':'snapshot-access','node-name':'a','file':'%s'}", node_name(f)));
    struct edge *e = attach(&u, a, PERM_CONSISTENT_READ, PERM_ALL);

    for (int c = 0; c < 4; c += 3) {
        struct one_write w = {gu.edge, range_make((uint64_t)c * 65536, 512)};
        write_once(&w);
        CHECK(w.result == 0);
    }
    CHECK(edge_read(e, range_make(4096, 4096), buf, 0) == -EACCES);
    CHECK(edge_read(e, range_make(65536, 4096), buf, 0) == 0 && buf[0] == 0x11);
    CHECK(edge_read(e, range_make(3 * 65536, 4096), buf, 0) == 0 && buf[0] == 0x11);
    edge_detach(e);
    node_unref(a);
    take_out(g, f);
    edge_detach(gu.edge);
}

JOB_TEST(a_disk_is_not_resized_while_its_old_state_is_kept)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct error err = ERROR_INIT;
    struct test_user u;
    struct node *f = insert(g, s, t);
    let_in(g, f);
    struct edge *e = attach(&u, f, PERM_RESIZE, PERM_ALL);
    CHECK(edge_truncate(e, MiB / 2, true, &err) == -EBUSY);
    CHECK(edge_truncate(e, 2 * MiB, true, &err) == -EBUSY);
    take_out(g, f);
    CHECK(edge_truncate(e, MiB / 2, true, &err) == -ENOTSUP); /* this disk cannot */
    edge_detach(e);
}

static void reopen_fails(struct graph *g, const char *text, struct json_object *node)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp) struct json_object *list = json_object_new_array();
    json_object_array_add(list, node);
    CHECK(graph_reopen(g, list, &err) == -EBUSY);
    if (strcmp(err.text, text) != 0)
        fail_msg("'%s' instead of '%s'", err.text, text);
}

/* Not by a reopen either, of this size or of another, right below the filter or further down. */
JOB_TEST(a_disk_does_not_become_another_while_its_old_state_is_kept)
{
    static const char text[] = "Node 'f' keeps the disk as it was, which cannot become another";
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    CLEANUP(node_unrefp) struct node *like = disk(g, "like", MiB, 0);
    CLEANUP(node_unrefp) struct node *large = disk(g, "large", 2 * MiB, 0);
    CLEANUP(node_unrefp)
    struct node *low = open_json(g, parse("{'driver':'raw','node-name':'low','file':'s'}"));
    CLEANUP(node_unrefp)
    struct node *top = open_json(g, parse("{'driver':'raw','node-name':'top','file':'low'}"));
    CLEANUP(node_unrefp)
    struct node *f = open_json(g, parse("{'driver':'copy-before-write','node-name':'f',"
                                        "'file':'top','target':'t'}"));
    reopen_fails(g, text, parse("{'driver':'raw','node-name':'top','file':'like'}"));
    reopen_fails(g, text, parse("{'driver':'raw','node-name':'top','file':'large'}"));
    reopen_fails(g, text, parse("{'driver':'raw','node-name':'low','file':'large'}"));
    CHECK(node_size(f) == MiB && bitmap_size(copy_remaining(cbw_copy(f))) == MiB);
}

JOB_TEST(a_bitmap_says_what_is_in_the_snapshot)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    memset(mem_of(s)->bytes, 0x11, MiB);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b','disabled':true}"));
    bitmap_mark(dirty_bits(dirty_find(s, "b")), range_make(3 * 65536, 1));
    {
        CLEANUP(node_unrefp)
        struct node *f =
            open_json(g, parse("{'driver':'copy-before-write','node-name':'f','file':'s',"
                               "'target':'t','bitmap':{'node':'s','name':'b'}}"));
        CLEANUP(node_unrefp)
        struct node *a =
            open_json(g, parse("{'driver':'snapshot-access','node-name':'a','file':'f'}"));
        struct test_user u;
        struct guest gu;
        guest_on(&gu, f, 1);
        struct edge *e = attach(&u, a, PERM_CONSISTENT_READ, PERM_ALL);
        struct one_write w = {gu.edge, range_make(0, MiB)};
        write_once(&w);
        uint8_t buf[512];
        CHECK(edge_read(e, range_make(3 * 65536, 512), buf, 0) == 0 && buf[0] == 0x11);
        CHECK(edge_read(e, range_make(2 * 65536, 512), buf, 0) == -EACCES);
        CHECK(mem_of(t)->written[3] == 1 && mem_of(t)->written[2] == 0);
        edge_detach(e);
        edge_detach(gu.edge);
    }
    struct error err = ERROR_INIT;
    struct node *f = NULL;
    CLEANUP(json_putp)
    struct json_object *o = parse("{'driver':'copy-before-write','file':'s','target':'t',"
                                  "'bitmap':{'node':'s','name':'c'}}");
    CHECK(graph_open(g, o, &f, &err) < 0);
    CHECK_TEXT(err, "Dirty bitmap 'c' not found");
    command_ok(g, "block-dirty-bitmap-remove", parse("{'node':'s','name':'b'}"));
}

JOB_TEST(break_snapshot_spares_the_guest)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    memset(mem_of(s)->bytes, 0x11, MiB);
    CLEANUP(node_unrefp)
    struct node *f = open_json(g, parse("{'driver':'copy-before-write','node-name':'f','file':'s',"
                                        "'target':'t','on-cbw-error':'break-snapshot'}"));
    CLEANUP(node_unrefp)
    struct node *a = open_json(g, parse("{'driver':'snapshot-access','node-name':'a','file':'f'}"));
    struct test_user u;
    struct guest gu;
    guest_on(&gu, f, 1);
    struct edge *e = attach(&u, a, PERM_CONSISTENT_READ, PERM_ALL);
    mem_of(t)->bad_write = range_make(0, MiB);
    mem_of(t)->write_errno = ENOSPC;
    struct one_write w = {gu.edge, range_make(0, 512)};
    write_once(&w);
    CHECK(w.result == 0 && mem_of(s)->bytes[0] == 0x77);
    uint8_t buf[512];
    CHECK(edge_read(e, range_make(65536, 512), buf, 0) == -EACCES);
    edge_detach(e);
    edge_detach(gu.edge);
}

JOB_TEST(a_guest_waits_no_longer_than_the_timeout)
{
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", MiB, 0), *t = disk(g, "t", MiB, 0);
    struct event hold;
    event_init(&hold);
    {
        CLEANUP(node_unrefp)
        struct node *f =
            open_json(g, parse("{'driver':'copy-before-write','node-name':'f','file':'s',"
                               "'target':'t','cbw-timeout':1}"));
        struct guest gu;
        guest_on(&gu, f, 1);
        memset(mem_of(s)->bytes, 0x11, MiB);
        mem_of(t)->hold = &hold;
        mem_of(t)->held = range_make(0, MiB);
        struct one_write w = {gu.edge, range_make(0, 512)};
        uint64_t before = clock_now_ns();
        write_once(&w);
        CHECK(w.result == -ETIMEDOUT && mem_of(s)->bytes[0] == 0x11);
        CHECK(clock_now_ns() - before >= NSEC_PER_SEC);
        event_set(&hold);
        edge_detach(gu.edge);
    }
    CHECK(mem_of(t)->bytes[0] == 0x11); /* the save has ended in time for the close */
}

JOB_TEST(a_removed_filter_under_load_loses_nothing)
{
    enum { SIZE = 2 * 1024 * 1024 };
    CLEANUP(node_unrefp) struct node *s = disk(g, "s", SIZE, 0), *t = disk(g, "t", SIZE, 0);
    struct guest gu;
    mem_of(s)->yields = mem_of(t)->yields = 3;
    guest_on(&gu, s, 9);
    SCOPE(tasks);
    scope_spawn(&tasks, guest_task, &gu);
    for (int i = 0; i < 50; i++) {
        struct node *f = insert(g, s, t);
        let_in(g, f);
        turns(20);
        take_out(g, f);
    }
    gu.stop = true;
    CHECK(scope_join(&tasks) == 0);
    CHECK(gu.failed == 0 && gu.done > 50);
    edge_detach(gu.edge);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_target_is_the_disk_at_its_instant),
    cmocka_unit_test(a_copy_of_a_set_takes_that_alone),
    cmocka_unit_test(a_guest_waits_for_its_own_chunk_only),
    cmocka_unit_test(a_guests_flush_does_not_wait_for_the_target),
    cmocka_unit_test(a_chunk_whose_copy_failed_remains),
    cmocka_unit_test(a_save_that_failed_fails_the_guest_and_remains),
    cmocka_unit_test(speed_is_what_was_asked),
    cmocka_unit_test(a_slow_job_holds_up_no_guest_and_hears_at_once),
    cmocka_unit_test(snapshot_access_reads_the_old_state),
    cmocka_unit_test(a_guests_write_waits_for_who_reads_the_old_state),
    cmocka_unit_test(a_filter_does_not_go_while_somebody_reads_the_old_state_through_it),
    cmocka_unit_test(what_was_not_saved_and_is_overwritten_cannot_be_read),
    cmocka_unit_test(a_disk_is_not_resized_while_its_old_state_is_kept),
    cmocka_unit_test(a_disk_does_not_become_another_while_its_old_state_is_kept),
    cmocka_unit_test(a_bitmap_says_what_is_in_the_snapshot),
    cmocka_unit_test(break_snapshot_spares_the_guest),
    cmocka_unit_test(a_guest_waits_no_longer_than_the_timeout),
    cmocka_unit_test(a_removed_filter_under_load_loses_nothing),
};

UNIT_MAIN(tests)
