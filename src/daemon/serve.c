/* tidemarkd IMAGE...: the short form, in terms of the long one. */
#include "daemon/daemon.h"

#include "rt/io.h"

#include <ctype.h>
#include <stdio.h>
#include <unistd.h>

char *runtime_path(void)
{
    const char *base = getenv("RUNTIME_DIRECTORY"); /* systemd made it for us alone */

    if (base && *base)
        return xstrdup(base);
    base = getenv("XDG_RUNTIME_DIR");
    return base && *base    ? xasprintf("%s/tidemark", base)
           : geteuid() == 0 ? xstrdup("/run/tidemark")
                            : xasprintf("/tmp/tidemark-%ld", (long)geteuid());
}

/* Made if need be, for nobody else to enter. */
static int runtime_directory(char **ret, struct error *err)
{
    CLEANUP(memory_freep) char *dir = runtime_path();

    int r = io_mkdir(dir, 0700);
    if (r < 0 && r != -EEXIST)
        return error_set_errno(err, -r, "making the runtime directory '%s'", dir);
    struct stat st;
    r = io_stat(dir, &st);
    if (r < 0)
        return error_set_errno(err, -r, "runtime directory '%s'", dir);
    if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid())
        return error_set(err, EPERM, "runtime directory '%s' is not a directory of ours", dir);
    *ret = steal(dir);
    return 0;
}

/* "disks/vm 1.qcow2" -> "vm-1", "nbd+unix:///vm?socket=s" -> "vm": a node name by QEMU's rules, at
 * most 31 bytes, not yet there. */
static void choose_name(struct graph *g, const char *filename, char name[32])
{
    size_t end = strstr(filename, "://") ? strcspn(filename, "?") : strlen(filename);
    CLEANUP(memory_freep) char *path = xasprintf("%.*s", (int)end, filename);
    const char *file = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    const char *dot = strrchr(file, '.');
    size_t n = dot && dot > file ? (size_t)(dot - file) : strlen(file);
    char stem[24];
    size_t at = 0;

    if (!isalpha((unsigned char)*file))
        at = (size_t)snprintf(stem, sizeof stem, "disk-");
    for (size_t i = 0; i < n && at < sizeof stem - 1; i++)
        stem[at++] = isalnum((unsigned char)file[i]) || strchr("._-", file[i]) ? file[i] : '-';
    stem[at] = '\0';
    snprintf(name, 32, "%s", stem);
    for (unsigned i = 2; graph_find(g, name); i++)
        snprintf(name, 32, "%s-%u", stem, i);
}

static int run(struct daemon *d, const char *command, struct json_object *args, struct error *err)
{
    return qmp_execute(d->qmp, qmp_command_find(command), args, SCHEMA_FROM_JSON, err);
}

static int serve_one(struct daemon *d, const char *path, const char *nbd_socket, struct error *err)
{
    char name[32];
    CLEANUP(node_unrefp) struct node *n = NULL;
    CLEANUP(json_putp) struct json_object *extra = json_object_new_object();
    CLEANUP(json_putp) struct json_object *export = json_object_new_object();

    choose_name(d->graph, path, name);
    json_add_string(extra, "node-name", name);
    json_add_string(extra, "discard", "unmap");
    if (d->persist)
        json_add(extra, "x-tidemark-persist", json_copy(d->persist));
    int r = graph_open_filename(d->graph, path, NULL, extra, false, &n, err);
    if (r < 0)
        return r;
    node_set_monitor_owned(n, true);
    json_add_string(export, "type", "nbd");
    json_add_string(export, "id", name);
    json_add_string(export, "node-name", name);
    json_add_bool(export, "writable", true);
    r = run(d, "block-export-add", export, err);
    if (r < 0)
        return error_wrap(err, "exporting '%s'", path);
    printf("%s: nbd+unix:///%s?socket=%s\n", path, name, nbd_socket);
    return 0;
}

int serve_images(struct daemon *d, char *const *images, size_t count, struct error *err)
{
    CLEANUP(memory_freep) char *dir = NULL;
    CLEANUP(json_putp) struct json_object *server = NULL;

    int r = runtime_directory(&dir, err);
    if (r < 0)
        return r;
    CLEANUP(memory_freep) char *nbd = xasprintf("%s/%ld.nbd", dir, (long)getpid());
    CLEANUP(memory_freep) char *qmp = xasprintf("%s/%ld.qmp", dir, (long)getpid());
    CLEANUP(memory_freep)
    char *chardev = xasprintf("socket,id=tidemark-qmp,path=%s,server=on,wait=off", qmp);

    if (!nbd_server_running(d->exports)) {
        struct json_object *data = json_object_new_object(), *addr = json_object_new_object();
        json_add_string(data, "path", nbd);
        json_add_string(addr, "type", "unix");
        json_add(addr, "data", data);
        server = json_object_new_object();
        json_add(server, "addr", addr);
        r = run(d, "nbd-server-start", server, err);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < count; i++) {
        r = serve_one(d, images[i], nbd, err);
        if (r < 0)
            return r;
    }
    bool help = false;
    r = chardev_add(d->chardevs, chardev, &help, err);
    if (r >= 0)
        r = chardev_monitor(d->chardevs, "tidemark-qmp", d->qmp, &d->monitors, 0, err);
    if (r < 0)
        return r;
    printf("QMP: %s\n", qmp);
    fflush(stdout);
    return 0;
}
