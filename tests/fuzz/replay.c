/* Gives a fuzz target files instead of a fuzzer: the arguments are files or directories of files,
 * and each is one input. So the corpus is an ordinary test in every build. */
#include "base/buffer.h"

#include <dirent.h>
#include <stdio.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    struct buffer b = {0};
    size_t n;

    if (!f) {
        perror(path);
        return -1;
    }
    do {
        uint8_t *to = buffer_reserve(&b, 65536);
        n = to ? fread(to, 1, 65536, f) : 0;
        b.length += n;
    } while (n);
    fclose(f);
    /* a buffer of exactly this size, so that a sanitizer sees the first byte beyond */
    uint8_t *exact = malloc(b.length);
    if (b.length)
        memcpy(exact, b.data, b.length);
    LLVMFuzzerTestOneInput(exact, b.length);
    free(exact);
    buffer_fini(&b);
    return 0;
}

static int replay(const char *path)
{
    struct stat st;

    if (stat(path, &st) < 0) {
        perror(path);
        return -1;
    }
    if (!S_ISDIR(st.st_mode))
        return replay_file(path);
    struct dirent **names;
    int n = scandir(path, &names, NULL, alphasort), r = n < 0 ? -1 : 0;
    for (int i = 0; i < n; i++) {
        if (names[i]->d_name[0] != '.') {
            char *one = xasprintf("%s/%s", path, names[i]->d_name);
            if (replay(one) < 0)
                r = -1;
            free(one);
        }
        free(names[i]);
    }
    if (n >= 0)
        free(names);
    return r;
}

int main(int argc, char **argv)
{
    int bad = argc < 2;

    for (int i = 1; i < argc; i++)
        if (replay(argv[i]) < 0)
            bad = 1;
    return bad;
}
