/* Changes of state of several disks, all or none, through any crash.
 *
 *     1  each disk's superblock is prepared: the old table holds, NEXT is what it may become; the
 *        group's id, and who is asked (the first disk's tide file)
 *     2  when all are durable: the first disk's superblock has NEXT as its table, and a record
 *     3  when that is durable: each of the others has NEXT as its table
 *     4  when all are durable: the first disk's record goes
 *
 * A disk that is found prepared asks the first one's file: with the record NEXT holds; without it,
 * and the file there, the old table. So 2 must not begin before 1 has ended on every disk (else a
 * disk that is not prepared stays behind), 3 not before 2 (else it is ahead of a group that may
 * never be committed), and the record must not go before 3 has ended on every disk, also past a
 * clean close (else those that come later take it for a no).
 *
 * Is the file not there, nobody knows: in doubt. The bits are then those of both outcomes, OR-ed;
 * the bitmap is busy, and each further superblock carries both generations until the file is back.
 */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "persist/keeper_internal.h"
#include "rt/clock.h"

/* A disk in a group that is being changed. */
struct member {
    struct keeper *keeper;
    struct change change;
    bool prepared;
};

static void member_copy(struct tide_member *to, const struct tide_id *uuid, const char *path)
{
    to->uuid = *uuid;
    to->path = xstrdup(path);
}

static void clear_group(struct super *s)
{
    s->group = (struct tide_id){{0}};
    free(steal(s->coordinator.path));
    tide_table_fini(&s->next);
}

/* ---- the four steps ---- */

static int prepare(struct member *m, const struct tide_id *group, const struct tide_id *uuid,
                   const char *path, struct error *err)
{
    struct keeper *k = m->keeper;
    CLEANUP(super_fini) struct super s = {0};

    int r = keeper_build(k, &m->change, err);
    if (r == 0)
        r = keeper_write_before(k, &m->change, err);
    if (r < 0)
        return r;
    super_copy(&s, &m->change.next);
    clear_group(&s);
    s.next = s.table;
    tide_table_copy(&s.table, &tide_super(k->tide)->table);
    s.group = *group;
    member_copy(&s.coordinator, uuid, path);
    r = tide_write_super(k->tide, &s, err);
    m->prepared = r == 0;
    return r;
}

/* NEXT becomes the table; with RECORD, the first member tells the others. */
static int flip(struct member *m, const struct tide_record *record, struct error *err)
{
    struct keeper *k = m->keeper;
    CLEANUP(super_fini) struct super s = {0};

    super_copy(&s, tide_super(k->tide));
    tide_table_fini(&s.table);
    s.table = s.next;
    s.next = (struct tide_table){0};
    clear_group(&s);
    if (record)
        super_add_record(&s, record);
    int r = tide_write_super(k->tide, &s, err);
    if (r == 0)
        keeper_changed(k, &m->change);
    return r;
}

static int drop_record(struct keeper *k, const struct tide_id *group, struct error *err)
{
    CLEANUP(super_fini) struct super s = {0};

    super_copy(&s, tide_super(k->tide));
    super_drop_record(&s, group);
    return tide_write_super(k->tide, &s, err);
}

/* All are prepared and the group is committed: a member that cannot follow in its tide file gets a
 * new one, as after any failure. False: nor can it have that, and still asks. */
static bool follow(struct member *m)
{
    struct error err = ERROR_INIT;

    if (flip(m, NULL, &err) == 0)
        return true;
    log_warning("Node '%s': %s", node_name(m->keeper->node), err.text);
    error_clear(&err);
    if (keeper_change_state(m->keeper, &err) == 0)
        return true;
    log_error("Node '%s': %s", node_name(m->keeper->node), err.text);
    return false;
}

static int commit_members(struct member *ms, size_t n, struct error *err)
{
    struct keeper *first = ms[0].keeper;
    struct tide_id group;
    int r = 0;

    random_bytes(group.bytes, sizeof group.bytes);
    group.bytes[0] |= 1;
    for (size_t i = 0; r == 0 && i < n; i++)
        if (!ms[i].keeper->tide)
            r = keeper_make_tide(ms[i].keeper, err);
        else if (tide_failed(ms[i].keeper->tide))
            r = keeper_renew(ms[i].keeper, err);
    if (r < 0)
        return r;
    const struct tide_id uuid = tide_super(first->tide)->uuid;
    struct tide_record record = {.group = group, .n = n};
    record.members = xcalloc(n, sizeof *record.members);
    for (size_t i = 0; i < n; i++)
        member_copy(&record.members[i], &tide_super(ms[i].keeper->tide)->uuid,
                    ms[i].keeper->options.path);

    for (size_t i = 0; r == 0 && i < n; i++) {
        r = prepare(&ms[i], &group, &uuid, first->options.path, err);
        if (r == 0 && i == 0 && BROKEN(group_record_first))
            r = flip(&ms[0], &record, err);
    }
    for (size_t i = 1; r == 0 && i < n && BROKEN(group_followed_first); i++)
        follow(&ms[i]);
    if (r == 0 && !BROKEN(group_record_first))
        r = flip(&ms[0], &record, err);
    if (r < 0 && first->tide && tide_failed(first->tide)) {
        /* It may have the record. Before anybody hears of a failure it must not. */
        struct error why = ERROR_INIT;
        if (keeper_renew(first, &why) < 0)
            log_error("Node '%s': %s", node_name(first->node), why.text);
    }
    bool all = true;
    if (r == 0) {
        if (BROKEN(group_record_dropped_early))
            r = drop_record(first, &group, err);
        for (size_t i = 1; i < n && !BROKEN(group_followed_first); i++)
            all &= follow(&ms[i]);
        struct error why = ERROR_INIT;
        if (all && !BROKEN(group_record_dropped_early) && drop_record(first, &group, &why) < 0)
            log_warning("Node '%s': %s", node_name(first->node), why.text);
    }
    for (size_t i = 0; i < n; i++)
        free(record.members[i].path);
    free(record.members);
    return r;
}

int keepers_commit(struct keeper *const *ks, size_t n, struct error *err)
{
    CLEANUP(memory_freep) struct member *ms = xcalloc(n + 1, sizeof *ms);
    size_t count = 0;
    int r = 0;

    if (n == 1)
        return keeper_commit(ks[0], err);
    /* Only one group is under way at a time: its caller has the graph. */
    for (size_t i = 0; i < n; i++)
        mutex_lock_shielded(&ks[i]->lock);
    for (size_t i = 0; i < n; i++)
        if (keeper_has_to_commit(ks[i]))
            ms[count++].keeper = ks[i];
    if (count == 1)
        r = keeper_change_state(ms[0].keeper, err);
    else if (count > 1)
        r = commit_members(ms, count, err);
    for (size_t i = 0; i < n; i++)
        keeper_look(ks[i]);
    for (size_t i = 0; r == 0 && i < n; i++)
        if (keeper_has_bitmaps(ks[i]) && !ks[i]->node->read_only)
            r = keeper_engage(ks[i], err);
    for (size_t i = 0; i < n; i++)
        mutex_unlock(&ks[i]->lock);
    for (size_t i = 0; i < count; i++)
        change_fini(&ms[i].change);
    return r;
}

/* ---- after a crash ---- */

/* The superblock of another disk's tide file, which may be open here. 0, or -ENOENT: there is none,
 * or it is another one. */
static int look_at(struct keeper *k, const struct tide_member *who, struct super *ret)
{
    struct error err = ERROR_INIT;
    struct tide *t;

    struct keeper *here;
    LIST_FOREACH (here, k->options.peers, in_peers)
        if (here->tide && tide_id_equal(&tide_super(here->tide)->uuid, &who->uuid)) {
            super_copy(ret, tide_super(here->tide));
            return 0;
        }
    int r = tide_open(who->path, true, &t, &err);
    if (r < 0)
        return -ENOENT;
    super_copy(ret, tide_super(t));
    tide_close(t);
    if (tide_id_equal(&ret->uuid, &who->uuid))
        return 0;
    super_fini(ret);
    return -ENOENT;
}

static bool has_record(const struct super *s, const struct tide_id *group)
{
    for (size_t i = 0; i < s->n_records; i++)
        if (tide_id_equal(&s->records[i].group, group))
            return true;
    return false;
}

const struct tide_table *keeper_resolve(struct keeper *k, const struct super *s, bool *doubt)
{
    CLEANUP(super_fini) struct super first = {0};

    *doubt = false;
    if (tide_id_none(&s->group))
        return &s->table;
    if (tide_id_equal(&s->coordinator.uuid, &s->uuid))
        return &s->table; /* the first one itself: no record is a no */
    if (look_at(k, &s->coordinator, &first) < 0) {
        *doubt = !BROKEN(group_absent_means_no);
        if (!*doubt)
            return &s->table;
        k->doubt.group = s->group;
        k->doubt.coordinator.uuid = s->coordinator.uuid;
        k->doubt.coordinator.path = xstrdup(s->coordinator.path);
        tide_table_copy(&k->doubt.next, &s->next);
        return &s->table;
    }
    return has_record(&first, &s->group) ? &s->next : &s->table;
}

void keeper_forget_doubt(struct keeper *k)
{
    free(steal(k->doubt.coordinator.path));
    tide_table_fini(&k->doubt.next);
    k->doubt.group = (struct tide_id){{0}};
}

/* Has this member followed? One that cannot be asked may not have. */
static bool has_followed(struct keeper *k, const struct tide_member *who,
                         const struct tide_id *group)
{
    CLEANUP(super_fini) struct super s = {0};

    if (tide_id_equal(&who->uuid, &tide_super(k->tide)->uuid))
        return true;
    return look_at(k, who, &s) == 0 && !tide_id_equal(&s.group, group);
}

static void drop_old_records(struct keeper *k, struct super *s)
{
    for (size_t i = 0; i < s->n_records;) {
        const struct tide_record *r = &s->records[i];
        bool all = true;
        for (size_t j = 0; all && j < r->n; j++)
            all = has_followed(k, &r->members[j], &r->group);
        struct tide_id group = r->group;
        if (all)
            super_drop_record(s, &group);
        else
            i++;
    }
}

void keeper_carry_groups(struct keeper *k, struct super *next)
{
    clear_group(next);
    if (k->tide && !k->in_use)
        drop_old_records(k, next);
    if (tide_id_none(&k->doubt.group))
        return;
    next->group = k->doubt.group;
    member_copy(&next->coordinator, &k->doubt.coordinator.uuid, k->doubt.coordinator.path);
    tide_table_copy(&next->next, &next->table);
    for (size_t i = 0; i < next->next.n; i++) {
        struct tide_bitmap *b = &next->next.items[i];
        const struct tide_bitmap *then = tide_table_find(&k->doubt.next, b->name);
        if (!then)
            continue;
        b->generation = then->generation;
        free(b->last_job);
        b->last_job = then->last_job ? xstrdup(then->last_job) : NULL;
    }
}
