#include "model.h"

#include <stdio.h>

void model_init(struct model *m, uint64_t sectors)
{
    *m = (struct model){.n = sectors, .keep_from = MODEL_NEVER};
    m->cells = xcalloc(sectors, sizeof *m->cells);
    m->row = xcalloc(sectors, sizeof *m->row);
    for (uint64_t i = 0; i < sectors; i++) {
        m->cells[i].n = 1;
        m->cells[i].writes[0] = (struct write_known){.ok = true, .durable = true};
    }
}

void model_fini(struct model *m)
{
    free(m->cells);
    free(m->row);
    m->cells = NULL;
    m->row = NULL;
}

uint64_t model_now(struct model *m)
{
    return ++m->now;
}

static bool above(const struct write_known *d, const struct write_known *c)
{
    return c->ended < d->begun;
}

static void prune(struct model *m, struct cell *cell)
{
    unsigned kept = 0;
    if (cell->n < 2)
        return;
    for (unsigned c = 0; c < cell->n; c++) {
        bool gone = false;
        for (unsigned d = 0; d < cell->n && !gone; d++) {
            const struct write_known *w = &cell->writes[d];
            gone = w->durable && w->ended < m->keep_from && above(w, &cell->writes[c]);
        }
        if (!gone)
            cell->writes[kept++] = cell->writes[c]; /* what stands above stays: it is later */
    }
    cell->n = (uint8_t)kept;
}

bool model_has_room(const struct model *m, uint64_t first, uint64_t n)
{
    for (uint64_t i = first; i < first + n; i++)
        if (m->cells[i].n == MODEL_WRITES)
            return false;
    return true;
}

uint64_t model_begin(struct model *m, uint64_t first, uint64_t n, uint32_t stamp)
{
    uint64_t begun = model_now(m);
    for (uint64_t i = first; i < first + n; i++) {
        struct cell *cell = &m->cells[i];
        assert(cell->n < MODEL_WRITES);
        cell->writes[cell->n++] =
            (struct write_known){.stamp = stamp, .begun = begun, .ended = MODEL_NEVER};
        cell->last_active = begun;
        if (!cell->unsettled) {
            cell->unsettled = true;
            m->row[m->n_row++] = (uint32_t)i;
        }
    }
    return begun;
}

void model_end(struct model *m, uint64_t first, uint64_t n, uint64_t begun, bool ok, bool durable)
{
    uint64_t ended = model_now(m);
    for (uint64_t i = first; i < first + n; i++) {
        struct cell *cell = &m->cells[i];
        cell->last_active = ended;
        for (unsigned k = 0; k < cell->n; k++)
            if (cell->writes[k].begun == begun) {
                cell->writes[k].ended = ended;
                cell->writes[k].ok = ok;
                cell->writes[k].durable = ok && durable;
            }
        if (ok && durable)
            prune(m, cell);
    }
}

void model_flushed(struct model *m, uint64_t begun, bool ok)
{
    size_t still = 0;
    for (size_t r = 0; ok && r < m->n_row; r++) {
        struct cell *cell = &m->cells[m->row[r]];
        bool more = false;
        for (unsigned k = 0; k < cell->n; k++) {
            struct write_known *w = &cell->writes[k];
            if (w->durable || !w->ok || w->tainted || w->ended >= begun)
                continue;
            w->durable = more = true;
        }
        if (more || cell->n > 1)
            prune(m, cell);
        cell->unsettled = cell->n > 1 || !cell->writes[0].durable;
        if (cell->unsettled)
            m->row[still++] = m->row[r];
    }
    if (ok)
        m->n_row = still;
}

void model_taint(struct model *m)
{
    for (size_t r = 0; r < m->n_row; r++) {
        struct cell *cell = &m->cells[m->row[r]];
        for (unsigned k = 0; k < cell->n; k++)
            cell->writes[k].tainted |= !cell->writes[k].durable;
    }
}

bool model_in_flight(const struct model *m)
{
    for (size_t r = 0; r < m->n_row; r++) {
        const struct cell *cell = &m->cells[m->row[r]];
        for (unsigned k = 0; k < cell->n; k++)
            if (cell->writes[k].ended == MODEL_NEVER)
                return true;
    }
    return false;
}

void model_cut(struct model *m)
{
    uint64_t now = model_now(m);
    m->keep_from = MODEL_NEVER;
    m->holders = 0;
    for (size_t r = 0; r < m->n_row; r++) {
        struct cell *cell = &m->cells[m->row[r]];
        for (unsigned k = 0; k < cell->n; k++)
            if (cell->writes[k].ended == MODEL_NEVER)
                cell->writes[k].ended = cell->last_active = now;
    }
}

static bool may(const struct cell *cell, uint32_t stamp, bool after_power)
{
    for (unsigned c = 0; c < cell->n; c++) {
        bool gone = cell->writes[c].stamp != stamp;
        for (unsigned d = 0; d < cell->n && !gone; d++) {
            const struct write_known *w = &cell->writes[d];
            gone = (after_power ? w->durable : w->ok && !w->tainted) && above(w, &cell->writes[c]);
        }
        if (!gone)
            return true;
    }
    return false;
}

bool model_may_read(const struct model *m, uint64_t sector, uint32_t stamp)
{
    return may(&m->cells[sector], stamp, false);
}

bool model_may_survive(const struct model *m, uint64_t sector, uint32_t stamp)
{
    return may(&m->cells[sector], stamp, true);
}

void model_seen(struct model *m, uint64_t sector, uint32_t stamp, bool after_power)
{
    struct cell *cell = &m->cells[sector];
    uint64_t now = model_now(m);
    if (after_power) {
        cell->n = 1;
        cell->writes[0] = (struct write_known){
            .stamp = stamp, .ok = true, .durable = true, .begun = now, .ended = now};
        return;
    }
    /* Of two with this stamp it may be the one that is not durable. */
    struct write_known *w = NULL;
    for (unsigned k = cell->n; k-- > 0;)
        if (cell->writes[k].stamp == stamp && (!w || (w->durable && !cell->writes[k].durable)))
            w = &cell->writes[k];
    if (w && cell->n > 1) { /* it stands above all else now */
        w->begun = w->ended = now;
        w->ok = true;
    }
}

/* ---- an instant ---- */

uint64_t model_hold(struct model *m)
{
    uint64_t now = model_now(m);
    m->keep_from = min_u64(m->keep_from, now);
    m->holders++;
    return now;
}

void model_instant(struct model *m, uint64_t from, struct instant *ret)
{
    *ret = (struct instant){.from = from, .to = model_now(m), .n = m->n};
    ret->held = xcalloc(m->n, sizeof *ret->held);
    for (uint64_t i = 0; i < m->n; i++) {
        const struct cell *cell = &m->cells[i];
        for (unsigned c = 0; c < cell->n; c++) {
            bool gone = false;
            for (unsigned d = 0; d < cell->n && !gone; d++) {
                const struct write_known *w = &cell->writes[d];
                gone = w->ok && !w->tainted && w->ended < from && above(w, &cell->writes[c]);
            }
            if (!gone)
                ret->held[i].stamps[ret->held[i].n++] = cell->writes[c].stamp;
        }
    }
    if (m->holders && !--m->holders)
        m->keep_from = MODEL_NEVER;
}

bool instant_has(const struct instant *i, uint64_t sector, uint32_t stamp)
{
    for (unsigned k = 0; k < i->held[sector].n; k++)
        if (i->held[sector].stamps[k] == stamp)
            return true;
    return false;
}

void instant_fini(struct instant *i)
{
    free(i->held);
    *i = (struct instant){0};
}

void model_describe(const struct model *m, uint64_t sector, char *text, size_t size)
{
    const struct cell *cell = &m->cells[sector];
    size_t n = 0;
    text[0] = '\0';
    for (unsigned k = 0; k < cell->n && n < size; k++) {
        const struct write_known *w = &cell->writes[k];
        n += (size_t)snprintf(text + n, size - n, "%s%#x(%llu-%lld%s%s%s)", k ? " " : "", w->stamp,
                              (unsigned long long)w->begun, (long long)w->ended, w->ok ? " ok" : "",
                              w->durable ? " durable" : "", w->tainted ? " tainted" : "");
    }
}

/* ---- sectors as bytes ---- */

void stamp_fill(void *sector, uint32_t stamp)
{
    uint32_t words[MODEL_SECTOR / 4];
    for (uint32_t i = 0; i < ARRAY_SIZE(words); i++)
        words[i] = stamp ? stamp ^ i << 24 : 0;
    memcpy(sector, words, sizeof words);
}

bool stamp_read(const void *sector, uint32_t *stamp)
{
    static const uint8_t zeroes[MODEL_SECTOR];
    static uint8_t want[MODEL_SECTOR]; /* what was asked for last: neighbours are alike */
    static uint32_t wanted;
    memcpy(stamp, sector, sizeof *stamp);
    if (!*stamp)
        return !memcmp(zeroes, sector, sizeof zeroes);
    if (*stamp != wanted)
        stamp_fill(want, wanted = *stamp);
    return !memcmp(want, sector, sizeof want);
}
