/* Reading blkdebug's rules and following them.
 *
 * A configuration file has sections, each a rule, with the words of the options:
 *
 *     # the first write to the file fails
 *     [inject-error]
 *     event = "write_aio"
 *     errno = "28"
 *     once = "on"
 *
 * A line that cannot be read is refused with QEMU's words for it. */
#include "block/blkdebug_rules.h"

#include "rt/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

#define EVENT_TEXT(name) #name,
static const char *const event_names[] = {DEBUG_EVENTS(EVENT_TEXT)};
#undef EVENT_TEXT
static const char *const iotype_names[] = {"read",    "write", "write-zeroes",
                                           "discard", "flush", "block-status"};
_Static_assert(ARRAY_SIZE(iotype_names) == IOTYPES, "a name for each");

enum { CONFIG_BYTES_MAX = 1 << 20, CONFIG_WORD_MAX = 63, CONFIG_VALUE_MAX = 1023 };

/* ---- one rule ---- */

static int find_name(const char *const *names, size_t n, const char *name, struct error *err)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(names[i], name))
            return (int)i;
    return error_set(err, EINVAL, "invalid parameter value: %s", name);
}

static int add_rule(struct debug_rules *r, int kind, struct json_object *options, struct error *err)
{
    struct debug_rule rule = {.kind = (unsigned)kind};
    const char *event = json_get_string(options, "event", NULL);
    const char *iotype = json_get_string(options, "iotype", NULL);

    if (!event)
        return error_set(err, EINVAL, "Missing event name for rule");
    int i = find_name(event_names, ARRAY_SIZE(event_names), event, err);
    if (i < 0)
        return i;
    rule.event = (enum debug_event)i;
    rule.state = (int)json_get_int(options, "state", 0);
    if (iotype) {
        i = find_name(iotype_names, ARRAY_SIZE(iotype_names), iotype, err);
        if (i < 0)
            return i;
        rule.iotypes = 1u << i;
    } else {
        rule.iotypes = (1u << IOTYPES) - 1 - (1u << IOTYPE_BLOCK_STATUS);
    }
    int64_t sector = json_get_int(options, "sector", -1);
    rule.at_byte = sector == -1 ? -1 : (int64_t)((uint64_t)sector * 512);
    rule.once = json_get_bool(options, "once", false);
    rule.immediately = json_get_bool(options, "immediately", false);
    rule.new_state = (int)json_get_int(options, "new_state", 0);
    rule.delay_ns = json_get_uint(options, "delay-ns", 0);
    rule.error = (int)json_get_int(options, "errno", EIO);
    if (rule.error < 0 ||
        rule.error > 4095) /* what is no error number must not look like success */
        rule.error = EIO;

    struct debug_rule *rules = realloc(r->rules, (r->n + 1) * sizeof *rules);
    if (!rules)
        return -ENOMEM;
    r->rules = rules;
    r->rules[r->n++] = rule;
    return 0;
}

/* ---- the configuration file ---- */

static int kind_of(const char *group)
{
    return !strcmp(group, "inject-error")       ? RULE_INJECT_ERROR
           : !strcmp(group, "set-state")        ? RULE_SET_STATE
           : !strcmp(group, "x-tidemark-delay") ? RULE_DELAY
                                                : -1;
}

/* A section's values are text; numbers and switches are checked here. */
static int check_section(int kind, struct json_object *section, struct error *err)
{
    static const char *const numbers[] = {"state", "errno", "sector", "new_state", "delay-ns"};
    static const char *const switches[] = {"once", "immediately"};
    static const char *const known[][8] = {
        [RULE_INJECT_ERROR] = {"event", "state", "iotype", "errno", "sector", "once",
                               "immediately"},
        [RULE_SET_STATE] = {"event", "state", "new_state"},
        [RULE_DELAY] = {"event", "state", "iotype", "sector", "once", "delay-ns"},
    };

    json_object_object_foreach(section, key, value)
    {
        const char *text = json_object_get_string(value);
        bool found = false;
        for (size_t i = 0; known[kind][i]; i++)
            found |= !strcmp(known[kind][i], key);
        if (!found)
            return error_set(err, EINVAL, "Invalid parameter '%s'", key);
        for (size_t i = 0; i < ARRAY_SIZE(numbers); i++) {
            char *end;
            if (strcmp(key, numbers[i]))
                continue;
            errno = 0;
            (void)strtoll(text, &end, 0);
            if (errno || end == text || *end)
                return error_set(err, EINVAL, "Parameter '%s' expects a number", key);
        }
        for (size_t i = 0; i < ARRAY_SIZE(switches); i++)
            if (!strcmp(key, switches[i]) && strcmp(text, "on") && strcmp(text, "off"))
                return error_set(err, EINVAL, "Parameter '%s' expects 'on' or 'off'", key);
    }
    return 0;
}

struct section {
    char group[CONFIG_WORD_MAX + 1];
    struct json_object *values; /* NULL: no section yet */
};

static int end_section(struct debug_rules *r, struct section *s, struct error *err)
{
    CLEANUP(json_putp) struct json_object *values = steal(s->values);
    int kind = kind_of(s->group);
    int ret;

    if (!values)
        return 0;
    if (kind < 0)
        return error_set(err, EINVAL, "There is no option group '%s'", s->group);
    ret = check_section(kind, values, err);
    return ret < 0 ? ret : add_rule(r, kind, values, err);
}

static int read_line(struct debug_rules *r, struct section *s, const char *line, struct error *err)
{
    char word[CONFIG_WORD_MAX + 1], value[CONFIG_VALUE_MAX + 1] = "";

    if (!line[0] || line[0] == '#')
        return 0;
    if (line[0] == '[' && sscanf(line, "[%63[^]]]", word) == 1) {
        int ret = end_section(r, s, err);
        if (ret < 0)
            return ret;
        strcpy(s->group, word);
        s->values = json_object_new_object();
        return 0;
    }
    if (sscanf(line, " %63s = \"%1023[^\"]\"", word, value) < 1)
        return error_set(err, EINVAL, "parse error");
    if (!s->values)
        return error_set(err, EINVAL, "no group defined");
    json_add_string(s->values, word, value);
    return 0;
}

static int parse_config(struct debug_rules *r, char *text, struct error *err)
{
    struct section s = {.group = ""};
    char *rest = text, *line;
    int ret = 0;

    while (ret == 0 && (line = strsep(&rest, "\n")))
        ret = read_line(r, &s, line, err);
    if (ret == 0)
        ret = end_section(r, &s, err);
    json_object_put(s.values);
    return ret;
}

static int read_config(struct debug_rules *r, const char *path, struct error *err)
{
    struct stat st;
    int fd = io_open(path, O_RDONLY | O_NONBLOCK, 0); /* a pipe must not hold us up */
    if (fd < 0)
        return error_set_errno(err, -fd, "Could not read blkdebug config file");
    int ret = io_fstat(fd, &st);
    if (ret == 0 && (!S_ISREG(st.st_mode) || st.st_size > CONFIG_BYTES_MAX))
        ret = -EFBIG;
    char *text = ret == 0 ? xcalloc(1, (size_t)st.st_size + 1) : NULL;
    if (ret == 0)
        ret = io_pread_full(fd, text, (size_t)st.st_size, 0);
    io_close(fd);
    if (ret < 0)
        ret = error_set_errno(err, -ret, "Cannot read config file");
    else
        ret = parse_config(r, text, err);
    free(text);
    return ret;
}

/* ---- all of them ---- */

/* A list of rules; from a json: file name it may be an object with numbers for names. */
static int add_list(struct debug_rules *r, int kind, struct json_object *list, struct error *err)
{
    int ret = 0;

    if (!list)
        return 0;
    if (json_object_is_type(list, json_type_array)) {
        for (size_t i = 0; ret == 0 && i < json_object_array_length(list); i++)
            ret = add_rule(r, kind, json_object_array_get_idx(list, i), err);
        return ret;
    }
    if (!json_object_is_type(list, json_type_object))
        return error_set(err, EINVAL, "blkdebug's rules must be a list");
    for (int i = 0; ret == 0; i++) {
        CLEANUP(memory_freep) char *key = xasprintf("%d", i);
        struct json_object *one = json_get(list, key);
        if (!one)
            break;
        ret = add_rule(r, kind, one, err);
    }
    return ret;
}

int debug_rules_load(struct debug_rules *r, const char *path, struct json_object *options,
                     struct error *err)
{
    int ret = path ? read_config(r, path, err) : 0;

    if (ret == 0)
        ret = add_list(r, RULE_INJECT_ERROR, json_get(options, "inject-error"), err);
    if (ret == 0)
        ret = add_list(r, RULE_SET_STATE, json_get(options, "set-state"), err);
    if (ret == 0)
        ret = add_list(r, RULE_DELAY, json_get(options, "x-tidemark-delay"), err);
    r->state = 1;
    return ret;
}

void debug_rules_fini(struct debug_rules *r)
{
    free(r->rules);
    r->rules = NULL;
    r->n = 0;
}

/* ---- following them ---- */

static bool waits_for(const struct debug_rules *r, const struct debug_rule *rule,
                      enum debug_event event)
{
    return rule->event == event && (!rule->state || rule->state == r->state);
}

static void activate(struct debug_rules *r, unsigned kind, enum debug_event event)
{
    bool any = false;

    for (size_t i = 0; i < r->n; i++)
        any |= r->rules[i].kind == kind && waits_for(r, &r->rules[i], event);
    if (!any)
        return;
    for (size_t i = 0; i < r->n; i++)
        if (r->rules[i].kind == kind)
            r->rules[i].active = waits_for(r, &r->rules[i], event);
}

void debug_rules_event(struct debug_rules *r, enum debug_event event)
{
    activate(r, RULE_INJECT_ERROR, event);
    activate(r, RULE_DELAY, event);
    for (size_t i = 0; i < r->n; i++) {
        if (r->rules[i].kind != RULE_SET_STATE || !waits_for(r, &r->rules[i], event))
            continue;
        r->state = r->rules[i].new_state; /* of several the one given first */
        break;
    }
}

static struct debug_rule *find_active(struct debug_rules *r, unsigned kind,
                                      enum debug_iotype iotype, struct range range)
{
    for (size_t i = 0; i < r->n; i++) {
        struct debug_rule *rule = &r->rules[i];
        if (rule->kind != kind || !rule->active || !(rule->iotypes & 1u << iotype))
            continue;
        if (rule->at_byte == -1 ||
            ((uint64_t)rule->at_byte >= range.start && (uint64_t)rule->at_byte < range_end(range)))
            return rule;
    }
    return NULL;
}

static void used_up(struct debug_rules *r, struct debug_rule *rule)
{
    size_t i = (size_t)(rule - r->rules);

    if (!rule->once)
        return;
    memmove(rule, rule + 1, (r->n - i - 1) * sizeof *rule);
    r->n--;
}

struct debug_verdict debug_rules_judge(struct debug_rules *r, enum debug_iotype iotype,
                                       struct range range)
{
    struct debug_verdict verdict = {0};
    struct debug_rule *rule = find_active(r, RULE_DELAY, iotype, range);

    if (rule) {
        verdict.delay_ns = rule->delay_ns;
        used_up(r, rule);
    }
    rule = find_active(r, RULE_INJECT_ERROR, iotype, range);
    if (rule && rule->error) {
        verdict.error = rule->error;
        verdict.immediately = rule->immediately;
        used_up(r, rule);
    }
    return verdict;
}
