/* Leaky buckets, the ticket that goes round, and limits as QEMU's objects word them. */
#include "block/throttle_group.h"

#include "block/internal.h"

#include "rt/clock.h"

#define THROTTLE_VALUE_MAX ((uint64_t)1000000000000000)

struct throttle_waiter {
    struct event go; /* it has the ticket, or need not wait */
    bool free;
    TAILQ_ENTRY(throttle_waiter) link;
};

struct throttle_group {
    char *name;
    struct throttle_limits limits;
    uint64_t leaked_ns; /* the buckets' levels are of this moment */
    bool lifted;
    TAILQ_HEAD(, throttle_member) members;
    struct ticket {
        struct throttle_waiter *holder; /* NULL: nobody waits */
        struct throttle_member *of;
    } tickets[2];
    TAILQ_ENTRY(throttle_group) link;
};

/* ---- limits ---- */

static const char *const bucket_names[] = {
    [BPS_TOTAL] = "bps-total",   [BPS_READ] = "bps-read",   [BPS_WRITE] = "bps-write",
    [IOPS_TOTAL] = "iops-total", [IOPS_READ] = "iops-read", [IOPS_WRITE] = "iops-write",
};

void throttle_limits_init(struct throttle_limits *l)
{
    *l = (struct throttle_limits){0};
    for (int i = 0; i < THROTTLE_BUCKETS; i++)
        l->buckets[i].burst_seconds = 1;
}

static bool both_ways(const struct throttle_limits *l, int total, bool burst)
{
    const struct throttle_bucket *b = &l->buckets[total];

    return burst ? b[0].burst_rate && (b[1].burst_rate || b[2].burst_rate)
                 : b[0].rate && (b[1].rate || b[2].rate);
}

static int check_bucket(const struct throttle_bucket *b, struct error *err)
{
    if (b->rate > THROTTLE_VALUE_MAX || b->burst_rate > THROTTLE_VALUE_MAX)
        return error_set(err, EINVAL, "bps/iops/max values must be within [0, %llu]",
                         (unsigned long long)THROTTLE_VALUE_MAX);
    if (!b->burst_seconds)
        return error_set(err, EINVAL, "the burst length cannot be 0");
    if (b->burst_seconds > 1 && !b->burst_rate)
        return error_set(err, EINVAL, "burst length set without burst rate");
    if (b->burst_rate && b->burst_seconds > THROTTLE_VALUE_MAX / b->burst_rate)
        return error_set(err, EINVAL, "burst length too high for this burst rate");
    if (b->burst_rate && !b->rate)
        return error_set(err, EINVAL, "bps_max/iops_max require corresponding bps/iops values");
    if (b->burst_rate && b->burst_rate < b->rate)
        return error_set(err, EINVAL, "bps_max/iops_max cannot be lower than bps/iops");
    return 0;
}

int throttle_limits_check(const struct throttle_limits *l, struct error *err)
{
    int r = 0;

    for (int burst = 0; burst < 2; burst++)
        if (both_ways(l, BPS_TOTAL, burst) || both_ways(l, IOPS_TOTAL, burst))
            return error_set(err, EINVAL,
                             "bps/iops/max total values and read/write values cannot be used at "
                             "the same time");
    if (l->request_bytes && !l->buckets[IOPS_TOTAL].rate && !l->buckets[IOPS_READ].rate &&
        !l->buckets[IOPS_WRITE].rate)
        return error_set(err, EINVAL, "iops size requires an iops value to be set");
    for (int i = 0; r == 0 && i < THROTTLE_BUCKETS; i++)
        r = check_bucket(&l->buckets[i], err);
    return r;
}

/* Where the value called NAME stands; *IS_LENGTH: it is a burst length. NULL: no such name. */
static uint64_t *value_named(struct throttle_limits *l, const char *name, bool *is_length)
{
    *is_length = false;
    if (!strcmp(name, "iops-size"))
        return &l->request_bytes;
    for (int i = 0; i < THROTTLE_BUCKETS; i++) {
        size_t n = strlen(bucket_names[i]);
        if (strncmp(name, bucket_names[i], n))
            continue;
        if (!name[n])
            return &l->buckets[i].rate;
        if (!strcmp(name + n, "-max"))
            return &l->buckets[i].burst_rate;
        if (!strcmp(name + n, "-max-length")) {
            *is_length = true;
            return &l->buckets[i].burst_seconds;
        }
    }
    return NULL;
}

/* The member `limits`: everything at once, and it must make sense by itself and with what is there.
 * A negative number is a very large one, and refused as that. */
static int parse_together(struct throttle_limits *l, struct json_object *limits, struct error *err)
{
    bool is_length;

    for (int i = 0; i < THROTTLE_BUCKETS; i++) {
        CLEANUP(memory_freep) char *name = xasprintf("%s-max-length", bucket_names[i]);
        if (json_get_int(limits, name, 0) > UINT32_MAX)
            return error_set(err, EINVAL, "%s value must be in the range [0, %u]", name,
                             UINT32_MAX);
    }
    json_object_object_foreach(limits, key, value)
    {
        uint64_t *to = value_named(l, key, &is_length);
        (void)value;
        if (to)
            *to = (uint64_t)json_get_int(limits, key, 0);
    }
    return throttle_limits_check(l, err);
}

static int parse_single(struct throttle_limits *l, struct json_object *options, const char *key,
                        struct error *err)
{
    bool is_length;
    uint64_t *to = strncmp(key, "x-", 2) ? NULL : value_named(l, key + 2, &is_length);
    int64_t value = json_get_int(options, key, 0);

    if (!to)
        return 0;
    if (value < 0)
        return error_set(err, EINVAL, "Property values cannot be negative");
    if (is_length && value > UINT32_MAX) /* no space in QEMU's text either */
        return error_set(err, EINVAL, "%s value must be in therange [0, %u]", key, UINT32_MAX);
    *to = (uint64_t)value;
    return 0;
}

struct property {
    const char *key;
    struct json_object *value;
};

static int compare_properties(const void *a, const void *b)
{
    const struct property *x = a, *y = b;
    unsigned p = json_qemu_order(x->key), q = json_qemu_order(y->key);

    return p != q ? (p < q ? -1 : 1) : strcmp(x->key, y->key);
}

/* One property after the other, in the order in which QEMU sets them: `limits` is judged together
 * with those before it. */
int throttle_limits_parse(struct throttle_limits *l, struct json_object *options, struct error *err)
{
    struct property *all = xcalloc((size_t)json_object_object_length(options) + 1, sizeof *all);
    size_t n = 0;
    int r = 0;

    json_object_object_foreach(options, key, value) all[n++] = (struct property){key, value};
    qsort(all, n, sizeof *all, compare_properties);
    for (size_t i = 0; r == 0 && i < n; i++)
        r = !strcmp(all[i].key, "limits") ? parse_together(l, all[i].value, err)
                                          : parse_single(l, options, all[i].key, err);
    free(all);
    return r;
}

struct json_object *throttle_limits_show(const struct throttle_limits *l)
{
    struct json_object *limits = json_object_new_object();

    for (int i = 0; i < THROTTLE_BUCKETS; i++) {
        const struct throttle_bucket *b = &l->buckets[i];
        CLEANUP(memory_freep) char *burst = xasprintf("%s-max", bucket_names[i]);
        CLEANUP(memory_freep) char *length = xasprintf("%s-max-length", bucket_names[i]);
        json_add_uint(limits, bucket_names[i], b->rate);
        json_add_uint(limits, burst, b->burst_rate);
        json_add_uint(limits, length, b->burst_seconds);
    }
    json_add_uint(limits, "iops-size", l->request_bytes);
    return limits;
}

/* ---- groups of a graph ---- */

TAILQ_HEAD(groups, throttle_group);
static const char groups_key;

struct groups_of_graph {
    struct graph_hook hook; /* to be told when the graph goes */
    struct groups list;
};

static void groups_gone(struct graph_hook *h);

static struct groups *groups_of(struct graph *g)
{
    struct groups_of_graph *all = graph_get_data(g, &groups_key);

    if (!all) {
        all = xnew(struct groups_of_graph);
        all->hook.gone = groups_gone;
        TAILQ_INIT(&all->list);
        graph_set_data(g, &groups_key, all);
        graph_add_hook(g, &all->hook);
    }
    return &all->list;
}

static void group_free(struct throttle_group *group)
{
    free(group->name);
    free(group);
}

static void groups_gone(struct graph_hook *h)
{
    struct groups_of_graph *all = container_of(h, struct groups_of_graph, hook);
    struct throttle_group *group;

    while ((group = TAILQ_FIRST(&all->list))) {
        TAILQ_REMOVE(&all->list, group, link);
        group_free(group);
    }
    free(all);
}

struct throttle_group *throttle_group_find(struct graph *g, const char *name)
{
    struct throttle_group *group;

    TAILQ_FOREACH (group, groups_of(g), link)
        if (!strcmp(group->name, name))
            return group;
    return NULL;
}

int throttle_group_add(struct graph *g, const char *name, const struct throttle_limits *l,
                       struct error *err)
{
    if (throttle_group_find(g, name))
        return error_set(err, EEXIST, "A group with this name already exists");
    int r = throttle_limits_check(l, err);
    if (r < 0)
        return r;
    struct throttle_group *group = xnew(struct throttle_group);
    group->name = xstrdup(name);
    group->limits = *l;
    group->leaked_ns = clock_now_ns();
    TAILQ_INIT(&group->members);
    TAILQ_INSERT_TAIL(groups_of(g), group, link);
    return 0;
}

int throttle_group_remove(struct graph *g, const char *name)
{
    struct throttle_group *group = throttle_group_find(g, name);

    if (!group)
        return -ENOENT;
    if (!TAILQ_EMPTY(&group->members))
        return -EBUSY;
    TAILQ_REMOVE(groups_of(g), group, link);
    group_free(group);
    return 0;
}

/* ---- buckets ---- */

static double leak(double level, uint64_t rate, double seconds)
{
    double left = level - (double)rate * seconds;

    return left > 0 ? left : 0;
}

static void leak_all(struct throttle_group *group)
{
    uint64_t now = clock_now_ns();
    double seconds = (double)(now - group->leaked_ns) / (double)NSEC_PER_SEC;

    group->leaked_ns = now;
    for (int i = 0; i < THROTTLE_BUCKETS; i++) {
        struct throttle_bucket *b = &group->limits.buckets[i];
        b->level = leak(b->level, b->rate, seconds);
        b->burst_level = b->burst_seconds > 1 ? leak(b->burst_level, b->burst_rate, seconds) : 0;
    }
}

/* Until LEVEL has leaked to ROOM. At most an hour: then it is worked out anew. */
static uint64_t wait_to_leak(double level, double room, uint64_t rate)
{
    double ns = (level - room) * (double)NSEC_PER_SEC / (double)rate;

    if (ns <= 0)
        return 0;
    return ns < 3600e9 ? (uint64_t)ns + 1 : 3600 * NSEC_PER_SEC;
}

static uint64_t bucket_wait_ns(const struct throttle_bucket *b)
{
    double room =
        b->burst_rate ? (double)b->burst_rate * (double)b->burst_seconds : (double)b->rate / 10;
    uint64_t ns;

    if (!b->rate)
        return 0;
    ns = wait_to_leak(b->level, room, b->rate);
    if (!ns && b->burst_seconds > 1)
        ns = wait_to_leak(b->burst_level, (double)b->burst_rate / 10, b->burst_rate);
    return ns;
}

static uint64_t group_wait_ns(struct throttle_group *group, bool is_write)
{
    const struct throttle_bucket *b = group->limits.buckets;
    uint64_t ns;

    if (group->lifted)
        return 0;
    leak_all(group);
    ns = max_u64(bucket_wait_ns(&b[BPS_TOTAL]), bucket_wait_ns(&b[IOPS_TOTAL]));
    ns = max_u64(ns, bucket_wait_ns(&b[is_write ? BPS_WRITE : BPS_READ]));
    return max_u64(ns, bucket_wait_ns(&b[is_write ? IOPS_WRITE : IOPS_READ]));
}

static void fill(struct throttle_bucket *b, double units)
{
    if (!b->rate)
        return;
    b->level += units;
    if (b->burst_seconds > 1)
        b->burst_level += units;
}

static void account(struct throttle_group *group, bool is_write, uint64_t bytes)
{
    struct throttle_limits *l = &group->limits;
    double requests =
        l->request_bytes && bytes > l->request_bytes ? (double)bytes / (double)l->request_bytes : 1;

    fill(&l->buckets[BPS_TOTAL], (double)bytes);
    fill(&l->buckets[is_write ? BPS_WRITE : BPS_READ], (double)bytes);
    fill(&l->buckets[IOPS_TOTAL], requests);
    fill(&l->buckets[is_write ? IOPS_WRITE : IOPS_READ], requests);
}

/* ---- waiting ---- */

/* The next in line, after the members' turn: M's right neighbour first, M itself last. */
static void pass_ticket(struct throttle_group *group, bool is_write, struct throttle_member *m)
{
    struct throttle_member *next = m;
    struct ticket *t = &group->tickets[is_write];

    t->holder = NULL;
    t->of = NULL;
    do {
        next = TAILQ_NEXT(next, link) ? TAILQ_NEXT(next, link) : TAILQ_FIRST(&group->members);
        struct throttle_waiter *w = TAILQ_FIRST(&next->waiting[is_write]);
        while (w && w->free)
            w = TAILQ_NEXT(w, link);
        if (w) {
            t->holder = w;
            t->of = next;
            event_set(&w->go);
            return;
        }
    } while (next != m);
}

/* Has the ticket: waits for the clock. */
static void wait_for_room(struct throttle_group *group, bool is_write, struct throttle_waiter *w)
{
    uint64_t ns;

    while (!w->free && (ns = group_wait_ns(group, is_write))) {
        event_reset(&w->go);
        (void)!event_wait_until(&w->go, clock_after_ns(ns));
    }
}

void throttle_member_admit(struct throttle_member *m, bool is_write, uint64_t bytes, bool unlimited)
{
    SHIELD();
    struct throttle_group *group = m->group;
    struct ticket *t = &group->tickets[is_write];
    struct throttle_waiter self = {.free = false};

    if (unlimited || group->lifted || (!t->holder && !group_wait_ns(group, is_write))) {
        account(group, is_write, bytes);
        return;
    }
    event_init(&self.go);
    TAILQ_INSERT_TAIL(&m->waiting[is_write], &self, link);
    if (!t->holder)
        *t = (struct ticket){&self, m};
    else
        (void)!event_wait(&self.go);
    if (!self.free)
        wait_for_room(group, is_write, &self);
    TAILQ_REMOVE(&m->waiting[is_write], &self, link);
    account(group, is_write, bytes);
    if (t->holder == &self)
        pass_ticket(group, is_write, m);
}

static void let_through(struct throttle_member *m)
{
    struct throttle_waiter *w;

    for (int i = 0; i < 2; i++) {
        TAILQ_FOREACH (w, &m->waiting[i], link) {
            w->free = true;
            event_set(&w->go);
        }
    }
}

void throttle_member_release(struct throttle_member *m)
{
    let_through(m); /* one that had the ticket passes it on when it has run */
}

const struct throttle_limits *throttle_group_limits(const struct throttle_group *group)
{
    return &group->limits;
}

void throttle_group_set_limits(struct throttle_group *group, const struct throttle_limits *l)
{
    leak_all(group);
    for (int i = 0; i < THROTTLE_BUCKETS; i++) {
        struct throttle_bucket *b = &group->limits.buckets[i], was = *b;
        *b = l->buckets[i];
        b->level = b->rate ? was.level : 0;
        b->burst_level = b->rate ? was.burst_level : 0;
    }
    group->limits.request_bytes = l->request_bytes;
    for (int i = 0; i < 2; i++) {
        if (group->tickets[i].holder) /* works out anew how long it has to wait */
            event_set(&group->tickets[i].holder->go);
    }
}

void throttle_groups_lift(struct graph *g)
{
    struct throttle_group *group;
    struct throttle_member *m;

    TAILQ_FOREACH (group, groups_of(g), link) {
        group->lifted = true;
        TAILQ_FOREACH (m, &group->members, link)
            let_through(m);
    }
}

void throttle_member_join(struct throttle_member *m, struct throttle_group *group)
{
    m->group = group;
    for (int i = 0; i < 2; i++)
        TAILQ_INIT(&m->waiting[i]);
    TAILQ_INSERT_TAIL(&group->members, m, link);
}

void throttle_member_leave(struct throttle_member *m)
{
    struct throttle_group *group = m->group;

    /* Its node is quiesced or closed: nobody waits in it. */
    assert(TAILQ_EMPTY(&m->waiting[0]) && TAILQ_EMPTY(&m->waiting[1]));
    TAILQ_REMOVE(&group->members, m, link);
    m->group = NULL;
}
