/* Character devices: where monitors speak. Socket servers and clients (unix, inet, a descriptor
 * that was handed over), stdio, null. The grammar of --chardev is QEMU's older one
 * ("BACKEND,key=value,flag,noflag", a comma in a value doubled), with its words for mistakes. */
#pragma once

#include "base/error.h"
#include "qmp/qmp.h"

struct chardevs;

/* DAEMONIZED: stdio is refused. */
struct chardevs *chardevs_new(bool daemonized);
/* Stops listening; sockets' files are removed. */
void chardevs_free(struct chardevs *all);
DEFINE_CLEANUP(struct chardevs *, chardevs_free, chardevs_freep)

/* What --chardev TEXT says; waits for a client where it says wait=on. *HELP: it asked for help, and
 * nothing was made. */
int chardev_add(struct chardevs *all, const char *text, bool *help, struct error *err);

/* A monitor on the chardev ID: every connection that it gets is served in a task of S, but none
 * before chardevs_start(). */
int chardev_monitor(struct chardevs *all, const char *id, struct qmp *q, struct scope *s,
                    unsigned monitor_flags, struct error *err);

/* All options have been applied: whoever has connected meanwhile is served now. */
void chardevs_start(struct chardevs *all);
