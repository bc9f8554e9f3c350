/* Opening: from options or a file name to a node with its children.
 *
 * A node that has a `file` child gets it first; then the generic options are checked, the
 * node gets its name, the driver opens, the backing image is opened, and the hooks of later rooms
 * see it. Children that the node opens for itself inherit what they do not set; nodes
 * that are referred to by name stay as they are. If anything fails, all of it goes again. */

#include "block/internal.h"

#include "base/log.h"
#include "rt/io.h"

/* An image whose backing image is being opened; a loop comes back to one of them. */
struct opening {
    struct opening *outer;
    bool known;
    dev_t dev;
    ino_t ino;
};

/* ---- generic options ---- */

int generic_options_parse(struct json_object *options, const struct node *parent, unsigned role,
                          struct generic_options *ret, struct error *err)
{
    struct json_object *cache = json_get(options, "cache");
    bool cow = role & ROLE_COW;
    const char *s;

    if (cache && !json_object_is_type(cache, json_type_object))
        return error_set(err, EINVAL, "Invalid parameter type for 'cache', expected: object");

    ret->direct = json_get_bool(cache, "direct", parent && parent->cache_direct);
    ret->no_flush = json_get_bool(cache, "no-flush", parent && parent->cache_no_flush);
    ret->force_share = json_get_bool(options, "force-share", parent && parent->force_share);
    /* Backing images are read-only unless somebody says otherwise. */
    ret->read_only = json_get_bool(options, "read-only", parent && (cow || parent->read_only));
    ret->auto_read_only =
        json_get_bool(options, "auto-read-only", parent && !cow && parent->auto_read_only);

    s = json_get_string(options, "discard", parent ? "unmap" : "ignore");
    if (!strcmp(s, "unmap") || !strcmp(s, "on"))
        ret->discard_unmap = true;
    else if (!strcmp(s, "ignore") || !strcmp(s, "off"))
        ret->discard_unmap = false;
    else
        return error_set(err, EINVAL, "Invalid discard option");

    s = json_get_string(options, "detect-zeroes", "off");
    if (!strcmp(s, "off"))
        ret->detect_zeroes = DETECT_ZEROES_OFF;
    else if (!strcmp(s, "on"))
        ret->detect_zeroes = DETECT_ZEROES_ON;
    else if (!strcmp(s, "unmap"))
        ret->detect_zeroes = DETECT_ZEROES_UNMAP;
    else
        return error_set(err, EINVAL, "invalid parameter value: %s", s);
    return 0;
}

static int check_generic_options(const struct generic_options *o, struct error *err)
{
    if (o->force_share && !o->read_only)
        return error_set(err, EINVAL, "force-share=on can only be used with read-only images");
    if (o->detect_zeroes == DETECT_ZEROES_UNMAP && !o->discard_unmap)
        return error_set(err, EINVAL,
                         "setting detect-zeroes to unmap is not allowed without setting discard "
                         "operation to unmap");
    return 0;
}

static const char *const generic_names[] = {
    "driver",      "node-name",     "cache",   "read-only",          "auto-read-only",
    "force-share", "detect-zeroes", "discard", "x-tidemark-persist", NULL};

static bool is_listed(const char *const *names, const char *name)
{
    for (; names && *names; names++)
        if (!strcmp(*names, name))
            return true;
    return false;
}

static bool is_child_key(const struct node *n, const char *key)
{
    const struct edge *e;

    TAILQ_FOREACH (e, &n->children, in_children)
        if (!strcmp(e->name, key))
            return true;
    return false;
}

static int check_unknown_options(const struct node *n, struct json_object *options,
                                 struct error *err)
{
    if (!n->driver->known_options)
        return 0;
    json_object_object_foreach(options, key, value)
    {
        (void)value;
        if (is_child_key(n, key) || is_listed(n->driver->known_options, key))
            continue;
        if (n->driver->protocol)
            return error_set(err, EINVAL, "Block protocol '%s' doesn't support the option '%s'",
                             n->driver->name, key);
        return error_set(err, EINVAL, "Block format '%s' does not support the option '%s'",
                         n->driver->name, key);
    }
    return 0;
}

int option_check_size(struct json_object *options, const char *name, struct error *err)
{
    struct json_object *v = json_get(options, name);

    if (v && json_object_is_type(v, json_type_int) && json_object_get_int64(v) < 0)
        return error_set(err, EINVAL, "Parameter '%s' expects a non-negative number below 2^64",
                         name);
    return 0;
}

int node_apply_auto_read_only(struct node *n, const char *text, struct error *err)
{
    if (n->read_only)
        return 0;
    if (!n->auto_read_only)
        return error_set(err, EACCES, "%s", text ? text : "Image is read-only");
    n->read_only = true;
    return 0;
}

/* ---- drivers by name, protocol, content ---- */

int find_protocol(struct graph *g, const char *filename, bool prefix_allowed,
                  const struct driver **ret, struct error *err)
{
    struct stat st;

    /* A path with a colon in it may be a device all the same. */
    if (io_stat(filename, &st) == 0 && (S_ISBLK(st.st_mode) || S_ISCHR(st.st_mode))) {
        *ret = graph_find_driver(g, "host_device");
        return 0;
    }
    if (!prefix_allowed || !path_has_protocol(filename)) {
        *ret = graph_find_driver(g, "file");
        return 0;
    }
    size_t n = strcspn(filename, ":");
    CLEANUP(memory_freep) char *protocol = xasprintf("%.*s", (int)n, filename);
    for (size_t i = 0; i < g->n_drivers; i++) {
        const struct driver *d = g->drivers[i];
        if (d->protocol &&
            (!strcmp(d->protocol, protocol) || is_listed(d->more_protocols, protocol))) {
            *ret = d;
            return 0;
        }
    }
    return error_set(err, EINVAL, "Unknown protocol '%.*s'", (int)n, filename);
}

const char *path_of(const struct driver *d, const char *filename)
{
    size_t n = strlen(d->protocol);

    return !strncmp(filename, d->protocol, n) && filename[n] == ':' ? filename + n + 1 : filename;
}

static int probe_format(struct node *file, const struct driver **ret, struct error *err)
{
    static const struct user_ops nobody = {0};
    struct graph *g = file->graph;
    struct user user = {&nobody};
    uint8_t buf[PROBE_BYTES] = {0};
    const struct driver *best = graph_find_driver(g, "raw");
    struct edge *e;
    int best_score = 0, r;

    if (file->size_bytes) {
        r = edge_attach_user(&user, file, "root", 0, PERM_ALL, &e, err);
        if (r < 0)
            return r;
        r = edge_read(e, range_make(0, min_u64(sizeof buf, file->size_bytes)), buf, 0);
        edge_detach(e);
        if (r < 0)
            return error_set_errno(err, -r, "Could not read image for determining its format");
        for (size_t i = 0; i < g->n_drivers; i++) {
            int score = g->drivers[i]->probe ? g->drivers[i]->probe(buf, sizeof buf) : 0;
            if (score > best_score) {
                best_score = score;
                best = g->drivers[i];
            }
        }
    }
    *ret = best;
    return 0;
}

/* ---- children ---- */

static int find_reference(struct graph *g, const char *name, struct node **ret, struct error *err)
{
    struct node *n = graph_find(g, name);

    if (!n)
        return error_set(err, ENODEV, "Cannot find device='%s' nor node-name='%s'", name, name);
    *ret = node_ref(n);
    return 0;
}

/* The node that OPTIONS[KEY] names or describes, or FILENAME; *ret NULL when there is none. */
static int open_child_node(struct graph *g, struct node *parent, const char *filename,
                           struct json_object *options, const char *key, unsigned role,
                           struct node **ret, struct error *err)
{
    struct json_object *value = json_get(options, key);

    *ret = NULL;
    if (value && json_object_is_type(value, json_type_string)) {
        if (filename)
            return error_set(err, EINVAL,
                             "Cannot reference an existing block device with additional options "
                             "or a new filename");
        return find_reference(g, json_object_get_string(value), ret, err);
    }
    if (value && !json_object_is_type(value, json_type_object))
        return error_set(err, EINVAL, "Invalid parameter type for '%s', expected: BlockdevRef",
                         key);
    if (!value && !filename)
        return 0;
    return open_inherit(g, filename, value, parent, key, role, ret, err);
}

int node_open_child(struct node *n, struct json_object *options, const char *key, unsigned role,
                    bool required, struct edge **ret, struct error *err)
{
    CLEANUP(node_unrefp) struct node *child = NULL;
    int r = open_child_node(n->graph, n, NULL, options, key, role, &child, err);

    *ret = NULL;
    if (r < 0)
        return r;
    if (!child) {
        if (required)
            return error_set(err, EINVAL, "A block device must be specified for \"%s\"", key);
        return 0;
    }
    return node_attach_child(n, child, key, role, ret, err);
}

/* Is FILENAME one of the images whose backing images are being opened right now? */
static int check_loop(struct node *n, const char *filename, struct opening *self, struct error *err)
{
    struct edge *e;
    struct node *file = n;
    struct stat st;

    while ((e = node_primary(file)))
        file = e->node;
    if (file->filename[0] && io_stat(file->filename, &st) == 0) {
        self->known = true;
        self->dev = st.st_dev;
        self->ino = st.st_ino;
    }
    if (!filename)
        return 0;
    filename = path_of(&driver_file, path_of(&driver_host_device, filename));
    if (io_stat(filename, &st) < 0)
        return 0;
    for (const struct opening *o = self; o; o = o->outer)
        if (o->known && o->dev == st.st_dev && o->ino == st.st_ino)
            return error_set(err, ELOOP, "Backing file '%s' of '%s' would create a loop", filename,
                             file->filename);
    return 0;
}

static int open_backing(struct node *n, struct json_object *options, struct error *err)
{
    struct graph *g = n->graph;
    struct opening self = {.outer = g->opening};
    const char *recorded = NULL, *format = NULL;
    CLEANUP(memory_freep) char *filename = NULL;
    CLEANUP(node_unrefp) struct node *backing = NULL;
    CLEANUP(json_putp) struct json_object *sub = NULL;
    int r;

    if (json_get(options, "backing")) {
        if (!n->driver->supports_backing)
            return error_set(err, EINVAL, "Driver doesn't support backing files");
    } else {
        if (!n->driver->supports_backing || !n->driver->image_backing ||
            !n->driver->image_backing(n, &recorded, &format) || !recorded || !recorded[0])
            return 0;
        if (!strncmp(recorded, "json:", 5))
            filename = xstrdup(recorded);
        else
            filename = node_absolute_filename(n, recorded, err);
        if (!filename)
            return -EINVAL;
        sub = json_object_new_object();
        if (format && format[0])
            json_add_string(sub, "driver", format);
    }

    r = check_loop(n, filename, &self, err);
    if (r == 0) {
        g->opening = &self;
        if (filename)
            r = open_inherit(g, filename, sub, n, "backing", ROLE_COW, &backing, err);
        else
            r = open_child_node(g, n, NULL, options, "backing", ROLE_COW, &backing, err);
        g->opening = self.outer;
    }
    if (r < 0) {
        /* Once a layer; in a long chain not so often that the cause would be cut off. */
        if (err && strlen(err->text) > ERROR_TEXT_MAX / 2)
            return r;
        return error_wrap(err, "Could not open backing file");
    }
    return node_attach_child(n, backing, "backing", ROLE_COW, NULL, err);
}

int node_open_backing(struct node *n, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(n->graph);
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    if (n->backing)
        return 0;
    int r = open_backing(n, options, err);
    if (r == 0 && n->backing)
        json_add_string(n->options, "backing", n->backing->node->name);
    return r;
}

/* ---- one node ---- */

/* FILENAME and a guess become options: returns the driver, or NULL in *RET to be probed. */
static int fill_options(struct graph *g, struct json_object *options, const char *filename,
                        bool protocol, const struct driver **ret, struct error *err)
{
    const char *name = json_get_string(options, "driver", NULL);
    const struct driver *d = NULL;
    bool parse = false;
    int r;

    if (name) {
        d = graph_find_driver(g, name);
        if (!d)
            return error_set(err, ENOENT, "Unknown driver '%s'", name);
        protocol = d->protocol;
    }
    if (protocol && filename) {
        if (json_has(options, "filename"))
            return error_set(err, EINVAL,
                             "Can't specify 'file' and 'filename' options at the same time");
        json_add_string(options, "filename", filename);
        parse = true;
    }
    if (!d && protocol) {
        filename = json_get_string(options, "filename", NULL);
        if (!filename)
            return error_set(err, EINVAL, "Must specify either driver or file");
        r = find_protocol(g, filename, parse, &d, err);
        if (r < 0)
            return r;
        json_add_string(options, "driver", d->name);
    }
    if (d && d->takes_path && parse) {
        CLEANUP(memory_freep)
        char *path = xstrdup(path_of(d, json_get_string(options, "filename", "")));
        json_add_string(options, "filename", path);
    }
    if (d && parse && d->parse_filename) {
        CLEANUP(memory_freep) char *text = xstrdup(json_get_string(options, "filename", ""));
        json_object_object_del(options, "filename");
        r = d->parse_filename(text, options, err);
        if (r < 0)
            return r;
    }
    *ret = d;
    return 0;
}

static void merge_limits(struct node *n)
{
    const struct edge *e;

    if (!n->limits.request_alignment)
        n->limits.request_alignment = 1;
    if (!n->limits.memory_alignment)
        n->limits.memory_alignment = 1;
    TAILQ_FOREACH (e, &n->children, in_children) {
        const struct node_limits *l = &e->node->limits;
        if (!(e->role & (ROLE_DATA | ROLE_FILTERED | ROLE_COW)))
            continue;
        if (l->max_transfer &&
            (!n->limits.max_transfer || l->max_transfer < n->limits.max_transfer))
            n->limits.max_transfer = l->max_transfer;
    }
}

static int open_driver(struct node *n, struct json_object *options, struct error *err)
{
    int r;

    n->state = xcalloc(1, n->driver->state_size + 1);
    r = n->driver->open(n, options, err);
    if (r < 0) {
        if (err && !err->code)
            (void)error_set_errno(err, -r,
                                  n->filename[0] ? "Could not open '%s'" : "Could not open image%s",
                                  n->filename);
        return r;
    }
    if (n->size_bytes > SIZE_BYTES_MAX) {
        if (n->driver->close)
            n->driver->close(n);
        return error_set_errno(err, EFBIG, "Could not refresh total sector count");
    }
    n->size_bytes = align_up(n->size_bytes, BLOCK_SECTOR);
    merge_limits(n);
    assert(is_power_of_2(n->limits.request_alignment));
    return 0;
}

static int call_hooks(struct node *n, struct error *err)
{
    struct graph_hook *hook, *undo;

    TAILQ_FOREACH (hook, &n->graph->hooks, link) {
        int r = hook->opened ? hook->opened(hook, n, err) : 0;
        if (r < 0) {
            TAILQ_FOREACH (undo, &n->graph->hooks, link) {
                if (undo == hook)
                    break;
                if (undo->closing)
                    undo->closing(undo, n);
            }
            return r;
        }
    }
    n->hooked = true;
    return 0;
}

/* The last steps, with a driver that is open. */
static int finish_open(struct node *n, struct json_object *options, bool want_backing,
                       struct error *err)
{
    int r = 0;

    if (want_backing && !n->backing)
        r = open_backing(n, options, err);
    if (r == 0)
        r = check_unknown_options(n, options, err);
    if (r == 0)
        r = call_hooks(n, err);
    return r;
}

static void take_generic_options(struct node *n, const struct generic_options *o)
{
    n->cache_direct = o->direct;
    n->cache_no_flush = o->no_flush;
    n->read_only = o->read_only;
    n->auto_read_only = o->auto_read_only;
    n->force_share = o->force_share;
    n->discard_unmap = o->discard_unmap;
    n->detect_zeroes = o->detect_zeroes;
}

static int open_node(struct graph *g, const char *filename, struct json_object *options,
                     struct node *parent, const char *key, unsigned role, struct node **ret,
                     struct error *err)
{
    CLEANUP(node_unrefp) struct node *file = NULL;
    CLEANUP(json_putp) struct json_object *name = NULL;
    const struct driver *d;
    struct generic_options generic;
    struct json_object *value;
    bool want_backing = true;
    bool protocol = parent && !(role & ROLE_COW) &&
                    (!parent->driver || parent->driver->is_format || !strcmp(key, "file") ||
                     (role & ROLE_METADATA));
    struct node *n;
    int r;

    if (filename && !strncmp(filename, "json:", 5)) {
        CLEANUP(json_putp) struct json_object *more = NULL;
        r = json_filename_parse(filename, &more, err);
        if (r < 0)
            return r;
        json_object_object_foreach(more, k, v)
        {
            if (!json_object_object_get_ex(options, k, NULL))
                json_object_object_add(options, k, json_object_get(v));
        }
        filename = NULL;
    }
    r = fill_options(g, options, filename, protocol, &d, err);
    if (r < 0)
        return r;
    r = generic_options_parse(options, parent, role, &generic, err);
    if (r < 0)
        return r;

    n = node_new(g);
    n->options = json_copy(options);
    n->inherits_from = parent;
    take_generic_options(n, &generic);

    if (json_object_object_get_ex(options, "backing", &value) &&
        (!value ||
         (json_object_is_type(value, json_type_string) && !json_object_get_string_len(value)))) {
        want_backing = false;
        json_object_object_del(options, "backing");
    }
    if (!d || !d->protocol) {
        r = open_child_node(g, n, filename, options, "file", ROLE_IMAGE, &file, err);
        if (r < 0)
            goto failed;
        if (file)
            json_add_string(options, "file", file->name);
    }
    if (!d) {
        if (!file) {
            r = error_set(err, EINVAL, "Must specify either driver or file");
            goto failed;
        }
        n->probed = true;
        r = probe_format(file, &d, err);
        if (r < 0)
            goto failed;
        json_add_string(n->options, "driver", d->name);
    }

    r = check_generic_options(&generic, err);
    if (r < 0)
        goto failed;
    if (d->takes_path && !json_get_string(options, "filename", "")[0]) {
        r = error_set(err, EINVAL, "The '%s' block driver requires a file name", d->name);
        goto failed;
    }
    value = json_get(options, "node-name");
    name = value ? json_object_get(value) : NULL;
    r = node_assign_name(n, name ? json_object_get_string(name) : NULL, err);
    if (r < 0)
        goto failed;
    for (const char *const *k = generic_names; *k; k++)
        json_object_object_del(options, *k);

    n->driver = d;
    r = open_driver(n, options, err);
    if (r < 0)
        goto failed;

    r = finish_open(n, options, want_backing, err);
    if (r < 0) {
        node_unref(n); /* closes */
        return r;
    }

    /* Children go by their names from here on. */
    struct edge *e;
    TAILQ_FOREACH (e, &n->children, in_children)
        json_add_string(n->options, e->name, e->node->name);
    *ret = n;
    return 0;

failed:
    node_discard(n);
    return r;
}

int open_inherit(struct graph *g, const char *filename, struct json_object *options,
                 struct node *parent, const char *key, unsigned role, struct node **ret,
                 struct error *err)
{
    CLEANUP(json_putp)
    struct json_object *own = options ? json_copy(options) : json_object_new_object();
    int r;

    if (g->open_depth == OPEN_DEPTH_MAX)
        return error_set(err, ELOOP, "More than %d images on top of each other", OPEN_DEPTH_MAX);
    g->open_depth++;
    r = open_node(g, filename, own, parent, key, role, ret, err);
    g->open_depth--;
    return r;
}

int graph_open(struct graph *g, struct json_object *options, struct node **ret, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(g);

    return open_inherit(g, NULL, options, NULL, "", 0, ret, err);
}

int graph_open_filename(struct graph *g, const char *filename, const char *format,
                        struct json_object *extra, bool read_only, struct node **ret,
                        struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(g);
    CLEANUP(json_putp)
    struct json_object *options = extra ? json_copy(extra) : json_object_new_object();

    if (format)
        json_add_string(options, "driver", format);
    if (!json_has(options, "read-only"))
        json_add_bool(options, "read-only", read_only);
    return open_inherit(g, filename, options, NULL, "", 0, ret, err);
}
