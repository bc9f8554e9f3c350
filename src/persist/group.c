/* Changes of state of several disks, all or none, through any crash.
 *
 *     0  the first disk's superblock has a record of the group and its members, undecided
 *     1  when that is durable, each of the others is prepared: its superblock has NEXT beside the
 *        old table, which still holds, the group's id, and who is asked (the first's tide file)
 *     2  when all are durable: the first disk's superblock has its new table, and the record,
 *        decided
 *     3  when that is durable: each of the others has NEXT as its table
 *     4  when all are durable: the first disk's record goes
 *
 * A disk that is found prepared asks the first one's file: with the record, decided, NEXT holds;
 * without it, and the file there, the old table. So the file must be there for as long as somebody
 * may ask, also when it has nothing else to say any more, which is what 0 is for; 2 must not begin
 * before 1 has ended on every disk (else a disk that is not prepared stays behind), 3 not before 2
 * (else it is ahead of a group that may never be committed), and the record must not go before 3
 * has ended on every disk, also past a clean close (else those that come later take it for a no).
 *
 * Is the file not there, nobody knows: *in doubt*. A bitmap that the group has changed is then held
 * (dirty_hold): its bits are those of a no, its successor has those of a yes and what is written
 * meanwhile. Each further superblock says both:
 *
 *     table    current: the bits of a no   successor: the bits of a yes     live; what a no means
 *     NEXT                                 current: the same                what a yes means
 *
 * Marks go to the table's bitmaps, as always. Where the answer would make a bitmap, or enable one,
 * the table has it all the same, and a flag says that it does not if the answer is no.
 *
 * The answer is asked for when the disk is opened, and whenever another one is. It may never come:
 * then a bitmap in doubt can be removed, which is what a client does that does not want to wait.
 *
 * A superblock has room for one group. So a disk in doubt cannot be prepared for a second; it can
 * be the first of one. A transaction over two such disks is refused before it begins. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "persist/keeper_internal.h"
#include "rt/clock.h"

#include <stdio.h>

/* A disk in a group that is being changed. */
struct member {
    struct keeper *keeper;
    struct change change;
    const struct tide_id *group;
    const struct tide_member *first;
    const struct tide_record *record; /* of the first one */
    struct error err;
    int result;
    bool followed;
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

/* All that must be durable before a superblock that says so. */
static int stage(struct member *m)
{
    struct keeper *k = m->keeper;

    int r = keeper_build(k, &m->change, &m->err);
    return r < 0 ? r : keeper_write_before(k, &m->change, &m->err);
}

static int prepare(void *arg)
{
    SHIELD();
    struct member *m = arg;
    struct keeper *k = m->keeper;
    CLEANUP(super_fini) struct super s = {0};

    m->result = stage(m);
    if (m->result < 0)
        return 0;
    super_copy(&s, &m->change.next);
    clear_group(&s);
    s.next = s.table;
    tide_table_copy(&s.table, &tide_super(k->tide)->table);
    s.group = *m->group;
    member_copy(&s.coordinator, &m->first->uuid, m->first->path);
    m->result = tide_write_super(k->tide, &s, &m->err);
    return 0;
}

/* The first member knows who may ask. */
static int announce(struct member *m)
{
    CLEANUP(super_fini) struct super s = {0};
    struct tide_record record = *m->record;

    record.undecided = true;
    super_copy(&s, tide_super(m->keeper->tide));
    super_add_record(&s, &record);
    return tide_write_super(m->keeper->tide, &s, &m->err);
}

/* It tells the others. Its change may carry on a doubt. */
static int commit_first(void *arg)
{
    SHIELD();
    struct member *m = arg;
    CLEANUP(super_fini) struct super s = {0};

    super_copy(&s, &m->change.next);
    super_drop_record(&s, m->group);
    super_add_record(&s, m->record);
    m->result = tide_write_super(m->keeper->tide, &s, &m->err);
    if (m->result == 0)
        keeper_changed(m->keeper, &m->change);
    return 0;
}

/* NEXT becomes the table. */
static int flip(struct member *m, struct error *err)
{
    struct keeper *k = m->keeper;
    CLEANUP(super_fini) struct super s = {0};

    super_copy(&s, tide_super(k->tide));
    tide_table_fini(&s.table);
    s.table = s.next;
    s.next = (struct tide_table){0};
    clear_group(&s);
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
 * new one, as after any failure. If it cannot have that either it still asks. */
static int follow(void *arg)
{
    SHIELD();
    struct member *m = arg;
    struct error err = ERROR_INIT;

    m->followed = flip(m, &err) == 0;
    if (m->followed)
        return 0;
    log_warning("Node '%s': %s", node_name(m->keeper->node), err.text);
    error_clear(&err);
    m->followed = keeper_change_state(m->keeper, &err) == 0;
    if (!m->followed)
        log_error("Node '%s': %s", node_name(m->keeper->node), err.text);
    return 0;
}

/* Each member but the first does STEP, all at the same time. */
static void others(struct scope *tasks, task_fn *step, struct member *ms, size_t n)
{
    for (size_t i = 1; i < n; i++)
        scope_spawn(tasks, step, &ms[i]);
}

static int result_of(struct member *ms, size_t n, struct error *err)
{
    for (size_t i = 0; i < n; i++)
        if (ms[i].result < 0) {
            if (err)
                *err = ms[i].err;
            return ms[i].result;
        }
    return 0;
}

/* An image must vouch for its tide file before the group can be decided there. One that has had no
 * bitmaps is not in use yet, and what a killed program has left beside it is void. */
static int have_tides(struct member *ms, size_t n, struct error *err)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < n; i++) {
        struct keeper *k = ms[i].keeper;
        if (!k->tide || (!k->in_use && !keeper_is_engaged(k)))
            r = keeper_make_tide(k, err);
        else if (tide_failed(k->tide))
            r = keeper_renew(k, err);
        if (r == 0 && !BROKEN(group_engages_late))
            r = keeper_engage(k, err);
    }
    return r;
}

/* Steps 1 and 2. */
static int decide(struct member *ms, size_t n, struct error *err)
{
    SCOPE(tasks);

    ms[0].result = announce(&ms[0]);
    if (ms[0].result == 0)
        ms[0].result = stage(&ms[0]);
    if (ms[0].result == 0 && BROKEN(group_record_first))
        commit_first(&ms[0]);
    if (ms[0].result == 0)
        others(&tasks, prepare, ms, n);
    if (!BROKEN(group_prepared_not_awaited))
        (void)!scope_join(&tasks);
    int r = result_of(ms, n, err);
    if (r == 0 && BROKEN(group_followed_first)) {
        others(&tasks, follow, ms, n);
        (void)!scope_join(&tasks);
    }
    if (r == 0 && !BROKEN(group_record_first) && !BROKEN(group_record_not_awaited))
        commit_first(&ms[0]);
    (void)!scope_join(&tasks);
    return result_of(ms, n, err);
}

/* Steps 3 and 4. What goes wrong now is for later: the group is committed. */
static void move_on(struct member *ms, size_t n)
{
    struct keeper *first = ms[0].keeper;
    struct error err = ERROR_INIT;
    bool all = true;
    SCOPE(tasks);

    if (BROKEN(group_record_not_awaited))
        scope_spawn(&tasks, commit_first, &ms[0]);
    if (BROKEN(group_record_dropped_early))
        (void)!drop_record(first, ms[0].group, &err);
    if (!BROKEN(group_followed_first))
        others(&tasks, follow, ms, n);
    (void)!scope_join(&tasks);
    for (size_t i = 1; i < n; i++)
        all &= ms[i].followed;
    if (all && !BROKEN(group_record_dropped_early) && drop_record(first, ms[0].group, &err) < 0)
        log_warning("Node '%s': %s", node_name(first->node), err.text);
}

static int commit_members(struct member *ms, size_t n, struct error *err)
{
    SHIELD();
    struct keeper *first = ms[0].keeper;
    struct tide_id group;

    random_bytes(group.bytes, sizeof group.bytes);
    group.bytes[0] |= 1;
    int r = have_tides(ms, n, err);
    if (r < 0)
        return r;
    struct tide_record record = {.group = group, .n = n};
    record.members = xcalloc(n, sizeof *record.members);
    for (size_t i = 0; i < n; i++) {
        member_copy(&record.members[i], &tide_super(ms[i].keeper->tide)->uuid,
                    ms[i].keeper->options.path);
        ms[i].group = &group;
        ms[i].first = &record.members[0];
        ms[i].record = &record;
    }
    r = decide(ms, n, err);
    if (r == 0)
        move_on(ms, n);
    else if (first->tide && tide_failed(first->tide)) {
        /* It may have the record. Before anybody hears of a failure it must not. */
        struct error why = ERROR_INIT;
        if (keeper_renew(first, &why) < 0)
            log_error("Node '%s': %s", node_name(first->node), why.text);
    }
    for (size_t i = 0; i < n; i++)
        free(record.members[i].path);
    free(record.members);
    return r;
}

/* One disk in doubt can be the first of a group. */
static int check_doubts(struct keeper *const *ks, size_t n, struct error *err)
{
    const struct keeper *one = NULL;

    for (size_t i = 0; i < n; i++) {
        if (!keeper_in_doubt(ks[i]))
            continue;
        if (one)
            return error_set(err, EBUSY,
                             "Nodes '%s' and '%s' cannot change together while both have bitmaps "
                             "in doubt: open the disk with '%s', or remove these bitmaps",
                             node_name(one->node), node_name(ks[i]->node),
                             ks[i]->doubt.coordinator.path);
        one = ks[i];
    }
    return 0;
}

int keepers_begin(struct keeper *const *ks, size_t n, struct error *err)
{
    int r = check_doubts(ks, n, err);

    for (size_t i = 0; r == 0 && i < n; i++)
        r = keeper_begin(ks[i], err);
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
    for (size_t i = 1; i < count; i++)
        if (keeper_in_doubt(ms[i].keeper)) {
            struct keeper *first = ms[i].keeper;
            ms[i].keeper = ms[0].keeper;
            ms[0].keeper = first;
        }
    if (count == 1)
        r = keeper_change_state(ms[0].keeper, err);
    else if (count > 1 && (r = check_doubts(ks, n, err)) == 0)
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

static const struct tide_record *record_of(const struct super *s, const struct tide_id *group)
{
    for (size_t i = 0; i < s->n_records; i++)
        if (tide_id_equal(&s->records[i].group, group))
            return &s->records[i];
    return NULL;
}

/* Is this superblock of the tide file WHO, as far as GROUP is concerned? A qcow2 image gets another
 * file when its guard does not vouch for the one that it has; the records are in that, too. */
static bool is_its(const struct super *s, const struct tide_member *who,
                   const struct tide_id *group)
{
    return tide_id_equal(&s->uuid, &who->uuid) || record_of(s, group);
}

/* The superblock of another disk's tide file, which may be open here. 0, or -ENOENT: there is none,
 * or it is another one. */
static int look_at(struct keeper *k, const struct tide_member *who, const struct tide_id *group,
                   struct super *ret)
{
    struct error err = ERROR_INIT;
    struct tide *t;

    struct keeper *here;
    LIST_FOREACH (here, k->options.peers, in_peers)
        if (here != k && here->tide && !tide_is_doubtful(here->tide) &&
            (tide_id_equal(&tide_super(here->tide)->uuid, &who->uuid) ||
             (!strcmp(here->options.path, who->path) &&
              is_its(tide_super(here->tide), who, group)))) {
            super_copy(ret, tide_super(here->tide));
            return 0;
        }
    int r = tide_open(who->path, true, &t, &err);
    if (r < 0)
        return -ENOENT;
    const bool doubtful = tide_is_doubtful(t);
    super_copy(ret, tide_super(t));
    tide_close(t);
    if (!doubtful && is_its(ret, who, group))
        return 0;
    super_fini(ret);
    return -ENOENT;
}

static bool has_record(const struct super *s, const struct tide_id *group)
{
    const struct tide_record *r = record_of(s, group);

    return r && !r->undecided;
}

/* Was the group of this id committed? */
enum answer { NO, YES, UNKNOWN };
static enum answer ask(struct keeper *k, const struct tide_member *whom,
                       const struct tide_id *group)
{
    CLEANUP(super_fini) struct super first = {0};

    if (look_at(k, whom, group, &first) < 0)
        return BROKEN(group_absent_means_no) ? NO : UNKNOWN;
    return has_record(&first, group) ? YES : NO;
}

/* A table in doubt, for who knows that the answer is no. */
static void copy_no(struct tide_table *to, const struct tide_table *from)
{
    tide_table_copy(to, from);
    for (size_t i = 0; i < to->n;) {
        struct tide_bitmap *b = &to->items[i];
        if (b->enabled_if_yes)
            b->enabled = b->enabled_if_yes = false;
        if (b->only_if_yes) {
            free(b->name);
            free(b->last_job);
            *b = to->items[--to->n];
        } else {
            i++;
        }
    }
}

void keeper_resolve(struct keeper *k, const struct super *s, struct tide_table *ret, bool *doubt)
{
    enum answer a = NO;

    if (!tide_id_none(&s->group) && !tide_id_equal(&s->coordinator.uuid, &s->uuid))
        a = ask(k, &s->coordinator, &s->group);
    if (a == YES)
        tide_table_copy(ret, &s->next);
    else
        copy_no(ret, &s->table);
    *doubt = a == UNKNOWN;
    if (!*doubt)
        return;
    k->doubt.group = s->group;
    member_copy(&k->doubt.coordinator, &s->coordinator.uuid, s->coordinator.path);
    tide_table_copy(&k->doubt.no, ret);
    tide_table_copy(&k->doubt.yes, &s->next);
}

void keeper_forget_doubt(struct keeper *k)
{
    free(steal(k->doubt.coordinator.path));
    tide_table_fini(&k->doubt.no);
    tide_table_fini(&k->doubt.yes);
    k->doubt.group = (struct tide_id){{0}};
}

bool keeper_in_doubt(const struct keeper *k)
{
    for (struct dirty_bitmap *bm = tide_id_none(&k->doubt.group) ? NULL : dirty_first(k->node); bm;
         bm = dirty_next(bm))
        if (dirty_held(bm))
            return true;
    return false;
}

void keeper_group_text(const struct tide_id *group, char text[33])
{
    for (size_t i = 0; i < sizeof group->bytes; i++)
        snprintf(text + 2 * i, 3, "%02x", group->bytes[i]);
}

/* The answer has come. If it cannot be written it is found again when the disk is next opened. */
static void answer(struct keeper *k, bool yes)
{
    struct node *n = k->node;
    struct error err = ERROR_INIT;
    struct dirty_bitmap *bm = dirty_first(n);

    log_info("Node '%s': its bitmaps %s moved on with others, as '%s' tells", node_name(n),
             yes ? "have" : "have not", k->doubt.coordinator.path);
    graph_quiesce_begin(node_graph(n), &n, 1);
    while (bm) {
        if (!dirty_held(bm)) {
            bm = dirty_next(bm);
            continue;
        }
        const struct tide_bitmap *is =
            tide_table_find(yes ? &k->doubt.yes : &k->doubt.no, dirty_name(bm));
        if (is)
            dirty_answer(bm, &(struct dirty_answer){yes, is->enabled, is->inconsistent,
                                                    is->generation, is->last_job});
        else
            dirty_release(bm);
        bm = dirty_first(n); /* the list is another one */
    }
    keeper_look(k);
    if (dirty_commit(&n, 1, &err) == 0)
        keeper_forget_doubt(k);
    else
        log_warning("Node '%s': %s", node_name(n), err.text);
    graph_quiesce_end(node_graph(n), &n, 1);
}

void keepers_ask_again(struct keepers *all)
{
    struct keeper *k;

    LIST_FOREACH (k, all, in_peers) {
        enum answer a =
            keeper_in_doubt(k) ? ask(k, &k->doubt.coordinator, &k->doubt.group) : UNKNOWN;
        if (a != UNKNOWN)
            answer(k, a == YES);
    }
}

/* Has this member followed? One that cannot be asked may not have. */
static bool has_followed(struct keeper *k, const struct tide_member *who,
                         const struct tide_id *group)
{
    CLEANUP(super_fini) struct super s = {0};
    struct keeper *here;

    /* An image that is open here may have another one. */
    LIST_FOREACH (here, k->options.peers, in_peers)
        if (here->tide && here->options.image && !strcmp(here->options.path, who->path))
            return !tide_id_equal(&tide_super(here->tide)->group, group);
    return look_at(k, who, group, &s) == 0 && !tide_id_equal(&s.group, group);
}

void keeper_drop_old_records(struct keeper *k, struct super *s)
{
    for (size_t i = 0; i < s->n_records;) {
        const struct tide_record *r = &s->records[i];
        bool all = true;
        for (size_t j = 1; all && j < r->n; j++) /* but for the first, which K is */
            all = has_followed(k, &r->members[j], &r->group);
        struct tide_id group = r->group;
        if (all)
            super_drop_record(s, &group);
        else
            i++;
    }
}

/* B, of the table, is as dirty/ has it, and then as a no makes it; as a yes makes it, if at all, it
 * goes into THEN. */
static void carry(struct keeper *k, struct tide_bitmap *b, struct tide_table *then)
{
    const struct dirty_bitmap *bm = dirty_find(k->node, b->name);
    const struct tide_bitmap *no = tide_table_find(&k->doubt.no, b->name);
    const struct tide_bitmap *yes = tide_table_find(&k->doubt.yes, b->name);
    const bool held = bm && dirty_held(bm), lost = held && dirty_inconsistent(bm);

    if (!held)
        yes = b;
    if (yes) {
        struct tide_bitmap *t = &then->items[then->n++];
        *t = *b;
        t->name = xstrdup(b->name);
        t->generation = yes->generation;
        t->last_job = yes->last_job ? xstrdup(yes->last_job) : NULL;
        t->enabled = yes->enabled;
        t->inconsistent = lost || yes->inconsistent;
        t->only_if_yes = t->enabled_if_yes = false;
        if (held) {
            t->current = b->successor;
            t->successor = (struct tide_area){0};
        }
    }
    if (!held)
        return;
    b->only_if_yes = !no;
    b->enabled_if_yes = no && !no->enabled && b->enabled;
    b->inconsistent = lost || (no && no->inconsistent);
}

void keeper_carry_groups(struct keeper *k, struct super *next)
{
    clear_group(next);
    if (k->tide && !k->in_use)
        keeper_drop_old_records(k, next);
    if (!keeper_in_doubt(k))
        return;
    next->group = k->doubt.group;
    member_copy(&next->coordinator, &k->doubt.coordinator.uuid, k->doubt.coordinator.path);
    next->next.items = xcalloc(next->table.n + 1, sizeof *next->next.items);
    for (size_t i = 0; i < next->table.n; i++)
        carry(k, &next->table.items[i], &next->next);
}
