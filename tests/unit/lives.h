/* Lives of the program: each is a process of its own, with the real clock and files, that ends for
 * good when its test says so; what was written is there for the next one. What those that are
 * killed (killedlives.h) and those whose operations fail (faultylives.h) have in common: the
 * directory of their disks, what they tell there, and actions. */
#pragma once

#include "blockutil.h"
#include "plainworld.h"

#include "dirty/dirty.h"
#include "job/transaction.h"
#include "persist/persist.h"
#include "rt/world.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { DISKS = 3, KILLED = 77 };
#define DISK_BYTES (4 * MiB)

static char dir[64];

/* ---- files ---- */

static inline void make_dir(void)
{
    snprintf(dir, sizeof dir, "%s/lives-XXXXXX", unit_tmp());
    assert_non_null(mkdtemp(dir));
}

/* Whose names have WITH as a part; "": all. */
static inline void remove_files(const char *with)
{
    DIR *d = opendir(dir);
    struct dirent *e;

    assert_non_null(d);
    while ((e = readdir(d)))
        if (e->d_name[0] != '.' && strstr(e->d_name, with))
            assert_int_equal(unlinkat(dirfd(d), e->d_name, 0), 0);
    closedir(d);
}

static inline void lose_segments(void)
{
    remove_files("run-");
}

static inline void make_files(uint64_t size)
{
    for (unsigned i = 0; i < DISKS; i++) {
        char path[80];
        snprintf(path, sizeof path, "%s/%u", dir, i);
        int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, (off_t)size), 0);
        close(fd);
    }
}

/* ---- what a life tells the others ---- */

static inline void say(const char *what)
{
    char path[80];

    snprintf(path, sizeof path, "%s/said", dir);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, what, strlen(what)) == (ssize_t)strlen(what));
    close(fd);
}

static inline bool was_said(const char *what)
{
    char path[80], text[32] = "";

    snprintf(path, sizeof path, "%s/said", dir);
    int fd = open(path, O_RDONLY);
    if (fd >= 0) {
        CHECK(read(fd, text, sizeof text - 1) >= 0);
        close(fd);
    }
    return strcmp(text, what) == 0;
}

/* ---- actions ---- */

/* 'single quotes' stand for "double ones". */
static inline struct json_object *parse(char *text)
{
    for (char *p = text; (p = strchr(p, '\'')); p++)
        *p = '"';
    return json_tokener_parse(text);
}

/* On bitmap NAME of disk DISK; MORE: what else its arguments are, after a comma. */
static inline void add_bitmap_action(struct json_object *actions, const char *action, unsigned disk,
                                     const char *name, const char *more)
{
    char text[256];

    snprintf(text, sizeof text,
             "{'type':'block-dirty-bitmap-%s','data':{'node':'d%u','name':'%s'%s}}", action, disk,
             name, more);
    json_object_array_add(actions, parse(text));
}
