/* The guard: what in a qcow2 image tells whether another program has opened it for writing.
 *
 *     autoclear bit 63             whoever does not know the bit clears it when he opens the image
 *                                  for writing (qcow2 specification, "autoclear_features"); QEMU
 *                                  7.2 does so at every such open, also when nothing is written
 *     header extension 0x74696465  the uuid, 16 bytes, of what the bit vouches for
 *
 * The bit is set only together with an extension that is durable already, and only as long as what
 * the extension names is true: it vouches for that, and for nothing older.
 *
 * Known limit: QEMU does not flush the header when the image's bitmaps are in use (as they are
 * after our crash). A power loss before its first flush may bring the bit back.
 *
 * docs/format/qcow2-guard.md */
#pragma once

#include "block/block.h"

struct qcow2_guard {
    bool named; /* the extension is there: UUID */
    bool set;   /* and the bit */
    uint8_t uuid[16];
};

/* Some room of this program keeps the guards of this graph's images: it sets or clears the one of
 * each node that is opened for writing, before anybody writes to it. Otherwise they are cleared at
 * the open, as other programs do. Before nodes are opened. */
void qcow2_claim_guards(struct graph *g);
/* Can N, a qcow2 node, have one? Version 2 has no such bits. */
bool qcow2_can_guard(const struct node *n);

/* What the disk says, not what was read at the open. */
int qcow2_guard_read(struct node *n, struct qcow2_guard *ret, struct error *err) MUST_CHECK;
/* Durable when they return 0. On an error nobody knows what the disk has, but a bit that may be
 * there has its extension. Voiding clears the bit, as other programs do, clearing takes the
 * extension away, too; they cost nothing when there is nothing to do. */
int qcow2_guard_set(struct node *n, const uint8_t uuid[16], struct error *err) MUST_CHECK;
int qcow2_guard_void(struct node *n, struct error *err) MUST_CHECK;
int qcow2_guard_clear(struct node *n, struct error *err) MUST_CHECK;
