#include "heap.h"

#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif
#ifndef WITH_ASAN
#define WITH_ASAN 0
#endif

#if WITH_ASAN
#include "../large_blocks.h"
#endif

static bool life;

bool heap_life(bool on)
{
    bool was = life;
    life = on;
#if WITH_ASAN
    large_blocks_mark(on);
#endif
    return was;
}

static void give_up(const char *what)
{
    fprintf(stderr, "sim: %s: %s\n", what, strerror(errno));
    abort();
}

/* ---- mappings: the program links with --wrap for these ---- */

enum { MAPPINGS = 256, STACKS = 4096 };

static struct mapping {
    void *at;
    size_t length;
} mappings[MAPPINGS];
static size_t n_mappings;
static void *stacks[STACKS]; /* of the tasks: with their guard pages, at rest */
static size_t n_stacks, stack_length;
static const void *stack_again; /* has its guard page */

void *__real_mmap64(void *at, size_t length, int prot, int flags, int fd, off_t offset);
void *__wrap_mmap64(void *at, size_t length, int prot, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t length);
int __wrap_munmap(void *at, size_t length);
int __real_mprotect(void *at, size_t length, int prot);
int __wrap_mprotect(void *at, size_t length, int prot);

void *__wrap_mmap64(void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    if (!life)
        return __real_mmap64(at, length, prot, flags, fd, offset);
    if (flags & MAP_STACK) {
        if (n_stacks && length == stack_length)
            return (void *)(uintptr_t)(stack_again = stacks[--n_stacks]);
        stack_length = length;
        return __real_mmap64(at, length, prot, flags, fd, offset);
    }
    void *map = __real_mmap64(at, length, prot, flags, fd, offset);
    if (map != MAP_FAILED) {
        if (n_mappings == MAPPINGS)
            give_up("too many mappings");
        mappings[n_mappings++] = (struct mapping){map, length};
    }
    return map;
}

int __wrap_mprotect(void *at, size_t length, int prot)
{
    bool again = life && at == stack_again && prot == PROT_NONE;
    stack_again = NULL;
    return again ? 0 : __real_mprotect(at, length, prot);
}

int __wrap_munmap(void *at, size_t length)
{
    if (life && length == stack_length && n_stacks < STACKS) {
        for (size_t i = 0; i < n_mappings; i++)
            if (mappings[i].at == at)
                goto plain;
        stacks[n_stacks++] = at;
        return 0;
    }
plain:
    for (size_t i = 0; i < n_mappings; i++)
        if (mappings[i].at == at) {
            mappings[i] = mappings[--n_mappings];
            break;
        }
    return __real_munmap(at, length);
}

static void discard_mappings(void)
{
    while (n_mappings) {
        n_mappings--;
        __real_munmap(mappings[n_mappings].at, mappings[n_mappings].length);
    }
}

#if WITH_ASAN

/* ---- a set of what is allocated ---- */

/* gcc 12 has it in its runtime and in no header. */
int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void *, size_t),
                                              void (*free_hook)(const volatile void *));

static const void **set;
static size_t set_size, set_used; /* used counts the deleted */
static bool hooked, inside;
#define DELETED ((const void *)1)

static size_t place(const void *p)
{
    uint64_t h = (uint64_t)(uintptr_t)p * UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(h >> 20) & (set_size - 1);
}

static void insert(const void *p)
{
    size_t i = place(p);
    while (set[i] && set[i] != DELETED)
        i = (i + 1) & (set_size - 1);
    if (!set[i])
        set_used++;
    set[i] = p;
}

static void grow(void)
{
    const void **old = set;
    size_t n = set_size, live = 0;
    for (size_t i = 0; i < n; i++)
        live += old[i] && old[i] != DELETED;
    set_size = n && live < n / 4 ? n : n ? n * 2 : 8192;
    set = __real_mmap64(NULL, set_size * sizeof *set, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (set == MAP_FAILED)
        give_up("a set of allocations");
    set_used = 0;
    for (size_t i = 0; i < n; i++)
        if (old[i] && old[i] != DELETED)
            insert(old[i]);
    if (old)
        __real_munmap(old, n * sizeof *old);
}

static void allocated(const volatile void *p, size_t n)
{
    if (!life || inside || !p)
        return;
    inside = true;
    if (set_used * 2 >= set_size)
        grow();
    insert((const void *)(uintptr_t)p);
    inside = false;
}

static void freed(const volatile void *p)
{
    if (!p || !set_size)
        return;
    for (size_t i = place((const void *)(uintptr_t)p); set[i]; i = (i + 1) & (set_size - 1))
        if (set[i] == p) {
            set[i] = DELETED;
            return;
        }
}

__attribute__((constructor)) static void hook(void)
{
    hooked = __sanitizer_install_malloc_and_free_hooks(allocated, freed) > 0;
    if (!hooked)
        give_up("no hooks");
    large_blocks_stay();
}

void heap_discard(void)
{
    heap_life(false);
    for (size_t i = 0; i < set_size; i++)
        if (set[i] && set[i] != DELETED)
            free((void *)(uintptr_t)set[i]);
    if (set_used)
        memset(set, 0, set_size * sizeof *set);
    set_used = 0;
    large_blocks_discard();
    discard_mappings();
}

size_t heap_life_bytes(void)
{
    return 0;
}

#else

/* ---- the arena ---- */

/* What the machine frees it needs again at once. */
__attribute__((constructor)) static void keep_memory(void)
{
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
}

/* Blocks of 16 bytes' steps up to 1 KiB, then powers of two; a list of free ones each. The
 * header says which kind, and where the block begins if that was moved for alignment. */
struct header {
    uint32_t kind, moved;
    uint64_t size;
};
_Static_assert(sizeof(struct header) == 16, "keeps alignment");

enum { STEP = 16, SMALL = 1024, KINDS = SMALL / STEP + 1 + 40 };
static const size_t arena_bytes = (size_t)4 << 30, keep_bytes = (size_t)64 << 20;
static char *arena, *next;
static struct free_block {
    struct free_block *next;
} * free_blocks[KINDS];

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
extern void __libc_free(void *p);

static uint32_t kind_of(size_t n, size_t *block)
{
    if (n <= SMALL) {
        uint32_t kind = (uint32_t)((n + STEP - 1) / STEP);
        *block = (size_t)(kind ? kind : 1) * STEP;
        return kind ? kind : 1;
    }
    unsigned log = 64 - (unsigned)__builtin_clzll(n - 1);
    *block = (size_t)1 << log;
    return SMALL / STEP + log - 9;
}

static void make_arena(void)
{
    arena = __real_mmap64((void *)UINT64_C(0x200000000000), arena_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (arena == MAP_FAILED)
        give_up("the arena");
    next = arena;
}

static bool is_ours(const void *p)
{
    return arena && (const char *)p >= arena && (const char *)p < arena + arena_bytes;
}

static void *take(size_t align, size_t n)
{
    size_t block;
    uint32_t kind = kind_of(align > 16 ? n + align : n, &block);
    struct header *h;
    if (!arena)
        make_arena();
    if (n > arena_bytes / 4)
        return NULL;
    if (free_blocks[kind]) {
        h = (struct header *)(void *)free_blocks[kind] - 1;
        free_blocks[kind] = free_blocks[kind]->next;
    } else {
        if ((size_t)(arena + arena_bytes - next) < block + sizeof *h)
            return NULL;
        h = (struct header *)(void *)next;
        next += sizeof *h + block;
    }
    char *p = (char *)(h + 1);
    size_t move = align > 16 ? (align - ((uintptr_t)p & (align - 1))) & (align - 1) : 0;
    struct header made = {kind, (uint32_t)move, n};
    *((struct header *)(void *)(p + move) - 1) = made;
    return p + move;
}

static void give_back(void *p)
{
    struct header h = *((struct header *)p - 1); /* may lie where the link goes */
    struct free_block *f = (struct free_block *)(void *)((char *)p - h.moved);
    f->next = free_blocks[h.kind];
    free_blocks[h.kind] = f;
}

void heap_discard(void)
{
    life = false;
    if (arena) {
        if ((size_t)(next - arena) > keep_bytes)
            madvise(arena + keep_bytes, (size_t)(next - arena) - keep_bytes, MADV_DONTNEED);
        next = arena;
    }
    memset(free_blocks, 0, sizeof free_blocks);
    discard_mappings();
}

size_t heap_life_bytes(void)
{
    return (size_t)(next - arena);
}

/* ---- in the C library's place ---- */

void *malloc(size_t n)
{
    if (!life)
        return __libc_malloc(n);
    void *p = take(16, n);
    if (!p)
        errno = ENOMEM;
    return p;
}

void free(void *p)
{
    if (is_ours(p))
        give_back(p);
    else
        __libc_free(p);
}

void *calloc(size_t n, size_t size)
{
    size_t bytes;
    if (!life)
        return __libc_calloc(n, size);
    if (__builtin_mul_overflow(n, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    void *p = malloc(bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

void *realloc(void *p, size_t n)
{
    if (!p)
        return malloc(n);
    if (!is_ours(p))
        return __libc_realloc(p, n);
    if (!n) {
        free(p);
        return NULL;
    }
    size_t had = ((struct header *)p - 1)->size;
    bool was = heap_life(true); /* what is a life's stays a life's */
    void *q = malloc(n);
    heap_life(was);
    if (!q)
        return NULL;
    memcpy(q, p, had < n ? had : n);
    free(p);
    return q;
}

void *memalign(size_t align, size_t n)
{
    if (!life)
        return __libc_memalign(align, n);
    void *p = take(align < 16 ? 16 : align, n);
    if (!p)
        errno = ENOMEM;
    return p;
}

void *aligned_alloc(size_t align, size_t n)
{
    return memalign(align, n);
}

int posix_memalign(void **ret, size_t align, size_t n)
{
    void *p = memalign(align, n);
    if (!p)
        return ENOMEM;
    *ret = p;
    return 0;
}

size_t malloc_usable_size(void *p)
{
    if (!p)
        return 0;
    if (is_ours(p))
        return ((struct header *)p - 1)->size;
    return (*((size_t *)p - 1) & ~(size_t)7) - 16; /* the C library's own header, at the least */
}

#endif
