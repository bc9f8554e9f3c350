/* A group of disks in doubt: the program was killed in its middle, and the tide file that knows is
 * not there. Both outcomes are kept until it is, and can be told apart then. See persist/group.c.
 */
#include "killedlives.h"

static unsigned doubts, answers[2]; /* that lives have seen: no, yes */

/* Under a sanitizer lives take their time: then they are killed at every third operation. */
enum { STEP = UNIT_SANITIZED ? 3 : 1 };

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

    for (unsigned i = 0; i < DISKS; i++)
        if (disks & 1u << i)
            add_bitmap_action(actions, action, i, name,
                              strcmp(action, "add") ? "" : ",'persistent':true");
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

static bool are_images(void)
{
    return !strcmp(format, "qcow2");
}

/* An image does not keep generations past a good end: then a bitmap has one of its own. */
static bool is_generation(uint64_t is, uint64_t expected)
{
    return is == expected || are_images();
}

/* Has the first disk's clear been done? */
static bool is_clear(struct life *l)
{
    return generation_of(l, 0) == said_number("generation") + 1;
}

/* The answer is exact: after a yes nothing is dirty but what was written since. */
static void look_closely(struct life *l)
{
    uint64_t generation = generation_of(l, 0);

    count(is_clear(l) ? "yes" : "no");
    for (unsigned i = 1; i < DISKS; i++) {
        struct bitmap *bits = dirty_bits(bitmap_of(l, i));
        uint8_t at_two[1];

        CHECK(!in_doubt(l, i) && !dirty_busy(bitmap_of(l, i)));
        CHECK(is_generation(generation_of(l, i), generation));
        CHECK(edge_read(l->e[i], range_make(2 * WRITE_AT, 1), at_two, 0) == 0);
        CHECK(bitmap_get(bits, 0) == !is_clear(l));
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

static void change_all(struct life *l);

/* BODY is killed at each of its operations; then so many LIVES of DURING while the first disk's
 * tide file is away, killed (DIE), or without what segments were left (LOSE); then AFTER with all.
 */
static void kill_and_doubt(void (*body)(struct life *), void (*during)(struct life *),
                           unsigned lives, bool die, bool lose, void (*after)(struct life *))
{
    make_dir();
    unsigned idle = 0;
    doubts = answers[0] = answers[1] = 0;
    static unsigned first[2]; /* a clear's doubts begin with this operation */
    unsigned *begins = &first[!strcmp(format, "qcow2")];
    for (unsigned n = body == clear_all && *begins > 1 ? *begins - 1 : 1;; n += STEP) {
        remove_files("");
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
        if (found && !*begins && body == clear_all)
            *begins = n;
        idle = found ? 0 : idle + 1;
        if (doubts && idle > 12 / STEP && body != change_all)
            break; /* the last group has ended */
        if (!found)
            continue;
        if (lose)
            lose_segments();
        assert_false(run_life(after, 0, false, 0));
        answers[0] += counted("no");
        answers[1] += counted("yes");
    }
    assert_true(doubts > 0);
    remove_files("");
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
        CHECK(!dirty_busy(bitmap_of(l, i)) && is_generation(generation_of(l, i), generation));
        CHECK(bitmap_get(dirty_bits(bitmap_of(l, i)), 3 * WRITE_AT));
        CHECK(is_clear(l) || bitmap_get(dirty_bits(bitmap_of(l, i)), 0));
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
        CHECK(!dirty_busy(bitmap_of(l, i)) && is_generation(generation_of(l, i), generation));
        CHECK(is_clear(l) || bitmap_get(dirty_bits(bitmap_of(l, i)), 0));
    }
}

static void also_killed_in_doubt(void **state)
{
    kill_and_doubt(clear_all, in_doubt_both, 2, true, false, look_after_kills);
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

    CHECK(b && !dirty_busy(b) && is_generation(generation_of(l, 1), generation));
    CHECK(bitmap_get(dirty_bits(b), 3 * WRITE_AT));
    if (counted("removed")) {
        CHECK(bitmap_get(dirty_bits(b), 0) == !is_clear(l));
        CHECK(!dirty_find(l->n[2], "b"));
        for (unsigned i = 1; i < DISKS; i++) {
            struct dirty_bitmap *c = dirty_find(l->n[i], "c");
            struct dirty_state st;
            CHECK(c && !dirty_busy(c) && !dirty_inconsistent(c));
            dirty_get_state(c, &st);
            CHECK(is_generation(st.generation, 2));
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
            /* What has no base yet is inconsistent after a kill, and an image does not save it. */
            bool given_up = are_images() && first && of_first.inconsistent;
            CHECK(!bm == !first || given_up);
            if (!bm)
                continue;
            dirty_get_state(bm, &st);
            CHECK(!dirty_busy(bm) && is_generation(st.generation, of_first.generation) &&
                  st.enabled == of_first.enabled && st.inconsistent == of_first.inconsistent);
            if (st.enabled && !st.inconsistent)
                CHECK(bitmap_get(dirty_bits(bm), 3 * WRITE_AT));
        }
    }
}

static void whatever_the_group_changes(void **state)
{
    kill_and_doubt(change_all, just_write, 1, false, false, look_if_equal);
}

/* A segment that only one of the answers names is gone: the disk opens all the same. */
static void a_segment_in_doubt_is_gone(void **state)
{
    make_dir();
    bool killed = true, seen = false;
    unsigned idle = 0;
    for (unsigned n = 1; killed; n += STEP) {
        bool more = true;
        for (unsigned k = 0; more; k++) {
            remove_files("");
            make_disks();
            assert_false(run_life(begin, 0, false, 0));
            killed = run_life(clear_all, n, false, 0);
            more = move("0.tide", "away") && lose_segment(k);
            run_life(just_write, 0, false, 1);
            move("away", "0.tide");
            bool found = counted("doubts");
            seen |= found;
            idle = found ? 0 : idle + 1;
            killed &= !seen || idle <= 12 / STEP; /* else the last group has ended */
            if (!found)
                break;
            assert_false(run_life(look_without_segments, 0, false, 0));
        }
    }
    assert_true(seen);
    remove_files("");
    rmdir(dir);
}

/* Bitmaps of two disks, each changed for itself. */
static void begin_alone(struct life *l)
{
    for (unsigned i = 0; i < 2; i++) {
        CHECK(act(l, "add", "b", 1u << i) == 0);
        write_at(l, i, 0);
    }
}

/* Something new begins on both disks while a clear of each waits for its flush. */
static void begin_something_new(struct life *l)
{
    struct error err = ERROR_INIT;

    for (unsigned i = 0; i < 2; i++) {
        graph_quiesce_begin(l->g, &l->n[i], 1);
        CHECK_OK(dirty_begin(&l->n[i], 1, &err), err);
        struct bitmap *old = dirty_clear(bitmap_of(l, i));
        CHECK_OK(dirty_commit(&l->n[i], 1, &err), err);
        dirty_forget(bitmap_of(l, i), old);
        graph_quiesce_end(l->g, &l->n[i], 1);
    }
    CHECK_OK(dirty_begin(l->n, 2, &err), err);
}

static void in_no_doubt_alone(struct life *l)
{
    for (unsigned i = 0; i < 2; i++)
        if (l->n[i])
            CHECK(!dirty_held(bitmap_of(l, i)));
}

static void what_one_disk_has_changed_alone_is_in_no_doubt(void **state)
{
    bool killed = true;

    make_dir();
    for (unsigned n = 1; killed; n += STEP)
        for (unsigned away = 0; away < 2; away++) {
            char name[16];
            snprintf(name, sizeof name, "%u.tide", away);
            remove_files("");
            make_disks();
            assert_false(run_life(begin_alone, 0, false, 4));
            killed = run_life(begin_something_new, n, false, 4);
            assert_true(move(name, "away"));
            run_life(in_no_doubt_alone, 0, false, 4 | 1u << away);
        }
    remove_files("");
    rmdir(dir);
}

/* Another program writes the first disk: its guard does not vouch for the tide file any more. */
static void write_as_another(struct life *l)
{
    struct test_user user;
    char json[512];

    snprintf(json, sizeof json,
             "{'driver':'qcow2','node-name':'other','x-tidemark-persist':{'level':'off'},"
             "'file':{'driver':'file','filename':'%s/0'}}",
             dir);
    struct node *n = open_ok(l->g, json);
    struct edge *e = attach(&user, n, PERM_ALL, PERM_ALL);
    uint8_t buf[4096] = {7};
    CHECK(edge_write(e, range_make(WRITE_AT, sizeof buf), buf, 0) == 0);
    edge_detach(e);
    node_unref(n);
}

static void write_first(struct life *l)
{
    CHECK(act(l, "add", "new", 1) == 0);
    write_at(l, 0, 3 * WRITE_AT);
}

static void in_no_doubt(struct life *l)
{
    for (unsigned i = 1; i < DISKS; i++) {
        struct dirty_bitmap *bm = dirty_find(l->n[i], "b");
        CHECK(!in_doubt(l, i) && bm && !dirty_busy(bm) && !dirty_inconsistent(bm));
        count(bitmap_get(dirty_bits(bm), 0) ? "no" : "yes");
    }
}

/* The records of a group are in the tide file that takes the place of one that is void, and in what
 * is left of it at a good end. */
static void a_new_tide_file_of_the_first_image_knows(void **state)
{
    unsigned idle = 0;

    format = "qcow2";
    make_dir();
    doubts = answers[0] = answers[1] = 0;
    for (unsigned n = 1; !doubts || idle <= 12 / STEP; n += STEP) {
        remove_files("");
        make_disks();
        assert_false(run_life(begin, 0, false, 0));
        if (!run_life(clear_all, n, false, 0))
            break;
        if (!move("0.tide", "away"))
            continue;
        assert_false(run_life(just_write, 0, false, 1));
        unsigned found = counted("doubts");
        doubts += found;
        idle = found ? 0 : idle + 1;
        move("away", "0.tide");
        if (!found)
            continue;
        assert_false(run_life(write_as_another, 0, false, (1u << DISKS) - 1));
        run_life(write_first, n % 2 ? 0 : 40, false, 6);
        assert_false(run_life(in_no_doubt, 0, false, n / STEP % 3 ? 0 : 1));
        answers[0] += counted("no");
        answers[1] += counted("yes");
        assert_false(run_life(nothing, 0, false, 0));
    }
    assert_true(doubts > 0 && answers[0] > 0 && answers[1] > 0);
    remove_files("");
    rmdir(dir);
    format = "raw";
}

static void add_first(struct life *l)
{
    CHECK(act(l, "add", "c", 7) == 0);
}

/* All have a bitmap, or none has. One whose base was not durable yet is inconsistent. */
static bool all_have(struct life *l, const char *name)
{
    struct dirty_bitmap *first = dirty_find(l->n[0], name);

    for (unsigned i = 1; i < DISKS; i++) {
        struct dirty_bitmap *bm = dirty_find(l->n[i], name);
        CHECK(!bm == !first && (!bm || dirty_inconsistent(bm) == dirty_inconsistent(first)));
    }
    return first;
}

static void add_another(struct life *l)
{
    count(all_have(l, "c") ? "yes" : "no");
    CHECK(act(l, "add", "d", 7) == 0);
    for (unsigned i = 0; i < DISKS; i++)
        write_at(l, i, 3 * WRITE_AT);
    _exit(KILLED);
}

static void have_another(struct life *l)
{
    CHECK(all_have(l, "d"));
    for (unsigned i = 0; i < DISKS; i++) {
        struct dirty_bitmap *bm = dirty_find(l->n[i], "d");
        CHECK(!dirty_inconsistent(bm) && bitmap_get(dirty_bits(bm), 3 * WRITE_AT));
    }
}

/* Images that have had no bitmaps have not said that they are in use. What a killed program has
 * left is a tide file that no image vouches for. */
static void the_first_bitmaps_of_images_are_a_groups(void **state)
{
    bool killed = true;

    format = "qcow2";
    make_dir();
    answers[0] = answers[1] = 0;
    for (unsigned n = 1; killed; n += STEP) {
        remove_files("");
        make_disks();
        killed = run_life(add_first, n, false, 0);
        assert_true(run_life(add_another, 0, false, 0));
        answers[0] += counted("no");
        answers[1] += counted("yes");
        assert_false(run_life(have_another, 0, false, 0));
    }
    assert_true(answers[0] > 0 && answers[1] > 0);
    remove_files("");
    rmdir(dir);
    format = "raw";
}

/* The same of qcow2 images, whose bitmaps go back into the image at a good end. Not under a
 * sanitizer, where thousands of lives take minutes: there raw disks have shown the code. */
#if !UNIT_SANITIZED
#define OF_IMAGES(test)                                                                            \
    static void images_##test(void **state)                                                        \
    {                                                                                              \
        format = "qcow2";                                                                          \
        test(state);                                                                               \
        format = "raw";                                                                            \
    }

OF_IMAGES(both_outcomes_are_kept_apart)
OF_IMAGES(also_without_segments_in_doubt)
OF_IMAGES(the_answer_comes_with_the_first_disk)
OF_IMAGES(a_disk_in_doubt_is_the_first_of_a_group)
OF_IMAGES(whatever_the_group_changes)
#endif

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(both_outcomes_are_kept_apart),
    cmocka_unit_test(also_without_segments_in_doubt),
    cmocka_unit_test(also_killed_in_doubt),
    cmocka_unit_test(the_answer_comes_with_the_first_disk),
    cmocka_unit_test(a_disk_in_doubt_is_the_first_of_a_group),
    cmocka_unit_test(whatever_the_group_changes),
    cmocka_unit_test(a_segment_in_doubt_is_gone),
    cmocka_unit_test(what_one_disk_has_changed_alone_is_in_no_doubt),
    cmocka_unit_test(a_new_tide_file_of_the_first_image_knows),
    cmocka_unit_test(the_first_bitmaps_of_images_are_a_groups),
#if !UNIT_SANITIZED
    cmocka_unit_test(images_both_outcomes_are_kept_apart),
    cmocka_unit_test(images_also_without_segments_in_doubt),
    cmocka_unit_test(images_the_answer_comes_with_the_first_disk),
    cmocka_unit_test(images_a_disk_in_doubt_is_the_first_of_a_group),
    cmocka_unit_test(images_whatever_the_group_changes),
#endif
};
UNIT_MAIN(tests)
