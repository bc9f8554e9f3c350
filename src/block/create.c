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

static int create_file(struct graph *g, const char *filename, uint64_t size_bytes,
                       struct error *err)
{
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    const char *path = filename;

    if (!strncmp(path, "file:", 5))
        path += 5;
    else if (path_has_protocol(path))
        return error_set(err, EINVAL, "Unknown protocol '%.*s'", (int)strcspn(path, ":"), path);
    json_add_string(options, "driver", "file");
    json_add_string(options, "filename", path);
    json_add_uint(options, "size", size_bytes);
    return graph_create(g, options, err);
}

int graph_create_filename(struct graph *g, const char *filename, const char *format,
                          const char *backing_filename, const char *backing_format,
                          uint64_t size_bytes, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(g);
    const struct driver *d = graph_find_driver(g, format);
    CLEANUP(json_putp) struct json_object *options = NULL;
    CLEANUP(node_unrefp) struct node *file = NULL;
    int r;

    bool plain = !strcmp(format, "raw") || !strcmp(format, "file");
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
    if (plain)
        return create_file(g, filename, size_bytes, err);

    r = create_file(g, filename, 0, err);
    if (r < 0)
        return r;
    r = graph_open_filename(g, filename, "file", NULL, false, &file, err);
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
