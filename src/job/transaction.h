/* Transactions: several actions, all or nothing, at one instant.
 *
 * Actions are prepared in their order, each seeing those before it, while every node that they
 * touch is quiesced: no guest write falls between two of them, so all disks of a transaction
 * have one instant. If any cannot be prepared, those before are undone in reverse order and
 * nothing has changed. If all could, they take effect together, and jobs start.
 *
 *     lock; quiesce; prepare 1 .. n -+-> durable; commit 1 .. n -+-> clean; resume; settle
 *                                    +-> abort n .. 1 -----------+
 *
 * Persistent bitmaps become durable in two steps (dirty_commit, dirty_settle): what guests wrote
 * before may still have to be flushed, and they need not wait for that. If that second step fails,
 * the caller gets its error; jobs are cancelled, made files and added bitmaps go, snapshots stay.
 *
 * Called by tasks; takes graph_lock(); shielded once it has begun. */
#pragma once

#include "job/job.h"

/* `transaction`: ACTIONS is an array of {type, data}, PROPERTIES (may be NULL) {completion-mode}.
 */
int transaction_run(struct graph *g, struct jobs *js, struct json_object *actions,
                    struct json_object *properties, struct error *err) MUST_CHECK;

/* The commands that are a transaction of one action, TYPE being their name and DATA their
 * arguments: block-dirty-bitmap-add, -remove, -clear, -enable, -disable, -merge,
 * blockdev-backup, drive-backup, blockdev-snapshot, blockdev-snapshot-sync, x-tidemark-compare. */
int transaction_run_one(struct graph *g, struct jobs *js, const char *type,
                        struct json_object *data, struct error *err) MUST_CHECK;
