/* Making images: blockdev-create by options, and by a file name for drive-backup. */

#include "block/internal.h"

int graph_create(struct graph *g, struct json_object *options, struct error *err)
{
    SHIELD();
    const char *name = json_get_string(options, "driver", "");
    const struct driver *d = graph_find_driver(g, name);
    int r;

    if (!d)
        return error_set(err, ENOENT, "Block driver '%s' not found or not supported", name);
    if (!d->create)
        return error_set(err, ENOTSUP, "Driver does not support blockdev-create");
    r = d->create(g, options, err);
    if (r < 0 && err && !err->code)
        (void)error_set_errno(err, -r, "Failed to create image");
    return r;
}

static int zero_first_sector(struct edge *e)
{
    return edge_write_zeroes(e, range_make(0, min_u64(BLOCK_SECTOR, node_size(e->node))), 0);
}

/* A protocol whose disks are there already: it must be large enough, and what is in it is no image
 * of a format any more. */
static int use_what_is_there(struct graph *g, const struct driver *d, const char *filename,
                             uint64_t size_bytes, struct error *err)
{
    static const struct user_ops nobody = {0};
    struct user user = {&nobody};
    CLEANUP(node_unrefp) struct node *n = NULL;
    CLEANUP(edge_detachp) struct edge *e = NULL;

    int r = graph_open_filename(g, filename, d->name, NULL, false, &n, err);
    if (r == 0)
        r = edge_attach_user(&user, n, "root", PERM_WRITE | PERM_RESIZE, PERM_ALL, &e, err);
    if (r < 0)
        return error_wrap(err,
                          "Protocol driver '%s' does not support image creation, and opening the "
                          "image failed",
                          d->name);
    r = edge_truncate(e, size_bytes, false, err);
    if (r < 0 && (r != -ENOTSUP || node_size(n) < size_bytes))
        return r;
    error_clear(err);
    r = zero_first_sector(e);
    return r < 0 ? error_set_errno(err, -r, "Failed to clear the new image's first sector") : 0;
}

static int create_file(struct graph *g, const struct driver *protocol, const char *filename,
                       uint64_t size_bytes, struct error *err)
{
    CLEANUP(json_putp) struct json_object *options = NULL;

    if (!protocol->create)
        return use_what_is_there(g, protocol, filename, size_bytes, err);
    options = json_object_new_object();
    json_add_string(options, "driver", protocol->name);
    json_add_string(options, "filename", path_of(protocol, filename));
    json_add_uint(options, "size", size_bytes);
    return graph_create(g, options, err);
}

int graph_create_filename(struct graph *g, const char *filename, const char *format,
                          const char *backing_filename, const char *backing_format,
                          uint64_t size_bytes, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(g);
    const struct driver *d = graph_find_driver(g, format), *protocol;
    CLEANUP(json_putp) struct json_object *options = NULL;
    CLEANUP(node_unrefp) struct node *file = NULL;
    int r;

    bool plain = !strcmp(format, "raw") || (d && d->takes_path);
    if (!d)
        return error_set(err, EINVAL, "Unknown file format '%s'", format);
    if (!d->create && !plain)
        return error_set(err, ENOTSUP, "Format driver '%s' does not support image creation",
                         format);
    if (backing_filename && !d->supports_backing)
        return error_set(err, EINVAL, "Backing file not supported for file format '%s'", format);
    if (backing_filename && !strcmp(backing_filename, filename))
        return error_set(err, EINVAL,
                         "Error: Trying to create an image with the same filename as the backing "
                         "file");
    r = find_protocol(g, filename, true, &protocol, err);
    if (r < 0)
        return r;
    if (plain)
        return create_file(g, d->takes_path ? d : protocol, filename, size_bytes, err);

    r = create_file(g, protocol, filename, 0, err);
    if (r < 0)
        return r;
    r = graph_open_filename(g, filename, protocol->name, NULL, false, &file, err);
    if (r < 0)
        return r;
    options = json_object_new_object();
    json_add_string(options, "driver", format);
    json_add_string(options, "file", file->name);
    json_add_uint(options, "size", size_bytes);
    if (backing_filename) {
        json_add_string(options, "backing-file", backing_filename);
        if (backing_format)
            json_add_string(options, "backing-fmt", backing_format);
    }
    return graph_create(g, options, err);
}
