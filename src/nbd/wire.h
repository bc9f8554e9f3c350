/* NBD on the wire: the numbers, and the codec of everything that a client sends.
 *
 * Source: the NBD protocol document (NetworkBlockDevice/nbd doc/proto.md), "Newstyle
 * negotiation", "Option types", "Transmission phase". All integers are big endian. Nothing
 * here waits or touches an export: a test, a fuzzer and the server call the same functions. */
#pragma once

#include "base/cursor.h"
#include "base/error.h"
#include "base/range.h"

#define NBD_INIT_MAGIC UINT64_C(0x4e42444d41474943) /* "NBDMAGIC" */
#define NBD_OPTS_MAGIC UINT64_C(0x49484156454F5054) /* "IHAVEOPT" */
#define NBD_REP_MAGIC UINT64_C(0x3e889045565a9)
#define NBD_REQUEST_MAGIC UINT32_C(0x25609513)
#define NBD_SIMPLE_REPLY_MAGIC UINT32_C(0x67446698)
#define NBD_STRUCTURED_REPLY_MAGIC UINT32_C(0x668e33ef)

enum { NBD_FLAG_FIXED_NEWSTYLE = 1, NBD_FLAG_NO_ZEROES = 2 }; /* handshake, both ways */

enum nbd_transmission_flags {
    NBD_FLAG_HAS_FLAGS = 1 << 0,
    NBD_FLAG_READ_ONLY = 1 << 1,
    NBD_FLAG_SEND_FLUSH = 1 << 2,
    NBD_FLAG_SEND_FUA = 1 << 3,
    NBD_FLAG_SEND_TRIM = 1 << 5,
    NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6,
    NBD_FLAG_SEND_DF = 1 << 7,
    NBD_FLAG_CAN_MULTI_CONN = 1 << 8,
    NBD_FLAG_SEND_CACHE = 1 << 10,
    NBD_FLAG_SEND_FAST_ZERO = 1 << 11,
};

enum nbd_option {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_LIST = 3,
    NBD_OPT_STARTTLS = 5,
    NBD_OPT_INFO = 6,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
    NBD_OPT_LIST_META_CONTEXT = 9,
    NBD_OPT_SET_META_CONTEXT = 10,
};

#define NBD_REP_ACK UINT32_C(1)
#define NBD_REP_SERVER UINT32_C(2)
#define NBD_REP_INFO UINT32_C(3)
#define NBD_REP_META_CONTEXT UINT32_C(4)
#define NBD_REP_ERR(n) (UINT32_C(1) << 31 | (n))
#define NBD_REP_ERR_UNSUP NBD_REP_ERR(1)
#define NBD_REP_ERR_POLICY NBD_REP_ERR(2)
#define NBD_REP_ERR_INVALID NBD_REP_ERR(3)
#define NBD_REP_ERR_UNKNOWN NBD_REP_ERR(6)
#define NBD_REP_ERR_SHUTDOWN NBD_REP_ERR(7)
#define NBD_REP_ERR_TOO_BIG NBD_REP_ERR(9)

enum nbd_info {
    NBD_INFO_EXPORT = 0,
    NBD_INFO_NAME = 1,
    NBD_INFO_DESCRIPTION = 2,
    NBD_INFO_BLOCK_SIZE = 3,
};

enum nbd_command {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7,
};
const char *nbd_command_name(unsigned type); /* "read", ...; "<unknown>" */

enum nbd_command_flags {
    NBD_CMD_FLAG_FUA = 1 << 0,
    NBD_CMD_FLAG_NO_HOLE = 1 << 1,
    NBD_CMD_FLAG_DF = 1 << 2,
    NBD_CMD_FLAG_REQ_ONE = 1 << 3,
    NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
};

enum { NBD_REPLY_FLAG_DONE = 1 };
enum nbd_chunk_type {
    NBD_REPLY_TYPE_NONE = 0,
    NBD_REPLY_TYPE_OFFSET_DATA = 1,
    NBD_REPLY_TYPE_OFFSET_HOLE = 2,
    NBD_REPLY_TYPE_BLOCK_STATUS = 5,
    NBD_REPLY_TYPE_ERROR = 1 << 15 | 1,
};

enum { NBD_STATE_HOLE = 1, NBD_STATE_ZERO = 2, NBD_STATE_DIRTY = 1 };

enum {
    NBD_MAX_PAYLOAD = 32 << 20,  /* bytes of one read or write */
    NBD_MAX_STRING = 4096,       /* a name, a description, a context */
    NBD_MAX_OPTION = 256 << 10,  /* bytes of one option's data that we look at */
    NBD_MAX_EXTENTS = 128 << 10, /* in one block status reply: 1 MiB of them */
    NBD_OPTION_HEADER_SIZE = 16,
    NBD_REQUEST_SIZE = 28,
    NBD_SIMPLE_REPLY_SIZE = 16,
    NBD_CHUNK_SIZE = 20,
    NBD_EXPORT_NAME_REPLY_SIZE = 8 + 2 + 124,
};

/* The protocol's error number for an errno: what has no number is EINVAL. */
uint32_t nbd_error(int code);

/* ---- from the client ---- */

struct nbd_option_header {
    uint32_t option;
    uint32_t length; /* bytes of data that follow */
};
int nbd_option_decode(const uint8_t buf[NBD_OPTION_HEADER_SIZE], struct nbd_option_header *h,
                      struct error *err);

/* A string in the option's data: not terminated, lent from it. */
struct nbd_string {
    const char *bytes;
    uint32_t length;
};
bool nbd_string_equals(struct nbd_string s, const char *text);

/* NBD_OPT_INFO and NBD_OPT_GO. */
struct nbd_info_request {
    struct nbd_string name;
    bool wants_name, wants_block_size;
};
int nbd_info_decode(const uint8_t *data, size_t length, const char *option,
                    struct nbd_info_request *q, struct error *err);

/* NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: the name now, the queries one by one. */
struct nbd_meta_request {
    struct nbd_string name;
    uint32_t queries;
    struct cursor rest;
};
int nbd_meta_decode(const uint8_t *data, size_t length, const char *option,
                    struct nbd_meta_request *q, struct error *err);
/* True: the next query; false when none is left. nbd_meta_decode has checked them all. */
bool nbd_meta_next(struct nbd_meta_request *q, struct nbd_string *query);

struct nbd_request {
    uint16_t flags;
    uint16_t type;
    uint64_t cookie; /* as it came: it goes back unchanged */
    uint64_t offset;
    uint32_t length;
};
int nbd_request_decode(const uint8_t buf[NBD_REQUEST_SIZE], struct nbd_request *rq,
                       struct error *err);

/* May this request be answered on an export of SIZE bytes? 0, or -errno with the text that the
 * client gets. */
int nbd_request_check(const struct nbd_request *rq, uint64_t size_bytes, bool read_only,
                      bool structured, struct error *err);

/* ---- to the client ---- */

void nbd_put_option_reply(struct out_cursor *c, uint32_t option, uint32_t type, uint32_t length);
void nbd_put_simple_reply(struct out_cursor *c, uint64_t cookie, uint32_t error);
void nbd_put_chunk(struct out_cursor *c, uint16_t flags, uint16_t type, uint64_t cookie,
                   uint32_t length);

/* Extents of one context: merges neighbours of the same flags, stops at its capacity. */
struct nbd_extents {
    uint8_t *wire; /* pairs of be32: length, flags */
    uint32_t count, capacity;
    uint32_t last_length, last_flags;
    uint64_t total;
};
/* False: full; nothing was added. LENGTH in bytes, the sum of all below 2^32. */
bool nbd_extents_add(struct nbd_extents *e, uint64_t length, uint32_t flags);
/* Bytes of `wire` in use; call once at the end. */
size_t nbd_extents_finish(struct nbd_extents *e);
