/* The simulated machine's world: what the program asks of files, done in simulated time.
 *
 *     perform()   a copy of what is asked goes in flight; the task waits
 *     turn()      the clock goes to the next completion, which takes effect then, at one instant
 *
 * Reads, writes and syncs of one file may overtake each other; so may all else. What a write
 * writes is taken when it is submitted, so that the rest of it can still land when the
 * program that asked is gone. */
#include "machine.h"

#include "base/macros.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <sys/sysmacros.h>
#include <unistd.h>

struct operation {
    TAILQ_ENTRY(operation) link;
    struct io_op op;     /* as it was asked; buf is the program's */
    struct parcel *data; /* of a write */
    char path[SIM_PATH], path2[SIM_PATH];
    struct open_inode *file;
    uint64_t done_ns, order; /* of a sync: when it was asked */
    struct task *task;
    int64_t result;
    bool done;
};

static struct machine *machine_of(struct world *w)
{
    return container_of(w, struct machine, world);
}

/* ---- trace ---- */

void machine_mix(struct machine *m, uint64_t value)
{
    m->hash = (m->hash ^ value) * UINT64_C(0x100000001b3);
    m->hash ^= m->hash >> 29;
}

void machine_note(struct machine *m, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (const char *c = text; *c; c++)
        machine_mix(m, (uint8_t)*c);
    if (m->tracing) {
        HEAP_OF_THE_MACHINE();
        printf("%8llu %12.3f %s\n", (unsigned long long)m->events, (double)m->now_ns / 1e6, text);
        fflush(stdout);
    }
}

static const char *const kind_names[] = {
    [IO_OPEN] = "open",         [IO_READ] = "read",           [IO_WRITE] = "write",
    [IO_DATASYNC] = "datasync", [IO_SYNC] = "sync",           [IO_FALLOCATE] = "fallocate",
    [IO_TRUNCATE] = "truncate", [IO_FSTAT] = "fstat",         [IO_STAT] = "stat",
    [IO_STATX] = "statx",       [IO_STATFS] = "statfs",       [IO_SEEK] = "seek",
    [IO_LOCK] = "lock",         [IO_LOCK_TEST] = "lock-test", [IO_UNLINK] = "unlink",
    [IO_RENAME] = "rename",     [IO_LINK] = "link",           [IO_MKDIR] = "mkdir",
    [IO_SYNC_DIR] = "sync-dir", [IO_IOCTL] = "ioctl",         [IO_REALPATH] = "realpath",
    [IO_MAP] = "map",           [IO_WORKER] = "worker",       [IO_CLOSE] = "close",
    [IO_UNMAP] = "unmap",       [IO_UNLINK_SOCKET] = "",      [IO_LIST] = "list",
    [IO_DATA] = "data",
};

static void trace_operation(struct machine *m, const struct operation *o, const char *what)
{
    machine_mix(m, (uint64_t)o->op.kind << 32 ^ (uint64_t)(unsigned)o->op.fd);
    machine_mix(m, o->op.offset * 31 + o->op.length);
    machine_mix(m, (uint64_t)o->result ^ m->now_ns << 8);
    if (!m->tracing)
        return;
    const char *path = o->file ? o->file->path : o->path;
    char text[200];
    int n = snprintf(text, sizeof text, "%s %s %s", what, kind_names[o->op.kind], path);
    if (o->path2[0])
        n += snprintf(text + n, sizeof text - (size_t)n, " -> %s", o->path2);
    if (o->op.kind == IO_READ || o->op.kind == IO_WRITE || o->op.kind == IO_FALLOCATE)
        n += snprintf(text + n, sizeof text - (size_t)n, " %#llx+%#llx%s",
                      (unsigned long long)o->op.offset, (unsigned long long)o->op.length,
                      o->op.kind == IO_WRITE && o->op.flags ? " dsync" : "");
    if (o->op.kind == IO_TRUNCATE)
        n += snprintf(text + n, sizeof text - (size_t)n, " to %#llx",
                      (unsigned long long)o->op.offset);
    if (o->done)
        snprintf(text + n, sizeof text - (size_t)n, " = %lld", (long long)o->result);
    HEAP_OF_THE_MACHINE();
    printf("%8llu %12.3f   %s\n", (unsigned long long)m->events, (double)m->now_ns / 1e6, text);
    fflush(stdout);
}

/* Is now a good moment? It is waited for one only so long. */
static bool is_near(const struct machine *m)
{
    const struct operation *o;
    if (!m->kill_near || m->events > m->kill_at + 300)
        return true;
    TAILQ_FOREACH (o, &m->in_flight, link)
        if (o->op.kind == IO_WRITE && o->file && strstr(o->file->path, m->kill_near))
            return true;
    return false;
}

/* One more event; is it the last of this life? */
static bool is_fatal(struct machine *m)
{
    m->events++;
    if (m->glimpse && one_in(&m->glimpse_dice, m->glimpses)) {
        HEAP_OF_THE_MACHINE();
        m->glimpse(m->opaque);
    }
    return m->kill_at && m->events >= m->kill_at && is_near(m);
}

/* ---- clock and dice ---- */

static uint64_t sim_now(struct world *w)
{
    struct machine *m = machine_of(w);
    return m->now_ns - m->boot_ns;
}

static uint64_t sim_wall(struct world *w)
{
    struct machine *m = machine_of(w);
    return m->wall_start_us + m->now_ns / 1000;
}

static void sim_random(struct world *w, void *buf, size_t n)
{
    uint8_t *to = buf;
    for (size_t i = 0; i < n; i++)
        to[i] = (uint8_t)dice_next(&machine_of(w)->program);
}

/* The file system's clock moves in ticks of 4 ms. */
static void set_clock(struct machine *m, uint64_t now_ns)
{
    m->now_ns = now_ns;
    m->store.wall_ns = (m->wall_start_us * 1000 + now_ns) / 4000000 * 4000000;
}

/* ---- descriptors ---- */

static struct open_inode *file_of(struct machine *m, int fd)
{
    int k = fd - SIM_FD_FIRST;
    return k >= 0 && k < SIM_FDS && m->fds[k].in_use ? &m->fds[k] : NULL;
}

static void close_file(struct open_inode *f)
{
    inode_unlock_all(f->inode, f);
    struct inode *i = f->inode;
    *f = (struct open_inode){0};
    inode_put(i);
}

/* What the kernel makes up when it is asked. */
static struct inode *proc_file(struct machine *m, const char *path)
{
    char text[64];
    if (!strcmp(path, "/proc/sys/kernel/random/boot_id")) {
        const uint8_t *b = m->boot_id;
        snprintf(text, sizeof text,
                 "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x\n", b[0],
                 b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13],
                 b[14], b[15]);
    } else if (!strcmp(path, "/proc/uptime")) {
        uint64_t up = (m->now_ns - m->boot_ns) / 10000000;
        snprintf(text, sizeof text, "%llu.%02llu 0.00\n", (unsigned long long)up / 100,
                 (unsigned long long)up % 100);
    } else {
        return NULL;
    }
    struct inode *i;
    (void)!store_create(&m->store, "/run/.proc", false, &i);
    (void)!store_unlink(&m->store, "/run/.proc.now");
    (void)!store_rename(&m->store, "/run/.proc", "/run/.proc.now");
    m->store.free_memory += MiB; /* it is no file of tmpfs, and has room when that is full */
    (void)!inode_write(i, text, strlen(text), 0, false, NULL);
    m->store.free_memory -= MiB;
    return i;
}

static int64_t do_open(struct machine *m, const char *path, int flags)
{
    struct inode *i = proc_file(m, path);
    int k = 0;
    if (store_dir(&m->store, path))
        return flags & (O_RDWR | O_WRONLY) ? -EISDIR : -EACCES; /* nobody needs one */
    if (!i && (flags & O_CREAT)) {
        int r = store_create(&m->store, path, flags & O_EXCL, &i);
        if (r < 0)
            return r;
    } else if (!i) {
        i = store_find(&m->store, path);
    }
    if (!i)
        return -ENOENT;
    if (i->in_memory && (flags & O_DIRECT))
        return -EINVAL;
    while (k < SIM_FDS && m->fds[k].in_use)
        k++;
    if (k == SIM_FDS)
        return -EMFILE;
    if (flags & O_TRUNC)
        (void)!inode_resize(i, 0);
    m->fds[k] = (struct open_inode){.inode = i, .flags = flags, .in_use = true};
    snprintf(m->fds[k].path, SIM_PATH, "%s", path);
    i->opened++;
    return SIM_FD_FIRST + k;
}

/* ---- what an operation does, when it does it ---- */

static void to_stat(struct inode *i, struct stat *st)
{
    static int64_t uid = -1;
    struct statx x;
    if (uid < 0)
        uid = geteuid();
    inode_stat(i, &x);
    *st = (struct stat){
        .st_dev = makedev(x.stx_dev_major, x.stx_dev_minor),
        .st_ino = x.stx_ino,
        .st_mode = x.stx_mode,
        .st_uid = (uid_t)uid,
        .st_nlink = x.stx_nlink,
        .st_size = (off_t)x.stx_size,
        .st_blksize = SIM_BLOCK,
        .st_blocks = (blkcnt_t)x.stx_blocks,
        .st_mtim = {x.stx_mtime.tv_sec, x.stx_mtime.tv_nsec},
        .st_ctim = {x.stx_ctime.tv_sec, x.stx_ctime.tv_nsec},
        .st_atim = {x.stx_atime.tv_sec, x.stx_atime.tv_nsec},
    };
}

static int64_t do_statx(struct machine *m, struct operation *o)
{
    struct inode *i = o->file ? o->file->inode : store_find(&m->store, o->path);
    struct dir *d = i ? NULL : store_dir(&m->store, o->path);
    if (d && o->op.kind == IO_STAT)
        *(struct stat *)o->op.ret =
            (struct stat){.st_mode = S_IFDIR | 0700, .st_ino = 2, .st_uid = geteuid()};
    else if (d)
        *(struct statx *)o->op.ret = (struct statx){.stx_mode = S_IFDIR | 0700, .stx_ino = 2};
    else if (!i)
        return -ENOENT;
    else if (o->op.kind == IO_STATX)
        inode_stat(i, o->op.ret);
    else
        to_stat(i, o->op.ret);
    return 0;
}

static int64_t do_data(struct inode *i, const struct io_op *op)
{
    struct range *ret = op->ret;
    const uint64_t end = op->offset + op->length;
    int n = 0;

    for (uint64_t at = op->offset; n < op->flags && at < end; at = range_end(ret[n++])) {
        int64_t data = inode_seek(i, at, SEEK_DATA);
        if (data < 0 || (uint64_t)data >= end)
            break;
        ret[n] = range_between((uint64_t)data,
                               min_u64(end, (uint64_t)inode_seek(i, (uint64_t)data, SEEK_HOLE)));
    }
    return n;
}

static int64_t do_statfs(struct operation *o)
{
    bool memory = o->file->inode->in_memory;
    *(struct statfs *)o->op.ret = (struct statfs){
        .f_type = memory ? TMPFS_MAGIC : 0xEF53, /* ext4 */
        .f_bsize = SIM_BLOCK,
        .f_fsid = {{memory ? 7 : 8, 9}},
    };
    return 0;
}

static int64_t do_realpath(struct machine *m, const char *path, char **ret)
{
    if (!store_find(&m->store, path) && !store_dir(&m->store, path))
        return -ENOENT;
    heap_life(true); /* the program frees it */
    *ret = xstrdup(path);
    heap_life(false);
    return 0;
}

static int64_t do_list(struct machine *m, const char *path, char **ret)
{
    const struct dir *d = store_dir(&m->store, path);
    const struct name *n;
    size_t bytes = 1;
    if (!d)
        return -ENOENT;
    TAILQ_FOREACH (n, &d->names, link)
        bytes += n->now ? strlen(n->text) + 1 : 0;
    heap_life(true); /* the program frees it */
    char *at = *ret = xcalloc(bytes, 1);
    heap_life(false);
    TAILQ_FOREACH (n, &d->names, link)
        if (n->now)
            at = stpcpy(at, n->text) + 1;
    return 0;
}

static int64_t do_sync_dir(struct machine *m, struct operation *o)
{
    struct dir *d = store_dir(&m->store, o->path);
    if (d)
        store_sync_dir(&m->store, d, o->order);
    return d ? 0 : -ENOENT;
}

static bool faulty(struct machine *m, const struct operation *o, unsigned hundredths)
{
    const char *path = o->file ? o->file->path : o->path;
    if (!hundredths || !strstr(path, m->faults.path))
        return false;
    if (!dice_percent(&m->dice, hundredths))
        return false;
    m->n_faults++;
    return true;
}

static int64_t do_write(struct machine *m, struct operation *o)
{
    struct inode *i = o->file->inode;
    bool direct = o->file->flags & O_DIRECT;
    if (faulty(m, o, m->faults.write)) {
        (void)!inode_write_parcel(i, o->data, direct, &m->choices);
        return -EIO;
    }
    if (faulty(m, o, m->faults.space))
        return -ENOSPC;
    int64_t n = inode_write_parcel(i, o->data, direct, NULL);
    m->n_full += n == -ENOSPC && !i->in_memory;
    if (n > 0 && (o->op.flags & (RWF_DSYNC | RWF_SYNC)))
        inode_sync_range(i, o->op.offset, (size_t)n, store_moment(&m->store));
    return n;
}

static int64_t do_sync(struct machine *m, struct operation *o)
{
    struct inode *i = o->file->inode;
    if (faulty(m, o, m->faults.sync)) {
        inode_sync_failed(i, o->order);
        if (m->sync_failed)
            m->sync_failed(m->opaque, o->file->path);
        return -EIO;
    }
    inode_sync(i, o->order, o->op.kind == IO_SYNC);
    return 0;
}

static bool needs_file(enum io_kind k)
{
    switch (k) {
    case IO_OPEN:
    case IO_STAT:
    case IO_UNLINK:
    case IO_RENAME:
    case IO_LINK:
    case IO_MKDIR:
    case IO_SYNC_DIR:
    case IO_REALPATH:
    case IO_LIST:
    case IO_STATX:
        return false;
    default:
        return true;
    }
}

static bool writes(enum io_kind k)
{
    return k == IO_WRITE || k == IO_FALLOCATE || k == IO_TRUNCATE;
}

/* O_DIRECT wants what a disk of 512-byte sectors wants. */
static bool misaligned(const struct operation *o)
{
    return (o->file->flags & O_DIRECT) && (o->op.kind == IO_READ || o->op.kind == IO_WRITE) &&
           ((o->op.offset | o->op.length | (uintptr_t)o->op.buf) % SIM_SECTOR);
}

static int64_t take_effect(struct machine *m, struct operation *o)
{
    struct store *s = &m->store;
    struct open_inode *f = o->file;
    int64_t r;
    if (f && writes(o->op.kind) && !(f->flags & (O_RDWR | O_WRONLY)))
        return -EBADF;
    if (f && misaligned(o))
        return -EINVAL;
    switch (o->op.kind) {
    case IO_OPEN:
        return do_open(m, o->path, o->op.flags);
    case IO_READ:
        if (faulty(m, o, m->faults.read) || inode_unreadable(f->inode, o->op.offset, o->op.length))
            return -EIO;
        return (int64_t)inode_read(f->inode, o->op.buf, o->op.length, o->op.offset);
    case IO_WRITE:
        return do_write(m, o);
    case IO_DATASYNC:
    case IO_SYNC:
        return do_sync(m, o);
    case IO_FALLOCATE:
        if (!(o->op.flags & FALLOC_FL_PUNCH_HOLE) && faulty(m, o, m->faults.space))
            return -ENOSPC;
        r = inode_allocate(f->inode, o->op.flags, o->op.offset, o->op.length);
        m->n_full += r == -ENOSPC && !f->inode->in_memory;
        return r;
    case IO_TRUNCATE:
        return inode_resize(f->inode, o->op.offset);
    case IO_FSTAT:
    case IO_STAT:
    case IO_STATX:
        return do_statx(m, o);
    case IO_STATFS:
        return do_statfs(o);
    case IO_SEEK:
        return inode_seek(f->inode, o->op.offset, o->op.flags);
    case IO_DATA:
        return do_data(f->inode, &o->op);
    case IO_LOCK:
        return inode_lock(f->inode, f, o->op.flags, o->op.offset, o->op.length);
    case IO_LOCK_TEST:
        return inode_lock_test(f->inode, f, o->op.flags, o->op.offset, o->op.length);
    case IO_UNLINK:
        return store_unlink(s, o->path);
    case IO_RENAME:
        return store_rename(s, o->path, o->path2);
    case IO_LINK:
        return store_link(s, o->path, o->path2);
    case IO_MKDIR:
        if (store_dir(s, o->path))
            return -EEXIST;
        store_mkdir(s, o->path, !strncmp(o->path, "/run", 4));
        return 0;
    case IO_SYNC_DIR:
        return do_sync_dir(m, o);
    case IO_REALPATH:
        return do_realpath(m, o->path, o->op.ret);
    case IO_LIST:
        return do_list(m, o->path, o->op.ret);
    case IO_MAP:
        return inode_map(f->inode, o->op.length, o->op.ret);
    case IO_IOCTL:
        return -ENOTTY;
    default:
        return -EOPNOTSUPP; /* no network here */
    }
}

/* ---- in flight ---- */

static void operation_free(struct machine *m, struct operation *o)
{
    if (o->file)
        o->file->pending--;
    parcel_free(o->data);
    free(o);
}

/* Most are quick, some are not, so that everything overtakes everything. */
static uint64_t duration_ns(struct machine *m, enum io_kind kind)
{
    uint64_t us = 1 + dice_below(&m->dice, kind == IO_READ || kind == IO_WRITE ? 100 : 300);
    if (one_in(&m->dice, 16))
        us += dice_below(&m->dice, m->slow);
    return us * 1000;
}

static struct operation *submit(struct machine *m, const struct io_op *op)
{
    HEAP_OF_THE_MACHINE();
    struct operation *o = xnew(struct operation);
    o->op = *op;
    o->order = store_moment(&m->store);
    o->task = task_self();
    if (op->path)
        snprintf(o->path, SIM_PATH, "%s", op->path);
    if (op->path2)
        snprintf(o->path2, SIM_PATH, "%s", op->path2);
    if (needs_file(op->kind) || (op->kind == IO_STATX && !op->path))
        o->file = file_of(m, op->fd);
    if (o->file)
        o->file->pending++;
    if (op->kind == IO_WRITE) {
        o->data = parcel_new(op->buf, op->length, op->offset);
        for (size_t at = 0; at + 8 <= op->length; at += SIM_SECTOR) {
            uint64_t word;
            memcpy(&word, (const uint8_t *)op->buf + at, 8);
            machine_mix(m, word);
        }
    }
    o->done_ns = m->now_ns + duration_ns(m, op->kind);
    m->counts[op->kind]++;
    if (m->doomed && op->kind == IO_WRITE && o->file && strstr(o->file->path, ".tide") &&
        --m->doomed == 0 && !m->kill_at)
        m->kill_at = m->events + 1 + dice_below(&m->dice, 3);
    TAILQ_INSERT_TAIL(&m->in_flight, o, link);
    trace_operation(m, o, ">");
    return o;
}

static void complete(struct machine *m, struct operation *o)
{
    HEAP_OF_THE_MACHINE();
    if (!o->file && (needs_file(o->op.kind) || (o->op.kind == IO_STATX && !o->op.path)))
        o->result = -EBADF;
    else
        o->result = take_effect(m, o);
    o->done = true;
    trace_operation(m, o, "<");
    TAILQ_REMOVE(&m->in_flight, o, link);
    TAILQ_INSERT_TAIL(&m->completed, o, link);
}

static int64_t at_once(struct machine *m, struct io_op *op)
{
    HEAP_OF_THE_MACHINE();
    struct open_inode *f = op->kind == IO_CLOSE ? file_of(m, op->fd) : NULL;
    m->counts[op->kind]++;
    machine_mix(m, (uint64_t)op->kind << 32 ^ (uint64_t)(unsigned)op->fd);
    switch (op->kind) {
    case IO_CLOSE:
        if (!f)
            return -EBADF;
        if (f->pending) {
            fprintf(stderr, "sim: %s is closed with %u operations in flight\n", f->path,
                    f->pending);
            abort();
        }
        close_file(f);
        return 0;
    case IO_UNMAP: {
        struct inode *i;
        TAILQ_FOREACH (i, &m->store.inodes, link)
            if (i->bytes == op->buf && i->mapped) {
                i->mapped--;
                return 0;
            }
        return -EINVAL;
    }
    default:
        return -EOPNOTSUPP;
    }
}

static int64_t sim_perform(struct world *w, struct io_op *op)
{
    struct machine *m = machine_of(w);
    if (op->kind > IO_WORKER)
        return at_once(m, op);
    if (op->kind == IO_WORKER) {
        task_yield_uncancelled();
        return op->fn(op->ret);
    }
    struct operation *o = submit(m, op);
    if (is_fatal(m))
        machine_kill(m);
    task_suspend_uncancelled();
    int64_t result = o->result;
    HEAP_OF_THE_MACHINE();
    TAILQ_REMOVE(&m->completed, o, link);
    operation_free(m, o);
    return result;
}

/* The next to complete at or before DEADLINE_NS of the machine's clock. */
static struct operation *next_to_complete(struct machine *m, uint64_t deadline_ns)
{
    struct operation *o, *first = NULL;
    TAILQ_FOREACH (o, &m->in_flight, link)
        if (o->done_ns <= deadline_ns && (!first || o->done_ns < first->done_ns))
            first = o;
    return first;
}

static bool sim_turn(struct world *w, uint64_t deadline_ns)
{
    struct machine *m = machine_of(w);
    if (deadline_ns == NEVER_NS && TAILQ_EMPTY(&m->in_flight))
        return false;
    if (deadline_ns == 0) /* somebody is busy: time passes all the same */
        deadline_ns = m->now_ns + 1000;
    else if (deadline_ns != NEVER_NS)
        deadline_ns = max_u64(deadline_ns + m->boot_ns, m->now_ns);
    struct operation *o = next_to_complete(m, deadline_ns);
    set_clock(m, o ? max_u64(m->now_ns, o->done_ns) : deadline_ns);
    if (!o)
        return true;
    if (is_fatal(m)) {
        machine_kill(m);
        return true;
    }
    complete(m, o);
    task_wake(o->task);
    return true;
}

/* ---- lives ---- */

void machine_kill(struct machine *m)
{
    m->killed = true;
    loop_die();
}

/* What was in flight lands or not; a write, sector by sector. If all is enumerated and the power
 * goes next, it lands, and that decides. */
static void land(struct machine *m)
{
    struct operation *o;
    if (m->choices.exhaustive)
        m->choices.power_goes = choose(&m->choices, 2);
    const bool all = m->choices.exhaustive && m->choices.power_goes;
    while ((o = TAILQ_FIRST(&m->in_flight))) {
        TAILQ_REMOVE(&m->in_flight, o, link);
        if (o->op.kind == IO_WRITE && o->file) {
            if ((o->file->flags & (O_RDWR | O_WRONLY)) && !misaligned(o))
                (void)!inode_write_parcel(o->file->inode, o->data, o->file->flags & O_DIRECT,
                                          all ? NULL : &m->choices);
        } else if (o->op.kind == IO_FALLOCATE || o->op.kind == IO_TRUNCATE ||
                   o->op.kind == IO_UNLINK || o->op.kind == IO_RENAME || o->op.kind == IO_LINK) {
            if ((o->file || !needs_file(o->op.kind)) && (all || choose_lands(&m->choices)))
                (void)!take_effect(m, o);
        }
        operation_free(m, o);
    }
}

int machine_live(struct machine *m, uint64_t kill_at, task_fn *main, void *arg)
{
    struct operation *o;
    m->killed = false;
    m->doomed = 0;
    m->life_events = m->events;
    m->kill_at = kill_at ? m->events + kill_at : 0;
    heap_life(true);
    int r = loop_run_in(&m->world, main, arg);
    heap_life(false);
    if (m->killed) {
        if (!m->choices.exhaustive)
            choices_by_dice(&m->choices, &m->dice);
        machine_note(m, "killed");
        land(m);
    }
    TAILQ_CONCAT(&m->in_flight, &m->completed, link);
    while ((o = TAILQ_FIRST(&m->in_flight))) {
        TAILQ_REMOVE(&m->in_flight, o, link);
        operation_free(m, o);
    }
    for (int k = 0; k < SIM_FDS; k++)
        m->fds[k] = (struct open_inode){0};
    store_forget_users(&m->store);
    heap_discard();
    m->kill_at = 0;
    return r;
}

static void boot(struct machine *m)
{
    struct dice d = {m->dice.state ^ ++m->boots};
    m->boot_ns = m->now_ns;
    for (int k = 0; k < 16; k++)
        m->boot_id[k] = (uint8_t)dice_next(&d);
}

void machine_lose_power(struct machine *m)
{
    if (!m->choices.exhaustive)
        choices_by_dice(&m->choices, &m->dice);
    machine_note(m, "the power goes");
    store_lose_power(&m->store);
    machine_pass_time(m, NSEC_PER_SEC * 20);
    boot(m);
    machine_pass_time(m, NSEC_PER_SEC * 5);
}

void machine_pass_time(struct machine *m, uint64_t ns)
{
    set_clock(m, m->now_ns + ns);
}

void machine_set_wall(struct machine *m, int64_t by_us)
{
    m->wall_start_us += (uint64_t)by_us;
    set_clock(m, m->now_ns);
}

void machine_foreign_write(struct machine *m, const char *path, const void *buf, size_t n,
                           uint64_t at)
{
    HEAP_OF_THE_MACHINE();
    struct inode *i = store_find(&m->store, path);
    if (i)
        (void)!inode_write(i, buf, n, at, false, NULL);
    machine_note(m, "somebody else writes %s %#llx+%#zx", path, (unsigned long long)at, n);
}

uint8_t *machine_dump(struct machine *m, const char *path, uint64_t *size)
{
    HEAP_OF_THE_MACHINE();
    struct inode *i = store_find(&m->store, path);
    return i ? inode_dump(i, size) : NULL;
}

uint8_t *machine_imagine(struct machine *m, const char *path, struct choices *c, uint64_t *size)
{
    const struct parcel *writes[256];
    size_t n = 0;
    struct operation *o;
    struct inode *i = store_find(&m->store, path);
    if (!i)
        return NULL;
    TAILQ_FOREACH (o, &m->in_flight, link)
        if (o->op.kind == IO_WRITE && o->file && o->file->inode == i && !misaligned(o) &&
            n < ARRAY_SIZE(writes))
            writes[n++] = o->data;
    return inode_imagine(i, writes, n, c, size);
}

void machine_init(struct machine *m, uint64_t seed)
{
    *m = (struct machine){
        .world = {"simulation", sim_now, sim_wall, sim_random, sim_perform, sim_turn},
        .dice = {seed ^ UINT64_C(0x6d616368696e65)},
        .glimpse_dice = {seed ^ UINT64_C(0x676c696d707365)},
        .glimpses = 1,
        .program = {seed ^ UINT64_C(0x70726f6772616d)},
        .wall_start_us = UINT64_C(1790000000000000),
        .slow = 5000,
        .hash = UINT64_C(0xcbf29ce484222325),
    };
    TAILQ_INIT(&m->in_flight);
    TAILQ_INIT(&m->completed);
    choices_by_dice(&m->choices, &m->dice);
    set_clock(m, NSEC_PER_SEC * 3600);
    store_init(&m->store, &m->choices);
    boot(m);
    set_clock(m, m->now_ns + NSEC_PER_SEC);
}

void machine_fini(struct machine *m)
{
    store_fini(&m->store);
    choices_fini(&m->choices);
}
