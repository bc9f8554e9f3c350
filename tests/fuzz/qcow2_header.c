/* The first cluster of a qcow2 image: decoding, and encoding again what was understood. */
#include "block/qcow2/header.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct qcow2_header h = {0}, again = {0};
    struct error err = ERROR_INIT;

    qcow2_header_probe(data, size);
    if (qcow2_header_decode(data, size, &h, &err) < 0)
        goto out;
    uint64_t cluster = qcow2_header_cluster_size(&h);
    uint8_t *buf = calloc(1, cluster);
    memcpy(buf, data, size < cluster ? size : cluster);
    if (qcow2_header_decode_rest(buf, cluster, &h, &err) == 0 &&
        qcow2_header_check(&h, &err) == 0) {
        uint8_t *out = calloc(1, cluster);
        int n = qcow2_header_encode(&h, out);
        if (n > 0) {
            /* What we write we read, and it says the same. */
            if (qcow2_header_decode(out, cluster, &again, NULL) < 0 ||
                qcow2_header_decode_rest(out, cluster, &again, NULL) < 0 ||
                qcow2_header_check(&again, NULL) < 0 || again.size_bytes != h.size_bytes ||
                again.has_bitmaps != h.has_bitmaps || again.nb_unknown != h.nb_unknown ||
                !again.backing_file != !h.backing_file)
                abort();
            qcow2_header_fini(&again);
        }
        free(out);
    }
    free(buf);
out:
    qcow2_header_fini(&h);
    return 0;
}
