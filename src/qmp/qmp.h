/* The monitor: what clients say over QMP is done to a graph, its jobs and its exports.
 *
 *     client --bytes--> json_stream --> queue --> dispatch --> cmd_*.c --> other rooms
 *        ^                                            |
 *        +------- output buffer <-- answers ----------+-- events, to everybody
 *
 * Any number of clients at once, each with its own negotiation and its own order. In-band
 * commands of all clients are executed one at a time; a command that has begun is not
 * cancelled when its client goes. Out-of-band ones do not wait for the queue. A client that does
 * not read holds up its own commands, not those of others; when events for it amount to
 * more than MONITOR_OUTPUT_MAX, it is disconnected. */
#pragma once

#include "job/job.h"
#include "nbd/server.h"
#include "qmp/schema.h"

enum {
    MONITOR_QUEUE_MAX = 8,               /* in-band commands waiting, with oob */
    MONITOR_OUTPUT_PAUSE = 1 << 20,      /* bytes unread: its next command waits */
    MONITOR_OUTPUT_MAX = 64 << 20,       /* bytes unread: disconnected */
    MONITOR_INPUT_CHUNK = 16 << 10,      /* bytes read at once */
    MONITOR_FAREWELL_NS = 1000 * 1000000 /* how long the last answers may take to be read */
};

struct monitor;

/* What commands are done to. The three are lent and outlive it. */
struct qmp {
    struct graph *graph;
    struct jobs *jobs;
    struct exports *exports;
    struct objects *objects;
    TAILQ_HEAD(, monitor) monitors;
    struct mutex in_band;
    struct event quit; /* somebody said `quit` */
};

struct qmp *qmp_new(struct graph *g, struct jobs *js, struct exports *x);
/* Every monitor has ended. */
void qmp_free(struct qmp *q);
DEFINE_CLEANUP(struct qmp *, qmp_free, qmp_freep)

/* One connection: serves it in a task of S until it ends, then closes the descriptors (not 0, 1
 * and 2). IN and OUT may be the same. */
enum { MONITOR_PRETTY = 1 };
void monitor_serve(struct qmp *q, struct scope *s, int in, int out, unsigned flags);

/* Waits until every client has read everything, at most MONITOR_FAREWELL_NS. */
void qmp_farewell(struct qmp *q);

/* An event to every client that has negotiated. DATA is lent; NULL: none. */
void qmp_event(struct qmp *q, const char *name, struct json_object *data);

/* ---- commands; tasks only ---- */

/* A command on its way. */
struct qmp_call {
    struct qmp *qmp;
    struct monitor *monitor;  /* who asks; NULL: the command line */
    struct json_object *args; /* checked, typed; lent, never NULL */
    struct json_object *ret;  /* what the command gives; NULL: an empty object */
};

/* Checks ARGS and runs the command, as the options of the command line do. */
int qmp_execute(struct qmp *q, const struct schema_command *command, struct json_object *args,
                enum schema_source source, struct error *err) MUST_CHECK;

extern const struct schema_command qmp_commands[];
extern const struct schema_event qmp_events[];
const struct schema_command *qmp_command_find(const char *name);

/* The text of an answer to REQUEST of MONITOR: dispatch.c. NULL: nothing to say. */
struct json_object *qmp_dispatch(struct qmp *q, struct monitor *m, struct json_object *request);
struct json_object *qmp_error_answer(const struct error *err);

/* What cmd_control.c asks and tells a monitor. */
bool monitor_negotiated(const struct monitor *m);
void monitor_negotiate(struct monitor *m, bool oob);
bool monitor_oob(const struct monitor *m);
struct json_object *qmp_version(void); /* VersionInfo */
