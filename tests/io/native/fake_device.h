/* A device for tests: threads of their own do what is asked of a stream, in order and late. What is copied out of a slot
 * that was filled again too early, or into memory that is still worked on, shows. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { _Atomic int64_t asked, happened; } fake_event;
typedef struct task {
    enum { COPY, RECORD, WAIT } kind;
    void *to; const void *from; size_t nbytes;
    fake_event *event; int64_t ticket;
    struct task *next;
} task;
typedef struct {
    pthread_mutex_t lock; pthread_cond_t news; pthread_t thread;
    task *head, *tail; int is_over; unsigned delay_us, seed;
} fake_stream;

static void *fake_run(void *given) {
    fake_stream *s = given;
    for (;;) {
        pthread_mutex_lock(&s->lock);
        while (!s->head && !s->is_over) pthread_cond_wait(&s->news, &s->lock);
        task *t = s->head;
        if (t && !(s->head = t->next)) s->tail = NULL;
        pthread_mutex_unlock(&s->lock);
        if (!t) return NULL;
        if (s->delay_us) usleep((unsigned)rand_r(&s->seed) % s->delay_us);
        if (t->kind == COPY) memcpy(t->to, t->from, t->nbytes);
        if (t->kind == RECORD) atomic_store(&t->event->happened, t->ticket);
        while (t->kind == WAIT && atomic_load(&t->event->happened) < t->ticket) usleep(10);
        free(t);
    }
}

static int fake_ask(fake_stream *s, task made) {
    task *t = malloc(sizeof *t);
    if (!t) return 2;
    *t = made;
    pthread_mutex_lock(&s->lock);
    if (t->kind == RECORD) t->ticket = atomic_fetch_add(&t->event->asked, 1) + 1;
    if (s->tail) s->tail->next = t; else s->head = t;
    s->tail = t;
    pthread_cond_signal(&s->news);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

fake_stream *fake_begin(unsigned delay_us) {
    fake_stream *s = calloc(1, sizeof *s);
    s->delay_us = delay_us;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->news, NULL);
    pthread_create(&s->thread, NULL, fake_run, s);
    return s;
}

/* Do what was asked for, and end. */
void fake_end(fake_stream *s) {
    pthread_mutex_lock(&s->lock);
    s->is_over = 1;
    pthread_cond_signal(&s->news);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->news);
    free(s);
}

_Atomic int64_t fake_copies, fake_copies_until_one_fails = -1;

int fake_set_current(void *context) { (void)context; return 0; }
int fake_copy(uint64_t to, const void *from, size_t nbytes, void *stream) {
    if (atomic_fetch_add(&fake_copies, 1) == atomic_load(&fake_copies_until_one_fails)) return 719;
    return fake_ask(stream, (task){COPY, (void *)to, from, nbytes, NULL, 0, NULL});
}
int fake_event_create(void **event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof(fake_event));
    return *event ? 0 : 2;
}
/* A stream may still name it, as CUDA allows: freed at the end. */
static void *fake_destroyed[1 << 16];
static _Atomic int fake_destroyed_count;
int fake_event_destroy(void *event) {
    fake_destroyed[atomic_fetch_add(&fake_destroyed_count, 1)] = event;
    return 0;
}
void fake_free_events(void) {
    while (atomic_load(&fake_destroyed_count)) free(fake_destroyed[atomic_fetch_sub(&fake_destroyed_count, 1) - 1]);
}
int fake_event_record(void *event, void *stream) {
    return fake_ask(stream, (task){RECORD, NULL, NULL, 0, event, 0, NULL});
}
int fake_event_query(void *event) {
    fake_event *e = event;
    return atomic_load(&e->happened) < atomic_load(&e->asked) ? 600 : 0;
}
int fake_stream_wait(void *stream, void *event, unsigned flags) {
    (void)flags;
    return fake_ask(stream, (task){WAIT, NULL, NULL, 0, event, atomic_load(&((fake_event *)event)->asked), NULL});
}

/* The same functions as `feed.c` is given them, each of which may be told to fail at a call, counted from 0. */
enum { EDGES = 7 };
_Atomic int64_t edge_calls[EDGES], edge_fails_at[EDGES] = {-1, -1, -1, -1, -1, -1, -1};
static int edge_fails(int which) {
    return atomic_fetch_add(&edge_calls[which], 1) == atomic_load(&edge_fails_at[which]);
}
int edge_set_current(void *context) { return edge_fails(0) ? 719 : fake_set_current(context); }
int edge_copy(uint64_t to, const void *from, size_t nbytes, void *stream) {
    return edge_fails(1) ? 719 : fake_copy(to, from, nbytes, stream);
}
int edge_event_create(void **event, unsigned flags) { return edge_fails(2) ? 2 : fake_event_create(event, flags); }
int edge_event_destroy(void *event) { return edge_fails(3) ? 719 : fake_event_destroy(event); }
int edge_event_record(void *event, void *stream) { return edge_fails(4) ? 719 : fake_event_record(event, stream); }
int edge_event_query(void *event) { return edge_fails(5) ? 719 : fake_event_query(event); }
int edge_stream_wait(void *stream, void *event, unsigned flags) {
    return edge_fails(6) ? 719 : fake_stream_wait(stream, event, flags);
}
