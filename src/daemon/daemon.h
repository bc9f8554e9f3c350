/* Everything that a running tidemarkd has, in the order it is made; taken down in the reverse. */
#pragma once

#include "daemon/chardev.h"
#include "qmp/qmp.h"

struct daemon {
    struct graph *graph;
    struct jobs *jobs;
    struct exports *exports;
    struct qmp *qmp;
    struct chardevs *chardevs;
    struct scope monitors;       /* connections */
    char *pidfile;               /* resolved; NULL: none */
    struct json_object *persist; /* x-tidemark-persist of images given by name; NULL: defaults */
};

/* ---- options.c ---- */

struct options {
    int argc;
    char **argv;
    bool daemonize;
    const char *pidfile; /* NULL: none */
    char **images;       /* arguments that are no options, lent from argv */
    size_t image_count;
};

/* The first pass: help, version, what must be known before anything is made. Ends the program
 * itself for --help, --version and for what is no option. */
void options_scan(struct options *o);
/* The second: everything else, in its order. The error names the option. *EXIT: asked for help
 * that has been printed, the program ends well. */
int options_apply(struct options *o, struct daemon *d, bool *exit, struct error *err);

/* ---- serve.c ---- */

/* The directory of this user's daemons: sockets, run segments. The caller frees. */
char *runtime_path(void);

/* The short form: opens the images, exports each under its file's name without suffix, listens
 * for NBD and QMP in the runtime directory, prints the addresses. */
int serve_images(struct daemon *d, char *const *images, size_t count, struct error *err);
