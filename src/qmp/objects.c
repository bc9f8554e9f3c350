/* Objects are their options; each kind is checked here as QEMU checks it when it is made. */
#include "qmp/objects.h"

#include "base/id.h"
#include "block/throttle_group.h"
#include "rt/io.h"

#include <fcntl.h>

struct object {
    char *id;
    struct json_object *options;
    TAILQ_ENTRY(object) link;
};

struct objects {
    TAILQ_HEAD(, object) list;
    struct graph *graph;
};

struct objects *objects_new(struct graph *g)
{
    struct objects *o = xnew(struct objects);
    o->graph = g;
    TAILQ_INIT(&o->list);
    return o;
}

static void object_free(struct objects *o, struct object *one)
{
    TAILQ_REMOVE(&o->list, one, link);
    json_object_put(one->options);
    free(one->id);
    free(one);
}

void objects_free(struct objects *o)
{
    while (!TAILQ_EMPTY(&o->list))
        object_free(o, TAILQ_FIRST(&o->list));
    free(o);
}

static struct object *find(struct objects *o, const char *id)
{
    struct object *one;

    TAILQ_FOREACH (one, &o->list, link)
        if (!strcmp(one->id, id))
            return one;
    return NULL;
}

struct json_object *objects_find(struct objects *o, const char *id, const char *type)
{
    struct object *one = find(o, id);

    if (!one || strcmp(json_get_string(one->options, "qom-type", ""), type))
        return NULL;
    return one->options;
}

/* An iothread's numbers are kept for its type's sake: our loop is not tuned by them. */
static int check_iothread(struct json_object *options, struct error *err)
{
    static const char *const not_negative[] = {"poll-max-ns",     "poll-grow",
                                               "poll-shrink",     "aio-max-batch",
                                               "thread-pool-min", "thread-pool-max"};

    for (size_t i = 0; i < ARRAY_SIZE(not_negative); i++)
        if (json_get_int(options, not_negative[i], 0) < 0)
            return error_set(err, EINVAL, "%s value must be in range [0, %lld]", not_negative[i],
                             (long long)INT64_MAX);
    return 0;
}

static bool is_base64(const char *s)
{
    return !s[strspn(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n")];
}

static int check_secret(struct json_object *options, struct error *err)
{
    const char *file = json_get_string(options, "file", NULL);
    bool data = json_has(options, "data");

    if (file && data)
        return error_set(err, EINVAL, "'file' and 'data' are mutually exclusive");
    if (!file && !data)
        return error_set(err, EINVAL, "Either 'file' or 'data' must be provided");
    if (json_has(options, "keyid") || json_has(options, "iv"))
        return error_set(err, ENOTSUP, "Parameter 'keyid' is not supported yet");
    if (data && !strcmp(json_get_string(options, "format", "raw"), "base64") &&
        !is_base64(json_get_string(options, "data", "")))
        return error_set(err, EINVAL, "Base64 data contains invalid characters");
    if (file) {
        int fd = io_open(file, O_RDONLY, 0);
        if (fd < 0)
            return error_set(
                err, -fd, "Unable to read %s: Failed to open file \xe2\x80\x9c%s\xe2\x80\x9d: %s",
                file, file, strerror(-fd));
        io_close(fd);
    }
    return 0;
}

int objects_add(struct objects *o, struct json_object *options, struct error *err)
{
    const char *id = json_get_string(options, "id", "");
    const char *type = json_get_string(options, "qom-type", "");
    bool is_group = !strcmp(type, "throttle-group");
    struct throttle_limits limits;
    int r = 0;

    if (!id_well_formed(id))
        return error_set(err, EINVAL, "Parameter 'id' expects an identifier");
    if (!strcmp(type, "iothread"))
        r = check_iothread(options, err);
    throttle_limits_init(&limits);
    if (is_group)
        r = throttle_limits_parse(&limits, options, err);
    if (r < 0)
        return r;
    if (find(o, id))
        return error_set(err, EEXIST,
                         "attempt to add duplicate property '%s' to object (type 'container')", id);
    if (!strcmp(type, "secret"))
        r = check_secret(options, err);
    if (is_group)
        r = throttle_group_add(o->graph, id, &limits, err);
    if (r < 0)
        return r;
    struct object *one = xnew(struct object);
    one->id = xstrdup(id);
    one->options = json_object_get(options);
    TAILQ_INSERT_TAIL(&o->list, one, link);
    return 0;
}

int objects_del(struct objects *o, const char *id, struct error *err)
{
    struct object *one = find(o, id);

    if (!one)
        return error_set(err, ENOENT, "object '%s' not found", id);
    if (!strcmp(json_get_string(one->options, "qom-type", ""), "throttle-group") &&
        throttle_group_remove(o->graph, id) == -EBUSY)
        return error_set(err, EBUSY, "object '%s' is in use, can not be deleted", id);
    object_free(o, one);
    return 0;
}
