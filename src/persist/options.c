/* What a node's options say of its bitmaps, and where its tide file is. See options.h.
 *
 * The name in a state directory must be the same for the same disk, also after a boot in which the
 * kernel has found its disks in another order: so for a device it is what the device itself is
 * called (a volume's or a partition's uuid, a world wide name), or else the name that the user has
 * given, and never what that leads to. */
#include "persist/options.h"

#include "block/driver.h"
#include "block/nbd.h"
#include "block/qcow2/bitmaps.h"
#include "persist/device.h"
#include "rt/io.h"

#include <ctype.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/vfs.h>

enum { LEVEL_REGION_BITS = 24, NAME_BYTES_MAX = 240 };
#define BUDGET_BYTES (16 * GiB)
#define REGION_BYTES_MIN MiB
/* An idle checkpoint makes the next write wait for a sync, so one in 2 s costs a guest 0.5 % at
 * most where a sync takes 10 ms. The others: docs/checkpoints.md. */
#define IDLE_MS 2000
#define PERIOD_MS 60000
#define FLUSH_REST_NS NSEC_PER_SEC
#define NSEC_PER_MSEC (NSEC_PER_SEC / 1000)

void place_fini(struct place *p)
{
    free(p->tide);
    free(p->why_none);
}

/* ---- level and sizes ---- */

static int read_level(const char *level, struct keeper_options *o, struct place *p,
                      struct error *err)
{
    p->off = !strcmp(level, "off");
    if (!p->off && strcmp(level, "power") && strcmp(level, "process"))
        return error_set(err, EINVAL, "invalid parameter value: %s", level);
    o->level = strcmp(level, "process") ? TIDE_POWER : TIDE_PROCESS;
    return 0;
}

static int read_sizes(const struct node *n, struct json_object *options, struct keeper_options *o,
                      struct error *err)
{
    uint64_t region = json_get_uint(options, "region-size", UINT64_C(1) << LEVEL_REGION_BITS);
    uint64_t budget = json_get_uint(options, "budget", BUDGET_BYTES);

    if (!is_power_of_2(region) || region < REGION_BYTES_MIN)
        return error_set(err, EINVAL,
                         "Parameter 'region-size' is %llu, not a power of two from %llu on",
                         (unsigned long long)region, (unsigned long long)REGION_BYTES_MIN);
    uint64_t slots = budget / region;
    if (slots < TIDE_SLOTS_MIN || slots > TIDE_SLOTS_MAX)
        return error_set(err, EINVAL,
                         "Parameter 'budget' is %llu, which is %llu regions of %llu bytes, not "
                         "%u..%u",
                         (unsigned long long)budget, (unsigned long long)slots,
                         (unsigned long long)region, TIDE_SLOTS_MIN, TIDE_SLOTS_MAX);
    if (node_size(n) / region >= REGION_NONE)
        return error_set(err, EINVAL, "Parameter 'region-size' is %llu: too little for %llu bytes",
                         (unsigned long long)region, (unsigned long long)node_size(n));
    o->region_bits = (unsigned)__builtin_ctzll(region);
    o->slots = (unsigned)slots;
    return 0;
}

/* Of the regions that can be hot, half: cleaning takes as many at once, and who works in fewer
 * never has them cleaned for their number. */
static void read_checkpoints(struct json_object *options, struct keeper_options *o)
{
    uint64_t amount =
        json_get_uint(options, "checkpoint-amount", (uint64_t)(o->slots / 2) << o->region_bits);

    o->checkpoints = (struct checkpoint_options){
        .idle_ns = json_get_uint(options, "checkpoint-idle", IDLE_MS) * NSEC_PER_MSEC,
        .period_ns = json_get_uint(options, "checkpoint-period", PERIOD_MS) * NSEC_PER_MSEC,
        .flush = json_get_bool(options, "checkpoint-flush", true),
        .flush_rest_ns = FLUSH_REST_NS,
        .marked_max = (unsigned)min_u64(amount >> o->region_bits, o->slots),
    };
    if (amount && !o->checkpoints.marked_max) /* less than a region */
        o->checkpoints.marked_max = 1;
}

static int read_no_witness(const char *s, struct keeper_options *o, struct error *err)
{
    static const char *const names[] = {"believe", "refuse", "distrust"};

    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (!strcmp(s, names[i])) {
            o->no_witness = (enum no_witness)i;
            return 0;
        }
    return error_set(err, EINVAL, "invalid parameter value: %s", s);
}

/* ---- the place ---- */

/* One name for a file, and no two texts have the same. */
static char *as_name(const char *text)
{
    char *name = xcalloc(3 * strlen(text) + sizeof ".tide", 1), *at = name;

    for (const unsigned char *p = (const unsigned char *)text; *p; p++)
        if (isalnum(*p) || *p == '_' || *p == '-' || (*p == '.' && at > name))
            *at++ = (char)*p;
        else
            at += snprintf(at, 4, "%%%02X", *p);
    memcpy(at, ".tide", sizeof ".tide");
    return name;
}

static int place_in(const char *directory, const char *text, char **ret, struct error *err)
{
    CLEANUP(memory_freep) char *name = as_name(text);

    if (strlen(name) > NAME_BYTES_MAX)
        return error_set(err, ENAMETOOLONG,
                         "'%s' makes a name of %zu bytes in 'state-directory', more than %d: give "
                         "a 'tide-file'",
                         text, strlen(name), NAME_BYTES_MAX);
    *ret = xasprintf("%s/%s", directory, name);
    return 0;
}

/* Given places only: beside the image it lives as long as the image does. */
static int check_lasts(const char *path, struct error *err)
{
    const char *slash = strrchr(path, '/');
    CLEANUP(memory_freep)
    char *directory = slash ? xasprintf("%.*s", (int)(slash - path) + 1, path) : xstrdup(".");
    struct statfs fs;

    int fd = io_open(directory, O_RDONLY | O_DIRECTORY, 0);
    int r = fd < 0 ? fd : io_fstatfs(fd, &fs);
    if (fd >= 0)
        io_close(fd);
    if (r < 0)
        return error_set_errno(err, -r, "tide file '%s': directory '%s'", path, directory);
    if (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC)
        return error_set(err, EINVAL,
                         "tide file '%s' is on tmpfs, which is gone with the power: level 'power' "
                         "needs another place, or take level 'process'",
                         path);
    return 0;
}

static int find_place(const struct node *n, struct json_object *options,
                      const struct keeper_options *o, struct place *p, struct error *err)
{
    const char *file = json_get_string(options, "tide-file", NULL);
    const char *directory = json_get_string(options, "state-directory", NULL);
    CLEANUP(memory_freep) char *resolved = NULL;
    CLEANUP(memory_freep) char *name = NULL;
    struct stat st;
    int r = 0;

    if (file && directory)
        return error_set(err, EINVAL,
                         "Parameters 'tide-file' and 'state-directory' cannot be used together");
    if ((file && !*file) || (directory && !*directory))
        return error_set(err, EINVAL, "Parameter '%s' is empty",
                         file ? "tide-file" : "state-directory");
    const struct node *below = n;
    for (struct edge *e; (e = node_primary(below));)
        below = e->node;
    bool named =
        !strcmp(node_driver_name(below), "file") || !strcmp(node_driver_name(below), "host_device");
    bool remote = !strcmp(node_driver_name(below), "nbd");
    bool device =
        named && io_stat(below->filename, &st) == 0 && (S_ISBLK(st.st_mode) || S_ISCHR(st.st_mode));
    if (file) {
        p->tide = xstrdup(file);
    } else if (remote && !directory) {
        p->why_none = xasprintf("'%s' is on another machine, and nothing is beside it: a "
                                "'state-directory' or a 'tide-file' in 'x-tidemark-persist' must "
                                "be given",
                                node_filename(below));
    } else if (remote) {
        name = nbd_disk_name(below);
        r = place_in(directory, name, &p->tide, err);
    } else if (!named || !*below->filename) {
        p->why_none = xstrdup("its image has no name: a 'tide-file' in 'x-tidemark-persist' must "
                              "be given");
    } else if (device && !directory) {
        p->why_none = xasprintf("'%s' is a device, and a file beside it would be gone with the "
                                "power: a 'state-directory' or a 'tide-file' in "
                                "'x-tidemark-persist' must be given",
                                below->filename);
    } else if (device) {
        name = S_ISBLK(st.st_mode) ? device_name(&st) : NULL;
        r = place_in(directory, name ? name : below->filename, &p->tide, err);
    } else if ((r = io_realpath(below->filename, &resolved)) < 0) {
        r = 0;
        p->why_none = xasprintf("'%s' cannot be resolved", below->filename);
    } else if (directory) {
        r = place_in(directory, resolved, &p->tide, err);
    } else {
        p->tide = xasprintf("%s.tide", resolved);
    }
    if (r == 0 && (file || directory) && !p->off && o->level == TIDE_POWER)
        r = check_lasts(p->tide, err);
    return r;
}

/* Bitmaps that a tide file has would not see what is written now. */
static int check_off(const struct node *n, const struct place *p, struct error *err)
{
    struct stat st;

    if (!p->tide || io_stat(p->tide, &st) < 0)
        return 0;
    return error_set(err, EBUSY,
                     "tide file '%s' has bitmaps of this image, and level 'off' would not keep "
                     "them: remove it first, if they are not needed",
                     p->tide);
}

int persist_options_read(const struct node *n, struct keeper_options *o, struct place *ret,
                         struct error *err)
{
    struct json_object *options = json_get(n->options, "x-tidemark-persist");

    *ret = (struct place){0};
    if (options && !json_object_is_type(options, json_type_object))
        return error_set(err, EINVAL,
                         "Invalid parameter type for 'x-tidemark-persist', expected: object");
    int r = read_level(json_get_string(options, "level", "power"), o, ret, err);
    if (r == 0)
        r = read_sizes(n, options, o, err);
    if (r == 0)
        read_checkpoints(options, o);
    if (r == 0)
        r = read_no_witness(json_get_string(options, "no-witness", "believe"), o, err);
    if (r == 0)
        r = find_place(n, options, o, ret, err);
    /* A qcow2 image takes back what it says of its tide file. */
    if (r == 0 && ret->off && !o->image && !n->read_only)
        r = check_off(n, ret, err);
    o->runtime = json_get_string(options, "runtime-directory", o->runtime);
    return r;
}

int persist_options_may_write(const struct node *n, struct error *err)
{
    CLEANUP(place_fini) struct place place = {0};
    struct keeper_options o = {0};

    int r = persist_options_read(n, &o, &place, err);
    return r == 0 && place.off ? check_off(n, &place, err) : r;
}
