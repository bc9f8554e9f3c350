/* A pool of threads for what blocks or burns, one pool a loop. For the real worlds only. */
#pragma once

#include "rt/world.h"

struct workers;

/* The descriptor is readable when something has been done (an eventfd, non-blocking). */
struct workers *workers_new(int *error);
void workers_free(struct workers *p); /* nothing may be in flight */
int workers_fd(const struct workers *p);
/* How many are in flight: asked for, and their tasks not yet woken. */
size_t workers_busy(const struct workers *p);
/* Does OP on a thread, as posix_do() would, while the running task waits, cancelled or not. */
int64_t workers_perform(struct workers *p, struct io_op *op);
/* What a world has no better way for: on a thread, or here if that cannot block for long. */
int64_t workers_serve(struct workers *p, struct io_op *op);
/* Wakes the tasks whose work is done; reads the descriptor when READ_FD. */
void workers_collect(struct workers *p, bool read_fd);

/* ---- posix.c: the system calls ---- */

/* Does OP in the calling thread, blocking it; -EINTR is handled. Not for what waits for a peer. */
int64_t posix_do(const struct io_op *op);
bool posix_at_once(enum io_kind kind);
uint64_t posix_now_ns(struct world *w);
uint64_t posix_wall_us(struct world *w);
void posix_random(struct world *w, void *buf, size_t n);
/* One attempt at IO_RECV, IO_SEND, IO_SENDV, IO_ACCEPT that does not block: -EAGAIN when it would.
 */
int64_t posix_try(const struct io_op *op);
