/* One client's connection: three tasks around a queue and a buffer.
 *
 *     reader    bytes -> messages -> queue; runs out-of-band commands at once
 *     executor  queue -> answer, one command at a time under qmp->in_band
 *     writer    buffer -> client
 *
 * Without `oob` the reader reads nothing more until the command has been answered, with it
 * until fewer than MONITOR_QUEUE_MAX wait. A mistake of syntax is answered in its turn.
 *
 * The end: the client has said its last (then what it asked is still answered), or it is gone, or
 * the program ends. The reader's end is the connection's. */
#include "qmp/qmp.h"

#include "base/log.h"
#include "qmp/json_stream.h"
#include "qmp/json_write.h"
#include "rt/clock.h"
#include "rt/io.h"
#include "rt/socket.h"

/* What waits to be answered: a message, or a mistake. */
struct request {
    struct json_object *message;
    struct error error; /* code 0: `message` */
    TAILQ_ENTRY(request) link;
};

struct monitor {
    struct qmp *qmp;
    int in, out;
    unsigned flags;
    bool negotiated, oob;

    TAILQ_HEAD(, request) queue;
    unsigned queued;      /* requests in it */
    bool answering;       /* one has been taken from it and is not answered yet */
    bool no_more_input;   /* the executor ends when the queue is empty */
    struct waitq changed; /* any of these */

    struct buffer output;
    size_t sending; /* bytes that the writer has taken and not yet sent */
    bool gone;      /* nobody reads any more: what is written is dropped */
    bool no_more_output;
    struct waitq to_send, sent;

    TAILQ_ENTRY(monitor) link;
};

bool monitor_negotiated(const struct monitor *m)
{
    return m->negotiated;
}

bool monitor_oob(const struct monitor *m)
{
    return m->oob;
}

void monitor_negotiate(struct monitor *m, bool oob)
{
    m->negotiated = true;
    m->oob = oob;
}

/* ---- output ---- */

static size_t unread(const struct monitor *m)
{
    return m->output.length + m->sending;
}

static void disconnect(struct monitor *m)
{
    m->gone = true;
    buffer_fini(&m->output);
    io_shutdown(m->in);
    if (m->out != m->in)
        io_shutdown(m->out);
    waitq_wake_all(&m->sent);
    waitq_wake_all(&m->changed);
}

/* Never waits. */
static void say(struct monitor *m, struct json_object *message)
{
    if (m->gone)
        return;
    if (json_write(&m->output, message, m->flags & MONITOR_PRETTY ? JSON_WRITE_PRETTY : 0) < 0 ||
        buffer_append(&m->output, "\r\n", 2) < 0 || unread(m) > MONITOR_OUTPUT_MAX) {
        log_warning("a QMP client does not read: disconnected with %zu bytes unread", unread(m));
        disconnect(m);
        return;
    }
    waitq_wake_one(&m->to_send);
}

static int writer(void *arg)
{
    struct monitor *m = arg;

    task_set_name("QMP writer");
    for (;;) {
        while (!m->output.length) {
            if (m->no_more_output || m->gone)
                return 0;
            int r = waitq_wait(&m->to_send);
            if (r < 0)
                return r;
        }
        struct buffer taken = m->output;
        struct iovec iov = {taken.data, taken.length};
        m->output = (struct buffer){0};
        m->sending = taken.length;
        int r = io_sendv_full(m->out, &iov, 1);
        m->sending = 0;
        buffer_fini(&taken);
        waitq_wake_all(&m->sent);
        if (r == -ECANCELED)
            return r;
        if (r < 0)
            disconnect(m);
    }
}

/* Waits until the client has read enough to be told more. */
static int room_for_answer(struct monitor *m)
{
    while (!m->gone && unread(m) > MONITOR_OUTPUT_PAUSE) {
        int r = waitq_wait(&m->sent);
        if (r < 0)
            return r;
    }
    return 0;
}

void qmp_event(struct qmp *q, const char *name, struct json_object *data)
{
    CLEANUP(json_putp) struct json_object *event = json_object_new_object();
    struct json_object *timestamp = json_object_new_object();
    uint64_t now_us = clock_wall_us();
    struct monitor *m;

    json_add_int(timestamp, "seconds", (int64_t)(now_us / 1000000));
    json_add_int(timestamp, "microseconds", (int64_t)(now_us % 1000000));
    json_add(event, "timestamp", timestamp);
    json_add_string(event, "event", name);
    if (data)
        json_add(event, "data", json_object_get(data));
    TAILQ_FOREACH (m, &q->monitors, link)
        if (m->negotiated)
            say(m, event);
}

void qmp_farewell(struct qmp *q)
{
    uint64_t deadline = clock_after_ns(MONITOR_FAREWELL_NS);
    struct monitor *m;
    SHIELD();

again:
    TAILQ_FOREACH (m, &q->monitors, link) {
        if (m->gone || !unread(m) || clock_now_ns() >= deadline)
            continue;
        if (sleep_until(min_u64(deadline, clock_after_ns(NSEC_PER_SEC / 1000))) < 0)
            return;
        goto again; /* the list may have changed */
    }
}

/* ---- input ---- */

static void request_free(struct request *rq)
{
    json_object_put(rq->message);
    free(rq);
}

static void answer(struct monitor *m, struct request *rq)
{
    CLEANUP(json_putp)
    struct json_object *told =
        rq->error.code ? qmp_error_answer(&rq->error) : qmp_dispatch(m->qmp, m, rq->message);
    say(m, told);
}

static int executor(void *arg)
{
    struct monitor *m = arg;
    struct request *rq;

    task_set_name("QMP executor");
    while (!m->gone) {
        int r;
        while (!(rq = TAILQ_FIRST(&m->queue))) {
            if (m->no_more_input || m->gone)
                return 0;
            if ((r = waitq_wait(&m->changed)) < 0)
                return r;
        }
        if ((r = room_for_answer(m)) < 0 || (r = mutex_lock(&m->qmp->in_band)) < 0)
            return r;
        if (!m->qmp->quit.set && !m->gone) {
            TAILQ_REMOVE(&m->queue, rq, link);
            m->queued--;
            m->answering = true;
            waitq_wake_all(&m->changed);
            answer(m, rq);
            request_free(rq);
            m->answering = false;
            waitq_wake_all(&m->changed);
        }
        mutex_unlock(&m->qmp->in_band);
        if (m->qmp->quit.set)
            return 0;
    }
    return 0;
}

/* May the reader go on? */
static bool queue_has_room(const struct monitor *m)
{
    if (m->oob)
        return m->queued < MONITOR_QUEUE_MAX;
    return !m->queued && !m->answering;
}

static bool looks_out_of_band(struct json_object *message)
{
    return json_object_is_type(message, json_type_object) &&
           json_object_object_get_ex(message, "exec-oob", NULL) &&
           !json_object_object_get_ex(message, "execute", NULL);
}

/* One message or mistake; steals what is in RQ. */
static int receive(struct monitor *m, struct request *rq)
{
    if (!rq->error.code && looks_out_of_band(rq->message)) {
        int r = room_for_answer(m);
        if (r == 0)
            answer(m, rq);
        request_free(rq);
        return r;
    }
    TAILQ_INSERT_TAIL(&m->queue, rq, link);
    m->queued++;
    waitq_wake_all(&m->changed);
    while (!queue_has_room(m) && !m->gone && !m->qmp->quit.set) {
        int r = waitq_wait(&m->changed);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Reads until the client has said its last. */
static int reader(struct monitor *m)
{
    CLEANUP(json_stream_freep) struct json_stream *stream = json_stream_new();
    uint8_t chunk[MONITOR_INPUT_CHUNK];

    while (!m->gone && !m->qmp->quit.set) {
        ssize_t n = io_recv(m->in, chunk, sizeof chunk);
        if (n <= 0)
            return (int)n;
        for (const uint8_t *p = chunk; !m->gone && !m->qmp->quit.set;) {
            struct request *rq = xnew(struct request);
            enum json_stream_result found =
                json_stream_take(stream, &p, chunk + n, &rq->message, &rq->error);
            if (found == JSON_STREAM_MORE) {
                free(rq);
                break;
            }
            int r = receive(m, rq);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

static void greet(struct monitor *m)
{
    CLEANUP(json_putp) struct json_object *greeting = json_object_new_object();
    struct json_object *qmp = json_object_new_object();
    struct json_object *capabilities = json_object_new_array();

    json_add(qmp, "version", qmp_version());
    json_object_array_add(capabilities, json_object_new_string("oob"));
    json_add(qmp, "capabilities", capabilities);
    json_add(greeting, "QMP", qmp);
    say(m, greeting);
}

/* The tasks of one connection; their ends. */
static void converse(struct monitor *m)
{
    SCOPE(tasks);

    scope_spawn(&tasks, writer, m);
    scope_spawn(&tasks, executor, m);
    greet(m);
    int r = reader(m);
    m->no_more_input = true;
    waitq_wake_all(&m->changed);
    if (r < 0)
        return; /* the client is gone, or the program ends; a command that runs is awaited */
    if (m->qmp->quit.set) {
        /* the writer goes on until main() has said everything and cancels us */
        (void)scope_join(&tasks);
        return;
    }
    while ((m->queued || m->answering) && !m->gone)
        if (waitq_wait(&m->changed) < 0)
            return;
    m->no_more_output = true;
    waitq_wake_all(&m->to_send);
    (void)scope_join(&tasks);
}

static void close_unless_standard(int fd)
{
    if (fd > 2)
        io_close(fd);
}

static int connection(void *arg)
{
    struct monitor *m = arg;
    struct request *rq;

    task_set_name("QMP client");
    converse(m);
    TAILQ_REMOVE(&m->qmp->monitors, m, link);
    while ((rq = TAILQ_FIRST(&m->queue))) {
        TAILQ_REMOVE(&m->queue, rq, link);
        request_free(rq);
    }
    close_unless_standard(m->in);
    if (m->out != m->in)
        close_unless_standard(m->out);
    buffer_fini(&m->output);
    free(m);
    return 0; /* how one client ends is nothing to the others */
}

void monitor_serve(struct qmp *q, struct scope *s, int in, int out, unsigned flags)
{
    struct monitor *m = xnew(struct monitor);

    m->qmp = q;
    m->in = in;
    m->out = out;
    m->flags = flags;
    TAILQ_INIT(&m->queue);
    waitq_init(&m->changed);
    waitq_init(&m->to_send);
    waitq_init(&m->sent);
    TAILQ_INSERT_TAIL(&q->monitors, m, link);
    scope_spawn(s, connection, m);
}
