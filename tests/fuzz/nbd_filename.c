/* Names of NBD disks, which an image's header can have, too. What they mean is told by options from
 * which the same name comes again. */
#include "block/nbd.h"

#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    CLEANUP(memory_freep) char *name = xcalloc(size + 1, 1);
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    struct nbd_target target = {0};
    struct error err = ERROR_INIT;

    memcpy(name, data, size);
    if (nbd_parse_filename(name, options, &err) == 0 &&
        nbd_read_target(options, &target, &err) == 0) {
        CLEANUP(memory_freep) char *again = nbd_target_filename(&target);
        assert(again[0] && json_has(target.server, "type"));
        nbd_target_fini(&target);
    } else {
        assert(err.code && err.text[0]);
    }
    return 0;
}
