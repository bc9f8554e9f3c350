/* Reading, and writing where the cluster is ours alone. The data goes between the caller's
 * buffer and the file without a copy; a request that the mapping cuts into pieces has its pieces in
 * flight together.
 *
 * Whoever uses a cluster found in an entry enters the epoch in the same breath as the lookup
 * (no wait in between) and leaves it when the file has answered: see step 5 in qcow2.h. */
#include "block/qcow2/qcow2.h"
#include "rt/io.h"

#include <zlib.h>

enum { FRAGMENTS = 16, INFLATE_INLINE_BYTES = 8192 };

/* ---- one piece with the file ---- */

struct fragment {
    struct qcow2 *q;
    bool write;
    unsigned epoch;
    uint64_t host;
    uint8_t *buf;
    uint64_t length;
};

static int fragment_run(void *arg)
{
    SHIELD();
    struct fragment *f = arg;
    file_event(f->q, f->write ? DEBUG_write_aio : DEBUG_read_aio);
    int r = f->write ? file_write(f->q, f->host, f->buf, f->length)
                     : file_read(f->q, f->host, f->buf, f->length);
    epoch_leave(f->q, f->epoch);
    return r;
}

/* Pieces of one request: the last is done by the request itself, so one piece needs no task. */
struct fragments {
    struct scope scope;
    struct fragment items[FRAGMENTS];
    unsigned n;
};

static int fragment_add(struct fragments *fs, struct fragment f, bool last)
{
    if (last || fs->n == FRAGMENTS || graph_lock_is_mine(f.q->node->graph))
        return fragment_run(&f);
    fs->items[fs->n] = f;
    scope_spawn(&fs->scope, fragment_run, &fs->items[fs->n++]);
    return 0;
}

static int fragments_end(struct fragments *fs, int r)
{
    if (!fs->n)
        return r;
    int joined = scope_join(&fs->scope);
    return r < 0 ? r : joined;
}

/* ---- compressed clusters ---- */

int qcow2_inflate(const void *in, size_t in_bytes, void *out, size_t out_bytes)
{
    z_stream z = {
        .next_in = (void *)(uintptr_t)in,
        .avail_in = (uInt)in_bytes,
        .next_out = out,
        .avail_out = (uInt)out_bytes,
    };
    if (inflateInit2(&z, -12) != Z_OK)
        return -ENOMEM;
    int r = inflate(&z, Z_FINISH);
    /* The stream may be followed by rubbish, or be cut where the output is full. */
    bool ok = (r == Z_STREAM_END || r == Z_BUF_ERROR) && z.avail_out == 0;
    inflateEnd(&z);
    return ok ? 0 : -EIO;
}

struct inflate_job {
    const void *in;
    size_t in_bytes;
    void *out;
    size_t out_bytes;
};

static int inflate_job_run(void *arg)
{
    struct inflate_job *j = arg;
    return qcow2_inflate(j->in, j->in_bytes, j->out, j->out_bytes);
}

/* The cluster that ENTRY names, whole, to q->compressed. Holds a place in the epoch while it reads.
 */
static int read_compressed(struct qcow2 *q, uint64_t entry, uint64_t inside, uint8_t *buf,
                           uint64_t length)
{
    if (q->compressed_at != entry || !q->compressed) {
        struct range extent = compressed_extent(q, entry);
        unsigned epoch = epoch_enter(q);
        uint8_t *in = malloc(extent.length), *out = malloc(q->cluster_size);
        int r = in && out ? 0 : -ENOMEM;
        if (r == 0 && extent.start >= q->fresh_from) {
            qcow2_signal_corruption(q, false, (int64_t)extent.start, -1,
                                    "Compressed cluster at %#llx beyond the end of the file",
                                    (unsigned long long)extent.start);
            r = -EIO;
        }
        if (r == 0) {
            file_event(q, DEBUG_read_compressed);
            r = file_read(q, extent.start, in, extent.length);
        }
        epoch_leave(q, epoch);
        if (r == 0) {
            struct inflate_job j = {in, extent.length, out, q->cluster_size};
            r = q->cluster_size > INFLATE_INLINE_BYTES ? worker_run(inflate_job_run, &j)
                                                       : inflate_job_run(&j);
        }
        free(in);
        if (r < 0) {
            free(out);
            return r;
        }
        memcpy(buf, out + inside, length);
        /* Kept for the next small read, unless something was freed meanwhile and what was here
         * may be something else by now. */
        free(q->compressed);
        q->compressed = out;
        q->compressed_at = epoch == q->epoch ? entry : 0;
        return 0;
    }
    memcpy(buf, q->compressed + inside, length);
    return 0;
}

/* ---- reading ---- */

static int check_host(struct qcow2 *q, const struct mapping *m)
{
    if (m->host < q->fresh_from)
        return 0;
    qcow2_signal_corruption(q, false, (int64_t)m->host, -1,
                            "Cluster allocation offset %#llx beyond the end of the file",
                            (unsigned long long)(m->entry & ENTRY_OFFSET_MASK));
    return -EIO;
}

static int read_piece(struct qcow2 *q, struct fragments *fs, uint64_t guest,
                      const struct mapping *m, uint8_t *buf, bool last)
{
    switch (m->type) {
    case MAP_UNALLOCATED:
        if (q->node->backing) {
            file_event(q, DEBUG_read_backing_aio);
            return edge_read(q->node->backing, range_make(guest, m->length), buf, 0);
        }
        memset(buf, 0, m->length);
        return 0;
    case MAP_ZERO:
        memset(buf, 0, m->length);
        return 0;
    case MAP_COMPRESSED:
        return read_compressed(q, m->entry, into_cluster(q, guest), buf, m->length);
    case MAP_NORMAL:
        break;
    }
    int r = check_host(q, m);
    if (r < 0)
        return r;
    struct fragment f = {q, false, epoch_enter(q), m->host, buf, m->length};
    return fragment_add(fs, f, last);
}

int qcow2_read_range(struct qcow2 *q, struct range r, uint8_t *buf)
{
    uint64_t size = q->node->size_bytes;
    if (range_end(r) > size) {
        uint64_t beyond = range_end(r) - max_u64(size, r.start);
        memset(buf + r.length - beyond, 0, beyond);
        r.length -= beyond;
    }

    struct mapping m;
    int ret = 0;
    if (r.length) {
        ret = map_lookup(q, r.start, r.length, &m);
        if (ret < 0)
            return ret;
        if (m.type == MAP_NORMAL && m.length == r.length) { /* the common case, without a scope */
            ret = check_host(q, &m);
            if (ret < 0)
                return ret;
            unsigned epoch = epoch_enter(q);
            file_event(q, DEBUG_read_aio);
            ret = file_read(q, m.host, buf, r.length);
            epoch_leave(q, epoch);
            return ret;
        }
    }

    struct fragments fs = {.n = 0};
    scope_init(&fs.scope);
    while (r.length) {
        ret = read_piece(q, &fs, r.start, &m, buf, m.length == r.length);
        if (ret < 0)
            break;
        buf += m.length;
        r.start += m.length;
        r.length -= m.length;
        if (r.length) {
            ret = map_lookup(q, r.start, r.length, &m);
            if (ret < 0)
                break;
        }
    }
    ret = fragments_end(&fs, ret);
    scope_fini(&fs.scope);
    return ret;
}

int qcow2_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    struct qcow2 *q = n->state;
    if (qcow2_unusable(q))
        return -ENOMEDIUM;
    return qcow2_read_range(q, r, buf);
}

/* ---- writing ---- */

int qcow2_write(struct node *n, struct range r, const void *data, unsigned flags)
{
    struct qcow2 *q = n->state;
    uint8_t *buf =
        (uint8_t *)(uintptr_t)data; /* fragments write from it, they do not write to it */
    struct fragments fs = {.n = 0};
    int ret = 0;
    bool scoped = false;

    while (r.length && ret == 0) {
        if (qcow2_unusable(q)) {
            ret = -ENOMEDIUM;
            break;
        }
        struct mapping m;
        ret = map_lookup(q, r.start, r.length, &m);
        if (ret < 0)
            break;
        uint64_t done = m.length;
        if (m.type == MAP_NORMAL && m.copied) {
            struct fragment f = {q, true, epoch_enter(q), m.host, buf, m.length};
            ret = check_host(q, &m);
            if (ret == 0)
                ret = qcow2_check_overlap(q, m.host, m.length, META_NONE);
            if (ret < 0) {
                epoch_leave(q, f.epoch);
                break;
            }
            bool last = m.length == r.length;
            if (!last && !scoped) {
                scope_init(&fs.scope);
                scoped = true;
            }
            ret = fragment_add(&fs, f, last);
        } else {
            ret = qcow2_write_allocating(q, r, buf, &done);
        }
        buf += done;
        r.start += done;
        r.length -= done;
    }
    if (scoped) {
        ret = fragments_end(&fs, ret);
        scope_fini(&fs.scope);
    }
    return ret;
}
