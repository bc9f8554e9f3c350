/* Run segments: files on tmpfs whose words are bitmaps. See segment.h. */
#include "persist/segment.h"

#include "base/broken.h"
#include "base/cursor.h"
#include "base/log.h"
#include "rt/clock.h"
#include "rt/io.h"

#include <ctype.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <unistd.h>

/* The header of a segment, little-endian: docs/format/segment.md. */
enum { HEADER_BYTES = 4096, HEADER_USED = 72, SESSION_AT = 24 };
static const uint8_t magic[8] = {'t', 'm', 's', 'e', 'g', 'm', 't', '1'};

struct segment {
    char *path; /* NULL: dropped */
    void *map;
    size_t length;
};

struct stamp {
    struct stamped {
        struct tide_id session;
        uint64_t last_write_ns;
        uint64_t in_flight;
    } * map;
};

/* ---- names ---- */

static char *path_of(const struct segments *of, const char *what)
{
    char hex[2 * sizeof of->uuid.bytes + 1];

    for (size_t i = 0; i < sizeof of->uuid.bytes; i++)
        snprintf(hex + 2 * i, 3, "%02x", of->uuid.bytes[i]);
    return xasprintf("%s/run-%s-%s", of->runtime, hex, what);
}

static char *segment_path(const struct segments *of, uint64_t epoch)
{
    char name[24];

    snprintf(name, sizeof name, "%llu", (unsigned long long)epoch);
    return path_of(of, name);
}

static void unlink_path(const char *path)
{
    int r = io_unlink(path);

    if (r < 0 && r != -ENOENT)
        log_warning("Could not remove the run segment '%s': %s", path, strerror(-r));
}

int segments_directory(const char *runtime, struct error *err)
{
    struct stat st;

    int r = io_mkdir(runtime, 0700);
    if (r == 0 || r == -EEXIST)
        r = io_stat(runtime, &st);
    if (r < 0)
        return error_set_errno(err, -r, "runtime directory '%s'", runtime);
    if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022))
        return error_set(err, EPERM, "runtime directory '%s' is not a directory of ours alone",
                         runtime);
    return 0;
}

const char *segments_doubt(const char *runtime)
{
    struct statfs fs;

    int fd = io_open(runtime, O_RDONLY | O_DIRECTORY, 0);
    int r = fd < 0 ? fd : io_fstatfs(fd, &fs);
    io_close(fd);
    if (r == 0 && fs.f_type != TMPFS_MAGIC && fs.f_type != RAMFS_MAGIC)
        return "is not on tmpfs: guests' writes may wait for its disk";
    if (strncmp(runtime, "/run/user/", 10) == 0)
        return "goes when its user logs out (unless he lingers: loginctl enable-linger): a kill is "
               "like a power loss then";
    return NULL;
}

/* ---- one segment ---- */

static void put_header(uint8_t *at, const struct tide_id *session, uint64_t epoch,
                       uint64_t size_bytes, uint64_t granularity_bytes,
                       const uint8_t boot[BOOT_ID_BYTES])
{
    struct out_cursor c = out_cursor_over(at, HEADER_USED);

    put_bytes(&c, magic, sizeof magic);
    put_bytes(&c, boot, BOOT_ID_BYTES);
    put_bytes(&c, session->bytes, sizeof session->bytes);
    put_le64(&c, epoch);
    put_le64(&c, size_bytes);
    put_le64(&c, granularity_bytes);
    put_le64(&c, ~epoch); /* the header is whole */
    assert(!c.overrun && c.at == c.end);
}

static size_t segment_bytes(uint64_t size_bytes, uint64_t granularity_bytes)
{
    return HEADER_BYTES + 8 * bitmap_word_count(size_bytes, granularity_bytes);
}

/* Opens or makes PATH with LENGTH bytes, all of them reserved, and maps it. */
static int map_file(const char *path, int flags, size_t length, void **ret, struct error *err)
{
    int fd = io_open(path, O_RDWR | flags, 0600);
    if (fd < 0)
        return error_set_errno(err, -fd, "Could not open the run segment '%s'", path);
    int r = io_fallocate(fd, 0, 0, length);
    if (r < 0)
        error_set_errno(err, -r, "Could not reserve %zu bytes for the run segment '%s'", length,
                        path);
    else if ((r = io_map(fd, length, ret)) < 0)
        error_set_errno(err, -r, "Could not map the run segment '%s'", path);
    io_close(fd);
    return r;
}

int segment_create(const struct segments *of, uint64_t epoch, uint64_t size_bytes,
                   uint64_t granularity_bytes, struct segment **ret, struct bitmap **bits,
                   struct error *err)
{
    CLEANUP(memory_freep) char *path = segment_path(of, epoch);
    const size_t length = segment_bytes(size_bytes, granularity_bytes);
    uint8_t boot[BOOT_ID_BYTES];
    void *map;

    int r = io_boot_id(boot);
    if (r < 0)
        return error_set_errno(err, -r, "Could not read this boot's id");
    unlink_path(path); /* of a program that was killed before it could name it */
    r = map_file(path, O_CREAT | O_EXCL, length, &map, err);
    if (r == 0) {
        uint64_t *words = (uint64_t *)((uint8_t *)map + HEADER_BYTES);
        *bits = bitmap_new_over_zeroes(words, size_bytes, granularity_bytes);
        if (!*bits) {
            io_unmap(map, length);
            r = error_set_errno(err, ENOMEM, "Could not map the run segment '%s'", path);
        }
    }
    if (r < 0) {
        io_unlink(path);
        return r;
    }
    put_header(map, &of->session, epoch, size_bytes, granularity_bytes, boot);
    struct segment *s = xnew(struct segment);
    *s = (struct segment){steal(path), map, length};
    *ret = s;
    return 0;
}

int segment_grow(struct segment *s, struct bitmap *bits, uint64_t size_bytes, struct error *err)
{
    const uint64_t granularity = bitmap_granularity(bits);
    const size_t length = segment_bytes(size_bytes, granularity);
    void *map;

    if (length <= s->length)
        return 0;
    int r = map_file(s->path, 0, length, &map, err);
    if (r < 0)
        return r;
    /* A copy of image and tide file that is used, too, has the same names. */
    if (memcmp(map, s->map, HEADER_USED)) {
        io_unmap(map, length);
        return error_set(err, ESTALE, "The run segment '%s' is another's", s->path);
    }
    r = bitmap_move(bits, (uint64_t *)((uint8_t *)map + HEADER_BYTES), size_bytes);
    if (r < 0) {
        io_unmap(map, length);
        return error_set_errno(err, -r, "Could not map the run segment '%s'", s->path);
    }
    io_unmap(s->map, s->length);
    s->map = map;
    s->length = length;
    return 0;
}

void segment_close(struct segment *s)
{
    if (!s)
        return;
    io_unmap(s->map, s->length);
    free(s->path);
    free(s);
}

void segment_remove(struct segment *s)
{
    if (!s)
        return;
    if (s->path)
        segment_drop(s);
    segment_close(s);
}

void segment_drop(struct segment *s)
{
    unlink_path(s->path);
    free(steal(s->path));
}

void segment_unlink(const struct segments *of, uint64_t epoch)
{
    CLEANUP(memory_freep) char *path = segment_path(of, epoch);

    unlink_path(path);
}

void segments_sweep(const struct segments *of, bool (*keep)(void *opaque, uint64_t epoch),
                    void *opaque)
{
    CLEANUP(memory_freep) char *names = NULL;
    CLEANUP(memory_freep) char *path = path_of(of, "");
    const char *stem = path + strlen(of->runtime) + 1;

    if (io_list(of->runtime, &names) < 0)
        return; /* they take room, no more */
    for (const char *name = names; *name; name += strlen(name) + 1) {
        const char *number = name + strlen(stem);
        char *end;
        if (strncmp(name, stem, strlen(stem)) || !isdigit((unsigned char)*number))
            continue;
        uint64_t epoch = strtoull(number, &end, 10);
        if (!*end && !keep(opaque, epoch))
            segment_unlink(of, epoch);
    }
}

/* The header says what the segment is of; the words may be of a larger disk (it was growing). */
static int check_header(const uint8_t *at, const struct tide_id *session, uint64_t epoch,
                        uint64_t granularity_bytes)
{
    uint8_t want[HEADER_USED], boot[BOOT_ID_BYTES];
    int r = io_boot_id(boot);

    if (r < 0)
        return r;
    struct cursor c = cursor_over(at + 48, 8);
    put_header(want, session, epoch, get_le64(&c), granularity_bytes, boot);
    if (BROKEN(segment_of_any_session))
        memcpy(want + SESSION_AT, at + SESSION_AT, sizeof session->bytes);
    return memcmp(at, want, HEADER_USED) ? -EBADMSG : 0;
}

int segment_read(const struct segments *of, uint64_t epoch, struct bitmap *bits, struct error *err)
{
    CLEANUP(memory_freep) char *path = segment_path(of, epoch);
    const uint64_t granularity = bitmap_granularity(bits);
    struct stat st;

    int fd = io_open(path, O_RDONLY, 0);
    if (fd < 0)
        return error_set_errno(err, -fd, "Could not open the run segment '%s'", path);
    int r = io_fstat(fd, &st);
    if (r == 0 && (uint64_t)st.st_size < HEADER_BYTES + 8)
        r = -EBADMSG;
    size_t length = r == 0 ? (size_t)st.st_size : 0;
    CLEANUP(memory_freep) uint8_t *copy = r == 0 ? malloc(align_up(length, 8)) : NULL;
    if (r == 0 && !copy)
        r = -ENOMEM;
    if (r == 0)
        r = io_pread_full(fd, copy, length, 0);
    io_close(fd);
    if (r == 0)
        r = check_header(copy, &of->session, epoch, granularity);
    /* So many granules has it words for. */
    uint64_t room = r == 0 ? (length - HEADER_BYTES) / 8 * 64 * granularity : 0;
    if (r == 0 && room < bitmap_size(bits))
        r = -EBADMSG;
    if (r < 0)
        return error_set_errno(err, -r, "The run segment '%s' cannot be used", path);
    CLEANUP(bitmap_freep)
    struct bitmap *found =
        bitmap_new_over((uint64_t *)(copy + HEADER_BYTES), bitmap_size(bits), granularity);
    if (!found)
        return error_set_errno(err, ENOMEM, "The run segment '%s' cannot be used", path);
    bitmap_merge(bits, found);
    return 0;
}

/* ---- the stamp ---- */

int stamp_create(const struct segments *of, struct stamp **ret, struct error *err)
{
    CLEANUP(memory_freep) char *path = path_of(of, "stamp");
    void *map;

    unlink_path(path);
    int r = map_file(path, O_CREAT | O_EXCL, HEADER_BYTES, &map, err);
    if (r < 0)
        return r;
    struct stamp *s = xnew(struct stamp);
    s->map = map;
    s->map->last_write_ns = clock_wall_us() * 1000;
    memcpy(&s->map->session, &of->session, sizeof of->session);
    *ret = s;
    return 0;
}

void stamp_close(struct stamp *s)
{
    if (!s)
        return;
    io_unmap(s->map, HEADER_BYTES);
    free(s);
}

void stamp_unlink(const struct segments *of)
{
    CLEANUP(memory_freep) char *path = path_of(of, "stamp");

    unlink_path(path);
}

void stamp_write_begun(struct stamp *s)
{
    s->map->in_flight++;
    stamp_beat(s);
}

void stamp_beat(struct stamp *s)
{
    s->map->last_write_ns = clock_wall_us() * 1000;
}

bool stamp_in_flight(const struct stamp *s)
{
    return s->map->in_flight > 0;
}

void stamp_write_done(struct stamp *s)
{
    stamp_beat(s);
    s->map->in_flight--;
}

int stamp_find(const struct segments *of, uint64_t *last_write_ns)
{
    CLEANUP(memory_freep) char *path = path_of(of, "stamp");
    struct stamped found;

    int fd = io_open(path, O_RDONLY, 0);
    if (fd < 0)
        return fd;
    int r = io_pread_full(fd, &found, sizeof found, 0);
    io_close(fd);
    if (r == 0 && !tide_id_equal(&found.session, &of->session))
        r = -ENOENT;
    if (r == 0)
        *last_write_ns = found.last_write_ns + (found.in_flight ? STAMP_SLACK_NS : 0);
    return r;
}
