/* The command line: qemu-storage-daemon's options, in their order, each done by the command that
 * does it over QMP; so both say the same of the same mistake. */
#include "daemon/daemon.h"

#include "qmp/cmd.h"
#include "qmp/json_stream.h"
#include "qmp/keyval.h"
#include "qmp/schema_types.h"

#include <getopt.h>
#include <stdio.h>

enum {
    OPTION_BLOCKDEV = 256,
    OPTION_CHARDEV,
    OPTION_DAEMONIZE,
    OPTION_EXPORT,
    OPTION_MONITOR,
    OPTION_NBD_SERVER,
    OPTION_OBJECT,
    OPTION_PIDFILE,
    OPTION_TRACE,
    OPTION_PERSIST,
};

static const struct option long_options[] = {
    {"blockdev", required_argument, NULL, OPTION_BLOCKDEV},
    {"chardev", required_argument, NULL, OPTION_CHARDEV},
    {"daemonize", no_argument, NULL, OPTION_DAEMONIZE},
    {"export", required_argument, NULL, OPTION_EXPORT},
    {"help", no_argument, NULL, 'h'},
    {"monitor", required_argument, NULL, OPTION_MONITOR},
    {"nbd-server", required_argument, NULL, OPTION_NBD_SERVER},
    {"object", required_argument, NULL, OPTION_OBJECT},
    {"pidfile", required_argument, NULL, OPTION_PIDFILE},
    {"trace", required_argument, NULL, OPTION_TRACE},
    {"version", no_argument, NULL, 'V'},
    {"x-tidemark-persist", required_argument, NULL, OPTION_PERSIST},
    {0},
};

static const char help_text[] =
    "Usage: tidemarkd [OPTION]... [IMAGE]...\n"
    "Serve disk images over NBD, track what is written to them, back it up.\n"
    "\n"
    "With IMAGE arguments each image is exported, writable, under its file's name without\n"
    "suffix; monitor and NBD listen in the runtime directory, and their addresses are printed.\n"
    "Options are worked off in their order; each takes KEY=VALUE,... or a JSON object.\n"
    "\n"
    "  --blockdev [driver=]DRIVER,node-name=NAME[,KEY=VALUE...]\n"
    "                         open a node: file, host_device, raw, qcow2, null-co,\n"
    "                         copy-before-write, snapshot-access\n"
    "  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N]\n"
    "  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]\n"
    "                         listen for NBD clients\n"
    "  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on|off]\n"
    "           [,bitmaps.0=BITMAP]\n"
    "                         offer a node to NBD clients\n"
    "  --chardev socket,id=ID,path=PATH[,server=on][,wait=off]\n"
    "  --chardev socket,id=ID,host=HOST,port=PORT[,server=on][,wait=off]\n"
    "  --chardev socket,id=ID,fd=N[,server=on]\n"
    "  --chardev stdio,id=ID  a character device for a monitor\n"
    "  --monitor [chardev=]ID[,mode=control][,pretty=on|off]\n"
    "                         speak QMP there\n"
    "  --object TYPE,id=ID[,KEY=VALUE...]\n"
    "                         make an object that other options refer to\n"
    "  --pidfile PATH         write the process ID there once everything is started\n"
    "  --daemonize            go to the background once everything is started\n"
    "  --x-tidemark-persist [level=]off|process|power[,KEY=VALUE...]\n"
    "                         how bitmaps of the IMAGEs are kept: see the manual\n"
    "  -h, --help             show this and exit\n"
    "  -V, --version          show the version and exit\n";

/* ---- the first pass ---- */

void options_scan(struct options *o)
{
    int c;

    o->images = xcalloc((size_t)o->argc + 1, sizeof *o->images);
    optind = 1;
    /* '-': what is no option is given to us in its place, and nothing is moved around. */
    while ((c = getopt_long(o->argc, o->argv, "-hV", long_options, NULL)) != -1) {
        switch (c) {
        case '?':
            exit(EXIT_FAILURE);
        case 'h':
            fputs(help_text, stdout);
            exit(EXIT_SUCCESS);
        case 'V':
            puts("tidemarkd " TIDEMARK_VERSION);
            exit(EXIT_SUCCESS);
        case 1:
            o->images[o->image_count++] = optarg;
            break;
        case OPTION_DAEMONIZE:
            o->daemonize = true;
            break;
        case OPTION_PIDFILE:
            o->pidfile = optarg;
            break;
        }
    }
    while (optind < o->argc)
        o->images[o->image_count++] = o->argv[optind++];
}

/* ---- the second ---- */

/* A JSON object, or KEY=VALUE,... */
static int parse_argument(const char *text, const char *implied_key, struct json_object **ret,
                          enum schema_source *source, struct error *err)
{
    if (*text != '{') {
        *source = SCHEMA_FROM_KEYVAL;
        return keyval_parse(text, implied_key, NULL, ret, err);
    }
    *source = SCHEMA_FROM_JSON;
    return json_from_text(text, ret, err);
}

/* nbd-server-start, but with the address flat. */
static const struct schema_command nbd_server_option = {
    .name = "nbd-server",
    .arguments = &schema_NbdServerOptions,
    .run = cmd_nbd_server_option,
};

static int run_command(struct daemon *d, const struct schema_command *command, const char *text,
                       const char *implied_key, struct error *err)
{
    CLEANUP(json_putp) struct json_object *args = NULL;
    enum schema_source source;

    int r = parse_argument(text, implied_key, &args, &source, err);
    return r < 0 ? r : qmp_execute(d->qmp, command, args, source, err);
}

static int add_monitor(struct daemon *d, const char *text, struct error *err)
{
    CLEANUP(json_putp) struct json_object *raw = NULL;
    CLEANUP(json_putp) struct json_object *args = NULL;
    enum schema_source source;

    int r = parse_argument(text, "chardev", &raw, &source, err);
    if (r >= 0)
        r = schema_check(&schema_MonitorOptions, raw, source, &args, err);
    if (r < 0)
        return r;
    if (!strcmp(json_get_string(args, "mode", "control"), "readline"))
        return error_set(err, ENOTSUP, "Only QMP is supported");
    return chardev_monitor(d->chardevs, json_get_string(args, "chardev", ""), d->qmp, &d->monitors,
                           json_get_bool(args, "pretty", false) ? MONITOR_PRETTY : 0, err);
}

/* For images that are given by their names. */
static int set_persist(struct daemon *d, const char *text, struct error *err)
{
    CLEANUP(json_putp) struct json_object *raw = NULL;
    struct json_object *args = NULL;
    enum schema_source source;

    int r = parse_argument(text, "level", &raw, &source, err);
    if (r >= 0)
        r = schema_check(&schema_XTidemarkPersistOptions, raw, source, &args, err);
    if (r < 0)
        return r;
    json_object_put(d->persist);
    d->persist = args;
    return 0;
}

static int apply(struct daemon *d, int option, const char *text, bool *exit, struct error *err)
{
    switch (option) {
    case OPTION_BLOCKDEV:
        return run_command(d, qmp_command_find("blockdev-add"), text, "driver", err);
    case OPTION_EXPORT:
        return run_command(d, qmp_command_find("block-export-add"), text, "type", err);
    case OPTION_NBD_SERVER:
        return run_command(d, &nbd_server_option, text, NULL, err);
    case OPTION_OBJECT:
        if (!strcmp(text, "help") || !strcmp(text, "?")) {
            puts("List of user creatable objects:\n  iothread\n  secret");
            *exit = true;
            return 0;
        }
        return run_command(d, qmp_command_find("object-add"), text, "qom-type", err);
    case OPTION_CHARDEV: {
        int r = chardev_add(d->chardevs, text, exit, err);
        if (r >= 0 && *exit)
            puts("Available chardev backend types: \n  null\n  socket\n  stdio");
        return r;
    }
    case OPTION_MONITOR:
        return add_monitor(d, text, err);
    case OPTION_PERSIST:
        return set_persist(d, text, err);
    case 1:
        if (!strcmp(text, "-"))
            return error_set(err, EINVAL, "Unexpected argument");
        return 0; /* an image: served when all options are done */
    case OPTION_TRACE:
        return error_set(err, ENOTSUP, "tracing is not supported");
    default:
        return 0;
    }
}

/* What QEMU adds for people, on a line of its own. */
static void add_hint(struct error *err)
{
    static const char mistake[] = "'id' expects an identifier";
    size_t n = strlen(err->text);

    if (n >= sizeof mistake && !strcmp(err->text + n + 1 - sizeof mistake, mistake))
        snprintf(
            err->text + n, sizeof err->text - n,
            "\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter.");
}

int options_apply(struct options *o, struct daemon *d, bool *exit, struct error *err)
{
    int c;

    optind = 1;
    for (;;) {
        int first = optind;
        optarg = NULL;
        c = getopt_long(o->argc, o->argv, "-hV", long_options, NULL);
        if (c == -1)
            return 0;
        int r = apply(d, c, optarg, exit, err);
        if (*exit)
            return 0;
        if (r >= 0)
            continue;
        bool joined = optind - first < 2;
        add_hint(err);
        return error_wrap(err, "%s%s%s", o->argv[first], joined ? "" : " ",
                          joined ? "" : o->argv[first + 1]);
    }
}
