/* What blkdebug is told to do, and when: rules wait for an event; an event makes them active; an
 * active rule meets requests.
 *
 *     event --> all rules that wait for it, in the present state
 *                  set-state      the state changes (after all of them have been looked at)
 *                  inject-error,  become the active ones of their kind, in place of those of the
 *                  delay          last event that had any
 *     request --> the first active rule of each kind that it fits
 *
 * No I/O but the reading of a configuration file. */
#pragma once

#include "base/error.h"
#include "base/json.h"
#include "base/range.h"
#include "block/debug_event.h"

enum debug_iotype {
    IOTYPE_READ,
    IOTYPE_WRITE,
    IOTYPE_WRITE_ZEROES,
    IOTYPE_DISCARD,
    IOTYPE_FLUSH,
    IOTYPE_BLOCK_STATUS,
    IOTYPES,
};

struct debug_rule {
    enum { RULE_INJECT_ERROR, RULE_SET_STATE, RULE_DELAY } kind;
    enum debug_event event;
    int state; /* 0: any */
    bool active;

    /* What an active one fits, and whether it goes after it has met a request. */
    unsigned iotypes; /* 1 << IOTYPE_* */
    int64_t at_byte;  /* -1: anywhere */
    bool once, immediately;

    int error; /* positive; 0: a request that meets it is spared */
    int new_state;
    uint64_t delay_ns;
};

struct debug_rules {
    struct debug_rule *rules; /* in the order in which they were given */
    size_t n;
    int state;
};

/* Of the file PATH (NULL: none), then of OPTIONS' inject-error, set-state and x-tidemark-delay. */
int debug_rules_load(struct debug_rules *r, const char *path, struct json_object *options,
                     struct error *err) MUST_CHECK;
void debug_rules_fini(struct debug_rules *r);

void debug_rules_event(struct debug_rules *r, enum debug_event event);

/* What a request meets. A flush has an empty RANGE: rules with a sector do not fit it. */
struct debug_verdict {
    int error; /* positive; 0: none */
    bool immediately;
    uint64_t delay_ns;
};
struct debug_verdict debug_rules_judge(struct debug_rules *r, enum debug_iotype iotype,
                                       struct range range);
