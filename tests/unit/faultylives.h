/* Lives in which operations fail, take long or are the last one, as the fields of their struct say.
 * The disks are raw, but for the first one's nodes; a life ends when its body does, as if it was
 * killed. */
#pragma once

#include "lives.h"

#include "copy/copy.h"

enum { FDS = 256, AT = 1 << 20 };

/* ---- a life ---- */

enum fault { NO_FAULT, FAILS, FAILS_THOUGH_DONE, FULL };

struct life {
    struct plain_world plain;
    void (*body)(struct life *l);

    /* The disks. */
    const char *nodes; /* of the first one, "%s" is the directory; NULL: as the others are */
    const char *part;  /* they are parts of their files; NULL: all */
    bool below;        /* a node below makes them so */
    bool read_only;
    bool small_regions; /* of 64 KiB */
    bool no_runtime;    /* there is no place for segments */
    bool as_devices;    /* images say that they are */

    /* What fails. */
    enum fault fault; /* as LEFT says */
    unsigned left;    /* operations on tide files and segments until one fails; 0: none does */
    unsigned arm, arm_again; /* so many as LEFT when the body says; or as it likes */
    unsigned data_syncs;     /* of images, until one fails; 0: none does */
    unsigned bad_dir_syncs;  /* so many syncs of directories fail */
    int back_error;          /* of syncs of backing images */
    bool no_statx;
    bool no_new_tide;                 /* there is no room for a tide file, */
    bool no_room;                     /* for more in one that there is, */
    bool no_segments;                 /* for a segment */
    uint64_t unread_at, unread_bytes; /* of tide files: cannot be read */

    /* What takes long. */
    bool slow_syncs; /* of images */
    bool slow_tide;  /* writes of a tide file, its ring's most of all */
    bool slow_close; /* a write of a qcow2 image fails as LEFT says, and what follows takes long */

    /* What is the last. */
    uint64_t die_after_ns; /* a write of data takes so long, and then it ends; 0: it does not */
    bool die_in_truncate;  /* of an image, when that is done */
    bool die_in_unlink;    /* of a tide file: it takes a while, and then the life ends */
    unsigned ends_at;      /* the so-manieth operation as in LEFT is not done any more; 0: it is */

    /* What has been. */
    bool ours[FDS], tide[FDS]; /* of tide files and segments; of the former */
    bool is_qcow2[FDS];
    bool is_back[FDS]; /* of a backing image */
    unsigned image_syncs, back_syncs;
    bool resized;   /* an image, and that is not durable */
    bool unlinking; /* that has begun */

    struct graph *g;
    struct jobs *js;
    struct node *n[DISKS];
    struct edge *e[DISKS];
    struct test_user user[DISKS];
};

static inline bool is_ours(const char *path)
{
    return path && (strstr(path, ".tide") || strstr(path, "/run-"));
}

static inline bool has_effect(const struct life *l, const struct io_op *op)
{
    switch (op->kind) {
    case IO_WRITE:
    case IO_DATASYNC:
    case IO_SYNC:
    case IO_FALLOCATE:
    case IO_TRUNCATE:
        return op->fd >= 0 && op->fd < FDS && l->ours[op->fd];
    case IO_OPEN:
        return (op->flags & O_CREAT) && is_ours(op->path);
    case IO_UNLINK:
        return strstr(op->path, ".tide");
    case IO_RENAME:
        return is_ours(op->path);
    default:
        return false;
    }
}

static inline bool on_tide(const struct life *l, const struct io_op *op)
{
    return op->fd >= 0 && op->fd < FDS && l->tide[op->fd];
}

/* Or on something else that is not ours. */
static inline bool on_image(const struct life *l, const struct io_op *op)
{
    return op->fd >= 0 && op->fd < FDS && !l->ours[op->fd];
}

static inline bool is_sync(const struct io_op *op)
{
    return op->kind == IO_DATASYNC || op->kind == IO_SYNC;
}

static inline bool creates(const struct io_op *op, const char *what)
{
    return op->kind == IO_OPEN && (op->flags & O_CREAT) && strstr(op->path, what);
}

/* Of an operation that is not done at all; else 0. */
static inline int error_of(struct life *l, const struct io_op *op)
{
    if (l->no_statx && op->kind == IO_STATX)
        return -EIO;
    if ((l->no_new_tide && creates(op, ".tide.new")) || (l->no_segments && creates(op, "/run-")) ||
        (l->no_room && op->kind == IO_FALLOCATE && on_tide(l, op)))
        return -ENOSPC;
    if (l->bad_dir_syncs && op->kind == IO_SYNC_DIR) {
        l->bad_dir_syncs--;
        return -EIO;
    }
    if (l->data_syncs && is_sync(op) && on_image(l, op) && --l->data_syncs == 0)
        return -EIO;
    if (is_sync(op) && on_image(l, op) && l->is_back[op->fd])
        return l->back_error;
    if (op->kind == IO_READ && on_tide(l, op) && op->offset < l->unread_at + l->unread_bytes &&
        op->offset + op->length > l->unread_at)
        return -EIO;
    if (l->slow_close && op->kind == IO_WRITE && on_image(l, op) && l->is_qcow2[op->fd] &&
        l->left && --l->left == 0)
        return -ENOSPC;
    return 0;
}

static inline bool is_last(const struct life *l, const struct io_op *op)
{
    switch (op->kind) {
    case IO_WRITE:
        return l->die_after_ns && on_image(l, op);
    case IO_TRUNCATE:
        return l->die_in_truncate && on_image(l, op);
    case IO_UNLINK:
        return l->die_in_unlink && !strcmp(strrchr(op->path, '.'), ".tide");
    default:
        return false;
    }
}

static inline uint64_t delay_ns_of(const struct life *l, const struct io_op *op)
{
    if (l->die_after_ns && op->kind == IO_WRITE && on_image(l, op))
        return l->die_after_ns;
    if (l->slow_close && op->kind == IO_WRITE && on_image(l, op) && l->is_qcow2[op->fd])
        return 3 * NSEC_PER_SEC / 2;
    if (l->slow_syncs && op->kind == IO_DATASYNC && on_image(l, op))
        return NSEC_PER_SEC / 5;
    if (l->slow_tide && op->kind == IO_WRITE && on_tide(l, op))
        return op->offset >= 512 * KiB && op->offset < 768 * KiB ? NSEC_PER_SEC / 2
                                                                 : NSEC_PER_SEC / 8;
    return is_last(l, op) && op->kind == IO_UNLINK ? NSEC_PER_SEC / 5 : 0;
}

static inline int64_t perform(struct world *w, struct io_op *op)
{
    struct life *l = container_of(w, struct life, plain.world);

    l->image_syncs += is_sync(op) && on_image(l, op);
    l->back_syncs += is_sync(op) && on_image(l, op) && l->is_back[op->fd];
    int error = error_of(l, op);
    if (error < 0)
        return error;
    bool last = is_last(l, op), unlinks = last && op->kind == IO_UNLINK;
    l->unlinking |= unlinks;
    uint64_t delay_ns = delay_ns_of(l, op);
    if (delay_ns)
        (void)!sleep_until(clock_after_ns(delay_ns));
    if (last && !unlinks)
        plain_perform(w, op);
    if (last)
        _exit(KILLED);
    if (l->ends_at && has_effect(l, op) && --l->ends_at == 0)
        _exit(KILLED);
    bool fails = l->left && has_effect(l, op) && --l->left == 0;
    if (fails && l->fault != FAILS_THOUGH_DONE)
        return l->fault == FULL ? -ENOSPC : -EIO;
    if (op->kind == IO_RENAME && is_ours(op->path))
        CHECK(!l->resized); /* or the new tide file has another size than the image may have */
    int64_t r = plain_perform(w, op);
    if (l->as_devices && op->kind == IO_FSTAT && on_image(l, op))
        ((struct stat *)op->ret)->st_mode = S_IFBLK | 0600;
    if (on_image(l, op))
        l->resized = op->kind == IO_TRUNCATE || (l->resized && !is_sync(op));
    if (op->kind == IO_OPEN && r >= 0 && r < FDS) {
        l->ours[r] = is_ours(op->path);
        l->tide[r] = l->ours[r] && strstr(op->path, ".tide");
        l->is_qcow2[r] = strstr(op->path, ".qcow2") && !is_ours(op->path);
        l->is_back[r] = strstr(op->path, "/back");
    }
    return fails && op->kind != IO_OPEN ? -EIO : r;
}

static inline void open_disk(struct life *l, unsigned i)
{
    char json[512];

    if (l->nodes && i == 0)
        snprintf(json, sizeof json, l->nodes, dir, dir);
    else
        snprintf(json, sizeof json,
                 "{'driver':'raw','node-name':'d%u','read-only':%s,%s%s"
                 "'file':{'driver':'file','filename':'%s/%u'}%s}",
                 i, l->read_only ? "true" : "false", l->below ? "'file':{'driver':'raw'," : "",
                 l->part ? l->part : "", dir, i, l->below ? "}" : "");
    l->n[i] = open_ok(l->g, json);
    l->e[i] =
        attach(&l->user[i], l->n[i], l->read_only ? PERM_CONSISTENT_READ : PERM_ALL, PERM_ALL);
}

static inline int live(void *arg)
{
    struct life *l = arg;

    l->g = graph_new();
    copy_register_drivers(l->g);
    dirty_init(l->g);
    persist_init(l->g);
    persist_set_runtime(l->g, l->no_runtime ? NULL : dir);
    if (l->small_regions)
        persist_set_limits(l->g, 16, 8, 8);
    l->js = jobs_new(l->g);
    for (unsigned i = 0; i < DISKS; i++)
        open_disk(l, i);
    l->body(l);
    _exit(KILLED);
}

static inline pid_t begin_life(struct life l)
{
    pid_t child = fork();

    if (child == 0) {
        plain_world_init(&l.plain);
        l.plain.world.name = "faulty";
        l.plain.world.perform = perform;
        (void)loop_run_in(&l.plain.world, live, &l);
        _exit(1);
    }
    assert_true(child > 0);
    return child;
}

static inline void await_end(pid_t child, const struct life *l)
{
    int status;

    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != KILLED)
        fail_msg("fault %d at operation %u: the life ended with status 0x%x", l->fault, l->arm,
                 status);
}

static inline void run_life_with(struct life l)
{
    await_end(begin_life(l), &l);
}

static inline void run_life(void (*body)(struct life *))
{
    run_life_with((struct life){.body = body});
}

/* ---- what lives do ---- */

static inline int transact(struct life *l, struct json_object *actions, const char *what)
{
    struct error err = ERROR_INIT;

    int r = transaction_run(l->g, l->js, actions, NULL, &err);
    if (r < 0 && getenv("TELL"))
        fprintf(stderr, "%s: %s\n", what, err.text);
    return r;
}

static inline int act(struct life *l, unsigned disks, const char *action, const char *more)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();

    for (unsigned i = 0; i < disks; i++)
        add_bitmap_action(actions, action, i, "b", more);
    return transact(l, actions, action);
}

static inline int write_at(struct life *l, unsigned i, uint64_t at)
{
    uint8_t buf[4096];

    memset(buf, 1, sizeof buf);
    return edge_write(l->e[i], range_make(at, sizeof buf), buf, 0);
}

static inline struct dirty_bitmap *bitmap_of(struct life *l, unsigned i)
{
    struct dirty_bitmap *bm = dirty_find(l->n[i], "b");

    CHECK(bm && !dirty_inconsistent(bm));
    return bm;
}

static inline bool is_dirty(struct life *l, unsigned i, uint64_t at)
{
    return bitmap_get(dirty_bits(bitmap_of(l, i)), at);
}

static inline uint64_t generation_of(struct life *l, unsigned i)
{
    struct dirty_state st;

    dirty_get_state(bitmap_of(l, i), &st);
    return st.generation;
}

static inline void add(struct life *l)
{
    CHECK(act(l, 1, "add", ",'persistent':true") == 0);
}

static inline void add_fine(struct life *l)
{
    CHECK(act(l, 1, "add", ",'persistent':true,'granularity':512") == 0);
}

static inline void write_and_die(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
}

static inline void close_disk(struct life *l, unsigned i)
{
    edge_detach(l->e[i]);
    node_unref(l->n[i]);
}

static inline void reopen_part(struct life *l, bool read_only, const char *part)
{
    struct error err = ERROR_INIT;
    char text[300];

    snprintf(text, sizeof text, "[{'driver':'raw','node-name':'d0','read-only':%s,%s'file':'%s'}]",
             read_only ? "true" : "false", part, node_name(node_primary(l->n[0])->node));
    CLEANUP(json_putp) struct json_object *options = parse(text);
    CHECK_OK(graph_reopen(l->g, options, &err), err);
}

static inline void reopen(struct life *l, bool read_only)
{
    reopen_part(l, read_only, "");
}

/* ---- what they find ---- */

static inline void has_first(struct life *l)
{
    CHECK(is_dirty(l, 0, 0));
}

static inline void has_all_three(struct life *l)
{
    for (unsigned i = 0; i < 3; i++)
        CHECK(is_dirty(l, 0, i * AT));
}

static inline void is_inconsistent(struct life *l)
{
    struct dirty_bitmap *bm = dirty_find(l->n[0], "b");

    CHECK(bm && dirty_inconsistent(bm));
}

static inline void has_witness(struct life *l, const char *expected)
{
    CLEANUP(json_putp) struct json_object *info = persist_info(l->n[0]);

    CHECK(info);
    if (strcmp(json_get_string(info, "witness", ""), expected)) {
        fprintf(stderr, "%s\n", json_object_to_json_string(info));
        CHECK(!"the witness says so");
    }
}

static inline void has_both_and_the_same_witness(struct life *l)
{
    has_witness(l, "same");
    CHECK(is_dirty(l, 0, 0) && is_dirty(l, 0, AT));
}

/* ---- files ---- */

static inline void make_new_disks(void)
{
    remove_files("");
    make_files(DISK_BYTES);
}

static inline void write_as_another(void)
{
    char path[80];

    snprintf(path, sizeof path, "%s/0", dir);
    int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, "x", 1, 3 * AT), 1);
    close(fd);
}

static inline void wait_ms(unsigned ms)
{
    usleep(1000 * ms);
}

static inline int setup(void **state)
{
    make_dir();
    make_files(DISK_BYTES);
    return 0;
}

static inline int teardown(void **state)
{
    remove_files("");
    return rmdir(dir);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
