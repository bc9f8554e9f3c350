/* Objects are their options; each kind is checked here as QEMU checks it when it is made. */
#include "qmp/objects.h"

#include "base/id.h"
#include "block/throttle_group.h"
#include "rt/io.h"

#include <fcntl.h>

enum { THREAD_POOL_MAX = 64 }; /* of an iothread, unless it is told */

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

const char *objects_next(struct objects *o, const char *id)
{
    struct object *one = id ? TAILQ_NEXT(find(o, id), link) : TAILQ_FIRST(&o->list);

    return one ? one->id : NULL;
}

static const char *type_of(const struct object *one)
{
    return json_get_string(one->options, "qom-type", "");
}

const char *objects_type(struct objects *o, const char *id, const char **kept)
{
    struct object *one = find(o, id);

    if (!one)
        return NULL;
    *kept = one->id;
    return type_of(one);
}

struct json_object *objects_find(struct objects *o, const char *id, const char *type)
{
    struct object *one = find(o, id);

    if (!one || strcmp(type_of(one), type))
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
    int64_t most = json_get_int(options, "thread-pool-max", THREAD_POOL_MAX);
    if (most < 1 || json_get_int(options, "thread-pool-min", 0) > most)
        return error_set(err, EINVAL, "bad thread-pool-min/thread-pool-max values");
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
    if (!strcmp(type_of(one), "throttle-group") && throttle_group_remove(o->graph, id) == -EBUSY)
        return error_set(err, EBUSY, "object '%s' is in use, can not be deleted", id);
    object_free(o, one);
    return 0;
}

struct json_object *objects_get(struct objects *o, const char *id, const char *property)
{
    struct object *one = find(o, id);
    struct throttle_group *group = throttle_group_find(o->graph, id);

    if (strcmp(type_of(one), "throttle-group"))
        return json_copy(json_get(one->options, property));
    CLEANUP(json_putp)
    struct json_object *limits = throttle_limits_show(throttle_group_limits(group));
    if (!strcmp(property, "limits"))
        return steal(limits);
    return json_copy(json_get(limits, property + strlen("x-")));
}

static int set_limits(struct objects *o, const char *id, struct json_object *value,
                      struct error *err)
{
    struct throttle_group *group = throttle_group_find(o->graph, id);
    struct throttle_limits limits = *throttle_group_limits(group);
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    int r;

    json_add(options, "limits", json_object_get(value));
    r = throttle_limits_parse(&limits, options, err);
    if (r == 0)
        throttle_group_set_limits(group, &limits);
    return r;
}

int objects_set(struct objects *o, const char *id, const char *property, struct json_object *value,
                struct error *err)
{
    struct object *one = find(o, id);
    CLEANUP(json_putp) struct json_object *options = json_copy(one->options);
    int r = 0;

    if (!strcmp(type_of(one), "throttle-group"))
        return set_limits(o, id, value, err);
    json_add(options, property, json_copy(value));
    if (!strcmp(type_of(one), "iothread"))
        r = check_iothread(options, err);
    if (r < 0)
        return r;
    json_object_put(one->options);
    one->options = steal(options);
    return 0;
}
