#include "nbd/wire.h"

#include <inttypes.h>

const char *nbd_command_name(unsigned type)
{
    static const char *const names[] = {
        [NBD_CMD_READ] = "read",
        [NBD_CMD_WRITE] = "write",
        [NBD_CMD_DISC] = "disconnect",
        [NBD_CMD_FLUSH] = "flush",
        [NBD_CMD_TRIM] = "trim",
        [NBD_CMD_CACHE] = "cache",
        [NBD_CMD_WRITE_ZEROES] = "write zeroes",
        [NBD_CMD_BLOCK_STATUS] = "block status",
    };
    return type < ARRAY_SIZE(names) ? names[type] : "<unknown>";
}

uint32_t nbd_error(int code)
{
    switch (code) {
    case 0:
        return 0;
    case EPERM:
    case EROFS:
        return 1;
    case EIO:
        return 5;
    case ENOMEM:
        return 12;
    case EFBIG:
    case ENOSPC:
    case EDQUOT:
        return 28;
    case EOVERFLOW:
        return 75;
    case ENOTSUP:
        return 95;
    case ESHUTDOWN:
        return 108;
    default:
        return 22; /* EINVAL */
    }
}

/* ---- options ---- */

int nbd_option_decode(const uint8_t buf[NBD_OPTION_HEADER_SIZE], struct nbd_option_header *h,
                      struct error *err)
{
    struct cursor c = cursor_over(buf, NBD_OPTION_HEADER_SIZE);

    uint64_t magic = get_be64(&c);
    if (magic != NBD_OPTS_MAGIC)
        return error_set(err, EINVAL, "option magic is 0x%016" PRIx64, magic);
    h->option = get_be32(&c);
    h->length = get_be32(&c);
    if (h->length > NBD_MAX_PAYLOAD)
        return error_set(err, EINVAL,
                         "option %" PRIu32 " has %" PRIu32 " bytes of data, more than %d",
                         h->option, h->length, NBD_MAX_PAYLOAD);
    return 0;
}

bool nbd_string_equals(struct nbd_string s, const char *text)
{
    return strlen(text) == s.length && !memcmp(s.bytes, text, s.length);
}

/* A be32 length and so many bytes without NUL. */
static int get_string(struct cursor *c, const char *option, struct nbd_string *s, struct error *err)
{
    s->length = get_be32(c);
    if (!c->overrun && s->length > NBD_MAX_STRING)
        return error_set(err, EINVAL, "Invalid name length: %" PRIu32, s->length);
    s->bytes = (const char *)get_bytes(c, s->length);
    if (c->overrun)
        return error_set(err, EINVAL, "Inconsistent lengths in option %s", option);
    if (memchr(s->bytes, 0, s->length))
        return error_set(err, EINVAL, "Unexpected embedded NUL in option %s", option);
    return 0;
}

int nbd_info_decode(const uint8_t *data, size_t length, const char *option,
                    struct nbd_info_request *q, struct error *err)
{
    struct cursor c = cursor_over(data, length);

    *q = (struct nbd_info_request){0};
    int r = get_string(&c, option, &q->name, err);
    if (r < 0)
        return r;
    for (unsigned n = get_be16(&c); n > 0; n--) {
        unsigned info = get_be16(&c);
        if (c.overrun)
            break;
        q->wants_name |= info == NBD_INFO_NAME;
        q->wants_block_size |= info == NBD_INFO_BLOCK_SIZE;
    }
    if (c.overrun)
        return error_set(err, EINVAL, "Inconsistent lengths in option %s", option);
    if (cursor_left(&c))
        return error_set(err, EINVAL, "option '%s' has unexpected length", option);
    return 0;
}

/* A context's name may be longer than any we know: then it is passed over, not an error. */
static int get_query(struct cursor *c, const char *option, struct nbd_string *query,
                     struct error *err)
{
    query->length = get_be32(c);
    query->bytes = (const char *)get_bytes(c, query->length);
    if (c->overrun)
        return error_set(err, EINVAL, "Inconsistent lengths in option %s", option);
    if (query->length <= NBD_MAX_STRING && memchr(query->bytes, 0, query->length))
        return error_set(err, EINVAL, "Unexpected embedded NUL in option %s", option);
    return 0;
}

int nbd_meta_decode(const uint8_t *data, size_t length, const char *option,
                    struct nbd_meta_request *q, struct error *err)
{
    struct cursor c = cursor_over(data, length);

    *q = (struct nbd_meta_request){0};
    int r = get_string(&c, option, &q->name, err);
    if (r < 0)
        return r;
    q->queries = get_be32(&c);
    if (c.overrun)
        return error_set(err, EINVAL, "Inconsistent lengths in option %s", option);
    q->rest = c;
    for (uint32_t i = 0; i < q->queries; i++) {
        struct nbd_string query;
        r = get_query(&c, option, &query, err);
        if (r < 0)
            return r;
    }
    if (cursor_left(&c))
        return error_set(err, EINVAL, "option '%s' has unexpected length", option);
    return 0;
}

bool nbd_meta_next(struct nbd_meta_request *q, struct nbd_string *query)
{
    if (!q->queries)
        return false;
    q->queries--;
    return get_query(&q->rest, "", query, NULL) == 0;
}

/* ---- requests ---- */

int nbd_request_decode(const uint8_t buf[NBD_REQUEST_SIZE], struct nbd_request *rq,
                       struct error *err)
{
    struct cursor c = cursor_over(buf, NBD_REQUEST_SIZE);

    uint32_t magic = get_be32(&c);
    if (magic != NBD_REQUEST_MAGIC)
        return error_set(err, EINVAL, "invalid magic (got 0x%" PRIx32 ")", magic);
    rq->flags = get_be16(&c);
    rq->type = get_be16(&c);
    memcpy(&rq->cookie, get_bytes(&c, 8), 8);
    rq->offset = get_be64(&c);
    rq->length = get_be32(&c);
    return 0;
}

int nbd_request_check(const struct nbd_request *rq, uint64_t size_bytes, bool read_only,
                      bool structured, struct error *err)
{
    bool writes = rq->type == NBD_CMD_WRITE || rq->type == NBD_CMD_WRITE_ZEROES;
    unsigned allowed = NBD_CMD_FLAG_FUA;

    if ((rq->type == NBD_CMD_READ || rq->type == NBD_CMD_WRITE || rq->type == NBD_CMD_CACHE) &&
        rq->length > NBD_MAX_PAYLOAD)
        return error_set(err, EINVAL, "len (%" PRIu32 " ) is larger than max len (%d)", rq->length,
                         NBD_MAX_PAYLOAD);
    if (read_only && (writes || rq->type == NBD_CMD_TRIM))
        return error_set(err, EROFS, "Export is read-only");
    if (!range_fits(rq->offset, rq->length, size_bytes))
        return error_set(err, writes ? ENOSPC : EINVAL,
                         "operation past EOF; From: %" PRIu64 ", Len: %" PRIu32 ", Size: %" PRIu64,
                         rq->offset, rq->length, size_bytes);
    switch (rq->type) {
    case NBD_CMD_READ:
        allowed |= structured ? NBD_CMD_FLAG_DF : 0;
        break;
    case NBD_CMD_WRITE_ZEROES:
        allowed |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
        break;
    case NBD_CMD_BLOCK_STATUS:
        allowed |= NBD_CMD_FLAG_REQ_ONE;
        break;
    }
    if (rq->flags & ~allowed)
        return error_set(err, EINVAL, "unsupported flags for command %s (got 0x%x)",
                         nbd_command_name(rq->type), rq->flags);
    return 0;
}

/* ---- replies ---- */

void nbd_put_option_reply(struct out_cursor *c, uint32_t option, uint32_t type, uint32_t length)
{
    put_be64(c, NBD_REP_MAGIC);
    put_be32(c, option);
    put_be32(c, type);
    put_be32(c, length);
}

void nbd_put_simple_reply(struct out_cursor *c, uint64_t cookie, uint32_t error)
{
    put_be32(c, NBD_SIMPLE_REPLY_MAGIC);
    put_be32(c, error);
    put_bytes(c, &cookie, 8);
}

void nbd_put_chunk(struct out_cursor *c, uint16_t flags, uint16_t type, uint64_t cookie,
                   uint32_t length)
{
    put_be32(c, NBD_STRUCTURED_REPLY_MAGIC);
    put_be16(c, flags);
    put_be16(c, type);
    put_bytes(c, &cookie, 8);
    put_be32(c, length);
}

static void write_last(struct nbd_extents *e)
{
    struct out_cursor c = out_cursor_over(e->wire + 8 * (size_t)(e->count - 1), 8);
    put_be32(&c, e->last_length);
    put_be32(&c, e->last_flags);
}

bool nbd_extents_add(struct nbd_extents *e, uint64_t length, uint32_t flags)
{
    if (!length)
        return true;
    assert(e->total + length <= UINT32_MAX);
    if (e->count && e->last_flags == flags) {
        e->last_length += (uint32_t)length;
        e->total += length;
        return true;
    }
    if (e->count == e->capacity)
        return false;
    if (e->count)
        write_last(e);
    e->count++;
    e->last_length = (uint32_t)length;
    e->last_flags = flags;
    e->total += length;
    return true;
}

size_t nbd_extents_finish(struct nbd_extents *e)
{
    if (e->count)
        write_last(e);
    return 8 * (size_t)e->count;
}
