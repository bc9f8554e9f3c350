/* Character devices, and the monitors on them. See chardev.h. */
#include "daemon/chardev.h"

#include "base/id.h"
#include "base/log.h"
#include "rt/clock.h"
#include "rt/socket.h"

#include <stdio.h>

enum kind { CHARDEV_NULL, CHARDEV_STDIO, CHARDEV_SERVER, CHARDEV_CLIENT };

struct chardev {
    char *id;
    enum kind kind;
    struct qmp *qmp; /* of its monitor; NULL: it has none */
    struct scope *connections;
    unsigned monitor_flags;
    struct listener listener;
    int connected; /* CLIENT, or the first client of a SERVER that waited for it; -1: none */
    LIST_ENTRY(chardev) link;
};

struct chardevs {
    LIST_HEAD(, chardev) list;
    struct scope acceptors;
    bool daemonized, stdio_used;
};

static void chardev_free(struct chardev *c)
{
    listener_close(&c->listener);
    io_close(c->connected);
    free(c->id);
    free(c);
}
DEFINE_CLEANUP(struct chardev *, chardev_free, chardev_freep)

struct chardevs *chardevs_new(bool daemonized)
{
    struct chardevs *all = xnew(struct chardevs);

    LIST_INIT(&all->list);
    scope_init(&all->acceptors);
    all->daemonized = daemonized;
    return all;
}

void chardevs_free(struct chardevs *all)
{
    scope_fini(&all->acceptors);
    while (!LIST_EMPTY(&all->list)) {
        struct chardev *c = LIST_FIRST(&all->list);
        LIST_REMOVE(c, link);
        chardev_free(c);
    }
    free(all);
}

static struct chardev *find(struct chardevs *all, const char *id)
{
    struct chardev *c;
    LIST_FOREACH (c, &all->list, link)
        if (!strcmp(c->id, id))
            return c;
    return NULL;
}

/* ---- the grammar ---- */

/* What QEMU's --chardev knows; HERE: what we do with it. Others are refused by their name. */
static const struct {
    const char *name;
    bool here, is_bool;
} known[] = {
    {"backend", true, false},    {"path", true, false},       {"host", true, false},
    {"port", true, false},       {"fd", true, false},         {"to", true, false},
    {"ipv4", true, true},        {"ipv6", true, true},        {"server", true, true},
    {"wait", true, true},        {"abstract", true, true},    {"tight", true, true},
    {"delay", true, true},       {"nodelay", true, true},     {"input-path", false, false},
    {"localaddr", false, false}, {"localport", false, false}, {"reconnect", true, false},
    {"telnet", false, true},     {"tn3270", false, true},     {"tls-creds", false, false},
    {"tls-authz", false, false}, {"websocket", false, true},  {"width", false, false},
    {"height", false, false},    {"cols", false, false},      {"rows", false, false},
    {"mux", false, true},        {"signal", false, true},     {"name", false, false},
    {"debug", false, false},     {"size", false, false},      {"chardev", false, false},
    {"append", false, true},     {"logfile", false, false},   {"logappend", false, true},
    {"mouse", false, true},      {"clipboard", false, true},
};

static int know(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(known); i++)
        if (!strcmp(known[i].name, name))
            return (int)i;
    return -1;
}

/* The next "name=value", "flag" or "noflag"; the first one may be a value alone. */
static const char *next_option(const char *p, const char *implied, char **name, char **value)
{
    size_t word = strcspn(p, "=,");
    bool has_value = p[word] == '=';

    if (!has_value && !implied) {
        bool negated = !strncmp(p, "no", 2) && word >= 2;
        *name = strndup(p + 2 * negated, word - 2 * negated);
        *value = xstrdup(negated ? "off" : "on");
        if (strcmp(*name, "help") && strcmp(*name, "?")) {
            log_warning("short-form boolean option '%s%s' deprecated", negated ? "no" : "", *name);
            fprintf(stderr, "Please use %s=%s instead\n", *name, *value);
        }
        p += word;
    } else {
        *name = has_value ? strndup(p, word) : xstrdup(implied);
        p += has_value ? word + 1 : 0;
        char *to = *value = xcalloc(1, strlen(p) + 1);
        for (; *p && (*p != ',' || p[1] == ','); p++) {
            *to++ = *p;
            p += *p == ',';
        }
    }
    return *p == ',' ? p + 1 : p;
}

static int check_bool(const char *name, const char *value, struct error *err)
{
    static const char *const words[] = {"on", "yes", "true", "y", "off", "no", "false", "n"};
    for (size_t i = 0; i < ARRAY_SIZE(words); i++)
        if (!strcmp(value, words[i]))
            return 0;
    return error_set(err, EINVAL, "Parameter '%s' expects 'on' or 'off'", name);
}

static int check_number(const char *name, const char *value, struct error *err)
{
    char *end;

    errno = 0;
    (void)strtoull(value, &end, 0);
    if (errno == ERANGE)
        return error_set(err, ERANGE, "Value '%s' is too large for parameter '%s'", value, name);
    if (end == value || *end)
        return error_set(err, EINVAL, "Parameter '%s' expects a number", name);
    return 0;
}

/* "id" is looked for first, the rest is checked from left to right. */
static int parse(struct chardevs *all, const char *text, bool *help, struct json_object *options,
                 struct error *err)
{
    for (int pass = 0; pass < 2; pass++) {
        const char *implied = "backend";
        for (const char *p = text; *p; implied = NULL) {
            CLEANUP(memory_freep) char *name = NULL;
            CLEANUP(memory_freep) char *value = NULL;
            p = next_option(p, implied, &name, &value);
            bool is_id = !strcmp(name, "id");
            if (pass == 0 && is_id && !json_has(options, "id")) {
                json_add_string(options, "id", value);
                if (!id_well_formed(value))
                    return error_set(err, EINVAL, "Parameter 'id' expects an identifier");
            }
            if (pass == 0 || is_id)
                continue;
            bool asked = !strcmp(name, "backend") ? !strcmp(value, "help") || !strcmp(value, "?")
                                                  : !strcmp(name, "help") || !strcmp(name, "?");
            if (asked) {
                *help = true;
                return 0;
            }
            int k = know(name);
            if (k < 0)
                return error_set(err, EINVAL, "Invalid parameter '%s'", name);
            int r = 0;
            if (known[k].is_bool)
                r = check_bool(name, value, err);
            else if (!strcmp(name, "to") || !strcmp(name, "reconnect"))
                r = check_number(name, value, err);
            if (r < 0)
                return r;
            if (!known[k].here)
                return error_set(err, ENOTSUP, "chardev option '%s' is not supported", name);
            json_add_string(options, name, value);
        }
    }
    return 0;
}

/* ---- backends ---- */

static void copy_member(struct json_object *to, struct json_object *from, const char *name)
{
    if (json_has(from, name))
        json_add(to, name, json_object_get(json_get(from, name)));
}

static int socket_address(struct json_object *options, struct json_object **ret, struct error *err)
{
    CLEANUP(json_putp) struct json_object *addr = json_object_new_object();
    bool path = json_has(options, "path"), host = json_has(options, "host");

    if (path + host + json_has(options, "fd") > 1)
        return error_set(err, EINVAL, "None or one of 'path', 'fd' or 'host' option required.");
    if (host && !json_has(options, "port"))
        return error_set(err, EINVAL, "chardev: socket: no port given");
    if (json_has(options, "delay") && json_has(options, "nodelay"))
        return error_set(err, EINVAL, "'delay' and 'nodelay' are mutually exclusive");
    if (path) {
        json_add_string(addr, "type", "unix");
        copy_member(addr, options, "path");
        copy_member(addr, options, "abstract");
        copy_member(addr, options, "tight");
    } else if (host) {
        json_add_string(addr, "type", "inet");
        copy_member(addr, options, "host");
        copy_member(addr, options, "port");
        copy_member(addr, options, "to");
        copy_member(addr, options, "ipv4");
        copy_member(addr, options, "ipv6");
    } else {
        json_add_string(addr, "type", "fd");
        json_add_string(addr, "str", json_get_string(options, "fd", ""));
    }
    *ret = steal(addr);
    return 0;
}

static int open_socket(struct chardev *c, struct json_object *options, struct error *err)
{
    CLEANUP(json_putp) struct json_object *addr = NULL;
    bool server = json_get_bool(options, "server", false);

    int r = socket_address(options, &addr, err);
    if (r < 0)
        return r;
    if (server && json_has(options, "reconnect"))
        return error_set(err, EINVAL,
                         "'reconnect' option is incompatible with socket in server listen mode");
    if (json_get_uint(options, "reconnect", 0))
        return error_set(err, ENOTSUP, "chardev option 'reconnect' is not supported");
    if (!server) {
        if (json_has(options, "wait"))
            return error_set(err, EINVAL,
                             "'wait' option is incompatible with socket in client connect mode");
        c->kind = CHARDEV_CLIENT;
        c->connected = socket_connect(addr, err);
        return c->connected < 0 ? c->connected : 0;
    }
    c->kind = CHARDEV_SERVER;
    r = listener_open(&c->listener, addr, 128, err);
    if (r < 0 || !json_get_bool(options, "wait", true))
        return r;
    log_info("waiting for a connection on chardev '%s'", c->id);
    c->connected = io_accept(c->listener.fds[0]);
    return c->connected < 0 ? error_set_errno(err, -c->connected, "accept") : 0;
}

static int open_stdio(struct chardevs *all, struct chardev *c, struct error *err)
{
    if (all->daemonized)
        return error_set(err, EINVAL, "cannot use stdio with -daemonize");
    if (all->stdio_used)
        return error_set(err, EBUSY, "cannot use stdio by multiple character devices");
    all->stdio_used = true;
    c->kind = CHARDEV_STDIO;
    return 0;
}

int chardev_add(struct chardevs *all, const char *text, bool *help, struct error *err)
{
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    CLEANUP(chardev_freep) struct chardev *c = xnew(struct chardev);

    c->connected = -1;
    int r = parse(all, text, help, options, err);
    if (r < 0 || *help)
        return r;
    const char *id = json_get_string(options, "id", NULL);
    const char *backend = json_get_string(options, "backend", NULL);
    if (!id)
        return error_set(err, EINVAL, "chardev: no id specified");
    if (!backend)
        return error_set(err, EINVAL, "chardev: \"%s\" missing backend", id);
    if (find(all, id))
        return error_set(err, EEXIST,
                         "attempt to add duplicate property '%s' to object (type 'container')", id);
    c->id = xstrdup(id);
    if (!strcmp(backend, "socket"))
        r = open_socket(c, options, err);
    else if (!strcmp(backend, "stdio"))
        r = open_stdio(all, c, err);
    else if (!strcmp(backend, "null"))
        c->kind = CHARDEV_NULL;
    else
        return error_set(err, EINVAL, "'%s' is not a valid char driver name", backend);
    if (r < 0)
        return r;
    LIST_INSERT_HEAD(&all->list, c, link);
    (void)steal(c);
    return 0;
}

/* ---- monitors ---- */

struct acceptor {
    struct chardev *chardev;
    int fd;
};

static int accept_monitors(void *arg)
{
    CLEANUP(memory_freep) struct acceptor *a = arg;
    struct chardev *c = a->chardev;

    task_set_name("chardev");
    for (;;) {
        int fd = io_accept(a->fd);
        if (fd >= 0) {
            monitor_serve(c->qmp, c->connections, fd, fd, c->monitor_flags);
        } else if (fd == -ECANCELED) {
            return 0;
        } else if (fd != -ECONNABORTED) {
            log_warning("chardev '%s': accepting a connection: %s", c->id, strerror(-fd));
            if (sleep_until(clock_after_ns(NSEC_PER_SEC / 10)) < 0)
                return 0;
        }
    }
}

static void start(struct chardevs *all, struct chardev *c)
{
    if (c->kind == CHARDEV_STDIO)
        monitor_serve(c->qmp, c->connections, 0, 1, c->monitor_flags);
    if (c->connected >= 0) {
        int fd = c->connected;
        c->connected = -1; /* the monitor closes it */
        monitor_serve(c->qmp, c->connections, fd, fd, c->monitor_flags);
    }
    for (size_t i = 0; i < c->listener.count; i++) {
        struct acceptor *a = xnew(struct acceptor);
        *a = (struct acceptor){c, c->listener.fds[i]};
        scope_spawn(&all->acceptors, accept_monitors, a);
    }
}

int chardev_monitor(struct chardevs *all, const char *id, struct qmp *q, struct scope *s,
                    unsigned monitor_flags, struct error *err)
{
    struct chardev *c = find(all, id);

    if (!c)
        return error_set(err, ENOENT, "chardev \"%s\" not found", id);
    if (c->qmp)
        return error_set(err, EBUSY, "Device '%s' is in use", id);
    c->qmp = q;
    c->connections = s;
    c->monitor_flags = monitor_flags;
    return 0;
}

void chardevs_start(struct chardevs *all)
{
    struct chardev *c;
    LIST_FOREACH (c, &all->list, link)
        if (c->qmp)
            start(all, c);
}
