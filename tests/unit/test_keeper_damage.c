/* Tide files that cannot be read in part, or not at all, and perhaps only for a while: each life
 * that finds one is ended at each of its operations, and the next one, which can read all of it,
 * must not believe what misses a write. */
#include "faultylives.h"

#include "persist/super.h"

enum { REGION = 64 << 10, REGIONS = 4 << 4 };
static const char qcow2[] =
    "{'driver':'qcow2','node-name':'d0','file':{'driver':'file','filename':'%s/image.qcow2'}}";

static void make_image(void)
{
    char command[200];

    snprintf(command, sizeof command, "qemu-img create -q -f qcow2 %s/image.qcow2 4M", dir);
    assert_int_equal(system(command), 0);
}

static void write_regions(struct life *l, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        CHECK(write_at(l, 0, (uint64_t)i * REGION) == 0);
}

static void write_some(struct life *l)
{
    add(l);
    write_regions(l, 2);
}

/* The last transaction is where the ring of the session has begun. */
static void write_all_round(struct life *l)
{
    add(l);
    write_regions(l, REGIONS);
}

static void write_last(struct life *l)
{
    CHECK(write_at(l, 0, (REGIONS - 1) * REGION) == 0);
    say("written");
}

static void close_first(struct life *l)
{
    close_disk(l, 0);
    say("closed");
}

static void misses_nothing(struct life *l)
{
    struct dirty_bitmap *bm = dirty_find(l->n[0], "b");

    if (!bm || dirty_inconsistent(bm))
        return;
    CHECK(is_dirty(l, 0, 0) && is_dirty(l, 0, REGION));
    CHECK(!was_said("written") || is_dirty(l, 0, (REGIONS - 1) * REGION));
}

static void misses_nothing_of_all(struct life *l)
{
    say("written");
    misses_nothing(l);
}

/* One place of a raw disk's tide file or of an image's cannot be read in the second life; KILLED:
 * nor has the power gone before it, so that segments tell what there was. */
struct damage {
    void (*first)(struct life *), (*last)(struct life *);
    uint64_t at, bytes;
    bool killed;
};

static void damaged_of(const struct damage *d, void (*body)(struct life *), const char *nodes)
{
    bool whole = false;

    for (unsigned n = 1; !whole; n++) {
        make_new_disks();
        if (nodes)
            make_image();
        run_life_with((struct life){.body = d->first, .nodes = nodes, .small_regions = true});
        if (!d->killed)
            lose_segments();
        run_life_with((struct life){.body = body,
                                    .nodes = nodes,
                                    .small_regions = true,
                                    .unread_at = d->at,
                                    .unread_bytes = d->bytes,
                                    .ends_at = n});
        whole = was_said(body == write_last ? "written" : "closed");
        lose_segments();
        run_life_with((struct life){.body = d->last, .nodes = nodes, .small_regions = true});
    }
}

static void damaged(struct damage d)
{
    for (unsigned killed = 0; killed < 2; killed++) {
        d.killed = killed;
        damaged_of(&d, write_last, NULL);
        damaged_of(&d, write_last, qcow2);
        damaged_of(&d, close_first, NULL);
        damaged_of(&d, close_first, qcow2);
    }
}

static void a_superblock_that_cannot_be_read(void **state)
{
    for (unsigned slot = 0; slot < 2; slot++)
        damaged((struct damage){write_some, misses_nothing, slot * TIDE_SUPER_BYTES, 512});
}

static void no_superblock_can_be_read(void **state)
{
    damaged((struct damage){write_some, misses_nothing, 0, 2 * TIDE_SUPER_BYTES});
}

static void the_newest_transaction_cannot_be_read(void **state)
{
    const uint64_t last = 1 + REGIONS; /* as the first is 1, and makes none hot */

    damaged((struct damage){write_all_round, misses_nothing_of_all,
                            TIDE_RING_OFFSET + last % TIDE_RING_BLOCKS * RING_BLOCK, RING_BLOCK});
}

/* Nor by who cannot read it. */
static void a_ring_without_its_newest_transaction_is_not_believed(void **state)
{
    const uint64_t last = 1 + REGIONS;

    make_new_disks();
    run_life_with((struct life){.body = write_all_round, .small_regions = true});
    lose_segments();
    run_life_with(
        (struct life){.body = misses_nothing_of_all,
                      .small_regions = true,
                      .unread_at = TIDE_RING_OFFSET + last % TIDE_RING_BLOCKS * RING_BLOCK,
                      .unread_bytes = RING_BLOCK});
}

static const struct CMUnitTest tests[] = {
    T(a_superblock_that_cannot_be_read),
    T(no_superblock_can_be_read),
    T(the_newest_transaction_cannot_be_read),
    T(a_ring_without_its_newest_transaction_is_not_believed),
};
UNIT_MAIN(tests)
