/* Bitmaps of several disks through kills: each life ends at the N-th operation that has an effect.
 */
#pragma once

#include "lives.h"

enum { WRITE_AT = 1 << 20 };

static const char *format = "raw"; /* of the disks; or qcow2 */

/* ---- a life ---- */

struct life {
    struct plain_world plain;
    unsigned left;   /* operations until it ends; 0: it lives on */
    bool after;      /* it ends when the operation has been done */
    unsigned hidden; /* bits: disks whose tide file this life does not see */
    void (*body)(struct life *l);
    struct graph *g;
    struct jobs *js;
    struct node *n[DISKS];
    struct edge *e[DISKS];
    struct test_user user[DISKS];
};

static inline bool has_effect(const struct io_op *op)
{
    return op->kind == IO_WRITE || op->kind == IO_UNLINK || op->kind == IO_RENAME ||
           op->kind == IO_TRUNCATE || (op->kind == IO_OPEN && op->flags & O_CREAT);
}

static inline int64_t perform(struct world *w, struct io_op *op)
{
    struct life *l = container_of(w, struct life, plain.world);

    if (!l->left || !has_effect(op) || --l->left)
        return plain_perform(w, op);
    if (l->after)
        plain_perform(w, op);
    _exit(KILLED);
}

static inline void open_disk(struct life *l, unsigned i)
{
    char json[512];

    snprintf(json, sizeof json,
             "{'driver':'%s','node-name':'d%u','file':{'driver':'file','filename':'%s/%u'}}",
             format, i, dir, i);
    l->n[i] = open_ok(l->g, json);
    l->e[i] = attach(&l->user[i], l->n[i], PERM_ALL, PERM_ALL);
}

static inline int live(void *arg)
{
    struct life *l = arg;

    l->g = graph_new();
    dirty_init(l->g);
    persist_init(l->g);
    persist_set_runtime(l->g, dir);
    l->js = jobs_new(l->g);
    for (unsigned i = 0; i < DISKS; i++)
        if (!(l->hidden & 1u << i))
            open_disk(l, i);
    l->body(l);
    for (unsigned i = 0; i < DISKS; i++)
        if (l->n[i]) {
            edge_detach(l->e[i]);
            node_unref(l->n[i]);
        }
    jobs_free(l->js);
    graph_free(l->g);
    return 0;
}

/* True: it was killed; the N-th operation with an effect (from 1) was its last. */
static inline bool run_life(void (*body)(struct life *), unsigned n, bool after, unsigned hidden)
{
    pid_t child = fork();
    int status;

    if (child == 0) {
        struct life l = {.left = n, .after = after, .hidden = hidden, .body = body};
        plain_world_init(&l.plain);
        l.plain.world.name = "killing";
        l.plain.world.perform = perform;
        _exit(loop_run_in(&l.plain.world, live, &l) == 0 ? 0 : 1);
    }
    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFEXITED(status) || (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != KILLED))
        fail_msg("killed %s operation %u: the life ended with status 0x%x",
                 after ? "after" : "before", n, status);
    return WEXITSTATUS(status) == KILLED;
}

/* ---- what lives do ---- */

static inline void transact(struct life *l, const char *action)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();
    struct error err = ERROR_INIT;

    for (unsigned i = 0; i < DISKS; i++)
        if (l->n[i])
            add_bitmap_action(actions, action, i, "b",
                              strcmp(action, "add") ? "" : ",'persistent':true");
    int r = transaction_run(l->g, l->js, actions, NULL, &err);
    CHECK_OK(r, err);
}

static inline void write_at(struct life *l, unsigned i, uint64_t at)
{
    uint8_t buf[4096];

    memset(buf, 1, sizeof buf);
    CHECK(edge_write(l->e[i], range_make(at, sizeof buf), buf, 0) == 0);
}

static inline void begin(struct life *l)
{
    transact(l, "add");
    for (unsigned i = 0; i < DISKS; i++)
        if (l->n[i])
            write_at(l, i, 0);
}

static inline struct dirty_bitmap *bitmap_of(struct life *l, unsigned i)
{
    struct dirty_bitmap *bm = dirty_find(l->n[i], "b");

    CHECK(bm && !dirty_inconsistent(bm) && dirty_recording(bm));
    return bm;
}

static inline uint64_t generation_of(struct life *l, unsigned i)
{
    struct dirty_state st;

    dirty_get_state(bitmap_of(l, i), &st);
    return st.generation;
}

/* Where what is written now is marked. */
static inline struct bitmap *recorded(struct dirty_bitmap *bm)
{
    struct dirty_state st;

    dirty_get_state(bm, &st);
    return st.successor ? st.successor : st.current;
}

static inline void say_number(const char *name, uint64_t number)
{
    char path[80];

    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    CHECK(f && fprintf(f, "%llu", (unsigned long long)number) > 0 && fclose(f) == 0);
}

static inline uint64_t said_number(const char *name)
{
    unsigned long long number;
    char path[80];

    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "r");
    CHECK(f && fscanf(f, "%llu", &number) == 1 && fclose(f) == 0);
    return number;
}

static inline void clear_all(struct life *l)
{
    say_number("generation", generation_of(l, 0));
    for (unsigned i = 0; i < DISKS; i++)
        write_at(l, i, WRITE_AT);
    transact(l, "clear");
    say("cleared");
    for (unsigned i = 0; i < DISKS; i++)
        write_at(l, i, 2 * WRITE_AT);
}

/* ---- files ---- */

/* What is left of tide files and segments. */
static inline unsigned leftovers(void)
{
    unsigned n = 0;
    DIR *d = opendir(dir);
    struct dirent *e;

    assert_non_null(d);
    while ((e = readdir(d)))
        if (e->d_name[0] != '.' && (strstr(e->d_name, "run-") || strstr(e->d_name, ".tide"))) {
            print_message("left: %s\n", e->d_name);
            n++;
        }
    closedir(d);
    return n;
}

static inline void make_image(struct life *l, unsigned i)
{
    struct error err = ERROR_INIT;
    char text[256];

    snprintf(text, sizeof text,
             "{'driver':'qcow2','file':{'driver':'file','filename':'%s/%u'},'size':%llu}", dir, i,
             (unsigned long long)DISK_BYTES);
    CLEANUP(json_putp) struct json_object *o = parse(text);
    int r = graph_create(l->g, o, &err);
    CHECK_OK(r, err);
}

static inline void make_images(struct life *l)
{
    for (unsigned i = 0; i < DISKS; i++)
        make_image(l, i);
}

static inline void make_disks(void)
{
    const bool raw = !strcmp(format, "raw");

    make_files(raw ? DISK_BYTES : 0);
    if (!raw)
        assert_false(run_life(make_images, 0, false, (1u << DISKS) - 1));
}

/* The K-th one; false: there are not so many. */
static inline bool lose_segment(unsigned k)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    bool found = false;

    while (!found && (e = readdir(d)))
        if (strncmp(e->d_name, "run-", 4) == 0 && !strstr(e->d_name, "stamp") && k-- == 0)
            found = unlinkat(dirfd(d), e->d_name, 0) == 0;
    closedir(d);
    return found;
}

static inline bool move(const char *from, const char *to)
{
    char a[96], b[96];

    snprintf(a, sizeof a, "%s/%s", dir, from);
    snprintf(b, sizeof b, "%s/%s", dir, to);
    return rename(a, b) == 0;
}
