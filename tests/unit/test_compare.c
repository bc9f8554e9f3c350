/* The compare job: that a bitmap is made anew exactly, while guests write; what failures, cancels
 * and groups leave of it; what must be durable before it is trusted. Its speed: test_job_speed.c.
 */
#include "jobutil.h"

enum { SIZE = 4 * 1024 * 1024, UNIT = 65536 };

static struct node *s, *t;

static void close_disks(void)
{
    node_unref(steal(s));
    node_unref(steal(t));
    events[0] = '\0';
}

static struct dirty_bitmap *add(struct graph *g, const char *node, const char *name,
                                uint64_t granularity)
{
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'%s','name':'%s','granularity':%llu}", node, name,
                     (unsigned long long)granularity));
    return dirty_find(graph_find(g, node), name);
}

static void compare(struct graph *g, const char *more)
{
    command_ok(g, "x-tidemark-compare",
               parse("{'device':'s','target':'t','job-id':'j','bitmap':'b'%s}", more));
}

/* What has come over bitmap B of S: cannot be trusted, and has bits of its own. */
static struct dirty_bitmap *lost_bitmap(struct graph *g, uint64_t granularity)
{
    struct dirty_bitmap *bm = add(g, "s", "b", granularity);
    dirty_set_inconsistent(bm);
    return bm;
}

static void write_at(struct edge *e, uint64_t start, uint64_t length, uint8_t value)
{
    uint8_t *buf = xcalloc(1, length);
    memset(buf, value, length);
    CHECK(edge_write(e, range_make(start, length), buf, 0) == 0);
    free(buf);
}

static bool at_rest(struct dirty_bitmap *bm)
{
    return !dirty_busy(bm) && dirty_next(dirty_first(s)) == NULL;
}

/* ---- what it finds ---- */

static uint8_t base_byte(uint64_t i)
{
    return i < node_size(t) ? mem_of(t)->bytes[i] : 0;
}

/* THEN: the disk at the instant. SINCE: what was written from it on. */
static void check_bits(struct dirty_bitmap *bm, const uint8_t *then, struct bitmap *since)
{
    struct bitmap *bits = dirty_bits(bm);
    uint64_t size = node_size(s), granularity = bitmap_granularity(bits);

    for (uint64_t at = 0; at < size; at += granularity) {
        bool dirty = bitmap_get(since, at);
        for (uint64_t i = at; !dirty && i < min_u64(at + granularity, size); i++)
            dirty = then[i] != base_byte(i);
        CHECK(dirty == bitmap_get(bits, at));
    }
}

static void differ(struct rng *rng)
{
    for (uint64_t n = rng_below(rng, 12); n; n--) {
        struct mem *m = mem_of(rng_below(rng, 2) ? s : t);
        uint64_t size = min_u64(node_size(s), node_size(t));
        uint64_t at = rng_below(rng, size), length = 1 + rng_below(rng, size >> rng_below(rng, 20));
        memset(m->bytes + at, rng_below(rng, 2) ? (int)rng_below(rng, 256) : 0,
               min_u64(length, size - at));
    }
}

static void compare_under_writes(struct graph *g, uint64_t seed)
{
    static const uint64_t granularities[] = {512, 4096, UNIT, MiB, 8 * MiB};
    struct rng rng = {seed * 77777 + 1};
    uint64_t size = SIZE - rng_below(&rng, 3) * 512 * 7, base = size;
    struct guest guests[2];
    unsigned n_guests = (unsigned)rng_below(&rng, 3);

    if (rng_below(&rng, 2))
        base = align_down(rng_below(&rng, 2 * size), 512);
    s = disk(g, "s", size, 0);
    t = disk(g, "t", base, 0);
    fill_disk(s, seed);
    memcpy(mem_of(t)->bytes, mem_of(s)->bytes, min_u64(size, base));
    if (base)
        differ(&rng);
    mem_of(s)->yields = (unsigned)rng_below(&rng, 3);
    mem_of(t)->yields = (unsigned)rng_below(&rng, 5);
    uint64_t granularity = granularities[rng_below(&rng, ARRAY_SIZE(granularities))];
    struct dirty_bitmap *bm =
        rng_below(&rng, 2) ? lost_bitmap(g, granularity) : add(g, "s", "b", granularity);

    SCOPE(tasks);
    for (unsigned i = 0; i < n_guests; i++) {
        guest_on(&guests[i], s, seed * 3 + i);
        guests[i].writes = rng_below(&rng, 2) ? 3 : UINT32_MAX;
        scope_spawn(&tasks, guest_task, &guests[i]);
    }
    turns(5);
    uint8_t *then = xcalloc(1, size);
    graph_quiesce_begin(g, &s, 1); /* nested: the command's instant is this one */
    memcpy(then, mem_of(s)->bytes, size);
    struct dirty_bitmap *since = add(g, "s", "since", granularity);
    compare(g, "");
    CHECK(dirty_busy(bm) && dirty_recording(bm));
    graph_quiesce_end(g, &s, 1);

    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:concluded"));
    CHECK(!dirty_busy(bm) && dirty_enabled(bm) && !dirty_inconsistent(bm));
    graph_quiesce_begin(g, &s, 1);
    check_bits(bm, then, dirty_bits(since));
    graph_quiesce_end(g, &s, 1);
    for (unsigned i = 0; i < n_guests; i++) {
        guests[i].stop = true;
        CHECK(guests[i].failed == 0);
    }
    CHECK(scope_join(&tasks) == 0);
    for (uint64_t i = 0; i < size; i++)
        CHECK(base_byte(i) == mem_of(s)->bytes[i] || bitmap_get(dirty_bits(bm), i));
    for (unsigned i = 0; i < n_guests; i++)
        edge_detach(guests[i].edge);
    free(then);
    close_disks();
}

JOB_TEST(the_bitmap_is_what_differs_and_what_was_written)
{
    for (uint64_t seed = 1; seed <= 60; seed++)
        compare_under_writes(g, seed);
}

/* Only data is read, on the side that has it, and nothing that is dirty anyway. */
JOB_TEST(nothing_is_read_in_vain)
{
    struct guest gu;
    struct event hold;
    s = disk(g, "s", SIZE, 0);
    t = disk(g, "t", SIZE - UNIT / 2, 0);
    struct dirty_bitmap *bm = lost_bitmap(g, UNIT);
    memset(mem_of(s)->bytes + 2 * UNIT, 1, 2 * UNIT);
    memset(mem_of(t)->bytes + 3 * UNIT, 1, 2 * UNIT);
    memset(mem_of(s)->bytes + 40 * UNIT, 2, UNIT);
    memset(mem_of(t)->bytes + 40 * UNIT, 3, UNIT);
    event_init(&hold);
    mem_of(s)->hold_read = &hold;
    mem_of(s)->held = range_make(2 * UNIT, UNIT);
    mem_of(t)->hold_status = &hold;
    guest_on(&gu, s, 1);
    compare(g, "");
    for (int i = 0; !mem_of(t)->holding; i++) {
        CHECK(i < 1000);
        turns(1);
    }
    write_at(gu.edge, 40 * UNIT, UNIT, 4);
    event_set(&hold);
    mem_of(s)->hold_read = NULL;
    mem_of(t)->hold_status = NULL;
    wait_for("j", "null");
    CHECK(mem_of(s)->read_bytes == 2 * UNIT && mem_of(t)->read_bytes == 2 * UNIT);
    CHECK(bitmap_count(dirty_bits(bm)) == 3 * UNIT); /* 2, 4, 40 */
    CHECK(!bitmap_get(dirty_bits(bm), 3 * UNIT) && bitmap_get(dirty_bits(bm), 40 * UNIT));
    edge_detach(gu.edge);
    close_disks();
}

/* What the backup has beyond the disk's end comes back as something else when the disk grows. */
JOB_TEST(a_base_beyond_the_end)
{
    s = disk(g, "s", SIZE, 0);
    t = disk(g, "t", 2 * SIZE, 0);
    struct dirty_bitmap *bm = lost_bitmap(g, UNIT);
    compare(g, "");
    wait_for("j", "null");
    CHECK(bitmap_count(dirty_bits(bm)) == 0);
    graph_quiesce_begin(g, &s, 1);
    struct write_observer *o;
    s->truncating = true; /* or it would be a reopen, after which all that has grown is dirty */
    TAILQ_FOREACH (o, &s->observers, link)
        if (o->resized)
            o->resized(o, SIZE, 3 * SIZE);
    s->truncating = false;
    CHECK(bitmap_count(dirty_bits(bm)) == SIZE);
    CHECK(bitmap_get(dirty_bits(bm), SIZE) && !bitmap_get(dirty_bits(bm), 2 * SIZE));
    TAILQ_FOREACH (o, &s->observers, link)
        if (o->resized)
            o->resized(o, 3 * SIZE, SIZE);
    graph_quiesce_end(g, &s, 1);
    close_disks();
}

static void reopen_raw(struct graph *g, uint64_t size)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *list = parse("[{'driver':'raw','node-name':'r','file':'s','size':%llu}]",
                                     (unsigned long long)size);
    int r = graph_reopen(g, list, &err);
    CHECK_OK(r, err);
}

/* A reopen gives the disk another size while it is compared, or while the job is paused. That ends
 * it; if the size is what it was again before the job has seen it, what was away is dirty. */
JOB_TEST(a_disk_of_another_size)
{
    static const uint64_t sizes[] = {SIZE / 2, SIZE + UNIT / 2};
    for (unsigned how = 0; how < 6; how++) {
        struct error err = ERROR_INIT;
        s = disk(g, "s", 2 * SIZE, 0);
        t = disk(g, "t", SIZE, 0);
        memset(mem_of(s)->bytes, 1, 2 * SIZE);
        memset(mem_of(t)->bytes, 1, SIZE);
        CLEANUP(json_putp)
        struct json_object *o =
            parse("{'driver':'raw','node-name':'r','file':'s','size':%d}", SIZE);
        struct node *n = NULL;
        int r = graph_open(g, o, &n, &err);
        CHECK_OK(r, err);
        struct dirty_bitmap *bm = add(g, "r", "b", UNIT);
        bool back = how >= 4;
        command_ok(g, "x-tidemark-compare",
                   parse("{'device':'r','target':'t','job-id':'j','bitmap':'b','speed':%llu}",
                         (unsigned long long)MiB));
        if (how / 2) {
            verb_ok("j", JOB_VERB_PAUSE);
            wait_for("j", "paused");
        } else {
            turns(20);
        }
        reopen_raw(g, sizes[how % 2]);
        if (back)
            reopen_raw(g, SIZE);
        CHECK(jobs_set_speed(js, "j", 0, &err) == 0);
        if (how / 2)
            verb_ok("j", JOB_VERB_RESUME);
        wait_for("j", "null");
        CHECK(!strstr(events, "COMPLETED(Node 'r' has got another size)") == back);
        CHECK(!dirty_busy(bm) && !dirty_inconsistent(bm));
        CHECK(!back || bitmap_count(dirty_bits(bm)) == (how % 2 ? 0 : SIZE / 2));
        node_unref(n);
        close_disks();
    }
}

/* The base is what it was: what has been compared would be of another place. */
JOB_TEST(a_base_that_is_to_move)
{
    struct error err = ERROR_INIT;
    struct node *base = NULL;
    s = disk(g, "s", SIZE, 0);
    t = disk(g, "t", SIZE, 0);
    memset(mem_of(s)->bytes, 1, SIZE);
    memset(mem_of(t)->bytes, 1, SIZE);
    CLEANUP(json_putp)
    struct json_object *o = parse("{'driver':'raw','node-name':'r','file':'t'}");
    int r = graph_open(g, o, &base, &err);
    CHECK_OK(r, err);
    (void)add(g, "s", "b", UNIT);
    command_ok(g, "x-tidemark-compare",
               parse("{'device':'s','target':'r','job-id':'j','bitmap':'b','speed':%llu}",
                     (unsigned long long)MiB));
    turns(20);
    for (int offset = 0; offset <= 512; offset += 512) {
        CLEANUP(json_putp)
        struct json_object *list =
            parse("[{'driver':'raw','node-name':'r','file':'t','offset':%d,'size':%d}]", offset,
                  SIZE - 512);
        error_clear(&err);
        CHECK(graph_reopen(g, list, &err) == -EPERM);
        CHECK(!strcmp(err.text, "Node 'r' may not be resized: x-tidemark-compare job 'j' uses it"));
    }
    CHECK(jobs_set_speed(js, "j", 0, &err) == 0);
    wait_for("j", "null");
    node_unref(base);
    close_disks();
}

/* ---- failures ---- */

JOB_TEST(what_cannot_be_read)
{
    static const char *const actions[] = {"report", "ignore", "stop", "enospc"};
    for (unsigned i = 0; i < 2 * 4; i++) {
        const char *action = actions[i / 2];
        bool disk_fails = i % 2;
        char more[96], text[200];
        s = disk(g, "s", SIZE, 0);
        t = disk(g, "t", SIZE, 0);
        memset(mem_of(s)->bytes, 1, SIZE);
        memset(mem_of(t)->bytes, 1, SIZE);
        mem_of(s)->bytes[33 * UNIT] = 2; /* in the piece that fails */
        struct dirty_bitmap *bm = i & 4 ? lost_bitmap(g, UNIT) : add(g, "s", "b", UNIT);
        struct mem *m = mem_of(disk_fails ? s : t);
        m->bad_read = range_make(34 * UNIT, 512);
        m->read_errno = strcmp(action, "enospc") == 0 ? ENOSPC : EIO;
        m->bad_times = 1;
        snprintf(more, sizeof more, ",'on-%s-error':'%s'", disk_fails ? "source" : "target",
                 action);
        compare(g, more);
        if (strcmp(action, "report") == 0) {
            wait_for("j", "null");
            snprintf(text, sizeof text,
                     "j:ERROR(read report) j:aborting j:COMPLETED(Could not read node '%s' at "
                     "offset %u: Input/output error)",
                     disk_fails ? "s" : "t", 32 * UNIT);
            CHECK(strstr(events, text));
            CHECK(!dirty_inconsistent(bm) && bitmap_count(dirty_bits(bm)) == 0);
        } else {
            if (strcmp(action, "ignore")) {
                wait_for("j", "paused");
                CHECK(strstr(events, "j:ERROR(read stop) j:paused"));
                CHECK(dirty_busy(bm));
                verb_ok("j", JOB_VERB_RESUME);
            }
            wait_for("j", "null");
            CHECK(strstr(events, "j:COMPLETED j:concluded"));
            CHECK(!dirty_inconsistent(bm) && dirty_enabled(bm));
            CHECK(bitmap_count(dirty_bits(bm)) == UNIT);
            CHECK(bitmap_get(dirty_bits(bm), 33 * UNIT));
        }
        CHECK(at_rest(bm));
        close_disks();
    }
}

/* Either what was there and what was written; or not to be trusted, and not recording. */
static void check_undone(struct dirty_bitmap *bm, bool lost, uint64_t count)
{
    CHECK(at_rest(bm));
    CHECK(dirty_inconsistent(bm) == lost && dirty_enabled(bm) == !lost);
    CHECK(lost || bitmap_count(dirty_bits(bm)) == count);
}

JOB_TEST(it_can_be_cancelled_whenever)
{
    static const char *const states[] = {"not committed", "not started", "reading",
                                         "paused",        "pending",     "failed flush"};
    for (unsigned i = 0; i < 2 * ARRAY_SIZE(states); i++) {
        const char *state = states[i / 2];
        bool lost = i % 2;
        struct error err = ERROR_INIT;
        struct event hold;
        struct guest gu;
        s = disk(g, "s", SIZE, 0);
        t = disk(g, "t", SIZE, 0);
        memset(mem_of(s)->bytes, 1, SIZE);
        memset(mem_of(t)->bytes, 2, SIZE); /* all differs */
        guest_on(&gu, s, 1);
        struct dirty_bitmap *bm = add(g, "s", "b", UNIT);
        write_at(gu.edge, 0, UNIT, 3);
        if (lost)
            dirty_set_inconsistent(bm);
        if (strcmp(state, "not committed") == 0) {
            CLEANUP(json_putp)
            struct json_object *actions = parse(
                "[{'type':'x-tidemark-compare','data':{'device':'s','target':'t','job-id':'j',"
                "'bitmap':'b'}},{'type':'abort','data':{}}]");
            CHECK(transaction_run(g, js, actions, NULL, &err) < 0);
            CHECK_TEXT(err, "Transaction aborted using Abort action");
            CHECK(strcmp(events, "j:created j:aborting j:concluded j:null ") == 0);
            check_undone(bm, lost, UNIT);
            edge_detach(gu.edge);
            close_disks();
            continue;
        }
        event_init(&hold);
        if (strcmp(state, "reading") == 0) {
            mem_of(t)->hold_read = &hold;
            mem_of(t)->held = range_make(0, SIZE);
        }
        compare(g, strcmp(state, "pending") ? "" : ",'auto-finalize':false");
        if (strcmp(state, "not started")) {
            if (strcmp(state, "pending") == 0)
                wait_for("j", "pending");
            else
                turns(3);
            write_at(gu.edge, 2 * UNIT, UNIT, 4);
        }
        if (strcmp(state, "paused") == 0)
            verb_ok("j", JOB_VERB_PAUSE);
        if (strcmp(state, "failed flush") == 0) {
            mem_of(t)->flush_errno = EIO;
        } else {
            verb_ok("j", JOB_VERB_CANCEL);
        }
        turns(20);
        event_set(&hold);
        wait_for("j", "null");
        CHECK(strstr(events, strcmp(state, "failed flush")
                                 ? "j:CANCELLED"
                                 : "COMPLETED(Could not flush node 't': Input/output error)"));
        check_undone(bm, lost, strcmp(state, "not started") ? 2 * UNIT : UNIT);
        write_at(gu.edge, 5 * UNIT, UNIT, 4);
        check_undone(bm, lost, strcmp(state, "not started") ? 3 * UNIT : 2 * UNIT);
        mem_of(t)->hold_read = NULL;
        edge_detach(gu.edge);
        close_disks();
    }
}

/* ---- what is durable ---- */

static struct dirty_store store;
static char said[2048]; /* what each commit made durable of B */
static unsigned flushed_s, flushed_t;
static int refuse; /* the commit with this number from now on fails */

static int note_commit(struct dirty_store *st, struct node *const *nodes, size_t n,
                       struct error *err)
{
    struct dirty_bitmap *bm = dirty_find(s, "b");
    struct dirty_state d;

    if (refuse && --refuse == 0)
        return error_set_errno(err, EIO, "The store");
    if (!bm)
        return 0;
    dirty_get_state(bm, &d);
    size_t at = strlen(said);
    snprintf(said + at, sizeof said - at, "%s%s%s%s %llu %s %llu%s; ",
             d.inconsistent ? "inconsistent" : "consistent", d.based ? "" : " unbased",
             d.enabled ? "" : " off", d.successor ? " successor" : "",
             (unsigned long long)d.generation, d.job ? d.job : "-",
             (unsigned long long)bitmap_count(d.current) / UNIT, d.folded ? " folded" : "");
    flushed_s = mem_of(s)->flushes;
    flushed_t = mem_of(t)->flushes;
    return 0;
}

static int allow(struct dirty_store *st, struct node *n, const char *name,
                 uint64_t granularity_bytes, struct error *err)
{
    return 0;
}

static void with_store(struct graph *g)
{
    store = (struct dirty_store){.can_add = allow, .commit = note_commit};
    dirty_set_store(g, &store);
    refuse = 0;
    s = disk(g, "s", SIZE, 0);
    t = disk(g, "t", SIZE, 0);
    memset(mem_of(s)->bytes + 7 * UNIT, 1, 1);
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'s','name':'b','granularity':%u,'persistent':true}", UNIT));
    dirty_set_generation(dirty_find(s, "b"), 41, "old");
    dirty_set_inconsistent(dirty_find(s, "b"));
    said[0] = '\0';
}

JOB_TEST(both_disks_are_durable_before_the_bitmap_is_trusted)
{
    with_store(g);
    compare(g, "");
    CHECK(strcmp(said, "inconsistent successor 41 old 0; ") == 0);
    CHECK(flushed_s == 0 && flushed_t == 0);
    wait_for("j", "null");
    /* One step makes it trusted; what differs is in it with no write's announcement. */
    CHECK(strcmp(said, "inconsistent successor 41 old 0; consistent 42 j 1 folded; ") == 0);
    CHECK(flushed_s == 1 && flushed_t == 1);
    close_disks();
    dirty_set_store(g, NULL);
}

JOB_TEST(what_cannot_be_made_durable_changes_nothing)
{
    struct error err = ERROR_INIT;
    with_store(g);
    struct dirty_bitmap *bm = dirty_find(s, "b");
    refuse = 1;
    CHECK(command(g, &err, "x-tidemark-compare",
                  parse("{'device':'s','target':'t','job-id':'j','bitmap':'b'}")) < 0);
    CHECK_TEXT(err, "The store: Input/output error");
    CHECK(at_rest(bm) && dirty_inconsistent(bm) && !dirty_enabled(bm));
    said[0] = '\0';
    events[0] = '\0';

    compare(g, "");
    refuse = 1;
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED(The store: Input/output error)"));
    CHECK(at_rest(bm) && dirty_inconsistent(bm) && !dirty_enabled(bm));
    CHECK(bitmap_get(dirty_bits(bm), 7 * UNIT)); /* no harm: nobody may look */
    /* Given up, and then, with no write under way, that it does not record. */
    CHECK(strstr(said, "inconsistent successor 41 old 0; inconsistent 41 old 1 folded; "
                       "inconsistent off 41 old 1; "));
    close_disks();
    dirty_set_store(g, NULL);
}

/* ---- with others ---- */

JOB_TEST(a_group_is_trusted_together_or_not_at_all)
{
    for (int fails = 0; fails < 2; fails++) {
        struct error err = ERROR_INIT;
        s = disk(g, "s", SIZE, 0);
        t = disk(g, "t", SIZE, 0);
        struct node *s2 = disk(g, "s2", SIZE, 0), *t2 = disk(g, "t2", SIZE, 0);
        struct dirty_bitmap *bm = lost_bitmap(g, UNIT), *bm2 = add(g, "s2", "b", UNIT);
        dirty_set_inconsistent(bm2);
        if (fails)
            mem_of(t2)->flush_errno = EIO;
        CLEANUP(json_putp)
        struct json_object *actions =
            parse("[{'type':'x-tidemark-compare','data':{'device':'s','target':'t','job-id':'j',"
                  "'bitmap':'b'}},{'type':'x-tidemark-compare','data':{'device':'s2',"
                  "'target':'t2','job-id':'k','bitmap':'b'}}]");
        CLEANUP(json_putp) struct json_object *how = parse("{'completion-mode':'grouped'}");
        int r = transaction_run(g, js, actions, how, &err);
        CHECK_OK(r, err);
        wait_for("j", "null");
        wait_for("k", "null");
        CHECK(dirty_inconsistent(bm) == fails && dirty_inconsistent(bm2) == fails);
        CHECK(!dirty_busy(bm) && !dirty_busy(bm2));
        node_unref(s2);
        node_unref(t2);
        close_disks();
    }
}

static void refused(struct graph *g, const char *text, const char *json)
{
    struct error err = ERROR_INIT;
    CHECK(command(g, &err, "x-tidemark-compare", parse("%s", json)) < 0);
    CHECK_TEXT(err, text);
}

#define START "{'job-id':'j','device':'s',"

JOB_TEST(what_is_refused)
{
    struct guest gu;
    s = disk(g, "s", SIZE, 0);
    t = disk(g, "t", SIZE, 0);
    struct dirty_bitmap *bm = add(g, "s", "b", UNIT);
    refused(g, "Cannot find device='x' nor node-name='x'",
            "{'device':'x','target':'t','bitmap':'b'}");
    refused(g, "Cannot find device='y' nor node-name='y'", START "'target':'y','bitmap':'b'}");
    refused(g, "Source and target cannot be the same", START "'target':'s','bitmap':'b'}");
    refused(g, "Bitmap 'x' could not be found", START "'target':'t','bitmap':'x'}");
    refused(g, "Parameter 'on-source-error' does not accept value 'x'",
            START "'target':'t','bitmap':'b','on-source-error':'x'}");
    command_ok(g, "block-dirty-bitmap-disable", parse("{'node':'s','name':'b'}"));
    refused(g, "Bitmap 'b' is disabled and cannot be rebuilt: enable it first",
            START "'target':'t','bitmap':'b'}");
    command_ok(g, "block-dirty-bitmap-enable", parse("{'node':'s','name':'b'}"));
    dirty_set_readonly(bm, true);
    refused(g, "Bitmap 'b' is readonly and cannot be modified", START "'target':'t','bitmap':'b'}");
    dirty_set_readonly(bm, false);

    CHECK(!*events);
    compare(g, ",'auto-finalize':false");
    refused(g, "Node 's' is busy: block device is in use by block job: x-tidemark-compare",
            "{'job-id':'k','device':'s','target':'t','bitmap':'b'}");
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");

    /* Who writes to the backup makes the result worthless. */
    guest_on(&gu, t, 1);
    struct error err = ERROR_INIT;
    CHECK(command(g, &err, "x-tidemark-compare", parse(START "'target':'t','bitmap':'b'}")) ==
          -EPERM);
    edge_detach(gu.edge);
    CHECK(at_rest(bm) && dirty_enabled(bm));
    close_disks();
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_bitmap_is_what_differs_and_what_was_written),
    cmocka_unit_test(nothing_is_read_in_vain),
    cmocka_unit_test(a_base_beyond_the_end),
    cmocka_unit_test(a_disk_of_another_size),
    cmocka_unit_test(a_base_that_is_to_move),
    cmocka_unit_test(what_cannot_be_read),
    cmocka_unit_test(it_can_be_cancelled_whenever),
    cmocka_unit_test(both_disks_are_durable_before_the_bitmap_is_trusted),
    cmocka_unit_test(what_cannot_be_made_durable_changes_nothing),
    cmocka_unit_test(a_group_is_trusted_together_or_not_at_all),
    cmocka_unit_test(what_is_refused),
};

UNIT_MAIN(tests)
