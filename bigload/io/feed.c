/* Brings bytes of files to memory of the host or of devices, by threads of its own that need no interpreter's lock.
 *
 * What is to be done is known before it begins: spans, in order, each a run of bytes of one file and the address where
 * it goes. Spans belong to batches, which are counted as they are complete, in order; the caller works on them and says
 * so (feed_done). A batch into memory that an earlier one had waits until that one is done with.
 *
 * Bytes for the host are read to where they go. Those for a device are read into slots of pinned memory, and the device
 * is asked to copy them. A device is a table of functions, which CUDA's driver exports with these very signatures; tests
 * give it others. Nothing here knows Python or CUDA. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int (*set_current)(void *context);
    int (*copy)(uint64_t to, const void *from, size_t nbytes, void *stream);
    int (*event_create)(void **event, unsigned flags);
    int (*event_destroy)(void *event);
    int (*event_record)(void *event, void *stream);
    int (*event_query)(void *event);
    int (*stream_wait)(void *stream, void *event, unsigned flags);
} feed_functions;

enum { NOT_READY = 600, NO_TIMING = 2 };

/* Where bytes go: a device, or the host, which has no functions. */
typedef struct { const feed_functions *device; void *context, *copy_stream, *work_stream; } feed_lane;

/* file: a descriptor; target: an address on the lane of the batch. */
typedef struct { int64_t file, offset, nbytes, target, batch; } feed_span;

/* after: the last batch that had any of its memory, of the same lane; -1 for none. begun_ns is written here. */
typedef struct { int64_t lane, after, begun_ns; } feed_batch;

typedef struct {
    const feed_lane *lanes; int64_t lane_count;
    const feed_span *spans; int64_t span_count;
    feed_batch *batches; int64_t batch_count;
    char *ring; int64_t slot_bytes, slot_count; /* no ring where all lanes are the host */
    int64_t thread_count;
} feed_order;

enum { ERROR_NONE, ERROR_READ, ERROR_ENDED, ERROR_DEVICE };

typedef struct {
    int64_t complete;    /* batches, from the first on */
    int64_t error, code; /* what went wrong, and errno or the device's code */
    int64_t span, at;    /* where: the span, and the offset in its file */
} feed_state;

typedef struct { void *event; int64_t left; int is_complete; atomic_int is_open; } batch;
typedef struct { void **events; int64_t lane; } slot; /* an event of each lane; the lane that copies out of it, or -1 */
typedef struct { int64_t first, within, nbytes, count; } run; /* count: of spans that it touches */

typedef struct feed {
    feed_order order;
    batch *batches; slot *slots;
    pthread_t *threads; int64_t started;
    pthread_mutex_t lock; pthread_cond_t news, room;
    int64_t cursor, within; /* the next span, and how much of it has been given out */
    int64_t done;           /* batches that were worked on */
    feed_state state;
    atomic_int stop, is_lost; /* is_lost: a device cannot tell when copies are over */
} feed;

typedef struct { feed *f; int64_t index; } worker;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t lane_of(const feed *f, int64_t span) { return f->order.batches[f->order.spans[span].batch].lane; }

static int stopped(feed *f) { return atomic_load(&f->stop); }

/* Keep the first error, and wake up everyone. Returns -1. */
static int fail(feed *f, int error, int code, int64_t span, int64_t at) {
    pthread_mutex_lock(&f->lock);
    if (!f->state.error) {
        f->state.error = error; f->state.code = code;
        f->state.span = span; f->state.at = at;
    }
    atomic_store(&f->stop, 1);
    pthread_cond_broadcast(&f->news);
    pthread_cond_broadcast(&f->room);
    pthread_mutex_unlock(&f->lock);
    return -1;
}

/* Whether a span goes on where a run ends, in its file and on its lane, and waits for no batch of the run. */
static int goes_on(const feed *f, const run *r, const feed_span *s) {
    const feed_span *first = f->order.spans + r->first;
    return s->file == first->file && s->offset == first->offset + r->within + r->nbytes
           && lane_of(f, s - f->order.spans) == lane_of(f, r->first)
           && f->order.batches[s->batch].after < first->batch;
}

/* Give out what one read gets: a run of one file for one lane, over as many spans as lie side by side there. */
static run next_run(feed *f) {
    const feed_span *spans = f->order.spans;
    pthread_mutex_lock(&f->lock);
    run r = {f->cursor, f->within, 0, 0};
    while (f->cursor < f->order.span_count && r.nbytes < f->order.slot_bytes && r.count < IOV_MAX) {
        const feed_span *s = spans + f->cursor;
        if (r.nbytes && !goes_on(f, &r, s)) break;
        feed_batch *b = f->order.batches + s->batch;
        if (!b->begun_ns) b->begun_ns = now_ns();
        int64_t left = s->nbytes - f->within, fits = f->order.slot_bytes - r.nbytes;
        r.count++;
        if (left > fits) { f->within += fits; r.nbytes += fits; break; }
        r.nbytes += left; f->cursor++; f->within = 0;
    }
    pthread_mutex_unlock(&f->lock);
    return r;
}

/* Read into one or more pieces of memory, all of it. `io` is used up. */
static int read_into(feed *f, const run *r, struct iovec *io, int count) {
    const feed_span *first = f->order.spans + r->first;
    int64_t offset = first->offset + r->within, end = offset + r->nbytes;
    while (offset < end) {
        ssize_t got = preadv((int)first->file, io, count, offset);
        if (got < 0 && errno == EINTR && !stopped(f)) continue;
        if (got <= 0) {
            int code = got < 0 ? errno : 0;
            int64_t span = r->first, at = offset;
            while (f->order.spans[span].offset + f->order.spans[span].nbytes <= at) span++;
            return fail(f, code ? ERROR_READ : ERROR_ENDED, code, span, at);
        }
        offset += got;
        for (; got && (size_t)got >= io->iov_len; io++, count--) got -= (ssize_t)io->iov_len;
        if (got) { io->iov_base = (char *)io->iov_base + got; io->iov_len -= (size_t)got; }
    }
    return 0;
}

/* Wait until a batch's memory may be written to. Who comes first has the device wait too. */
static int await_room(feed *f, int64_t number) {
    batch *b = f->batches + number;
    const feed_batch *given = f->order.batches + number;
    const feed_lane *lane = f->order.lanes + given->lane;
    int code = 0;
    if (given->after < 0 || atomic_load(&b->is_open)) return 0;
    pthread_mutex_lock(&f->lock);
    while (f->done <= given->after && !stopped(f)) pthread_cond_wait(&f->room, &f->lock);
    if (!atomic_load(&b->is_open) && !stopped(f)) {
        if (lane->device) code = lane->device->stream_wait(lane->copy_stream, f->batches[given->after].event, 0);
        atomic_store(&b->is_open, 1);
    }
    pthread_mutex_unlock(&f->lock);
    if (code) return fail(f, ERROR_DEVICE, code, -1, 0);
    return stopped(f) ? -1 : 0;
}

/* Count bytes that are where they go, or on their way there. */
static int arrive(feed *f, int64_t number, int64_t nbytes) {
    batch *b = f->batches + number;
    const feed_lane *lane = f->order.lanes + f->order.batches[number].lane;
    int code = 0;
    pthread_mutex_lock(&f->lock);
    b->left -= nbytes;
    if (!b->left) {
        /* Under the lock: whoever counted before has asked for its copies, and they are before this event. */
        if (lane->device) code = lane->device->event_create(&b->event, NO_TIMING);
        if (lane->device && !code) code = lane->device->event_record(b->event, lane->copy_stream);
        b->is_complete = !code;
        int64_t before = f->state.complete;
        while (f->state.complete < f->order.batch_count && f->batches[f->state.complete].is_complete)
            f->state.complete++;
        if (f->state.complete > before) pthread_cond_signal(&f->news);
    }
    pthread_mutex_unlock(&f->lock);
    return code ? fail(f, ERROR_DEVICE, code, -1, 0) : 0;
}

/* For the host: straight to where it goes. */
static int bring_home(feed *f, const run *r, struct iovec *io) {
    const feed_span *spans = f->order.spans + r->first;
    int64_t left = r->nbytes, within = r->within;
    for (int64_t i = 0; i < r->count; i++, within = 0) {
        int64_t nbytes = spans[i].nbytes - within < left ? spans[i].nbytes - within : left;
        if (await_room(f, spans[i].batch)) return -1;
        io[i] = (struct iovec){(void *)(uintptr_t)(spans[i].target + within), (size_t)nbytes};
        left -= nbytes;
    }
    if (read_into(f, r, io, (int)r->count)) return -1;
    left = r->nbytes; within = r->within;
    for (int64_t i = 0; i < r->count; i++, within = 0) {
        int64_t nbytes = spans[i].nbytes - within < left ? spans[i].nbytes - within : left;
        if (arrive(f, spans[i].batch, nbytes)) return -1;
        left -= nbytes;
    }
    return 0;
}

/* Wait until the copies out of a slot are over: first awake, which is cheap and short, then for longer moments. */
static int await_slot(feed *f, slot *s) {
    for (int turn = 0; s->lane >= 0; turn++) {
        int code = f->order.lanes[s->lane].device->event_query(s->events[s->lane]);
        if (!code) break;
        if (code != NOT_READY) return fail(f, ERROR_DEVICE, code, -1, 0);
        if (stopped(f)) return -1;
        if (turn < 50) sched_yield();
        else nanosleep(&(struct timespec){0, 20000}, NULL);
    }
    s->lane = -1;
    return 0;
}

static int copy_run(feed *f, const char *from, const run *r, const feed_lane *lane) {
    int64_t left = r->nbytes, within = r->within;
    for (const feed_span *s = f->order.spans + r->first; left; s++, within = 0) {
        int64_t nbytes = s->nbytes - within < left ? s->nbytes - within : left;
        if (await_room(f, s->batch)) return -1;
        int code = lane->device->copy((uint64_t)(s->target + within), from, (size_t)nbytes, lane->copy_stream);
        if (code) return fail(f, ERROR_DEVICE, code, s - f->order.spans, s->offset + within);
        if (arrive(f, s->batch, nbytes)) return -1;
        from += nbytes; left -= nbytes;
    }
    return 0;
}

/* For a device: into a slot, and from there. */
static int bring_away(feed *f, const run *r, int64_t number, int64_t *current) {
    slot *s = f->slots + number;
    int64_t which = lane_of(f, r->first);
    const feed_lane *lane = f->order.lanes + which;
    void **event = s->events + which;
    char *memory = f->order.ring + number * f->order.slot_bytes;
    if (await_slot(f, s)) return -1;
    struct iovec io = {memory, (size_t)r->nbytes};
    if (read_into(f, r, &io, 1)) return -1;
    int code = *current == which ? 0 : lane->device->set_current(lane->context);
    if (!code) *current = which;
    if (!code && !*event) code = lane->device->event_create(event, NO_TIMING);
    if (code) return fail(f, ERROR_DEVICE, code, -1, 0);
    int failed = copy_run(f, memory, r, lane);
    /* Even after a failure, since some of it may be on its way. Without the event nobody knows when it has come. */
    code = lane->device->event_record(*event, lane->copy_stream);
    if (code) {
        atomic_store(&f->is_lost, 1);
        return fail(f, ERROR_DEVICE, code, -1, 0);
    }
    s->lane = which;
    return failed;
}

static void *work(void *given) {
    worker w = *(worker *)given;
    feed *f = w.f;
    int64_t current = -1, number = w.index;
    struct iovec *io = malloc(IOV_MAX * sizeof *io);
    free(given);
    if (!io) fail(f, ERROR_READ, ENOMEM, -1, 0);
    while (!stopped(f)) {
        run r = next_run(f);
        if (!r.nbytes) break;
        if (!f->order.lanes[lane_of(f, r.first)].device) {
            if (bring_home(f, &r, io)) break;
            continue;
        }
        if (bring_away(f, &r, number, &current)) break;
        number += f->order.thread_count; /* each thread has slots of its own */
        if (number >= f->order.slot_count) number = w.index;
    }
    free(io);
    return NULL;
}

static void free_all(feed *f) {
    const feed_order *o = &f->order;
    for (int64_t i = 0; f->slots && i < o->slot_count; i++) {
        slot *s = f->slots + i;
        for (int64_t lane = 0; s->events && lane < o->lane_count; lane++)
            if (s->events[lane]) o->lanes[lane].device->event_destroy(s->events[lane]);
        free(s->events);
    }
    for (int64_t i = 0; f->batches && i < o->batch_count; i++)
        if (f->batches[i].event) o->lanes[o->batches[i].lane].device->event_destroy(f->batches[i].event);
    pthread_cond_destroy(&f->news);
    pthread_cond_destroy(&f->room);
    pthread_mutex_destroy(&f->lock);
    free(f->batches); free(f->slots); free(f->threads); free(f);
}

static int start(feed *f) {
    for (int64_t i = 0; i < f->order.thread_count; i++) {
        worker *w = malloc(sizeof *w);
        if (!w) break;
        *w = (worker){f, i};
        if (pthread_create(f->threads + i, NULL, work, w)) { free(w); break; }
        f->started++;
    }
    return f->started ? 0 : -1;
}

int feed_end(feed *f, int64_t timeout_ms);

/* Begin. What `order` points to must stay as it is until feed_end. NULL: no memory, or no thread. */
feed *feed_begin(const feed_order *order) {
    feed *f = calloc(1, sizeof *f);
    if (!f) return NULL;
    f->order = *order;
    int has_device = 0;
    for (int64_t lane = 0; lane < order->lane_count; lane++) has_device |= order->lanes[lane].device != NULL;
    if (has_device && f->order.thread_count > order->slot_count) f->order.thread_count = order->slot_count;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->room, NULL);
    pthread_cond_init(&f->news, &monotonic);
    pthread_condattr_destroy(&monotonic);
    f->batches = calloc((size_t)order->batch_count + 1, sizeof *f->batches);
    f->slots = calloc((size_t)order->slot_count + 1, sizeof *f->slots);
    f->threads = calloc((size_t)f->order.thread_count + 1, sizeof *f->threads);
    int failed = !f->batches || !f->slots || !f->threads;
    for (int64_t i = 0; !failed && i < order->slot_count; i++) {
        f->slots[i] = (slot){calloc((size_t)order->lane_count, sizeof(void *)), -1};
        failed = !f->slots[i].events;
    }
    for (int64_t i = 0; !failed && i < order->span_count; i++)
        f->batches[order->spans[i].batch].left += order->spans[i].nbytes;
    if (failed || start(f)) {
        free_all(f);
        return NULL;
    }
    return f;
}

/* Wait until more than `known` batches are complete, for an error, or until the time is over. */
void feed_wait(feed *f, int64_t known, int64_t timeout_ms, feed_state *state) {
    int64_t end = now_ns() + timeout_ms * 1000000;
    struct timespec until = {end / 1000000000, end % 1000000000};
    pthread_mutex_lock(&f->lock);
    while (f->state.complete <= known && !f->state.error)
        if (pthread_cond_timedwait(&f->news, &f->lock, &until)) break;
    *state = f->state;
    pthread_mutex_unlock(&f->lock);
}

/* Have what is launched on the work stream from here on wait for the copies of a batch that is complete. The caller's
 * current context is that of the batch's lane, here and in feed_done: a stream may be the context's own. */
int feed_take(feed *f, int64_t number) {
    const feed_lane *lane = f->order.lanes + f->order.batches[number].lane;
    return lane->device ? lane->device->stream_wait(lane->work_stream, f->batches[number].event, 0) : 0;
}

/* The next batch has been worked on, as far as its work stream goes: its memory may be another's. */
int feed_done(feed *f) {
    const feed_lane *lane = f->order.lanes + f->order.batches[f->done].lane;
    int code = lane->device ? lane->device->event_record(f->batches[f->done].event, lane->work_stream) : 0;
    pthread_mutex_lock(&f->lock);
    if (!code) f->done++;
    pthread_cond_broadcast(&f->room);
    pthread_mutex_unlock(&f->lock);
    return code;
}

/* Stop what goes on, wait for the threads and for copies out of the slots, and let go of everything. 1: that took too
 * long, as where a file system or a device hangs, or the device cannot tell whether copies are over; then all memory is
 * still in use, and stays so. May be called again. */
int feed_end(feed *f, int64_t timeout_ms) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until); /* what pthread_timedjoin_np takes */
    int64_t end = now_ns() + timeout_ms * 1000000;
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) { until.tv_sec++; until.tv_nsec -= 1000000000; }
    atomic_store(&f->stop, 1);
    pthread_mutex_lock(&f->lock);
    pthread_cond_broadcast(&f->room);
    pthread_mutex_unlock(&f->lock);
    while (f->started) {
        if (pthread_timedjoin_np(f->threads[f->started - 1], NULL, &until)) return 1;
        f->started--;
    }
    for (int64_t i = 0; i < f->order.slot_count; i++) {
        slot *s = f->slots + i;
        int code;
        while (s->lane >= 0 && (code = f->order.lanes[s->lane].device->event_query(s->events[s->lane]))) {
            if (code != NOT_READY || now_ns() > end) return 1;
            sched_yield();
        }
    }
    if (atomic_load(&f->is_lost)) return 1;
    free_all(f);
    return 0;
}
