/* The tide file: made, opened, its superblocks and its ring, and the order in which they reach the
 * disk. */
#include "tidefile.h"

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
    CHECK(!s.next.items[1].extent[0] && s.next.items[1].extent[1]); /* what it uses */
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
    CHECK(find_op(p->spy, IO_SYNC_DIR, 0, 0) == 1); /* or it may be another one tomorrow */
    tide_close(t);
    fail_next(p->spy, IO_SYNC_DIR, 0, -EACCES, false);
    CHECK_OK(tide_open(p->path, true, &t, &err), err);
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

/* What a crash has torn, another crash can make whole: sim --persist --seed 130000604. */
TIDE_TEST(a_torn_superblock_does_not_come_back)
{
    struct error err = ERROR_INIT;
    struct super s;
    small_super(p, &s, GiB);
    free(s.table.items[0].name); /* so long that there are two sectors */
    s.table.items[0].name = xcalloc(601, 1);
    memset(s.table.items[0].name, 'n', 600);
    struct tide *t = create(p, &s);
    for (unsigned slot = 1; slot < 3; slot++) {
        const uint64_t at = slot % 2 * TIDE_SUPER_BYTES, told = generation(t);
        CHECK_OK(raise_generation(t, &err), err);
        tide_close(t);
        scribble(p, at + 600, 1); /* the second sector has not landed */

        /* Who only reads takes nothing away. */
        p->spy->n = 0;
        CHECK_OK(tide_open(p->path, true, &t, &err), err);
        CHECK(generation(t) == told && find_op(p->spy, IO_WRITE, 0, 0) < 0);
        tide_close(t);
        /* What cannot be taken away stays as it is: no superblock is written there any more. */
        fail_next(p->spy, IO_WRITE, 0, -EIO, false);
        CHECK_OK(tide_open(p->path, false, &t, &err), err);
        CHECK(generation(t) == told && tide_failed(t));
        tide_close(t);

        CHECK_OK(tide_open(p->path, false, &t, &err), err);
        CHECK(generation(t) == told && !tide_failed(t));
        tide_close(t);
        scribble(p, at + 600, 1); /* of the next one it has landed, and the first has not */
        CHECK_OK(tide_open(p->path, false, &t, &err), err);
        CHECK(generation(t) == told);
        p->spy->n = 0;
        t = reopen(p, t); /* it is gone for good */
        CHECK(find_op(p->spy, IO_WRITE, 0, 0) < 0);
        CHECK_OK(raise_generation(t, &err), err);
    }
    tide_close(t);
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
    struct super s, more;
    struct stat st;
    uint64_t a, b;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    super_copy(&more, tide_super(t));
    p->spy->n = 0;
    CHECK_OK(tide_allocate(t, &more, 4096, &a, &err), err);
    CHECK(a == s.extents_end && more.extents_end == a + 4096);
    CHECK(p->spy->n == 2 && p->spy->ops[0].kind == IO_FALLOCATE && p->spy->ops[1].kind == IO_SYNC);
    more.table.items[0].extent[2] = a;
    CHECK(stat(p->path, &st) == 0 && (uint64_t)st.st_size == a + 4096);

    fail_next(p->spy, IO_FALLOCATE, 0, -ENOSPC, false);
    CHECK(tide_allocate(t, &more, MiB, &b, &err) == -ENOSPC);
    CHECK(strstr(err.text, "allocating 1048576 bytes more") && !tide_failed(t));
    error_clear(&err);
    fail_next(p->spy, IO_FALLOCATE, 0, -EOPNOTSUPP, false);
    CHECK_OK(tide_allocate(t, &more, MiB, &b, &err), err);
    CHECK(b == a + 4096); /* the first is in `more`, though no superblock names it yet */
    CHECK(stat(p->path, &st) == 0 && (uint64_t)st.st_size == b + MiB);
    CHECK(tide_write_super(t, &more, &err) == 0);
    t = reopen(p, t);
    tide_close(t);
    super_fini(&s);
}

/* What a bitmap had that is gone is given again; what its sectors say is of another epoch then,
 * also where they lie in another area's middle. */
TIDE_TEST(room_is_used_again)
{
    struct error err = ERROR_INIT;
    struct super s, next;
    const struct range all = range_make(0, 16 * GiB);
    uint64_t at, bad;
    small_super(p, &s, 16 * GiB);
    s.table.items[0].successor = (struct tide_area){0, 0};
    struct tide *t = create(p, &s);
    const uint64_t had = some_extent, end = tide_super(t)->extents_end;
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(16 * GiB, 65536);
    CLEANUP(bitmap_freep) struct bitmap *coarse = bitmap_new(16 * GiB, MiB);
    bitmap_mark_all(bits);
    CHECK(tide_write_area(t, had, 1, bits, &all, 1) == 0 && tide_sync(t) == 0);

    super_copy(&next, tide_super(t));
    tide_table_fini(&next.table);
    CHECK_OK(tide_allocate(t, &next, 4096, &at, &err), err);
    CHECK(at == end); /* not yet: what is durable still has it */
    CHECK_OK(tide_write_super(t, &next, &err), err);

    super_copy(&next, tide_super(t));
    next.table.items = xcalloc(3, sizeof *next.table.items);
    for (unsigned i = 0; i < 3; i++) {
        struct tide_bitmap *b = &next.table.items[i];
        *b = (struct tide_bitmap){
            .name = xasprintf("%u", i), .granularity_bits = 20, .current = {0, next.next_epoch++}};
        CHECK_OK(tide_allocate(t, &next, tide_extent_bytes(16 * GiB, 20), &b->extent[0], &err),
                 err);
        CHECK(b->extent[0] == had + i * 4096);
        next.table.n++;
    }
    CHECK_OK(tide_write_super(t, &next, &err), err);
    for (unsigned i = 0; i < 3; i++) {
        const struct tide_bitmap *b = &tide_super(t)->table.items[i];
        CHECK_OK(tide_read_area(t, b->extent[0], b->current.epoch, coarse, true, &bad, &err), err);
        CHECK(bad == 0 && bitmap_count(coarse) == 0);
    }
    tide_close(t);
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
    struct session h = {.sequence = 1001}; /* behind the one that opens it */
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
    CHECK(strstr(err.text, "two blocks of the hot ring are damaged after transaction 1200"));
    error_clear(&err);
    CHECK(transact(p, t, &h) == 0);
    expect_ring(t, &h);
    /* nor one before the newest */
    CHECK(transact(p, t, &h) == 0);
    scribble(p, TIDE_RING_OFFSET + (h.sequence - 2) % 64 * 4096 + 77, 1);
    CHECK(tide_read_ring(t, h.read, &next, &err) == -EBADMSG);
    CHECK(strstr(err.text, "the hot ring has a hole: transaction 1201 is missing"));
    error_clear(&err);
    tide_close(t);

    /* a new session knows nothing of all that */
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    struct super again;
    super_copy(&again, tide_super(t));
    again.session = some_id(&p->rng);
    again.ring_sequence = h.sequence;
    p->spy->n = 0;
    CHECK(tide_write_super(t, &again, NULL) == 0);
    /* the ring is opened before */
    CHECK(p->spy->n == 2 && p->spy->ops[0].flags == RWF_DSYNC && p->spy->ops[1].flags == RWF_DSYNC);
    CHECK(p->spy->ops[0].offset == TIDE_RING_OFFSET + h.sequence % 64 * 4096);
    CHECK(p->spy->ops[1].offset < TIDE_RING_OFFSET);
    h.sequence++;
    memset(h.table, 0xff, sizeof h.table);
    expect_ring(t, &h);
    CHECK(transact(p, t, &h) == 0);
    expect_ring(t, &h);

    /* a ring of zeroes is not a new one */
    static const uint8_t zeroes[TIDE_RING_BLOCKS * RING_BLOCK];
    int fd = open(p->path, O_RDWR);
    CHECK(pwrite(fd, zeroes, sizeof zeroes, TIDE_RING_OFFSET) == (ssize_t)sizeof zeroes);
    CHECK(fsync(fd) == 0 && close(fd) == 0);
    CHECK(tide_read_ring(t, h.read, &next, &err) == -EBADMSG);
    CHECK(strstr(err.text, "the hot ring is lost: it has no transaction from 1203 on"));
    tide_close(t);
    super_fini(&s);
}

/* It may be the newer one: who opens the file hears of it, and does not take it away as torn. */
TIDE_TEST(a_superblock_that_cannot_be_read_is_in_doubt)
{
    struct error err = ERROR_INIT;
    for (unsigned slot = 0; slot < 2; slot++) {
        struct super s, next;
        small_super(p, &s, GiB);
        struct tide *t = create(p, &s);
        super_copy(&next, tide_super(t));
        CHECK(tide_write_super(t, &next, NULL) == 0);
        const uint64_t newest = tide_super(t)->sequence;
        tide_close(t);

        p->spy->n = 0;
        fail_next(p->spy, IO_READ, slot * TIDE_SUPER_BYTES, -EIO, false);
        CHECK_OK(tide_open(p->path, false, &t, &err), err);
        CHECK(p->spy->error == 0 && tide_is_doubtful(t));
        CHECK(find_op(p->spy, IO_WRITE, 0, 0) < 0);
        t = reopen(p, t);
        CHECK(!tide_is_doubtful(t) && tide_super(t)->sequence == newest);
        tide_close(t);
        super_fini(&s);
    }
}

/* Written over it, and torn, a new one would make the older one count. */
TIDE_TEST(a_superblock_in_doubt_is_outdone_before_it_goes)
{
    struct error err = ERROR_INIT;
    for (unsigned i = 0; i < 12; i++) {
        const unsigned newest_in = i & 1, bad = i >> 1 & 1, good = !bad, writes = i >> 2;
        struct super s, next;
        small_super(p, &s, GiB);
        struct tide *t = create(p, &s); /* in slot 0 */
        for (unsigned slot = 1; slot == 1 || slot % 2 != newest_in; slot++) {
            super_copy(&next, tide_super(t));
            CHECK(tide_write_super(t, &next, NULL) == 0);
        }
        const uint64_t newest = tide_super(t)->sequence;
        tide_close(t);

        fail_next(p->spy, IO_READ, bad * TIDE_SUPER_BYTES, -EIO, false);
        CHECK_OK(tide_open(p->path, false, &t, &err), err);
        super_copy(&next, tide_super(t));
        next.size_bytes = next.resizing_bytes = GiB / 2;
        p->spy->n = 0;
        if (writes < 2) /* the machine dies after so many */
            fail_next(p->spy, IO_WRITE, 0, -EIO, false);
        p->spy->spared = writes;
        CHECK(tide_write_super(t, &next, &err) == (writes ? 0 : -EIO));
        error_clear(&err);
        int first = find_op(p->spy, IO_WRITE, 0, 0);
        CHECK(first >= 0 && p->spy->ops[first].offset == good * TIDE_SUPER_BYTES);
        int second = find_op(p->spy, IO_WRITE, 0, (size_t)first + 1);
        CHECK((second >= 0) == (writes > 0));
        CHECK(second < 0 || (p->spy->ops[second].offset == bad * TIDE_SUPER_BYTES &&
                             p->spy->ops[second].length == TIDE_SUPER_BYTES));
        t = reopen(p, t); /* and it can be read again */
        CHECK(!tide_is_doubtful(t));
        CHECK(writes ? tide_super(t)->size_bytes == GiB / 2 : tide_super(t)->sequence == newest);
        tide_close(t);
        super_fini(&s);
        super_fini(&next);
    }
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
    cmocka_unit_test(a_torn_superblock_does_not_come_back),
    cmocka_unit_test(a_short_file_is_told),
    cmocka_unit_test(a_failed_superblock_is_the_end_of_the_file),
    cmocka_unit_test(two_superblocks_are_never_in_flight),
    cmocka_unit_test(what_cannot_be_written_harms_nobody),
    cmocka_unit_test(room_is_durable_before_it_is_named),
    cmocka_unit_test(room_is_used_again),
    cmocka_unit_test(the_ring_tells_what_was_hot),
    cmocka_unit_test(a_superblock_that_cannot_be_read_is_in_doubt),
    cmocka_unit_test(a_superblock_in_doubt_is_outdone_before_it_goes),
    cmocka_unit_test(a_new_file_tells_the_table_too),
};

UNIT_MAIN(tests)
