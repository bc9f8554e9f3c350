/* Tasks and scopes: code that waits reads from top to bottom.
 *
 * A task is a stackful coroutine of one loop. A scope owns tasks: it does not end before
 * they have, the first error cancels the siblings, and leaving it early - by any `return` -
 * cancels and joins. No task outlives the memory it uses.
 *
 * Cancellation is -ECANCELED from the next wait, once and then from every wait, except
 * inside SHIELD(). A wait that lent a buffer to the kernel returns only when the kernel has
 * given it back, cancelled or not.
 *
 * Everything here is called on the loop's own thread; a task runs until it waits. */
#pragma once

#include "base/macros.h"

#include <sys/queue.h>

struct task;
struct loop;
typedef int task_fn(void *arg);

/* ---- the loop ---- */

enum loop_backend { LOOP_AUTO, LOOP_IO_URING, LOOP_THREADS };

/* Makes a loop on this thread, runs MAIN as its first task, and returns what MAIN returned
 * once every task has ended. LOOP_AUTO takes io_uring, and threads where it is refused;
 * the environment's TIDEMARK_LOOP=io_uring|threads overrides LOOP_AUTO. -errno when no
 * backend works. */
int loop_run(enum loop_backend backend, task_fn *main, void *arg);
const char *loop_backend_name(void); /* of the running loop: "io_uring", "threads", ... */

/* ---- scopes ---- */

struct scope {
    TAILQ_HEAD(, task) tasks;
    struct task *joiner;
    int error;      /* of the first task that failed, negative errno; 0: none */
    bool cancelled; /* what is spawned now starts cancelled */
};

void scope_init(struct scope *s);
/* Cancels what still runs and waits for it (uncancellably). */
void scope_fini(struct scope *s);
#define SCOPE(name)                                                                                \
    CLEANUP(scope_fini) struct scope name;                                                         \
    scope_init(&name)

/* Starts FN(ARG) as a task of S; it runs when the caller next waits. The returned handle is
 * valid until the task has ended; most callers ignore it. A scope may be spawned into from
 * any task of the loop, not only by its owner. FN's negative result cancels the siblings. */
struct task *scope_spawn(struct scope *s, task_fn *fn, void *arg);
/* Waits until all tasks have ended. Returns the first error, or -ECANCELED when the caller
 * is cancelled meanwhile (its tasks then are, too, and have ended). */
int scope_join(struct scope *s);
void scope_cancel(struct scope *s); /* does not wait */
bool scope_empty(const struct scope *s);

/* ---- tasks ---- */

struct task *task_self(void); /* NULL outside a loop */
void task_cancel(struct task *t);
bool task_cancelled(void); /* would the next wait return -ECANCELED? */
int task_yield(void);      /* lets the others run once; 0 or -ECANCELED */
/* Tells who waits, in traces and in the panic of NOSUSPEND. NAME is lent for the task's life. */
void task_set_name(const char *name);

/* Until the end of the enclosing block, waits of this task are not cancelled. Nests. */
void shield_begin(int *unused);
void shield_end(int *unused);
#define TASK_CONCAT_(a, b) a##b
#define TASK_CONCAT(a, b) TASK_CONCAT_(a, b)
#define SHIELD()                                                                                   \
    CLEANUP(shield_end) int TASK_CONCAT(shield_, __LINE__) = 0;                                    \
    shield_begin(&TASK_CONCAT(shield_, __LINE__))

/* Until the end of the enclosing block a wait stops the program, naming both lines. */
struct nosuspend {
    const char *file;
    int line;
    struct nosuspend *outer;
};
void nosuspend_begin(struct nosuspend *n);
void nosuspend_end(struct nosuspend *n);
#define NOSUSPEND()                                                                                \
    CLEANUP(nosuspend_end)                                                                         \
    struct nosuspend TASK_CONCAT(nosuspend_, __LINE__) = {__FILE__, __LINE__, NULL};               \
    nosuspend_begin(&TASK_CONCAT(nosuspend_, __LINE__))

/* ---- for the primitives in rt/ only: everything that waits ends here ---- */

/* Suspends the running task until task_wake(); returns 0, or -ECANCELED when it was
 * cancelled and not shielded. */
int task_suspend(void);
void task_wake(struct task *t); /* runnable; at most once per suspend */
