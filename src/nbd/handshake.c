/* Fixed newstyle negotiation: greeting, then options one by one until the client has an export
 * (EXPORT_NAME, GO) or leaves (ABORT). Options' data is read whole, up to NBD_MAX_OPTION, and
 * decoded by wire.c; longer data is passed over and refused. */
#include "block/driver.h"
#include "nbd/internal.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

static const char *option_name(uint32_t option)
{
    switch (option) {
    case NBD_OPT_EXPORT_NAME:
        return "export name";
    case NBD_OPT_ABORT:
        return "abort";
    case NBD_OPT_LIST:
        return "list";
    case 4:
        return "peek export";
    case NBD_OPT_STARTTLS:
        return "starttls";
    case NBD_OPT_INFO:
        return "info";
    case NBD_OPT_GO:
        return "go";
    case NBD_OPT_STRUCTURED_REPLY:
        return "structured reply";
    case NBD_OPT_LIST_META_CONTEXT:
        return "list meta context";
    case NBD_OPT_SET_META_CONTEXT:
        return "set meta context";
    default:
        return "<unknown>";
    }
}

/* ---- sending ---- */

static int send_bytes(struct connection *c, const void *bytes, size_t n)
{
    struct iovec iov = {(void *)bytes, n};
    return io_sendv_full(c->fd, &iov, 1);
}

/* One option reply: up to three pieces of data in a row. */
static int reply(struct connection *c, uint32_t option, uint32_t type, const struct iovec *pieces,
                 size_t count)
{
    uint8_t header[20];
    struct iovec iov[4] = {{header, sizeof header}};
    size_t length = 0;

    assert(count <= 3);
    for (size_t i = 0; i < count; i++) {
        iov[i + 1] = pieces[i];
        length += pieces[i].iov_len;
    }
    struct out_cursor out = out_cursor_over(header, sizeof header);
    nbd_put_option_reply(&out, option, type, (uint32_t)length);
    return io_sendv_full(c->fd, iov, (int)count + 1);
}

static int ack(struct connection *c, uint32_t option)
{
    return reply(c, option, NBD_REP_ACK, NULL, 0);
}

static int PRINTF(4, 5)
    refuse(struct connection *c, uint32_t option, uint32_t type, const char *fmt, ...)
{
    char text[512];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    struct iovec piece = {text, strlen(text)};
    return reply(c, option, type, &piece, 1);
}

static int refuse_unknown_export(struct connection *c, uint32_t option, struct nbd_string name)
{
    bool cut = name.length > 80;
    return refuse(c, option, NBD_REP_ERR_UNKNOWN, "export '%.*s%s' not present",
                  (int)(cut ? 80 : name.length), name.bytes, cut ? "..." : "");
}

/* ---- options ---- */

static unsigned flags_for(struct connection *c, struct export *e)
{
    return e->flags | (c->structured ? NBD_FLAG_SEND_DF : 0);
}

static void choose(struct connection *c, struct export *e)
{
    c->export = e;
    export_ref(e);
    TAILQ_INSERT_TAIL(&e->connections, c, in_export);
    /* Contexts chosen for another export are not this one's. */
    if (c->meta.export_serial != e->serial)
        c->meta.count = 0;
}

static int on_export_name(struct connection *c, const uint8_t *data, uint32_t length,
                          struct error *err)
{
    struct nbd_string name = {(const char *)data, length};
    uint8_t buf[NBD_EXPORT_NAME_REPLY_SIZE] = {0};

    /* This option has no way to say no but to hang up. */
    if (length > NBD_MAX_STRING)
        return error_set(err, EINVAL, "export name of %" PRIu32 " bytes", length);
    struct export *e = export_find_name(c->server->exports, name);
    if (!e)
        return error_set(err, ENOENT, "export '%.*s' not present", (int)min_u64(length, 80),
                         name.bytes);
    choose(c, e);
    struct out_cursor out = out_cursor_over(buf, sizeof buf);
    put_be64(&out, e->size_bytes);
    put_be16(&out, (uint16_t)flags_for(c, e));
    return send_bytes(c, buf, c->no_zeroes ? 10 : sizeof buf);
}

/* Sending waits, so the list may change under us: go by serial numbers, oldest first. */
static struct export *next_export(struct exports *x, uint64_t after)
{
    struct export *e, *next = NULL;

    TAILQ_FOREACH (e, &x->list, link)
        if (e->user_owned && e->serial > after)
            next = e;
    return next;
}

static int on_list(struct connection *c)
{
    uint64_t last = 0;

    for (;;) {
        struct export *e = next_export(c->server->exports, last);
        if (!e)
            return ack(c, NBD_OPT_LIST);
        const char *description = e->description ? e->description : "";
        uint8_t length[4];
        struct out_cursor out = out_cursor_over(length, sizeof length);
        struct iovec pieces[] = {{length, sizeof length},
                                 {e->name, strlen(e->name)},
                                 {(void *)description, strlen(description)}};
        put_be32(&out, (uint32_t)strlen(e->name));
        last = e->serial;
        export_ref(e);
        int r = reply(c, NBD_OPT_LIST, NBD_REP_SERVER, pieces, 3);
        export_unref(e);
        if (r < 0)
            return r;
    }
}

static int send_info(struct connection *c, uint32_t option, uint16_t info, const void *bytes,
                     size_t n)
{
    uint8_t kind[2];
    struct out_cursor out = out_cursor_over(kind, sizeof kind);
    struct iovec pieces[] = {{kind, sizeof kind}, {(void *)bytes, n}};

    put_be16(&out, info);
    return reply(c, option, NBD_REP_INFO, pieces, 2);
}

static int send_infos(struct connection *c, uint32_t option, struct export *e,
                      const struct nbd_info_request *q)
{
    struct node *n = e->edge->node;
    uint8_t buf[16];
    int r = 0;

    if (q->wants_name)
        r = send_info(c, option, NBD_INFO_NAME, q->name.bytes, q->name.length);
    if (r >= 0 && e->description)
        r = send_info(c, option, NBD_INFO_DESCRIPTION, e->description, strlen(e->description));
    if (r < 0)
        return r;

    /* Smaller requests work too; the true minimum is for who asked and will keep to it. */
    bool truly = option == NBD_OPT_INFO || q->wants_block_size;
    uint32_t least = truly ? node_request_alignment(n) : 1;
    uint64_t most =
        n->limits.max_transfer ? min_u64(n->limits.max_transfer, NBD_MAX_PAYLOAD) : NBD_MAX_PAYLOAD;
    struct out_cursor out = out_cursor_over(buf, sizeof buf);
    put_be32(&out, least);
    put_be32(&out, (uint32_t)max_u64(4096, least));
    put_be32(&out, (uint32_t)most);
    r = send_info(c, option, NBD_INFO_BLOCK_SIZE, buf, 12);
    if (r < 0)
        return r;

    out = out_cursor_over(buf, sizeof buf);
    put_be64(&out, e->size_bytes);
    put_be16(&out, (uint16_t)flags_for(c, e));
    return send_info(c, option, NBD_INFO_EXPORT, buf, 10);
}

static int on_info(struct connection *c, uint32_t option, const uint8_t *data, uint32_t length)
{
    struct nbd_info_request q;
    struct error bad = ERROR_INIT;

    if (nbd_info_decode(data, length, option_name(option), &q, &bad) < 0)
        return refuse(c, option, NBD_REP_ERR_INVALID, "%s", bad.text);
    struct export *e = export_find_name(c->server->exports, q.name);
    if (!e)
        return refuse_unknown_export(c, option, q.name);

    export_ref(e); /* sending waits: it may be removed meanwhile */
    int r = send_infos(c, option, e, &q);
    if (r >= 0 && option == NBD_OPT_GO && e->user_owned)
        choose(c, e);
    bool gone = !e->user_owned;
    export_unref(e);
    if (r >= 0 && gone)
        return refuse(c, option, NBD_REP_ERR_SHUTDOWN, "export '%.*s' is shutting down",
                      (int)min_u64(q.name.length, 80), q.name.bytes);
    return r < 0 ? r : ack(c, option);
}

/* ---- metadata contexts ---- */

static void want_all(struct export *e, struct meta_contexts *m, bool base, bool depth)
{
    m->base_allocation |= base;
    m->allocation_depth |= depth && e->allocation_depth;
    memset(m->bitmaps, 1, e->bitmap_count);
}

static bool has_prefix(struct nbd_string *s, const char *prefix)
{
    size_t n = strlen(prefix);

    if (s->length < n || memcmp(s->bytes, prefix, n))
        return false;
    s->bytes += n;
    s->length -= (uint32_t)n;
    return true;
}

/* What a query asks for; an unknown one asks for nothing. A bare prefix lists all below it,
 * and chooses nothing. */
static void match_query(struct export *e, struct nbd_string q, bool listing,
                        struct meta_contexts *m)
{
    if (q.length > NBD_MAX_STRING)
        return;
    if (has_prefix(&q, "base:")) {
        if (nbd_string_equals(q, "allocation") || (listing && !q.length))
            m->base_allocation = true;
        return;
    }
    if (!has_prefix(&q, "qemu:"))
        return;
    if (!q.length) {
        if (listing)
            want_all(e, m, false, true);
    } else if (nbd_string_equals(q, "allocation-depth")) {
        m->allocation_depth = e->allocation_depth;
    } else if (has_prefix(&q, "dirty-bitmap:")) {
        for (size_t i = 0; i < e->bitmap_count; i++)
            if (nbd_string_equals(q, dirty_name(e->bitmaps[i])) || (listing && !q.length))
                m->bitmaps[i] = true;
    }
}

static int send_context(struct connection *c, uint32_t option, uint32_t id, const char *prefix,
                        const char *name)
{
    uint8_t number[4];
    struct out_cursor out = out_cursor_over(number, sizeof number);
    struct iovec pieces[] = {
        {number, sizeof number}, {(void *)prefix, strlen(prefix)}, {(void *)name, strlen(name)}};

    put_be32(&out, option == NBD_OPT_LIST_META_CONTEXT ? 0 : id);
    return reply(c, option, NBD_REP_META_CONTEXT, pieces, 3);
}

static int send_contexts(struct connection *c, uint32_t option, struct export *e,
                         struct meta_contexts *m)
{
    int r = 0;

    if (m->base_allocation) {
        r = send_context(c, option, CONTEXT_BASE_ALLOCATION, "base:", "allocation");
        m->count++;
    }
    if (r >= 0 && m->allocation_depth) {
        r = send_context(c, option, CONTEXT_ALLOCATION_DEPTH, "qemu:", "allocation-depth");
        m->count++;
    }
    for (size_t i = 0; r >= 0 && i < e->bitmap_count; i++) {
        if (!m->bitmaps[i])
            continue;
        r = send_context(c, option, CONTEXT_FIRST_BITMAP + (uint32_t)i,
                         "qemu:dirty-bitmap:", dirty_name(e->bitmaps[i]));
        m->count++;
    }
    return r;
}

static int on_meta(struct connection *c, uint32_t option, const uint8_t *data, uint32_t length)
{
    bool listing = option == NBD_OPT_LIST_META_CONTEXT;
    struct nbd_meta_request q;
    struct error bad = ERROR_INIT;

    if (!listing && !c->structured)
        return refuse(c, option, NBD_REP_ERR_INVALID,
                      "request option '%s' when structured reply is not negotiated",
                      option_name(option));
    /* A SET that fails leaves nothing chosen. */
    if (!listing) {
        free(c->meta.bitmaps);
        c->meta = (struct meta_contexts){0};
    }
    if (nbd_meta_decode(data, length, option_name(option), &q, &bad) < 0)
        return refuse(c, option, NBD_REP_ERR_INVALID, "%s", bad.text);
    struct export *e = export_find_name(c->server->exports, q.name);
    if (!e)
        return refuse_unknown_export(c, option, q.name);

    CLEANUP(memory_freep) bool *bitmaps = xcalloc(e->bitmap_count + 1, sizeof *bitmaps);
    struct meta_contexts m = {.export_serial = e->serial, .bitmaps = bitmaps};
    struct nbd_string query;
    if (listing && !q.queries)
        want_all(e, &m, true, true);
    while (nbd_meta_next(&q, &query))
        match_query(e, query, listing, &m);

    export_ref(e);
    int r = send_contexts(c, option, e, &m);
    export_unref(e);
    if (r < 0)
        return r;
    if (!listing) {
        c->meta = m;
        (void)steal(bitmaps);
    }
    return ack(c, option);
}

/* ---- the conversation ---- */

static int on_structured_reply(struct connection *c)
{
    if (c->structured)
        return refuse(c, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_INVALID,
                      "structured reply already negotiated");
    c->structured = true;
    return ack(c, NBD_OPT_STRUCTURED_REPLY);
}

static int answer(struct connection *c, uint32_t option, const uint8_t *data, uint32_t length,
                  struct error *err)
{
    switch (option) {
    case NBD_OPT_LIST:
    case NBD_OPT_STARTTLS:
    case NBD_OPT_STRUCTURED_REPLY:
        if (length)
            return refuse(c, option, NBD_REP_ERR_INVALID, "option '%s' has unexpected length",
                          option_name(option));
    }
    switch (option) {
    case NBD_OPT_EXPORT_NAME:
        return on_export_name(c, data, length, err);
    case NBD_OPT_ABORT:
        (void)ack(c, option); /* the client may not wait for it */
        return 1;
    case NBD_OPT_LIST:
        return on_list(c);
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        return on_info(c, option, data, length);
    case NBD_OPT_STARTTLS:
        return refuse(c, option, NBD_REP_ERR_POLICY, "TLS not configured");
    case NBD_OPT_STRUCTURED_REPLY:
        return on_structured_reply(c);
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        return on_meta(c, option, data, length);
    default:
        return refuse(c, option, NBD_REP_ERR_UNSUP, "Unsupported option %" PRIu32 " (%s)", option,
                      option_name(option));
    }
}

static int one_option(struct connection *c, struct error *err)
{
    uint8_t header[NBD_OPTION_HEADER_SIZE];
    struct nbd_option_header h;

    int r = connection_read(c, header, sizeof header);
    if (r < 0)
        return r;
    r = nbd_option_decode(header, &h, err);
    if (r < 0)
        return r;
    if (!c->fixed_newstyle && h.option != NBD_OPT_EXPORT_NAME)
        return error_set(err, EINVAL, "Unsupported option %" PRIu32 " (%s)", h.option,
                         option_name(h.option));
    if (h.length > NBD_MAX_OPTION) {
        r = connection_skip(c, h.length);
        return r < 0 ? r
                     : refuse(c, h.option, NBD_REP_ERR_TOO_BIG,
                              "option '%s' has %" PRIu32 " bytes of data, more than %d",
                              option_name(h.option), h.length, NBD_MAX_OPTION);
    }
    CLEANUP(memory_freep) uint8_t *data = malloc(h.length + 1);
    if (!data)
        return -ENOMEM;
    r = connection_read(c, data, h.length);
    return r < 0 ? r : answer(c, h.option, data, h.length, err);
}

int handshake(struct connection *c, struct error *err)
{
    uint8_t greeting[18], answered[4];
    struct out_cursor out = out_cursor_over(greeting, sizeof greeting);

    put_be64(&out, NBD_INIT_MAGIC);
    put_be64(&out, NBD_OPTS_MAGIC);
    put_be16(&out, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    int r = send_bytes(c, greeting, sizeof greeting);
    if (r < 0)
        return r;

    r = connection_read(c, answered, sizeof answered);
    if (r < 0)
        return r;
    struct cursor in = cursor_over(answered, sizeof answered);
    uint32_t flags = get_be32(&in);
    if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))
        return error_set(err, EINVAL, "Unknown client flags 0x%" PRIx32 " received", flags);
    c->fixed_newstyle = flags & NBD_FLAG_FIXED_NEWSTYLE;
    c->no_zeroes = flags & NBD_FLAG_NO_ZEROES;

    while (!c->export) {
        r = one_option(c, err);
        if (r != 0)
            return r;
    }
    return 0;
}
