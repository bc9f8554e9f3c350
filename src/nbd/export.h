/* Exports: nodes that clients outside may use. One registry a graph; today's only type is nbd.
 *
 * An export lives as long as somebody refers to it: the user who added it, and each connected
 * client. Removing it (safe: only when no client is there; hard: clients are disconnected)
 * drops the user's reference; when the last one goes, the event BLOCK_EXPORT_DELETED is raised
 * and the node is let go. Bitmaps that an export shows are busy while it lives. */
#pragma once

#include "block/block.h"

struct exports;

struct exports *exports_new(struct graph *g);
/* Closes everything: disconnects clients, stops the server, waits. */
void exports_free(struct exports *x);
DEFINE_CLEANUP(struct exports *, exports_free, exports_freep)
/* While a program starts, servers listen but serve nobody yet: who connects early waits, and then
 * finds all exports there. Accepting is the default. */
void exports_set_accepting(struct exports *x, bool accepting);

/* block-export-add: OPTIONS is BlockExportOptions as the schema passed it. Texts are QEMU's. */
int export_add(struct exports *x, struct json_object *options, struct error *err);
/* block-export-del, nbd-server-remove. */
int export_del(struct exports *x, const char *id, bool hard, struct error *err);
/* nbd-server-add: the older words for the same; OPTIONS is NbdServerAddOptions. */
int export_add_legacy(struct exports *x, struct json_object *options, struct error *err);
struct json_object *exports_info(struct exports *x); /* BlockExportInfo of each, newest first */
/* The nodes that exports stand on, for query-block: calls FN for each export's node. */
void exports_each_node(struct exports *x, void (*fn)(void *opaque, struct node *n), void *opaque);
/* Shuts all exports down and waits until they are gone (nbd-server-stop, quit). */
void exports_close_all(struct exports *x);
