/* The threads of feed.c on fake devices that work late. Exits with 0 if all bytes arrive, each where and when it may.
 *
 * cc -g -O1 -fsanitize=thread -I bigload/io test_feed.c -lpthread && ./a.out FILE */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/uio.h>
#include <unistd.h>

/* Reads give less than was asked for, or are interrupted, as the system's may. */
static ssize_t short_preadv(int fd, const struct iovec *io, int count, int64_t offset);
#define preadv short_preadv
#include "feed.c"
#undef preadv

#include "fake_device.h"
#include <fcntl.h>
#include <stdio.h>

static int short_of = 0; /* bytes that a read gives at most; 0: all */
static atomic_int hangs, hanging; /* whether reads come back; how many did not */
static ssize_t short_preadv(int fd, const struct iovec *io, int count, int64_t offset) {
    static _Atomic int calls;
    if (atomic_load(&hangs)) atomic_fetch_add(&hanging, 1);
    while (atomic_load(&hangs)) usleep(1000);
    if (!short_of) return preadv(fd, io, count, offset);
    if (atomic_fetch_add(&calls, 1) % 5 == 0) { errno = EINTR; return -1; }
    struct iovec some[IOV_MAX];
    size_t left = (size_t)short_of;
    int used = 0;
    for (; used < count && left; used++) {
        some[used] = (struct iovec){io[used].iov_base, io[used].iov_len < left ? io[used].iov_len : left};
        left -= some[used].iov_len;
    }
    return preadv(fd, some, used, offset);
}

enum { LANES = 3, LIVE = 4, FILES = 2 };

static const feed_functions functions = {
    fake_set_current, fake_copy, fake_event_create, fake_event_destroy, fake_event_record, fake_event_query,
    fake_stream_wait,
};

/* Batches of several spans, in turns on the host and two devices, LIVE of each lane at once in its window. What the
 * caller does with a batch is to copy it away, on the lane's work stream or by itself. */
static int try(const char *path, unsigned seed, int64_t thread_count, int64_t slot_bytes, int64_t batch_count, int64_t stop_at, int fails) {
    int64_t size = 40000, total = batch_count * size;
    char *data = malloc((size_t)total), *got = calloc(1, (size_t)total);
    char *window = malloc((size_t)(LANES * LIVE * size)), *ring = malloc((size_t)(12 * slot_bytes));
    for (int64_t i = 0; i < total; i++) data[i] = (char)(((uint64_t)i * 2654435761u + seed) >> 13);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, (size_t)(fails == 2 ? total / 2 : total)) < 0) return 2;
    feed_lane lanes[LANES] = {{NULL, NULL, NULL, NULL}};
    for (int lane = 1; lane < LANES; lane++) lanes[lane] = (feed_lane){&functions, NULL, fake_begin(150), fake_begin(80)};
    feed_span *spans = malloc((size_t)(batch_count * 64) * sizeof *spans);
    feed_batch *batches = calloc((size_t)batch_count, sizeof *batches);
    int64_t span_count = 0;
    for (int64_t i = 0; i < batch_count; i++) {
        batches[i] = (feed_batch){i % LANES, i < LANES * LIVE ? -1 : i - LANES * LIVE, 0};
        int64_t at = (i % LANES * LIVE + i / LANES % LIVE) * size;
        for (int64_t begin = 0; begin < size;) {
            int64_t count = 1 + rand_r(&seed) % 9000;
            if (count > size - begin || span_count % 63 == 62) count = size - begin;
            spans[span_count++] = (feed_span){fd, i * size + begin, count, (int64_t)(uintptr_t)(window + at + begin), i};
            begin += count;
        }
    }
    atomic_store(&fake_copies, 0);
    atomic_store(&fake_copies_until_one_fails, fails == 1 ? 40 : -1);
    feed_order order = {lanes, LANES, spans, span_count, batches, batch_count, ring, slot_bytes, 12, thread_count};
    feed *f = feed_begin(&order);
    feed_state state = {0};
    for (int64_t known = 0; f && known < stop_at && !state.error;) {
        feed_wait(f, known, 100, &state);
        for (; known < state.complete && !state.error; known++) {
            const feed_lane *lane = lanes + batches[known].lane;
            char *from = (char *)(uintptr_t)(window + (known % LANES * LIVE + known / LANES % LIVE) * size);
            if (feed_take(f, known)) return 3;
            if (lane->device) fake_ask(lane->work_stream, (task){COPY, got + known * size, from, (size_t)size, NULL, 0, NULL});
            else memcpy(got + known * size, from, (size_t)size);
            if (feed_done(f)) return 3;
        }
    }
    int failed = !f;
    if (fails == 3) { /* as long as reads hang it does not end, and says so; then it does */
        while (!atomic_load(&hanging)) usleep(1000);
        failed |= feed_end(f, 50) != 1;
        atomic_store(&hangs, 0);
    }
    failed |= !f || feed_end(f, 10000);
    if (failed) fprintf(stderr, f ? "it does not end\n" : "it does not begin\n");
    for (int lane = 1; lane < LANES; lane++) { fake_end(lanes[lane].copy_stream); fake_end(lanes[lane].work_stream); }
    fake_free_events();
    if (fails == 0) failed |= state.error || (stop_at == batch_count && memcmp(got, data, (size_t)total));
    if (fails == 1) failed |= state.error != ERROR_DEVICE || state.code != 719;
    /* Whoever comes there first says so: any read behind the end. */
    if (fails == 2) failed |= state.error != ERROR_ENDED || state.at < total / 2;
    if (failed) fprintf(stderr, "error %d, code %d, at %d of %d bytes, stop at %d, fails %d\n", (int)state.error, (int)state.code, (int)state.at, (int)total, (int)stop_at, fails);
    free(data); free(got); free(window); free(ring); free(spans); free(batches);
    close(fd);
    return failed;
}

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    for (unsigned seed = 1; seed <= 6; seed++) {
        int64_t batches = 60, slots[] = {4096, 16384, 65536};
        short_of = seed % 2 ? 0 : 700;
        int code = try(argv[1], seed, 1 + seed % 5, slots[seed % 3], batches, batches, 0);
        if (!code && seed < 3) code = try(argv[1], seed, 3, 16384, batches, 20, 0); /* the caller gives up */
        if (!code && seed < 3) code = try(argv[1], seed, 4, 16384, batches, batches, 1); /* a copy fails */
        if (!code && seed < 3) code = try(argv[1], seed, 4, 16384, batches, batches, 2); /* the file ends */
        if (!code && seed < 3) { /* reads hang */
            atomic_store(&hanging, 0);
            atomic_store(&hangs, 1);
            code = try(argv[1], seed, 4, 16384, batches, 0, 3);
        }
        if (code) { fprintf(stderr, "seed %u: %d\n", seed, code); return 1; }
    }
    return 0;
}
