/* The process as its parent and its operator see it: going to the background, the pidfile.
 * Called outside of tasks, before the loop runs or after it has ended, unless said otherwise. */
#pragma once

#include "base/error.h"

/* Buffers of requests come and go all the time, up to 32 MiB each. Freed ones are kept for the next
 * instead of being given back to the kernel and faulted in again, page by page: at 1 MiB a
 * request that took two thirds of the throughput. At most PROCESS_KEPT_BYTES stay at the heap's
 * end. */
enum { PROCESS_KEPT_BYTES = 128 << 20 };
void process_keep_memory(void);

/* Forks: the child goes on and returns 0 with a session of its own. The parent waits until the
 * child says that it is ready, and ends with status 0 - or with the child's status, if it ends
 * before that. */
int process_background_begin(struct error *err);
/* Ready: working directory /, standard streams to /dev/null, the parent ends. Nothing when
 * process_background_begin was not called. May be called in a task. */
void process_background_ready(void);

/* Writes our process ID to PATH and locks it; QEMU's texts. May be called in a task; *RESOLVED gets
 * the resolved path for pidfile_remove, which frees it. */
int pidfile_create(const char *path, char **resolved, struct error *err);
void pidfile_remove(char *resolved);
