/* A stack of one's own, and the switch from one to another. For rt/task.c only.
 *
 * Two ways to switch: some lines of assembly (x86-64, aarch64), and ucontext, the portable
 * reference, which the environment's TIDEMARK_CORO=ucontext chooses. The tests run on both.
 * AddressSanitizer, ThreadSanitizer, LeakSanitizer and valgrind are told of each stack. */
#pragma once

#include "base/macros.h"

#include <ucontext.h>

struct coro {
    void *sp;       /* assembly: where its registers lie */
    ucontext_t *uc; /* reference */
    char *map;      /* the guard page and the stack above it; NULL: the thread's own stack */
    size_t map_bytes;
    const void *stack; /* what the sanitizers know the stack by */
    size_t stack_bytes;
    void *asan_fake_stack;
    void *tsan_fiber;
    unsigned valgrind_id;
    void (*entry)(void *arg);
    void *arg;
};

/* The loop's own: the stack that it was called on. */
void coro_init_host(struct coro *c);
void coro_fini_host(struct coro *c);
/* A new stack. The first switch to it calls ENTRY(ARG), which never returns. The program
 * ends when there is no memory for a stack. */
void coro_init(struct coro *c, void (*entry)(void *arg), void *arg);
void coro_fini(struct coro *c); /* not the running one */
void coro_switch(struct coro *from, struct coro *to);
/* As coro_switch, for the last time: FROM will not run again. */
void coro_leave(struct coro *from, struct coro *to);
/* From here to coro_rest the stack holds pointers that keep memory reachable. */
void coro_work(struct coro *c);
void coro_rest(struct coro *c);
const char *coro_kind(void); /* "assembly", "ucontext" */
