/* Clients and monitors in one loop, joined by socket pairs. */
#include "base/buffer.h"
#include "dirty/dirty.h"
#include "qmp/json_stream.h"
#include "qmp/qmp.h"
#include "rt/clock.h"
#include "rt/io.h"
#include "unit.h"

struct client {
    int fd;
    struct json_stream *stream;
    uint8_t chunk[4096]; /* on a task's stack */
    const uint8_t *at, *end;
};

static struct qmp *q;
static struct scope *connections;

static void client_open(struct client *c)
{
    int pair[2];

    assert_int_equal(io_socketpair(pair), 0);
    monitor_serve(q, connections, pair[0], pair[0], 0);
    *c = (struct client){.fd = pair[1], .stream = json_stream_new()};
}

static void client_close(struct client *c)
{
    io_close(c->fd);
    json_stream_free(c->stream);
}

static void client_send(struct client *c, const char *text)
{
    struct iovec iov = {(void *)(uintptr_t)text, strlen(text)};
    assert_int_equal(io_sendv_full(c->fd, &iov, 1), 0);
}

/* The next message; NULL at the end of the stream. */
static struct json_object *client_next(struct client *c)
{
    for (;;) {
        struct json_object *value = NULL;
        struct error err = ERROR_INIT;

        switch (json_stream_take(c->stream, &c->at, c->end, &value, &err)) {
        case JSON_STREAM_MESSAGE:
            return value;
        case JSON_STREAM_ERROR:
            fail_msg("%s", err.text);
            return NULL;
        case JSON_STREAM_MORE:
            break;
        }
        ssize_t n = io_recv(c->fd, c->chunk, sizeof c->chunk);
        if (n <= 0)
            return NULL;
        c->at = c->chunk;
        c->end = c->chunk + n;
    }
}

static void client_expect(struct client *c, const char *expected)
{
    CLEANUP(json_putp) struct json_object *got = client_next(c);

    assert_non_null(got);
    assert_string_equal(json_object_to_json_string_ext(got, JSON_C_TO_STRING_PLAIN), expected);
}

static void client_negotiate(struct client *c, const char *how)
{
    json_object_put(client_next(c));
    client_send(c, how);
    client_expect(c, "{\"return\":{}}");
}

/* ---- a world with nothing in it ---- */

static int in_world(void *arg)
{
    void (*test)(void) = *(void (**)(void))arg;
    struct graph *g = graph_new();
    dirty_init(g);
    struct jobs *js = jobs_new(g);
    struct exports *x = exports_new(g);
    struct scope s;

    scope_init(&s);
    connections = &s;
    q = qmp_new(g, js, x);
    test();
    scope_fini(&s);
    qmp_free(q);
    exports_free(x);
    jobs_free(js);
    graph_free(g);
    return 0;
}

static void run(void (*test)(void))
{
    assert_int_equal(loop_run(LOOP_AUTO, in_world, &test), 0);
}

#define CAPABILITIES "{\"execute\":\"qmp_capabilities\"}"
#define CAPABILITIES_OOB "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}"

static void negotiation(void)
{
    struct client c;

    client_open(&c);
    client_expect(&c,
                  "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":0,\"minor\":2,\"major\":7},"
                  "\"package\":\"tidemark " TIDEMARK_VERSION "\"},\"capabilities\":[\"oob\"]}}");
    client_send(&c, "{'execute':'query-jobs'}");
    client_expect(&c, "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"Expecting capabilities "
                      "negotiation with 'qmp_capabilities'\"}}");
    client_send(&c, CAPABILITIES CAPABILITIES);
    client_expect(&c, "{\"return\":{}}");
    client_expect(&c,
                  "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"Capabilities negotiation "
                  "is already complete, command ignored\"}}");
    client_close(&c);
}

static void clients_negotiate_first(void **state)
{
    run(negotiation);
}

static void answers(void)
{
    struct client c;

    client_open(&c);
    client_negotiate(&c, CAPABILITIES);
    client_send(&c, "{'execute':'query-jobs','id':[1,{'a':null}]}{'id':null,'execute':'nosuch'}"
                    "[]{'execute':5}{'execute':'quit','x':1}{}{'execute':'quit','arguments':[]}"
                    "{'exec-oob':'quit'}{\"a\" 1}{'execute':'query-jobs','arguments':{'b':1}}");
    client_expect(&c, "{\"return\":[],\"id\":[1,{\"a\":null}]}");
    client_expect(&c,
                  "{\"id\":null,\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"The command "
                  "nosuch has not been found\"}}");
    client_expect(&c, "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input must be a JSON "
                      "object\"}}");
    client_expect(&c,
                  "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input member 'execute' "
                  "must be a string\"}}");
    client_expect(&c, "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input member 'x' is "
                      "unexpected\"}}");
    client_expect(&c, "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input lacks member "
                      "'execute'\"}}");
    client_expect(&c, "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input member "
                      "'arguments' must be an object\"}}");
    client_expect(&c,
                  "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input member 'exec-oob' "
                  "is unexpected\"}}");
    client_expect(&c,
                  "{\"error\":{\"class\":\"GenericError\",\"desc\":\"JSON parse error, missing : "
                  "in object pair\"}}");
    client_expect(&c, "{\"error\":{\"class\":\"GenericError\",\"desc\":\"Parameter 'b' is "
                      "unexpected\"}}");
    client_close(&c);
}

static void every_request_has_its_answer(void **state)
{
    run(answers);
}

static void out_of_band(void)
{
    struct client c;

    client_open(&c);
    client_negotiate(&c, CAPABILITIES_OOB);
    client_send(&c, "{'exec-oob':'quit','id':1}");
    client_expect(&c, "{\"id\":1,\"error\":{\"class\":\"GenericError\",\"desc\":\"The command quit "
                      "does not support OOB\"}}");
    /* more at once than the queue has room for: none is lost, and the order is kept */
    for (int i = 0; i < 5 * MONITOR_QUEUE_MAX; i++) {
        char text[64];
        snprintf(text, sizeof text, "{'execute':'query-jobs','id':%d}", i);
        client_send(&c, text);
    }
    for (int i = 0; i < 5 * MONITOR_QUEUE_MAX; i++) {
        char text[64];
        snprintf(text, sizeof text, "{\"return\":[],\"id\":%d}", i);
        client_expect(&c, text);
    }
    client_close(&c);
}

static void oob_has_a_queue(void **state)
{
    run(out_of_band);
}

/* One client asks for far more than it reads; the other is served all the same. */
static void slow_and_quick(void)
{
    struct client slow, quick;

    client_open(&slow);
    client_open(&quick);
    client_negotiate(&slow, CAPABILITIES_OOB);
    client_negotiate(&quick, CAPABILITIES);
    struct buffer many = {0}; /* in one piece, or it would not fit into the socket */
    for (int i = 0; i < 400; i++)
        buffer_printf(&many, "{'execute':'query-qmp-schema'}");
    client_send(&slow, (char *)many.data);
    buffer_fini(&many);
    for (int i = 0; i < 10; i++) {
        client_send(&quick, "{'execute':'query-jobs'}");
        client_expect(&quick, "{\"return\":[]}");
    }
    for (int i = 0; i < 400; i++) {
        struct json_object *answer = client_next(&slow);
        assert_non_null(answer);
        json_object_put(answer);
    }
    client_close(&slow);
    client_close(&quick);
}

static void a_slow_client_holds_up_itself_alone(void **state)
{
    run(slow_and_quick);
}

static void events(void)
{
    CLEANUP(json_putp) struct json_object *data = json_object_new_object();
    struct client c[3], silent;

    json_add_string(data, "id", "e");
    client_open(&silent);
    for (int i = 0; i < 3; i++) {
        client_open(&c[i]);
        client_negotiate(&c[i], CAPABILITIES);
    }
    qmp_event(q, "BLOCK_EXPORT_DELETED", data);
    for (int i = 0; i < 3; i++) {
        CLEANUP(json_putp) struct json_object *event = client_next(&c[i]);
        assert_string_equal(json_get_string(event, "event", ""), "BLOCK_EXPORT_DELETED");
        assert_string_equal(json_get_string(json_get(event, "data"), "id", ""), "e");
        assert_true(json_get_int(json_get(event, "timestamp"), "seconds", 0) > 1600000000);
        client_close(&c[i]);
    }
    json_object_put(client_next(&silent)); /* the greeting, and then no event */
    client_send(&silent, CAPABILITIES);
    client_expect(&silent, "{\"return\":{}}");
    client_close(&silent);
}

static void events_go_to_all_that_have_negotiated(void **state)
{
    run(events);
}

/* A client that reads no events is let go before it takes all memory. */
static void flood(void)
{
    CLEANUP(json_putp) struct json_object *data = json_object_new_object();
    CLEANUP(memory_freep) char *text = xcalloc(1, 100000);
    struct client c;
    struct json_object *message;
    size_t got = 0;

    memset(text, 'x', 99999);
    json_add_string(data, "id", text);
    client_open(&c);
    client_negotiate(&c, CAPABILITIES);
    for (int i = 0; i < 700; i++)
        qmp_event(q, "BLOCK_EXPORT_DELETED", data);
    while ((message = client_next(&c))) {
        json_object_put(message);
        got++;
    }
    assert_true(got < 700);
    client_close(&c);
}

static void who_never_reads_is_disconnected(void **state)
{
    run(flood);
}

/* Half-closed behind its last request, a client still gets its answers. */
static void last_words(void)
{
    struct client c;

    client_open(&c);
    client_negotiate(&c, CAPABILITIES_OOB);
    client_send(&c, "{'execute':'query-jobs','id':1}{'execute':'query-jobs','id':2}");
    assert_int_equal(shutdown(c.fd, SHUT_WR), 0);
    client_expect(&c, "{\"return\":[],\"id\":1}");
    client_expect(&c, "{\"return\":[],\"id\":2}");
    assert_null(client_next(&c));
    client_close(&c);
}

static void what_was_asked_is_answered_after_the_end(void **state)
{
    run(last_words);
}

static void quits(void)
{
    struct client c, other;

    client_open(&c);
    client_open(&other);
    client_negotiate(&c, CAPABILITIES);
    client_negotiate(&other, CAPABILITIES);
    client_send(&c, "{'execute':'quit'}{'execute':'query-jobs'}");
    client_expect(&c, "{\"return\":{}}");
    assert_true(q->quit.set);
    client_send(&other, "{'execute':'query-jobs'}");
    qmp_event(q, "BLOCK_EXPORT_DELETED", NULL);
    qmp_farewell(q);
    scope_cancel(connections);
    CLEANUP(json_putp) struct json_object *event = client_next(&c);
    assert_string_equal(json_get_string(event, "event", ""), "BLOCK_EXPORT_DELETED");
    assert_null(client_next(&c)); /* nothing after `quit` was done */
    client_close(&c);
    client_close(&other);
}

static void quit_is_the_last_command(void **state)
{
    run(quits);
}

/* What the tables say of answers is what is answered. */
static void own_schema(void)
{
    static const char *const queries[] = {
        "query-version",    "query-commands",      "query-qmp-schema",
        "query-jobs",       "query-block",         "query-named-block-nodes",
        "query-blockstats", "query-block-exports", "query-block-jobs"};
    struct client c;

    client_open(&c);
    client_negotiate(&c, CAPABILITIES);
    client_send(&c, "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'n'}}");
    client_expect(&c, "{\"return\":{}}");
    client_send(&c, "{'execute':'block-dirty-bitmap-add','arguments':{'node':'n','name':'b'}}");
    client_expect(&c, "{\"return\":{}}");
    for (size_t i = 0; i < ARRAY_SIZE(queries); i++) {
        char text[200];
        struct error err = ERROR_INIT;
        CLEANUP(json_putp) struct json_object *typed = NULL;

        snprintf(text, sizeof text, "{'execute':'%s'%s}", queries[i],
                 strcmp(queries[i], "query-blockstats") ? "" : ",'arguments':{'query-nodes':true}");
        client_send(&c, text);
        CLEANUP(json_putp) struct json_object *answer = client_next(&c);
        if (schema_check(qmp_command_find(queries[i])->answer, json_get(answer, "return"),
                         SCHEMA_FROM_JSON, &typed, &err) < 0)
            fail_msg("%s: %s\n%s", queries[i], err.text, json_object_to_json_string(answer));
    }
    client_send(&c, "{'execute':'blockdev-del','arguments':{'node-name':'n'}}");
    client_expect(&c, "{\"return\":{}}");
    client_close(&c);
}

static void answers_are_as_the_schema_says(void **state)
{
    run(own_schema);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(clients_negotiate_first),
    cmocka_unit_test(every_request_has_its_answer),
    cmocka_unit_test(oob_has_a_queue),
    cmocka_unit_test(a_slow_client_holds_up_itself_alone),
    cmocka_unit_test(events_go_to_all_that_have_negotiated),
    cmocka_unit_test(who_never_reads_is_disconnected),
    cmocka_unit_test(what_was_asked_is_answered_after_the_end),
    cmocka_unit_test(quit_is_the_last_command),
    cmocka_unit_test(answers_are_as_the_schema_says),
};
UNIT_MAIN(tests)
