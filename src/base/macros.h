/* Small words that every room uses: ownership on the line, arithmetic that cannot
 * surprise, and allocation of small fixed things. */
#pragma once

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define KiB ((uint64_t)1024)
#define MiB (1024 * KiB)
#define GiB (1024 * MiB)
#define TiB (1024 * GiB)
#define NSEC_PER_SEC ((uint64_t)1000000000)

#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

/* The function gets the address of the variable when its scope ends, in the reverse
 * order of taking. By convention such a function is called NOUN_freep, NOUN_unrefp. */
#define CLEANUP(fn) __attribute__((cleanup(fn), unused))

/* Hands an owned pointer on and leaves NULL, so that a CLEANUP does nothing. */
#define steal(ptr)                                                                                 \
    ({                                                                                             \
        __auto_type steal_value = (ptr);                                                           \
        (ptr) = NULL;                                                                              \
        steal_value;                                                                               \
    })

/* Generates NOUN_freep for CLEANUP from `void fn(type *)`; NULL is left alone. */
#define DEFINE_CLEANUP(type, fn, name)                                                             \
    static inline void name(type *p)                                                               \
    {                                                                                              \
        if (*p)                                                                                    \
            fn(*p);                                                                                \
    }

static inline void memory_freep(void *p)
{
    free(*(void **)p);
}

#define PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define MUST_CHECK __attribute__((warn_unused_result))

static inline bool is_power_of_2(uint64_t n)
{
    return n && !(n & (n - 1));
}

/* ALIGN is a power of two. align_up's caller knows that N + ALIGN does not wrap. */
static inline uint64_t align_down(uint64_t n, uint64_t align)
{
    return n & ~(align - 1);
}

static inline uint64_t align_up(uint64_t n, uint64_t align)
{
    return (n + align - 1) & ~(align - 1);
}

static inline uint64_t div_round_up(uint64_t n, uint64_t d)
{
    return n / d + (n % d != 0);
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* log2 of a power of two; otherwise rounded down. N is not 0. */
static inline unsigned log2_u64(uint64_t n)
{
    return 63 - (unsigned)__builtin_clzll(n);
}

/* For small things of fixed size: zeroed memory, or the program ends with a message.
 * What has a size that comes from outside uses malloc and checks. */
void *xcalloc(size_t n, size_t size);
char *xstrdup(const char *s);
char *xasprintf(const char *fmt, ...) PRINTF(1, 2);
#define xnew(type) ((type *)xcalloc(1, sizeof(type)))
