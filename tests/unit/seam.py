#!/usr/bin/python3
"""Nothing outside the backends in src/rt reads a clock, a random number or a descriptor.

usage: seam.py ROOM=ARCHIVE... [ROOM=OBJECT-DIRECTORY...]

The undefined symbols of each room's objects say what it calls. What is forbidden would
escape the simulator: the same seed would no longer be the same history. The exceptions are
named here, each with its reason.
"""

import glob
import os
import re
import subprocess
import sys

FORBIDDEN = re.compile(
    r"""^_*(
    # descriptors: files
    open(at)?(64)?(_2)? | creat(64)? | close | close_range | dup[23]? | fcntl(64)? | flock | lockf(64)? | ioctl
  | p?readv?(64)?(v2|64v2)?(_chk)? | p?writev?(64)?(v2|64v2)? | lseek(64)? | f?truncate(64)?
  | fsync | fdatasync | sync | syncfs | (posix_)?fallocate(64)? | copy_file_range | sendfile(64)? | splice
  | [fl]?stat(64)?|f?statx?at(64)?|statx | l?f?xstat(64)? | access | faccessat | realpath(_chk)? | readlink(at)?
  | unlink(at)? | rename(at2?)? | mkdir(at)? | rmdir | link | symlink | opendir | readdir(64)? | scandir | mmap(64)?
  | mkstemp.* | mkdtemp | tmpfile(64)?
    # descriptors: sockets and the like
  | socket | socketpair | bind | listen | accept4? | connect | recv(from|msg|mmsg)?(_chk)?
  | send(to|msg|mmsg)? | shutdown | getsockname | getpeername | [gs]etsockopt | pipe2? | eventfd | signalfd
  | timerfd_.* | p?poll(_chk)? | p?select | epoll_.* | io_uring_.* | getaddrinfo
    # streams
  | fopen(64)? | fdopen | freopen(64)? | fread(_chk)? | fgets(_chk)? | getline | getc | fgetc | scanf | popen
    # clocks
  | clock_(gettime|nanosleep|getres) | gettimeofday | time | ftime | nanosleep | u?sleep | timer_(create|settime|gettime) | alarm
    # dice
  | getrandom | getentropy | s?random(_r)? | s?rand(_r)? | [dejlmn]rand48 | arc4random.* | uuid_generate.*
  | gnutls_rnd
    # threads
  | pthread_(create|cond_.*|mutex_.*) | thrd_create | fork | vfork | system | execv?p?e? | posix_spawnp?
)(@.*)?$""",
    re.X,
)

# The backends of rt/: what everybody else asks; and how a process becomes a daemon, which it
# does outside of any loop.
BACKENDS = re.compile(r"rt_(posix|workers|world_threads|world_uring|process)\.c\.o$")

# room -> symbol -> why it may.
ALLOWED = {
    "rt": {
        "mmap64": "the stacks",
        "getaddrinfo": "on a worker thread",
    },
    "base": {
        "write": "log lines go to standard error",
    },
    "bitmap": {
        "mmap64": "memory without a file; see also the argument -1 there",
        "mmap": "the same",
    },
}


def undefined(path):
    out = subprocess.run(["nm", "-u", path], check=True, capture_output=True, text=True).stdout
    member = os.path.basename(path)
    for line in out.splitlines():
        if line.endswith(":"):
            member = line[:-1]
        elif line.split()[:1] in (["U"], ["w"]):
            yield member, line.split()[1].split("@")[0]


def main():
    wrong = 0
    looked = 0
    for arg in sys.argv[1:]:
        room, _, path = arg.partition("=")
        objects = glob.glob(path + "/*.p/*.o") if os.path.isdir(path) else [path]
        for obj in objects:
            for member, symbol in undefined(obj):
                if BACKENDS.search(member):
                    continue
                looked += 1
                if FORBIDDEN.match(symbol) and symbol not in ALLOWED.get(room, {}):
                    print(f"src/{room}: {member} calls {symbol}(): ask rt/io.h or rt/clock.h")
                    wrong += 1
    print(f"{looked} undefined symbols, {wrong} forbidden")
    sys.exit(1 if wrong or not looked else 0)


if __name__ == "__main__":
    main()
