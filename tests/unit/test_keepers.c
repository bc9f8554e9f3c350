/* Bitmaps of several raw disks through kills at each operation. After each, what the clients of the
 * disks must find: all of a group or nothing, no write forgotten, and nothing left over. */
#include "livesutil.h"

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

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_group_is_all_or_nothing),
    cmocka_unit_test(also_without_run_segments),
    cmocka_unit_test(also_when_one_is_opened_alone),
    cmocka_unit_test(also_when_the_first_cannot_be_asked),
};
UNIT_MAIN(tests)
