/* The raw relay: the physical limit of anything that moves messages through a process of its own.
 *
 *   relay ADDRESS       a TCP port on loopback, or a path for a Unix socket
 *
 * It accepts connections two by two and carries bytes between the two, both ways, with one read and one write
 * through one buffer of the size that brokerd reads with. It parses nothing, knows no names and keeps no count.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define BUFFER (256 * 1024)

static int other[65536];

static int listen_at(const char *address)
{
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(atoi(address))};
    int tcp = *address != '/', one = 1, fd = socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    strncpy(un.sun_path, address, sizeof un.sun_path - 1);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, tcp ? (struct sockaddr *)&in : (struct sockaddr *)&un, tcp ? sizeof in : sizeof un) ||
        listen(fd, 64)) {
        perror("relay: listen");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv)
{
    static char buffer[BUFFER];
    struct epoll_event events[64];
    int waiting = -1, one = 1;
    if (argc != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, 9);
    int listener = listen_at(argv[1]), ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &e);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(ep, events, 64, -1);
        for (int k = 0; k < n; k++) {
            int fd = events[k].data.fd;
            if (fd == listener) {
                int new = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
                if (new < 0 || new >= 65536)
                    continue;
                setsockopt(new, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                if (waiting < 0) {
                    waiting = new;
                    continue;
                }
                other[new] = waiting;
                other[waiting] = new;
                for (int i = 0; i < 2; i++) {
                    e = (struct epoll_event){.events = EPOLLIN, .data.fd = i ? new : waiting};
                    epoll_ctl(ep, EPOLL_CTL_ADD, e.data.fd, &e);
                }
                waiting = -1;
                continue;
            }
            if (!other[fd])
                continue; /* closed with its partner a moment ago */
            int to = other[fd], alive = 0;
            ssize_t r = recv(fd, buffer, BUFFER, MSG_DONTWAIT);
            if (r < 0 && (errno == EAGAIN || errno == EINTR))
                continue;
            if (r > 0) {
                ssize_t at = 0, w = 0;
                while (at < r && (w = send(to, buffer + at, r - at, MSG_NOSIGNAL)) > 0)
                    at += w;
                alive = at == r;
            }
            if (!alive) {
                other[fd] = other[to] = 0;
                close(fd);
                close(to);
            }
        }
    }
}
