/* What the tests of qcow2 share: images in memory, and qemu-img as a witness (where it is
 * installed; without it those parts of a test are left out, and the test says so). */
#pragma once

#include "blockutil.h"
#include "memdisk.h"
#include "qcow2check.h"

#include "block/qcow2/qcow2.h"

#include <stdarg.h>
#include <sys/wait.h>

PRINTF(2, 3) static inline char *json_text(char *buf, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(buf, 1024, fmt, ap);
    va_end(ap);
    for (char *p = buf; *p; p++)
        if (*p == '\'')
            *p = '"';
    return buf;
}

/* Makes an image on memdisk DISK; MORE: further options, beginning with a comma. */
static inline int try_create(struct graph *g, unsigned disk, uint64_t size, const char *more,
                             struct error *err)
{
    char text[1024];
    json_text(text, "{'driver':'qcow2','file':{'driver':'memdisk','disk':%u},'size':%llu%s}", disk,
              (unsigned long long)size, more);
    CLEANUP(json_putp) struct json_object *o = json_tokener_parse(text);
    CHECK(o);
    return graph_create(g, o, err);
}

static inline void create_ok(struct graph *g, unsigned disk, uint64_t size, const char *more)
{
    struct error err = ERROR_INIT;
    int r = try_create(g, disk, size, more, &err);
    CHECK_OK(r, err);
}

static inline struct node *open_image(struct graph *g, unsigned disk, const char *more)
{
    char text[1024];
    return open_ok(g, json_text(text, "{'driver':'qcow2','file':{'driver':'memdisk','disk':%u}%s}",
                                disk, more));
}

static inline const char *scratch_path(const char *name)
{
    static char path[4][256];
    static unsigned next;
    char *p = path[next++ % 4];
    const char *dir = getenv("TMPDIR");
    snprintf(p, 256, "%s/tidemark-qcow2-%d-%s", dir ? dir : unit_tmp(), (int)getpid(), name);
    return p;
}

static inline bool have_qemu_img(void)
{
    static int known = -1;
    if (known < 0)
        known = system("command -v qemu-img >/dev/null 2>&1") == 0;
    if (!known)
        print_message("no qemu-img here: its part of this test is left out\n");
    return known;
}

PRINTF(1, 2) static inline int run(const char *fmt, ...)
{
    char cmd[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(cmd, sizeof cmd, fmt, ap);
    va_end(ap);
    int r = system(cmd);
    return r < 0 ? r : WEXITSTATUS(r);
}

static inline void dump_disk(const struct memdisk *d, const char *path)
{
    FILE *f = fopen(path, "wb");
    CHECK(f);
    CHECK(fwrite(d->bytes, 1, d->size, f) == d->size);
    CHECK(fclose(f) == 0);
}

static inline void load_disk(unsigned disk, const char *path)
{
    memdisk_reset(disk);
    struct memdisk *d = &memdisks[disk];
    FILE *f = fopen(path, "rb");
    CHECK(f && fseek(f, 0, SEEK_END) == 0);
    uint64_t size = (uint64_t)ftell(f);
    rewind(f);
    memdisk_reserve(d, size + 1);
    CHECK(fread(d->bytes, 1, size, f) == size);
    d->size = size;
    fclose(f);
}

/* qemu-img check: 0 clean, 3 leaks only; anything else is printed and ends the test. */
static inline int check_disk(const struct memdisk *d, bool leaks_allowed)
{
    if (!have_qemu_img())
        return 0;
    const char *path = scratch_path("check");
    dump_disk(d, path);
    int r = run("qemu-img check -f qcow2 %s >%s.out 2>&1", path, path);
    if (r != 0 && !(r == 3 && leaks_allowed)) {
        run("tail -20 %s.out >&2", path);
        fprintf(stderr, "qemu-img check: %d; the image is %s\n", r, path);
        abort();
    }
    unlink(path);
    run("rm -f %s.out", path);
    return r;
}

/* Our own check, quick enough for thousands of cuts. NULL: nothing worse than leaks. */
static inline const char *disk_damage(const struct memdisk *d)
{
    return qcow2_damage(d->bytes, d->size);
}
