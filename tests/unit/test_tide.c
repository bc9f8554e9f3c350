/* The tide file on a real file system, seen through a world that writes down what is asked of it
 * and fails what the test wants to fail. */
#include "tideutil.h"

#include "persist/tide.h"
#include "rt/clock.h"
#include "rt/sync.h"
#include "rt/world.h"

#include <fcntl.h>
#include <unistd.h>

/* ---- a world over the real one ---- */

enum { OPS = 4096 };

struct spy {
    struct world world, *real;
    struct io_op ops[OPS]; /* what was asked for and has an effect; paths are not kept */
    size_t n;
    enum io_kind fail; /* the next one of this kind at or after `fail_from` ... */
    uint64_t fail_from;
    int error;     /* ... gets this; 0: none */
    bool happened; /* and yet it happened */
    bool no_direct;
    bool slow; /* others run while it is written */
};

static struct spy *spy_of(struct world *w)
{
    return container_of(w, struct spy, world);
}

static uint64_t spy_now(struct world *w)
{
    return spy_of(w)->real->now_ns(spy_of(w)->real);
}

static uint64_t spy_wall(struct world *w)
{
    return spy_of(w)->real->wall_us(spy_of(w)->real);
}

static void spy_random(struct world *w, void *buf, size_t n)
{
    spy_of(w)->real->random(spy_of(w)->real, buf, n);
}

static bool spy_turn(struct world *w, uint64_t deadline_ns)
{
    return spy_of(w)->real->turn(spy_of(w)->real, deadline_ns);
}

static bool has_effect(enum io_kind kind)
{
    return kind == IO_WRITE || kind == IO_DATASYNC || kind == IO_SYNC || kind == IO_FALLOCATE ||
           kind == IO_TRUNCATE || kind == IO_UNLINK || kind == IO_RENAME || kind == IO_SYNC_DIR;
}

static int64_t spy_perform(struct world *w, struct io_op *op)
{
    struct spy *s = spy_of(w);
    if (has_effect(op->kind)) {
        CHECK(s->n < OPS);
        s->ops[s->n++] = *op;
    }
    if (s->no_direct && op->kind == IO_OPEN && op->flags & O_DIRECT)
        return -EINVAL;
    if (s->slow && op->kind == IO_WRITE)
        task_yield_uncancelled();
    if (s->error && op->kind == s->fail && op->offset >= s->fail_from) {
        int error = s->error;
        s->error = 0;
        if (s->happened)
            CHECK(s->real->perform(s->real, op) >= 0);
        else
            task_yield_uncancelled();
        return error;
    }
    return s->real->perform(s->real, op);
}

/* The I-th operation of this kind, or -1. */
static int find_op(const struct spy *s, enum io_kind kind, uint64_t from, size_t first)
{
    for (size_t i = first; i < s->n; i++)
        if (s->ops[i].kind == kind && s->ops[i].offset >= from)
            return (int)i;
    return -1;
}

static void fail_next(struct spy *s, enum io_kind kind, uint64_t from, int error, bool happened)
{
    s->fail = kind;
    s->fail_from = from;
    s->error = error;
    s->happened = happened;
}

/* ---- a test: a task in this world, with a directory and a path in it ---- */

struct place {
    struct spy *spy;
    char dir[64], path[80], temporary[84];
    struct rng rng;
};

struct test {
    void (*body)(struct place *);
    struct place *place;
};

static int run_body(void *arg)
{
    struct test *t = arg;
    t->body(t->place);
    return 0;
}

static int run_in_place(void (*body)(struct place *), bool no_direct)
{
    struct spy *spy = xnew(struct spy);
    struct place p = {.spy = spy, .rng = {test_seed()}};
    const char *tmp = getenv("TIDEMARK_TMP");
    int error = 0;

    snprintf(p.dir, sizeof p.dir, "%.40s/tide-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(p.dir));
    snprintf(p.path, sizeof p.path, "%s/a.tide", p.dir);
    snprintf(p.temporary, sizeof p.temporary, "%s.new", p.path);
    spy->world = (struct world){"spy", spy_now, spy_wall, spy_random, spy_perform, spy_turn};
    spy->no_direct = no_direct;
    spy->real = world_threads_open(&error);
    assert_non_null(spy->real);
    struct test test = {body, &p};
    int r = loop_run_in(&spy->world, run_body, &test);
    world_threads_close(spy->real);
    free(spy);
    unlink(p.path);
    unlink(p.temporary);
    rmdir(p.dir);
    return r;
}

#define TIDE_TEST(name)                                                                            \
    static void name##_body(struct place *p);                                                      \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run_in_place(name##_body, false), 0);                                     \
        assert_int_equal(run_in_place(name##_body, true), 0);                                      \
    }                                                                                              \
    static void name##_body(struct place *p)

static uint64_t some_extent;

/* One bitmap of 64 KiB granularity with both areas, on SIZE bytes. */
static void small_super(struct place *p, struct super *s, uint64_t size)
{
    *s = (struct super){.uuid = some_id(&p->rng),
                        .session = some_id(&p->rng),
                        .in_use = true,
                        .size_bytes = size,
                        .resizing_bytes = size,
                        .region_bits = 24,
                        .slots = 1024,
                        .ring_sequence = 1000,
                        .next_epoch = 3};
    s->table.items = xcalloc(1, sizeof *s->table.items);
    s->table.n = 1;
    s->table.items[0] = (struct tide_bitmap){.name = xstrdup("b"),
                                             .granularity_bits = 16,
                                             .enabled = true,
                                             .current = {0, 1},
                                             .successor = {1, 2}};
}

static struct tide *create(struct place *p, struct super *s)
{
    struct error err = ERROR_INIT;
    struct tide *t = NULL;
    CHECK_OK(tide_create(p->path, s, NULL, NULL, NULL, &t, &err), err);
    if (s->table.n)
        some_extent = s->table.items[0].extent[0];
    return t;
}

static struct tide *reopen(struct place *p, struct tide *t)
{
    struct error err = ERROR_INIT;
    tide_close(t);
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    return t;
}

/* Raises the generation of the first bitmap, by a superblock. */
static int raise_generation(struct tide *t, struct error *err)
{
    struct super s;
    super_copy(&s, tide_super(t));
    s.table.items[0].generation++;
    int r = tide_write_super(t, &s, err);
    if (r == 0)
        CHECK(!s.table.items);
    super_fini(&s);
    return r;
}

static uint64_t generation(const struct tide *t)
{
    return tide_super(t)->table.items[0].generation;
}

/* Changes bytes behind everybody's back. */
static void scribble(struct place *p, uint64_t at, size_t n)
{
    int fd = open(p->path, O_RDWR);
    CHECK(fd >= 0);
    for (size_t i = 0; i < n; i++) {
        uint8_t byte;
        CHECK(pread(fd, &byte, 1, (off_t)(at + i)) == 1);
        byte ^= 0x55;
        CHECK(pwrite(fd, &byte, 1, (off_t)(at + i)) == 1);
    }
    CHECK(fsync(fd) == 0);
    close(fd);
}

/* ---- files ---- */

TIDE_TEST(a_new_file_is_found_again)
{
    struct error err = ERROR_INIT;
    struct super s;
    struct stat st;
    struct tide *t = NULL;

    CHECK(tide_open(p->path, false, &t, &err) == -ENOENT);
    error_clear(&err);
    for (int i = 0; i < 5; i++) {
        some_super(&p->rng, &s, 6);
        while (s.extents_end > 64 * MiB || (s.group.bytes[0] && s.level == TIDE_PROCESS)) {
            super_fini(&s);
            some_super(&p->rng, &s, 6);
        }
        uint64_t sequence = s.sequence;
        t = create(p, &s);
        CHECK(s.sequence == sequence + 1);
        CHECK(super_equal(&s, tide_super(t)));
        CHECK(strcmp(tide_path(t), p->path) == 0 && !tide_failed(t));
        t = reopen(p, t);
        CHECK(super_equal(&s, tide_super(t)));
        CHECK(stat(p->path, &st) == 0 && (st.st_mode & 07777) == 0600);
        CHECK((uint64_t)st.st_size == s.extents_end);
        CHECK(access(p->temporary, F_OK) < 0);
        tide_close(t);
        super_fini(&s);
    }
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    CHECK_OK(tide_remove(t, &err), err);
    CHECK(access(p->path, F_OK) < 0);
}

TIDE_TEST(a_prepared_table_keeps_what_it_shares)
{
    struct super s, was;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s); /* so that it has places */
    tide_close(t);
    s.group = some_id(&p->rng);
    s.coordinator = some_member(&p->rng);
    s.next.n = 2;
    s.next.items = xcalloc(2, sizeof *s.next.items);
    s.next.items[0] = s.table.items[0];
    s.next.items[0].name = xstrdup("renamed");
    s.next.items[1] = (struct tide_bitmap){
        .name = xstrdup("new"), .granularity_bits = 9, .current = {1, s.next_epoch++}};
    super_copy(&was, &s);
    t = create(p, &s);
    CHECK(memcmp(s.next.items[0].extent, s.table.items[0].extent, sizeof s.next.items[0].extent) ==
          0);
    CHECK(s.next.items[1].extent[0] && s.next.items[1].extent[1]);
    t = reopen(p, t);
    CHECK(super_equal(&s, tide_super(t)));
    tide_close(t);
    super_fini(&was);
    super_fini(&s);
}

TIDE_TEST(a_new_file_is_durable_before_it_has_the_name)
{
    struct super s;
    small_super(p, &s, GiB);
    struct spy *spy = p->spy;
    tide_close(create(p, &s));
    int allocate = find_op(spy, IO_FALLOCATE, 0, 0), write = find_op(spy, IO_WRITE, 0, 0);
    int sync = find_op(spy, IO_SYNC, 0, 0), name = find_op(spy, IO_RENAME, 0, 0);
    int directory = find_op(spy, IO_SYNC_DIR, 0, 0);
    CHECK(allocate >= 0 && write > allocate);
    CHECK(spy->ops[allocate].length == s.extents_end);
    CHECK(sync > write);
    CHECK(find_op(spy, IO_WRITE, 0, (size_t)sync) < 0);
    CHECK(name > sync);
    CHECK(directory > name);
    super_fini(&s);
}

TIDE_TEST(what_is_read_is_what_the_disk_has)
{
    struct super s;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    tide_close(t);
    p->spy->n = 0;
    struct error err = ERROR_INIT;
    CHECK_OK(tide_open(p->path, true, &t, &err), err);
    CHECK(find_op(p->spy, IO_SYNC, 0, 0) == 0);
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(a_failed_creation_leaves_the_old_one)
{
    struct super s, again;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s), *none = NULL;
    const enum io_kind kinds[] = {IO_FALLOCATE, IO_WRITE, IO_SYNC, IO_RENAME};
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        struct error err = ERROR_INIT;
        super_copy(&again, &s);
        fail_next(p->spy, kinds[i], 0, i ? -EIO : -ENOSPC, false);
        CHECK(tide_create(p->path, &again, NULL, NULL, NULL, &none, &err) == (i ? -EIO : -ENOSPC));
        CHECK(!none && !p->spy->error && strstr(err.text, p->path));
        CHECK(super_equal(&again, &s));
        CHECK(access(p->temporary, F_OK) < 0);
        super_fini(&again);
    }
    t = reopen(p, t);
    CHECK(super_equal(&s, tide_super(t)));
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(a_stale_temporary_file_is_no_obstacle)
{
    struct super s;
    small_super(p, &s, GiB);
    int fd = open(p->temporary, O_CREAT | O_WRONLY, 0644);
    CHECK(fd >= 0 && write(fd, "rubbish", 7) == 7);
    close(fd);
    struct tide *t = reopen(p, create(p, &s));
    CHECK(super_equal(&s, tide_super(t)));
    CHECK(access(p->temporary, F_OK) < 0);

    /* but one that is being made is */
    struct error err = ERROR_INIT;
    struct tide *none = NULL;
    struct flock lock = {.l_type = F_WRLCK, .l_len = 1};
    fd = open(p->temporary, O_CREAT | O_RDWR, 0600);
    CHECK(fd >= 0 && fcntl(fd, F_OFD_SETLK, &lock) == 0);
    CHECK(tide_create(p->path, &s, NULL, NULL, NULL, &none, &err) == -EBUSY);
    CHECK(access(p->temporary, F_OK) == 0);
    close(fd);
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(one_program_at_a_time_and_any_reader)
{
    struct error err = ERROR_INIT;
    struct super s;
    struct tide *t, *other = NULL;
    small_super(p, &s, GiB);
    t = create(p, &s);
    uint64_t begin = clock_now_ns();
    CHECK(tide_open(p->path, false, &other, &err) == -EBUSY);
    CHECK(strstr(err.text, "is in use by another program"));
    CHECK(clock_now_ns() - begin > NSEC_PER_SEC); /* it may be a killed one that still goes */
    error_clear(&err);
    CHECK_OK(tide_open(p->path, true, &other, &err), err);
    CHECK(super_equal(&s, tide_super(other)));
    tide_close(other);
    /* a failed one stays open while its successor is made */
    struct super again;
    super_copy(&again, &s);
    other = create(p, &again);
    tide_close(t);
    CHECK(tide_super(other)->sequence == s.sequence + 1);
    tide_close(other);
    super_fini(&again);
    super_fini(&s);
}

/* ---- superblocks ---- */

TIDE_TEST(superblocks_take_turns)
{
    struct error err = ERROR_INIT;
    struct super s;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    uint64_t sequence = s.sequence;
    for (unsigned i = 1; i <= 6; i++) {
        p->spy->n = 0;
        CHECK_OK(raise_generation(t, &err), err);
        CHECK(tide_super(t)->sequence == sequence + i && generation(t) == i);
        CHECK(p->spy->n == 1 && p->spy->ops[0].kind == IO_WRITE);
        CHECK(p->spy->ops[0].flags == RWF_DSYNC && p->spy->ops[0].length == TIDE_ALIGN);
        CHECK(p->spy->ops[0].offset == (i % 2 ? TIDE_SUPER_BYTES : 0));
        if (i % 3 == 0)
            t = reopen(p, t);
        CHECK(generation(t) == i);
    }
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(a_torn_superblock_leaves_the_one_before)
{
    struct error err = ERROR_INIT;
    struct super s;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    for (unsigned round = 0; round < 4; round++) {
        unsigned slot = (unsigned)(tide_super(t)->sequence - s.sequence + 1) % 2;
        uint64_t before = generation(t);
        CHECK_OK(raise_generation(t, &err), err);
        tide_close(t);
        scribble(p, slot * TIDE_SUPER_BYTES + rng_below(&p->rng, 300), 1);
        CHECK_OK(tide_open(p->path, false, &t, &err), err);
        CHECK(generation(t) == before);
        CHECK_OK(raise_generation(t, &err), err); /* into the torn one, not over the good one */
        t = reopen(p, t);
        CHECK(generation(t) == before + 1);
    }
    tide_close(t);
    scribble(p, 3, 1);
    scribble(p, TIDE_SUPER_BYTES + 100, 1);
    t = NULL;
    CHECK(tide_open(p->path, false, &t, &err) == -EBADMSG);
    CHECK(strstr(err.text,
                 "has no valid superblock: of the first, it does not begin as one; of the "
                 "second, its checksum is "));
    CHECK(!t && !strchr(err.text, '\n'));
    super_fini(&s);
}

TIDE_TEST(a_short_file_is_told)
{
    struct error err = ERROR_INIT;
    struct super s;
    struct tide *t;
    small_super(p, &s, GiB);
    tide_close(create(p, &s));
    CHECK(truncate(p->path, (off_t)s.extents_end - 1) == 0);
    CHECK(tide_open(p->path, false, &t, &err) == -EBADMSG);
    CHECK(strstr(err.text, "bytes, and its areas end at"));
    CHECK(truncate(p->path, 0) == 0);
    error_clear(&err);
    CHECK(tide_open(p->path, false, &t, &err) == -EBADMSG);
    CHECK(strstr(err.text, "of the first, it was never written; of the second, it was never "));
    super_fini(&s);
}

/* After a failed write nobody is told that anything is durable, also not by what was in flight. */
TIDE_TEST(a_failed_superblock_is_the_end_of_the_file)
{
    for (int happened = 0; happened < 2; happened++) {
        struct error err = ERROR_INIT, more = ERROR_INIT;
        struct super s;
        struct ring_block b = {.sequence = 1000};
        uint64_t offset;
        small_super(p, &s, GiB);
        struct tide *t = create(p, &s);
        CHECK_OK(raise_generation(t, &err), err);
        fail_next(p->spy, IO_WRITE, 0, -ENOSPC, happened);
        CHECK(raise_generation(t, &err) == -ENOSPC);
        CHECK(strstr(err.text, "writing the superblock of tide file"));
        CHECK(tide_failed(t) && generation(t) == 1);
        size_t n = p->spy->n;
        CHECK(raise_generation(t, &more) == -EIO && more.text[0]);
        CHECK(tide_write_ring(t, &b) == -EIO);
        CHECK(tide_sync(t) == -EIO);
        CHECK(tide_allocate(t, &s, 4096, &offset, NULL) == -EIO);
        CHECK(p->spy->n == n); /* they did not even try */
        t = reopen(p, t);
        CHECK(generation(t) == (happened ? 2 : 1)); /* which nobody could know */
        tide_close(t);
        super_fini(&s);
    }
}

struct two {
    struct tide *t;
    int result;
    unsigned begun, ended;
};

static int raises(void *arg)
{
    struct two *w = arg;
    struct error err = ERROR_INIT;
    w->begun++;
    w->result = raise_generation(w->t, &err);
    w->ended++;
    return 0;
}

TIDE_TEST(two_superblocks_are_never_in_flight)
{
    struct super s;
    small_super(p, &s, GiB);
    struct two w = {.t = create(p, &s)};
    p->spy->slow = true;
    p->spy->n = 0;
    {
        SCOPE(both);
        scope_spawn(&both, raises, &w);
        scope_spawn(&both, raises, &w);
        while (!w.begun)
            CHECK(task_yield() == 0);
        CHECK(w.ended == 0);
        CHECK(scope_join(&both) == 0);
    }
    CHECK(w.ended == 2 && w.result == 0);
    CHECK(p->spy->n == 2 && p->spy->ops[0].offset != p->spy->ops[1].offset);
    CHECK(tide_super(w.t)->sequence == s.sequence + 2);
    tide_close(w.t);
    super_fini(&s);
}

TIDE_TEST(what_cannot_be_written_harms_nobody)
{
    struct error err = ERROR_INIT;
    struct super s, bad;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    super_copy(&bad, tide_super(t));
    bad.table.items[0].granularity_bits = 40;
    CHECK(tide_write_super(t, &bad, &err) == -EINVAL);
    CHECK(strstr(err.text, "bitmap 0: granularity_bits is 40, not 9..31"));
    CHECK(!tide_failed(t) && bad.table.n == 1);
    super_fini(&bad);
    error_clear(&err);
    CHECK_OK(raise_generation(t, &err), err);
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(room_is_durable_before_it_is_named)
{
    struct error err = ERROR_INIT;
    struct super s, more, other;
    struct stat st;
    uint64_t a, b;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    super_copy(&more, tide_super(t));
    super_copy(&other, tide_super(t));
    p->spy->n = 0;
    CHECK_OK(tide_allocate(t, &more, 5000, &a, &err), err);
    CHECK(a == s.extents_end && more.extents_end == a + 8192);
    CHECK(p->spy->n == 2 && p->spy->ops[0].kind == IO_FALLOCATE && p->spy->ops[1].kind == IO_SYNC);
    CHECK_OK(tide_allocate(t, &other, 4096, &b, &err), err);
    CHECK(b == a + 8192); /* not the same again, though no superblock names the first */
    CHECK(stat(p->path, &st) == 0 && (uint64_t)st.st_size == b + 4096);

    fail_next(p->spy, IO_FALLOCATE, 0, -ENOSPC, false);
    CHECK(tide_allocate(t, &more, MiB, &b, &err) == -ENOSPC);
    CHECK(strstr(err.text, "allocating 1048576 bytes more") && !tide_failed(t));
    error_clear(&err);
    fail_next(p->spy, IO_FALLOCATE, 0, -EOPNOTSUPP, false);
    CHECK_OK(tide_allocate(t, &more, MiB, &b, &err), err);
    CHECK(stat(p->path, &st) == 0 && (uint64_t)st.st_size == b + MiB);
    CHECK(tide_write_super(t, &more, &err) == 0);
    t = reopen(p, t);
    tide_close(t);
    super_fini(&other);
    super_fini(&s);
}

/* ---- the ring ---- */

struct session {
    uint32_t table[1024], read[1024];
    uint64_t sequence;
};

static int transact(struct place *p, struct tide *t, struct session *h)
{
    struct ring_block b = {.session = tide_super(t)->session, .sequence = h->sequence};
    b.n_changes = 1 + (unsigned)rng_below(&p->rng, 5);
    for (unsigned i = 0; i < b.n_changes; i++) {
        b.changes[i].slot = (uint16_t)rng_below(&p->rng, 1024);
        b.changes[i].region = (uint32_t)rng_below(&p->rng, 64);
        h->table[b.changes[i].slot] = b.changes[i].region;
    }
    ring_slice(&b, h->table, 1024, RING_SLICE);
    h->sequence++;
    return tide_write_ring(t, &b);
}

static void expect_ring(struct tide *t, struct session *h)
{
    struct error err = ERROR_INIT;
    uint64_t next = 0;
    CHECK_OK(tide_read_ring(t, h->read, &next, &err), err);
    CHECK(next == h->sequence);
    CHECK(memcmp(h->read, h->table, sizeof h->table) == 0);
}

TIDE_TEST(the_ring_tells_what_was_hot)
{
    struct error err = ERROR_INIT;
    struct super s;
    struct session h = {.sequence = 1000};
    uint64_t next;
    small_super(p, &s, GiB);
    memset(h.table, 0xff, sizeof h.table);
    struct tide *t = create(p, &s);
    expect_ring(t, &h);
    for (unsigned i = 0; i < 200; i++) {
        p->spy->n = 0;
        CHECK(transact(p, t, &h) == 0);
        CHECK(p->spy->n == 1 && p->spy->ops[0].flags == RWF_DSYNC);
        CHECK(p->spy->ops[0].offset == TIDE_RING_OFFSET + (h.sequence - 1) % 64 * 4096);
        CHECK(p->spy->ops[0].length == 4096);
        if (i < 4 || i % 37 == 0)
            expect_ring(t, &h);
    }
    t = reopen(p, t);
    expect_ring(t, &h);

    /* the one after the newest is torn: not ours any more, and written again */
    scribble(p, TIDE_RING_OFFSET + h.sequence % 64 * 4096 + 77, 1);
    expect_ring(t, &h);
    /* two of them cannot be */
    scribble(p, TIDE_RING_OFFSET + (h.sequence + 1) % 64 * 4096 + 77, 1);
    CHECK(tide_read_ring(t, h.read, &next, &err) == -EBADMSG);
    CHECK(strstr(err.text, "two blocks of the hot ring are damaged after transaction 1199"));
    error_clear(&err);
    CHECK(transact(p, t, &h) == 0);
    expect_ring(t, &h);
    /* nor one before the newest */
    CHECK(transact(p, t, &h) == 0);
    scribble(p, TIDE_RING_OFFSET + (h.sequence - 2) % 64 * 4096 + 77, 1);
    CHECK(tide_read_ring(t, h.read, &next, &err) == -EBADMSG);
    CHECK(strstr(err.text, "the hot ring has a hole: transaction 1200 is missing"));
    tide_close(t);

    /* a new session knows nothing of all that */
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    struct super again;
    super_copy(&again, tide_super(t));
    again.session = some_id(&p->rng);
    again.ring_sequence = h.sequence;
    CHECK(tide_write_super(t, &again, NULL) == 0);
    memset(h.table, 0xff, sizeof h.table);
    expect_ring(t, &h);
    CHECK(transact(p, t, &h) == 0);
    expect_ring(t, &h);
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(a_new_file_tells_the_table_too)
{
    struct error err = ERROR_INIT;
    const unsigned slots[] = {4, 880, 881, 1024, 5000, TIDE_SLOTS_MAX};
    for (size_t i = 0; i < ARRAY_SIZE(slots); i++) {
        struct super s;
        struct tide *t;
        unsigned n = slots[i];
        uint32_t *table = xcalloc(n, sizeof *table), *read = xcalloc(n, sizeof *read);
        uint64_t next = 0;
        small_super(p, &s, GiB);
        s.slots = n;
        s.ring_sequence = rng_next(&p->rng) >> 8;
        for (unsigned k = 0; k < n; k++)
            table[k] = (uint32_t)rng_next(&p->rng);
        CHECK_OK(tide_create(p->path, &s, NULL, NULL, table, &t, &err), err);
        t = reopen(p, t);
        CHECK_OK(tide_read_ring(t, read, &next, &err), err);
        CHECK(memcmp(table, read, n * sizeof *table) == 0);
        CHECK(next == s.ring_sequence + ring_full_table(n, RING_SLICE));
        tide_close(t);
        super_fini(&s);
        free(table);
        free(read);
    }
}

/* ---- areas ---- */

static bool same_bits(const struct bitmap *a, const struct bitmap *b)
{
    uint64_t n = bitmap_serial_length(a);
    CLEANUP(memory_freep) uint8_t *x = malloc(n + 1);
    CLEANUP(memory_freep) uint8_t *y = malloc(n + 1);
    bitmap_serialise(a, 0, x, n);
    bitmap_serialise(b, 0, y, n);
    return bitmap_serial_length(b) == n && memcmp(x, y, n) == 0;
}

static void expect_area(struct tide *t, uint64_t extent, uint64_t epoch,
                        const struct bitmap *expected)
{
    struct error err = ERROR_INIT;
    uint64_t bad = 1;
    CLEANUP(bitmap_freep)
    struct bitmap *bits = bitmap_new(bitmap_size(expected), bitmap_granularity(expected));
    CHECK_OK(tide_read_area(t, extent, epoch, bits, true, &bad, &err), err);
    CHECK(bad == 0);
    CHECK(same_bits(bits, expected));
}

TIDE_TEST(areas_hold_bits_under_their_epoch)
{
    enum { RANGES = 4 };
    for (int round = 0; round < 12; round++) {
        struct super s;
        uint64_t size = 1 + rng_below(&p->rng, 40 * GiB >> rng_below(&p->rng, 20));
        small_super(p, &s, size);
        s.table.items[0].granularity_bits = 9 + (unsigned)rng_below(&p->rng, 9);
        const uint64_t granularity = UINT64_C(1) << s.table.items[0].granularity_bits;
        struct tide *t = create(p, &s);
        uint64_t extent = some_extent;
        CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(size, granularity);
        CLEANUP(bitmap_freep) struct bitmap *none = bitmap_new(size, granularity);
        expect_area(t, extent, 1, none);
        for (int i = 0; i < 20; i++) {
            struct range dirt[RANGES];
            uint64_t from = 0;
            for (int k = 0; k < RANGES; k++) {
                dirt[k] = rng_range(&p->rng, size - from);
                dirt[k].start += from;
                dirt[k].length = min_u64(dirt[k].length, size / 8);
                from = range_end(dirt[k]);
                bitmap_mark(bits, dirt[k]);
            }
            CHECK(tide_write_area(t, extent, 1, bits, dirt, RANGES) == 0);
            expect_area(t, extent, 1, bits);
        }
        CHECK(tide_sync(t) == 0);
        t = reopen(p, t);
        expect_area(t, extent, 1, bits);
        expect_area(t, extent, 2, none);
        expect_area(t, s.table.items[0].extent[1], 2, none);

        /* under a new epoch the old bits are gone, with nothing but a superblock */
        struct super next;
        super_copy(&next, tide_super(t));
        next.table.items[0].current.epoch = next.next_epoch++;
        CHECK(tide_write_super(t, &next, NULL) == 0);
        expect_area(t, extent, 3, none);
        CLEANUP(bitmap_freep) struct bitmap *few = bitmap_new(size, granularity);
        const struct range last = range_make(size - 1, 1);
        bitmap_mark(few, last);
        CHECK(tide_write_area(t, extent, 3, few, &last, 1) == 0);
        expect_area(t, extent, 3, few);
        tide_close(t);
        super_fini(&s);
    }
}

TIDE_TEST(a_new_file_holds_the_bits_it_was_given)
{
    struct error err = ERROR_INIT;
    for (int in_use = 0; in_use < 2; in_use++)
        for (int level = 0; level < 2; level++) {
            struct super s;
            struct tide *t;
            small_super(p, &s, 16 * GiB);
            s.in_use = in_use;
            s.level = level ? TIDE_PROCESS : TIDE_POWER;
            CLEANUP(bitmap_freep) struct bitmap *a = bitmap_new(s.size_bytes, 65536);
            CLEANUP(bitmap_freep) struct bitmap *b = bitmap_new(s.size_bytes, 65536);
            for (int i = 0; i < 50; i++)
                bitmap_mark(i % 2 ? a : b, rng_range(&p->rng, s.size_bytes));
            const struct bitmap *current[] = {a}, *successor[] = {b};
            CHECK_OK(tide_create(p->path, &s, current, successor, NULL, &t, &err), err);
            t = reopen(p, t);
            const struct tide_bitmap *one = &tide_super(t)->table.items[0];
            if (in_use && level) {
                uint64_t bad;
                CHECK(!one->extent[0] && !one->extent[1]);
                CHECK(tide_read_area(t, 0, 1, a, true, &bad, &err) == -EBADMSG);
                CHECK(strstr(err.text, "has no area of 36864 bytes at 0"));
                error_clear(&err);
            } else {
                expect_area(t, one->extent[0], 1, a);
                expect_area(t, one->extent[1], 2, b);
            }
            tide_close(t);
            super_fini(&s);
        }
}

TIDE_TEST(clean_blocks_are_not_written_and_holes_not_read)
{
    struct super s;
    small_super(p, &s, 16 * TiB);
    struct tide *t = create(p, &s);
    uint64_t extent = some_extent, written = 0;
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(s.size_bytes, 65536);
    for (uint64_t at = 0; at < s.size_bytes; at += TiB)
        bitmap_mark(bits, range_make(at, 1));
    const struct range all = range_make(0, s.size_bytes);
    p->spy->n = 0;
    CHECK(tide_write_area(t, extent, 1, bits, &all, 1) == 0);
    for (size_t i = 0; i < p->spy->n; i++)
        written += p->spy->ops[i].length;
    CHECK(written == 16 * 4096);
    CHECK(tide_sync(t) == 0);
    t = reopen(p, t);
    uint64_t begin = clock_now_ns();
    expect_area(t, extent, 1, bits);
    CHECK(UNIT_SANITIZED || clock_now_ns() - begin < NSEC_PER_SEC / 4);
    /* and all of it, 33 MiB */
    bitmap_mark_all(bits);
    p->spy->n = 0;
    CHECK(tide_write_area(t, extent, 1, bits, &all, 1) == 0);
    CHECK(p->spy->n < 100); /* in large pieces */
    CHECK(tide_sync(t) == 0);
    expect_area(t, extent, 1, bits);
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(damaged_sectors_are_dirt)
{
    struct error err = ERROR_INIT;
    struct super s;
    const uint64_t per_sector = UINT64_C(496) * 8 * 65536;
    uint64_t bad;
    small_super(p, &s, 16 * GiB);
    struct tide *t = create(p, &s);
    uint64_t extent = some_extent;
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(s.size_bytes, 65536);
    const struct range all = range_make(0, s.size_bytes);
    bitmap_mark(bits, range_make(3 * per_sector + 5, 1));
    bitmap_mark(bits, range_make(s.size_bytes - 1, 1));
    CHECK(tide_write_area(t, extent, 1, bits, &all, 1) == 0);
    CHECK(tide_sync(t) == 0);
    tide_close(t);
    scribble(p, extent + 3 * 512 + 8, 1);  /* its epoch: not just another one */
    scribble(p, extent + 66 * 512 + 9, 2); /* the last one that counts, cut by the size */
    scribble(p, extent + 67 * 512 + 9, 2); /* stands for nothing */
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    const uint64_t last = s.size_bytes - 66 * per_sector;
    for (int mark = 0; mark < 2; mark++) {
        CLEANUP(bitmap_freep) struct bitmap *read = bitmap_new(s.size_bytes, 65536);
        CHECK_OK(tide_read_area(t, extent, 1, read, mark, &bad, &err), err);
        CHECK(bad == per_sector + last);
        CHECK(bitmap_count(read) == (mark ? per_sector + last : 0));
        CHECK(!mark || bitmap_get(read, 3 * per_sector + 5));
    }
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(unreadable_blocks_are_dirt)
{
    struct error err = ERROR_INIT;
    struct super s;
    uint64_t bad;
    small_super(p, &s, 16 * GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(s.size_bytes, 65536);
    CLEANUP(bitmap_freep) struct bitmap *read = bitmap_new(s.size_bytes, 65536);
    const struct range all = range_make(0, s.size_bytes);
    bitmap_mark(bits, range_make(0, s.size_bytes - 65536));
    CHECK(tide_write_area(t, some_extent, 1, bits, &all, 1) == 0);
    fail_next(p->spy, IO_READ, some_extent, -EIO, false);
    CHECK_OK(tide_read_area(t, some_extent, 1, read, true, &bad, &err), err);
    CHECK(bad == 0 && same_bits(read, bits)); /* one by one it goes */
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(a_sector_of_the_future_tells_of_a_lost_superblock)
{
    struct error err = ERROR_INIT;
    struct super s, next;
    const struct range all = range_make(0, GiB);
    uint64_t bad;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(GiB, 65536);
    bitmap_mark_all(bits);
    super_copy(&next, tide_super(t));
    next.table.items[0].current.epoch = next.next_epoch++;
    CHECK_OK(tide_write_super(t, &next, &err), err);
    CHECK(tide_write_area(t, some_extent, 3, bits, &all, 1) == 0);
    t = reopen(p, t);
    tide_close(t);
    scribble(p, TIDE_SUPER_BYTES + 300, 1); /* not torn: it was durable, and is damaged */
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    CHECK(tide_super(t)->next_epoch == 3);
    CHECK(tide_read_area(t, some_extent, 1, bits, true, &bad, &err) == -EBADMSG);
    CHECK(
        strstr(err.text, "is of epoch 3, and the newest superblock there is knows none from 3 on"));
    tide_close(t);
    super_fini(&s);
}

struct writer {
    struct tide *t;
    struct bitmap *bits;
    int result;
    bool done;
};

static int writes_area(void *arg)
{
    struct writer *w = arg;
    const struct range all = range_make(0, bitmap_size(w->bits));
    w->result = tide_write_area(w->t, some_extent, 1, w->bits, &all, 1);
    w->done = true;
    return 0;
}

/* An older copy that lands after a newer one would take its bits back. */
TIDE_TEST(writes_of_one_area_take_turns)
{
    struct super s;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(GiB, 65536);
    struct writer first = {t, bits, 0, false}, second = first;
    p->spy->slow = true;
    {
        SCOPE(both);
        bitmap_mark(bits, range_make(0, 1));
        scope_spawn(&both, writes_area, &first);
        CHECK(task_yield() == 0);
        bitmap_mark(bits, range_make(MiB, 1));
        p->spy->n = 0;
        scope_spawn(&both, writes_area, &second);
        CHECK(task_yield() == 0);
        CHECK(first.done || p->spy->n == 0);
        CHECK(scope_join(&both) == 0);
    }
    CHECK(first.result == 0 && second.result == 0);
    expect_area(t, some_extent, 1, bits);
    tide_close(t);
    super_fini(&s);
}

/* The page cache has an error once: who syncs meanwhile must not be told that all is well. */
TIDE_TEST(a_failed_area_fails_the_syncs_after_it)
{
    struct super s;
    const struct range all = range_make(0, GiB);
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(GiB, 65536);
    bitmap_mark(bits, range_make(0, 1));
    fail_next(p->spy, IO_WRITE, 0, -EIO, true);
    CHECK(tide_write_area(t, some_extent, 1, bits, &all, 1) == -EIO);
    CHECK(tide_failed(t) && tide_sync(t) == -EIO);
    t = reopen(p, t);
    fail_next(p->spy, IO_DATASYNC, 0, -EIO, true);
    CHECK(tide_sync(t) == -EIO);
    CHECK(tide_sync(t) == -EIO && tide_write_area(t, some_extent, 1, bits, &all, 1) == -EIO);
    tide_close(t);
    super_fini(&s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_new_file_is_found_again),
    cmocka_unit_test(a_prepared_table_keeps_what_it_shares),
    cmocka_unit_test(a_new_file_is_durable_before_it_has_the_name),
    cmocka_unit_test(what_is_read_is_what_the_disk_has),
    cmocka_unit_test(a_failed_creation_leaves_the_old_one),
    cmocka_unit_test(a_stale_temporary_file_is_no_obstacle),
    cmocka_unit_test(one_program_at_a_time_and_any_reader),
    cmocka_unit_test(superblocks_take_turns),
    cmocka_unit_test(a_torn_superblock_leaves_the_one_before),
    cmocka_unit_test(a_short_file_is_told),
    cmocka_unit_test(a_failed_superblock_is_the_end_of_the_file),
    cmocka_unit_test(two_superblocks_are_never_in_flight),
    cmocka_unit_test(what_cannot_be_written_harms_nobody),
    cmocka_unit_test(room_is_durable_before_it_is_named),
    cmocka_unit_test(the_ring_tells_what_was_hot),
    cmocka_unit_test(a_new_file_tells_the_table_too),
    cmocka_unit_test(areas_hold_bits_under_their_epoch),
    cmocka_unit_test(a_new_file_holds_the_bits_it_was_given),
    cmocka_unit_test(clean_blocks_are_not_written_and_holes_not_read),
    cmocka_unit_test(damaged_sectors_are_dirt),
    cmocka_unit_test(unreadable_blocks_are_dirt),
    cmocka_unit_test(a_sector_of_the_future_tells_of_a_lost_superblock),
    cmocka_unit_test(writes_of_one_area_take_turns),
    cmocka_unit_test(a_failed_area_fails_the_syncs_after_it),
};

UNIT_MAIN(tests)
