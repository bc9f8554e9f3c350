/* What a person will read when something failed: a code, a class for QMP, one line.
 *
 * A struct error lives on the caller's stack and owns nothing. Functions that fill one
 * return its negative errno, so `return error_set(err, EINVAL, ...)` is the whole idiom.
 * ERR may be NULL everywhere: then only the code travels. The first error wins: setting
 * one that is already set keeps the old text, so clean-up cannot hide a cause. */
#pragma once

#include "base/macros.h"

#include <errno.h>

/* QMP's error classes (QAPI `QapiErrorClass`). */
enum error_class {
    ERROR_GENERIC,
    ERROR_COMMAND_NOT_FOUND,
    ERROR_DEVICE_NOT_ACTIVE,
    ERROR_DEVICE_NOT_FOUND,
    ERROR_KVM_MISSING_CAP,
};

enum { ERROR_TEXT_MAX = 4608 }; /* the name of an export alone may take 4,096 bytes */

struct error {
    int code; /* positive errno; 0: no error */
    enum error_class class;
    char text[ERROR_TEXT_MAX]; /* cut with "..." when longer */
};

#define ERROR_INIT                                                                                 \
    {                                                                                              \
        0                                                                                          \
    }

/* Each returns -CODE. */
int error_set(struct error *err, int code, const char *fmt, ...) PRINTF(3, 4);
int error_set_class(struct error *err, enum error_class class, int code, const char *fmt, ...)
    PRINTF(4, 5);
/* "TEXT: strerror(CODE)" */
int error_set_errno(struct error *err, int code, const char *fmt, ...) PRINTF(3, 4);

/* Puts more in front: "TEXT: what was there". Returns -err->code; with ERR NULL, -EIO. */
int error_wrap(struct error *err, const char *fmt, ...) PRINTF(2, 3);

void error_clear(struct error *err);
const char *error_class_name(enum error_class class); /* "GenericError", ... */
