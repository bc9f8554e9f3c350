/* Transactions of the histories' client, and what they do to bitmaps.
 *
 * The model must follow at the very moment at which a transaction takes effect, and that is while
 * its command is still under way: when a job of it begins to run, or, without one, when the last
 * of its actions can be seen: a bitmap that is there for nothing else. */
#include "histories.h"

#include "job/transaction.h"

struct json_object *parse(const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *p = text; *p; p++) {
        if (*p == '\'')
            *p = '"';
    }
    struct json_object *o = json_tokener_parse(text);
    HOLDS(o);
    return o;
}

void plan_action(struct plan *p, const char *type, struct json_object *data)
{
    struct json_object *action = json_object_new_object();
    json_add_string(action, "type", type);
    json_add(action, "data", data);
    if (!p->actions)
        p->actions = json_object_new_array();
    trace("  %s %s", type, json_object_to_json_string_ext(data, JSON_C_TO_STRING_PLAIN));
    json_object_array_add(p->actions, action);
}

void plan_call_off(struct plan *p)
{
    plan_action(p, "abort", parse("{}"));
    p->called_off = true;
}

/* ---- what the model does when it takes effect ---- */

static struct change *new_change(struct plan *p, enum change_kind what, struct marks *m)
{
    HOLDS(p->n < ARRAY_SIZE(p->changes));
    struct change *c = &p->changes[p->n++];
    *c = (struct change){.what = what, .marks = m};
    return c;
}

void plan_add(struct plan *p, struct disk *d, const char *prefix, bool disabled, struct marks **ret)
{
    struct change *c = new_change(p, ADD, NULL);
    c->disk = d;
    c->granularity = 512ull << dice(10);
    c->disabled = disabled;
    c->ret = ret;
    snprintf(c->name, sizeof c->name, "%s%u", prefix, history->next_name++);
    plan_action(p, "block-dirty-bitmap-add",
                parse("{'node':'%s','name':'%s','granularity':%llu,'disabled':%s}", d->name,
                      c->name, (unsigned long long)c->granularity, disabled ? "true" : "false"));
}

void plan_change(struct plan *p, enum change_kind what, struct marks *m)
{
    static const char *const names[] = {
        [CLEAR] = "block-dirty-bitmap-clear",
        [ENABLE] = "block-dirty-bitmap-enable",
        [DISABLE] = "block-dirty-bitmap-disable",
        [REMOVE] = "block-dirty-bitmap-remove",
    };
    new_change(p, what, m);
    plan_action(p, names[what], parse("{'node':'%s','name':'%s'}", m->disk->name, m->name));
}

void plan_merge(struct plan *p, struct marks *to, struct marks *from)
{
    new_change(p, MERGE, to)->from = from;
    plan_action(p, "block-dirty-bitmap-merge",
                parse("{'node':'%s','target':'%s','bitmaps':[{'node':'%s','name':'%s'}]}",
                      to->disk->name, to->name, from->disk->name, from->name));
}

static void change_model(const struct change *c)
{
    struct marks *m = c->marks;
    switch (c->what) {
    case ADD:
        m = marks_new(c->disk, c->name, c->granularity, !c->disabled);
        if (c->ret)
            *c->ret = m;
        break;
    case CLEAR:
        marks_clear(m);
        break;
    case ENABLE:
    case DISABLE:
        m->enabled = c->what == ENABLE;
        break;
    case MERGE:
        marks_add(m, &c->from->now);
        break;
    case REMOVE:
        marks_free(m);
        break;
    }
}

void plan_settles(void)
{
    struct plan *p = history->plan;
    if (!p || p->settled)
        return;
    HOLDS(!p->called_off);
    p->settled = true;
    for (unsigned i = 0; i < p->n; i++)
        change_model(&p->changes[i]);
}

void plan_look(void)
{
    struct plan *p = history->plan;
    if (p && !p->called_off && *p->sentinel && dirty_find(p->disk->node, p->sentinel))
        plan_settles();
}

void plan_watch(struct plan *p, struct disk *d)
{
    p->disk = d;
    if (*d->sentinel)
        plan_action(p, "block-dirty-bitmap-remove",
                    parse("{'node':'%s','name':'%s'}", d->name, d->sentinel));
    snprintf(p->sentinel, sizeof p->sentinel, "z%u", history->next_name++);
    plan_action(p, "block-dirty-bitmap-add",
                parse("{'node':'%s','name':'%s','disabled':true}", d->name, p->sentinel));
}

int plan_carry_out(struct plan *p, struct error *err)
{
    CLEANUP(json_putp)
    struct json_object *properties = p->mode ? parse("{'completion-mode':'%s'}", p->mode) : NULL;
    HOLDS(!history->plan);
    history->plan = p;
    int r = transaction_run(history->graph, history->jobs, p->actions, properties, err);
    json_object_put(steal(p->actions));
    trace("  transaction: %s", r < 0 ? err->text : "done");
    if (r == 0)
        plan_settles();
    HOLDS(p->settled == (r == 0));
    if (r == 0 && *p->sentinel)
        snprintf(p->disk->sentinel, sizeof p->disk->sentinel, "%s", p->sentinel);
    history->plan = NULL;
    return r;
}

void plan_carry_out_ok(struct plan *p)
{
    struct error err = ERROR_INIT;
    if (plan_carry_out(p, &err) < 0)
        WRONG("a transaction fails: %s", err.text);
}

/* ---- bitmaps ---- */

struct marks *some_marks(struct disk *d, bool busy)
{
    struct marks *m, *found = NULL;
    unsigned n = 0;
    TAILQ_FOREACH (m, &d->marks, link) {
        if (m->busy == busy && one_in(++n))
            found = m;
    }
    return found;
}

bool is_lanes(const struct marks *m)
{
    for (unsigned i = 0; i < history->n_lanes; i++) {
        if (history->lanes[i].marks == m || history->lanes[i].carried == m)
            return true;
    }
    return false;
}

/* Of those that no chain needs. False: none is there. */
static bool change_one(struct plan *p, struct disk *d)
{
    struct marks *m = some_marks(d, false), *from;
    uint64_t choice = dice(8);

    if (choice == 0 || !m || (choice < 7 && is_lanes(m))) {
        plan_add(p, d, "b", one_in(3), NULL);
    } else if (choice < 3 || is_lanes(m)) {
        /* A chain's bitmap may be dirtier than it must. */
        struct disk *other = history->disks[dice(history->n_disks)];
        from = some_marks(other->size == d->size ? other : d, false);
        if (from)
            plan_merge(p, m, from);
    } else if (choice == 3) {
        plan_change(p, REMOVE, m);
        return false; /* nothing after it may name it */
    } else {
        static const enum change_kind kinds[] = {CLEAR, ENABLE, DISABLE};
        plan_change(p, kinds[dice(ARRAY_SIZE(kinds))], m);
    }
    return true;
}

/* Up to three changes in one transaction, which may be called off. */
void change_bitmaps(struct disk *d)
{
    struct plan p = {0};

    for (uint64_t n = 1 + dice(3); n && change_one(&p, d); n--)
        ;
    plan_watch(&p, d);
    if (one_in(4)) {
        struct error err = ERROR_INIT;
        plan_call_off(&p);
        HOLDS(plan_carry_out(&p, &err) < 0);
        return;
    }
    plan_carry_out_ok(&p);
}

/* A job has it: nobody else may. */
void try_a_busy_one(struct disk *d)
{
    static const enum change_kind kinds[] = {CLEAR, ENABLE, DISABLE, REMOVE};
    struct marks *m = some_marks(d, true);
    struct error err = ERROR_INIT;
    struct plan p = {0};

    if (!m || about_to_end(m))
        return;
    plan_change(&p, kinds[dice(ARRAY_SIZE(kinds))], m);
    plan_call_off(&p); /* it does not come so far */
    HOLDS(plan_carry_out(&p, &err) < 0);
    if (!strstr(err.text, "in use by another operation"))
        WRONG("bitmap %s of %s, which a job has, is changed: %s", m->name, d->name, err.text);
}
