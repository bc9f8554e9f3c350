/* File names: an image's header may hold any, "json:{...}" included. */
#include "block/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct json_object *options = NULL;
    struct error err = ERROR_INIT;

    CLEANUP(memory_freep) char *name = xcalloc(1, n + 1);
    if (n)
        memcpy(name, data, n);
    CLEANUP(memory_freep) char *beside = path_combine(name, "other");
    CLEANUP(memory_freep) char *seen = path_combine("/images/disk", name);
    assert(strlen(beside) >= 5 && strlen(seen) >= strlen(name));
    CLEANUP(memory_freep) char *json = xasprintf("json:%s", name);
    if (json_filename_parse(json, &options, &err) == 0) {
        /* What we write is understood by us, and is what we would write again. */
        CLEANUP(memory_freep) char *text = json_as_qemu(options);
        json_object_put(options);
        options = NULL;
        CLEANUP(memory_freep) char *again = xasprintf("json:%s", text);
        if (json_filename_parse(again, &options, &err) == 0) {
            CLEANUP(memory_freep) char *second = json_as_qemu(options);
            assert(!strcmp(text, second));
            json_object_put(options);
        }
    } else {
        assert(err.code && err.text[0]);
    }
    return 0;
}
