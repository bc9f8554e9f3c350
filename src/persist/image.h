/* Bitmaps that are kept inside a qcow2 image (block/qcow2/bitmaps.h), interchangeably with QEMU. */
#pragma once

#include "block/block.h"

struct image;

/* N, a qcow2 node, has been opened: its stored bitmaps become dirty bitmaps. */
int image_open(struct node *n, struct image **ret, struct error *err) MUST_CHECK;
/* Saves them; what cannot be saved is told in the log. */
void image_close(struct image *im);
int image_reopen(struct image *im, bool to_read_only, struct error *err) MUST_CHECK;
/* May one more be added? QEMU's texts. */
int image_can_add(struct image *im, const char *name, uint64_t granularity_bytes,
                  struct error *err) MUST_CHECK;
int image_remove(struct image *im, const char *name, struct error *err) MUST_CHECK;
