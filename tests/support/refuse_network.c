// Preloaded into a process, notes its network calls, native code's too, and refuses them.
//
// What is noted, one call a line, goes to the file that NETWORK_LOG names.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char* call, const char* what) {
  const char* path = getenv("NETWORK_LOG");
  const int log = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
  if (log >= 0) {
    dprintf(log, "%s %s\n", call, what ? what : "");
    close(log);
  }
}

int getaddrinfo(const char* node, const char* service, const struct addrinfo* hints,
                struct addrinfo** found) {
  (void)service, (void)hints, (void)found;
  note("getaddrinfo", node);
  return EAI_FAIL;
}

struct hostent* gethostbyname(const char* name) {
  note("gethostbyname", name);
  return NULL;
}

int socket(int domain, int type, int protocol) {
  (void)type, (void)protocol;
  char family[16];
  snprintf(family, sizeof family, "%d", domain);
  note("socket", family);
  errno = EACCES;
  return -1;
}
