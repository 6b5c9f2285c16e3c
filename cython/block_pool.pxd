"""Blocks of the KV cache: who references them, which are empty, which could be evicted.

A block is empty (on the stack), referenced (refs > 0), or idle: cached by the radix tree and
referenced by nobody, in a list from least to most recently used. Block 0 belongs to nobody.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t

cdef enum:
    BLOCK_SIZE = 16

cdef struct Pool:
    int32_t num_blocks      # block 0 included
    int32_t num_empty
    int32_t num_idle
    int32_t empty           # top of the stack of empty blocks, linked by `next`; 0: none
    int32_t oldest          # ends of the idle list; 0: none
    int32_t newest
    int64_t num_returned    # grows whenever a block becomes available
    int32_t* refs
    int32_t* prev
    int32_t* next
    uint8_t* cached         # whether the block is a node of the radix tree

cdef int pool_init(Pool* pool, int32_t num_blocks) noexcept nogil
cdef void pool_free(Pool* pool) noexcept nogil


cdef inline int32_t pool_available(const Pool* pool) noexcept nogil:
    return pool.num_empty + pool.num_idle


cdef inline int32_t pool_take(Pool* pool) noexcept nogil:
    """An empty block with one reference; 0 when there is none."""
    cdef int32_t block = pool.empty
    if block:
        pool.empty = pool.next[block]
        pool.num_empty -= 1
        pool.refs[block] = 1
    return block


cdef inline void pool_unlink(Pool* pool, int32_t block) noexcept nogil:
    """Take an idle block out of its list."""
    cdef int32_t before = pool.prev[block]
    cdef int32_t after = pool.next[block]
    if before:
        pool.next[before] = after
    else:
        pool.oldest = after
    if after:
        pool.prev[after] = before
    else:
        pool.newest = before
    pool.num_idle -= 1


cdef inline void pool_push_empty(Pool* pool, int32_t block) noexcept nogil:
    pool.next[block] = pool.empty
    pool.empty = block
    pool.num_empty += 1
    pool.num_returned += 1


cdef inline void pool_reference(Pool* pool, int32_t block) noexcept nogil:
    """One more user of a block that is referenced or idle."""
    if pool.refs[block] == 0:
        pool_unlink(pool, block)
    pool.refs[block] += 1


cdef inline void pool_release(Pool* pool, int32_t block) noexcept nogil:
    """One user less; the last one leaves the block idle if it is cached, else empty."""
    pool.refs[block] -= 1
    if pool.refs[block]:
        return
    if not pool.cached[block]:
        pool_push_empty(pool, block)
        return
    pool.prev[block] = pool.newest
    pool.next[block] = 0
    if pool.newest:
        pool.next[pool.newest] = block
    else:
        pool.oldest = block
    pool.newest = block
    pool.num_idle += 1
    pool.num_returned += 1
