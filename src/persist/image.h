/* Bitmaps that are kept inside a qcow2 image (block/qcow2/bitmaps.h), interchangeably with QEMU.
 *
 * The image's own copies are exact as long as it does not say `in_use`: from the open to the first
 * change of a bitmap, and again after a save. In between the bits are in memory, and where the node
 * has a keeper (keeper.h) in its tide file, which the image's guard vouches for. */
#pragma once

#include "block/block.h"

struct dirty_bitmap;
struct image;

/* N, a qcow2 node, is being opened: its directory is read. */
int image_open(struct node *n, struct image **ret, struct error *err) MUST_CHECK;
/* Is there a stored bitmap of this name, whose bits the image has? */
bool image_has(const struct image *im, const char *name);
bool image_names(const struct image *im, const char *name); /* or at least its name */
bool image_has_in_use(const struct image *im); /* one that was in use when it was opened */
/* It becomes a dirty bitmap (*RET; NULL: it is not shown, the log says why). */
int image_load(struct image *im, const char *name, struct dirty_bitmap **ret,
               struct error *err) MUST_CHECK;
/* All the others do; those that are in use are inconsistent. Ends the open. UNSAVED: some bitmaps
 * of the node are not as the image has them. */
int image_load_rest(struct image *im, bool unsaved, struct error *err) MUST_CHECK;

/* Does the image say that its copies are in use, durably? */
bool image_in_use(const struct image *im);
/* From now on it does: before the first change of a bitmap. */
int image_use(struct image *im, struct error *err) MUST_CHECK;
/* Nobody writes: all bitmaps are stored, and the image says so, durably. STRICT: all or none.
 * -EBUSY: one of them cannot be, because a job has it or what it says is not durable yet. Costs
 * nothing when nothing has changed. */
int image_save(struct image *im, bool strict, struct error *err) MUST_CHECK;
void image_close(struct image *im); /* saves nothing */

/* TRUST: what the image has not, and memory has, is still true. */
int image_reopen(struct image *im, bool to_read_only, bool trust, struct error *err) MUST_CHECK;
/* Around writes and resizes, see struct write_observer. */
int image_before_write(struct image *im) MUST_CHECK;
int image_resizing(struct image *im, uint64_t from, uint64_t to, struct error *err) MUST_CHECK;

/* May one more be added? QEMU's texts. */
int image_can_add(struct image *im, const char *name, uint64_t granularity_bytes,
                  struct error *err) MUST_CHECK;
int image_remove(struct image *im, const char *name, struct error *err) MUST_CHECK;
