#include "large_blocks.h"

#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* A stack at its end and a buffer of some hundred KiB have so much shadow that the sanitizer would
 * map it anew instead of clearing it, thousands of times a second. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "clear_shadow_mmap_threshold=16777216:quarantine_size_mb=16";
}

enum { FROM = 65536, SHIFT = 16, KINDS = 16, GUARD = 4096, LEAKED = 23 /* as LeakSanitizer */ };
static const size_t all_bytes = (size_t)1 << 30;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* worker threads allocate, too */
static char *all, *next;                                 /* NULL: everything is the sanitizer's */
static bool marking, staying;
static struct block {
    struct block *next;
    size_t n;
    bool used, marked;
} blocks[1 << 14]; /* by address */
static struct {
    struct block *first, **last;
} resting[KINDS];

void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n);
int __real_posix_memalign(void **ret, size_t align, size_t n);
int __wrap_posix_memalign(void **ret, size_t align, size_t n);
void __real_free(void *p);
void __wrap_free(void *p);

static void unlock(pthread_mutex_t **l)
{
    pthread_mutex_unlock(*l);
}
#define LOCKED()                                                                                   \
    pthread_mutex_lock(&lock);                                                                     \
    pthread_mutex_t *locked __attribute__((cleanup(unlock), unused)) = &lock

bool large_blocks_mark(bool on)
{
    bool was = marking;
    marking = on;
    return was;
}

void large_blocks_stay(void)
{
    staying = true;
}

static unsigned kind_of(size_t n)
{
    unsigned k = 0;
    while (((size_t)FROM << k) < n + GUARD)
        k++;
    return k;
}

static char *memory_of(const struct block *b)
{
    return all + ((size_t)(b - blocks) << SHIFT) + GUARD;
}

static struct block *block_at(const char *p)
{
    return &blocks[(size_t)(p - all) >> SHIFT];
}

/* The block that P is; NULL: none of these. */
static struct block *block_of(const void *p)
{
    if (!all || (const char *)p < all || (const char *)p >= all + all_bytes)
        return NULL;
    struct block *b = block_at(p);
    if (!b->used || p != memory_of(b)) {
        fprintf(stderr, "a large block is freed twice, or never was one: %p\n", p);
        abort();
    }
    return b;
}

/* NULL: it is not large, or too large. */
static void *take(size_t n, bool marked)
{
    if (!all || n < FROM || n > all_bytes / 16)
        return NULL;
    LOCKED();
    unsigned k = kind_of(n);
    struct block *b = resting[k].first;
    if (b) {
        resting[k].first = b->next;
    } else {
        size_t length = (size_t)FROM << k;
        if ((size_t)(all + all_bytes - next) < length)
            return NULL;
        b = block_at(next);
        __asan_poison_memory_region(next, length);
        next += length;
    }
    *b = (struct block){.n = n, .used = true, .marked = marked};
    __asan_unpoison_memory_region(memory_of(b), n);
    return memory_of(b);
}

static void give(struct block *b)
{
    LOCKED();
    unsigned k = kind_of(b->n);
    __asan_poison_memory_region(memory_of(b), b->n);
    b->used = false;
    b->next = NULL;
    if (!resting[k].first)
        resting[k].last = &resting[k].first;
    *resting[k].last = b;
    resting[k].last = &b->next;
}

void *__wrap_malloc(size_t n)
{
    void *p = take(n, marking);
    return p ? p : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    size_t bytes;
    void *p = __builtin_mul_overflow(n, size, &bytes) ? NULL : take(bytes, marking);
    return p ? memset(p, 0, bytes) : __real_calloc(n, size);
}

int __wrap_posix_memalign(void **ret, size_t align, size_t n)
{
    void *p = align <= GUARD ? take(n, marking) : NULL;
    if (!p)
        return __real_posix_memalign(ret, align, n);
    *ret = p;
    return 0;
}

void __wrap_free(void *p)
{
    struct block *b = block_of(p);
    if (b)
        give(b);
    else
        __real_free(p);
}

void *__wrap_realloc(void *p, size_t n)
{
    struct block *b = p ? block_of(p) : NULL;
    if (!b || !n)
        return b ? (give(b), NULL) : __real_realloc(p, n);
    void *q = take(n, b->marked); /* what was marked stays so */
    if (!q) {
        bool was = large_blocks_mark(b->marked);
        q = __real_malloc(n);
        large_blocks_mark(was);
    }
    if (q) {
        memcpy(q, p, b->n < n ? b->n : n);
        give(b);
    }
    return q;
}

static struct block *end(void)
{
    return all ? block_at(next) : blocks;
}

void large_blocks_discard(void)
{
    for (struct block *b = blocks; b < end(); b++)
        if (b->used && b->marked)
            give(b);
}

/* Before the program's first line, so that no wrapper of mmap() counts it as the program's. */
__attribute__((constructor)) static void begin(void)
{
    const char *wish = getenv("TEST_LARGE_BLOCKS");
    if (wish && strcmp(wish, "0") == 0)
        return;
    void *at = mmap(NULL, all_bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return;
    next = all = at;
}

__attribute__((destructor)) static void tell_leaks(void)
{
    size_t n = 0, bytes = 0;
    for (struct block *b = blocks; b < end(); b++)
        if (b->used) {
            n++;
            bytes += b->n;
        }
    if (!n || staying)
        return;
    fflush(NULL);
    fprintf(stderr,
            "ERROR: %zu large blocks (%zu bytes) are leaked; TEST_LARGE_BLOCKS=0 says where from\n",
            n, bytes);
    _exit(LEAKED);
}
