/* Names, opening, permissions, chains, status, reopen: texts are QEMU's, to the letter. */

#include "blockutil.h"

/* The text of the error with which opening JSON fails. */
static void refuses(struct graph *g, const char *json, const char *text)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;

    CHECK(try_open(g, &n, &err, json) < 0);
    CHECK(!n);
    CHECK_TEXT(err, text);
}

static unsigned count_nodes(struct graph *g)
{
    unsigned n = 0;

    for (struct node *at = graph_first(g); at; at = graph_next(at))
        n++;
    return n;
}

TEST(names)
{
    CLEANUP(node_unrefp) struct node *a = open_ok(g, "{'driver':'fake','node-name':'a'}");
    CLEANUP(node_unrefp) struct node *made = open_ok(g, "{'driver':'fake'}");

    CHECK(!strncmp(node_name(made), "#block", 6));
    CHECK(graph_find(g, "a") == a && !graph_find(g, "b"));
    CHECK(graph_first(g) == a && graph_next(a) == made && !graph_next(made));
    refuses(g, "{'driver':'fake','node-name':'a'}", "Duplicate nodes with node-name='a'");
    refuses(g, "{'driver':'fake','node-name':''}", "Invalid node-name: ''");
    refuses(g, "{'driver':'fake','node-name':'#block1'}", "Invalid node-name: '#block1'");
    refuses(g, "{'driver':'fake','node-name':'1a'}", "Invalid node-name: '1a'");
    refuses(g, "{'driver':'fake','node-name':'a b'}", "Invalid node-name: 'a b'");
    refuses(g, "{'driver':'fake','node-name':'a23456789012345678901234567890123'}",
            "Node name too long");
    CLEANUP(node_unrefp)
    struct node *longest =
        open_ok(g, "{'driver':'fake','node-name':'a2345678901234567890123456789.1'}");
    CHECK(strlen(node_name(longest)) == 31);
    /* What fails leaves nothing behind. */
    unsigned n = count_nodes(g);
    refuses(g, "{'driver':'raw','node-name':'a','file':{'driver':'fake','node-name':'below'}}",
            "Duplicate nodes with node-name='a'");
    CHECK(count_nodes(g) == n && !graph_find(g, "below"));
}

TEST(generic_options_and_what_is_refused)
{
    refuses(g, "{'driver':'nonsense'}", "Unknown driver 'nonsense'");
    refuses(g, "{'node-name':'x'}", "Must specify either driver or file");
    refuses(g, "{'driver':'raw'}", "A block device must be specified for \"file\"");
    refuses(g, "{'driver':'raw','file':'nobody'}",
            "Cannot find device='nobody' nor node-name='nobody'");
    refuses(g, "{'driver':'fake','force-share':true}",
            "force-share=on can only be used with read-only images");
    refuses(g, "{'driver':'fake','detect-zeroes':'unmap'}",
            "setting detect-zeroes to unmap is not allowed without setting discard operation to "
            "unmap");
    refuses(g, "{'driver':'file','filename':'/nonexistent/x'}",
            "Could not open '/nonexistent/x': No such file or directory");
    refuses(g, "{'driver':'file','filename':'/tmp','read-only':true}",
            "'file' driver requires '/tmp' to be a regular file");
    refuses(g, "{'driver':'file'}", "The 'file' block driver requires a file name");
    refuses(g, "{'driver':'raw','node-name':'r','nonsense':1,'file':{'driver':'fake'}}",
            "Block format 'raw' does not support the option 'nonsense'");
    refuses(g, "{'driver':'null-co','nonsense':1}",
            "Block protocol 'null-co' doesn't support the option 'nonsense'");
    refuses(g, "{'driver':'raw','offset':2097152,'file':{'driver':'fake'}}",
            "Offset (2097152) cannot be greater than size of the containing file (1048576)");
    refuses(g, "{'driver':'raw','size':513,'file':{'driver':'fake'}}",
            "Specified size is not multiple of 512");
    refuses(g, "{'driver':'null-co','latency-ns':-1}", "latency-ns is invalid");
    CHECK(count_nodes(g) == 0);
}

TEST(children_inherit)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'raw','node-name':'top','read-only':true,"
                                "'cache':{'direct':true,'no-flush':true},'force-share':true,"
                                "'file':{'driver':'fake','node-name':'below'}}");
    struct node *below = graph_find(g, "below");

    CHECK(below->read_only && below->cache_direct && below->cache_no_flush && below->force_share);
    CHECK(!n->discard_unmap && below->discard_unmap); /* the upper one decides */
    CHECK(below->inherits_from == n);
    CHECK(node_skip_filters(n) == n && n->file->node == below);
}

TEST(sizes_are_whole_sectors)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'null-co','size':1000}");

    CHECK(node_size(n) == 1024);
}

/* ---- permissions ---- */

TEST(conflicts)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'fake','node-name':'d'}");
    CLEANUP(node_unrefp)
    struct node *ro = open_ok(g, "{'driver':'fake','node-name':'ro','read-only':true}");
    struct test_user u, v = {.user = {&test_user_ops}};
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_CONSISTENT_READ), *f = NULL;
    struct error err = ERROR_INIT;

    CHECK(edge_attach_user(&v.user, n, "root", PERM_WRITE | PERM_RESIZE, PERM_ALL, &f, &err) ==
          -EPERM);
    CHECK_TEXT(err, "Permission conflict on node 'd': permissions 'write, resize' are both "
                    "required by block device 'test' (uses node 'd' as 'root' child) and unshared "
                    "by block device 'test' (uses node 'd' as 'root' child).");
    error_clear(&err);
    /* A parent node that could write, in whose way the user stands. */
    struct node *top = NULL;
    CHECK(try_open(g, &top, &err, "{'driver':'raw','node-name':'top','offset':512,'file':'d'}") ==
          0);
    CHECK(edge_attach_user(&v.user, top, "root", PERM_WRITE, PERM_ALL, &f, &err) == -EPERM);
    CHECK_TEXT(err, "Permission conflict on node 'd': permissions 'write' are both required by "
                    "node 'top' (uses node 'd' as 'file' child) and unshared by block device "
                    "'test' (uses node 'd' as 'root' child).");
    CHECK(TAILQ_EMPTY(&top->parents) && top->file->perm == 0);
    error_clear(&err);
    edge_detach(e);
    CHECK(edge_attach_user(&v.user, top, "root", PERM_WRITE, PERM_ALL, &f, &err) == 0);
    CHECK(top->file->perm == PERM_WRITE);
    CHECK(edge_set_perm(f, PERM_CONSISTENT_READ, PERM_ALL, &err) == 0);
    CHECK(top->file->perm == PERM_CONSISTENT_READ);
    edge_detach(f);
    node_unref(top);

    CHECK(edge_attach_user(&v.user, ro, "root", PERM_WRITE, PERM_ALL, &f, &err) == -EPERM);
    CHECK_TEXT(err, "Block node is read-only");
    CHECK(n->refs == 1 && ro->refs == 1);
}

TEST(write_needs_whole_blocks)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'fake','size':1536,'request-alignment':4096}");
    struct test_user v = {.user = {&test_user_ops}};
    struct error err = ERROR_INIT;
    struct edge *f;

    CHECK(edge_attach_user(&v.user, n, "root", PERM_WRITE, PERM_ALL, &f, &err) == -EPERM);
    CHECK_TEXT(err, "Cannot get 'write' permission without 'resize': Image size is not a multiple "
                    "of request alignment");
}

TEST(what_is_frozen_or_stays)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'fake','node-name':'d'}");
    CLEANUP(node_unrefp)
    struct node *f = open_ok(g, "{'driver':'fakefilter','node-name':'f','file':'d'}");
    struct test_user u, v;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    struct edge *job = attach(&v, n, PERM_CONSISTENT_READ, PERM_ALL);
    struct error err = ERROR_INIT;

    CHECK(edge_freeze(e, NULL) == 0);
    job->stay = true;
    CHECK(node_insert_filter(f, n, &err) == -EPERM);
    CHECK_TEXT(err, "Cannot change 'root' link to 'd'");
    CHECK(e->node == n && job->node == n);
    edge_thaw(e);
    CHECK(node_insert_filter(f, n, NULL) == 0);
    CHECK(e->node == f && job->node == n && f->file->node == n);
    CHECK(node_remove_filter(f, NULL) == 0);
    CHECK(e->node == n && u.moved == 2 && v.moved == 0);

    /* A filter that cannot be written to does not come between: all stays as it was. */
    CHECK(edge_set_perm(e, PERM_WRITE, PERM_ALL, NULL) == 0);
    CLEANUP(node_unrefp)
    struct node *ro =
        open_ok(g, "{'driver':'fakefilter','node-name':'ro','read-only':true,'file':'d'}");
    error_clear(&err);
    CHECK(node_insert_filter(ro, n, &err) == -EPERM);
    CHECK_TEXT(err, "Block node is read-only");
    CHECK(e->node == n && TAILQ_EMPTY(&ro->parents) && u.moved == 2 && n->gate == 0);
    CHECK(edge_set_perm(e, PERM_CONSISTENT_READ, PERM_ALL, NULL) == 0);

    /* A permission conflict above the filter. */
    edge_detach(job);
    job = attach(&v, f, PERM_CONSISTENT_READ, PERM_CONSISTENT_READ);
    CHECK(edge_set_perm(e, PERM_WRITE, PERM_ALL, NULL) < 0); /* the filter passes it on */
    edge_detach(job);
    edge_detach(e);
}

TEST(blockers)
{
    CLEANUP(node_unrefp) struct node *n = open_ok(g, "{'driver':'fake','node-name':'d'}");
    struct error err = ERROR_INIT;
    char reason[] = "block device is in use by block job: backup";
    struct op_blocker b = {.ops = 1u << BLOCK_OP_RESIZE, .reason = reason};

    CHECK(node_check_op(n, BLOCK_OP_RESIZE, &err) == 0);
    node_block_ops(n, &b);
    CHECK(node_check_op(n, BLOCK_OP_STREAM, &err) == 0);
    CHECK(node_check_op(n, BLOCK_OP_RESIZE, &err) == -EBUSY);
    CHECK_TEXT(err, "Node 'd' is busy: block device is in use by block job: backup");
    node_unblock_ops(n, &b);
    CHECK(node_check_op(n, BLOCK_OP_RESIZE, NULL) == 0);
}

/* ---- names of trees ---- */

TEST(file_names_are_spelt_as_by_qemu)
{
    CLEANUP(node_unrefp)
    struct node *a = open_ok(g, "{'driver':'null-co','size':512,'read-zeroes':true}");
    CLEANUP(node_unrefp)
    struct node *b = open_ok(
        g, "{'driver':'raw','offset':512,'file':{'driver':'null-co','size':1000,'latency-ns':1}}");
    CLEANUP(node_unrefp)
    struct node *c = open_ok(g, "{'driver':'raw','file':{'driver':'null-co'}}");

    CHECK(!strcmp(node_filename(a),
                  "json:{\"read-zeroes\": true, \"driver\": \"null-co\", \"size\": 512}"));
    CHECK(!strcmp(node_filename(b), "json:{\"offset\": 512, \"driver\": \"raw\", \"file\": "
                                    "{\"driver\": \"null-co\", \"size\": 1000}}"));
    CHECK(!strcmp(node_filename(c), "null-co://"));
}

TEST(json_file_names)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;

    CHECK(graph_open_filename(g,
                              "json:{\"driver\":\"raw\",\"file.driver\":\"null-co\","
                              "\"file\":{\"size\":4096},\"node-name\":\"n\"}",
                              NULL, NULL, true, &n, &err) == 0);
    CHECK(node_size(n) == 4096 && node_read_only(n));
    node_unref(n);
    CHECK(graph_open_filename(g, "json:[]", NULL, NULL, true, &n, &err) == -EINVAL);
    CHECK_TEXT(err, "Invalid JSON object given");
    error_clear(&err);
    CHECK(graph_open_filename(g, "json:{", NULL, NULL, true, &n, &err) == -EINVAL);
    CHECK(!strncmp(err.text, "Could not parse the JSON options: ", 34));
    error_clear(&err);
    CHECK(graph_open_filename(
              g, "json:{\"a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a\":1}",
              NULL, NULL, true, &n, &err) == -EINVAL);
    CHECK_TEXT(err, "A name in the JSON options has more than 32 dots");
    error_clear(&err);
    CHECK(graph_open_filename(g, "gopher:x", NULL, NULL, true, &n, &err) == -EINVAL);
    CHECK_TEXT(err, "Unknown protocol 'gopher'");
    error_clear(&err);
    CHECK(graph_open_filename(g, "/dev/null", "host_device", NULL, true, &n, &err) == 0);
    CHECK(node_size(n) == 0);
    node_unref(n);
    CHECK(graph_open_filename(g, "host_device:/dev/null", NULL, NULL, true, &n, &err) == 0);
    CHECK(!strcmp(node_driver_name(n), "raw") && !strcmp(node_filename(n), "/dev/null"));
    node_unref(n);
    CHECK(graph_open_filename(g, "/dev/null", "file", NULL, true, &n, &err) == -EINVAL);
    CHECK_TEXT(err, "'file' driver requires '/dev/null' to be a regular file");
    error_clear(&err);
    CHECK(graph_open_filename(g, "host_device:/proc/version", NULL, NULL, true, &n, &err) ==
          -EINVAL);
    CHECK_TEXT(err, "'host_device' driver requires '/proc/version' to be either a character or "
                    "block device");
}

/* ---- chains ---- */

/* A format for chains: `file` holds the data, `backing` what is not allocated. */
static int fakecow_open(struct node *n, struct json_object *options, struct error *err)
{
    int r = node_open_child(n, options, "file", ROLE_IMAGE, true, &n->file, err);

    if (r == 0)
        n->size_bytes = n->file->node->size_bytes;
    return r;
}

static int fakecow_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct node *file = n->file->node;
    int result = fake_status(file, want_zero, r, ret);

    if (ret->flags & STATUS_ZERO)
        *ret = (struct block_status){.length = ret->length};
    return result;
}

static int fakecow_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    return edge_read(n->file, r, buf, flags);
}

static int fakecow_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    return edge_write(n->file, r, buf, flags);
}

static const struct driver driver_fakecow = {
    .name = "fakecow",
    .is_format = true,
    .supports_backing = true,
    .open = fakecow_open,
    .read = fakecow_read,
    .write = fakecow_write,
    .status = fakecow_status,
    .reopen_prepare = fake_reopen_prepare,
};

TEST(status_down_a_chain)
{
    graph_add_driver(g, &driver_fakecow);
    CLEANUP(node_unrefp)
    struct node *top =
        open_ok(g, "{'driver':'fakecow','node-name':'top','file':{'driver':'fake','size':65536},"
                   "'backing':{'driver':'fakecow','node-name':'mid','file':{'driver':'fake',"
                   "'size':65536},'backing':{'driver':'fakecow','node-name':'base','file':{"
                   "'driver':'fake','size':32768}}}}");
    struct node *mid = graph_find(g, "mid"), *base = graph_find(g, "base");
    struct test_user u;
    struct edge *e = attach(&u, top, PERM_CONSISTENT_READ, PERM_ALL);
    struct block_status st;
    struct error err = ERROR_INIT;
    uint64_t length;

    CHECK(mid->read_only && base->read_only && node_backing(top) == mid);
    memset(fake_of(top->file->node)->allocated, 1, 8);       /* 0..4k */
    memset(fake_of(mid->file->node)->allocated + 8, 1, 8);   /* 4k..8k */
    memset(fake_of(base->file->node)->allocated + 32, 1, 8); /* 16k..20k */

    CHECK(edge_status_above(e, NULL, true, range_make(0, 65536), &st) == 0);
    CHECK(st.length == 4096 && (st.flags & STATUS_DATA) && st.depth == 0);
    CHECK(edge_status_above(e, NULL, true, range_make(4096, 61440), &st) == 0);
    CHECK(st.length == 4096 && (st.flags & STATUS_DATA) && st.depth == 1);
    CHECK(edge_status_above(e, NULL, true, range_make(16384, 8192), &st) == 0);
    CHECK(st.length == 4096 && (st.flags & STATUS_DATA) && st.depth == 2);
    /* Beyond the end of the base: zeroes of the base. */
    CHECK(edge_status_above(e, NULL, true, range_make(32768, 32768), &st) == 0);
    CHECK(st.length == 32768 && (st.flags & STATUS_ZERO) && (st.flags & STATUS_EOF));
    CHECK(st.flags & STATUS_ALLOCATED && st.depth == 2);
    /* Data at the very end of the base, in the midst of the top: not the end. */
    memset(fake_of(base->file->node)->allocated + 56, 1, 8);
    CHECK(edge_status_above(e, NULL, true, range_make(28672, 36864), &st) == 0);
    CHECK(st.length == 4096 && (st.flags & STATUS_DATA) && !(st.flags & STATUS_EOF));
    /* Nobody above `base` has it. */
    CHECK(edge_status_above(e, base, true, range_make(16384, 4096), &st) == 0);
    CHECK(!(st.flags & STATUS_ALLOCATED) && st.depth == 0);

    CHECK(edge_allocated_above(e, NULL, false, range_make(0, 65536), &length) == 1);
    CHECK(length == 4096);
    CHECK(edge_allocated_above(e, mid, true, range_make(4096, 65536 - 4096), &length) == 2);
    CHECK(edge_allocated_above(e, mid, false, range_make(4096, 4096), &length) == 0);
    CHECK(edge_allocated_above(e, NULL, false, range_make(16384, 4096), &length) == 3);

    CHECK(node_check_op(mid, BLOCK_OP_RESIZE, &err) == -EBUSY);
    CHECK_TEXT(err, "Node 'mid' is busy: node is used as backing hd of 'top'");
    CHECK(node_check_op(mid, BLOCK_OP_BACKUP_SOURCE, NULL) == 0);
    edge_detach(e);
}

TEST(a_deep_chain_opens_and_closes_and_one_too_deep_does_not)
{
    char *json = xstrdup("{'driver':'fake','size':4096}");
    struct error err = ERROR_INIT;
    struct node *n = NULL;

    for (int i = 0; i < 190; i++) {
        char *more = xasprintf("{'driver':'fakefilter','file':%s}", json);
        free(json);
        json = more;
    }
    n = open_ok(g, json);
    CHECK(count_nodes(g) == 191);
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    uint8_t buf[512] = {1};
    CHECK(edge_write(e, range_make(0, 512), buf, REQ_FUA) == 0);
    edge_detach(e);
    node_unref(n);
    CHECK(count_nodes(g) == 0);

    for (int i = 0; i < 20; i++) {
        char *more = xasprintf("{'driver':'fakefilter','file':%s}", json);
        free(json);
        json = more;
    }
    n = NULL;
    CHECK(try_open(g, &n, &err, json) == -ELOOP);
    CHECK(count_nodes(g) == 0);
    free(json);
}

/* ---- reopen ---- */

static int reopen(struct graph *g, struct error *err, const char *json)
{
    CLEANUP(memory_freep) char *text = xstrdup(json);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    CLEANUP(json_putp) struct json_object *options = json_tokener_parse(text);
    CHECK(options);
    error_clear(err);
    return graph_reopen(g, options, err);
}

TEST(reopening)
{
    graph_add_driver(g, &driver_fakecow);
    CLEANUP(node_unrefp)
    struct node *a = open_ok(g, "{'driver':'fake','node-name':'a','size':65536,'opaque':true}");
    CLEANUP(node_unrefp)
    struct node *b = open_ok(g, "{'driver':'fakecow','node-name':'b','file':{'driver':'fake',"
                                "'node-name':'bf','size':65536}}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'r','file':'a'}");
    CLEANUP(node_unrefp)
    struct node *top = open_ok(g, "{'driver':'fakecow','node-name':'t','backing':'b','file':{"
                                  "'driver':'fake','node-name':'tf','size':65536}}");
    struct test_user u;
    struct edge *e = attach(&u, raw, PERM_CONSISTENT_READ, PERM_ALL);
    struct error err = ERROR_INIT;
    int r;

    /* raw: another part of the file; size given, then taken away */
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','offset':512,'size':1024}]");
    CHECK_OK(r, err);
    CHECK(node_size(raw) == 1024 && u.resized == 1);
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a'}]");
    CHECK_OK(r, err);
    CHECK(node_size(raw) == 65536);
    CHECK(reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','size':100}]") < 0);
    CHECK_TEXT(err, "Specified size is not multiple of 512");

    /* read-only and back; a writer forbids it */
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','read-only':true}]");
    CHECK_OK(r, err);
    CHECK(raw->read_only && !a->read_only);
    CHECK(edge_set_perm(e, PERM_WRITE, PERM_ALL, NULL) < 0);
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a'}]");
    CHECK_OK(r, err);
    CHECK(edge_set_perm(e, PERM_WRITE, PERM_ALL, NULL) == 0);
    CHECK(reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','read-only':true}]") < 0);
    CHECK_TEXT(err, "Read-only block node 'r' cannot support read-write users");
    CHECK(!raw->read_only);

    /* what cannot change */
    CHECK(reopen(g, &err, "[{'driver':'fake','node-name':'r','file':'a'}]") < 0);
    CHECK_TEXT(err, "Cannot change the option 'driver'");
    CHECK(reopen(g, &err, "[{'driver':'raw','file':'a'}]") < 0);
    CHECK_TEXT(err, "node-name not specified");
    CHECK(reopen(g, &err, "[{'driver':'raw','node-name':'zz','file':'a'}]") < 0);
    CHECK_TEXT(err, "Failed to find node with node-name='zz'");
    CHECK(reopen(g, &err, "[{'driver':'fake','node-name':'a','size':65536}]") < 0);
    CHECK_TEXT(err, "Option 'opaque' cannot be reset to its default value");
    CHECK(reopen(g, &err, "[{'driver':'fake','node-name':'a','size':1,'opaque':true}]") < 0);
    CHECK_TEXT(err, "Cannot change the option 'size'");

    /* children: missing, none, another, a loop */
    CHECK(reopen(g, &err, "[{'driver':'fakecow','node-name':'t','file':'tf'}]") < 0);
    CHECK_TEXT(err, "backing is missing for 't'");
    CHECK(reopen(g, &err, "[{'driver':'fakecow','node-name':'t','file':'tf','backing':'t'}]") < 0);
    CHECK_TEXT(err, "Making 't' a backing child of 't' would create a cycle");
    CHECK(reopen(g, &err, "[{'driver':'fakecow','node-name':'t','file':'tf','backing':'no'}]") < 0);
    CHECK_TEXT(err, "Cannot find device='' nor node-name='no'");
    r = reopen(g, &err, "[{'driver':'fakecow','node-name':'t','file':'tf','backing':null}]");
    CHECK_OK(r, err);
    CHECK(!top->backing && b->refs == 1);
    CHECK(node_check_op(b, BLOCK_OP_RESIZE, NULL) == 0);
    r = reopen(g, &err, "[{'driver':'fakecow','node-name':'t','file':'tf','backing':'b'}]");
    CHECK_OK(r, err);
    CHECK(top->backing->node == b && node_check_op(b, BLOCK_OP_RESIZE, NULL) < 0);
    /* Two at once, of which the second cannot: the first is not done either. */
    CHECK(reopen(g, &err,
                 "[{'driver':'fakecow','node-name':'t','file':'tf','backing':null},"
                 "{'driver':'raw','node-name':'r','file':'a','read-only':true}]") < 0);
    CHECK(top->backing && top->backing->node == b && !raw->read_only);
    CHECK(reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'tf'}]") < 0);
    CHECK(raw->file->node == a); /* t does not share tf */
    edge_detach(e);
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'b'}]");
    CHECK_OK(r, err);
    CHECK(raw->file->node == b && a->refs == 1);
}

/* A bitmap, as far as this room knows one. */
struct marks {
    struct write_observer observer;
    uint64_t size, marked_from, marked_to;
};

static void marks_mark(struct write_observer *o, struct range r)
{
    struct marks *m = container_of(o, struct marks, observer);

    m->marked_from = min_u64(m->marked_from, r.start);
    m->marked_to = max_u64(m->marked_to, min_u64(range_end(r), m->size));
}

static void marks_resized(struct write_observer *o, uint64_t from, uint64_t to)
{
    struct marks *m = container_of(o, struct marks, observer);

    CHECK(from == m->size);
    m->size = to;
}

static bool were_marked(struct marks *m, uint64_t from, uint64_t to)
{
    bool as_said = m->marked_from == from && m->marked_to == to;

    m->marked_from = UINT64_MAX;
    m->marked_to = 0;
    return as_said;
}

TEST(content_that_comes_by_a_reopen_is_marked)
{
    graph_add_driver(g, &driver_fakecow);
    CLEANUP(node_unrefp)
    struct node *a = open_ok(g, "{'driver':'fake','node-name':'a','size':65536}");
    CLEANUP(node_unrefp)
    struct node *b = open_ok(g, "{'driver':'fake','node-name':'b','size':65536}");
    CLEANUP(node_unrefp)
    struct node *f = open_ok(g, "{'driver':'fakefilter','node-name':'f','file':'a'}");
    CLEANUP(node_unrefp)
    struct node *raw = open_ok(g, "{'driver':'raw','node-name':'r','file':'a','size':1024}");
    struct marks m = {{.mark = marks_mark, .resized = marks_resized}, 1024, UINT64_MAX, 0};
    struct error err = ERROR_INIT;

    node_observe(raw, &m.observer);
    int r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','size':4096}]");
    CHECK_OK(r, err);
    CHECK(m.size == 4096 && were_marked(&m, 1024, 4096));
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','size':4096,'offset':512}]");
    CHECK_OK(r, err);
    CHECK(m.size == 4096 && were_marked(&m, 0, 4096));
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'f','size':4096,'offset':512}]");
    CHECK_OK(r, err); /* a filter comes in: nothing has changed */
    CHECK(were_marked(&m, UINT64_MAX, 0));
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'a','size':4096,'offset':512}]");
    CHECK_OK(r, err);
    CHECK(were_marked(&m, UINT64_MAX, 0));
    r = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'b','size':4096,'offset':512}]");
    CHECK_OK(r, err);
    CHECK(were_marked(&m, 0, 4096));
    {
        CLEANUP(node_unrefp) struct node *top = open_ok(g, "{'driver':'fakecow','file':'r'}");
        (void)top;
        CHECK(reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'b','size':512}]") < 0);
        CHECK(strstr(err.text, "Node 'r' may not be resized: node '#block"));
        CHECK(node_size(raw) == 4096 && m.size == 4096);
    }
    node_unobserve(raw, &m.observer);
    (void)b;
    (void)f;
    (void)a;
}

TEST(info)
{
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver':'raw','node-name':'r','read-only':true,'file':{"
                                "'driver':'null-co','size':1000}}");
    CLEANUP(json_putp) struct json_object *info = node_info(n, false, NULL);
    CLEANUP(json_putp) struct json_object *stats = node_stats(n);
    struct json_object *image = json_get(info, "image");

    CHECK(json_get_bool(info, "ro", false));
    CHECK(!strcmp(json_get_string(info, "drv", ""), "raw"));
    CHECK(json_object_object_length(info) == 16);
    CHECK(json_get_int(image, "virtual-size", 0) == 1024);
    CHECK(json_object_object_length(image) == 4); /* no dirty-flag over null-co */
    CHECK(json_object_object_length(json_get(stats, "stats")) == 26);
    CHECK(json_get(json_get(stats, "parent"), "stats"));
}

/* Who has come to a node later does not count what it had lost before, nor does one that stands
 * elsewhere now count what is no longer below it. */
TEST(losses_count_from_then_on)
{
    CLEANUP(node_unrefp) struct node *a = open_ok(g, "{'driver':'fake','node-name':'a'}");
    CLEANUP(node_unrefp) struct node *b = open_ok(g, "{'driver':'fake','node-name':'b'}");
    CLEANUP(node_unrefp) struct node *r = open_ok(g, "{'driver':'raw','node-name':'r','file':'a'}");
    uint64_t begun = graph_losses(g);

    CHECK(!node_lost_since(r, begun));
    node_has_lost(b);
    CHECK(node_lost_since(b, begun) && !node_lost_since(r, begun) && !node_lost_since(a, begun));
    uint64_t later = graph_losses(g);
    CHECK(!node_lost_since(b, later));
    node_has_lost(a);
    CHECK(node_lost_since(r, later) && node_flush_lost_since(r, later));
    CHECK(node_lost_since(r, begun) && !node_lost_since(b, later));
    /* The other one has lost something, too, but before. */
    uint64_t last = graph_losses(g);
    struct error err = ERROR_INIT;
    int result = reopen(g, &err, "[{'driver':'raw','node-name':'r','file':'b'}]");
    CHECK_OK(result, err);
    CHECK(!node_lost_since(r, last) && !node_lost_since(r, later) && node_lost_since(r, begun));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(names),
    cmocka_unit_test(generic_options_and_what_is_refused),
    cmocka_unit_test(children_inherit),
    cmocka_unit_test(sizes_are_whole_sectors),
    cmocka_unit_test(conflicts),
    cmocka_unit_test(write_needs_whole_blocks),
    cmocka_unit_test(what_is_frozen_or_stays),
    cmocka_unit_test(blockers),
    cmocka_unit_test(file_names_are_spelt_as_by_qemu),
    cmocka_unit_test(json_file_names),
    cmocka_unit_test(status_down_a_chain),
    cmocka_unit_test(a_deep_chain_opens_and_closes_and_one_too_deep_does_not),
    cmocka_unit_test(reopening),
    cmocka_unit_test(content_that_comes_by_a_reopen_is_marked),
    cmocka_unit_test(info),
    cmocka_unit_test(losses_count_from_then_on),
};

UNIT_MAIN(tests)
