#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>

static void mark_if_cut(struct error *err, int length)
{
    if (length >= ERROR_TEXT_MAX)
        memcpy(err->text + ERROR_TEXT_MAX - 4, "...", 4);
}

static int set(struct error *err, enum error_class class, int code, const char *fmt, va_list ap)
{
    assert(code > 0);
    if (err && !err->code) {
        err->code = code;
        err->class = class;
        mark_if_cut(err, vsnprintf(err->text, sizeof err->text, fmt, ap));
    }
    return -code;
}

int error_set(struct error *err, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int r = set(err, ERROR_GENERIC, code, fmt, ap);
    va_end(ap);
    return r;
}

int error_set_class(struct error *err, enum error_class class, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int r = set(err, class, code, fmt, ap);
    va_end(ap);
    return r;
}

int error_set_errno(struct error *err, int code, const char *fmt, ...)
{
    if (!err || err->code)
        return -code;

    va_list ap;
    va_start(ap, fmt);
    int r = set(err, ERROR_GENERIC, code, fmt, ap);
    va_end(ap);

    size_t used = strlen(err->text);
    mark_if_cut(err, (int)used + snprintf(err->text + used, sizeof err->text - used, ": %s",
                                          strerror(code)));
    return r;
}

int error_wrap(struct error *err, const char *fmt, ...)
{
    char inner[ERROR_TEXT_MAX];

    if (!err)
        return -EIO;
    memcpy(inner, err->text, sizeof inner);

    va_list ap;
    va_start(ap, fmt);
    int used = vsnprintf(err->text, sizeof err->text, fmt, ap);
    va_end(ap);
    if (used < ERROR_TEXT_MAX)
        used += snprintf(err->text + used, sizeof err->text - (size_t)used, ": %s", inner);
    mark_if_cut(err, used);
    return -err->code;
}

void error_clear(struct error *err)
{
    err->code = 0;
    err->class = ERROR_GENERIC;
    err->text[0] = '\0';
}

const char *error_class_name(enum error_class class)
{
    static const char *const names[] = {
        [ERROR_GENERIC] = "GenericError",
        [ERROR_COMMAND_NOT_FOUND] = "CommandNotFound",
        [ERROR_DEVICE_NOT_ACTIVE] = "DeviceNotActive",
        [ERROR_DEVICE_NOT_FOUND] = "DeviceNotFound",
        [ERROR_KVM_MISSING_CAP] = "KVMMissingCap",
    };
    return names[class];
}
