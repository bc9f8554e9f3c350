/* Worker threads. They are started when there is work and nobody is idle, up to
 * WORKERS_MAX, and end with the loop. Two lists under one lock: work to do, and work that
 * is done; the eventfd is written only when the second one was empty, so a burst of
 * completions costs the loop one wake-up. */
#include "rt/workers.h"

#include "base/log.h"
#include "rt/loop.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { WORKERS_MAX = 32 };

struct work {
    STAILQ_ENTRY(work) link;
    struct io_op *op;
    struct task *task; /* NULL: nobody waits, and OP follows this */
    int64_t result;
    bool done; /* the loop's side only */
};
STAILQ_HEAD(work_list, work);

struct workers {
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct work_list todo, done;
    unsigned threads, idle;
    bool stop;
    pthread_t thread[WORKERS_MAX];
    int fd;
    size_t busy; /* the loop's side only */
};

static void *worker(void *arg)
{
    struct workers *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        struct work *w = STAILQ_FIRST(&p->todo);
        if (!w) {
            if (p->stop)
                break;
            p->idle++;
            pthread_cond_wait(&p->more, &p->lock);
            p->idle--;
            continue;
        }
        STAILQ_REMOVE_HEAD(&p->todo, link);
        pthread_mutex_unlock(&p->lock);
        w->result = posix_do(w->op);
        if (!w->task) {
            free(w);
            pthread_mutex_lock(&p->lock);
            continue;
        }
        pthread_mutex_lock(&p->lock);
        bool first = STAILQ_EMPTY(&p->done);
        STAILQ_INSERT_TAIL(&p->done, w, link);
        if (first) {
            uint64_t one = 1;
            while (write(p->fd, &one, sizeof one) < 0 && errno == EINTR)
                ;
        }
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

struct workers *workers_new(int *error)
{
    struct workers *p = xnew(struct workers);
    p->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->fd < 0) {
        *error = -errno;
        free(p);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    STAILQ_INIT(&p->todo);
    STAILQ_INIT(&p->done);
    return p;
}

void workers_free(struct workers *p)
{
    assert(!p->busy);
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->more);
    pthread_mutex_unlock(&p->lock);
    for (unsigned i = 0; i < p->threads; i++)
        pthread_join(p->thread[i], NULL);
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    close(p->fd);
    free(p);
}

int workers_fd(const struct workers *p)
{
    return p->fd;
}

size_t workers_busy(const struct workers *p)
{
    return p->busy;
}

/* With the lock held. Without a thread at all the program cannot go on. */
static void start_thread(struct workers *p)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the loop's */
    int r = pthread_create(&p->thread[p->threads], NULL, worker, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r == 0)
        p->threads++;
    else if (!p->threads)
        rt_panic("no worker thread can be started: %s", strerror(r));
}

static void give(struct workers *p, struct work *w)
{
    pthread_mutex_lock(&p->lock);
    bool queued = !STAILQ_EMPTY(&p->todo);
    STAILQ_INSERT_TAIL(&p->todo, w, link);
    if (p->threads < WORKERS_MAX && (!p->idle || queued))
        start_thread(p);
    if (p->idle)
        pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
}

int64_t workers_perform(struct workers *p, struct io_op *op)
{
    struct work w = {.op = op, .task = task_self()};
    give(p, &w);
    p->busy++;
    while (!w.done)
        task_suspend_uncancelled();
    return w.result;
}

/* Without waiting for it, and without an answer. */
static void leave(struct workers *p, const struct io_op *op)
{
    struct left {
        struct work work;
        struct io_op op;
    } *left = xnew(struct left);

    left->op = *op;
    left->work.op = &left->op;
    give(p, &left->work);
}

int64_t workers_serve(struct workers *p, struct io_op *op)
{
    if (op->kind == IO_UNMAP && op->length > MAP_TOUCHED_MAX) {
        leave(p, op);
        return 0;
    }
    return posix_at_once(op->kind) ? posix_do(op) : workers_perform(p, op);
}

void workers_collect(struct workers *p, bool read_fd)
{
    struct work_list done = STAILQ_HEAD_INITIALIZER(done);
    uint64_t count;
    if (read_fd && read(p->fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
        rt_panic("reading an eventfd: %s", strerror(errno));
    pthread_mutex_lock(&p->lock);
    STAILQ_CONCAT(&done, &p->done);
    pthread_mutex_unlock(&p->lock);

    struct work *w;
    while ((w = STAILQ_FIRST(&done))) {
        STAILQ_REMOVE_HEAD(&done, link);
        p->busy--;
        w->done = true;
        task_wake(w->task);
    }
}
