/* Names, locks, and what becomes of all when the program or the power goes. */
#include "disk.h"

#include <errno.h>
#include <fcntl.h>

#include "content.h"

/* ---- the store ---- */

void store_init(struct store *s, struct choices *c)
{
    *s = (struct store){
        .next_inode = 100, .choices = c, .free_blocks = INT32_MAX, .free_memory = INT32_MAX};
    TAILQ_INIT(&s->dirs);
    TAILQ_INIT(&s->inodes);
    store_mkdir(s, "/d", false);
    store_mkdir(s, "/run", true);
}

static void forget_changes(struct dir *d)
{
    struct naming *c;
    while ((c = TAILQ_FIRST(&d->changes))) {
        TAILQ_REMOVE(&d->changes, c, link);
        free(c);
    }
}

void store_fini(struct store *s)
{
    struct dir *d;
    struct inode *i;
    store_forget_users(s);
    while ((d = TAILQ_FIRST(&s->dirs))) {
        struct name *n;
        forget_changes(d);
        while ((n = TAILQ_FIRST(&d->names))) {
            TAILQ_REMOVE(&d->names, n, link);
            free(n);
        }
        TAILQ_REMOVE(&s->dirs, d, link);
        free(d);
    }
    while ((i = TAILQ_FIRST(&s->inodes)))
        content_free(i);
}

uint64_t store_moment(struct store *s)
{
    return ++s->order;
}

static bool name_used(const struct dir *d, const struct name *n)
{
    struct naming *c;
    if (n->now || n->durable)
        return true;
    TAILQ_FOREACH (c, &d->changes, link)
        if (c->set[0].name == n || c->set[1].name == n)
            return true;
    return false;
}

static bool inode_used(const struct store *s, const struct inode *i)
{
    struct dir *d;
    struct name *n;
    struct naming *c;
    if (i->opened || i->mapped)
        return true;
    TAILQ_FOREACH (d, &s->dirs, link) {
        TAILQ_FOREACH (n, &d->names, link)
            if (n->now == i || n->durable == i)
                return true;
        TAILQ_FOREACH (c, &d->changes, link)
            if (c->set[0].to == i || c->set[1].to == i)
                return true;
    }
    return false;
}

static void collect(struct store *s)
{
    struct dir *d;
    struct inode *i, *after;
    TAILQ_FOREACH (d, &s->dirs, link) {
        struct name *n, *next;
        for (n = TAILQ_FIRST(&d->names); n; n = next) {
            next = TAILQ_NEXT(n, link);
            if (!name_used(d, n)) {
                TAILQ_REMOVE(&d->names, n, link);
                free(n);
            }
        }
    }
    for (i = TAILQ_FIRST(&s->inodes); i; i = after) {
        after = TAILQ_NEXT(i, link);
        if (!inode_used(s, i))
            content_free(i);
    }
}

void inode_put(struct inode *i)
{
    assert(i->opened);
    if (!--i->opened)
        collect(i->store);
}

void store_forget_users(struct store *s)
{
    struct inode *i;
    TAILQ_FOREACH (i, &s->inodes, link) {
        struct lock *l;
        i->opened = i->mapped = 0;
        while ((l = TAILQ_FIRST(&i->locks))) {
            TAILQ_REMOVE(&i->locks, l, link);
            free(l);
        }
    }
    collect(s);
}

static void apply(const struct naming *c)
{
    for (int k = 0; k < 2; k++)
        if (c->set[k].name)
            c->set[k].name->durable = c->set[k].to;
}

void store_lose_power(struct store *s)
{
    struct dir *d;
    struct inode *i;
    TAILQ_FOREACH (d, &s->dirs, link) {
        struct naming *c;
        struct name *n;
        TAILQ_FOREACH (c, &d->changes, link)
            if (!d->in_memory && choose_lands(s->choices))
                apply(c);
        forget_changes(d);
        TAILQ_FOREACH (n, &d->names, link)
            n->now = n->durable = d->in_memory ? NULL : n->durable;
    }
    collect(s);
    TAILQ_FOREACH (i, &s->inodes, link)
        content_lose_power(i);
}

/* ---- directories ---- */

void store_mkdir(struct store *s, const char *path, bool in_memory)
{
    struct dir *d = xnew(struct dir);
    snprintf(d->path, sizeof d->path, "%s", path);
    d->in_memory = in_memory;
    TAILQ_INIT(&d->names);
    TAILQ_INIT(&d->changes);
    TAILQ_INSERT_TAIL(&s->dirs, d, link);
}

struct dir *store_dir(struct store *s, const char *path)
{
    struct dir *d;
    TAILQ_FOREACH (d, &s->dirs, link)
        if (!strcmp(d->path, path))
            return d;
    return NULL;
}

/* The directory of PATH, and its last component. */
static struct dir *split(struct store *s, const char *path, const char **base)
{
    char dir[SIM_PATH];
    const char *slash = strrchr(path, '/');
    if (!slash || strlen(path) >= SIM_PATH)
        return NULL;
    snprintf(dir, sizeof dir, "%.*s", (int)(slash - path), path);
    *base = slash + 1;
    return store_dir(s, dir);
}

static struct name *find_name(struct dir *d, const char *base)
{
    struct name *n;
    TAILQ_FOREACH (n, &d->names, link)
        if (!strcmp(n->text, base))
            return n;
    return NULL;
}

static struct name *get_name(struct dir *d, const char *base)
{
    struct name *n = find_name(d, base);
    if (!n) {
        n = xnew(struct name);
        snprintf(n->text, sizeof n->text, "%s", base);
        TAILQ_INSERT_TAIL(&d->names, n, link);
    }
    return n;
}

/* One change of a directory; B may be NULL. */
static void change(struct store *s, struct dir *d, struct name *a, struct inode *to_a,
                   struct name *b, struct inode *to_b)
{
    a->now = to_a;
    if (b)
        b->now = to_b;
    if (d->in_memory)
        return;
    struct naming *c = xnew(struct naming);
    c->order = store_moment(s);
    c->set[0].name = a;
    c->set[0].to = to_a;
    c->set[1].name = b;
    c->set[1].to = to_b;
    TAILQ_INSERT_TAIL(&d->changes, c, link);
}

struct inode *store_find(struct store *s, const char *path)
{
    const char *base;
    struct dir *d = split(s, path, &base);
    struct name *n = d ? find_name(d, base) : NULL;
    return n ? n->now : NULL;
}

int store_create(struct store *s, const char *path, bool exclusive, struct inode **ret)
{
    const char *base;
    struct dir *d = split(s, path, &base);
    if (!d)
        return -ENOENT;
    struct name *n = get_name(d, base);
    if (n->now && exclusive)
        return -EEXIST;
    if (!n->now)
        change(s, d, n, content_new(s, d->in_memory), NULL, NULL);
    *ret = n->now;
    return 0;
}

static void touched(struct inode *i)
{
    i->times.ctime_ns = i->store->wall_ns;
}

int store_unlink(struct store *s, const char *path)
{
    const char *base;
    struct dir *d = split(s, path, &base);
    struct name *n = d ? find_name(d, base) : NULL;
    if (!n || !n->now)
        return -ENOENT;
    touched(n->now);
    change(s, d, n, NULL, NULL, NULL);
    collect(s);
    return 0;
}

int store_rename(struct store *s, const char *from, const char *to)
{
    const char *base_from = NULL, *base_to = NULL;
    struct dir *d = split(s, from, &base_from), *e = split(s, to, &base_to);
    struct name *n = d ? find_name(d, base_from) : NULL;
    if (!n || !n->now || !e)
        return -ENOENT;
    if (d != e)
        return -EXDEV; /* enough for us */
    struct name *m = get_name(e, base_to);
    if (m->now == n->now)
        return 0;
    touched(n->now);
    change(s, d, m, n->now, n, NULL);
    collect(s);
    return 0;
}

int store_link(struct store *s, const char *from, const char *to)
{
    const char *base;
    struct inode *i = store_find(s, from);
    struct dir *d = split(s, to, &base);
    if (!i || !d)
        return -ENOENT;
    struct name *n = get_name(d, base);
    if (n->now)
        return -EEXIST;
    touched(i);
    change(s, d, n, i, NULL, NULL);
    return 0;
}

void store_sync_dir(struct store *s, struct dir *d, uint64_t upto)
{
    struct naming *c;
    while ((c = TAILQ_FIRST(&d->changes)) && c->order < upto) {
        apply(c);
        TAILQ_REMOVE(&d->changes, c, link);
        free(c);
    }
    collect(s);
}

/* ---- locks ---- */

static struct lock *lock_new(struct inode *i, const void *owner, int type, uint64_t start,
                             uint64_t end)
{
    struct lock *l = xnew(struct lock);
    *l = (struct lock){.owner = owner, .type = type, .start = start, .end = end};
    TAILQ_INSERT_TAIL(&i->locks, l, link);
    return l;
}

int inode_lock_test(struct inode *i, const void *owner, int type, uint64_t at, uint64_t n)
{
    uint64_t end = n ? at + n : UINT64_MAX;
    struct lock *l;
    TAILQ_FOREACH (l, &i->locks, link)
        if (l->owner != owner && l->start < end && at < l->end &&
            (type == F_WRLCK || l->type == F_WRLCK))
            return 1;
    return 0;
}

int inode_lock(struct inode *i, const void *owner, int type, uint64_t at, uint64_t n)
{
    uint64_t end = n ? at + n : UINT64_MAX;
    struct lock *l, *next;
    if (type != F_UNLCK && inode_lock_test(i, owner, type, at, n))
        return -EAGAIN;
    for (l = TAILQ_FIRST(&i->locks); l; l = next) {
        next = TAILQ_NEXT(l, link);
        if (l->owner != owner || l->start >= end || at >= l->end)
            continue;
        if (l->start < at)
            lock_new(i, owner, l->type, l->start, at);
        if (l->end > end)
            lock_new(i, owner, l->type, end, l->end);
        TAILQ_REMOVE(&i->locks, l, link);
        free(l);
    }
    if (type != F_UNLCK)
        lock_new(i, owner, type, at, end);
    return 0;
}

void inode_unlock_all(struct inode *i, const void *owner)
{
    (void)!inode_lock(i, owner, F_UNLCK, 0, 0);
}
