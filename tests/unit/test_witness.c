/* What two looks at a file or a device say of it: each row is a story. */
#include "tideutil.h"

#include "persist/witness.h"

static struct witness device(void)
{
    return (struct witness){.kind = WITNESS_DEVICE,
                            .boot = {1},
                            .filesystem = {7},
                            .inode = 0x801,
                            .birth_ns = 5,
                            .size_bytes = 4096,
                            .counted = 1,
                            .sectors = 100};
}

static void says(const struct witness *then, const struct witness *now, enum witness_verdict clean,
                 enum witness_verdict crash, const char *reason)
{
    char why[160];

    CHECK(witness_compare_clean(then, now, why, sizeof why) == clean);
    if (clean == WITNESS_CHANGED)
        CHECK(!strcmp(why, reason));
    CHECK(witness_compare_crash(then, now, 0, 0, why, sizeof why) == crash);
    if (crash == WITNESS_CHANGED)
        CHECK(!strcmp(why, reason));
}

static void a_device_that_stays(void **state)
{
    struct witness then = device(), now = device();

    says(&then, &now, WITNESS_SAME, WITNESS_UNKNOWN, NULL);
    now.sectors++;
    says(&then, &now, WITNESS_CHANGED, WITNESS_UNKNOWN, "the device has been written to meanwhile");
    now.counted = 0;
    says(&then, &now, WITNESS_UNKNOWN, WITNESS_UNKNOWN, NULL);
    then.counted = now.counted = 0;
    now.size_bytes = 8192;
    says(&then, &now, WITNESS_CHANGED, WITNESS_UNKNOWN, "the device has another size");
}

static void a_device_that_comes_again(void **state)
{
    struct witness then = device(), now = device();

    now.birth_ns++; /* counters begin anew, and may be where they were */
    says(&then, &now, WITNESS_UNKNOWN, WITNESS_UNKNOWN, NULL);
    now = device();
    now.inode++;
    says(&then, &now, WITNESS_UNKNOWN, WITNESS_UNKNOWN, NULL);
    now.filesystem[0]++;
    says(&then, &now, WITNESS_CHANGED, WITNESS_CHANGED, "the image is another device");
}

static void a_device_without_a_name(void **state)
{
    struct witness then = device(), now = device();

    then.filesystem[0] = 0;
    says(&then, &now, WITNESS_SAME, WITNESS_UNKNOWN, NULL);
    now.birth_ns++;
    says(&then, &now, WITNESS_CHANGED, WITNESS_CHANGED,
         "the device may be another: it has gone and come again");
    now.boot[0]++;
    says(&then, &now, WITNESS_UNKNOWN, WITNESS_UNKNOWN, NULL);
}

static void a_device_after_another_boot(void **state)
{
    struct witness then = device(), now = device();

    now.boot[0]++;
    now.sectors = 3;
    now.inode++;
    now.birth_ns = 1;
    says(&then, &now, WITNESS_UNKNOWN, WITNESS_UNKNOWN, NULL);
    now.filesystem[3]++;
    says(&then, &now, WITNESS_CHANGED, WITNESS_CHANGED, "the image is another device");
}

static void a_file_where_a_device_was(void **state)
{
    struct witness then = device(), now = {.kind = WITNESS_FILE};

    says(&then, &now, WITNESS_CHANGED, WITNESS_CHANGED, "the image is of another kind now");
    then = now = (struct witness){.kind = WITNESS_NONE};
    says(&then, &now, WITNESS_UNKNOWN, WITNESS_UNKNOWN, NULL);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_device_that_stays),       cmocka_unit_test(a_device_that_comes_again),
    cmocka_unit_test(a_device_without_a_name),   cmocka_unit_test(a_device_after_another_boot),
    cmocka_unit_test(a_file_where_a_device_was),
};

UNIT_MAIN(tests)
