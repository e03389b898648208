/* The load generator for calls: what is sent is answered, and no more than some calls are under way at once.
 *
 * Like load.c it knows no protocol. A file holds one message as it is written or as it arrives; ID in it
 * (########, wherever it stands) is replaced by the call's number in eight hexadecimal digits. Everything
 * that arrives is compared, byte by byte, with what should arrive, in the order of the calls.
 *
 *   calls call WARM SECONDS STRAY WINDOW CALLER_FD CALL ANSWER CALLEE_FD DELIVERED [REPLY]
 *       The caller writes the file CALL, the callee gets DELIVERED and writes REPLY (if there is one), and the
 *       caller gets ANSWER. WINDOW: calls that may be under way.
 *       STRAY: size of something a server may add unasked (a ping), 0 if nothing.
 *   calls watch STRAY FD CALL ANSWER
 *       One call after the other, a millisecond apart, until standard input ends: the longest one shows a stall.
 *       On a busy machine, the most processor time that the server used during one call shows it better.
 *   calls polite WARM SECONDS STRAY CALLEE_FD CALL DELIVERED REPLY ANSWER CALLER...
 *       CALLER is FD:NAME. Each has one call under way, and waits 10 to 30 ms after its answer. NAME (@@@@@,
 *       wherever it stands) is replaced by the caller's; the callee copies name and number into its reply.
 *   calls flood SECONDS FILE FD...
 *       The first connection writes FILE's bytes again and again and never pauses; what arrives anywhere is
 *       thrown away. This is a nuisance for others, and nothing of it is measured.
 *   calls fill SECONDS WINDOW FILE RECEIPT FD...
 *       Each connection writes FILE's message again and again, and gets the file RECEIPT for each. Together they
 *       keep WINDOW messages under way, until the time is over.
 *
 * The answer is one JSON object on standard output. Everything it waits for has a bound. With LOAD_SERVER=PID in
 * the environment, the processor time of that process is in the answer, for the time that was measured.
 */
#include "common.h"
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>

#define ID "########"
#define ID_SIZE 8
#define NAME "@@@@@"
#define NAME_SIZE 5
#define MOST_PLACES 4
#define BUFFER (1 << 18)
#define DRAIN_S 20.0 /* seconds that calls under way may take to be answered at the end */

static atomic_int stopping, over;
static const char *_Atomic trouble;

/* The places of something in a message. */
struct places {
    size_t at[MOST_PLACES], size;
    int count;
};

/* A message with places for its number and for a name. */
struct template {
    char *data;
    size_t size;
    struct places ids, names;
};

static struct places find(const char *what, const char *data, size_t size)
{
    struct places p = {.size = strlen(what)};
    for (size_t at = 0; at + p.size <= size && p.count < MOST_PLACES; at++)
        if (!memcmp(data + at, what, p.size)) {
            p.at[p.count++] = at;
            at += p.size - 1;
        }
    return p;
}

static void fill(char *data, const struct places *p, const char *text)
{
    for (int i = 0; i < p->count; i++)
        memcpy(data + p->at[i], text, p->size);
}

static struct template read_template(const char *path)
{
    struct template t = {0};
    t.data = contents(path, &t.size);
    t.ids = find(ID, t.data, t.size);
    t.names = find(NAME, t.data, t.size);
    if (!t.size || t.size > BUFFER / 4)
        fail("a message of an unexpected size");
    return t;
}

static void number(struct template *t, uint64_t id)
{
    static const char digits[] = "0123456789abcdef";
    char text[ID_SIZE];
    for (int i = ID_SIZE; i--; id >>= 4)
        text[i] = digits[id & 15];
    fill(t->data, &t->ids, text);
}

/* One end: what it will write, and what it has read. */
struct end {
    int fd;
    struct template out, in;
    char written[BUFFER], have[BUFFER];
    size_t from, to, got; /* of written: not yet sent; of have: not yet looked at */
};

static int has_room(const struct end *e)
{
    return e->to + e->out.size <= BUFFER;
}

static void append(struct end *e, uint64_t id)
{
    number(&e->out, id);
    memcpy(e->written + e->to, e->out.data, e->out.size);
    e->to += e->out.size;
}

static void flush(struct end *e)
{
    if (e->from == e->to)
        return;
    ssize_t w = send(e->fd, e->written + e->from, e->to - e->from, MSG_NOSIGNAL);
    if (w < 0 && errno != EAGAIN && errno != EINTR)
        trouble = "the server closed a connection";
    else if (w > 0)
        e->from += w;
    if (e->from == e->to)
        e->from = e->to = 0;
}

/* Wait until it can be written, where something waits, or read; return whether it can be read. */
static int await(struct end *e, int reads)
{
    struct pollfd p = {.fd = e->fd, .events = (reads ? POLLIN : 0) | (e->from < e->to ? POLLOUT : 0)};
    return poll(&p, 1, 20) > 0 && reads && p.revents & ~POLLOUT;
}

/* Read what is there; return how many whole messages came, each the one with the next number below the limit. */
static uint64_t take(struct end *e, uint64_t next, atomic_ullong *limit, size_t stray)
{
    uint64_t count = 0;
    ssize_t r = recv(e->fd, e->have + e->got, BUFFER - e->got, 0);
    if (!r || (r < 0 && errno != EAGAIN && errno != EINTR))
        trouble = "the server closed a connection";
    if (r <= 0)
        return 0;
    e->got += r;
    size_t at = 0;
    while (!trouble) {
        if (stray && e->got - at >= stray && e->have[at] != e->in.data[0]) {
            at += stray;
            continue;
        }
        if (e->got - at < e->in.size)
            break;
        /* Looked up now: what was read may have been sent a moment ago. */
        if (next + count == *limit) {
            trouble = "more arrived than was sent";
            break;
        }
        number(&e->in, next + count);
        if (memcmp(e->have + at, e->in.data, e->in.size)) {
            fprintf(stderr, "expected: %.*s\narrived: %.*s\n", (int)e->in.size, e->in.data, (int)e->in.size, e->have + at);
            trouble = "something else arrived than was sent, or in another order";
            break;
        }
        at += e->in.size;
        count++;
    }
    e->got -= at;
    memmove(e->have, e->have + at, e->got);
    return count;
}

/* call ------------------------------------------------------------------------------------------------------- */

static struct end caller, callee;
static atomic_ullong called, delivered, answered;
static uint64_t window;
static size_t stray;
static int replies;

static void *call_all(void *unused)
{
    (void)unused;
    while (!over && !trouble) {
        while (!stopping && called - answered < window && has_room(&caller))
            append(&caller, called++);
        flush(&caller);
        if (await(&caller, 1))
            answered += take(&caller, answered, &called, stray);
    }
    return NULL;
}

static void *answer_all(void *unused)
{
    (void)unused;
    while (!over && !trouble) {
        /* What has come is answered before more is read. */
        if (await(&callee, callee.from == callee.to)) {
            uint64_t first = delivered, count = take(&callee, first, &called, stray);
            for (uint64_t i = 0; replies && i < count; i++) {
                while (!has_room(&callee) && !trouble && !over) {
                    flush(&callee);
                    await(&callee, 0);
                }
                append(&callee, first + i);
            }
            delivered += count;
        }
        flush(&callee);
    }
    return NULL;
}

static void call(int argc, char **argv)
{
    double warm = atof(argv[0]), seconds = atof(argv[1]);
    stray = strtoull(argv[2], NULL, 10);
    window = strtoull(argv[3], NULL, 10);
    caller.fd = atoi(argv[4]);
    caller.out = read_template(argv[5]);
    caller.in = read_template(argv[6]);
    callee.fd = atoi(argv[7]);
    callee.in = read_template(argv[8]);
    replies = argc > 9;
    if (replies)
        callee.out = read_template(argv[9]);
    set_blocking(caller.fd, 0);
    set_blocking(callee.fd, 0);
    pthread_t calling, answering;
    if (pthread_create(&answering, NULL, answer_all, NULL) || pthread_create(&calling, NULL, call_all, NULL))
        fail("pthread_create");
    nap(warm);
    double t0 = now(), cpu0 = cpu_time(), server0 = server_time();
    uint64_t a0 = answered;
    while (now() < t0 + seconds && !trouble)
        nap(t0 + seconds - now() < 0.02 ? 0.001 : 0.01);
    uint64_t a1 = answered;
    double t1 = now(), cpu1 = cpu_time(), server1 = server_time();
    stopping = 1;
    nap(0.02);
    while (!trouble && now() < t1 + DRAIN_S && (answered < called || delivered < called))
        nap(0.001);
    /* Too much would come at once. */
    nap(0.02);
    over = 1;
    pthread_join(calling, NULL);
    pthread_join(answering, NULL);
    if (!trouble && (answered < called || delivered < called))
        trouble = "not everything that was sent has arrived";
    if (!trouble && a1 == a0)
        trouble = "nothing arrived";
    printf("{\"seconds\": %.6f, \"count\": %llu, \"sent\": %llu, \"cpu\": %.4f, \"server_cpu\": %.4f, \"trouble\": \"%s\"}\n",
           t1 - t0, (unsigned long long)(a1 - a0), (unsigned long long)called, cpu1 - cpu0, server1 - server0,
           trouble ? trouble : "");
}

/* Times ------------------------------------------------------------------------------------------------------ */

/* Of each call: how long it took, and the processor time that the server used meanwhile. */
static double *took, *used;
static size_t time_count, time_room;

static void note_times(double since, double server_since)
{
    if (time_count == time_room) {
        time_room = time_room ? 2 * time_room : 4096;
        took = realloc(took, time_room * sizeof *took);
        used = realloc(used, time_room * sizeof *used);
        if (!took || !used)
            fail("realloc");
    }
    took[time_count] = now() - since;
    used[time_count++] = server_time() - server_since;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Print the times, in milliseconds. */
static void print_times(void)
{
    double none = 0, *t = time_count ? took : &none, *u = time_count ? used : &none;
    size_t count = time_count ? time_count : 1;
    qsort(t, count, sizeof *t, by_size);
    qsort(u, count, sizeof *u, by_size);
    if (!trouble && !time_count)
        trouble = "nothing arrived";
    printf("{\"count\": %zu, \"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"longest\": %.4f, \"p50_cpu\": %.4f, \"longest_cpu\": %.4f, "
           "\"trouble\": \"%s\"}\n",
           time_count, t[count / 2] * 1e3, t[count * 9 / 10] * 1e3, t[count * 99 / 100] * 1e3, t[count - 1] * 1e3, u[count / 2] * 1e3,
           u[count - 1] * 1e3, trouble ? trouble : "");
}

/* watch ------------------------------------------------------------------------------------------------------ */

static void watch(char **argv)
{
    stray = strtoull(argv[0], NULL, 10);
    caller.fd = atoi(argv[1]);
    caller.out = read_template(argv[2]);
    caller.in = read_template(argv[3]);
    set_blocking(caller.fd, 0);
    struct pollfd input = {.fd = 0, .events = POLLIN};
    while (!trouble && !poll(&input, 1, 0)) {
        double t0 = now(), server0 = server_time();
        append(&caller, called++);
        for (flush(&caller); !trouble && answered < called && now() < t0 + DRAIN_S;)
            if (await(&caller, 1))
                answered += take(&caller, answered, &called, stray);
        if (!trouble && answered < called)
            trouble = "not everything that was sent has arrived";
        note_times(t0, server0);
        nap(0.001);
    }
    print_times();
}

/* polite ----------------------------------------------------------------------------------------------------- */

struct polite {
    struct end end;
    double due, sent, server; /* the next call; the one under way, 0 if none is, and the server's time then */
    atomic_ullong calls;
    uint64_t answers;
};

/* Send on what has come to the callee, as replies. */
static void reply_to_all(void)
{
    ssize_t r = recv(callee.fd, callee.have + callee.got, BUFFER - callee.got, 0);
    if (!r || (r < 0 && errno != EAGAIN))
        trouble = "the server closed a connection";
    if (r <= 0)
        return;
    size_t at = 0, last = callee.got + r;
    for (;;) {
        if (stray && last - at >= stray && callee.have[at] != callee.in.data[0]) {
            at += stray;
            continue;
        }
        if (last - at < callee.in.size || !has_room(&callee))
            break;
        fill(callee.out.data, &callee.out.ids, callee.have + at + callee.in.ids.at[0]);
        fill(callee.out.data, &callee.out.names, callee.have + at + callee.in.names.at[0]);
        memcpy(callee.written + callee.to, callee.out.data, callee.out.size);
        callee.to += callee.out.size;
        at += callee.in.size;
    }
    callee.got = last - at;
    memmove(callee.have, callee.have + at, callee.got);
    flush(&callee);
}

static void politely(int argc, char **argv)
{
    double warm = atof(argv[0]), seconds = atof(argv[1]);
    stray = strtoull(argv[2], NULL, 10);
    callee.fd = atoi(argv[3]);
    callee.in = read_template(argv[5]);
    callee.out = read_template(argv[6]);
    int count = argc - 8;
    struct polite *all = calloc(count, sizeof *all);
    struct pollfd *polled = calloc(count + 1, sizeof *polled);
    polled[count].fd = callee.fd;
    set_blocking(callee.fd, 0);
    double begin = now(), end = begin + warm + seconds, t;
    for (int i = 0; i < count; i++) {
        struct end *e = &all[i].end;
        char *name = strchr(argv[8 + i], ':') + 1;
        polled[i].fd = e->fd = atoi(argv[8 + i]);
        e->out = read_template(argv[4]);
        e->in = read_template(argv[7]);
        fill(e->out.data, &e->out.names, name);
        fill(e->in.data, &e->in.names, name);
        set_blocking(e->fd, 0);
        all[i].due = begin + (random() % 20) / 1e3;
    }
    int open = 1;
    while (!trouble && open && (t = now()) < end + DRAIN_S) {
        open = t < end;
        for (int i = 0; i < count; i++) {
            struct polite *p = &all[i];
            if (!p->sent && t < end && p->due <= t) {
                p->sent = now();
                p->server = server_time();
                append(&p->end, p->calls++);
                flush(&p->end);
            }
            open |= p->sent > 0;
            polled[i].events = POLLIN | (p->end.from < p->end.to ? POLLOUT : 0);
        }
        polled[count].events = POLLIN | (callee.from < callee.to ? POLLOUT : 0);
        if (poll(polled, count + 1, 1) <= 0)
            continue;
        for (int i = 0; i < count; i++) {
            struct polite *p = &all[i];
            if (polled[i].revents & POLLOUT)
                flush(&p->end);
            if (polled[i].revents & ~POLLOUT && take(&p->end, p->answers, &p->calls, stray)) {
                if (p->sent > begin + warm)
                    note_times(p->sent, p->server);
                p->answers++;
                p->sent = 0;
                p->due = now() + (10 + random() % 21) / 1e3;
            }
        }
        if (polled[count].revents & POLLOUT)
            flush(&callee);
        if (polled[count].revents & ~POLLOUT)
            reply_to_all();
    }
    if (!trouble && open)
        trouble = "not everything that was sent has arrived";
    print_times();
}

/* flood ------------------------------------------------------------------------------------------------------ */

static void flood(int argc, char **argv)
{
    double end = now() + atof(argv[0]);
    size_t size, at = 0;
    char *data = contents(argv[1], &size), *scratch = malloc(BUFFER);
    int count = argc - 2;
    struct pollfd *polled = calloc(count, sizeof *polled);
    for (int i = 0; i < count; i++) {
        polled[i] = (struct pollfd){.fd = atoi(argv[2 + i]), .events = POLLIN | (i ? 0 : POLLOUT)};
        set_blocking(polled[i].fd, 0);
    }
    uint64_t sent = 0;
    while (!trouble && now() < end) {
        poll(polled, count, 10);
        for (int i = 0; i < count; i++)
            if (polled[i].revents & ~POLLOUT && !recv(polled[i].fd, scratch, BUFFER, 0))
                trouble = "the server closed a connection";
        if (polled[0].revents & POLLOUT) {
            ssize_t w = send(polled[0].fd, data + at, size - at, MSG_NOSIGNAL);
            if (w > 0) {
                sent += w;
                at = (at + w) % size;
            }
        }
    }
    printf("{\"sent\": %llu, \"trouble\": \"%s\"}\n", (unsigned long long)sent, trouble ? trouble : "");
}

/* fill ------------------------------------------------------------------------------------------------------- */

#define REPEATED (1 << 18) /* bytes of a file that is repeated, about */

/* A file again and again; the next byte is at. */
struct repeated {
    char *data;
    size_t one, size, at;
};

struct filler {
    int fd;
    struct repeated out, in;
    uint64_t under_way, unsent; /* messages; bytes of them that are not written yet */
};

/* The repetitions are longer by one read than a position can be. */
static struct repeated read_repeated(const char *path)
{
    struct repeated r = {0};
    char *one = contents(path, &r.one);
    if (!r.one || r.one > REPEATED / 2)
        fail("a file of an unexpected size");
    r.size = (REPEATED + BUFFER) / r.one * r.one;
    r.data = malloc(r.size);
    if (!r.data)
        fail("malloc");
    for (size_t at = 0; at < r.size; at += r.one)
        memcpy(r.data + at, one, r.one);
    free(one);
    return r;
}

static void fill_on(struct filler *f)
{
    while (f->unsent) {
        uint64_t left = f->out.size - f->out.at;
        ssize_t w = send(f->fd, f->out.data + f->out.at, f->unsent < left ? f->unsent : left, MSG_NOSIGNAL);
        if (w < 0 && errno != EAGAIN && errno != EINTR)
            trouble = "the server closed a connection";
        if (w <= 0)
            return;
        f->unsent -= w;
        f->out.at = (f->out.at + w) % f->out.one;
    }
}

static uint64_t take_receipts(struct filler *f, char *scratch)
{
    ssize_t r = recv(f->fd, scratch, BUFFER, 0);
    if (!r || (r < 0 && errno != EAGAIN && errno != EINTR))
        trouble = "the server closed a connection";
    if (r <= 0)
        return 0;
    if (memcmp(scratch, f->in.data + f->in.at, r))
        trouble = "something else arrived than a receipt";
    uint64_t count = (f->in.at + r) / f->in.one;
    f->in.at = (f->in.at + r) % f->in.one;
    if (count > f->under_way)
        trouble = "more arrived than was sent";
    return count;
}

static void fill_all(int argc, char **argv)
{
    double begin = now(), end = begin + atof(argv[0]);
    int count = argc - 4, waiting = 1;
    uint64_t share = strtoull(argv[1], NULL, 10) / count, confirmed = 0;
    struct repeated out = read_repeated(argv[2]), in = read_repeated(argv[3]);
    struct filler *all = calloc(count, sizeof *all);
    struct pollfd *polled = calloc(count, sizeof *polled);
    char *scratch = malloc(BUFFER);
    if (!share || !all || !polled || !scratch)
        fail("no share, or no memory");
    for (int i = 0; i < count; i++) {
        all[i] = (struct filler){.fd = atoi(argv[4 + i]), .out = out, .in = in};
        polled[i].fd = all[i].fd;
        set_blocking(all[i].fd, 0);
    }
    while (!trouble && waiting && now() < end + DRAIN_S) {
        waiting = 0;
        for (int i = 0; i < count; i++) {
            struct filler *f = &all[i];
            uint64_t more = share - f->under_way;
            /* A few at a time would be many writes. */
            if (more * 4 >= share && now() < end) {
                f->under_way += more;
                f->unsent += more * out.one;
                fill_on(f);
            }
            waiting |= f->under_way > 0;
            polled[i].events = POLLIN | (f->unsent ? POLLOUT : 0);
        }
        if (!waiting || poll(polled, count, 20) <= 0)
            continue;
        for (int i = 0; i < count && !trouble; i++) {
            if (polled[i].revents & POLLOUT)
                fill_on(&all[i]);
            if (polled[i].revents & ~POLLOUT) {
                uint64_t some = take_receipts(&all[i], scratch);
                all[i].under_way -= some;
                confirmed += some;
            }
        }
    }
    if (!trouble && waiting)
        trouble = "not everything that was sent has a receipt";
    printf("{\"seconds\": %.6f, \"count\": %llu, \"cpu\": %.4f, \"trouble\": \"%s\"}\n", now() - begin,
           (unsigned long long)confirmed, cpu_time(), trouble ? trouble : "");
}

int main(int argc, char **argv)
{
    behave();
    if (argc > 10 && !strcmp(argv[1], "call"))
        call(argc - 2, argv + 2);
    else if (argc == 6 && !strcmp(argv[1], "watch"))
        watch(argv + 2);
    else if (argc > 10 && !strcmp(argv[1], "polite"))
        politely(argc - 2, argv + 2);
    else if (argc > 4 && !strcmp(argv[1], "flood"))
        flood(argc - 2, argv + 2);
    else if (argc > 6 && !strcmp(argv[1], "fill"))
        fill_all(argc - 2, argv + 2);
    else {
        fprintf(stderr, "usage: see the head of calls.c\n");
        return 2;
    }
    return 0;
}
