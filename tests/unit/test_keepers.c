/* Bitmaps of several raw disks through kills at each operation. After each, what the clients of the
 * disks must find: all of a group or nothing, no write forgotten, and nothing left over. */
#include "killedlives.h"

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

static void look_at_one_again(struct life *l)
{
    look_at_one(l);
    transact(l, "remove");
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

/* ---- resizing ---- */

#define GROWN (8 * GiB) /* more than the areas of a disk of 4 MiB can tell */
#define SHRUNK (3 * MiB / 2)

static void resize_to(struct life *l, uint64_t size)
{
    struct error err = ERROR_INIT;

    CHECK_OK(edge_truncate(l->e[0], size, true, &err), err);
}

static void grow(struct life *l)
{
    write_at(l, 0, WRITE_AT);
    resize_to(l, GROWN);
    write_at(l, 0, 2 * WRITE_AT);
    write_at(l, 0, GROWN / 2);
    write_at(l, 0, GROWN - 4096);
}

static void shrink(struct life *l)
{
    write_at(l, 0, WRITE_AT);
    write_at(l, 0, 2 * WRITE_AT);
    resize_to(l, SHRUNK);
    write_at(l, 0, 4096 * 100);
}

static void grow_and_shrink(struct life *l)
{
    grow(l);
    shrink(l);
}

/* Whatever is there that was not there at first is dirty, and so is what is not there any more once
 * the disk is as large again. */
static void look_resized(struct life *l)
{
    static const uint64_t places[] = {0,         4096 * 100,  WRITE_AT, 2 * WRITE_AT,
                                      GROWN / 2, GROWN - 4096};
    uint64_t size = node_size(l->n[0]);
    struct bitmap *bits = dirty_bits(bitmap_of(l, 0));

    CHECK(size == DISK_BYTES || size == GROWN || size == SHRUNK);
    CHECK(bitmap_size(bits) == size && !dirty_busy(bitmap_of(l, 0)));
    CHECK(bitmap_get(bits, 0));
    for (unsigned i = 0; i < ARRAY_SIZE(places) && places[i] < size; i++) {
        uint8_t byte;
        CHECK(edge_read(l->e[0], range_make(places[i], 1), &byte, 0) == 0);
        CHECK(!byte || bitmap_get(bits, places[i]));
    }
    if (size == SHRUNK) {
        resize_to(l, DISK_BYTES);
        bits = dirty_bits(bitmap_of(l, 0));
        CHECK(bitmap_get(bits, 2 * WRITE_AT) && bitmap_get(bits, DISK_BYTES - 1));
    }
    write_at(l, 0, 3 * WRITE_AT);
    CHECK(bitmap_get(dirty_bits(bitmap_of(l, 0)), 3 * WRITE_AT));
}

static void look_resized_again(struct life *l)
{
    look_resized(l);
    transact(l, "remove");
}

enum between { NOTHING, SEGMENTS_LOST, FIRST_ABSENT, OTHERS_FIRST };

struct course {
    void (*body)(struct life *l), (*look)(struct life *l), (*look_again)(struct life *l);
    unsigned hidden; /* disks that none of its lives has */
};

enum { OTHERS = ~1u }; /* but the first */
static const struct course clearing = {clear_all, look, look_again};

/* With a sanitizer, where each life takes long, at every third; and so where a fault is looked for,
 * which many of them tell. */
static void kill_at_every_operation_of(const struct course *c, enum between between)
{
    const unsigned step = UNIT_SANITIZED || getenv("TEST_SPARSE") ? 3 : 1;

    make_dir();
    for (unsigned after = 0; after < (between == NOTHING ? 2 : 1); after++) {
        for (unsigned n = 1;; n += step) {
            remove_files("");
            make_disks();
            assert_false(run_life(begin, 0, false, c->hidden));
            bool killed = run_life(c->body, n, after, c->hidden);
            if (between == SEGMENTS_LOST)
                lose_segments();
            if (between == FIRST_ABSENT && move("0.tide", "away"))
                run_life(look_at_one, 0, false, 1);
            if (between == FIRST_ABSENT)
                move("away", "0.tide");
            if (between == OTHERS_FIRST)
                for (unsigned i = DISKS; i-- > 0;)
                    run_life(look_at_one, 0, false, ~(1u << i));
            assert_false(run_life(c->look, 0, false, c->hidden));
            assert_false(run_life(c->look_again, 0, false, c->hidden));
            assert_int_equal(leftovers(), 0);
            if (!killed)
                break;
        }
    }
    remove_files("");
    rmdir(dir);
}

static void kill_at_every_operation(enum between between)
{
    kill_at_every_operation_of(&clearing, between);
}

static void a_resize_forgets_nothing(void **state)
{
    static const struct course resizing = {grow_and_shrink, look_resized, look_resized_again,
                                           OTHERS};

    kill_at_every_operation_of(&resizing, NOTHING);
    kill_at_every_operation_of(&resizing, SEGMENTS_LOST);
}

/* Each recovery is cut at the same place, again and again: whatever it has made so far goes in the
 * end. */
static void cut_again_and_again_inside_recovery(void **state)
{
    bool killed = true;

    make_dir();
    for (unsigned n = 1; killed; n++) {
        remove_files("");
        make_disks();
        assert_false(run_life(begin, 0, false, OTHERS));
        assert_true(run_life(look_at_one, 3, false, OTHERS));
        for (unsigned i = 0; i < 6 && killed; i++)
            killed = run_life(look_at_one, n, false, OTHERS);
        assert_false(run_life(look_at_one_again, 0, false, OTHERS));
        assert_int_equal(leftovers(), 0);
    }
    remove_files("");
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

static void begin_and_die(struct life *l)
{
    begin(l);
    _exit(KILLED);
}

static void all_but_the_first_are_believed(struct life *l)
{
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(dirty_inconsistent(dirty_find(l->n[i], "b")) == (i == 0));
}

/* As QEMU does when it commits into an image: our bit stays. */
static void an_image_that_others_write_after_a_kill(void **state)
{
    const struct timespec later[] = {{.tv_nsec = UTIME_NOW}, {.tv_sec = time(NULL) + 60}};
    char path[80];

    format = "qcow2";
    make_dir();
    make_disks();
    assert_true(run_life(begin_and_die, 0, false, 0));
    snprintf(path, sizeof path, "%s/0", dir);
    assert_int_equal(utimensat(AT_FDCWD, path, later, 0), 0);
    assert_false(run_life(all_but_the_first_are_believed, 0, false, 0));
    remove_files("");
    rmdir(dir);
    format = "raw";
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_resize_forgets_nothing),
    cmocka_unit_test(cut_again_and_again_inside_recovery),
    cmocka_unit_test(a_group_is_all_or_nothing),
    cmocka_unit_test(also_without_run_segments),
    cmocka_unit_test(also_when_one_is_opened_alone),
    cmocka_unit_test(also_when_the_first_cannot_be_asked),
    cmocka_unit_test(an_image_that_others_write_after_a_kill),
};
UNIT_MAIN(tests)
