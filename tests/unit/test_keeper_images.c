/* Bitmaps of nodes of which a qcow2 image is a part: in the image, in a raw node over it, over
 * a backing image, behind an overlay. */
#include "faultylives.h"

static const char qcow2[] =
    "{'driver':'qcow2','node-name':'d0','file':{'driver':'file','filename':'%s/image.qcow2'}}";
static const char qcow2_over_raw[] =
    "{'driver':'qcow2','node-name':'d0','file':{'driver':'raw','file':{'driver':'file','filename':"
    "'%s/image.qcow2'}}}";
static const char raw_over_qcow2[] =
    "{'driver':'raw','node-name':'d0','file':{'driver':'qcow2','file':{'driver':'file','filename':"
    "'%s/image.qcow2'}}}";
static const char qcow2_over_backing[] =
    "{'driver':'qcow2','node-name':'d0','file':{'driver':'file','filename':'%s/image.qcow2'},"
    "'backing':{'driver':'raw','read-only':true,'file':{'driver':'file','filename':'%s/back'}}}";

static void in_dir(const char *command)
{
    char text[300];

    snprintf(text, sizeof text, "cd %s && %s", dir, command);
    assert_int_equal(system(text), 0);
}

/* NAME and what else is to be said of it. */
static void make_image(const char *name)
{
    char command[200];

    snprintf(command, sizeof command, "qemu-img create -q -f qcow2 %s 4M", name);
    in_dir(command);
}

static void has_first_and_the_same_witness(struct life *l)
{
    has_witness(l, "same");
    has_first(l);
}

static void a_raw_node_below_an_image_is_nothing(void **state)
{
    make_image("image.qcow2");
    run_life_with((struct life){.body = write_and_die, .nodes = qcow2});
    run_life_with((struct life){.body = has_first, .nodes = qcow2_over_raw});
}

static void tells_of_a_lost_tide_file(struct life *l)
{
    CLEANUP(json_putp) struct json_object *info = persist_info(l->n[0]);

    CHECK(info && !strcmp(json_get_string(info, "state", ""), "none"));
    CHECK(!strcmp(json_get_string(info, "reason", ""),
                  "the image names a tide file, and there is none"));
    CHECK(!dirty_find(l->n[0], "b"));
}

/* Bitmaps that were never saved were nowhere else. */
static void an_image_whose_tide_file_has_gone_tells_it(void **state)
{
    make_image("image.qcow2");
    run_life_with((struct life){.body = write_and_die, .nodes = qcow2});
    in_dir("rm image.qcow2.tide");
    run_life_with((struct life){.body = tells_of_a_lost_tide_file, .nodes = qcow2});
}

static void die_in_the_close_of_an_image(struct life *l)
{
    has_first(l);
    l->die_after_ns = 1;
    close_disk(l, 0);
    CHECK(!"it ends in that close");
}

/* What is saved was recovered, and nothing has changed since: the image's times are ours all the
 * same. */
static void an_image_is_killed_while_it_is_saved(void **state)
{
    make_image("image.qcow2");
    run_life_with((struct life){.body = write_and_die, .nodes = qcow2});
    wait_ms(1500);
    run_life_with((struct life){.body = die_in_the_close_of_an_image, .nodes = qcow2});
    run_life_with((struct life){.body = has_first_and_the_same_witness, .nodes = qcow2});
}

static void image_is_told_to_be_another(struct life *l)
{
    is_inconsistent(l);
    say(l->image_syncs ? "synced" : "not synced");
}

/* That another program has taken the bit away may be in the page cache only; once that is told, it
 * is so for ever. */
static void a_verdict_on_an_image_is_kept(void **state)
{
    char path[100];
    uint8_t before[512], after[512];

    make_image("image.qcow2");
    run_life_with((struct life){.body = write_and_die, .nodes = qcow2});
    snprintf(path, sizeof path, "%s/image.qcow2", dir);
    int fd = open(path, O_RDWR);
    assert_int_equal(pread(fd, before, sizeof before, 0), sizeof before);
    assert_true(before[88] & 0x80);
    memcpy(after, before, sizeof after);
    after[88] &= 0x7f;
    wait_ms(1500);
    assert_int_equal(pwrite(fd, after, sizeof after, 0), sizeof after);
    run_life_with((struct life){.body = image_is_told_to_be_another, .nodes = qcow2});
    if (!was_said("synced")) /* a power loss takes it back */
        assert_int_equal(pwrite(fd, before, sizeof before, 0), sizeof before);
    close(fd);
    lose_segments();
    run_life_with((struct life){.body = is_inconsistent, .nodes = qcow2});
}

static void write_and_fail_to_save(struct life *l)
{
    write_and_die(l);
    edge_detach(l->e[0]);
    l->slow_close = true;
    l->left = 1;
    node_unref(l->n[0]);
    CHECK(l->left == 0);
}

/* What the driver writes after that is ours. */
static void a_save_that_fails_in_a_slow_close(void **state)
{
    make_image("image.qcow2");
    run_life_with((struct life){.body = write_and_fail_to_save, .nodes = qcow2});
    run_life_with((struct life){.body = has_first_and_the_same_witness, .nodes = qcow2});
}

static void clear_and_snapshot(struct life *l)
{
    char text[600];
    struct error err = ERROR_INIT;

    write_and_die(l);
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

/* The disk becomes read-only, and that its bitmap is settled is to be in its tide file before. */
static void a_disk_is_cleared_and_left_behind_an_overlay_at_once(void **state)
{
    make_image("over.qcow2");
    run_life(clear_and_snapshot);
    run_life(has_generation_two_and_is_clean);
}

/* ARM: a bitmap wants it, not a guest. */
static void begin_over_a_backing_image(struct life *l)
{
    if (l->arm)
        add(l);
    else
        CHECK(edge_flush(l->e[0]) == 0);
    CHECK(l->back_syncs == 1);
    CHECK(edge_flush(l->e[0]) == 0);
    CHECK(l->back_syncs == 1); /* nobody writes to it */
}

static void flush_what_is_lost(struct life *l)
{
    CHECK(edge_flush(l->e[0]) == -EIO);
    l->back_error = 0; /* as the kernel tells it once */
    CHECK(edge_flush(l->e[0]) == -EIO);
    CHECK(write_at(l, 0, 0) == 0);
}

/* Who wrote the backing image may have been killed. */
static void a_base_is_durable_down_to_its_backing_image(void **state)
{
    static const struct life lives[] = {
        {.body = begin_over_a_backing_image},
        {.body = begin_over_a_backing_image, .arm = 1},
        {.body = begin_over_a_backing_image, .back_error = -EROFS}, /* it cannot be synced */
        {.body = flush_what_is_lost, .back_error = -EIO},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(lives); i++) {
        struct life l = lives[i];
        in_dir("truncate -s 4M back");
        make_image("-b back -F raw image.qcow2");
        l.nodes = qcow2_over_backing;
        run_life_with(l);
    }
}

/* ---- formats without a place for bitmaps ---- */

/* ARM, bits: it is flushed; it is closed. */
static void write_and_end(struct life *l)
{
    write_and_die(l);
    CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 5)) == 0);
    if (l->arm & 1)
        CHECK(edge_flush(l->e[0]) == 0);
    if (l->arm & 2)
        close_disk(l, 0);
}

static void metadata_is_ours(bool closed)
{
    static const struct {
        const char *nodes, *image;
    } formats[] = {
        {qcow2, "-o compat=0.10 image.qcow2"},
        {raw_over_qcow2, "image.qcow2"},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(formats); i++)
        for (unsigned flushed = 0; flushed < 2; flushed++) {
            const char *nodes = formats[i].nodes;
            make_new_disks();
            make_image(formats[i].image);
            run_life_with((struct life){
                .body = write_and_end, .nodes = nodes, .arm = flushed | (closed ? 2 : 0)});
            run_life_with((struct life){.body = has_first_and_the_same_witness, .nodes = nodes});
        }
}

/* A format that has no place for bitmaps writes its tables when it likes, and at its end. */
static void a_format_writes_its_metadata_before_a_kill(void **state)
{
    metadata_is_ours(false);
}

static void a_format_writes_its_metadata_when_it_is_closed(void **state)
{
    metadata_is_ours(true);
}

static const struct CMUnitTest tests[] = {
    T(a_raw_node_below_an_image_is_nothing),
    T(an_image_whose_tide_file_has_gone_tells_it),
    T(an_image_is_killed_while_it_is_saved),
    T(a_verdict_on_an_image_is_kept),
    T(a_save_that_fails_in_a_slow_close),
    T(a_disk_is_cleared_and_left_behind_an_overlay_at_once),
    T(a_base_is_durable_down_to_its_backing_image),
    T(a_format_writes_its_metadata_before_a_kill),
    T(a_format_writes_its_metadata_when_it_is_closed),
};
UNIT_MAIN(tests)
