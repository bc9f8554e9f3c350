#include "base/error.h"
#include "unit.h"

static void first_error_wins(void **state)
{
    struct error err = ERROR_INIT;

    assert_int_equal(error_set(&err, EINVAL, "granularity %u", 3u), -EINVAL);
    assert_int_equal(error_set(&err, EIO, "later"), -EIO);
    assert_string_equal(err.text, "granularity 3");
    assert_int_equal(err.code, EINVAL);
}

static void wrap_puts_the_reason_behind(void **state)
{
    struct error err = ERROR_INIT;

    error_set_errno(&err, ENOENT, "opening '%s'", "x");
    assert_int_equal(error_wrap(&err, "restoring"), -ENOENT);
    assert_string_equal(err.text, "restoring: opening 'x': No such file or directory");
}

static void long_texts_are_cut_and_say_so(void **state)
{
    struct error err = ERROR_INIT;
    char name[ERROR_TEXT_MAX + 100];

    memset(name, 'a', sizeof name);
    name[sizeof name - 1] = '\0';
    error_set(&err, EINVAL, "%s", name);
    assert_int_equal(strlen(err.text), ERROR_TEXT_MAX - 1);
    assert_string_equal(err.text + ERROR_TEXT_MAX - 4, "...");
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(first_error_wins),
    cmocka_unit_test(wrap_puts_the_reason_behind),
    cmocka_unit_test(long_texts_are_cut_and_say_so),
};
UNIT_MAIN(tests)
