/* Compressed clusters: any bytes inflate to exactly one cluster, or to an error. */
#include "block/qcow2/qcow2.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t out[65536];
    size_t n = size ? (size_t)512 << data[0] % 8 : 512;

    (void)qcow2_inflate(data, size, out, n);
    return 0;
}
