/* Locks on image files, as QEMU 2.10 and later take them.
 *
 *     byte 100 + i   read-locked by whoever needs permission i
 *     byte 200 + i   read-locked by whoever does not share permission i
 *
 * Read locks never collide. After taking its own bytes a program asks, for each permission
 * that it needs, whether somebody else holds 200 + i, and for each that it does not share,
 * 100 + i. Taking before asking means that of two at the same time at least one sees
 * the other. The locks belong to the open file description, not to the process.
 *
 * An owner that was killed may hold its locks for a moment longer, until the kernel
 * has done away with it: so a refusal is asked again for two seconds, unless the other one is a
 * node of our own, which will not go away. */

#include "block/file.h"

#include "rt/clock.h"
#include "rt/io.h"

#include <fcntl.h>
#include <stdio.h>

enum { LOCK_NEEDED = 100, LOCK_UNSHARED = 200, PERMS = 4 };

static int lock_error(struct error *err, int r, const char *fmt, int byte)
{
    /* FMT is one of ours, with one %d. */
    char text[64];

    snprintf(text, sizeof text, fmt, byte);
    if (r == -EAGAIN || r == -EACCES)
        return error_set(err, EAGAIN, "%s", text);
    return error_set_errno(err, -r, "%s", text);
}

/* Takes what is in WANTED and not in *HELD; gives back what is only in *HELD if UNLOCK. */
static int apply_bytes(int fd, int base, unsigned wanted, unsigned *held, bool unlock,
                       struct error *err)
{
    for (int i = 0; i < PERMS; i++) {
        unsigned bit = 1u << i;
        int r;

        if ((wanted & bit) && !(*held & bit)) {
            r = io_lock(fd, F_RDLCK, (uint64_t)(base + i), 1);
            if (r < 0)
                return lock_error(err, r, "Failed to lock byte %d", base + i);
            *held |= bit;
        } else if (unlock && (*held & bit) && !(wanted & bit)) {
            r = io_lock(fd, F_UNLCK, (uint64_t)(base + i), 1);
            if (r < 0)
                return lock_error(err, r, "Failed to unlock byte %d", base + i);
            *held &= ~bit;
        }
    }
    return 0;
}

static int check_bytes(int fd, int base, unsigned perms, const char *what, struct error *err)
{
    for (int i = 0; i < PERMS; i++) {
        int r;

        if (!(perms & (1u << i)))
            continue;
        r = io_lock_test(fd, F_WRLCK, (uint64_t)(base + i), 1);
        if (r == 0)
            continue;
        CLEANUP(memory_freep) char *name = perm_names(1u << i);
        if (r > 0)
            return error_set(err, EAGAIN, "Failed to get %s\"%s\" lock", what, name);
        return error_set_errno(err, -r, "Failed to get %s\"%s\" lock", what, name);
    }
    return 0;
}

static int check_others(int fd, unsigned perm, unsigned shared, struct error *err)
{
    int r = check_bytes(fd, LOCK_UNSHARED, perm, "", err);

    if (r == 0)
        r = check_bytes(fd, LOCK_NEEDED, PERM_ALL & ~shared, "shared ", err);
    return r;
}

static int apply_both(struct file_state *s, unsigned perm, unsigned unshared, bool unlock,
                      struct error *err)
{
    int r = apply_bytes(s->now->fd, LOCK_NEEDED, perm, &s->locked_perm, unlock, err);

    if (r == 0)
        r = apply_bytes(s->now->fd, LOCK_UNSHARED, unshared, &s->locked_shared, unlock, err);
    return r;
}

/* Another node of this graph has the same file open and minds. */
static bool is_ours(const struct node *n, unsigned perm, unsigned shared)
{
    const struct file_state *s = n->state;
    struct node *other;

    TAILQ_FOREACH (other, &n->graph->nodes, in_graph) {
        const struct file_state *o = other->state;
        if (other != n && other->driver == n->driver && o && o->dev == s->dev && o->ino == s->ino &&
            ((o->locked_perm & ~shared) || (o->locked_shared & perm)))
            return true;
    }
    return false;
}

int file_locks_prepare(struct node *n, unsigned perm, unsigned shared, struct error *err)
{
    struct file_state *s = n->state;
    uint64_t deadline = clock_after_ns(2 * NSEC_PER_SEC);
    int r;

    if (!s->use_lock)
        return 0;
    if (!(perm & ~s->perm) && !(s->shared & ~shared))
        return 0; /* only gives back, at commit */
    for (;;) {
        struct error now = ERROR_INIT;

        r = apply_both(s, s->perm | perm, PERM_ALL & (~s->shared | ~shared), false, &now);
        if (r == 0)
            r = check_others(s->now->fd, perm, shared, &now);
        if (r == 0)
            return 0;
        file_locks_abort(n);
        if (r != -EAGAIN || is_ours(n, perm, shared) || clock_now_ns() >= deadline)
            return error_set(err, now.code, "%s", now.text);
        uint8_t jitter; /* so that two who wait for each other do not do so in step */
        random_bytes(&jitter, 1);
        if (sleep_until(clock_after_ns(20000000 + (uint64_t)jitter * 100000)) < 0)
            return error_set(err, now.code, "%s", now.text);
    }
}

/* Unlocking does not fail; where a file system makes it fail, there is nothing to be done. */
void file_locks_commit(struct node *n, unsigned perm, unsigned shared)
{
    struct file_state *s = n->state;

    if (s->use_lock)
        (void)apply_both(s, perm, PERM_ALL & ~shared, true, NULL);
}

void file_locks_abort(struct node *n)
{
    struct file_state *s = n->state;

    if (s->use_lock)
        (void)apply_both(s, s->perm, PERM_ALL & ~s->shared, true, NULL);
}

void file_locks_drop(int fd)
{
    unsigned perm = PERM_ALL, shared = PERM_ALL;

    (void)apply_bytes(fd, LOCK_NEEDED, 0, &perm, true, NULL);
    (void)apply_bytes(fd, LOCK_UNSHARED, 0, &shared, true, NULL);
}

int file_locks_copy(int fd, unsigned perm, unsigned shared, struct error *err)
{
    unsigned held_perm = 0, held_shared = 0;
    int r = apply_bytes(fd, LOCK_NEEDED, perm, &held_perm, false, err);

    if (r == 0)
        r = apply_bytes(fd, LOCK_UNSHARED, PERM_ALL & ~shared, &held_shared, false, err);
    return r;
}

int file_locks_take(int fd, unsigned perm, unsigned shared, struct error *err)
{
    int r = file_locks_copy(fd, perm, shared, err);

    return r < 0 ? r : check_others(fd, perm, shared, err);
}
