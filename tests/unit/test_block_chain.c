/* Chains of images by file names: relative names, links, loops, depth, what is missing. */

#include "blockutil.h"

#include <ftw.h>

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
    CLEANUP(memory_freep) char *path = in_dir("top.qcow2");
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

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(relative_names_are_seen_from_the_image),
    cmocka_unit_test(no_backing_image_when_told_so),
    cmocka_unit_test(loops_are_refused),
    cmocka_unit_test(long_chains),
};

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
