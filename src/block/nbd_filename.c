/* Names of NBD disks: "nbd://HOST[:PORT]/EXPORT", "nbd+unix:///EXPORT?socket=PATH", the older
 * "nbd:HOST:PORT[:exportname=EXPORT]" and "nbd:unix:PATH[:exportname=EXPORT]", and the options that
 * all of them are turned into. Which names are taken, and the texts, are QEMU's. */
#include "block/nbd.h"

#include "rt/io.h"

#include <ctype.h>
#include <stdio.h>

/* ---- the parts of an URI ---- */

static int hex_digit(char c)
{
    return isdigit((unsigned char)c)        ? c - '0'
           : c && strchr("abcdefABCDEF", c) ? (c | 0x20) - 'a' + 10
                                            : -1;
}

/* N bytes at TEXT with %XX taken back; NULL: a NUL would be in it. */
static char *unescaped(const char *text, size_t n)
{
    char *out = xcalloc(n + 1, 1), *at = out;

    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (c == '%' && n - i > 2 && hex_digit(text[i + 1]) >= 0 && hex_digit(text[i + 2]) >= 0) {
            c = (char)(hex_digit(text[i + 1]) * 16 + hex_digit(text[i + 2]));
            i += 2;
        }
        if (!c) {
            free(out);
            return NULL;
        }
        *at++ = c;
    }
    return out;
}

static void add_inet(struct json_object *options, const char *host, const char *port)
{
    struct json_object *server = json_object_new_object();

    json_add_string(server, "type", "inet");
    json_add_string(server, "host", host);
    json_add_string(server, "port", port);
    json_add(options, "server", server);
}

static void add_unix(struct json_object *options, const char *path)
{
    struct json_object *server = json_object_new_object();

    json_add_string(server, "type", "unix");
    json_add_string(server, "path", path);
    json_add(options, "server", server);
}

/* "[user@]host[:port]" of N bytes. */
static int parse_authority(const char *text, size_t n, struct json_object *options)
{
    const char *end = text + n, *user = memchr(text, '@', n), *colon;
    char port[24];
    long number = NBD_PORT;

    if (user)
        text = user + 1;
    if (text < end && *text == '[') {
        const char *close = memchr(text, ']', (size_t)(end - text));
        if (!close)
            return -EINVAL;
        colon = close + 1 < end ? close + 1 : NULL;
        if (colon && *colon != ':')
            return -EINVAL;
        text++;
        n = (size_t)(close - text);
    } else {
        colon = memchr(text, ':', (size_t)(end - text));
        n = (size_t)((colon ? colon : end) - text);
    }
    if (!n)
        return -EINVAL;
    if (colon && colon + 1 < end) {
        number = 0;
        for (const char *p = colon + 1; p < end; p++) {
            if (!isdigit((unsigned char)*p) || (number = number * 10 + *p - '0') > 65535)
                return -EINVAL;
        }
    }
    CLEANUP(memory_freep) char *host = unescaped(text, n);
    if (!host)
        return -EINVAL;
    snprintf(port, sizeof port, "%ld", number ? number : NBD_PORT);
    add_inet(options, host, port);
    return 0;
}

static int parse_query_socket(const char *query, struct json_object *options)
{
    size_t n = query ? strcspn(query, "&;") : 0;

    if (!query || query[n] || strncmp(query, "socket=", 7) != 0)
        return -EINVAL;
    CLEANUP(memory_freep) char *path = unescaped(query + 7, n - 7);
    if (!path)
        return -EINVAL;
    add_unix(options, path);
    return 0;
}

static int parse_uri(const char *uri, struct json_object *options)
{
    const char *authority = strstr(uri, "://") + 3;
    size_t scheme = (size_t)(authority - 3 - uri), n = strcspn(authority, "/?#");
    const char *path = authority + n, *query;
    bool is_unix = scheme == 8 && !strncmp(uri, "nbd+unix", 8);
    int r;

    if (!is_unix && strncmp(uri, "nbd://", 6) != 0 && strncmp(uri, "nbd+tcp://", 10) != 0)
        return -EINVAL;
    size_t path_bytes = strcspn(path, "?#");
    query = path[path_bytes] == '?' ? path + path_bytes + 1 : NULL;
    CLEANUP(memory_freep)
    char *query_text = query ? xasprintf("%.*s", (int)strcspn(query, "#"), query) : NULL;
    if (is_unix)
        r = n ? -EINVAL : parse_query_socket(query_text, options);
    else
        r = query_text && *query_text ? -EINVAL : parse_authority(authority, n, options);
    size_t slashes = strspn(path, "/");
    if (r == 0 && slashes < path_bytes) {
        CLEANUP(memory_freep) char *export = unescaped(path + slashes, path_bytes - slashes);
        if (!export)
            return -EINVAL;
        json_add_string(options, "export", export);
    }
    return r;
}

/* ---- the older form ---- */

/* "host:port", "[v6]:port", ":port". Options after the port are not for a file name. */
static int parse_host_port(const char *text, struct json_object *options, struct error *err)
{
    const char *colon = strrchr(text, ':');
    size_t n = colon ? (size_t)(colon - text) : 0;

    if (text[0] == '[') {
        const char *close = strchr(text, ']');
        if (!close || close[1] != ':')
            return error_set(err, EINVAL, "error parsing IPv6 address '%s'", text);
        colon = close + 1;
        text++;
        n = (size_t)(close - text);
    }
    if (!colon || !colon[1])
        return error_set(err, EINVAL, "error parsing address '%s'", text);
    CLEANUP(memory_freep) char *host = xasprintf("%.*s", (int)n, text);
    add_inet(options, host, colon + 1);
    return 0;
}

int nbd_parse_filename(const char *filename, struct json_object *options, struct error *err)
{
    static const char export_mark[] = ":exportname=";

    if (json_has(options, "host") || json_has(options, "port") || json_has(options, "path"))
        return error_set(err, EINVAL,
                         "host/port/path and file names may not be specified at the same time");
    if (strstr(filename, "://")) {
        if (parse_uri(filename, options) < 0)
            return error_set(err, EINVAL, "No valid URL specified");
        return 0;
    }
    if (strncmp(filename, "nbd:", 4) != 0)
        return error_set(err, EINVAL,
                         "File name string for network block device must start with 'nbd:'");
    const char *export = strstr(filename, export_mark);
    size_t n = export ? (size_t)(export - filename) : strlen(filename);
    if (export && !export[sizeof export_mark - 1])
        return 0;
    if (export)
        json_add_string(options, "export", export + sizeof export_mark - 1);
    CLEANUP(memory_freep) char *host = xasprintf("%.*s", (int)n - 4, filename + 4);
    if (!*host)
        return 0;
    if (!strncmp(host, "unix:", 5)) {
        add_unix(options, host + 5);
        return 0;
    }
    return parse_host_port(host, options, err);
}

/* ---- options ---- */

static int read_legacy(struct json_object *options, struct error *err)
{
    const char *path = json_get_string(options, "path", NULL);
    const char *host = json_get_string(options, "host", NULL);
    const char *port = json_get_string(options, "port", NULL);

    if (path && host)
        return error_set(err, EINVAL, "path and host may not be used at the same time");
    if (path && port)
        return error_set(err, EINVAL, "port may not be used without host");
    if (!path && !host)
        return port ? error_set(err, EINVAL, "port may not be used without host") : 0;
    if (json_has(options, "server"))
        return error_set(err, EINVAL, "Cannot use 'server' and path/host/port at the same time");
    if (path)
        add_unix(options, path);
    else
        add_inet(options, host, port ? port : "10809");
    return 0;
}

/* The schema has seen the server's members, unless a file name has brought them. */
static int check_server(struct json_object *server, struct error *err)
{
    if (!server)
        return error_set(err, EINVAL, "NBD server address missing");
    if (!json_object_is_type(server, json_type_object))
        return error_set(err, EINVAL, "Invalid parameter type for 'server', expected: object");
    const char *type = json_get_string(server, "type", NULL);
    if (!type)
        return error_set(err, EINVAL, "Parameter 'server.type' is missing");
    if (!strcmp(type, "fd"))
        return error_set(err, ENOTSUP, "only QEMU supports file descriptor passing");
    if (!strcmp(type, "unix"))
        return json_has(server, "path")
                   ? 0
                   : error_set(err, EINVAL, "Parameter 'server.path' is missing");
    if (strcmp(type, "inet") != 0)
        return error_set(err, ENOTSUP, "socket address type '%s' is not supported", type);
    if (!json_has(server, "host"))
        return error_set(err, EINVAL, "Parameter 'server.host' is missing");
    if (!json_has(server, "port"))
        return error_set(err, EINVAL, "Parameter 'server.port' is missing");
    return 0;
}

int nbd_read_target(struct json_object *options, struct nbd_target *ret, struct error *err)
{
    const char *context = json_get_string(options, "x-dirty-bitmap", NULL);
    int r;

    if (json_has(options, "tls-creds") || json_has(options, "tls-hostname"))
        return error_set(err, ENOTSUP, "NBD nodes cannot use TLS yet: '%s' is not supported",
                         json_has(options, "tls-creds") ? "tls-creds" : "tls-hostname");
    r = read_legacy(options, err);
    if (r == 0)
        r = check_server(json_get(options, "server"), err);
    if (r < 0)
        return r;
    const char *export = json_get_string(options, "export", NULL);
    if (export && strlen(export) > NBD_NAME_MAX)
        return error_set(err, EINVAL, "export name too long to send to server");
    if (context && strlen(context) > NBD_NAME_MAX)
        return error_set(err, EINVAL, "x-dirty-bitmap query too long to send to server");
    *ret = (struct nbd_target){
        .server = json_copy(json_get(options, "server")),
        .export = export ? xstrdup(export) : NULL,
        .context = context ? xstrdup(context) : NULL,
        .reconnect_ns = json_get_uint(options, "reconnect-delay", 0) * NSEC_PER_SEC,
        .open_ns = json_get_uint(options, "open-timeout", 0) * NSEC_PER_SEC,
    };
    return 0;
}

void nbd_target_fini(struct nbd_target *t)
{
    json_object_put(t->server);
    free(t->export);
    free(t->context);
    *t = (struct nbd_target){0};
}

/* ---- and back ---- */

char *nbd_target_filename(const struct nbd_target *t)
{
    const char *slash = t->export ? "/" : "", *export = t->export ? t->export : "";

    if (!strcmp(json_get_string(t->server, "type", ""), "unix"))
        return xasprintf("nbd+unix://%s%s?socket=%s", slash, export,
                         json_get_string(t->server, "path", ""));
    if (json_has(t->server, "ipv4") || json_has(t->server, "ipv6") || json_has(t->server, "to"))
        return xstrdup("");
    return xasprintf("nbd://%s:%s%s%s", json_get_string(t->server, "host", ""),
                     json_get_string(t->server, "port", ""), slash, export);
}

char *nbd_disk_name(const struct node *n)
{
    const struct nbd_remote *re = n->state;
    const struct nbd_target *t = &re->target;
    const char *export = t->export ? t->export : "";
    CLEANUP(memory_freep) char *resolved = NULL;

    if (!strcmp(json_get_string(t->server, "type", ""), "unix")) {
        const char *path = json_get_string(t->server, "path", "");
        bool abstract = json_get_bool(t->server, "abstract", false);
        if (!abstract && io_realpath(path, &resolved) == 0)
            path = resolved;
        return xasprintf("nbd+unix:///%s?%s=%s", export, abstract ? "abstract" : "socket", path);
    }
    return xasprintf("nbd://%s:%s/%s", json_get_string(t->server, "host", ""),
                     json_get_string(t->server, "port", ""), export);
}
