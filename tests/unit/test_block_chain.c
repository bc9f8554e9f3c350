/* Chains of images by file names: relative names, links, loops, depth, what is missing. */

#include "blockutil.h"

#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <sys/mount.h>

static char dir[64];

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

static int make_dir(void **state)
{
    const char *tmp = getenv("TMPDIR");

    (void)state;
    snprintf(dir, sizeof dir, "%s/tidemark-XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    return nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static char *in_dir(const char *name)
{
    return xasprintf("%s/%s", dir, name);
}

static void make(struct graph *g, const char *name, const char *backing)
{
    CLEANUP(memory_freep) char *path = in_dir(name);
    struct error err = ERROR_INIT;
    int r = graph_create_filename(g, path, "qcow2", backing, backing ? "qcow2" : NULL, MiB, &err);

    CHECK_OK(r, err);
}

static int open_name(struct graph *g, const char *name, struct node **ret, struct error *err)
{
    CLEANUP(memory_freep) char *path = in_dir(name);

    error_clear(err);
    *ret = NULL;
    return graph_open_filename(g, path, NULL, NULL, false, ret, err);
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);

    return n >= m && !strcmp(text + n - m, end);
}

TEST(relative_names_are_seen_from_the_image)
{
    struct error err = ERROR_INIT;
    struct node *n;

    make(g, "base.qcow2", NULL);
    make(g, "mid.qcow2", "base.qcow2");
    make(g, "top.qcow2", "mid.qcow2");
    int r = open_name(g, "top.qcow2", &n, &err);
    CHECK_OK(r, err);
    struct node *mid = node_backing(n), *base = node_backing(mid);
    CHECK(ends_with(node_filename(base), "/base.qcow2") && !node_backing(base));
    CHECK(mid->read_only && base->read_only && base->file->node->read_only && !n->read_only);
    CHECK(!strcmp(node_filename(n), n->file->node->filename));
    CHECK(n->probed && !mid->probed);
    /* The next layer is open for reading only, but may be shared by another program that writes
     * to nothing of it: a second chain on it opens. */
    struct node *second;
    make(g, "other.qcow2", "mid.qcow2");
    r = open_name(g, "other.qcow2", &second, &err);
    CHECK_OK(r, err);
    node_unref(second);
    /* ... and the layer itself cannot be opened for writing meanwhile. */
    CHECK(open_name(g, "mid.qcow2", &second, &err) < 0);
    CHECK_TEXT(err, "Failed to get \"write\" lock");
    node_unref(n);

    /* A link: the name beside the link, not beside what it leads to. */
    CLEANUP(memory_freep) char *sub = in_dir("sub"), *link = in_dir("sub/link.qcow2");
    CHECK(mkdir(sub, 0755) == 0 && symlink("../top.qcow2", link) == 0);
    CHECK(open_name(g, "sub/link.qcow2", &n, &err) == -ENOENT);
    CHECK(strstr(err.text, "/sub/mid.qcow2': No such file or directory"));
    CHECK(!strncmp(err.text, "Could not open backing file: Could not open '", 45));
    CHECK(!graph_first(g));
}

TEST(no_backing_image_when_told_so)
{
    CLEANUP(memory_freep) char *path = in_dir("upper.qcow2");
    make(g, "lower.qcow2", NULL);
    make(g, "upper.qcow2", "lower.qcow2");
    CLEANUP(memory_freep)
    char *json = xasprintf("{'driver':'qcow2','backing':null,'read-only':true,"
                           "'file':{'driver':'file','filename':'%s'}}",
                           path);
    CLEANUP(node_unrefp) struct node *n = open_ok(g, json);

    CHECK(!node_backing(n));
    /* Opening that name again would not give this. */
    CHECK(!strncmp(node_filename(n), "json:{\"backing\": null, ", 22));
}

TEST(loops_are_refused)
{
    struct error err = ERROR_INIT;
    struct node *n;

    make(g, "self.qcow2", NULL);
    CLEANUP(memory_freep) char *abs = in_dir("hen.qcow2");
    make(g, "hen.qcow2", NULL);
    make(g, "egg.qcow2", "hen.qcow2");
    CLEANUP(memory_freep) char *hen = in_dir("hen.qcow2");
    CHECK(unlink(hen) == 0);
    make(g, "hen.qcow2", "egg.qcow2");
    CHECK(open_name(g, "hen.qcow2", &n, &err) == -ELOOP);
    CHECK(strstr(err.text, "would create a loop"));
    CHECK(!graph_first(g));
}

TEST(long_chains)
{
    enum { LAYERS = 210 };
    struct error err = ERROR_INIT;
    struct node *n;

    make(g, "0", NULL);
    for (int i = 1; i < LAYERS; i++) {
        char name[16], below[16];
        snprintf(name, sizeof name, "%d", i);
        snprintf(below, sizeof below, "%d", i - 1);
        make(g, name, below);
    }
    int r = open_name(g, "180", &n, &err);
    CHECK_OK(r, err);
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    struct block_status st;
    uint8_t buf[4096];
    CHECK(edge_read(e, range_make(0, 4096), buf, 0) == 0 && buf[0] == 0);
    CHECK(edge_status_above(e, NULL, true, range_make(0, MiB), &st) == 0);
    CHECK(st.length == MiB && (st.flags & STATUS_ZERO));
    buf[0] = 1;
    CHECK(edge_write(e, range_make(1000, 10), buf, REQ_FUA) == 0); /* copies from below */
    CLEANUP(json_putp) struct json_object *info = node_info(n, false, NULL);
    CHECK(json_get_int(info, "backing_file_depth", 0) == 180);
    edge_detach(e);
    node_unref(n);

    CHECK(open_name(g, "205", &n, &err) == -ELOOP);
    CHECK(!graph_first(g));
    /* However many layers pass an error on, its cause is there. */
    CLEANUP(memory_freep) char *bottom = in_dir("0");
    CHECK(unlink(bottom) == 0);
    CHECK(open_name(g, "180", &n, &err) == -ENOENT);
    CHECK(ends_with(err.text, "/0': No such file or directory"));
    CHECK(!graph_first(g));
}

/* A file system of 2 MiB of our own, for this process alone; false where that is not allowed. */
static bool mount_small(void)
{
    CLEANUP(memory_freep) char *small = in_dir("small");

    if (mkdir(small, 0755) < 0)
        return false;
    if (unshare(CLONE_NEWNS) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        return false;
    return mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("tmpfs", small, "tmpfs", 0, "size=2M") == 0;
}

static void fill(struct graph *g, const char *format, uint64_t size_bytes)
{
    struct error err = ERROR_INIT;
    CLEANUP(memory_freep) char *path = in_dir("small/image"), *filler = in_dir("small/filler");
    struct node *opened = NULL;
    static uint8_t buf[65536], back[65536];
    uint64_t written = 0;

    int fd = open(filler, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && fallocate(fd, 0, 0, 512 * 1024) == 0);
    close(fd);
    int r = graph_create_filename(g, path, format, NULL, NULL, size_bytes, &err);
    CHECK_OK(r, err);
    r = graph_open_filename(g, path, format, NULL, false, &opened, &err);
    CHECK_OK(r, err);
    CLEANUP(node_unrefp) struct node *n = opened;
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);

    for (;;) {
        memset(buf, (int)(written / sizeof buf) + 1, sizeof buf);
        r = edge_write(e, range_make(written, sizeof buf), buf, 0);
        if (r == 0)
            r = edge_flush(e);
        if (r < 0)
            break;
        written += sizeof buf;
        CHECK(written < size_bytes);
    }
    CHECK(r == -ENOSPC && written > 512 * 1024);
    for (uint64_t at = 0; at < written; at += sizeof back) {
        memset(buf, (int)(at / sizeof buf) + 1, sizeof buf);
        CHECK(edge_read(e, range_make(at, sizeof back), back, 0) == 0);
        CHECK(!memcmp(buf, back, sizeof back));
    }
    /* There is room again: it goes on. */
    CHECK(unlink(filler) == 0);
    memset(buf, 99, sizeof buf);
    CHECK(edge_write(e, range_make(written, sizeof buf), buf, REQ_FUA) == 0);
    CHECK(edge_read(e, range_make(written, sizeof back), back, 0) == 0);
    CHECK(!memcmp(buf, back, sizeof back));
    edge_detach(e);
    CHECK(unlink(path) == 0);
}

TEST(a_full_file_system_is_an_error_and_no_end)
{
    if (!mount_small()) {
        print_message("skipped: no file system of our own may be mounted here\n");
        return;
    }
    fill(g, "raw", 4 * MiB);
    fill(g, "qcow2", 64 * MiB);
    CLEANUP(memory_freep) char *small = in_dir("small");
    CHECK(umount(small) == 0);
}

/* An image that loses its end while it is open: errors or zeroes, never more than that. */
TEST(an_image_cut_behind_our_back)
{
    struct error err = ERROR_INIT;
    struct rng rng = {test_seed()};
    CLEANUP(memory_freep) char *path = in_dir("cut.qcow2");
    static uint8_t buf[65536];

    for (unsigned i = 0; i < 60; i++) {
        struct node *n = NULL;
        struct stat st;
        unlink(path);
        make(g, "cut.qcow2", NULL);
        int r = graph_open_filename(g, path, "qcow2", NULL, false, &n, &err);
        CHECK_OK(r, err);
        struct test_user u;
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        memset(buf, 7, sizeof buf);
        for (unsigned k = 0; k < 4; k++)
            CHECK(edge_write(e, range_make(k * 65536, 65536), buf, 0) == 0);
        CHECK(edge_flush(e) == 0 && stat(path, &st) == 0);
        CHECK(truncate(path, (off_t)rng_below(&rng, (uint64_t)st.st_size)) == 0);
        for (unsigned k = 0; k < 16; k++) {
            struct block_status bs;
            struct range range = range_make(rng_below(&rng, 15) * 65536, 65536);
            (void)!edge_read(e, range, buf, 0);
            (void)!edge_write(e, range, buf, 0);
            (void)!edge_status_above(e, NULL, true, range, &bs);
            (void)!edge_discard(e, range);
            (void)!edge_flush(e);
        }
        edge_detach(e);
        node_unref(n);
        /* And opened again, whatever is left of it. */
        n = NULL;
        error_clear(&err);
        if (graph_open_filename(g, path, "qcow2", NULL, false, &n, &err) == 0) {
            e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
            for (unsigned k = 0; k < 16; k++)
                (void)!edge_read(e, range_make(k * 65536, 65536), buf, 0);
            edge_detach(e);
            node_unref(n);
        }
        error_clear(&err);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(relative_names_are_seen_from_the_image),
    cmocka_unit_test(no_backing_image_when_told_so),
    cmocka_unit_test(loops_are_refused),
    cmocka_unit_test(long_chains),
    cmocka_unit_test(an_image_cut_behind_our_back),
    cmocka_unit_test(a_full_file_system_is_an_error_and_no_end),
};

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
