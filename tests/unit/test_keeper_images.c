/* Bitmaps of nodes of which a qcow2 image is a part: in the image, in a raw node over it, over
 * a backing image, behind an overlay. */
#include "faultylives.h"

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

static bool over_raw; /* or over qcow2 of version 2 */

static void image_has_first(struct life *l)
{
    open_image_in(l, false);
    has_witness(l, "same");
    CHECK(is_dirty(l, 0, 0));
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

/* ---- formats without a place for bitmaps ---- */

static const char raw_over_qcow2[] =
    "{'driver':'raw','node-name':'q','file':{'driver':'qcow2','file':{'driver':'file',"
    "'filename':'%s/image.qcow2'}}}";

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

static const struct CMUnitTest tests[] = {
    T(a_raw_node_below_an_image_is_nothing),
    T(an_image_is_killed_while_it_is_saved),
    T(a_verdict_on_an_image_is_kept),
    T(a_save_that_fails_in_a_slow_close),
    T(a_disk_is_cleared_and_left_behind_an_overlay_at_once),
    T(a_base_is_durable_down_to_its_backing_image),
    T(a_format_writes_its_metadata_before_a_kill),
    T(a_format_writes_its_metadata_when_it_is_closed),
};
UNIT_MAIN(tests)
