/* Bitmaps of several raw disks through kills: each life is a process of its own, which ends for
 * good at the N-th operation that has an effect, for every N. After each, what the clients of the
 * disks must find: all of a group or nothing, no write forgotten, and nothing left over. */
#include "blockutil.h"

#include "dirty/dirty.h"
#include "job/transaction.h"
#include "persist/persist.h"
#include "rt/world.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { DISKS = 3, KILLED = 77, WRITE_AT = 1 << 20 };
#define DISK_BYTES (4 * MiB)

static char dir[64];

/* ---- a life ---- */

struct life {
    struct world world, *real;
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

static uint64_t now(struct world *w)
{
    struct life *l = container_of(w, struct life, world);
    return l->real->now_ns(l->real);
}

static uint64_t wall(struct world *w)
{
    struct life *l = container_of(w, struct life, world);
    return l->real->wall_us(l->real);
}

static void dice(struct world *w, void *buf, size_t n)
{
    struct life *l = container_of(w, struct life, world);
    l->real->random(l->real, buf, n);
}

static bool turn(struct world *w, uint64_t deadline_ns)
{
    struct life *l = container_of(w, struct life, world);
    return l->real->turn(l->real, deadline_ns);
}

static bool has_effect(const struct io_op *op)
{
    return op->kind == IO_WRITE || op->kind == IO_UNLINK || op->kind == IO_RENAME ||
           op->kind == IO_TRUNCATE || (op->kind == IO_OPEN && op->flags & O_CREAT);
}

static int64_t perform(struct world *w, struct io_op *op)
{
    struct life *l = container_of(w, struct life, world);

    if (!l->left || !has_effect(op) || --l->left)
        return l->real->perform(l->real, op);
    if (l->after)
        l->real->perform(l->real, op);
    _exit(KILLED);
}

static void open_disk(struct life *l, unsigned i)
{
    char json[512];

    snprintf(json, sizeof json,
             "{'driver':'raw','node-name':'d%u','file':{'driver':'file','filename':'%s/%u'}}", i,
             dir, i);
    l->n[i] = open_ok(l->g, json);
    l->e[i] = attach(&l->user[i], l->n[i], PERM_ALL, PERM_ALL);
}

static int live(void *arg)
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
static bool run_life(void (*body)(struct life *), unsigned n, bool after, unsigned hidden)
{
    pid_t child = fork();
    int status;

    if (child == 0) {
        struct life l = {.left = n, .after = after, .hidden = hidden, .body = body};
        int error;
        l.real = world_threads_open(&error);
        l.world = (struct world){"killing", now, wall, dice, perform, turn};
        int r = l.real ? loop_run_in(&l.world, live, &l) : error;
        _exit(r == 0 ? 0 : 1);
    }
    assert_true(child > 0);
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFEXITED(status) || (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != KILLED))
        fail_msg("killed %s operation %u: the life ended with status 0x%x",
                 after ? "after" : "before", n, status);
    return WEXITSTATUS(status) == KILLED;
}

/* ---- what lives do ---- */

static void transact(struct life *l, const char *action, ...)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();
    struct error err = ERROR_INIT;

    for (unsigned i = 0; i < DISKS; i++) {
        char text[256], *p;
        snprintf(text, sizeof text,
                 "{'type':'block-dirty-bitmap-%s','data':{'node':'d%u','name':'b'%s}}", action, i,
                 strcmp(action, "add") ? "" : ",'persistent':true");
        while ((p = strchr(text, '\'')))
            *p = '"';
        json_object_array_add(actions, json_tokener_parse(text));
    }
    int r = transaction_run(l->g, l->js, actions, NULL, &err);
    CHECK_OK(r, err);
}

static void write_at(struct life *l, unsigned i, uint64_t at)
{
    uint8_t buf[4096];

    memset(buf, 1, sizeof buf);
    CHECK(edge_write(l->e[i], range_make(at, sizeof buf), buf, 0) == 0);
}

static void begin(struct life *l)
{
    transact(l, "add");
    for (unsigned i = 0; i < DISKS; i++)
        write_at(l, i, 0);
}

static struct dirty_bitmap *bitmap_of(struct life *l, unsigned i)
{
    struct dirty_bitmap *bm = dirty_find(l->n[i], "b");

    CHECK(bm && !dirty_inconsistent(bm) && dirty_recording(bm));
    return bm;
}

static uint64_t generation_of(struct life *l, unsigned i)
{
    struct dirty_state st;

    dirty_get_state(bitmap_of(l, i), &st);
    return st.generation;
}

/* Where what is written now is marked. */
static struct bitmap *recorded(struct dirty_bitmap *bm)
{
    struct dirty_state st;

    dirty_get_state(bm, &st);
    return st.successor ? st.successor : st.current;
}

/* Told by the file `said`: the client's belief between lives. */
static void say(const char *what)
{
    char path[80];

    snprintf(path, sizeof path, "%s/said", dir);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, what, strlen(what)) == (ssize_t)strlen(what));
    close(fd);
}

static void clear_all(struct life *l)
{
    for (unsigned i = 0; i < DISKS; i++)
        write_at(l, i, WRITE_AT);
    transact(l, "clear");
    say("cleared");
    for (unsigned i = 0; i < DISKS; i++)
        write_at(l, i, 2 * WRITE_AT);
}

static bool was_said(const char *what)
{
    char path[80], text[32] = "";

    snprintf(path, sizeof path, "%s/said", dir);
    int fd = open(path, O_RDONLY);
    if (fd >= 0) {
        CHECK(read(fd, text, sizeof text - 1) >= 0);
        close(fd);
    }
    return strcmp(text, what) == 0;
}

/* One disk alone: its bitmap has whatever it must have, whether it is busy (in doubt) or not. */
static void look_at_one(struct life *l)
{
    for (unsigned i = 0; i < DISKS; i++) {
        if (!l->n[i])
            continue;
        struct dirty_bitmap *bm = bitmap_of(l, i);
        if (dirty_busy(bm))
            CHECK(bitmap_get(dirty_bits(bm), 0) && generation_of(l, i) == 1);
        write_at(l, i, 3 * WRITE_AT);
        CHECK(bitmap_get(recorded(bm), 3 * WRITE_AT));
    }
}

static void look(struct life *l)
{
    uint64_t generation = generation_of(l, 0);

    CHECK(generation == 1 || generation == 2);
    CHECK(generation == 2 || !was_said("cleared"));
    for (unsigned i = 0; i < DISKS; i++) {
        struct dirty_bitmap *bm = bitmap_of(l, i);
        struct bitmap *bits = dirty_bits(bm);
        uint8_t at_two[1];

        CHECK(!dirty_busy(bm));
        CHECK(generation_of(l, i) == generation);
        if (generation == 1)
            CHECK(bitmap_get(bits, 0));
        CHECK(edge_read(l->e[i], range_make(2 * WRITE_AT, 1), at_two, 0) == 0);
        if (at_two[0])
            CHECK(bitmap_get(bits, 2 * WRITE_AT));
        /* And whatever comes now is marked, and is there in the next life. */
        write_at(l, i, 3 * WRITE_AT);
        CHECK(bitmap_get(dirty_bits(bm), 3 * WRITE_AT));
    }
}

static void look_again(struct life *l)
{
    look(l);
    transact(l, "remove");
}

/* ---- files ---- */

static unsigned files(bool remove)
{
    unsigned n = 0;
    DIR *d = opendir(dir);
    struct dirent *e;

    assert_non_null(d);
    while ((e = readdir(d))) {
        if (e->d_name[0] == '.')
            continue;
        if (!remove) {
            if (strstr(e->d_name, "run-") || strstr(e->d_name, ".tide"))
                print_message("left: %s\n", e->d_name);
            n += strstr(e->d_name, "run-") || strstr(e->d_name, ".tide");
            continue;
        }
        assert_int_equal(unlinkat(dirfd(d), e->d_name, 0), 0);
    }
    closedir(d);
    return n;
}

static void make_disks(void)
{
    for (unsigned i = 0; i < DISKS; i++) {
        char path[80];
        snprintf(path, sizeof path, "%s/%u", dir, i);
        int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, DISK_BYTES), 0);
        close(fd);
    }
}

static void lose_segments(void)
{
    DIR *d = opendir(dir);
    struct dirent *e;

    while ((e = readdir(d)))
        if (strncmp(e->d_name, "run-", 4) == 0)
            assert_int_equal(unlinkat(dirfd(d), e->d_name, 0), 0);
    closedir(d);
}

/* The K-th one; false: there are not so many. */
static bool lose_segment(unsigned k)
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

static bool move(const char *from, const char *to)
{
    char a[96], b[96];

    snprintf(a, sizeof a, "%s/%s", dir, from);
    snprintf(b, sizeof b, "%s/%s", dir, to);
    return rename(a, b) == 0;
}

enum between { NOTHING, SEGMENTS_LOST, FIRST_ABSENT, OTHERS_FIRST };

static void kill_at_every_operation(enum between between)
{
    snprintf(dir, sizeof dir, "/tmp/keepers-XXXXXX");
    assert_non_null(mkdtemp(dir));
    for (unsigned after = 0; after < (between == NOTHING ? 2 : 1); after++) {
        for (unsigned n = 1;; n++) {
            files(true);
            make_disks();
            assert_false(run_life(begin, 0, false, 0));
            bool killed = run_life(clear_all, n, after, 0);
            if (between == SEGMENTS_LOST)
                lose_segments();
            if (between == FIRST_ABSENT && move("0.tide", "away"))
                run_life(look_at_one, 0, false, 1);
            if (between == FIRST_ABSENT)
                move("away", "0.tide");
            if (between == OTHERS_FIRST)
                for (unsigned i = DISKS; i-- > 0;)
                    run_life(look_at_one, 0, false, ~(1u << i));
            assert_false(run_life(look, 0, false, 0));
            assert_false(run_life(look_again, 0, false, 0));
            assert_int_equal(files(false), 0);
            if (!killed)
                break;
        }
    }
    files(true);
    rmdir(dir);
}

static void a_group_is_all_or_nothing(void **state)
{
    kill_at_every_operation(NOTHING);
}

static void also_without_run_segments(void **state)
{
    kill_at_every_operation(SEGMENTS_LOST);
}

static void also_when_one_is_opened_alone(void **state)
{
    kill_at_every_operation(OTHERS_FIRST);
}

static void also_when_the_first_cannot_be_asked(void **state)
{
    kill_at_every_operation(FIRST_ABSENT);
}

/* ---- in doubt: the first disk's tide file is away ---- */

static unsigned doubts, answers[2]; /* that lives have seen: no, yes */

/* What the parent counts comes through the exit status; what a life has seen, through a file. */
static void count(const char *what)
{
    char path[80];

    snprintf(path, sizeof path, "%s/%s", dir, what);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    CHECK(fd >= 0 && write(fd, "+", 1) == 1);
    close(fd);
}

static unsigned counted(const char *what)
{
    char path[80];
    struct stat st;

    snprintf(path, sizeof path, "%s/%s", dir, what);
    unsigned n = stat(path, &st) == 0 ? (unsigned)st.st_size : 0;
    unlink(path);
    return n;
}

static int act(struct life *l, const char *action, const char *name, unsigned disks)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();
    struct error err = ERROR_INIT;

    for (unsigned i = 0; i < DISKS; i++) {
        char text[256], *p;
        if (!(disks & 1u << i))
            continue;
        snprintf(text, sizeof text,
                 "{'type':'block-dirty-bitmap-%s','data':{'node':'d%u','name':'%s'%s}}", action, i,
                 name, strcmp(action, "add") ? "" : ",'persistent':true");
        while ((p = strchr(text, '\'')))
            *p = '"';
        json_object_array_add(actions, json_tokener_parse(text));
    }
    int r = transaction_run(l->g, l->js, actions, NULL, &err);
    if (r == -EBUSY)
        CHECK(strstr(err.text, "0.tide") != NULL);
    return r;
}

static bool in_doubt(struct life *l, unsigned i)
{
    CLEANUP(json_putp) struct json_object *info = persist_info(l->n[i]);
    struct json_object *doubt = info ? json_get(info, "in-doubt") : NULL;
    char path[80];

    if (!doubt)
        return false;
    snprintf(path, sizeof path, "%s/0.tide", dir);
    CHECK(strlen(json_get_string(doubt, "group", "")) == 32);
    CHECK(strcmp(json_get_string(doubt, "coordinator", ""), path) == 0);
    return true;
}

/* The bitmap in doubt cannot be used, and who asks is told why. */
static void held(struct life *l, unsigned i)
{
    if (!in_doubt(l, i))
        return;
    struct dirty_bitmap *bm = dirty_find(l->n[i], "b");
    count("doubts");
    CHECK(bm && dirty_held(bm) && dirty_busy(bm));
    CHECK(act(l, "clear", "b", 1u << i) == -EBUSY);
}

static void in_doubt_both(struct life *l)
{
    for (unsigned i = 1; i < DISKS; i++) {
        held(l, i);
        write_at(l, i, 3 * WRITE_AT);
    }
}

/* The answer is exact: after a yes nothing is dirty but what was written since. */
static void look_closely(struct life *l)
{
    uint64_t generation = generation_of(l, 0);

    count(generation == 2 ? "yes" : "no");
    for (unsigned i = 1; i < DISKS; i++) {
        struct bitmap *bits = dirty_bits(bitmap_of(l, i));
        uint8_t at_two[1];

        CHECK(!in_doubt(l, i) && !dirty_busy(bitmap_of(l, i)));
        CHECK(generation_of(l, i) == generation);
        CHECK(edge_read(l->e[i], range_make(2 * WRITE_AT, 1), at_two, 0) == 0);
        CHECK(bitmap_get(bits, 0) == (generation == 1));
        CHECK(bitmap_get(bits, 2 * WRITE_AT) >= (at_two[0] == 1));
        CHECK(bitmap_get(bits, 3 * WRITE_AT));
    }
}

static void the_first_comes_later(struct life *l)
{
    in_doubt_both(l);
    CHECK(move("away", "0.tide"));
    open_disk(l, 0);
    look_closely(l);
}

/* ACT is killed at each of its operations; then DURING, twice, or as often as it says itself, while
 * the first disk's tide file is away; then AFTER with all. */
static void kill_and_doubt(void (*body)(struct life *), void (*during)(struct life *),
                           unsigned lives, bool die, bool lose, void (*after)(struct life *))
{
    snprintf(dir, sizeof dir, "/tmp/keepers-XXXXXX");
    assert_non_null(mkdtemp(dir));
    doubts = answers[0] = answers[1] = 0;
    for (unsigned n = 1;; n++) {
        files(true);
        make_disks();
        assert_false(run_life(begin, 0, false, 0));
        if (!run_life(body, n, false, 0))
            break;
        if (!move("0.tide", "away"))
            continue;
        unsigned found = 0;
        for (unsigned k = 0; k < lives && (k == 0 || found); k++) {
            if (lose)
                lose_segments();
            run_life(during, die ? 40 + n : 0, false, 1);
            found += counted("doubts");
        }
        move("away", "0.tide");
        doubts += found;
        if (!found)
            continue;
        if (lose)
            lose_segments();
        assert_false(run_life(after, 0, false, 0));
        answers[0] += counted("no");
        answers[1] += counted("yes");
    }
    assert_true(doubts > 0);
    files(true);
    rmdir(dir);
}

static void both_outcomes_are_kept_apart(void **state)
{
    kill_and_doubt(clear_all, in_doubt_both, 2, false, false, look_closely);
    assert_true(answers[0] > 0 && answers[1] > 0);
}

static void look_without_segments(struct life *l)
{
    uint64_t generation = generation_of(l, 0);

    for (unsigned i = 1; i < DISKS; i++) {
        CHECK(!dirty_busy(bitmap_of(l, i)) && generation_of(l, i) == generation);
        CHECK(bitmap_get(dirty_bits(bitmap_of(l, i)), 3 * WRITE_AT));
        CHECK(generation == 2 || bitmap_get(dirty_bits(bitmap_of(l, i)), 0));
    }
}

static void also_without_segments_in_doubt(void **state)
{
    kill_and_doubt(clear_all, in_doubt_both, 2, false, true, look_without_segments);
}

static void look_after_kills(struct life *l)
{
    uint64_t generation = generation_of(l, 0);

    for (unsigned i = 1; i < DISKS; i++) {
        CHECK(!dirty_busy(bitmap_of(l, i)) && generation_of(l, i) == generation);
        CHECK(generation == 2 || bitmap_get(dirty_bits(bitmap_of(l, i)), 0));
    }
}

static void also_killed_in_doubt(void **state)
{
    kill_and_doubt(clear_all, in_doubt_both, 3, true, false, look_after_kills);
}

static void nothing(struct life *l)
{
}

static void the_answer_comes_with_the_first_disk(void **state)
{
    kill_and_doubt(clear_all, the_first_comes_later, 1, false, false, nothing);
}

/* A disk in doubt can be the first of another group; two of them cannot change together. */
static void other_groups(struct life *l)
{
    if (in_doubt(l, 1) && in_doubt(l, 2)) {
        CHECK(act(l, "add", "c", 6) == -EBUSY);
        CHECK(!dirty_find(l->n[1], "c") && !dirty_find(l->n[2], "c"));
        CHECK(act(l, "remove", "b", 4) == 0); /* the way out */
        CHECK(!in_doubt(l, 2) && !dirty_find(l->n[2], "b"));
        CHECK(act(l, "add", "c", 6) == 0);
        CHECK(act(l, "clear", "c", 6) == 0);
        CHECK(in_doubt(l, 1));
        held(l, 1);
        count("removed");
    }
    write_at(l, 1, 3 * WRITE_AT);
}

static void look_at_groups(struct life *l)
{
    uint64_t generation = generation_of(l, 0);
    struct dirty_bitmap *b = dirty_find(l->n[1], "b");

    CHECK(b && !dirty_busy(b) && generation_of(l, 1) == generation);
    CHECK(bitmap_get(dirty_bits(b), 3 * WRITE_AT));
    if (counted("removed")) {
        CHECK(bitmap_get(dirty_bits(b), 0) == (generation == 1));
        CHECK(!dirty_find(l->n[2], "b"));
        for (unsigned i = 1; i < DISKS; i++) {
            struct dirty_bitmap *c = dirty_find(l->n[i], "c");
            struct dirty_state st;
            CHECK(c && !dirty_busy(c) && !dirty_inconsistent(c));
            dirty_get_state(c, &st);
            CHECK(st.generation == 2);
        }
    }
}

static void a_disk_in_doubt_is_the_first_of_a_group(void **state)
{
    kill_and_doubt(clear_all, other_groups, 1, false, false, look_at_groups);
}

static void change_all(struct life *l)
{
    CHECK(act(l, "add", "c", 7) == 0);
    CHECK(act(l, "disable", "b", 7) == 0);
    CHECK(act(l, "enable", "b", 7) == 0);
    CHECK(act(l, "remove", "b", 7) == 0);
}

static void just_write(struct life *l)
{
    for (unsigned i = 1; i < DISKS; i++) {
        if (in_doubt(l, i))
            count("doubts");
        write_at(l, i, 3 * WRITE_AT);
    }
}

/* Whatever the group has done, it has been done to all disks or to none. */
static void look_if_equal(struct life *l)
{
    static const char *const names[] = {"b", "c"};

    for (unsigned k = 0; k < 2; k++) {
        struct dirty_bitmap *first = dirty_find(l->n[0], names[k]);
        struct dirty_state of_first, st;
        if (first)
            dirty_get_state(first, &of_first);
        for (unsigned i = 1; i < DISKS; i++) {
            struct dirty_bitmap *bm = dirty_find(l->n[i], names[k]);
            CHECK(!bm == !first);
            if (!bm)
                continue;
            dirty_get_state(bm, &st);
            CHECK(!dirty_busy(bm) && st.generation == of_first.generation &&
                  st.enabled == of_first.enabled && st.inconsistent == of_first.inconsistent);
            if (st.enabled && !st.inconsistent)
                CHECK(bitmap_get(dirty_bits(bm), 3 * WRITE_AT));
        }
    }
}

static void whatever_the_group_changes(void **state)
{
    kill_and_doubt(change_all, just_write, 2, false, false, look_if_equal);
    kill_and_doubt(change_all, just_write, 2, false, true, look_if_equal);
}

/* A segment that only one of the answers names is gone: the disk opens all the same. */
static void a_segment_in_doubt_is_gone(void **state)
{
    snprintf(dir, sizeof dir, "/tmp/keepers-XXXXXX");
    assert_non_null(mkdtemp(dir));
    bool killed = true;
    for (unsigned n = 1; killed; n++) {
        bool more = true;
        for (unsigned k = 0; more; k++) {
            files(true);
            make_disks();
            assert_false(run_life(begin, 0, false, 0));
            killed = run_life(clear_all, n, false, 0);
            more = move("0.tide", "away") && lose_segment(k);
            run_life(just_write, 0, false, 1);
            move("away", "0.tide");
            if (!counted("doubts"))
                break;
            assert_false(run_life(look_without_segments, 0, false, 0));
        }
    }
    files(true);
    rmdir(dir);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_group_is_all_or_nothing),
    cmocka_unit_test(also_without_run_segments),
    cmocka_unit_test(also_when_one_is_opened_alone),
    cmocka_unit_test(also_when_the_first_cannot_be_asked),
    cmocka_unit_test(both_outcomes_are_kept_apart),
    cmocka_unit_test(also_without_segments_in_doubt),
    cmocka_unit_test(also_killed_in_doubt),
    cmocka_unit_test(the_answer_comes_with_the_first_disk),
    cmocka_unit_test(a_disk_in_doubt_is_the_first_of_a_group),
    cmocka_unit_test(whatever_the_group_changes),
    cmocka_unit_test(a_segment_in_doubt_is_gone),
};
UNIT_MAIN(tests)
