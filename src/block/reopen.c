/* blockdev-reopen: other options for nodes that are in use. All nodes or none.
 *
 *   collect    the named nodes, and the children that they opened for themselves
 *   quiesce    all of them; flush
 *   prepare    each node: what can change is checked, the driver makes a plan
 *   children   `backing` and `file` are led elsewhere
 *   perms      are worked out for what the nodes will be; the file driver opens and locks here
 *   commit     cannot fail
 *
 * An option that is not given goes back to its default, except where that is not possible:
 * then it must be given, and be what it was. */

#include "block/internal.h"

struct entry {
    TAILQ_ENTRY(entry) link;
    struct node *n;
    struct json_object *options; /* as given, or kept */
    struct generic_options generic;
    struct node_reopen will_be;
    bool keep; /* what is not given stays */
    bool prepared, told_hooks;
    void *plan;
    struct child_change {
        bool wanted;
        struct edge *edge; /* of the child; NULL: there was none */
        struct node *from, *to;
        bool done;
    } backing, file;
};
TAILQ_HEAD(entries, entry);

/* ---- collecting ---- */

static void merge(struct json_object *to, struct json_object *from)
{
    json_object_object_foreach(from, key, value)
    {
        if (!json_object_object_get_ex(to, key, NULL))
            json_object_object_add(to, key, json_copy(value));
    }
}

/* The node's own options, without the names of its children. */
static struct json_object *own_options(const struct node *n)
{
    struct json_object *own = json_copy(n->options);
    const struct edge *e;

    TAILQ_FOREACH (e, &n->children, in_children)
        json_object_object_del(own, e->name);
    return own;
}

static void parse_generic(struct entry *en, const struct entry *parent, unsigned role)
{
    /* The parent as it will be, to inherit from. */
    struct node as_parent = {0};

    if (parent) {
        as_parent.cache_direct = parent->generic.direct;
        as_parent.cache_no_flush = parent->generic.no_flush;
        as_parent.force_share = parent->generic.force_share;
        as_parent.read_only = parent->generic.read_only;
        as_parent.auto_read_only = parent->generic.auto_read_only;
    }
    (void)generic_options_parse(en->options, parent ? &as_parent : NULL, role, &en->generic, NULL);
    if (!json_has(en->options, "discard"))
        en->generic.discard_unmap = en->n->discard_unmap;
    en->will_be =
        (struct node_reopen){en->generic.read_only, en->generic.auto_read_only, en->generic.direct};
}

static int collect(struct entries *all, struct node *n, struct json_object *options, bool keep,
                   const struct entry *parent, unsigned role, struct error *err)
{
    struct entry *en;
    struct edge *e;
    int r;

    TAILQ_FOREACH (en, all, link)
        if (en->n == n)
            break;
    if (!en) {
        en = xnew(struct entry);
        en->n = node_ref(n);
        en->keep = keep;
        en->options = options ? json_copy(options) : json_object_new_object();
        TAILQ_INSERT_TAIL(all, en, link);
        if (keep) {
            CLEANUP(json_putp) struct json_object *own = own_options(n);
            merge(en->options, own);
        }
    } else if (options) {
        CLEANUP(json_putp) struct json_object *old = steal(en->options);
        en->options = json_copy(options);
        merge(en->options, old);
        en->keep = en->keep && keep;
    }
    struct generic_options checked;
    r = generic_options_parse(en->options, NULL, role, &checked, err);
    if (r < 0)
        return r;
    parse_generic(en, parent, role);

    TAILQ_FOREACH (e, &n->children, in_children) {
        struct json_object *value = NULL;
        bool child_keep = keep;

        if (e->node->inherits_from != n)
            continue;
        if (json_object_object_get_ex(en->options, e->name, &value)) {
            if (json_object_is_type(value, json_type_object)) {
                ;
            } else if (json_object_is_type(value, json_type_string) &&
                       !strcmp(json_object_get_string(value), e->node->name)) {
                value = NULL;
                child_keep = true;
            } else {
                continue; /* it will be another, or none */
            }
        }
        r = collect(all, e->node, value, child_keep, en, e->role, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int collect_named(struct graph *g, struct entries *all, struct json_object *options,
                         struct error *err)
{
    const char *name = json_get_string(options, "node-name", NULL);
    struct node *n;

    if (!name)
        return error_set(err, EINVAL, "node-name not specified");
    n = graph_find(g, name);
    if (!n)
        return error_set(err, ENOENT, "Failed to find node with node-name='%s'", name);
    return collect(all, n, options, false, NULL, 0, err);
}

/* ---- preparing ---- */

static bool is_listed(const char *const *names, const char *name)
{
    for (; names && *names; names++)
        if (!strcmp(*names, name))
            return true;
    return false;
}

static const char *const always_reset[] = {"node-name",      "discard",       "cache", "read-only",
                                           "auto-read-only", "detect-zeroes", NULL};

/* Of several options that are wrong, the one that QEMU names: the first of its hash table. */
static void note_first(const char *key, char **first)
{
    if (*first && json_qemu_order(*first) <= json_qemu_order(key))
        return;
    free(*first);
    *first = xstrdup(key);
}

/* Of the option KEY, a list perhaps, what was there and is not given now. */
static void note_gone(const char *key, struct json_object *was, struct json_object *now,
                      char **first)
{
    CLEANUP(json_putp) struct json_object *before = json_object_new_object();
    CLEANUP(json_putp) struct json_object *after = json_object_new_object();

    json_add_flat(before, key, was);
    if (now)
        json_add_flat(after, key, now);
    json_object_object_foreach(before, name, value)
    {
        (void)value;
        if (!json_object_object_get_ex(after, name, NULL))
            note_first(name, first);
    }
}

/* What is given and was not, or was something else. */
static void note_changed(const char *key, struct json_object *was, struct json_object *now,
                         char **first)
{
    CLEANUP(json_putp) struct json_object *before = json_object_new_object();
    CLEANUP(json_putp) struct json_object *after = json_object_new_object();

    if (was)
        json_add_flat(before, key, was);
    json_add_flat(after, key, now);
    json_object_object_foreach(after, name, value)
    {
        struct json_object *old = json_get(before, name);
        if (!old || !json_object_equal(old, value))
            note_first(name, first);
    }
}

static int check_resets(const struct entry *en, struct error *err)
{
    CLEANUP(json_putp) struct json_object *own = own_options(en->n);
    CLEANUP(memory_freep) char *first = NULL;

    json_object_object_foreach(own, key, value)
    {
        if (is_listed(always_reset, key) || is_listed(en->n->driver->mutable_options, key) ||
            !strcmp(key, "backing"))
            continue;
        note_gone(key, value, json_get(en->options, key), &first);
    }
    return first ? error_set(err, EINVAL, "Option '%s' cannot be reset to its default value", first)
                 : 0;
}

/* Options for a child that is not ours to change. */
static void note_members(const char *child, struct json_object *options, char **first)
{
    json_object_object_foreach(options, key, value)
    {
        (void)value;
        CLEANUP(memory_freep) char *dotted = xasprintf("%s.%s", child, key);
        note_first(dotted, first);
    }
}

static int check_unchanged(const struct entry *en, struct error *err)
{
    CLEANUP(memory_freep) char *first = NULL;
    struct node *n = en->n;

    json_object_object_foreach(en->options, key, value)
    {
        struct json_object *old = json_get(n->options, key);
        bool object = json_object_is_type(value, json_type_object);
        const struct edge *e;

        if ((is_listed(always_reset, key) && strcmp(key, "node-name")) ||
            is_listed(n->driver->mutable_options, key))
            continue;
        if (!strcmp(key, "node-name") && json_object_is_type(value, json_type_string) &&
            !strcmp(json_object_get_string(value), n->name))
            continue;
        TAILQ_FOREACH (e, &n->children, in_children)
            if (!strcmp(e->name, key))
                break;
        if (object && (e || !strcmp(key, "backing") || !strcmp(key, "file"))) {
            if (!e || e->node->inherits_from != n)
                note_members(key, value, &first);
            continue;
        }
        if (!strcmp(key, "backing") || !strcmp(key, "file") ||
            (e && json_object_is_type(value, json_type_string) &&
             !strcmp(json_object_get_string(value), e->node->name)))
            continue;
        if (!old || !json_object_equal(old, value))
            note_changed(key, old, value, &first);
    }
    return first ? error_set(err, EINVAL, "Cannot change the option '%s'", first) : 0;
}

/* Does the option KEY lead the child elsewhere? */
static int plan_child(struct entry *en, const char *key, struct edge *edge,
                      struct child_change *change, struct error *err)
{
    struct node *n = en->n, *to = NULL, *from = edge ? edge->node : NULL;
    struct json_object *value;

    if (!json_object_object_get_ex(en->options, key, &value) ||
        json_object_is_type(value, json_type_object))
        return 0;
    if (value) {
        const char *name = json_object_get_string(value);
        to = graph_find(n->graph, name);
        if (!to)
            return error_set(err, EINVAL, "Cannot find device='' nor node-name='%s'", name);
        if (node_reaches(to, n))
            return error_set(err, EINVAL, "Making '%s' a %s child of '%s' would create a cycle",
                             name, key, n->name);
    }
    if (from == to)
        return 0;
    if (from) {
        struct node *below = from;
        while (below->implicit && node_filtered(below))
            below = node_filtered(below)->node;
        if (below == to)
            return 0;
        if (from->implicit)
            return error_set(err, EPERM, "Cannot replace implicit %s child of %s", key, n->name);
        if (edge->frozen)
            return error_set(err, EPERM, "Cannot change frozen '%s' link from '%s' to '%s'", key,
                             n->name, from->name);
    } else if (n->driver->is_filter) {
        return error_set(err, EINVAL, "'%s' is a %s filter node that does not support a %s child",
                         n->name, n->driver->name, key);
    }
    if (!strcmp(key, "backing") && !n->driver->supports_backing && !n->driver->is_filter)
        return error_set(err, EINVAL, "Driver '%s' of node '%s' does not support backing files",
                         n->driver->name, n->name);
    if (!strcmp(key, "file") && !edge)
        return error_set(err, EINVAL, "Cannot set file child to format node without file child");
    if (!strcmp(key, "file") && !to)
        return error_set(err, EINVAL, "Node '%s' needs a file child", n->name);
    *change = (struct child_change){.wanted = true, .edge = edge, .from = from, .to = to};
    return 0;
}

/* Is the file another one, and not the old one with a filter more or less? */
static bool is_other_file(const struct entry *en)
{
    const struct child_change *c = &en->file;

    return c->wanted && node_skip_filters(c->to) != node_skip_filters(c->from);
}

static int check_other_file(const struct entry *en, struct error *err)
{
    const struct node *n = en->n, *keeper = filter_that_keeps(n);

    /* The driver has in memory what the old one says, and would write it to the new one. */
    if (n->file->role & ROLE_METADATA)
        return error_set(err, EINVAL, "Node '%s' cannot have its metadata in another file",
                         n->name);
    if (keeper)
        return error_set(err, EBUSY,
                         "Node '%s' keeps the disk as it was, which cannot become another",
                         keeper->name);
    return 0;
}

static int prepare(struct entry *en, struct error *err)
{
    struct node *n = en->n;
    const char *backing = NULL, *format = NULL;
    int r;

    if (en->generic.detect_zeroes == DETECT_ZEROES_UNMAP && !en->generic.discard_unmap)
        return error_set(err, EINVAL,
                         "setting detect-zeroes to unmap is not allowed without setting discard "
                         "operation to unmap");
    if (!n->driver->reopen_prepare)
        return error_set(err, ENOTSUP,
                         "Block format '%s' used by node '%s' does not support reopening files",
                         n->driver->name, n->name);
    r = check_resets(en, err);
    if (r == 0)
        r = n->driver->reopen_prepare(n, en->options, en->generic.read_only, &en->plan, err);
    if (r < 0) {
        if (err && !err->code)
            (void)error_set(err, -r, "failed while preparing to reopen image '%s'",
                            node_filename(n));
        return r;
    }
    en->prepared = true;
    if (n->driver->supports_backing && !en->keep &&
        !json_object_object_get_ex(en->options, "backing", NULL) &&
        (n->backing || (n->driver->image_backing &&
                        n->driver->image_backing(n, &backing, &format) && backing && backing[0])))
        return error_set(err, EINVAL, "backing is missing for '%s'", n->name);
    r = plan_child(en, "backing", n->backing, &en->backing, err);
    if (r == 0)
        r = plan_child(en, "file", n->file, &en->file, err);
    if (r == 0 && is_other_file(en))
        r = check_other_file(en, err);
    return r < 0 ? r : check_unchanged(en, err);
}

/* ---- children ---- */

static void apply_change(struct entry *en, struct child_change *c, const char *key)
{
    if (!c->wanted)
        return;
    if (c->to)
        node_ref(c->to);
    if (!c->edge) {
        c->edge = edge_new(en->n, NULL, c->to, key, ROLE_COW);
        node_unref(c->to); /* the edge has its own */
    } else if (c->to) {
        edge_move(c->edge, c->to);
    } else {
        edge_hide(c->edge);
    }
    c->done = true;
}

static void undo_change(struct child_change *c)
{
    if (!c->done)
        return;
    if (!c->from) {
        struct node *to = c->to;
        edge_unlink(c->edge);
        node_unref(to);
    } else if (c->to) {
        edge_move(c->edge, c->from);
        node_unref(c->to);
    } else {
        edge_show(c->edge);
    }
}

static void finish_change(struct entry *en, struct child_change *c)
{
    if (!c->done)
        return;
    if (c == &en->backing) {
        if (c->from)
            edge_unblock_backing(en->n, c->from);
        if (c->to)
            edge_block_backing(en->n, c->to);
    }
    if (c->from) {
        if (c->from->inherits_from == en->n)
            c->from->inherits_from = NULL;
        if (!c->to) {
            free(c->edge->name);
            free(c->edge);
        }
        node_unref(c->from); /* may close it */
    }
}

/* ---- all of it ---- */

static int ask_hooks(struct entry *en, struct error *err)
{
    const bool writable = en->n->read_only && !en->generic.read_only, other = is_other_file(en);
    struct graph_hook *hook;
    int r = 0;

    TAILQ_FOREACH (hook, &en->n->graph->hooks, link)
        if (r == 0 && hook->may_reopen && (writable || other))
            r = hook->may_reopen(hook, en->n, writable, other, err);
    return r;
}

/* Later rooms save while it can still be written, and load when it can be again. */
static int tell_hooks(struct entry *en, bool to_read_only, struct error *err)
{
    struct graph_hook *hook;

    TAILQ_FOREACH (hook, &en->n->graph->hooks, link) {
        int r = hook->reopening ? hook->reopening(hook, en->n, to_read_only, err) : 0;
        if (r < 0)
            return r;
    }
    return 0;
}

static int prepare_all(struct entries *all, struct error *err)
{
    struct entry *en;
    int r;

    TAILQ_FOREACH (en, all, link) {
        r = en->n->read_only ? 0 : node_flush(en->n);
        if (r < 0)
            return error_set_errno(err, -r, "Error flushing drive");
    }
    TAILQ_FOREACH (en, all, link) {
        r = prepare(en, err);
        if (r == 0)
            r = ask_hooks(en, err);
        if (r < 0)
            return r;
    }
    TAILQ_FOREACH (en, all, link) {
        if (en->n->read_only || !en->generic.read_only)
            continue;
        r = tell_hooks(en, true, err);
        if (r < 0)
            return r;
        en->told_hooks = true;
    }
    return 0;
}

static int switch_perms(struct graph *g, struct entries *all, struct perm_change *change,
                        struct error *err)
{
    struct node **roots;
    struct entry *en;
    size_t n = 0;
    int r;

    TAILQ_FOREACH (en, all, link)
        n += 3;
    roots = xcalloc(n + 1, sizeof *roots);
    n = 0;
    TAILQ_FOREACH (en, all, link) {
        en->n->reopening = &en->will_be;
        apply_change(en, &en->backing, "backing");
        apply_change(en, &en->file, "file");
        roots[n++] = en->n;
    }
    TAILQ_FOREACH (en, all, link) {
        if (en->backing.done && en->backing.from)
            roots[n++] = en->backing.from;
        if (en->file.done && en->file.from)
            roots[n++] = en->file.from;
    }
    r = perm_prepare(g, roots, n, change, err);
    free(roots);
    return r;
}

static void commit_entry(struct entry *en)
{
    struct node *n = en->n;

    if (n->driver->reopen_commit)
        n->driver->reopen_commit(n, en->plan);
    n->read_only = en->generic.read_only;
    n->auto_read_only = en->generic.auto_read_only;
    n->cache_direct = en->generic.direct;
    n->cache_no_flush = en->generic.no_flush;
    n->discard_unmap = en->generic.discard_unmap;
    n->detect_zeroes = en->generic.detect_zeroes;
}

static void remember_options(struct entry *en)
{
    struct edge *e;

    json_object_object_del(en->options, "backing");
    json_object_put(en->n->options);
    en->n->options = steal(en->options);
    TAILQ_FOREACH (e, &en->n->children, in_children)
        json_add_string(en->n->options, e->name, e->node->name);
}

/* Content that comes by a reopen was announced by no write: it counts as written. */
static void follow_content(struct node *n, uint64_t from, bool other)
{
    uint64_t to = n->size_bytes;
    struct write_observer *o;

    TAILQ_FOREACH (o, &n->observers, link)
        if (from != to && o->resized)
            o->resized(o, from, to);
    if (other)
        node_content_replaced(n);
    else if (to > from)
        node_content_changed(n, range_between(from, to));
    if (from != to)
        node_resized(n, from);
}

static void commit_all(struct entries *all, struct perm_change *change)
{
    struct entry *en;

    /* Children stand behind their parents in the list; a parent may write to them when it
     * commits. */
    TAILQ_FOREACH_REVERSE(en, all, entries, link)
    {
        bool was_read_only = en->n->read_only;
        commit_entry(en);
        en->told_hooks = was_read_only && !en->n->read_only;
    }
    perm_commit(change);
    TAILQ_FOREACH (en, all, link)
        en->n->reopening = NULL;
    TAILQ_FOREACH_REVERSE(en, all, entries, link)
    {
        uint64_t size = en->n->size_bytes;
        bool other = is_other_file(en);

        finish_change(en, &en->backing);
        finish_change(en, &en->file);
        remember_options(en);
        if (en->n->driver->measure_length)
            en->n->size_bytes = align_up(en->n->driver->measure_length(en->n), BLOCK_SECTOR);
        if (en->told_hooks) /* before anything is made durable on the strength of what was read */
            (void)tell_hooks(en, false, NULL);
        follow_content(en->n, size, other);
    }
}

static void abort_all(struct entries *all)
{
    struct entry *en;

    TAILQ_FOREACH_REVERSE(en, all, entries, link)
    {
        en->n->reopening = NULL;
        undo_change(&en->file);
        undo_change(&en->backing);
        if (en->prepared && en->n->driver->reopen_abort)
            en->n->driver->reopen_abort(en->n, en->plan);
        if (en->told_hooks)
            (void)tell_hooks(en, false, NULL);
    }
}

static int reopen_quiesced(struct graph *g, struct entries *all, struct error *err)
{
    struct perm_change change;
    int r = prepare_all(all, err);

    if (r == 0)
        r = switch_perms(g, all, &change, err);
    if (r == 0)
        commit_all(all, &change);
    else
        abort_all(all);
    return r;
}

static int reopen_collected(struct graph *g, struct entries *all, struct error *err)
{
    struct node **nodes;
    struct entry *en;
    size_t n = 0;
    int r;

    TAILQ_FOREACH (en, all, link)
        n++;
    nodes = xcalloc(n + 1, sizeof *nodes);
    n = 0;
    TAILQ_FOREACH (en, all, link)
        nodes[n++] = en->n;
    graph_quiesce_begin(g, nodes, n);
    r = reopen_quiesced(g, all, err);
    graph_quiesce_end(g, nodes, n);
    free(nodes);
    return r;
}

static void forget(struct entries *all)
{
    struct entry *en;

    while ((en = TAILQ_FIRST(all))) {
        TAILQ_REMOVE(all, en, link);
        node_unref(en->n);
        json_object_put(en->options);
        free(en);
    }
}

int graph_reopen(struct graph *g, struct json_object *options, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(g);
    struct entries all = TAILQ_HEAD_INITIALIZER(all);
    int r = 0;

    for (size_t i = 0; r == 0 && i < json_object_array_length(options); i++)
        r = collect_named(g, &all, json_object_array_get_idx(options, i), err);
    if (r == 0)
        r = reopen_collected(g, &all, err);
    forget(&all);
    return r;
}

int node_set_read_only(struct node *n, bool read_only, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(n->graph);
    struct entries all = TAILQ_HEAD_INITIALIZER(all);
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();

    json_add_bool(options, "read-only", read_only);
    if (n->inherits_from) { /* what it has from its parent is not among its own options */
        struct json_object *cache = json_object_new_object();
        json_add_bool(cache, "direct", n->cache_direct);
        json_add_bool(cache, "no-flush", n->cache_no_flush);
        json_add(options, "cache", cache);
        json_add_bool(options, "auto-read-only", n->auto_read_only);
    }
    int r = collect(&all, n, options, true, NULL, 0, err);
    if (r == 0)
        r = reopen_collected(n->graph, &all, err);
    forget(&all);
    return r;
}
