/* Setting, clearing and reading the guard. See guard.h.
 *
 *     extension -> flush -> bit -> flush      a bit without its extension, or with that of an older
 *                                             tide file, would vouch for what is not true
 *
 * When the header's write or flush fails the disk may have the bit. It stays in `q->guard_unsure`
 * until a header without it is durable. */
#include "block/qcow2/guard.h"

#include "block/qcow2/bitmaps.h"
#include "block/qcow2/qcow2.h"

static const char claimed_key[1];

void qcow2_claim_guards(struct graph *g)
{
    graph_set_data(g, claimed_key, (void *)(uintptr_t)claimed_key);
}

uint64_t qcow2_guard_known(const struct node *n)
{
    return graph_get_data(n->graph, claimed_key) ? QCOW2_AUTOCLEAR_GUARD : 0;
}

bool qcow2_can_guard(const struct node *n)
{
    const struct qcow2 *q = n->state;

    return q->header.version >= 3;
}

static void look(const struct qcow2_header *h, struct qcow2_guard *ret)
{
    const struct qcow2_extension *e = qcow2_header_find_extension(h, QCOW2_EXT_GUARD);

    *ret = (struct qcow2_guard){.named = e && e->length == sizeof ret->uuid};
    ret->set = ret->named && (h->autoclear & QCOW2_AUTOCLEAR_GUARD);
    if (ret->named)
        memcpy(ret->uuid, e->data, sizeof ret->uuid);
}

/* The graph's lock or an opening node: nobody else changes the header meanwhile. */
int qcow2_guard_read(struct node *n, struct qcow2_guard *ret, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct qcow2_header h = {0};
    CLEANUP(memory_freep) uint8_t *cluster = block_buffer(q->cluster_size);

    int r = cluster ? file_read(q, 0, cluster, q->cluster_size) : -ENOMEM;
    if (r < 0)
        return error_set_errno(err, -r, "Could not read qcow2 header");
    r = qcow2_header_decode(cluster, QCOW2_HEADER_BYTES, &h, err);
    if (r == 0)
        r = qcow2_header_decode_rest(cluster, q->cluster_size, &h, err);
    if (r == 0)
        look(&h, ret);
    qcow2_header_fini(&h);
    return r;
}

static int write_durably(struct qcow2 *q)
{
    int r = qcow2_write_header(q);

    return r < 0 ? r : file_flush(q);
}

static int check(struct qcow2 *q, struct error *err)
{
    return qcow2_unusable(q)    ? error_set_errno(err, ENOMEDIUM, "Could not update qcow2 header")
           : !qcow2_writable(q) ? error_set(err, EACCES, "No write access")
                                : 0;
}

int qcow2_guard_set(struct node *n, const uint8_t uuid[16], struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct qcow2_header *h = &q->header;
    struct qcow2_guard now;

    int r = check(q, err);
    if (r < 0)
        return r;
    look(h, &now);
    if (now.set && !q->guard_unsure && !memcmp(now.uuid, uuid, sizeof now.uuid))
        return 0;
    h->autoclear &= ~QCOW2_AUTOCLEAR_GUARD;
    qcow2_header_set_extension(h, QCOW2_EXT_GUARD, uuid, sizeof now.uuid);
    q->guard_unsure = true;
    r = write_durably(q);
    if (r == 0) {
        h->autoclear |= QCOW2_AUTOCLEAR_GUARD;
        r = write_durably(q);
    }
    if (r < 0) {
        h->autoclear &= ~QCOW2_AUTOCLEAR_GUARD;
        return error_set_errno(err, -r, "Could not update qcow2 header");
    }
    q->guard_unsure = false;
    return 0;
}

static int take_away(struct qcow2 *q, struct error *err)
{
    q->guard_unsure = true;
    int r = write_durably(q);
    if (r < 0)
        return error_set_errno(err, -r, "Could not update qcow2 header");
    q->guard_unsure = false;
    return 0;
}

int qcow2_guard_void(struct node *n, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct qcow2_header *h = &q->header;

    if (!q->guard_unsure && !(h->autoclear & QCOW2_AUTOCLEAR_GUARD))
        return 0;
    int r = check(q, err);
    if (r < 0)
        return r;
    h->autoclear &= ~QCOW2_AUTOCLEAR_GUARD;
    return take_away(q, err);
}

int qcow2_guard_clear(struct node *n, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct qcow2_header *h = &q->header;

    if (!q->guard_unsure && !(h->autoclear & QCOW2_AUTOCLEAR_GUARD) &&
        !qcow2_header_find_extension(h, QCOW2_EXT_GUARD))
        return 0;
    int r = check(q, err);
    if (r < 0)
        return r;
    h->autoclear &= ~QCOW2_AUTOCLEAR_GUARD;
    qcow2_header_set_extension(h, QCOW2_EXT_GUARD, NULL, 0);
    return take_away(q, err);
}
