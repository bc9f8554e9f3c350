/* What a review tried to break: histories of bitmaps of raw disks in which a write could be
 * forgotten, a group half advanced, a bitmap lost for nothing, because the program is killed or its
 * tide files fail. Of reopens, images and others who write: test_keeper_reopens.c, _images,
 * _others. */
#include "faultylives.h"

#include "job/mirror.h"

/* ---- changes of state that are cut ---- */

static void write_and_disable(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(act(l, 1, "disable", "") == 0);
}

/* Of a disabled bitmap no hot regions are told after a power loss: so its bits are in the area. */
static void what_was_marked_before_a_disable_is_durable(void **state)
{
    run_life(write_and_disable);
    lose_segments();
    run_life(has_first);
}

static void restart(struct life *l)
{
    struct error err = ERROR_INIT;

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    struct dirty_bitmap *bm = bitmap_of(l, 0);
    graph_quiesce_begin(l->g, l->n, 1);
    CHECK_OK(dirty_start(bm, &err), err);
    CHECK_OK(dirty_commit(l->n, 1, &err), err);
    graph_quiesce_end(l->g, l->n, 1);
    CHECK(write_at(l, 0, AT) == 0);
    graph_quiesce_begin(l->g, l->n, 1);
    CHECK_OK(dirty_restart(bm, &err), err);
    graph_quiesce_end(l->g, l->n, 1);
    CHECK(write_at(l, 0, 2 * AT) == 0);
}

/* Old bits, old successor, new bits, new successor: four sets at once. */
static void a_mirror_restarts_its_successor(void **state)
{
    run_life(restart);
    lose_segments();
    run_life(has_all_three);
}

/* From the first disk to the second, and it does not get far. */
static int mirror(struct life *l)
{
    CLEANUP(json_putp) struct json_object *args = json_object_new_object();
    struct error err = ERROR_INIT;

    CHECK_OK(edge_set_perm(l->e[0], PERM_ALL & ~PERM_RESIZE, PERM_ALL, &err), err);
    edge_detach(l->e[1]);
    json_add_string(args, "device", "d0");
    json_add_string(args, "target", "d1");
    json_add_string(args, "job-id", "m");
    json_add_string(args, "sync", "incremental");
    json_add_string(args, "bitmap", "b");
    json_add_int(args, "speed", 1);
    int r = mirror_blockdev(l->js, args, &err);
    if (r < 0 && getenv("TELL"))
        fprintf(stderr, "mirror: %s\n", err.text);
    return r;
}

static void write_while_mirrored(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(mirror(l) == 0);
    CHECK(write_at(l, 0, AT) == 0 && write_at(l, 0, 2 * AT) == 0);
}

/* With the bitmap at its start there are two sets, and guests mark the new one. */
static void what_is_written_while_a_mirror_runs_is_kept(void **state)
{
    run_life(write_while_mirrored);
    run_life(has_all_three);
}

static void clear_without_settling(struct life *l)
{
    struct error err = ERROR_INIT;
    struct dirty_bitmap *bm = bitmap_of(l, 0);

    graph_quiesce_begin(l->g, l->n, 1);
    CHECK_OK(dirty_begin(l->n, 1, &err), err);
    struct bitmap *old = dirty_clear(bm);
    CHECK_OK(dirty_commit(l->n, 1, &err), err);
    dirty_forget(bm, old);
    graph_quiesce_end(l->g, l->n, 1);
}

/* Two monitors: the second clears while the disk is flushed for the first. */
static void clear_twice(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    clear_without_settling(l);
    CHECK(write_at(l, 0, AT) == 0);
    clear_without_settling(l);
    CHECK(write_at(l, 0, 2 * AT) == 0);
}

static void has_all_since_the_first_clear(struct life *l)
{
    CHECK(is_dirty(l, 0, 0) || generation_of(l, 0) == 2);
    CHECK(is_dirty(l, 0, AT) && is_dirty(l, 0, 2 * AT));
}

static void a_second_clear_while_the_first_is_pending(void **state)
{
    run_life(clear_twice);
    run_life(has_all_since_the_first_clear);
}

static void clear_and_enable_without_settling(struct life *l)
{
    struct error err = ERROR_INIT;

    add(l);
    CHECK(act(l, 1, "disable", "") == 0);
    CHECK(write_at(l, 0, 0) == 0); /* which nothing records */
    struct dirty_bitmap *bm = bitmap_of(l, 0);
    graph_quiesce_begin(l->g, l->n, 1);
    CHECK_OK(dirty_begin(l->n, 1, &err), err);
    struct bitmap *old = dirty_clear(bm);
    CHECK(dirty_set_enabled(bm, true, NULL) == 0);
    CHECK_OK(dirty_commit(l->n, 1, &err), err);
    dirty_forget(bm, old);
    graph_quiesce_end(l->g, l->n, 1);
}

/* The clear is undone by the cut; enabled with its old bits, it would say nothing of what was
 * written while it was disabled. */
static void a_clear_and_an_enable_are_cut(void **state)
{
    run_life(clear_and_enable_without_settling);
    run_life(is_inconsistent);
}

static void add_again(struct life *l)
{
    CLEANUP(json_putp)
    struct json_object *actions = json_tokener_parse(
        "[{\"type\":\"block-dirty-bitmap-remove\",\"data\":{\"node\":\"d0\",\"name\":\"b\"}},"
        "{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"d0\",\"name\":\"b\","
        "\"persistent\":true}}]");
    struct error err = ERROR_INIT;

    add(l);
    CHECK(generation_of(l, 0) == 1);
    CHECK_OK(transaction_run(l->g, l->js, actions, NULL, &err), err);
    CHECK(generation_of(l, 0) == 2);
}

static void has_generation_two(struct life *l)
{
    CHECK(generation_of(l, 0) == 2);
}

/* Or who was cut off from the reply would take the new one for the old one, and miss what was
 * written before. */
static void one_that_is_added_again_is_not_the_old_one(void **state)
{
    run_life(add_again);
    run_life(has_generation_two);
}

static bool has_ended(struct life *l)
{
    CLEANUP(json_putp) struct json_object *all = jobs_query(l->js);

    if (json_object_array_length(all) == 0)
        return true;
    struct json_object *job = json_object_array_get_idx(all, 0);
    return strcmp(json_get_string(job, "status", ""), "concluded") == 0;
}

static void back_up_badly(struct life *l)
{
    struct error err = ERROR_INIT;
    char text[400];

    if (!dirty_find(l->n[0], "b"))
        add(l);
    CHECK(write_at(l, 0, 0) == 0);
    snprintf(text, sizeof text,
             "[{\"type\":\"drive-backup\",\"data\":{\"device\":\"d0\",\"target\":\"%s/t\","
             "\"format\":\"raw\",\"sync\":\"incremental\",\"bitmap\":\"b\",\"job-id\":\"j\","
             "\"auto-finalize\":false,\"auto-dismiss\":false}}]",
             dir);
    CLEANUP(json_putp) struct json_object *actions = json_tokener_parse(text);
    CHECK_OK(transaction_run(l->g, l->js, actions, NULL, &err), err);
    l->bad_dir_syncs = l->arm;
    while (jobs_do(l->js, "j", JOB_VERB_FINALIZE, NULL) < 0)
        CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 100)) == 0);
    while (!has_ended(l))
        CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 100)) == 0);
    CLEANUP(json_putp) struct json_object *all = jobs_query(l->js);
    const char *why = json_get_string(json_object_array_get_idx(all, 0), "error", "");
    CHECK((strstr(why, "cannot be flushed") != NULL) == (l->arm > 0));
    CHECK(is_dirty(l, 0, 0) == (l->arm > 0));
    CHECK(generation_of(l, 0) == (l->arm > 0 ? 1 : 2));
}

static void a_backup_is_none_before_its_name_is_durable(void **state)
{
    run_life_with((struct life){.body = back_up_badly, .arm = 1});
    run_life_with((struct life){.body = back_up_badly});
}

/* ---- tide files that fail ---- */

/* The tide file has to grow with the disk: a new one takes its name, which is not durable. */
static void grow_badly(struct life *l)
{
    struct error err = ERROR_INIT;

    add(l);
    CHECK_OK(edge_truncate(l->e[0], 64 * MiB, true, &err), err);
    CHECK(write_at(l, 0, 0) == 0);
    l->bad_dir_syncs = l->arm;
    (void)!edge_truncate(l->e[0], 8 * GiB, true, NULL);
    if (write_at(l, 0, 32 * MiB) == 0)
        say("written");
    if (l->arm == 1 && !l->bad_dir_syncs)
        say("mended");
}

static void has_what_was_written(struct life *l)
{
    struct dirty_bitmap *bm = dirty_find(l->n[0], "b");

    if (was_said("mended"))
        CHECK(bm && !dirty_inconsistent(bm) && is_dirty(l, 0, 32 * MiB));
    if (bm && !dirty_inconsistent(bm))
        CHECK(is_dirty(l, 0, 0) && (!was_said("written") || is_dirty(l, 0, 32 * MiB)));
}

static void a_new_tide_file_whose_name_is_not_durable(void **state)
{
    for (unsigned i = 1; i < 4; i++) {
        make_new_disks();
        run_life_with((struct life){.body = grow_badly, .arm = i == 3 ? 1000 : i});
        lose_segments();
        run_life(has_what_was_written);
    }
}

static void add_badly(struct life *l)
{
    l->bad_dir_syncs = 1;
    CHECK(act(l, 1, "add", ",'persistent':true") < 0 && !dirty_find(l->n[0], "b"));
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
}

static void a_first_tide_file_whose_name_is_not_durable(void **state)
{
    run_life(add_badly);
    run_life(has_first);
}

static int write_while_it_unlinks(void *arg)
{
    struct life *l = arg;

    while (!l->unlinking)
        CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 1000)) == 0);
    (void)!write_at(l, 0, 2 * AT);
    return 0;
}

static void die_while_it_gives_up(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    SCOPE(guest);
    scope_spawn(&guest, write_while_it_unlinks, l);
    l->fault = FAILS;
    l->left = 1;
    l->no_new_tide = l->die_in_unlink = true;
    (void)!write_at(l, 0, AT); /* its transaction fails, and so does a new tide file */
    CHECK(!"it ends in that write");
}

static void has_all_that_arrived(struct life *l)
{
    struct dirty_bitmap *bm = dirty_find(l->n[0], "b");
    uint8_t byte;

    CHECK(edge_read(l->e[0], range_make(2 * AT, 1), &byte, 0) == 0);
    if (byte && bm && !dirty_inconsistent(bm))
        CHECK(is_dirty(l, 0, 2 * AT));
}

/* The old tide file is still there, and is believed: sim --groups --seed 160304326. */
static void a_write_while_the_tide_file_is_given_up(void **state)
{
    for (int power_loss = 0; power_loss < 2; power_loss++) {
        make_new_disks();
        run_life_with((struct life){.body = die_while_it_gives_up, .small_regions = true});
        if (power_loss)
            lose_segments();
        run_life(has_all_that_arrived);
    }
}

/* ---- torn blocks of the hot ring ---- */

enum { RING_AT = 512 << 10, RING_PLACES = 64, RING_BLOCK_BYTES = 4096 };
static uint8_t ring[RING_PLACES][RING_BLOCK_BYTES]; /* as the last life has left it */

/* A life with small regions, in which the transaction after its last one was torn. */
static void run_and_tear(void (*body)(struct life *), bool read_only)
{
    static uint8_t is[RING_PLACES][RING_BLOCK_BYTES];
    unsigned last = RING_PLACES;
    char path[80];

    run_life_with((struct life){.body = body, .read_only = read_only, .small_regions = true});
    snprintf(path, sizeof path, "%s/0.tide", dir);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0 && pread(fd, is, sizeof is, RING_AT) == sizeof is);
    for (unsigned i = 0; i < RING_PLACES; i++)
        if (memcmp(is[i], ring[i], sizeof is[i]) != 0)
            last = i;
    assert_true(last < RING_PLACES - 1);
    memcpy(is[last + 1], "torn", 4);
    assert_true(pwrite(fd, is, sizeof is, RING_AT) == sizeof is);
    close(fd);
    memcpy(ring, is, sizeof ring);
}

static void write_two(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(write_at(l, 0, AT) == 0);
}

static void has_both(struct life *l)
{
    CHECK(is_dirty(l, 0, 0) && is_dirty(l, 0, AT));
}

static void write_third(struct life *l)
{
    bitmap_of(l, 0);
    CHECK(write_at(l, 0, 2 * AT) == 0);
}

static void reopen_and_write_third(struct life *l)
{
    edge_detach(l->e[0]);
    reopen(l, false);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    write_third(l);
}

static void begin_anew_and_write_third(struct life *l)
{
    is_inconsistent(l);
    CHECK(act(l, 1, "remove", "") == 0);
    add(l);
    write_third(l);
}

static void has_third(struct life *l)
{
    CHECK(is_dirty(l, 0, 2 * AT));
}

/* However a session begins, its first transaction is written over the one that the crash before has
 * torn: or there may be two beside each other after the next crash, which no one crash leaves, and
 * the bitmaps are lost for nothing. (sim --persist --strict --no-faults --seed 90328594) */
static void a_torn_block_of_the_ring_does_not_stay(void **state)
{
    static const struct {
        void (*second)(struct life *), (*third)(struct life *);
        bool power_loss, foreign, read_only;
    } ways[] = {
        {.second = write_third, .third = has_all_three},
        {.second = write_third, .third = has_all_three, .power_loss = true},
        {.second = reopen_and_write_third, .third = has_all_three, .read_only = true},
        {.second = begin_anew_and_write_third, .third = has_third, .foreign = true},
    };

    for (size_t i = 0; i < ARRAY_SIZE(ways); i++) {
        make_new_disks();
        memset(ring, 0, sizeof ring);
        run_and_tear(write_two, false);
        if (ways[i].power_loss)
            lose_segments();
        if (ways[i].foreign) {
            wait_ms(100);
            write_as_another();
        }
        run_and_tear(ways[i].second, ways[i].read_only);
        lose_segments();
        run_life(ways[i].third);
    }
}

/* Zeroes are not an empty table, which a ring tells that has been opened. */
static void a_ring_that_is_lost_is_not_believed(void **state)
{
    for (int lost = 0; lost < 2; lost++) {
        make_new_disks();
        memset(ring, 0, sizeof ring);
        run_and_tear(write_two, false);
        lose_segments();
        if (lost) {
            char path[80];
            snprintf(path, sizeof path, "%s/0.tide", dir);
            int fd = open(path, O_RDWR);
            memset(ring, 0, sizeof ring);
            assert_true(fd >= 0 && pwrite(fd, ring, sizeof ring, RING_AT) == sizeof ring);
            close(fd);
        }
        run_life(lost ? is_inconsistent : has_both);
    }
}

/* ---- every operation fails once ---- */

static void clear_one(struct life *l)
{
    l->left = l->arm;
    say(act(l, 1, "clear", "") == 0 ? "cleared" : "failed");
    if (l->left)
        say("whole");
}

static void look_at_one(struct life *l)
{
    CHECK(!was_said("failed") || (generation_of(l, 0) == 1 && is_dirty(l, 0, 0)));
    CHECK(!was_said("cleared") || generation_of(l, 0) == 2);
}

/* Its superblock may have landed: nobody is told that it has not, before one says so. */
static void a_clear_whose_writes_fail_though_they_are_done(void **state)
{
    for (unsigned n = 1;; n++) {
        make_new_disks();
        run_life(write_and_die);
        run_life_with((struct life){.body = clear_one, .fault = FAILS_THOUGH_DONE, .arm = n});
        if (was_said("whole"))
            break;
        lose_segments();
        run_life(look_at_one);
    }
}

static void mirror_one(struct life *l)
{
    l->left = l->arm;
    bool started = mirror(l) == 0;
    say(l->left ? "whole" : started ? "started" : "failed");
    CHECK(started || !dirty_busy(dirty_find(l->n[0], "b")));
    CHECK(write_at(l, 0, AT) == 0 && write_at(l, 0, 2 * AT) == 0);
}

static void a_mirror_whose_start_fails(void **state)
{
    for (unsigned n = 1;; n++) {
        make_new_disks();
        run_life(write_and_die);
        run_life_with((struct life){.body = mirror_one, .fault = FAILS_THOUGH_DONE, .arm = n});
        run_life(has_all_three);
        if (was_said("whole"))
            break;
    }
}

/* On several bitmaps of the first disk. */
static int act_on(struct life *l, const char *action, const char *names, const char *more)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();

    for (; *names; names++)
        add_bitmap_action(actions, action, 0, (char[2]){*names}, more);
    return transact(l, actions, action);
}

static void clear_two_and_add(struct life *l)
{
    CHECK(act_on(l, "add", "bc", ",'persistent':true") == 0);
    CHECK(write_at(l, 0, 0) == 0);
    l->left = l->arm;
    (void)!act_on(l, "clear", "bc", "");
    say(l->left ? "whole" : "failed");
    l->left = 0;
    CHECK(act_on(l, "add", "d", ",'persistent':true") == 0);
}

/* What a change that has failed has allocated is free again. */
static void a_bitmap_is_added_after_a_change_that_failed(void **state)
{
    for (unsigned n = 1; n == 1 || !was_said("whole"); n++) {
        make_new_disks();
        run_life_with((struct life){.body = clear_two_and_add, .fault = FULL, .arm = n});
    }
}

/* An enable of the group cannot flush the last disk, so the bitmaps are inconsistent and record no
 * more; that this is durable may fail, too. Then the disks are closed. */
static void enable_in_vain_and_close(struct life *l)
{
    CHECK(act(l, DISKS, "add", ",'persistent':true,'disabled':true") == 0);
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(write_at(l, i, 0) == 0);
    l->data_syncs = DISKS;
    l->left = l->arm;
    bool failed = act(l, DISKS, "enable", "") < 0;
    say(l->left ? "whole" : "failed");
    l->left = 0;
    for (unsigned i = 0; failed && i < DISKS - 1; i++)
        CHECK(write_at(l, i, AT) == 0);
    for (unsigned i = 0; i < DISKS; i++)
        close_disk(l, i);
}

static void has_nothing_to_believe(struct life *l)
{
    for (unsigned i = 0; i < DISKS - 1; i++) {
        struct dirty_bitmap *bm = dirty_find(l->n[i], "b");
        CHECK(!bm || dirty_inconsistent(bm) || !dirty_recording(bm) || is_dirty(l, i, AT));
    }
}

static void a_close_after_what_could_not_be_said(void **state)
{
    for (unsigned n = 1; n == 1 || !was_said("whole"); n++) {
        make_new_disks();
        run_life_with((struct life){.body = enable_in_vain_and_close, .fault = FAILS, .arm = n});
        run_life(has_nothing_to_believe);
    }
}

static void begin_all(struct life *l)
{
    CHECK(act(l, DISKS, "add", ",'persistent':true") == 0);
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(write_at(l, i, 0) == 0);
}

static void clear_all(struct life *l)
{
    l->left = l->arm;
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(write_at(l, i, AT) == 0);
    say(act(l, DISKS, "clear", "") == 0 ? "cleared" : "failed");
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(write_at(l, i, 2 * AT) == 0);
    if (l->left)
        say("whole");
}

static void look_all(struct life *l)
{
    uint64_t generation = generation_of(l, 0);

    CHECK(!was_said("cleared") || generation == 2);
    CHECK(!was_said("failed") || generation == 1);
    for (unsigned i = 0; i < DISKS; i++) {
        CHECK(!dirty_busy(bitmap_of(l, i)));
        CHECK(generation_of(l, i) == generation);
        CHECK(is_dirty(l, i, 2 * AT));
        if (generation == 1)
            CHECK(is_dirty(l, i, 0) && is_dirty(l, i, AT));
    }
}

static void every_operation_fails_once(enum fault fault, bool power_loss)
{
    for (unsigned n = 1;; n++) {
        make_new_disks();
        run_life(begin_all);
        if (getenv("TELL"))
            fprintf(stderr, "-- fault %d, operation %u\n", fault, n);
        run_life_with((struct life){.body = clear_all, .fault = fault, .arm = n});
        if (was_said("whole"))
            break;
        if (power_loss)
            lose_segments();
        run_life(look_all);
    }
}

static void a_group_whose_writes_fail(void **state)
{
    every_operation_fails_once(FAILS, false);
}

static void a_group_whose_writes_fail_though_they_are_done(void **state)
{
    every_operation_fails_once(FAILS_THOUGH_DONE, true);
}

static void a_group_on_full_disks(void **state)
{
    every_operation_fails_once(FULL, false);
}

/* A clear of the group cannot flush the last disk, and its undo cannot be made durable: superblocks
 * name sets that no bitmap has any more. Then a removal fails. */
static void clear_and_remove_all(struct life *l)
{
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(write_at(l, i, AT) == 0);
    l->data_syncs = DISKS;
    l->left = l->arm;
    CHECK(act(l, DISKS, "clear", "") < 0);
    say(l->left ? "whole" : "undone");
    for (unsigned i = 0; i < DISKS - 1; i++)
        CHECK(write_at(l, i, 2 * AT) == 0);
    l->left = l->arm_again;
    if (act(l, DISKS, "remove", "") == 0)
        say(was_said("whole") ? "whole" : l->left ? "removed, whole" : "removed");
}

/* A tide file may have been given up, which was told. */
static void look_at_what_is_there(struct life *l)
{
    for (unsigned i = 0; i < DISKS; i++)
        CHECK(!dirty_find(l->n[i], "b") ||
              (generation_of(l, i) == 1 && is_dirty(l, i, 0) && is_dirty(l, i, AT) &&
               (i == DISKS - 1 || is_dirty(l, i, 2 * AT))));
}

static void a_group_fails_after_one_that_was_undone(void **state)
{
    for (unsigned n = 2; n == 2 || !was_said("whole"); n += 2)
        for (unsigned again = 1;; again += 3) {
            make_new_disks();
            run_life(begin_all);
            run_life_with((struct life){
                .body = clear_and_remove_all, .fault = FAILS, .arm = n, .arm_again = again});
            lose_segments();
            run_life(look_at_what_is_there);
            if (was_said("removed, whole") || was_said("whole"))
                break;
        }
}

static const struct CMUnitTest tests[] = {
    T(what_was_marked_before_a_disable_is_durable),
    T(a_mirror_restarts_its_successor),
    T(what_is_written_while_a_mirror_runs_is_kept),
    T(a_second_clear_while_the_first_is_pending),
    T(a_clear_and_an_enable_are_cut),
    T(one_that_is_added_again_is_not_the_old_one),
    T(a_backup_is_none_before_its_name_is_durable),
    T(a_new_tide_file_whose_name_is_not_durable),
    T(a_first_tide_file_whose_name_is_not_durable),
    T(a_write_while_the_tide_file_is_given_up),
    T(a_torn_block_of_the_ring_does_not_stay),
    T(a_ring_that_is_lost_is_not_believed),
    T(a_clear_whose_writes_fail_though_they_are_done),
    T(a_mirror_whose_start_fails),
    T(a_bitmap_is_added_after_a_change_that_failed),
    T(a_close_after_what_could_not_be_said),
    T(a_group_whose_writes_fail),
    T(a_group_whose_writes_fail_though_they_are_done),
    T(a_group_on_full_disks),
    T(a_group_fails_after_one_that_was_undone),
};
UNIT_MAIN(tests)
