/* What the kernel tells of a block device beyond its content. */
#pragma once

#include "base/macros.h"

#include <sys/stat.h>

/* What the device is called wherever and under whatever number it is found: a volume's uuid, a
 * world wide name, a serial number, a partition of one of these, the file behind a loop device.
 * NULL: nothing that lasts. The caller frees. */
char *device_name(const struct stat *st);
/* Sectors written and discarded since the device came; false: the kernel does not count them. */
bool device_written(const struct stat *st, uint64_t *sectors);
/* Another number each time that a disk comes, within one boot; 0: not known. */
uint64_t device_sequence(int fd);
