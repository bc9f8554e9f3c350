/* What a review tried to break: histories of bitmaps of raw disks in which a write could be
 * forgotten, a group half advanced, a bitmap lost for nothing. Each life is a process that ends
 * when its body does, as if it was killed. */
#include "faultylives.h"

#include "job/mirror.h"
#include "persist/tide.h"

#define LARGE_BYTES (64 * MiB)

/* ---- histories ---- */

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

static void add_on_read_only(struct life *l)
{
    (void)act(l, 1, "add", ",'persistent':true");
    CHECK(act(l, 1, "enable", "") <= 0);
    CHECK(is_dirty(l, 0, 0));
}

static void a_recovered_disk_may_be_read_only(void **state)
{
    run_life(write_and_die);
    run_life_with((struct life){.body = add_on_read_only, .read_only = true});
    run_life(has_first);
}

static void resize(struct life *l)
{
    struct error err = ERROR_INIT;

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 5)) == 0);
    CHECK_OK(edge_truncate(l->e[0], 2 * DISK_BYTES, true, &err), err);
}

static void a_resize_is_ours(void **state)
{
    run_life(resize);
    run_life(has_first);
}

static void a_new_size_is_durable_before_it_is_recorded(void **state)
{
    run_life(resize);
    lose_segments();
    run_life(has_first);
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

static void reopen_twice(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    reopen(l, true);
    reopen(l, false);
    CHECK(!dirty_readonly(bitmap_of(l, 0)));
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    CHECK(write_at(l, 0, AT) == 0);
    CHECK(write_at(l, 0, 2 * AT) == 0);
}

static void a_disk_is_reopened(void **state)
{
    run_life(reopen_twice);
    lose_segments();
    run_life(has_all_three);
}

static void reopen_and_grow(struct life *l)
{
    struct error err = ERROR_INIT;

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    reopen(l, true);
    reopen(l, false);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    CHECK_OK(edge_truncate(l->e[0], 2 * DISK_BYTES, true, &err), err);
    CHECK(write_at(l, 0, 2 * DISK_BYTES - 4096) == 0);
}

static void has_first_and_last(struct life *l)
{
    CHECK(is_dirty(l, 0, 0) && is_dirty(l, 0, 2 * DISK_BYTES - 4096));
}

/* The segments of the session before the reopen are gone, and cannot grow. */
static void a_disk_grows_after_a_reopen(void **state)
{
    run_life(reopen_and_grow);
    run_life(has_first_and_last);
}

#define FIRST_PART "'offset':0,'size':1048576,"
#define THIRD_PART "'offset':2097152,'size':1048576,"
static void move_disk(struct life *l)
{
    add(l);
    reopen_part(l, false, THIRD_PART);
}

static void move_disk_and_close(struct life *l)
{
    move_disk(l);
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

static void is_all_dirty(struct life *l)
{
    CHECK(bitmap_count(dirty_bits(bitmap_of(l, 0))) == node_size(l->n[0]));
}

/* Content that comes by a reopen is announced by no write. */
static void what_a_reopen_changes_is_durable(void **state)
{
    run_life_with((struct life){.body = move_disk, .part = FIRST_PART});
    lose_segments();
    run_life_with((struct life){.body = is_all_dirty, .part = THIRD_PART});
}

static void what_a_reopen_changes_is_closed(void **state)
{
    run_life_with((struct life){.body = move_disk_and_close, .part = FIRST_PART});
    run_life_with((struct life){.body = is_all_dirty, .part = THIRD_PART});
}

static void write_and_close(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

static void is_not_there(struct life *l)
{
    CHECK(!dirty_find(l->n[0], "b"));
}

static void has_it(struct life *l)
{
    CHECK(!dirty_inconsistent(bitmap_of(l, 0)));
}

/* It is another disk, though of the same image and size, also where a node below makes the parts.
 */
static void another_part_does_not_get_it(void **state)
{
    static const struct {
        void (*first)(struct life *);
        bool moves, below;
    } cases[] = {{write_and_close, .below = true},
                 {write_and_close},
                 {add, .below = true},
                 {add},
                 {move_disk, .moves = true},
                 {move_disk_and_close, .moves = true}};

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        const char *parts[] = {FIRST_PART, THIRD_PART};
        bool moves = cases[i].moves, below = cases[i].below;
        make_new_disks();
        run_life_with((struct life){.body = cases[i].first, .part = parts[0], .below = below});
        run_life_with((struct life){.body = is_not_there, .part = parts[!moves], .below = below});
        run_life_with((struct life){.body = has_it, .part = parts[moves], .below = below});
    }
}

#define ALL_OF_IT "'offset':0,"
static void grow_by_a_reopen(struct life *l)
{
    CHECK(act(l, 1, "add", ",'persistent':true,'granularity':512") == 0);
    CHECK(write_at(l, 0, 0) == 0);
    reopen_part(l, false, ALL_OF_IT);
    CHECK(node_size(l->n[0]) == LARGE_BYTES);
    CHECK(write_at(l, 0, LARGE_BYTES - 4096) == 0);
}

static void grow_by_a_reopen_and_close(struct life *l)
{
    grow_by_a_reopen(l);
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

static void has_first_and_all_that_grew(struct life *l)
{
    CHECK(is_dirty(l, 0, 0));
    for (uint64_t at = AT; at < LARGE_BYTES; at += 512)
        CHECK(is_dirty(l, 0, at));
}

static void make_large_disk(void)
{
    char path[80];

    make_new_disks();
    snprintf(path, sizeof path, "%s/0", dir);
    assert_int_equal(truncate(path, LARGE_BYTES), 0);
}

/* The areas and segments are as large as the disk was. */
static void a_disk_grows_by_a_reopen(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
        make_large_disk();
        run_life_with((struct life){.body = i & 1 ? grow_by_a_reopen_and_close : grow_by_a_reopen,
                                    .part = FIRST_PART,
                                    .no_runtime = i & 2});
        run_life(has_first_and_all_that_grew);
    }
}

static void grow_what_is_disabled(struct life *l)
{
    CHECK(act(l, 1, "add", ",'persistent':true,'granularity':512") == 0);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(act(l, 1, "disable", "") == 0);
    reopen_part(l, false, ALL_OF_IT);
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

static void a_disk_grows_whose_bitmaps_do_not_record(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        make_large_disk();
        run_life_with(
            (struct life){.body = grow_what_is_disabled, .part = FIRST_PART, .no_runtime = i});
        run_life(has_first);
    }
}

static int write_last(void *arg)
{
    struct life *l = arg;
    CHECK(write_at(l, 0, LARGE_BYTES - 4096) == 0);
    return 0;
}

/* A file node, which a write beyond its end makes larger, beside others that use up the slots. */
static void grow_by_a_write(struct life *l)
{
    char json[300];

    snprintf(json, sizeof json, "%s/9", dir);
    int fd = open(json, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && ftruncate(fd, DISK_BYTES) == 0);
    close(fd);
    snprintf(json, sizeof json, "{'driver':'file','node-name':'f','filename':'%s/9'}", dir);
    edge_detach(l->e[0]);
    l->n[0] = open_ok(l->g, json);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    CLEANUP(json_putp)
    struct json_object *actions = json_tokener_parse(
        "[{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"f\",\"name\":\"b\","
        "\"persistent\":true,\"granularity\":512}}]");
    CHECK(transaction_run(l->g, l->js, actions, NULL, NULL) == 0);
    CHECK(write_at(l, 0, 0) == 0);
    l->slow_syncs = true;
    SCOPE(tasks);
    scope_spawn(&tasks, write_last, l);
    for (unsigned i = 0; i < 40; i++)
        CHECK(write_at(l, 0, i * 65536) == 0);
    CHECK(scope_join(&tasks) == 0);
    for (unsigned i = 0; i < 40; i++)
        CHECK(is_dirty(l, 0, i * 65536));
    CHECK(is_dirty(l, 0, LARGE_BYTES - 4096));
}

static void a_write_makes_a_disk_larger(void **state)
{
    run_life_with(
        (struct life){.body = grow_by_a_write, .no_runtime = true, .small_regions = true});
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

static void write_copy_and_close(struct life *l)
{
    char command[200];

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    snprintf(command, sizeof command, "cd %s && mkdir -p saved && cp -p run-* saved/", dir);
    CHECK(system(command) == 0);
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

static void write_second(struct life *l)
{
    CHECK(write_at(l, 0, AT) == 0);
}

static void has_first_two(struct life *l)
{
    CHECK(is_dirty(l, 0, 0) && is_dirty(l, 0, AT));
}

/* A runtime directory as it was a session ago, of the same boot and with the same epochs (a
 * container that is put back): not what the tide file asks for. */
static void segments_of_another_session_are_none(void **state)
{
    char command[200];

    run_life(write_copy_and_close);
    run_life(write_second);
    snprintf(command, sizeof command, "cd %s && rm -f run-* && mv saved/* . && rmdir saved", dir);
    assert_int_equal(system(command), 0);
    run_life(has_first_two);
}

/* What told it, a file's times or the stamp, does not outlive the power: the tide file must. Also
 * where tmpfs is full. */
static void that_others_wrote_is_told_once_and_for_all(void **state)
{
    char path[80];

    for (int full = 0; full < 2; full++) {
        make_new_disks();
        run_life(write_and_die);
        usleep(100000);
        snprintf(path, sizeof path, "%s/0", dir);
        int fd = open(path, O_RDWR);
        assert_true(fd >= 0 && pwrite(fd, path, sizeof path, AT) == sizeof path);
        close(fd);
        run_life_with((struct life){.body = is_inconsistent, .no_segments = full});
        lose_segments();
        run_life(is_inconsistent);
    }
}

/* The session does not end well, and the next one begins in the same program. */
static void reopen_badly(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    l->no_statx = true;
    reopen(l, true);
    l->no_statx = false;
    reopen(l, false);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    CHECK(write_at(l, 0, AT) == 0);
    CHECK(write_at(l, 0, 2 * AT) == 0);
}

static void a_session_that_could_not_end(void **state)
{
    run_life(reopen_badly);
    lose_segments();
    run_life(has_all_three);
}

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

/* ---- what others write after a kill ---- */

static void die_in_a_write(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    l->die_after_ns = l->arm * (NSEC_PER_SEC / 10);
    (void)!write_at(l, 0, AT);
    CHECK(!"it ends in that write");
}

static void has_a_changed_witness(struct life *l)
{
    has_witness(l, "changed");
    CHECK(dirty_inconsistent(dirty_find(l->n[0], "b")));
}

/* With writes in flight it is not known when the last one has reached the file; but not long after
 * the last beat. */
static void a_kill_with_writes_in_flight_and_then_another_writer(void **state)
{
    run_life_with((struct life){.body = die_in_a_write, .arm = 1});
    wait_ms(1500);
    write_as_another();
    run_life(has_a_changed_witness);
}

static void a_kill_in_a_long_write(void **state)
{
    /* Again where it was later than that, and the last beat may be too old. */
    uint64_t ran_ns = UINT64_MAX;
    for (int tries = 0; tries < 10 && ran_ns > 5 * NSEC_PER_SEC / 2; tries++) {
        make_new_disks();
        uint64_t begin = clock_now_ns();
        run_life_with((struct life){.body = die_in_a_write, .arm = 17});
        ran_ns = clock_now_ns() - begin;
    }
    run_life(has_both_and_the_same_witness);
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

static void has_first_and_no_witness(struct life *l)
{
    has_witness(l, "none");
    has_first(l);
}

static void has_the_same_witness(struct life *l)
{
    has_witness(l, "same");
    (void)bitmap_of(l, 0);
}

static void a_kill_that_has_left_no_stamp(void **state)
{
    run_life(add);
    lose_segments();
    run_life(has_the_same_witness); /* nobody has written at all */
    make_new_disks();
    run_life(write_and_die);
    lose_segments();
    run_life(has_first_and_no_witness);
}

/* ---- what queries say ---- */

static void is_distrusted(struct life *l, const char *because)
{
    CLEANUP(json_putp) struct json_object *info = persist_info(l->n[0]);

    CHECK(info && !strcmp(json_get_string(info, "state", ""), "none"));
    if (!strstr(json_get_string(info, "reason", ""), because)) {
        fprintf(stderr, "%s\n", json_object_to_json_string(info));
        CHECK(!"the reason says so");
    }
    CHECK(json_get_uint(info, "bytes-added", 1) == 0);
    CHECK(dirty_inconsistent(dirty_find(l->n[0], "b")));
    CHECK(act(l, 1, "remove", "") == 0);
}

static void goes_on(struct life *l)
{
    if (l->e[0])
        edge_detach(l->e[0]);
    reopen(l, false);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
}

static void another_writes_while_it_is_read_only(struct life *l)
{
    has_first(l);
    wait_ms(100);
    write_as_another();
    goes_on(l);
    is_distrusted(l, "changed since our last write");
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
}

static void its_tide_file_goes_while_it_is_read_only(struct life *l)
{
    has_first(l);
    remove_files(".tide");
    goes_on(l);
    is_distrusted(l, "its tide file has gone");
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
}

static void nothing_can_be_kept(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    l->bad_dir_syncs = 1000;
    (void)!edge_truncate(l->e[0], 8 * GiB, true, NULL);
    is_distrusted(l, "syncing its directory");
}

static void recovery_is_told_as_it_is_now(void **state)
{
    run_life(write_and_die);
    run_life_with((struct life){.body = another_writes_while_it_is_read_only, .read_only = true});
    run_life(has_first);
    make_new_disks();
    run_life(write_and_die);
    run_life_with(
        (struct life){.body = its_tide_file_goes_while_it_is_read_only, .read_only = true});
    run_life(has_first);
    make_new_disks();
    run_life(nothing_can_be_kept);
}

/* ---- a backup whose file may vanish ---- */

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

/* ---- every operation fails once ---- */

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

/* Two programs: the second opens the disk read-only while the first writes it. */
static void await_word(const char *what)
{
    for (unsigned i = 0; !was_said(what); i++) {
        assert_true(i < 60000);
        usleep(1000);
    }
}

static void write_beside_a_reader(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    say("written");
    await_word("read");
    CHECK(write_at(l, 0, AT) == 0);
    say("killed");
}

static void read_and_become_a_writer(struct life *l)
{
    say("read");
    await_word("killed");
    reopen(l, false);
    struct dirty_bitmap *bm = dirty_find(l->n[0], "b");
    CHECK(bm && (dirty_inconsistent(bm) || is_dirty(l, 0, AT)));
}

static void what_is_read_beside_a_writer_is_not_believed(void **state)
{
    const struct life writer = {.body = write_beside_a_reader};

    pid_t first = begin_life(writer);
    await_word("written");
    run_life_with((struct life){.body = read_and_become_a_writer, .read_only = true});
    await_end(first, &writer);
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
    for (unsigned i = 0; i < DISKS; i++) {
        edge_detach(l->e[i]);
        node_unref(l->n[i]);
    }
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

/* The witness of a device is taken after a sync, and an error of the page cache is told once: not
 * to the keeper alone. */
static void add_over_a_loss(struct life *l)
{
    CHECK(write_at(l, 0, 0) == 0);
    l->as_devices = true;
    l->data_syncs = 1;
    CHECK(act(l, 1, "add", ",'persistent':true") < 0);
    CHECK(edge_flush(l->e[0]) < 0);
    CHECK(act(l, 1, "add", ",'persistent':true") < 0);
}

static void what_a_device_has_lost_is_told_to_its_guest(void **state)
{
    run_life(add_over_a_loss);
}

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

/* ---- reopens ---- */

#define LOW_PART "'offset':0,'size':32505856,"
#define HIGH_PART "'offset':33554432,'size':32505856,"
#define BOTH_PARTS "'offset':0,'size':65011712,"
#define TWO_PARTS "'offset':0,'size':2097152,"

static void make_large_disks(void)
{
    char path[80];

    for (unsigned i = 0; i < DISKS; i++) {
        snprintf(path, sizeof path, "%s/%u", dir, i);
        assert_int_equal(truncate(path, LARGE_BYTES), 0);
    }
}

static void add_fine_and_close(struct life *l)
{
    CHECK(act(l, 1, "add", ",'persistent':true,'granularity':512") == 0);
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

/* ARM: it moves first; ARM_AGAIN: and is closed. */
static void become_writable_elsewhere(struct life *l)
{
    bool moves_first = l->arm, closes = l->arm_again;

    edge_detach(l->e[0]);
    if (moves_first)
        reopen_part(l, true, HIGH_PART);
    reopen_part(l, false, HIGH_PART);
    is_all_dirty(l);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    CHECK(write_at(l, 0, 0) == 0);
    is_all_dirty(l);
    if (!closes)
        return;
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
}

static void grow_and_become_writable(struct life *l)
{
    edge_detach(l->e[0]);
    reopen_part(l, true, BOTH_PARTS);
    reopen_part(l, false, BOTH_PARTS);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(is_dirty(l, 0, 40 * MiB));
}

static void has_what_grew(struct life *l)
{
    CHECK(is_dirty(l, 0, 40 * MiB));
}

/* Nothing of a read-only node can be made durable: it is when the node has become writable. */
static void what_changes_while_it_is_read_only_is_kept(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
        make_new_disks();
        make_large_disks();
        run_life_with((struct life){.body = add_fine_and_close, .part = LOW_PART});
        run_life_with((struct life){.body = become_writable_elsewhere,
                                    .part = LOW_PART,
                                    .read_only = true,
                                    .small_regions = true,
                                    .arm = i & 1,
                                    .arm_again = i & 2});
        lose_segments();
        run_life_with((struct life){.body = is_all_dirty, .part = HIGH_PART});
    }
}

static void what_grows_while_it_is_read_only_is_kept(void **state)
{
    make_large_disks();
    run_life_with((struct life){.body = write_and_close, .part = LOW_PART});
    run_life_with((struct life){.body = grow_and_become_writable,
                                .part = LOW_PART,
                                .read_only = true,
                                .small_regions = true});
    lose_segments();
    run_life_with((struct life){.body = has_what_grew, .part = BOTH_PARTS});
}

static void become_writable_and_larger(struct life *l)
{
    edge_detach(l->e[0]);
    reopen_part(l, false, TWO_PARTS);
    CHECK(is_dirty(l, 0, 3 * MiB / 2));
}

static void a_disk_becomes_writable_and_larger(void **state)
{
    run_life_with((struct life){.body = write_and_close, .part = FIRST_PART});
    run_life_with(
        (struct life){.body = become_writable_and_larger, .part = FIRST_PART, .read_only = true});
}

/* ARM: it becomes larger, too. */
static void others_write_it_meanwhile(struct life *l)
{
    char path[80];

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    reopen_part(l, true, FIRST_PART);
    wait_ms(100);
    snprintf(path, sizeof path, "%s/0", dir);
    int fd = open(path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "x", 1, 512 * 1024) == 1);
    close(fd);
    wait_ms(100);
    reopen_part(l, false, l->arm ? TWO_PARTS : FIRST_PART);
    is_inconsistent(l);
}

/* The image is looked at before a new session takes it for ours. */
static void others_write_while_it_is_read_only(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        make_new_disks();
        run_life_with(
            (struct life){.body = others_write_it_meanwhile, .part = FIRST_PART, .arm = i});
    }
}

static void put_a_part_between(struct life *l)
{
    char json[300];
    struct error err = ERROR_INIT;

    snprintf(json, sizeof json, "{'driver':'raw','node-name':'l',%s'file':'%s'}", THIRD_PART,
             node_name(node_primary(l->n[0])->node));
    CHECK_OK(edge_set_perm(l->e[0], PERM_ALL & ~PERM_RESIZE, PERM_ALL, &err), err);
    (void)open_ok(l->g, json);
    add(l);
    snprintf(json, sizeof json, "[{'driver':'raw','node-name':'d0',%s'file':'l'}]", FIRST_PART);
    CLEANUP(json_putp) struct json_object *options = parse(json);
    CHECK(graph_reopen(l->g, options, &err) < 0);
    error_clear(&err);
}

/* It is no filter, whose disk is the same. */
static void a_disk_is_not_led_to_a_part_of_its_file(void **state)
{
    run_life_with((struct life){.body = put_a_part_between, .part = FIRST_PART});
}

static void grow_and_die_in_a_long_write(struct life *l)
{
    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    reopen_part(l, false, TWO_PARTS);
    l->die_after_ns = 12 * (NSEC_PER_SEC / 10);
    (void)!write_at(l, 0, AT);
    CHECK(!"it ends in that write");
}

static void a_growth_that_nobody_announced_ends_no_write(void **state)
{
    run_life_with((struct life){.body = grow_and_die_in_a_long_write, .part = FIRST_PART});
    run_life_with((struct life){.body = has_both_and_the_same_witness, .part = TWO_PARTS});
}

/* ---- what others are told ---- */

static void grow_by_a_write_without_room(struct life *l)
{
    char text[300];

    snprintf(text, sizeof text, "%s/9", dir);
    int fd = open(text, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && ftruncate(fd, DISK_BYTES) == 0);
    close(fd);
    snprintf(text, sizeof text, "{'driver':'file','node-name':'f','filename':'%s/9'}", dir);
    edge_detach(l->e[0]);
    l->n[0] = open_ok(l->g, text);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
    add_to(l, "f");
    CHECK(write_at(l, 0, 0) == 0);
    l->slow_syncs = l->no_room = l->slow_tide = true;
    SCOPE(tasks);
    scope_spawn(&tasks, write_last, l);
    for (unsigned i = 0; i < 12; i++)
        (void)!write_at(l, 0, i * 65536);
    CHECK(scope_join(&tasks) == 0);
}

static void a_tide_file_is_given_up_while_it_is_written(void **state)
{
    run_life_with((struct life){.body = grow_by_a_write_without_room, .small_regions = true});
}

static void resize_and_die(struct life *l)
{
    struct error err = ERROR_INIT;

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    l->die_in_truncate = true;
    (void)!edge_truncate(l->e[0], 2 * DISK_BYTES, true, &err);
    CHECK(!"it ends in that");
}

static void the_first_sync_fails(struct life *l)
{
    l->data_syncs = 1;
    int w = write_at(l, 0, 0), f = edge_flush(l->e[0]);
    CHECK(l->data_syncs == 0 && (w < 0 || f < 0));
}

/* The kernel tells it once: whoever hears it first tells the others. */
static void guests_hear_of_a_sync_that_failed(void **state)
{
    run_life(resize_and_die);
    run_life(the_first_sync_fails);
}

/* ---- qcow2 ---- */

static void make_image(void)
{
    char command[200];

    snprintf(command, sizeof command, "cd %s && qemu-img create -q -f qcow2 image.qcow2 4M", dir);
    assert_int_equal(system(command), 0);
}

/* Below a raw node with OVER_RAW. */
static void open_image_in(struct life *l, bool over_raw)
{
    char json[300];

    snprintf(json, sizeof json,
             "{'driver':'qcow2','node-name':'q',%s'file':{'driver':'file','filename':'%s/"
             "image.qcow2'}%s}",
             over_raw ? "'file':{'driver':'raw'," : "", dir, over_raw ? "}" : "");
    edge_detach(l->e[0]);
    l->n[0] = open_ok(l->g, json);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
}

static void image_write_and_die(struct life *l)
{
    open_image_in(l, false);
    add_to(l, "q");
    CHECK(write_at(l, 0, 0) == 0);
}

static void image_has_first(struct life *l)
{
    open_image_in(l, false);
    has_witness(l, "same");
    CHECK(is_dirty(l, 0, 0));
}

static void image_over_raw_has_first(struct life *l)
{
    open_image_in(l, true);
    CHECK(is_dirty(l, 0, 0));
}

static void a_raw_node_below_an_image_is_nothing(void **state)
{
    make_image();
    run_life(image_write_and_die);
    run_life(image_over_raw_has_first);
}

static void die_in_the_close_of_an_image(struct life *l)
{
    open_image_in(l, false);
    CHECK(is_dirty(l, 0, 0));
    l->die_after_ns = 1;
    edge_detach(l->e[0]);
    node_unref(l->n[0]);
    CHECK(!"it ends in that close");
}

/* What is saved was recovered, and nothing has changed since: the image's times are ours all the
 * same. */
static void an_image_is_killed_while_it_is_saved(void **state)
{
    make_image();
    run_life(image_write_and_die);
    wait_ms(1500);
    run_life(die_in_the_close_of_an_image);
    run_life(image_has_first);
}

static void image_is_told_to_be_another(struct life *l)
{
    open_image_in(l, false);
    is_inconsistent(l);
    say(l->image_syncs ? "synced" : "not synced");
}

static void image_is_not_believed(struct life *l)
{
    open_image_in(l, false);
    is_inconsistent(l);
}

/* That another program has taken the bit away may be in the page cache only; once that is told, it
 * is so for ever. */
static void a_verdict_on_an_image_is_kept(void **state)
{
    char path[100];
    uint8_t before[512], after[512];

    make_image();
    run_life(image_write_and_die);
    snprintf(path, sizeof path, "%s/image.qcow2", dir);
    int fd = open(path, O_RDWR);
    assert_int_equal(pread(fd, before, sizeof before, 0), sizeof before);
    assert_true(before[88] & 0x80);
    memcpy(after, before, sizeof after);
    after[88] &= 0x7f;
    wait_ms(1500);
    assert_int_equal(pwrite(fd, after, sizeof after, 0), sizeof after);
    run_life(image_is_told_to_be_another);
    if (!was_said("synced")) /* a power loss takes it back */
        assert_int_equal(pwrite(fd, before, sizeof before, 0), sizeof before);
    close(fd);
    lose_segments();
    run_life(image_is_not_believed);
}

static void clear_and_snapshot(struct life *l)
{
    char text[600], command[300];
    struct error err = ERROR_INIT;

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    snprintf(command, sizeof command, "cd %s && qemu-img create -q -f qcow2 over.qcow2 4M", dir);
    CHECK(system(command) == 0);
    CHECK_OK(edge_set_perm(l->e[0], PERM_ALL & ~PERM_RESIZE, PERM_ALL, &err), err);
    snprintf(text, sizeof text,
             "{'driver':'qcow2','node-name':'o','backing':null,"
             "'file':{'driver':'file','filename':'%s/over.qcow2'}}",
             dir);
    (void)open_ok(l->g, text);
    snprintf(text, sizeof text,
             "[{'type':'block-dirty-bitmap-clear','data':{'node':'d0','name':'b'}},"
             "{'type':'blockdev-snapshot','data':{'node':'d0','overlay':'o'}}]");
    CLEANUP(json_putp) struct json_object *actions = parse(text);
    CHECK_OK(transaction_run(l->g, l->js, actions, NULL, &err), err);
    CHECK(node_read_only(l->n[0]));
    CHECK(generation_of(l, 0) == 2 && !is_dirty(l, 0, 0));
}

static void has_generation_two_and_is_clean(struct life *l)
{
    CHECK(generation_of(l, 0) == 2 && !is_dirty(l, 0, 0));
}

/* The disk becomes read-only, and that its bitmap is settled is to be in its tide file before.
 */
static void a_disk_is_cleared_and_left_behind_an_overlay_at_once(void **state)
{
    run_life(clear_and_snapshot);
    run_life(has_generation_two_and_is_clean);
}

static void run(const char *format)
{
    char command[500];

    snprintf(command, sizeof command, format, dir);
    CHECK(system(command) == 0);
}

/* The first disk is another one now, the node 'q'. */
static void open_q(struct life *l, const char *format)
{
    char json[600];

    snprintf(json, sizeof json, format, dir, dir);
    edge_detach(l->e[0]);
    l->n[0] = open_ok(l->g, json);
    l->e[0] = attach(&l->user[0], l->n[0], PERM_ALL, PERM_ALL);
}

#define QCOW2                                                                                      \
    "{'driver':'qcow2','node-name':'q','file':{'driver':'file','filename':'%s/image.qcow2'}}"

static void q_write_and_fail_to_save(struct life *l)
{
    run("cd %s && qemu-img create -q -f qcow2 image.qcow2 4M");
    open_q(l, QCOW2);
    add_to(l, "q");
    CHECK(write_at(l, 0, 0) == 0);
    edge_detach(l->e[0]);
    l->slow_close = true;
    l->left = 1;
    node_unref(l->n[0]);
    CHECK(l->left == 0);
}

static void q_has_first(struct life *l)
{
    open_q(l, QCOW2);
    has_witness(l, "same");
    CHECK(is_dirty(l, 0, 0));
}

/* What the driver writes after that is ours. */
static void a_save_that_fails_in_a_slow_close(void **state)
{
    run_life(q_write_and_fail_to_save);
    run_life(q_has_first);
}

static const char raw_over_qcow2[] =
    "{'driver':'raw','node-name':'q','file':{'driver':'qcow2','file':{'driver':'file',"
    "'filename':'%s/image.qcow2'}}}";

static bool over_raw; /* or over qcow2 of version 2 */

static void q2_write_and_end(struct life *l)
{
    run(over_raw ? "cd %s && qemu-img create -q -f qcow2 image.qcow2 4M"
                 : "cd %s && qemu-img create -q -f qcow2 -o compat=0.10 image.qcow2 4M");
    open_q(l, over_raw ? raw_over_qcow2 : QCOW2);
    add_to(l, "q");
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 5)) == 0);
    if (l->arm & 1)
        CHECK(edge_flush(l->e[0]) == 0);
    if (l->arm & 2) {
        edge_detach(l->e[0]);
        node_unref(l->n[0]);
    }
}

static void q2_has_first(struct life *l)
{
    open_q(l, over_raw ? raw_over_qcow2 : QCOW2);
    has_witness(l, "same");
    CHECK(is_dirty(l, 0, 0));
}

static void metadata_is_ours(unsigned closed)
{
    for (unsigned i = 0; i < 4; i++) {
        over_raw = i & 2;
        run_life_with((struct life){.body = q2_write_and_end, .arm = (i & 1) | closed});
        run_life(q2_has_first);
        make_new_disks();
    }
}

/* A format that has no place for bitmaps writes its tables when it likes, and at its end. */
static void a_format_writes_its_metadata_before_a_kill(void **state)
{
    metadata_is_ours(0);
}

static void a_format_writes_its_metadata_when_it_is_closed(void **state)
{
    metadata_is_ours(2);
}

static void open_over_a_backing_image(struct life *l)
{
    run("cd %s && truncate -s 4M back && "
        "qemu-img create -q -f qcow2 -b back -F raw image.qcow2");
    open_q(l, "{'driver':'qcow2','node-name':'q','file':{'driver':'file','filename':'%s/"
              "image.qcow2'},'backing':{'driver':'raw','read-only':true,'file':{'driver':'file',"
              "'filename':'%s/back'}}}");
}

static void begin_over_a_backing_image(struct life *l)
{
    open_over_a_backing_image(l);
    if (l->arm)
        add_to(l, "q");
    else
        CHECK(edge_flush(l->e[0]) == 0);
    CHECK(l->back_syncs == 1);
    CHECK(edge_flush(l->e[0]) == 0);
    CHECK(l->back_syncs == 1); /* nobody writes to it */
}

static void flush_what_cannot_be_synced(struct life *l)
{
    l->back_error = -EROFS;
    begin_over_a_backing_image(l);
}

static void flush_what_is_lost(struct life *l)
{
    l->back_error = -EIO;
    open_over_a_backing_image(l);
    CHECK(edge_flush(l->e[0]) == -EIO);
    l->back_error = 0; /* as the kernel tells it once */
    CHECK(edge_flush(l->e[0]) == -EIO);
    CHECK(write_at(l, 0, 0) == 0);
}

/* Who wrote the backing image may have been killed. */
static void a_base_is_durable_down_to_its_backing_image(void **state)
{
    for (unsigned arm = 0; arm < 2; arm++)
        run_life_with((struct life){.body = begin_over_a_backing_image, .arm = arm});
    run_life(flush_what_cannot_be_synced);
    run_life(flush_what_is_lost);
}

static void add_on_second_and_close(struct life *l)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();

    add_bitmap_action(actions, "add", 1, "b", ",'persistent':true");
    CHECK(transact(l, actions, "add") == 0);
    CHECK(write_at(l, 1, 0) == 0);
    edge_detach(l->e[1]);
    node_unref(l->n[1]);
}

static void is_void(unsigned disk, bool yes)
{
    struct error err = ERROR_INIT;
    char path[100];
    struct tide *t;

    snprintf(path, sizeof path, "%s/%u.tide", dir, disk);
    CHECK_OK(tide_open(path, true, &t, &err), err);
    CHECK(tide_super(t)->table.n == 1);
    CHECK(tide_super(t)->table.items[0].inconsistent == yes);
    tide_close(t);
}

static void lead(struct life *l, const char *file)
{
    char json[100];
    struct error err = ERROR_INIT;

    snprintf(json, sizeof json, "[{'driver':'raw','node-name':'d0','file':'%s'}]", file);
    CLEANUP(json_putp) struct json_object *options = parse(json);
    CHECK_OK(graph_reopen(l->g, options, &err), err);
}

static void lead_to_second_and_write(struct life *l)
{
    char json[200];

    edge_detach(l->e[1]);
    node_unref(l->n[1]);
    for (unsigned i = 0; i < 2; i++) {
        snprintf(json, sizeof json, "{'driver':'file','node-name':'f%u','filename':'%s/%u'}", i,
                 dir, i);
        (void)open_ok(l->g, json);
    }
    lead(l, "f0");
    CHECK(write_at(l, 0, AT) == 0);
    is_void(1, false);
    lead(l, "f1");
    is_void(1, false);
    CHECK(write_at(l, 0, AT) == 0);
    is_void(1, true);
}

/* Whatever it was opened with. */
static void a_node_is_led_to_an_image_that_has_bitmaps(void **state)
{
    run_life(add_on_second_and_close);
    run_life(lead_to_second_and_write);
}

static void refuse_to_become_read_only(struct life *l)
{
    struct error err = ERROR_INIT;
    char text[200];

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    snprintf(text, sizeof text,
             "[{'driver':'raw','node-name':'d0','read-only':true,%s'file':'%s'}]", l->part,
             node_name(node_primary(l->n[0])->node));
    CLEANUP(json_putp) struct json_object *options = parse(text);
    l->no_statx = true; /* no witness */
    CHECK(graph_reopen(l->g, options, &err) == -EPERM);
    l->no_statx = false;
    CHECK(is_dirty(l, 0, 0) && !is_dirty(l, 0, AT));
    CHECK(write_at(l, 0, AT) == 0 && write_at(l, 0, 2 * AT) == 0);
}

/* Nobody else could write it. */
static void a_reopen_that_is_refused_asks_no_witness(void **state)
{
    static const char distrust[] = "'x-tidemark-persist':{'no-witness':'distrust'},";

    run_life_with((struct life){.body = refuse_to_become_read_only, .part = distrust});
    run_life(has_all_three);
}

static const struct CMUnitTest tests[] = {
    T(what_was_marked_before_a_disable_is_durable),
    T(a_mirror_restarts_its_successor),
    T(what_is_written_while_a_mirror_runs_is_kept),
    T(a_recovered_disk_may_be_read_only),
    T(a_resize_is_ours),
    T(a_new_size_is_durable_before_it_is_recorded),
    T(a_second_clear_while_the_first_is_pending),
    T(a_disk_is_reopened),
    T(a_disk_grows_after_a_reopen),
    T(a_disk_grows_by_a_reopen),
    T(a_disk_grows_whose_bitmaps_do_not_record),
    T(a_write_makes_a_disk_larger),
    T(what_a_reopen_changes_is_durable),
    T(what_a_reopen_changes_is_closed),
    T(another_part_does_not_get_it),
    T(segments_of_another_session_are_none),
    T(a_clear_and_an_enable_are_cut),
    T(one_that_is_added_again_is_not_the_old_one),
    T(that_others_wrote_is_told_once_and_for_all),
    T(a_session_that_could_not_end),
    T(a_new_tide_file_whose_name_is_not_durable),
    T(a_first_tide_file_whose_name_is_not_durable),
    T(a_write_while_the_tide_file_is_given_up),
    T(a_kill_with_writes_in_flight_and_then_another_writer),
    T(a_kill_in_a_long_write),
    T(a_kill_that_has_left_no_stamp),
    T(a_torn_block_of_the_ring_does_not_stay),
    T(recovery_is_told_as_it_is_now),
    T(a_backup_is_none_before_its_name_is_durable),
    T(a_clear_whose_writes_fail_though_they_are_done),
    T(a_close_after_what_could_not_be_said),
    T(what_a_device_has_lost_is_told_to_its_guest),
    T(a_mirror_whose_start_fails),
    T(what_is_read_beside_a_writer_is_not_believed),
    T(a_bitmap_is_added_after_a_change_that_failed),
    T(a_group_whose_writes_fail),
    T(a_group_whose_writes_fail_though_they_are_done),
    T(a_group_on_full_disks),
    T(a_group_fails_after_one_that_was_undone),
    T(what_changes_while_it_is_read_only_is_kept),
    T(what_grows_while_it_is_read_only_is_kept),
    T(a_disk_becomes_writable_and_larger),
    T(others_write_while_it_is_read_only),
    T(a_disk_is_not_led_to_a_part_of_its_file),
    T(a_growth_that_nobody_announced_ends_no_write),
    T(a_tide_file_is_given_up_while_it_is_written),
    T(guests_hear_of_a_sync_that_failed),
    T(a_raw_node_below_an_image_is_nothing),
    T(an_image_is_killed_while_it_is_saved),
    T(a_verdict_on_an_image_is_kept),
    T(a_disk_is_cleared_and_left_behind_an_overlay_at_once),
    T(a_save_that_fails_in_a_slow_close),
    T(a_format_writes_its_metadata_before_a_kill),
    T(a_format_writes_its_metadata_when_it_is_closed),
    T(a_base_is_durable_down_to_its_backing_image),
    T(a_node_is_led_to_an_image_that_has_bitmaps),
    T(a_reopen_that_is_refused_asks_no_witness),
};
UNIT_MAIN(tests)
