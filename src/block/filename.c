/* File names: what a name means, and what name a tree of nodes has.
 *
 * A name is a path, "PROTOCOL:REST", or "json:{...}" with the options themselves. A node has a
 * plain name when opening that name again would give the same tree; otherwise its name is
 * json:{...}. Clients compare these names, so they are spelt as QEMU spells them, down to
 * the order of the members, which there is the order of a hash table. */

#include "block/internal.h"

#include "base/buffer.h"

#include <stdio.h>

enum { JSON_DEPTH_MAX = 64, JSON_DOTS_MAX = 32 };

bool path_has_protocol(const char *path)
{
    return path[strcspn(path, ":/")] == ':';
}

char *path_combine(const char *base, const char *name)
{
    const char *start = base, *slash;

    if (name[0] == '/')
        return xstrdup(name);
    if (path_has_protocol(base)) {
        start = strchr(base, ':') + 1;
        /* "nbd://host/export": the host is no directory */
        if (start[0] == '/' && start[1] == '/') {
            const char *path = strchr(start + 2, '/');
            start = path ? path : start + strlen(start);
        }
    }
    slash = strrchr(start, '/');
    return xasprintf("%.*s%s", (int)((slash ? slash + 1 : start) - base), base, name);
}

static char *node_dirname(struct node *n, struct error *err)
{
    struct edge *e;

    while ((e = node_primary(n)))
        n = e->node;
    if (n->filename[0] && !n->driver->no_directory)
        return path_combine(n->filename, "");
    (void)error_set(err, EINVAL, "Cannot generate a base directory for %s nodes",
                    n->driver->no_directory ? n->driver->no_directory : n->driver->name);
    return NULL;
}

char *node_absolute_filename(struct node *n, const char *filename, struct error *err)
{
    if (path_has_protocol(filename) || filename[0] == '/')
        return xstrdup(filename);

    CLEANUP(memory_freep) char *dir = node_dirname(n, err);
    return dir ? xasprintf("%s%s", dir, filename) : NULL;
}

/* ---- json: ---- */

/* Puts VALUE (given away) at the dotted KEY. */
static void put_dotted(struct json_object *obj, const char *key, struct json_object *value)
{
    const char *dot = strchr(key, '.');

    if (!dot) {
        json_object_object_add(obj, key, value);
        return;
    }
    CLEANUP(memory_freep) char *head = xasprintf("%.*s", (int)(dot - key), key);
    struct json_object *sub;
    if (!json_object_object_get_ex(obj, head, &sub) ||
        !json_object_is_type(sub, json_type_object)) {
        sub = json_object_new_object();
        json_object_object_add(obj, head, sub);
    }
    put_dotted(sub, dot + 1, value);
}

void json_unflatten(struct json_object *obj)
{
    bool again;

    do {
        again = false;
        json_object_object_foreach(obj, key, value)
        {
            if (strchr(key, '.')) {
                CLEANUP(memory_freep) char *name = xstrdup(key);
                struct json_object *held = json_object_get(value);
                json_object_object_del(obj, name);
                put_dotted(obj, name, held);
                again = true;
                break;
            }
            if (json_object_is_type(value, json_type_object))
                json_unflatten(value);
        }
    } while (again);
}

/* An image's header does not say which files are written for it. */
static bool has_ours(struct json_object *obj)
{
    json_object_object_foreach(obj, key, value)
    {
        if (!strcmp(key, "x-tidemark-persist") ||
            (json_object_is_type(value, json_type_object) && has_ours(value)))
            return true;
    }
    return false;
}

/* "a.a.a..." from an image's header must not become a tree of any depth. */
static bool too_deep(struct json_object *obj)
{
    json_object_object_foreach(obj, key, value)
    {
        unsigned dots = 0;
        for (const char *p = key; *p; p++)
            dots += *p == '.';
        if (dots > JSON_DOTS_MAX ||
            (json_object_is_type(value, json_type_object) && too_deep(value)))
            return true;
    }
    return false;
}

int json_filename_parse(const char *filename, struct json_object **ret, struct error *err)
{
    const char *text = filename + strlen("json:");
    size_t length = strlen(text);
    struct json_tokener *tok = json_tokener_new_ex(JSON_DEPTH_MAX);
    struct json_object *obj;
    enum json_tokener_error jerr;

    if (!tok || length > INT32_MAX) {
        if (tok)
            json_tokener_free(tok);
        return error_set(err, ENOMEM, "Could not parse the JSON options: out of memory");
    }
    obj = json_tokener_parse_ex(tok, text, (int)length + 1);
    jerr = json_tokener_get_error(tok);
    json_tokener_free(tok);
    if (jerr != json_tokener_success) {
        json_object_put(obj);
        return error_set(err, EINVAL, "Could not parse the JSON options: JSON parse error, %s",
                         json_tokener_error_desc(jerr));
    }
    if (!json_object_is_type(obj, json_type_object)) {
        json_object_put(obj);
        return error_set(err, EINVAL, "Invalid JSON object given");
    }
    if (too_deep(obj)) {
        json_object_put(obj);
        return error_set(err, EINVAL, "A name in the JSON options has more than %d dots",
                         JSON_DOTS_MAX);
    }
    json_unflatten(obj);
    if (has_ours(obj)) {
        json_object_put(obj);
        return error_set(err, EINVAL, "'x-tidemark-persist' cannot be a part of a file name");
    }
    *ret = obj;
    return 0;
}

/* ---- the name of a tree ---- */

/* The hash by which QEMU's dictionaries order their members. */
unsigned json_qemu_order(const char *key)
{
    size_t n = strlen(key);
    uint32_t v = 0x238F13AFu * (uint32_t)n;

    for (size_t i = 0; i < n; i++)
        v += (uint32_t)(unsigned char)key[i] << (i * 5 % 24);
    return (1103515243u * v + 12345u) % 512;
}

struct member {
    const char *key;
    struct json_object *value;
    unsigned bucket;
};

static int compare_members(const void *a, const void *b)
{
    const struct member *x = a, *y = b;

    return x->bucket != y->bucket ? (x->bucket < y->bucket ? -1 : 1) : strcmp(x->key, y->key);
}

static void print_json(struct buffer *out, struct json_object *v)
{
    if (json_object_is_type(v, json_type_object)) {
        size_t n = 0, capacity = (size_t)json_object_object_length(v);
        struct member *members = xcalloc(capacity + 1, sizeof *members);

        json_object_object_foreach(v, key, value) members[n++] =
            (struct member){key, value, json_qemu_order(key)};
        qsort(members, n, sizeof *members, compare_members);
        (void)buffer_append(out, "{", 1);
        for (size_t i = 0; i < n; i++) {
            struct json_object *name = json_object_new_string(members[i].key);
            if (i)
                (void)buffer_append(out, ", ", 2);
            print_json(out, name);
            (void)buffer_append(out, ": ", 2);
            print_json(out, members[i].value);
            json_object_put(name);
        }
        (void)buffer_append(out, "}", 1);
        free(members);
    } else if (json_object_is_type(v, json_type_array)) {
        (void)buffer_append(out, "[", 1);
        for (size_t i = 0; i < json_object_array_length(v); i++) {
            if (i)
                (void)buffer_append(out, ", ", 2);
            print_json(out, json_object_array_get_idx(v, i));
        }
        (void)buffer_append(out, "]", 1);
    } else {
        const char *text = json_object_to_json_string_ext(v, JSON_C_TO_STRING_NOSLASHESCAPE);
        (void)buffer_append(out, text, strlen(text));
    }
}

char *json_as_qemu(struct json_object *obj)
{
    struct buffer out = {0};
    char *text;

    print_json(&out, obj);
    text = xasprintf("%.*s", (int)out.length, (const char *)out.data);
    buffer_fini(&out);
    return text;
}

void json_add_flat(struct json_object *to, const char *key, struct json_object *value)
{
    if (json_object_is_type(value, json_type_array)) {
        for (size_t i = 0; i < json_object_array_length(value); i++) {
            CLEANUP(memory_freep) char *name = xasprintf("%s.%zu", key, i);
            json_add_flat(to, name, json_object_array_get_idx(value, i));
        }
    } else if (json_object_is_type(value, json_type_object)) {
        json_object_object_foreach(value, k, v)
        {
            CLEANUP(memory_freep) char *name = xasprintf("%s.%s", key, k);
            json_add_flat(to, name, v);
        }
    } else {
        json_object_object_add(to, key, value ? json_copy(value) : NULL);
    }
}

/* The options that change what a guest sees; true: there are others than driver and filename. */
static bool add_strong_options(struct node *n, struct json_object *to)
{
    bool any = false;

    json_add_string(to, "driver", n->driver->name);
    if (n->driver->protocol && json_has(n->options, "filename"))
        json_add_string(to, "filename", json_get_string(n->options, "filename", ""));
    for (const char *const *o = n->driver->strong_options; o && *o; o++) {
        struct json_object *v = json_get(n->options, *o);
        if (!v)
            continue;
        json_add_flat(to, *o, v);
        any = true;
    }
    return any;
}

static bool backing_overridden(struct node *n)
{
    const char *recorded = NULL, *format = NULL;

    if (!n->driver->supports_backing)
        return false;
    if (n->driver->image_backing && !n->driver->image_backing(n, &recorded, &format))
        recorded = NULL;
    if (!n->backing)
        return recorded && recorded[0];
    if (!recorded)
        return true;
    CLEANUP(memory_freep) char *full = node_absolute_filename(n, recorded, NULL);
    return !full || strcmp(full, node_filename(n->backing->node)) != 0;
}

static bool full_options(struct node *n, struct json_object *to)
{
    bool overridden = backing_overridden(n);
    bool json = add_strong_options(n, to) | overridden;
    struct edge *e;

    TAILQ_FOREACH (e, &n->children, in_children)
        if (e != n->backing || overridden)
            json_add(to, e->name, node_full_options(e->node));
    if (overridden && !n->backing)
        json_object_object_add(to, "backing", NULL);
    return json;
}

struct json_object *node_full_options(struct node *n)
{
    struct json_object *obj = json_object_new_object();

    if (n->implicit && node_filtered(n)) {
        json_object_put(obj);
        return node_full_options(node_filtered(n)->node);
    }
    (void)full_options(n, obj);
    return obj;
}

const char *node_filename(const struct node *const_n)
{
    struct node *n = (struct node *)const_n;
    struct json_object *options = json_object_new_object();
    const struct edge *primary = node_primary(n);
    char *name = NULL;

    if (n->implicit && node_filtered(n)) {
        json_object_put(options);
        return node_filename(node_filtered(n)->node);
    }
    if (n->driver->named_as_file && primary) {
        json_object_put(options);
        return node_filename(primary->node);
    }
    bool json = full_options(n, options);
    if (n->driver->protocol) {
        if (n->filename[0])
            name = xstrdup(n->filename);
    } else if (primary && primary->node->driver->protocol && primary->node->filename[0] &&
               !n->driver->is_filter && !json) {
        name = xstrdup(primary->node->filename);
    }
    if (!name) {
        CLEANUP(memory_freep) char *text = json_as_qemu(options);
        name = xasprintf("json:%s", text);
    }
    json_object_put(options);
    /* Asked for again it stays where it is, so that two names can be in one sentence. */
    if (n->full_filename && !strcmp(n->full_filename, name)) {
        free(name);
    } else {
        free(n->full_filename);
        n->full_filename = name;
    }
    return n->full_filename;
}
