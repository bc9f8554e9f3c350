/* What queries show of an image, as QEMU's ImageInfo and ImageInfoSpecificQCow2 have it. */
#include "block/qcow2/bitmaps.h"
#include "block/qcow2/qcow2.h"

static struct json_object *bitmaps_info(struct qcow2 *q)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *list = NULL;
    if (!q->header.has_bitmaps || qcow2_bitmaps_read(q->node, &list, NULL) < 0)
        return NULL;
    struct json_object *array = NULL;
    for (size_t i = 0; i < list->n; i++) {
        const struct qcow2_bitmap *b = &list->items[i];
        if (b->quarantined)
            continue;
        struct json_object *one = json_object_new_object(), *flags = json_object_new_array();
        if (b->in_use)
            json_object_array_add(flags, json_object_new_string("in-use"));
        if (b->automatic)
            json_object_array_add(flags, json_object_new_string("auto"));
        json_add(one, "flags", flags);
        json_add_string(one, "name", b->name);
        json_add_uint(one, "granularity", (uint64_t)1 << b->granularity_bits);
        if (!array)
            array = json_object_new_array();
        json_object_array_add(array, one);
    }
    return array;
}

void qcow2_image_info(struct node *n, struct json_object *info)
{
    struct qcow2 *q = n->state;
    const struct qcow2_header *h = &q->header;
    struct json_object *data = json_object_new_object();
    struct json_object *specific = json_object_new_object();

    json_add_uint(info, "cluster-size", q->cluster_size);
    json_add_bool(info, "dirty-flag", h->incompatible & QCOW2_INCOMPAT_DIRTY);

    json_add_string(data, "compat", h->version == 2 ? "0.10" : "1.1");
    json_add_string(data, "compression-type", h->compression_type ? "zstd" : "zlib");
    if (h->version >= 3) {
        json_add_bool(data, "lazy-refcounts", h->compatible & QCOW2_COMPAT_LAZY_REFCOUNTS);
        struct json_object *bitmaps = bitmaps_info(q);
        if (bitmaps)
            json_add(data, "bitmaps", bitmaps);
    }
    json_add_int(data, "refcount-bits", 1 << h->refcount_order);
    if (h->version >= 3) {
        json_add_bool(data, "corrupt", h->incompatible & QCOW2_INCOMPAT_CORRUPT);
        json_add_bool(data, "extended-l2", false);
    }
    json_add_string(specific, "type", "qcow2");
    json_add(specific, "data", data);
    json_add(info, "format-specific", specific);
}
