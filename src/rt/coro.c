/* Stacks and switches.
 *
 * A stack is 512 KiB of address space (1 MiB under AddressSanitizer, whose frames are
 * larger) of which only what is touched takes memory, above a guard page: an overflow is a
 * fault at once, not a neighbour's corrupted frame.
 *
 * The assembly saves what the ABI calls callee-saved on the stack that it leaves, and takes
 * it from the one that it enters. It leaves alone the modes of the floating point unit:
 * nothing in this program changes them. A switch pair takes about 5 ns; swapcontext takes
 * 60 times that, because it saves the signal mask with a system call.
 *
 * A known limit: under detect_stack_use_after_return=1 (off by default up to clang 14)
 * AddressSanitizer keeps frames of suspended tasks where LeakSanitizer does not look, so a
 * program that calls exit() inside a task may be told of leaks that are none. */
#include "rt/coro.h"

#include "base/log.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define CORO_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CORO_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define CORO_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define CORO_TSAN 1
#endif
#endif
#ifndef CORO_ASAN
#define CORO_ASAN 0
#endif
#ifndef CORO_TSAN
#define CORO_TSAN 0
#endif

#if CORO_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/lsan_interface.h>
#endif
#if CORO_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#else
#define VALGRIND_STACK_REGISTER(start, end) 0
#define VALGRIND_STACK_DEREGISTER(id) ((void)(id))
#endif

#if CORO_ASAN || CORO_TSAN
enum { STACK_BYTES = 1024 * 1024 };
#else
enum { STACK_BYTES = 512 * 1024 }; /* a read through a chain of 250 images takes 300 KiB */
#endif

/* ---- the two ways to switch ---- */

#if defined(__x86_64__)
#define CORO_ASSEMBLY 1
/* rdi: where to keep the stack pointer that we leave; rsi: the one that we enter. */
__asm__(".text\n"
        ".p2align 4\n"
        ".globl coro_swap\n"
        ".hidden coro_swap\n"
        ".type coro_swap, @function\n"
        "coro_swap:\n"
        ".cfi_startproc\n"
        "  pushq %rbp\n .cfi_adjust_cfa_offset 8\n"
        "  pushq %rbx\n .cfi_adjust_cfa_offset 8\n"
        "  pushq %r12\n .cfi_adjust_cfa_offset 8\n"
        "  pushq %r13\n .cfi_adjust_cfa_offset 8\n"
        "  pushq %r14\n .cfi_adjust_cfa_offset 8\n"
        "  pushq %r15\n .cfi_adjust_cfa_offset 8\n"
        "  movq %rsp, (%rdi)\n"
        "  movq %rsi, %rsp\n"
        "  popq %r15\n .cfi_adjust_cfa_offset -8\n"
        "  popq %r14\n .cfi_adjust_cfa_offset -8\n"
        "  popq %r13\n .cfi_adjust_cfa_offset -8\n"
        "  popq %r12\n .cfi_adjust_cfa_offset -8\n"
        "  popq %rbx\n .cfi_adjust_cfa_offset -8\n"
        "  popq %rbp\n .cfi_adjust_cfa_offset -8\n"
        "  popq %rcx\n .cfi_adjust_cfa_offset -8\n"
        "  jmpq *%rcx\n"
        ".cfi_endproc\n"
        ".size coro_swap, .-coro_swap\n"
        ".p2align 4\n"
        ".globl coro_start\n"
        ".hidden coro_start\n"
        ".type coro_start, @function\n"
        "coro_start:\n"
        ".cfi_startproc\n"
        ".cfi_undefined rip\n" /* the end of every backtrace */
        "  movq %r12, %rdi\n"
        "  callq *%rbx\n"
        "  ud2\n"
        ".cfi_endproc\n"
        ".size coro_start, .-coro_start\n");

extern void coro_swap(void **save, void *enter) __asm__("coro_swap");
extern void coro_start(void) __asm__("coro_start");

static void *first_frame(char *top, void (*entry)(void *), void *arg)
{
    /* r15, r14, r13, r12, rbx, rbp, the address to go to; then 16-byte aligned */
    uint64_t *frame = (uint64_t *)(void *)(top - 16) - 7;
    memset(frame, 0, 9 * sizeof *frame);
    frame[3] = (uint64_t)(uintptr_t)arg;
    frame[4] = (uint64_t)(uintptr_t)entry;
    frame[6] = (uint64_t)(uintptr_t)coro_start;
    return frame;
}

#elif defined(__aarch64__)
#define CORO_ASSEMBLY 1
__asm__(".text\n"
        ".p2align 4\n"
        ".globl coro_swap\n"
        ".hidden coro_swap\n"
        ".type coro_swap, %function\n"
        "coro_swap:\n"
        "  stp x19, x20, [sp, #-160]!\n"
        "  stp x21, x22, [sp, #16]\n"
        "  stp x23, x24, [sp, #32]\n"
        "  stp x25, x26, [sp, #48]\n"
        "  stp x27, x28, [sp, #64]\n"
        "  stp x29, x30, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n"
        "  stp d10, d11, [sp, #112]\n"
        "  stp d12, d13, [sp, #128]\n"
        "  stp d14, d15, [sp, #144]\n"
        "  mov x9, sp\n"
        "  str x9, [x0]\n"
        "  mov sp, x1\n"
        "  ldp x21, x22, [sp, #16]\n"
        "  ldp x23, x24, [sp, #32]\n"
        "  ldp x25, x26, [sp, #48]\n"
        "  ldp x27, x28, [sp, #64]\n"
        "  ldp x29, x30, [sp, #80]\n"
        "  ldp d8, d9, [sp, #96]\n"
        "  ldp d10, d11, [sp, #112]\n"
        "  ldp d12, d13, [sp, #128]\n"
        "  ldp d14, d15, [sp, #144]\n"
        "  ldp x19, x20, [sp], #160\n"
        "  ret\n"
        ".size coro_swap, .-coro_swap\n"
        ".p2align 4\n"
        ".globl coro_start\n"
        ".hidden coro_start\n"
        ".type coro_start, %function\n"
        "coro_start:\n"
        ".cfi_startproc\n"
        ".cfi_undefined x30\n"
        "  mov x0, x20\n"
        "  blr x19\n"
        "  brk #1\n"
        ".cfi_endproc\n"
        ".size coro_start, .-coro_start\n");

extern void coro_swap(void **save, void *enter) __asm__("coro_swap");
extern void coro_start(void) __asm__("coro_start");

static void *first_frame(char *top, void (*entry)(void *), void *arg)
{
    uint64_t *frame = (uint64_t *)(void *)top - 20;
    memset(frame, 0, 20 * sizeof *frame);
    frame[0] = (uint64_t)(uintptr_t)entry;
    frame[1] = (uint64_t)(uintptr_t)arg;
    frame[11] = (uint64_t)(uintptr_t)coro_start;
    return frame;
}

#else
#define CORO_ASSEMBLY 0
static void coro_swap(void **save, void *enter)
{
    abort();
}
static void *first_frame(char *top, void (*entry)(void *), void *arg)
{
    abort();
}
#endif

static bool use_ucontext(void)
{
    static int8_t chosen = -1; /* every thread that comes first decides the same */
    int8_t seen = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (seen < 0) {
        const char *want = getenv("TIDEMARK_CORO");
        seen = !CORO_ASSEMBLY || (want && !strcmp(want, "ucontext"));
        __atomic_store_n(&chosen, seen, __ATOMIC_RELAXED);
    }
    return seen;
}

const char *coro_kind(void)
{
    return use_ucontext() ? "ucontext" : "assembly";
}

/* ---- what watches us is told ---- */

#if CORO_ASAN
static _Thread_local struct coro *left; /* the one that the running one was entered from */

static void entered(void *fake_stack)
{
    /* This is also how we learn where the thread's own stack lies; LeakSanitizer, when it
     * runs on another, would not look there. */
    bool own = !left->map && !left->stack;
    __sanitizer_finish_switch_fiber(fake_stack, &left->stack, &left->stack_bytes);
    if (own)
        coro_work(left);
}
#endif

/* Part of its caller: ThreadSanitizer would see a function entered on one stack and left on
 * the other. So is swap(). */
#define INLINE static inline __attribute__((always_inline))

INLINE void before_switch(struct coro *from, struct coro *to, bool for_good)
{
#if CORO_ASAN
    left = from;
    __sanitizer_start_switch_fiber(for_good ? NULL : &from->asan_fake_stack, to->stack,
                                   to->stack_bytes);
#endif
#if CORO_TSAN
    __tsan_switch_to_fiber(to->tsan_fiber, 0);
#endif
}

static void after_switch(struct coro *self)
{
#if CORO_ASAN
    entered(self->asan_fake_stack);
#endif
}

void coro_work(struct coro *c)
{
#if CORO_ASAN
    __lsan_register_root_region(c->stack, c->stack_bytes);
#endif
}

void coro_rest(struct coro *c)
{
#if CORO_ASAN
    __lsan_unregister_root_region(c->stack, c->stack_bytes);
#endif
}

/* ---- the interface ---- */

/* Frames in which the sanitizers have nothing to watch: what they left on the stack would
 * be found there by its next user. */
static void first_entry(void *arg)
{
    struct coro *c = arg;
#if CORO_ASAN
    entered(NULL);
#endif
    c->entry(c->arg);
    abort();
}

static void first_entry_ucontext(unsigned high, unsigned low)
{
    first_entry((void *)(uintptr_t)((uint64_t)high << 32 | low));
}

void coro_init_host(struct coro *c)
{
    memset(c, 0, sizeof *c);
    if (use_ucontext())
        c->uc = xnew(ucontext_t);
#if CORO_TSAN
    c->tsan_fiber = __tsan_get_current_fiber();
#endif
}

void coro_fini_host(struct coro *c)
{
    if (c->stack)
        coro_rest(c);
    free(c->uc);
    c->uc = NULL;
}

static void no_stack(const char *what)
{
    log_error("no memory for a task's stack: %s: %s", what, strerror(errno));
    abort();
}

void coro_init(struct coro *c, void (*entry)(void *arg), void *arg)
{
    size_t guard = (size_t)sysconf(_SC_PAGESIZE);
    memset(c, 0, sizeof *c);
    c->entry = entry;
    c->arg = arg;
    c->map_bytes = guard + STACK_BYTES;
    c->map = mmap(NULL, c->map_bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (c->map == MAP_FAILED)
        no_stack("mmap");
    if (mprotect(c->map, guard, PROT_NONE) < 0)
        no_stack("mprotect");
    c->stack = c->map + guard;
    c->stack_bytes = STACK_BYTES;
    c->valgrind_id = VALGRIND_STACK_REGISTER(c->stack, (char *)c->stack + STACK_BYTES);
#if CORO_TSAN
    c->tsan_fiber = __tsan_create_fiber(0);
#endif
    if (use_ucontext()) {
        c->uc = xnew(ucontext_t);
        if (getcontext(c->uc) < 0)
            no_stack("getcontext");
        c->uc->uc_stack.ss_sp = c->map + guard;
        c->uc->uc_stack.ss_size = STACK_BYTES;
        uint64_t self = (uint64_t)(uintptr_t)c;
        makecontext(c->uc, (void (*)(void))(void *)first_entry_ucontext, 2, (unsigned)(self >> 32),
                    (unsigned)self);
    } else {
        c->sp = first_frame(c->map + c->map_bytes, first_entry, c);
    }
}

void coro_fini(struct coro *c)
{
    VALGRIND_STACK_DEREGISTER(c->valgrind_id);
#if CORO_ASAN
    /* Who never returned has left its frames' red zones, for the next stack at this address. */
    __asan_unpoison_memory_region(c->stack, c->stack_bytes);
#endif
#if CORO_TSAN
    __tsan_destroy_fiber(c->tsan_fiber);
#endif
    munmap(c->map, c->map_bytes);
    free(c->uc);
    c->map = NULL;
    c->uc = NULL;
}

INLINE void swap(struct coro *from, struct coro *to)
{
    if (use_ucontext()) {
        /* The signal mask is the thread's, not the stack's: whoever blocks one, for all. */
        pthread_sigmask(SIG_SETMASK, NULL, &to->uc->uc_sigmask);
        swapcontext(from->uc, to->uc);
    } else {
        coro_swap(&from->sp, to->sp);
    }
}

void coro_switch(struct coro *from, struct coro *to)
{
    before_switch(from, to, false);
    swap(from, to);
    after_switch(from);
}

void coro_leave(struct coro *from, struct coro *to)
{
    before_switch(from, to, true);
    swap(from, to);
    abort();
}
