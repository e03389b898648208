/* The load generator: moves encoded bytes, counts, and measures time.
 *
 * It knows no protocol. Connections are opened and authenticated by the parent process and inherited as file
 * descriptors. A sender writes the contents of a file, over and over; a receiver's input is counted in bytes.
 * The one exception is `connect`, which opens connections and therefore does the handshakes itself.
 *
 *   load pump WARM SECONDS WINDOW STRAY MEMBER...
 *       MEMBER is s:FD:FILE:DELIVERED   writes FILE's bytes again and again; one writing makes DELIVERED bytes arrive
 *              or r:FD:SENDER:SHARE     gets SHARE bytes of each writing of that sender (-1: of every sender)
 *              or p:FD:-1:0             gets some of the bytes; all these together get everything that arrives
 *       It measures when WARM seconds are over and as much has arrived as all files hold, so that caches are filled.
 *       WINDOW: the most bytes that may be under way, fewer where the system is slow: a quarter of a second's.
 *       0: no limit, the senders never pause.
 *       STRAY: size of something a server may add unasked (a ping), 0 if nothing.
 *   load pingpong WARM SECONDS STRAY FD_A FILE_A SIZE_A FD_B FILE_B SIZE_B
 *       A writes FILE_A, B gets SIZE_B bytes and writes FILE_B, A gets SIZE_A bytes: one round trip.
 *   load connect WARM SECONDS PARALLEL PORT (stock|named|script GREETING REPLY) FILE
 *       FILE: records of two lengths (32 bits, native) and two byte strings: key and name, or, with script,
 *       what to send (and nothing). GREETING: 1 if the server speaks first, one line. REPLY: size of its last word.
 *
 * The answer is one JSON object on standard output. Everything it waits for has a bound. With LOAD_SERVER=PID in
 * the environment, the processor time of that process is in the answer, for the time that was measured.
 */
#include "common.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

#define READ_SIZE (1 << 20)
#define LEAST_WINDOW (1 << 19)
#define WINDOW_S 0.25
#define MOST_WARM_S 10.0 /* seconds that the first writing may take, before anything is measured */
#define DRAIN_S 20.0 /* seconds that messages under way may take to arrive at the end */

static int is_tcp(int fd)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    return !getsockname(fd, (struct sockaddr *)&a, &n) && a.ss_family != AF_UNIX;
}

/* pump ------------------------------------------------------------------------------------------------------- */

struct sender {
    int fd;
    char *data;
    size_t size, at;
    uint64_t delivered;
    atomic_ullong writings; /* begun */
};

struct receiver {
    int fd, sender, discard, in_pool;
    uint64_t share;
    atomic_ullong bytes;
};

static struct sender *senders;
static struct receiver *receivers;
static int sender_count, receiver_count, senders_stuck;
static uint64_t most, stray;
static atomic_ullong window = LEAST_WINDOW;
static atomic_ullong expected, arrived, answers;
static atomic_int stopping, sent_all, over;
static const char *_Atomic trouble;

/* What a sender must have taken in when it stops is whole messages, so it finishes the writing it is in. */
static void *send_all(void *unused)
{
    (void)unused;
    int ep = epoll_create1(0), unfinished = sender_count;
    char *done = calloc(sender_count, 1);
    struct epoll_event events[64];
    for (int i = 0; i < sender_count; i++) {
        struct epoll_event e = {.events = EPOLLOUT, .data.u32 = i};
        if (epoll_ctl(ep, EPOLL_CTL_ADD, senders[i].fd, &e))
            fail("epoll_ctl");
    }
    while (unfinished && !over) {
        int n = epoll_wait(ep, events, 64, 100);
        for (int k = 0; k < n && !over; k++) {
            struct sender *s = &senders[events[k].data.u32];
            if (done[events[k].data.u32])
                continue;
            if (!s->at) {
                /* Signed: with something unasked, more can have arrived than is expected. */
                while (!stopping && (int64_t)(expected - arrived) > (int64_t)window)
                    nap(20e-6);
                if (stopping) {
                    done[events[k].data.u32] = 1;
                    epoll_ctl(ep, EPOLL_CTL_DEL, s->fd, NULL);
                    unfinished--;
                    continue;
                }
                s->writings++;
                expected += s->delivered;
            }
            ssize_t w = send(s->fd, s->data + s->at, s->size - s->at, MSG_NOSIGNAL);
            if (w > 0)
                s->at = (s->at + w) % s->size;
            else if (errno != EAGAIN && errno != EINTR) {
                trouble = "the server closed a sender's connection";
                return NULL;
            }
        }
    }
    senders_stuck = unfinished;
    sent_all = 1;
    return NULL;
}

static void *receive_all(void *unused)
{
    (void)unused;
    int ep = epoll_create1(0);
    char *scratch = malloc(READ_SIZE);
    struct epoll_event events[256];
    for (int i = 0; i < receiver_count + sender_count; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = i};
        int fd = i < receiver_count ? receivers[i].fd : senders[i - receiver_count].fd;
        if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e))
            fail("epoll_ctl (is a connection given twice?)");
    }
    while (!over) {
        int n = epoll_wait(ep, events, 256, 100);
        for (int k = 0; k < n; k++) {
            int i = events[k].data.u32;
            int fd = i < receiver_count ? receivers[i].fd : senders[i - receiver_count].fd;
            /* TCP can throw away what has arrived without copying it: counting is all that is wanted. */
            int discard = i < receiver_count && receivers[i].discard;
            ssize_t r = recv(fd, scratch, READ_SIZE, discard ? MSG_TRUNC : 0);
            if (r > 0 && i < receiver_count) {
                receivers[i].bytes += r;
                arrived += r;
            } else if (r > 0) {
                if (!answers && getenv("LOAD_SHOW_ANSWERS"))
                    fwrite(scratch, 1, r, stderr);
                answers += r;
            } else if (!r || (errno != EAGAIN && errno != EINTR)) {
                trouble = i < receiver_count ? "the server closed a receiver's connection"
                                             : "the server closed a sender's connection";
                return NULL;
            }
        }
    }
    return NULL;
}

/* Return 1 when every receiver has what it was sent, 0 when something is missing, -1 when there is too much. */
static int complete(void)
{
    for (int i = 0; i < receiver_count; i++) {
        uint64_t want = 0, have = receivers[i].bytes;
        if (receivers[i].in_pool) {
            if (arrived < expected)
                return 0;
            if (arrived > expected && !stray)
                return -1;
            /* Strays that came before the last messages make up for what is missing of these. */
            if (arrived > expected && (arrived - expected) % stray)
                return 0;
            continue;
        }
        for (int s = 0; s < sender_count; s++)
            if (receivers[i].sender < 0 || receivers[i].sender == s)
                want += senders[s].writings * receivers[i].share;
        if (have < want)
            return 0;
        if (have > want && !stray)
            return -1;
        if (have > want && (have - want) % stray)
            return 0;
    }
    return 1;
}

/* Whether as much has arrived as one writing of every sender makes. */
static int all_arrived_once(void)
{
    uint64_t once = 0;
    for (int i = 0; i < sender_count; i++)
        once += senders[i].delivered;
    return arrived >= once || trouble;
}

static void pump(int argc, char **argv)
{
    double warm = atof(argv[0]), seconds = atof(argv[1]);
    most = strtoull(argv[2], NULL, 10);
    if (!most)
        most = window = INT64_MAX;
    stray = strtoull(argv[3], NULL, 10);
    senders = calloc(argc, sizeof *senders);
    receivers = calloc(argc, sizeof *receivers);
    for (int i = 4; i < argc; i++) {
        strtok(argv[i], ":");
        int fd = atoi(strtok(NULL, ":"));
        char *third = strtok(NULL, ":");
        uint64_t fourth = strtoull(strtok(NULL, ":"), NULL, 10);
        set_blocking(fd, 0);
        if (argv[i][0] == 's') {
            struct sender *s = &senders[sender_count++];
            s->fd = fd;
            s->data = contents(third, &s->size);
            s->delivered = fourth;
        } else {
            struct receiver *r = &receivers[receiver_count++];
            r->fd = fd;
            r->sender = atoi(third);
            r->share = fourth;
            r->in_pool = argv[i][0] == 'p';
            r->discard = is_tcp(fd);
        }
    }
    pthread_t sending, receiving;
    if (pthread_create(&receiving, NULL, receive_all, NULL) || pthread_create(&sending, NULL, send_all, NULL))
        fail("pthread_create");
    double begin = now();
    for (double t; (t = now() - begin) < warm || (t < MOST_WARM_S && !all_arrived_once()); nap(0.005)) {
        uint64_t few = arrived / (t + 1e-6) * WINDOW_S;
        window = most == INT64_MAX || few > most ? most : few < LEAST_WINDOW ? LEAST_WINDOW : few;
    }
    double t0 = now(), cpu0 = cpu_time(), server0 = server_time();
    uint64_t a0 = arrived;
    while (now() < t0 + seconds && !trouble)
        nap(t0 + seconds - now() < 0.02 ? 0.001 : 0.01);
    uint64_t a1 = arrived;
    double t1 = now(), cpu1 = cpu_time(), server1 = server_time();
    stopping = 1;
    double give_up = t1 + DRAIN_S;
    int whole = 0;
    while (!trouble && now() < give_up && !(sent_all && (whole = complete())))
        nap(0.001);
    over = 1;
    pthread_join(sending, NULL);
    pthread_join(receiving, NULL);
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < receiver_count; i++)
        least = receivers[i].bytes < least ? receivers[i].bytes : least;
    if (!trouble && a1 - a0 <= stray * receiver_count)
        trouble = "nothing arrived";
    if (!trouble && whole != 1)
        trouble = whole ? "more arrived than was sent" : "not everything that was sent has arrived";
    printf("{\"seconds\": %.6f, \"bytes\": %llu, \"sent\": %llu, \"arrived\": %llu, \"least\": %llu, \"answers\": %llu, "
           "\"cpu\": %.4f, \"server_cpu\": %.4f, \"trouble\": \"%s\"}\n",
           t1 - t0, (unsigned long long)(a1 - a0), (unsigned long long)expected, (unsigned long long)arrived,
           (unsigned long long)least, (unsigned long long)answers, cpu1 - cpu0, server1 - server0, trouble ? trouble : "");
}

/* pingpong --------------------------------------------------------------------------------------------------- */

struct player {
    int fd;
    char *data;
    size_t size, expects;
};

static struct player player_a, player_b;

static int write_whole(struct player *p)
{
    for (size_t at = 0; at < p->size;) {
        ssize_t w = send(p->fd, p->data + at, p->size - at, MSG_NOSIGNAL);
        if (w <= 0)
            return 0;
        at += w;
    }
    return 1;
}

/* A stray is taken for what it is when nothing else fits: the sizes here are far from each other. */
static int read_whole(struct player *p)
{
    static _Thread_local char scratch[1 << 17];
    for (size_t have = 0; have < p->expects;) {
        ssize_t r = recv(p->fd, scratch, sizeof scratch, 0);
        if (r <= 0)
            return 0;
        have += r;
        if (stray && (have == stray || have == p->expects + stray))
            have -= stray;
    }
    return 1;
}

static void *play_back(void *unused)
{
    (void)unused;
    while (read_whole(&player_b) && write_whole(&player_b))
        ;
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void pingpong(char **argv)
{
    double warm = atof(argv[0]), seconds = atof(argv[1]);
    stray = strtoull(argv[2], NULL, 10);
    player_a = (struct player){.fd = atoi(argv[3]), .expects = atoi(argv[5])};
    player_a.data = contents(argv[4], &player_a.size);
    player_b = (struct player){.fd = atoi(argv[6]), .expects = atoi(argv[8])};
    player_b.data = contents(argv[7], &player_b.size);
    struct timeval timeout = {.tv_sec = (time_t)(warm + seconds) + 10};
    for (int i = 0; i < 2; i++) {
        int fd = i ? player_a.fd : player_b.fd;
        set_blocking(fd, 1);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    }
    pthread_t other;
    if (pthread_create(&other, NULL, play_back, NULL))
        fail("pthread_create");
    size_t room = 1 << 22, count = 0;
    float *times = malloc(room * sizeof *times);
    double begin = now() + warm, end = begin + seconds, cpu0 = 0, server0 = 0, t0 = 0;
    const char *why = "";
    while (t0 < end && count < room) {
        t0 = now();
        if (!write_whole(&player_a) || !read_whole(&player_a)) {
            why = "a round trip did not come back";
            break;
        }
        if (t0 >= begin) {
            if (!count)
                cpu0 = cpu_time(), server0 = server_time();
            times[count++] = (now() - t0) * 1e6;
        }
    }
    double cpu1 = cpu_time(), server1 = server_time();
    shutdown(player_b.fd, SHUT_RDWR);
    pthread_join(other, NULL);
    qsort(times, count, sizeof *times, by_size);
    printf("{\"seconds\": %.6f, \"count\": %zu, \"p50\": %.2f, \"p99\": %.2f, \"cpu\": %.4f, \"server_cpu\": %.4f, "
           "\"trouble\": \"%s\"}\n",
           seconds, count, count ? times[count / 2] : 0, count ? times[count * 99 / 100] : 0, cpu1 - cpu0, server1 - server0,
           count || *why ? why : "no round trip");
}

/* SHA-256 and its HMAC: FIPS 180-4 and RFC 2104, for messages of a handshake's size ----------------------------- */

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))

static void compress(uint32_t h[8], const uint8_t *block)
{
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (ROTR(a, 7) ^ ROTR(a, 18) ^ a >> 3) + w[i - 7] + (ROTR(b, 17) ^ ROTR(b, 19) ^ b >> 10);
    }
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t e = v[4], a = v[0];
        uint32_t t1 = v[7] + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + K[i] + w[i];
        uint32_t t2 = (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += v[i];
}

static void sha256(const uint8_t *a, size_t a_size, const uint8_t *b, size_t b_size, uint8_t out[32])
{
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t data[512] = {0};
    size_t size = a_size + b_size, padded = (size + 9 + 63) / 64 * 64;
    memcpy(data, a, a_size);
    memcpy(data + a_size, b, b_size);
    data[size] = 0x80;
    for (int i = 0; i < 8; i++)
        data[padded - 1 - i] = (uint64_t)size * 8 >> 8 * i;
    for (size_t at = 0; at < padded; at += 64)
        compress(h, data + at);
    for (int i = 0; i < 32; i++)
        out[i] = h[i / 4] >> (24 - 8 * (i % 4));
}

static void hmac(const uint8_t *key, size_t key_size, const uint8_t *message, size_t size, uint8_t out[32])
{
    uint8_t inner[64], outer[64], digest[32];
    for (size_t i = 0; i < 64; i++) {
        uint8_t k = i < key_size ? key[i] : 0;
        inner[i] = k ^ 0x36;
        outer[i] = k ^ 0x5c;
    }
    sha256(inner, 64, message, size, digest);
    sha256(outer, 64, digest, 32, out);
}

/* connect ---------------------------------------------------------------------------------------------------- */

struct client {
    uint32_t first_size, second_size;
    const uint8_t *first, *second; /* key and name, or script and nothing */
    int busy;
};

enum stage { CHALLENGED, WELCOMED, ANSWERED, GREETED, REPLIED };

struct attempt {
    int fd;
    enum stage stage;
    struct client *client;
    size_t have;
    uint8_t in[4096], mine[48];
};

static struct client *clients;
static size_t client_count, reply_size;
static int stock, named, greeting, churn_port;
static uint64_t attempts, successes;

static void send_frame(int fd, const uint8_t *body, uint32_t size)
{
    uint8_t frame[256];
    uint32_t prefix = htonl(size);
    memcpy(frame, &prefix, 4);
    memcpy(frame + 4, body, size);
    if (send(fd, frame, size + 4, MSG_NOSIGNAL) != (ssize_t)size + 4)
        trouble = "the server closed a connection during its handshake";
}

static void begin_attempt(struct attempt *a, int ep)
{
    /* At random, and not one that is just connected: a broker may allow a name only once. */
    do
        a->client = &clients[random() % client_count];
    while (a->client->busy);
    a->client->busy = 1;
    a->have = 0;
    a->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int one = 1;
    setsockopt(a->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(a->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    /* One source address has ports for some seconds only; the loopback network has 16 million addresses. */
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons(churn_port)};
    from.sin_addr.s_addr = htonl(0x7f000002 + attempts++ % 250);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (a->fd < 0 || bind(a->fd, (void *)&from, sizeof from) ||
        (connect(a->fd, (void *)&to, sizeof to) && errno != EINPROGRESS))
        fail("connect");
    a->stage = stock ? CHALLENGED : greeting ? GREETED : REPLIED;
    struct epoll_event e = {.events = stock || greeting ? EPOLLIN : EPOLLIN | EPOLLOUT, .data.ptr = a};
    if (epoll_ctl(ep, EPOLL_CTL_ADD, a->fd, &e))
        fail("epoll_ctl");
}

static void end_attempt(struct attempt *a)
{
    close(a->fd);
    a->client->busy = 0;
    a->fd = -1;
}

/* Go on with the handshake as far as the bytes go; return 1 when it is over. */
static int advance_stock(struct attempt *a)
{
    static const uint8_t digest[] = "{sha256}";
    uint32_t size;
    while (a->have >= 4 && (memcpy(&size, a->in, 4), size = ntohl(size), a->have >= 4 + size)) {
        uint8_t *body = a->in + 4, answer[128];
        memcpy(answer, digest, 8);
        if (a->stage == CHALLENGED) {
            if (size < 31 || memcmp(body, "#CHALLENGE#{sha256}", 19)) {
                trouble = "expected a challenge";
                return 1;
            }
            hmac(a->client->first, a->client->first_size, body + 11, size - 11, answer + 8);
            size_t extra = named ? a->client->second_size : 0;
            memcpy(answer + 40, a->client->second, extra);
            send_frame(a->fd, answer, 40 + extra);
            a->stage = WELCOMED;
        } else if (a->stage == WELCOMED) {
            if (size != 9 || memcmp(body, "#WELCOME#", 9)) {
                trouble = "a client was not welcome";
                return 1;
            }
            uint8_t challenge[59] = "#CHALLENGE#{sha256}";
            memcpy(a->mine, digest, 8);
            if (getrandom(a->mine + 8, 40, 0) != 40)
                fail("getrandom");
            memcpy(challenge + 11, a->mine, 48);
            send_frame(a->fd, challenge, 59);
            a->stage = ANSWERED;
        } else {
            hmac(a->client->first, a->client->first_size, a->mine, 48, answer + 8);
            if (size != 40 || memcmp(body, answer, 40)) {
                trouble = "the server does not know the key";
                return 1;
            }
            send_frame(a->fd, (const uint8_t *)"#WELCOME#", 9);
            successes++;
            return 1;
        }
        a->have -= 4 + size;
        memmove(a->in, a->in + 4 + size, a->have);
    }
    return 0;
}

static int advance_script(struct attempt *a)
{
    if (a->stage == GREETED) {
        if (!a->have || a->in[a->have - 1] != '\n')
            return 0;
        a->have = 0;
        a->stage = REPLIED;
        if (send(a->fd, a->client->first, a->client->first_size, MSG_NOSIGNAL) != a->client->first_size)
            trouble = "the server closed a connection during its handshake";
        return 0;
    }
    if (a->have < reply_size)
        return 0;
    if (a->have > reply_size) {
        a->in[a->have < 100 ? a->have : 100] = 0;
        fprintf(stderr, "load: unexpected reply: %s\n", a->in);
        trouble = "the server answered something else";
        return 1;
    }
    successes++;
    return 1;
}

static void churn(int argc, char **argv)
{
    double warm = atof(argv[0]), seconds = atof(argv[1]);
    int parallel = atoi(argv[2]);
    churn_port = atoi(argv[3]);
    stock = strcmp(argv[4], "script") != 0;
    named = !strcmp(argv[4], "named");
    if (!stock) {
        greeting = atoi(argv[5]);
        reply_size = atoi(argv[6]);
    }
    size_t size;
    uint8_t *data = (uint8_t *)contents(argv[argc - 1], &size), *end = data + size;
    clients = calloc(size / 8 + 1, sizeof *clients);
    for (; data < end; client_count++) {
        struct client *c = &clients[client_count];
        memcpy(&c->first_size, data, 4);
        memcpy(&c->second_size, data + 4, 4);
        c->first = data + 8;
        c->second = c->first + c->first_size;
        data += 8 + c->first_size + c->second_size;
    }
    if (client_count <= (size_t)parallel)
        fail("fewer clients than connections at once");
    srandom(time(NULL));
    int ep = epoll_create1(0);
    struct attempt *all = calloc(parallel, sizeof *all);
    double begin = now(), t0 = 0, cpu0 = 0, server0 = 0, t = begin;
    uint64_t s0 = 0;
    for (int i = 0; i < parallel; i++)
        begin_attempt(&all[i], ep);
    struct epoll_event events[64];
    while ((t = now()) < begin + warm + seconds && !trouble) {
        if (!t0 && t >= begin + warm) {
            t0 = t;
            cpu0 = cpu_time(), server0 = server_time();
            s0 = successes;
        }
        int n = epoll_wait(ep, events, 64, 100);
        for (int i = 0; i < n && !trouble; i++) {
            struct attempt *a = events[i].data.ptr;
            if (events[i].events & EPOLLOUT) {
                struct epoll_event e = {.events = EPOLLIN, .data.ptr = a};
                epoll_ctl(ep, EPOLL_CTL_MOD, a->fd, &e);
                if (send(a->fd, a->client->first, a->client->first_size, MSG_NOSIGNAL) != a->client->first_size)
                    trouble = "the server closed a connection during its handshake";
                continue;
            }
            ssize_t r = recv(a->fd, a->in + a->have, sizeof a->in - 1 - a->have, 0);
            if (r < 0 && (errno == EAGAIN || errno == EINTR))
                continue;
            if (r <= 0) {
                trouble = "the server closed a connection during its handshake";
                break;
            }
            a->have += r;
            if (stock ? advance_stock(a) : advance_script(a)) {
                end_attempt(a);
                begin_attempt(a, ep);
            }
        }
    }
    printf("{\"seconds\": %.6f, \"count\": %llu, \"all\": %llu, \"cpu\": %.4f, \"server_cpu\": %.4f, "
           "\"trouble\": \"%s\"}\n",
           t - t0,
           (unsigned long long)(successes - s0), (unsigned long long)successes, cpu_time() - cpu0, server_time() - server0, trouble ? trouble : "");
}

int main(int argc, char **argv)
{
    behave();
    if (argc > 6 && !strcmp(argv[1], "pump"))
        pump(argc - 2, argv + 2);
    else if (argc == 11 && !strcmp(argv[1], "pingpong"))
        pingpong(argv + 2);
    else if (argc > 7 && !strcmp(argv[1], "connect"))
        churn(argc - 2, argv + 2);
    else {
        fprintf(stderr, "usage: see the head of load.c\n");
        return 2;
    }
    return 0;
}
