/* The time that no load can beat: threads read files from the page cache into pinned memory, and GPUs copy from there.
 * Nothing else is done with the bytes, and all of them go to the same memory of a GPU.
 *
 * floor TRIES GPUS THREADS:SLOT_KIB:RING_MIB[,...] FILE...   prints the seconds of each try of each setting. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOST_GPUS = 16, MOST_THREADS = 256, MOST_SLOTS = 4096 };

static void *driver;
#define CALL(name, types, ...) check(((int (*) types)dlsym(driver, #name))(__VA_ARGS__), #name)

static void check(int code, const char *what) {
    if (code) { fprintf(stderr, "%s failed: %d\n", what, code); exit(1); }
}

static struct { void *context, *stream; uint64_t memory; } gpus[MOST_GPUS];
static struct { int file; off_t at; size_t nbytes; } *pieces;
static void *events[MOST_SLOTS][MOST_GPUS];
static char *ring;
static size_t slot_bytes;
static int gpu_count, thread_count, slot_count, piece_count;
static atomic_int next_piece;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void use(int gpu) { CALL(cuCtxSetCurrent, (void *), gpus[gpu].context); }

static void *work(void *given) {
    int current = -1, last[MOST_SLOTS] = {0};
    for (int slot = (int)(intptr_t)given; ; slot = slot + thread_count < slot_count ? slot + thread_count : (int)(intptr_t)given) {
        int i = atomic_fetch_add(&next_piece, 1), gpu = gpu_count ? i % gpu_count : 0;
        if (i >= piece_count) return NULL;
        char *memory = ring + (size_t)slot * slot_bytes;
        if (last[slot]) CALL(cuEventSynchronize, (void *), events[slot][last[slot] - 1]);
        for (size_t got = 0; got < pieces[i].nbytes;) {
            ssize_t count = pread(pieces[i].file, memory + got, pieces[i].nbytes - got, pieces[i].at + (off_t)got);
            if (count <= 0) { perror("reading"); exit(1); }
            got += (size_t)count;
        }
        if (!gpu_count) continue;
        if (current != gpu) use(current = gpu);
        CALL(cuMemcpyHtoDAsync_v2, (uint64_t, void *, size_t, void *), gpus[gpu].memory, memory, pieces[i].nbytes, gpus[gpu].stream);
        CALL(cuEventRecord, (void *, void *), events[slot][gpu], gpus[gpu].stream);
        last[slot] = gpu + 1;
    }
}

static double try(void) {
    pthread_t threads[MOST_THREADS];
    double begun = now();
    atomic_store(&next_piece, 0);
    for (int i = 0; i < thread_count; i++) check(pthread_create(threads + i, NULL, work, (void *)(intptr_t)i), "a thread");
    for (int i = 0; i < thread_count; i++) pthread_join(threads[i], NULL);
    for (int gpu = 0; gpu < gpu_count; gpu++) { use(gpu); CALL(cuStreamSynchronize, (void *), gpus[gpu].stream); }
    return now() - begun;
}

static void set(int file_count, char **files, long slot_kib, long ring_mib) {
    slot_bytes = (size_t)slot_kib << 10;
    slot_count = (int)(((size_t)ring_mib << 20) / slot_bytes);
    if (slot_count > MOST_SLOTS || thread_count > MOST_THREADS || thread_count > slot_count) check(1, "this setting");
    piece_count = 0;
    for (int file = 0; file < file_count; file++) {
        int descriptor = open(files[file], O_RDONLY);
        struct stat s;
        if (descriptor < 0 || fstat(descriptor, &s)) { perror(files[file]); exit(1); }
        for (off_t at = 0; at < s.st_size; at += (off_t)slot_bytes) {
            pieces = realloc(pieces, (size_t)(piece_count + 1) * sizeof *pieces);
            size_t left = (size_t)(s.st_size - at);
            pieces[piece_count].file = descriptor;
            pieces[piece_count].at = at;
            pieces[piece_count++].nbytes = left < slot_bytes ? left : slot_bytes;
        }
    }
}

int main(int argc, char **argv) {
    if (argc < 5) return 2;
    size_t most = 512u << 20; /* of the ring */
    gpu_count = atoi(argv[2]);
    if (gpu_count) {
        driver = dlopen("libcuda.so.1", RTLD_NOW);
        if (!driver || gpu_count > MOST_GPUS) check(1, "CUDA's driver");
        CALL(cuInit, (unsigned), 0);
    }
    for (int gpu = 0; gpu < gpu_count; gpu++) {
        CALL(cuDevicePrimaryCtxRetain, (void **, int), &gpus[gpu].context, gpu);
        use(gpu);
        CALL(cuStreamCreate, (void **, unsigned), &gpus[gpu].stream, 1);
        CALL(cuMemAlloc_v2, (uint64_t *, size_t), &gpus[gpu].memory, 64u << 20);
        for (int slot = 0; slot < MOST_SLOTS; slot++) CALL(cuEventCreate, (void **, unsigned), &events[slot][gpu], 2);
    }
    if (gpu_count) CALL(cuMemHostAlloc, (void **, size_t, unsigned), (void **)&ring, most, 1);
    else ring = calloc(1, most);
    for (char *setting = argv[3]; setting; ) {
        long slot_kib, ring_mib;
        if (sscanf(setting, "%d:%ld:%ld", &thread_count, &slot_kib, &ring_mib) != 3 || (size_t)ring_mib << 20 > most) return 2;
        set(argc - 4, argv + 4, slot_kib, ring_mib);
        for (int count = atoi(argv[1]); count; count--) printf("%d:%ld:%ld %.5f\n", thread_count, slot_kib, ring_mib, try());
        while (*setting && *setting != ',') setting++;
        setting = *setting ? setting + 1 : NULL;
    }
    return 0;
}
