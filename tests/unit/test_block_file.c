/* The file driver on real files: data, holes, locks, modes, creation. */

#include "blockutil.h"

#include "block/driver.h"

#include <fcntl.h>
#include <sys/stat.h>

struct temp {
    char path[64];
};

static void temp_unlink(struct temp *t)
{
    unlink(t->path);
}

static void temp_make(struct temp *t, off_t size)
{
    const char *dir = getenv("TMPDIR");
    int fd;

    snprintf(t->path, sizeof t->path, "%s/tidemark-XXXXXX", dir ? dir : "/tmp");
    fd = mkstemp(t->path);
    CHECK(fd >= 0 && ftruncate(fd, size) == 0);
    close(fd);
}
#define TEMP(name, size)                                                                           \
    CLEANUP(temp_unlink) struct temp name;                                                         \
    temp_make(&name, size)

static struct node *open_file(struct graph *g, const char *path, const char *more)
{
    CLEANUP(memory_freep)
    char *json = xasprintf("{'driver':'file','filename':'%s'%s}", path, more);
    return open_ok(g, json);
}

static int try_file(struct graph *g, const char *path, const char *more, struct node **ret,
                    struct error *err)
{
    CLEANUP(memory_freep)
    char *json = xasprintf("{'driver':'file','filename':'%s'%s}", path, more);
    return try_open(g, ret, err, json);
}

static void random_requests(struct graph *g, const char *more, bool skippable)
{
    enum { SIZE = 256 * 1024 };
    TEMP(t, SIZE);
    struct rng rng = {test_seed()};
    struct test_user u;
    struct error err = ERROR_INIT;
    struct node *opened = NULL;
    int r = try_file(g, t.path, more, &opened, &err);

    if (r < 0 && skippable) {
        print_message("skipped here: %s\n", err.text);
        return;
    }
    CHECK_OK(r, err);
    CLEANUP(node_unrefp) struct node *n = opened;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    uint8_t *model = xcalloc(1, SIZE), *buf = xcalloc(1, SIZE);

    for (unsigned i = 0; i < 800; i++) {
        uint64_t start = rng_below(&rng, SIZE), length = rng_below(&rng, SIZE - start) + 1;
        if (rng_below(&rng, 2)) {
            start = align_down(start, 4096);
            length = min_u64(align_up(length, 4096), SIZE - start);
        }
        struct range range = range_make(start, length);
        struct block_status st;

        switch (rng_below(&rng, 5)) {
        case 0:
            memset(buf, (int)rng_below(&rng, 256), length);
            CHECK(edge_write(e, range, buf, rng_below(&rng, 20) ? 0 : REQ_FUA) == 0);
            memcpy(model + start, buf, length);
            break;
        case 1:
            CHECK(edge_write_zeroes(e, range, rng_below(&rng, 2) ? REQ_MAY_UNMAP : 0) == 0);
            memset(model + start, 0, length);
            break;
        case 2:
            CHECK(edge_read(e, range, buf, 0) == 0);
            CHECK(!memcmp(buf, model + start, length));
            break;
        case 3:
            CHECK(edge_status_above(e, NULL, true, range, &st) == 0);
            CHECK(st.length && st.length <= length);
            if (st.flags & STATUS_ZERO)
                for (uint64_t k = 0; k < st.length; k++)
                    CHECK(!model[start + k]);
            break;
        case 4:
            CHECK(edge_discard(e, range) == 0);
            CHECK(edge_read(e, range, model + start, 0) == 0);
            break;
        }
    }
    CHECK(edge_flush(e) == 0);
    edge_detach(e);
    /* As others see it. */
    int fd = open(t.path, O_RDONLY);
    CHECK(pread(fd, buf, SIZE, 0) == SIZE && !memcmp(buf, model, SIZE));
    close(fd);
    free(model);
    free(buf);
}

TEST(random_requests_agree_with_a_byte_array)
{
    random_requests(g, "", false);
    random_requests(g, ",'discard':'unmap','detect-zeroes':'unmap'", false);
    random_requests(g, ",'cache':{'direct':true},'discard':'unmap'", true);
    random_requests(g, ",'cache':{'no-flush':true},'auto-read-only':true,'locking':'off'", false);
}

TEST(holes_are_found_and_remembered_rightly)
{
    TEMP(t, 1 << 20);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, "");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    struct block_status st;
    uint8_t buf[65536];

    memset(buf, 1, sizeof buf);
    CHECK(edge_status_above(e, NULL, true, range_make(0, 1 << 20), &st) == 0);
    CHECK((st.flags & STATUS_ZERO) && st.length == 1 << 20 && (st.flags & STATUS_EOF));
    CHECK(edge_write(e, range_make(262144, 65536), buf, 0) == 0);
    CHECK(edge_status_above(e, NULL, true, range_make(0, 1 << 20), &st) == 0);
    CHECK((st.flags & STATUS_ZERO) && st.length == 262144 && !(st.flags & STATUS_EOF));
    CHECK(edge_status_above(e, NULL, true, range_make(262144, 1 << 19), &st) == 0);
    CHECK((st.flags & STATUS_DATA) && st.length == 65536 && st.map == 262144 && st.file == n);
    CHECK(edge_status_above(e, NULL, true, range_make(262144 + 512, 1024), &st) == 0);
    CHECK((st.flags & STATUS_DATA) && st.length == 1024);
    /* A remembered run must not outlive what changes it. */
    CHECK(edge_write_zeroes(e, range_make(262144, 65536), REQ_MAY_UNMAP) == 0);
    CHECK(edge_status_above(e, NULL, true, range_make(262144, 65536), &st) == 0);
    CHECK((st.flags & STATUS_ZERO) || (fake_of(n), true)); /* a hole where the host makes one */
    CHECK(edge_status_above(e, NULL, false, range_make(0, 1 << 20), &st) == 0);
    CHECK((st.flags & STATUS_DATA) && st.length == 1 << 20); /* not asked: not looked */
    edge_detach(e);
}

static bool is_hole(struct edge *e, uint64_t at)
{
    struct block_status st;

    CHECK(edge_status_above(e, NULL, true, range_make(at, 65536), &st) == 0);
    return st.flags & STATUS_ZERO;
}

/* The descriptor stays the same; what others have written meanwhile is there all the same, and may
 * not be durable. */
TEST(what_others_have_written_while_they_might_is_seen)
{
    TEMP(t, 1 << 20);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, "");
    const unsigned alone = PERM_ALL & ~(PERM_WRITE | PERM_RESIZE);
    uint8_t buf[65536];
    struct test_user u;

    memset(buf, 1, sizeof buf);
    int fd = open(t.path, O_WRONLY);
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, alone);
    CHECK(is_hole(e, 0) && is_hole(e, 65536) && edge_flush(e) == 0);
    CHECK(n->flushed_generation == n->write_generation);
    edge_detach(e);
    CHECK(pwrite(fd, buf, sizeof buf, 0) == sizeof buf);
    e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, alone);
    CHECK(!is_hole(e, 0) && is_hole(e, 65536));
    CHECK(n->flushed_generation < n->write_generation);
    edge_detach(e);
    /* Beside somebody who writes. */
    e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    CHECK(is_hole(e, 65536));
    CHECK(pwrite(fd, buf, sizeof buf, 65536) == sizeof buf);
    CHECK(!is_hole(e, 65536));
    edge_detach(e);
    close(fd);
}

TEST(sizes)
{
    TEMP(t, 1000);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, "");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE | PERM_RESIZE, PERM_ALL);
    struct error err = ERROR_INIT;
    struct stat st;
    uint8_t buf[512] = {1};

    CHECK(node_size(n) == 1024);
    CHECK(edge_read(e, range_make(512, 512), buf, 0) == 0 && buf[0] == 0);
    int r = edge_truncate(e, 4096, true, &err);
    CHECK_OK(r, err);
    CHECK(stat(t.path, &st) == 0 && st.st_size == 4096);
    buf[0] = 9;
    CHECK(edge_write(e, range_make(8192, 512), buf, 0) == 0);
    CHECK(node_size(n) == 8704);
    CHECK(stat(t.path, &st) == 0 && st.st_size == 8704);
    /* A hole at the end, too, makes the file longer. */
    CHECK(edge_write_zeroes(e, range_make(12288, 4096), REQ_MAY_UNMAP) == 0);
    CHECK(stat(t.path, &st) == 0 && st.st_size == 16384);
    r = edge_truncate(e, 512, true, &err);
    CHECK_OK(r, err);
    CHECK(stat(t.path, &st) == 0 && st.st_size == 512 && node_size(n) == 512);
    /* Cut short behind our back: zeroes, no error. */
    CHECK(truncate(t.path, 0) == 0);
    memset(buf, 0xff, sizeof buf);
    CHECK(edge_read(e, range_make(0, 512), buf, 0) == 0 && buf[0] == 0 && buf[511] == 0);
    struct block_status bs;
    CHECK(edge_status_above(e, NULL, true, range_make(0, 512), &bs) == 0);
    edge_detach(e);
}

TEST(a_file_that_ends_inside_a_block_is_read_directly)
{
    TEMP(t, 5000);
    struct node *opened = NULL;
    struct error err = ERROR_INIT;
    if (try_file(g, t.path, ",'cache':{'direct':true},'read-only':true", &opened, &err) < 0) {
        print_message("skipped here: %s\n", err.text);
        return;
    }
    CLEANUP(node_unrefp) struct node *n = opened;
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    uint8_t buf[5120];
    int fd = open(t.path, O_WRONLY);

    memset(buf, 3, sizeof buf);
    CHECK(pwrite(fd, buf, 5000, 0) == 5000);
    close(fd);
    CHECK(node_size(n) == 5120);
    CHECK(edge_read(e, range_make(0, 5120), buf, 0) == 0);
    for (unsigned i = 0; i < 5120; i++)
        CHECK(buf[i] == (i < 5000 ? 3 : 0));
    edge_detach(e);
}

/* Readers whose descriptor is exchanged under them, again and again. */
struct reader {
    struct edge *e;
    bool *stop;
};

static int read_on(void *arg)
{
    struct reader *r = arg;
    uint8_t buf[4096];

    while (!*r->stop) {
        CHECK(edge_read(r->e, range_make(0, 4096), buf, 0) == 0);
        CHECK(buf[0] == 0 && buf[4095] == 0);
    }
    return 0;
}

TEST(requests_survive_a_change_of_the_descriptor)
{
    TEMP(t, 65536);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, ",'auto-read-only':true");
    struct test_user u, v;
    bool stop = false;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    struct reader r = {e, &stop};

    SCOPE(s);
    for (int i = 0; i < 4; i++)
        scope_spawn(&s, read_on, &r);
    for (int i = 0; i < 200; i++) {
        struct edge *writer = attach(&v, n, PERM_WRITE, PERM_ALL);
        CHECK(task_yield() == 0);
        edge_detach(writer);
    }
    stop = true;
    CHECK(scope_join(&s) == 0);
    edge_detach(e);
}

/* ---- locks ---- */

struct other {
    struct graph *g;
    struct node *n;
    uint64_t after_ns;
    struct edge *e;
};

static int let_go_later(void *arg)
{
    struct other *o = arg;

    CHECK(sleep_until(clock_after_ns(o->after_ns)) == 0);
    edge_detach(o->e);
    return 0;
}

TEST(two_programs_refuse_each_other)
{
    TEMP(t, 65536);
    CLEANUP(graph_freep) struct graph *h = graph_new(); /* as good as another program */
    CLEANUP(node_unrefp) struct node *mine = open_file(g, t.path, "");
    CLEANUP(node_unrefp) struct node *theirs = open_file(h, t.path, "");
    CLEANUP(node_unrefp)
    struct node *shared = open_file(h, t.path, ",'read-only':true,'force-share':true");
    struct test_user u, v = {.user = {&test_user_ops}}, w;
    struct error err = ERROR_INIT;
    struct edge *f = NULL;
    unsigned readers = PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;

    /* A writer that lets nobody else write. */
    struct edge *e = attach(&u, mine, PERM_CONSISTENT_READ | PERM_WRITE, readers);
    uint64_t begin = clock_now_ns();
    CHECK(edge_attach_user(&v.user, theirs, "root", PERM_WRITE, PERM_ALL, &f, &err) == -EAGAIN);
    CHECK_TEXT(err, "Failed to get \"write\" lock");
    CHECK(clock_now_ns() - begin >= 19 * NSEC_PER_SEC / 10); /* asked again for two seconds */
    error_clear(&err);
    /* A reader does not mind, unless it wants nobody to write. */
    CHECK(edge_attach_user(&v.user, theirs, "root", PERM_CONSISTENT_READ, PERM_ALL, &f, &err) == 0);
    edge_detach(f);
    CHECK(edge_attach_user(&v.user, theirs, "root", PERM_CONSISTENT_READ, readers, &f, &err) < 0);
    CHECK_TEXT(err, "Failed to get shared \"write\" lock");
    error_clear(&err);
    /* force-share looks all the same; it is what parents share that counts. */
    f = attach(&w, shared, 0, PERM_ALL);
    edge_detach(f);

    /* One that is going away, as a killed one does. (Again where we have slept for long.) */
    f = NULL;
    for (int tries = 0; !f; tries++) {
        struct other o = {g, mine, 300000000, e};
        SCOPE(s);
        scope_spawn(&s, let_go_later, &o);
        begin = clock_now_ns();
        int r = edge_attach_user(&v.user, theirs, "root", PERM_WRITE, readers, &f, NULL);
        bool in_time = clock_now_ns() - begin < 19 * NSEC_PER_SEC / 10;
        CHECK(scope_join(&s) == 0 && (in_time || tries < 10));
        CHECK(r == 0 || !in_time);
        if (!in_time) {
            edge_detach(f);
            f = NULL;
            e = attach(&u, mine, PERM_CONSISTENT_READ | PERM_WRITE, readers);
        }
    }
    /* Two nodes of one program do not wait for each other. */
    CLEANUP(node_unrefp) struct node *again = open_file(h, t.path, "");
    struct edge *k = NULL;
    uint64_t quickest = UINT64_MAX;
    for (int i = 0; i < 5; i++) {
        begin = clock_now_ns();
        CHECK(edge_attach_user(&u.user, again, "root", PERM_WRITE, PERM_ALL, &k, &err) < 0);
        CHECK_TEXT(err, "Failed to get \"write\" lock");
        error_clear(&err);
        quickest = min_u64(quickest, clock_now_ns() - begin);
    }
    CHECK(quickest < NSEC_PER_SEC);
    /* ... and nothing of the refusal stays: the bytes that it had taken are free again. */
    CHECK(edge_set_perm(f, PERM_WRITE | PERM_RESIZE, readers, NULL) == 0);
    edge_detach(f);
    CHECK(edge_attach_user(&u.user, again, "root", PERM_WRITE, readers, &k, NULL) == 0);
    edge_detach(k);
}

static bool byte_is_locked(const char *path, int byte)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && fcntl(fd, F_OFD_GETLK, &fl) == 0);
    close(fd);
    return fl.l_type != F_UNLCK;
}

TEST(the_bytes_are_qemus)
{
    TEMP(t, 65536);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, ",'auto-read-only':true");
    CLEANUP(node_unrefp) struct node *off = open_file(g, t.path, ",'locking':'off'");
    struct test_user u, v;
    struct edge *f = attach(&v, off, PERM_ALL, 0);
    CHECK(!byte_is_locked(t.path, 101) && !byte_is_locked(t.path, 203));
    edge_detach(f);

    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL & ~PERM_RESIZE);
    CHECK(byte_is_locked(t.path, 100) && byte_is_locked(t.path, 101));
    CHECK(!byte_is_locked(t.path, 102) && !byte_is_locked(t.path, 103));
    CHECK(!byte_is_locked(t.path, 201) && byte_is_locked(t.path, 203));
    CHECK(edge_set_perm(e, PERM_CONSISTENT_READ, PERM_ALL, NULL) == 0);
    CHECK(byte_is_locked(t.path, 100) && !byte_is_locked(t.path, 101));
    CHECK(!byte_is_locked(t.path, 203));
    edge_detach(e);
    CHECK(!byte_is_locked(t.path, 100));
}

TEST(auto_read_only_opens_for_writing_when_a_writer_comes)
{
    TEMP(t, 65536);
    uint8_t buf[512] = {1};
    struct test_user u;
    struct error err = ERROR_INIT;
    struct edge *e;

    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, ",'auto-read-only':true");
    CHECK(!node_read_only(n));
    e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    CHECK(chmod(t.path, 0444) == 0);
    if (geteuid() != 0) {
        CHECK(edge_set_perm(e, PERM_WRITE, PERM_ALL, &err) == -EACCES);
        error_clear(&err);
    }
    CHECK(chmod(t.path, 0644) == 0);
    int r = edge_set_perm(e, PERM_WRITE, PERM_ALL, &err);
    CHECK_OK(r, err);
    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0);
    CHECK(edge_set_perm(e, PERM_CONSISTENT_READ, PERM_ALL, NULL) == 0);
    /* Another file of that name is not taken for it. */
    TEMP(other, 65536);
    CHECK(rename(other.path, t.path) == 0);
    CHECK(edge_set_perm(e, PERM_WRITE, PERM_ALL, &err) == -ESTALE);
    edge_detach(e);
}

/* ---- creation ---- */

TEST(files_are_made)
{
    TEMP(t, 4096);
    struct error err = ERROR_INIT;
    CLEANUP(memory_freep)
    char *json = xasprintf("{\"driver\":\"file\",\"filename\":\"%s\",\"size\":1048576}", t.path);
    CLEANUP(json_putp) struct json_object *options = json_tokener_parse(json);
    struct stat st;

    int r = graph_create(g, options, &err);
    CHECK_OK(r, err);
    CHECK(stat(t.path, &st) == 0 && st.st_size == 1048576);
    /* Not one that is in use. */
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, "");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL & ~PERM_WRITE & ~PERM_RESIZE);
    CHECK(graph_create(g, options, &err) == -EAGAIN);
    CHECK_TEXT(err, "Failed to get \"write\" lock");
    error_clear(&err);
    edge_detach(e);
    CHECK(graph_create_filename(g, t.path, "raw", NULL, NULL, 8192, &err) == 0);
    CHECK(stat(t.path, &st) == 0 && st.st_size == 8192);
    CHECK(graph_create_filename(g, t.path, "raw", "x", NULL, 8192, &err) < 0);
    CHECK_TEXT(err, "Backing file not supported for file format 'raw'");
    error_clear(&err);
    json_add_string(options, "driver", "null-co");
    CHECK(graph_create(g, options, &err) < 0);
    CHECK_TEXT(err, "Driver does not support blockdev-create");
}

TEST(probing_a_raw_file_protects_its_first_sector)
{
    TEMP(t, 65536);
    struct error err = ERROR_INIT;
    struct node *opened = NULL;
    int r = graph_open_filename(g, t.path, NULL, NULL, false, &opened, &err);
    CHECK_OK(r, err);
    CLEANUP(node_unrefp) struct node *n = opened;
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);

    CHECK(!strcmp(node_driver_name(n), "raw") && n->probed);
    CHECK(node_request_alignment(n) == 512);
    CHECK(!strcmp(node_filename(n), t.path));
    edge_detach(e);

    CLEANUP(memory_freep) char *with_protocol = xasprintf("file:%s", t.path);
    CLEANUP(node_unrefp) struct node *m = NULL;
    r = graph_open_filename(g, with_protocol, "raw", NULL, true, &m, &err);
    CHECK_OK(r, err);
    CHECK(!m->probed && m->read_only);
    CHECK(!strcmp(node_filename(m), t.path));
}

/* A sync that fails is not forgotten by the next: a file on /dev/full would do, were it regular;
 * so the descriptor is replaced by one that cannot be synced. */
TEST(what_could_not_be_synced_stays_an_error)
{
    TEMP(t, 65536);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, "");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    uint8_t buf[512] = {1};
    int fd = **(int **)n->state, kept = dup(fd), ends[2]; /* the first member of its handle */

    CHECK(edge_write(e, range_make(0, 512), buf, 0) == 0);
    CHECK(pipe(ends) == 0 && dup2(ends[1], fd) == fd);
    CHECK(edge_flush(e) < 0);
    CHECK(dup2(kept, fd) == fd);
    CHECK(edge_flush(e) == -EIO);
    CHECK(edge_write(e, range_make(0, 512), buf, 0) == -EIO);
    CHECK(edge_read(e, range_make(0, 512), buf, 0) == 0);
    close(kept);
    close(ends[0]);
    close(ends[1]);
    edge_detach(e);
}

/* Nothing was written by us since: but by others, perhaps, while the file was not ours, and a
 * bitmap that is cleared relies on it. */
TEST(a_flush_after_a_reopen_reaches_the_file)
{
    struct error err = ERROR_INIT;
    TEMP(t, 65536);
    CLEANUP(node_unrefp) struct node *n = open_file(g, t.path, "");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    int ends[2];

    CHECK(edge_flush(e) == 0);
    edge_detach(e);
    CHECK_OK(node_set_read_only(n, true, &err), err);
    CHECK_OK(node_set_read_only(n, false, &err), err);
    e = attach(&u, n, PERM_WRITE, PERM_ALL);
    int fd = **(int **)n->state, kept = dup(fd); /* as above */
    CHECK(pipe(ends) == 0 && dup2(ends[1], fd) == fd);
    CHECK(edge_flush(e) < 0);
    CHECK(dup2(kept, fd) == fd);
    close(kept);
    close(ends[0]);
    close(ends[1]);
    edge_detach(e);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(random_requests_agree_with_a_byte_array),
    cmocka_unit_test(holes_are_found_and_remembered_rightly),
    cmocka_unit_test(what_others_have_written_while_they_might_is_seen),
    cmocka_unit_test(sizes),
    cmocka_unit_test(a_file_that_ends_inside_a_block_is_read_directly),
    cmocka_unit_test(requests_survive_a_change_of_the_descriptor),
    cmocka_unit_test(two_programs_refuse_each_other),
    cmocka_unit_test(the_bytes_are_qemus),
    cmocka_unit_test(auto_read_only_opens_for_writing_when_a_writer_comes),
    cmocka_unit_test(files_are_made),
    cmocka_unit_test(probing_a_raw_file_protects_its_first_sector),
    cmocka_unit_test(what_could_not_be_synced_stays_an_error),
    cmocka_unit_test(a_flush_after_a_reopen_reaches_the_file),
};

UNIT_MAIN(tests)
