/* Dice, and rows of choices that are enumerated. */
#include "disk.h"

/* splitmix64: any seed is a good one. */
uint64_t dice_next(struct dice *d)
{
    uint64_t z = d->state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t dice_below(struct dice *d, uint64_t n)
{
    return n ? dice_next(d) % n : 0;
}

bool dice_percent(struct dice *d, unsigned hundredths)
{
    return hundredths && dice_below(d, 10000) < hundredths;
}

void choices_by_dice(struct choices *c, struct dice *d)
{
    static const unsigned percents[] = {0, 5, 30, 50, 70, 95, 100};
    c->dice = d;
    c->lands_percent = percents[dice_below(d, ARRAY_SIZE(percents))];
    c->newest_percent = percents[1 + dice_below(d, ARRAY_SIZE(percents) - 1)];
}

uint32_t choose(struct choices *c, uint32_t n)
{
    if (!c->exhaustive)
        return (uint32_t)dice_below(c->dice, n);
    if (n < 2)
        return 0;
    if (c->at == c->n) {
        if (c->n == c->capacity) {
            c->capacity = c->capacity ? 2 * c->capacity : 64;
            c->row = realloc(c->row, c->capacity * sizeof *c->row);
            assert(c->row);
        }
        c->row[c->n].taken = 0;
        c->row[c->n++].of = n;
    }
    assert(c->row[c->at].of == n); /* the same run up to here */
    return c->row[c->at++].taken;
}

bool choose_lands(struct choices *c)
{
    if (c->exhaustive)
        return choose(c, 2);
    return dice_below(c->dice, 100) < c->lands_percent;
}

uint32_t choose_survivor(struct choices *c, uint32_t versions)
{
    if (c->exhaustive)
        return choose(c, versions + 1);
    if (!versions || dice_below(c->dice, 100) >= c->lands_percent)
        return 0;
    if (dice_below(c->dice, 100) < c->newest_percent)
        return versions;
    return 1 + (uint32_t)dice_below(c->dice, versions);
}

bool choices_next(struct choices *c)
{
    c->n = c->at;
    c->at = 0;
    while (c->n) {
        if (++c->row[c->n - 1].taken < c->row[c->n - 1].of)
            return true;
        c->n--;
    }
    return false;
}

void choices_fini(struct choices *c)
{
    free(c->row);
    *c = (struct choices){0};
}
