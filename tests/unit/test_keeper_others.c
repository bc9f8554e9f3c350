/* What others have done to a raw disk, or to what is kept of its bitmaps, while no life was there
 * or beside one: whose writes they were is known by the witness, and what cannot be believed is
 * told. */
#include "faultylives.h"

/* ---- what others write after a kill ---- */

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

static void close_first(struct life *l)
{
    CHECK(is_dirty(l, 0, 0));
    close_disk(l, 0);
}

/* What recovery has found is closed without segments, or nothing would tell of other writers before
 * the next open. (sim --persist --seed 240007401) */
static void a_close_where_tmpfs_is_full(void **state)
{
    for (int others = 0; others < 2; others++) {
        make_new_disks();
        run_life(write_and_die);
        lose_segments();
        run_life_with((struct life){.body = close_first, .no_segments = true});
        usleep(100000);
        if (others)
            write_as_another();
        run_life(others ? is_inconsistent : has_first);
    }
}

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

/* ---- what is there that is not of this session ---- */

static void write_copy_and_close(struct life *l)
{
    char command[200];

    add(l);
    CHECK(write_at(l, 0, 0) == 0);
    snprintf(command, sizeof command, "cd %s && mkdir -p saved && cp -p run-* saved/", dir);
    CHECK(system(command) == 0);
    close_disk(l, 0);
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

/* ---- what guests are told ---- */

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

static const struct CMUnitTest tests[] = {
    T(that_others_wrote_is_told_once_and_for_all),
    T(a_close_where_tmpfs_is_full),
    T(a_kill_with_writes_in_flight_and_then_another_writer),
    T(a_kill_in_a_long_write),
    T(a_kill_that_has_left_no_stamp),
    T(segments_of_another_session_are_none),
    T(what_is_read_beside_a_writer_is_not_believed),
    T(recovery_is_told_as_it_is_now),
    T(what_a_device_has_lost_is_told_to_its_guest),
    T(guests_hear_of_a_sync_that_failed),
};
UNIT_MAIN(tests)
