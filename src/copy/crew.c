/* Workers at a rate. A piece's worker and memory are taken before it is begun, in the task that
 * asks for pieces: so they begin in the order of the disk. */
#include "copy/crew.h"

#include "block/block.h"
#include "block/driver.h"
#include "rt/clock.h"
#include "rt/task.h"

#define MEMORY_MAX ((uint64_t)128 * MiB) /* of buffers, all workers' */

void crew_init(struct crew *c, const struct crew_ops *ops, void *opaque, uint64_t buffer_bytes)
{
    *c = (struct crew){.ops = ops, .opaque = opaque, .buffer_bytes = buffer_bytes};
    event_init(&c->nudge);
    semaphore_init(&c->memory, MEMORY_MAX);
}

void crew_fini(struct crew *c)
{
    while (c->kept_count)
        free(c->kept[--c->kept_count]);
}

void *crew_take_buffer(struct crew *c, uint64_t bytes)
{
    if (bytes > c->buffer_bytes)
        return block_buffer(bytes);
    return c->kept_count ? c->kept[--c->kept_count] : block_buffer(c->buffer_bytes);
}

void crew_give_buffer(struct crew *c, void *buf, uint64_t bytes)
{
    if (buf && bytes <= c->buffer_bytes && c->kept_count < ARRAY_SIZE(c->kept))
        c->kept[c->kept_count++] = buf;
    else
        free(buf);
}

struct pass {
    struct crew *crew;
    struct semaphore slots;
    int error; /* the first */
    bool read_failed;
};

struct begun {
    struct pass *pass;
    struct piece piece;
};

static void take(struct pass *pass, struct piece *p)
{
    p->memory = min_u64(p->memory, MEMORY_MAX);
    int r = semaphore_take(&pass->slots, 1);
    assert(r == 0);
    r = semaphore_take(&pass->crew->memory, p->memory);
    assert(r == 0);
}

static void give_back(struct pass *pass, const struct piece *p)
{
    semaphore_give(&pass->crew->memory, p->memory);
    semaphore_give(&pass->slots, 1);
}

static int work(void *arg)
{
    struct begun *b = arg;
    struct pass *pass = b->pass;
    struct crew *c = pass->crew;
    bool read_failed = false;
    SHIELD();

    int r = c->ops->copy(c->opaque, &b->piece, &read_failed);
    if (r < 0 && !pass->error) {
        pass->error = r;
        pass->read_failed = read_failed;
        event_set(&c->nudge); /* at a low speed the next piece's turn may be an hour off */
    }
    give_back(pass, &b->piece);
    free(b);
    return 0;
}

static bool stops(const struct pass *pass)
{
    return pass->error || pass->crew->interrupted;
}

/* True: it may have waited, look again. */
static bool wait_for_rate(struct pass *pass)
{
    struct crew *c = pass->crew;
    uint64_t at = rate_ready_at(&c->rate, clock_now_ns());
    if (at == 0)
        return false;
    if (stops(pass))
        return true;
    event_reset(&c->nudge);
    int r = event_wait_until(&c->nudge, at);
    (void)r; /* the moment, a new speed, a failure or an interruption: all mean looking again */
    return true;
}

int crew_pass(struct crew *c, unsigned workers, bool *read_failed)
{
    SHIELD();
    SCOPE(all);
    struct pass pass = {.crew = c};
    struct piece p;
    uint64_t from = 0;

    semaphore_init(&pass.slots, workers);
    while (!stops(&pass) && c->ops->next(c->opaque, from, &p)) {
        if (wait_for_rate(&pass))
            continue;
        take(&pass, &p);
        if (stops(&pass)) {
            give_back(&pass, &p);
            break;
        }
        rate_spend(&c->rate, clock_now_ns(), p.cost);
        struct begun *b = xnew(struct begun);
        *b = (struct begun){&pass, p};
        scope_spawn(&all, work, b);
        from = range_end(p.range);
    }
    int r = scope_join(&all);
    assert(r == 0);
    *read_failed = pass.read_failed;
    return pass.error ? pass.error : c->interrupted ? -EINTR : 0;
}

void crew_interrupt(struct crew *c)
{
    c->interrupted = true;
    event_set(&c->nudge);
}

void crew_resume(struct crew *c)
{
    c->interrupted = false;
}

void crew_set_speed(struct crew *c, uint64_t speed)
{
    rate_set(&c->rate, speed);
    event_set(&c->nudge);
}
