/* Moments in the life of a request, by the names that QEMU gives them: blkdebug's rules wait for
 * them. Who does something says so to the node that it does it with: a format to its file, a
 * request to the node that it is inside. It costs a look at a pointer when nobody listens. */
#pragma once

struct node;

/* In the order of QEMU's BlkdebugEvent. Those that nothing in this program raises (snapshots of
 * machine state, copy on read, ...) are here all the same: a rule may name them. */
#define DEBUG_EVENTS(X)                                                                            \
    X(l1_update)                                                                                   \
    X(l1_grow_alloc_table)                                                                         \
    X(l1_grow_write_table)                                                                         \
    X(l1_grow_activate_table)                                                                      \
    X(l2_load)                                                                                     \
    X(l2_update)                                                                                   \
    X(l2_update_compressed)                                                                        \
    X(l2_alloc_cow_read)                                                                           \
    X(l2_alloc_write)                                                                              \
    X(read_aio)                                                                                    \
    X(read_backing_aio)                                                                            \
    X(read_compressed)                                                                             \
    X(write_aio)                                                                                   \
    X(write_compressed)                                                                            \
    X(vmstate_load)                                                                                \
    X(vmstate_save)                                                                                \
    X(cow_read)                                                                                    \
    X(cow_write)                                                                                   \
    X(reftable_load)                                                                               \
    X(reftable_grow)                                                                               \
    X(reftable_update)                                                                             \
    X(refblock_load)                                                                               \
    X(refblock_update)                                                                             \
    X(refblock_update_part)                                                                        \
    X(refblock_alloc)                                                                              \
    X(refblock_alloc_hookup)                                                                       \
    X(refblock_alloc_write)                                                                        \
    X(refblock_alloc_write_blocks)                                                                 \
    X(refblock_alloc_write_table)                                                                  \
    X(refblock_alloc_switch_table)                                                                 \
    X(cluster_alloc)                                                                               \
    X(cluster_alloc_bytes)                                                                         \
    X(cluster_free)                                                                                \
    X(flush_to_os)                                                                                 \
    X(flush_to_disk)                                                                               \
    X(pwritev_rmw_head)                                                                            \
    X(pwritev_rmw_after_head)                                                                      \
    X(pwritev_rmw_tail)                                                                            \
    X(pwritev_rmw_after_tail)                                                                      \
    X(pwritev)                                                                                     \
    X(pwritev_zero)                                                                                \
    X(pwritev_done)                                                                                \
    X(empty_image_prepare)                                                                         \
    X(l1_shrink_write_table)                                                                       \
    X(l1_shrink_free_l2_clusters)                                                                  \
    X(cor_write)                                                                                   \
    X(cluster_alloc_space)                                                                         \
    X(none)

#define DEBUG_EVENT_NAME(name) DEBUG_##name,
enum debug_event { DEBUG_EVENTS(DEBUG_EVENT_NAME) DEBUG_EVENTS_COUNT };
#undef DEBUG_EVENT_NAME
