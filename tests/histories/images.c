/* Chains of qcow2 images, as real clients keep them: the first backup is a whole image, each
 * increment an overlay over the one before. Their files are disks of ours that grow, up to where
 * they are full. What a chain gives back is read through it; once as it is, and once as its
 * newest file would be after a power loss at the moment at which its job was said to be complete.
 */
#include "histories.h"

static struct node *open_image(const char *name, const struct disk *file, const struct disk *behind)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    CLEANUP(json_putp)
    struct json_object *o = parse(
        "{'driver':'qcow2','node-name':'%s','file':'%s','discard':'unmap'}", name, file->name);
    json_add(o, "backing", behind ? json_object_new_string(behind->name) : NULL);
    if (graph_open(history->graph, o, &n, &err) < 0)
        WRONG("%s", err.text);
    return n;
}

struct disk *image_new(uint64_t size, struct disk *behind)
{
    struct error err = ERROR_INIT;
    struct disk *file = disk_new_file(align_up(size, 128 * KiB) + MiB), *d = xnew(struct disk);
    CLEANUP(json_putp)
    struct json_object *o = parse("{'driver':'qcow2','file':'%s','size':%llu,'cluster-size':%llu}",
                                  file->name, (unsigned long long)size, 4096ull << dice(6));
    if (graph_create(history->graph, o, &err) < 0)
        WRONG("%s", err.text);

    if (one_in(6) && !history->serious)
        file->room = size / 2; /* and then it is full, until somebody does something about it */
    HOLDS(history->n_disks < DISKS_MAX);
    snprintf(d->name, sizeof d->name, "d%u", history->n_disks);
    history->disks[history->n_disks++] = d;
    d->size = size;
    d->sectors = size / SECTOR;
    d->file = file;
    d->behind = behind;
    TAILQ_INIT(&d->marks);
    d->node = open_image(d->name, file, behind);
    d->cluster = node_cluster_size(d->node);
    return d;
}

static char *describe(struct user *u)
{
    return xstrdup("who restores a backup");
}

static void nothing(struct user *u, struct edge *e)
{
}

static uint8_t *content(struct node *n)
{
    static const struct user_ops ops = {describe, nothing, nothing};
    struct user u = {&ops};
    struct error err = ERROR_INIT;
    struct edge *e = NULL;
    if (edge_attach_user(&u, n, "root", PERM_CONSISTENT_READ, PERM_ALL, &e, &err) < 0)
        WRONG("%s", err.text);
    uint8_t *buf = xcalloc(1, node_size(n));
    HOLDS(edge_read(e, range_make(0, node_size(n)), buf, 0) == 0);
    edge_detach(e);
    return buf;
}

static void check_chain(const struct lane *l, const char *when, struct node *n)
{
    uint8_t *is = content(n);
    bool same = memcmp(is, l->kept, l->source->size) == 0;
    for (uint64_t i = 0; !same && i < l->source->size; i++) {
        if (is[i] != l->kept[i])
            WRONG("the chain of %s up to %s%s differs from the disk at its instant at %#llx",
                  l->source->name, l->target->name, when, (unsigned long long)i);
    }
    free(is);
}

void lane_look(struct lane *l)
{
    if (!l->look)
        return;
    for (struct disk *d = l->target; d; d = d->behind)
        disk_disarm(d->file);
    if (l->look == LOOK_UNFINISHED) { /* what it has come to */
        free(l->kept);
        l->kept = content(l->target->node);
    } else {
        struct disk *survived = disk_new_file_of(l->target->file, l->survived);
        struct node *n = open_image("survivor", survived, l->target->behind);
        check_chain(l, "", l->target->node);
        check_chain(l, " after a power loss", n);
        node_unref(n);
        free(steal(l->survived));
        history->n_disks--;
        disk_free(survived);
    }
    l->look = LOOK_NOT;
}
