/* Bitmaps of raw disks that are reopened, as another part of a file, read-only, larger, and of such
 * that grow by themselves: what is another disk, what changed unannounced, what must be durable. */
#include "faultylives.h"

#include "persist/tide.h"

#define FIRST_PART "'offset':0,'size':1048576,"
#define THIRD_PART "'offset':2097152,'size':1048576,"
#define TWO_PARTS "'offset':0,'size':2097152,"
#define ALL_OF_IT "'offset':0,"

/* Of large disks. */
#define LARGE_BYTES (64 * MiB)
#define LOW_PART "'offset':0,'size':32505856,"
#define HIGH_PART "'offset':33554432,'size':32505856,"
#define BOTH_PARTS "'offset':0,'size':65011712,"

/* ---- reopens ---- */

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

static void move_disk(struct life *l)
{
    add(l);
    reopen_part(l, false, THIRD_PART);
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

static void move_disk_and_close(struct life *l)
{
    move_disk(l);
    close_disk(l, 0);
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
    close_disk(l, 0);
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
    CHECK_TEXT(err, "Node 'd0' has, or had, persistent bitmaps, which are of the image that it was "
                    "opened with: 'file' of node 'd0' cannot become another");
}

/* It is no filter, whose disk is the same. */
static void a_disk_is_not_led_to_a_part_of_its_file(void **state)
{
    run_life_with((struct life){.body = put_a_part_between, .part = FIRST_PART});
}

static void add_on_second_and_close(struct life *l)
{
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();

    add_bitmap_action(actions, "add", 1, "b", ",'persistent':true");
    CHECK(transact(l, actions, "add") == 0);
    CHECK(write_at(l, 1, 0) == 0);
    close_disk(l, 1);
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

    close_disk(l, 1);
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

/* ---- growth ---- */

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

static void grow_by_a_reopen(struct life *l)
{
    add_fine(l);
    CHECK(write_at(l, 0, 0) == 0);
    reopen_part(l, false, ALL_OF_IT);
    CHECK(node_size(l->n[0]) == LARGE_BYTES);
    CHECK(write_at(l, 0, LARGE_BYTES - 4096) == 0);
}

static void grow_by_a_reopen_and_close(struct life *l)
{
    grow_by_a_reopen(l);
    close_disk(l, 0);
}

static void has_first_and_all_that_grew(struct life *l)
{
    CHECK(is_dirty(l, 0, 0));
    for (uint64_t at = AT; at < LARGE_BYTES; at += 512)
        CHECK(is_dirty(l, 0, at));
}

static void make_large_disks(void)
{
    remove_files("");
    make_files(LARGE_BYTES);
}

/* The areas and segments are as large as the disk was. */
static void a_disk_grows_by_a_reopen(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
        make_large_disks();
        run_life_with((struct life){.body = i & 1 ? grow_by_a_reopen_and_close : grow_by_a_reopen,
                                    .part = FIRST_PART,
                                    .no_runtime = i & 2});
        run_life(has_first_and_all_that_grew);
    }
}

static void grow_what_is_disabled(struct life *l)
{
    add_fine(l);
    CHECK(write_at(l, 0, 0) == 0);
    CHECK(act(l, 1, "disable", "") == 0);
    reopen_part(l, false, ALL_OF_IT);
    close_disk(l, 0);
}

static void a_disk_grows_whose_bitmaps_do_not_record(void **state)
{
    for (unsigned i = 0; i < 2; i++) {
        make_large_disks();
        run_life_with(
            (struct life){.body = grow_what_is_disabled, .part = FIRST_PART, .no_runtime = i});
        run_life(has_first);
    }
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

/* A file node: a write beyond its end makes it larger. */
static const char file_node[] = "{'driver':'file','node-name':'d0','filename':'%s/0'}";

static int write_last(void *arg)
{
    struct life *l = arg;
    CHECK(write_at(l, 0, LARGE_BYTES - 4096) == 0);
    return 0;
}

/* Beside N others, which use up the slots. How many of these fail. */
static unsigned grow_by_a_write(struct life *l, unsigned n)
{
    unsigned failed = 0;

    SCOPE(tasks);
    scope_spawn(&tasks, write_last, l);
    for (unsigned i = 0; i < n; i++)
        failed += write_at(l, 0, i * 65536) < 0;
    CHECK(scope_join(&tasks) == 0);
    return failed;
}

static void grow_with_slow_syncs(struct life *l)
{
    add_fine(l);
    CHECK(write_at(l, 0, 0) == 0);
    l->slow_syncs = true;
    CHECK(grow_by_a_write(l, 40) == 0);
    for (unsigned i = 0; i < 40; i++)
        CHECK(is_dirty(l, 0, i * 65536));
    CHECK(is_dirty(l, 0, LARGE_BYTES - 4096));
}

static void a_write_makes_a_disk_larger(void **state)
{
    run_life_with((struct life){.body = grow_with_slow_syncs,
                                .nodes = file_node,
                                .no_runtime = true,
                                .small_regions = true});
}

static void grow_without_room(struct life *l)
{
    add_fine(l);
    CHECK(write_at(l, 0, 0) == 0);
    l->slow_syncs = l->no_room = l->slow_tide = true;
    (void)grow_by_a_write(l, 12);
    is_inconsistent(l);
}

static void a_tide_file_is_given_up_while_it_is_written(void **state)
{
    run_life_with(
        (struct life){.body = grow_without_room, .nodes = file_node, .small_regions = true});
    run_life_with((struct life){.body = is_not_there, .nodes = file_node});
}

/* ---- what changes while a disk is read-only ---- */

static void add_fine_and_close(struct life *l)
{
    add_fine(l);
    CHECK(write_at(l, 0, 0) == 0);
    close_disk(l, 0);
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
    if (closes)
        close_disk(l, 0);
}

/* Nothing of a read-only node can be made durable: it is when the node has become writable. */
static void what_changes_while_it_is_read_only_is_kept(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
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

static const struct CMUnitTest tests[] = {
    T(a_recovered_disk_may_be_read_only),
    T(a_disk_is_reopened),
    T(a_session_that_could_not_end),
    T(what_a_reopen_changes_is_durable),
    T(what_a_reopen_changes_is_closed),
    T(another_part_does_not_get_it),
    T(a_disk_is_not_led_to_a_part_of_its_file),
    T(a_node_is_led_to_an_image_that_has_bitmaps),
    T(a_reopen_that_is_refused_asks_no_witness),
    T(a_resize_is_ours),
    T(a_new_size_is_durable_before_it_is_recorded),
    T(a_disk_grows_after_a_reopen),
    T(a_disk_grows_by_a_reopen),
    T(a_disk_grows_whose_bitmaps_do_not_record),
    T(a_growth_that_nobody_announced_ends_no_write),
    T(a_write_makes_a_disk_larger),
    T(a_tide_file_is_given_up_while_it_is_written),
    T(what_changes_while_it_is_read_only_is_kept),
    T(what_grows_while_it_is_read_only_is_kept),
    T(a_disk_becomes_writable_and_larger),
    T(others_write_while_it_is_read_only),
};
UNIT_MAIN(tests)
