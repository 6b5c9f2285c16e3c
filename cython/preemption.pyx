# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Preemption: the sequence that loses least goes back to the queue.

The oldest running sequence is never preempted, so it advances and ends, and so do all after it.
A preempted sequence whose last step is still in flight gives its blocks back when that retires:
until then the rows that wait for them stand still. Then its tokens go to the host if that is the
cheaper way and there is room, else they are computed again.
"""

from zllm.native.block_pool cimport BLOCK_SIZE
from zllm.native.books cimport (
    leave_if_retired,
    queue_push,
    release_row,
    step_of,
    stop_running,
)
from zllm.native.policy cimport PRIORITY
from zllm.native.sequence cimport PARTED, PREEMPTED, RUNNING, blocks_for


cdef int32_t coming_blocks(const Books* books) noexcept nogil:
    """Blocks that are sure to come back when the steps in flight retire."""
    cdef int32_t count = 0
    cdef int32_t row, i
    cdef const Sequence* seq
    for row in range(books.limits.max_num_seqs):
        seq = books.row_owner[row]
        if seq != NULL and seq.state != RUNNING:
            for i in range(seq.num_blocks):
                count += books.pool.refs[seq.blocks[i]] == 1
    return count


cdef bint fills_pool_alone(Books* books, const Sequence* seq) noexcept nogil:
    """Whether a sequence that got no block never will: nobody else is there to give one back."""
    cdef Step* newest = step_of(books, books.num_planned)
    cdef Step* before = step_of(books, books.num_planned - 1)
    if books.limits.max_num_seqs - books.num_free_rows > 1 or seq.in_flight:
        return False
    if newest.num_held:
        return False
    return books.num_planned == books.num_committed or before.num_held == 0


cdef Sequence* oldest_running(const Books* books) noexcept nogil:
    cdef Sequence* oldest = NULL
    cdef int32_t i
    for i in range(books.num_running):
        if oldest == NULL or books.running[i].arrival < oldest.arrival:
            oldest = books.running[i]
    return oldest


cdef inline bint loses_less(const Books* books, const Sequence* a,
                            const Sequence* b) noexcept nogil:
    """Fewer tokens to compute again, then the later arrival; priorities come first if they
    rule."""
    if books.limits.policy == PRIORITY and a.request.priority != b.request.priority:
        return a.request.priority < b.request.priority
    if a.computed != b.computed:
        return a.computed < b.computed
    return a.arrival > b.arrival


cdef bint preempt_one(Books* books, const Step* step) noexcept nogil:
    """Preempt the sequence that loses least; False: there is none. Neither the oldest, nor one
    that this step holds already."""
    cdef const Sequence* oldest = oldest_running(books)
    cdef Sequence* victim = NULL
    cdef Sequence* seq
    cdef int32_t i
    for i in range(books.num_running):
        seq = books.running[i]
        if seq == oldest or seq.planned == step.number:
            continue
        if victim == NULL or loses_less(books, seq, victim):
            victim = seq
    if victim == NULL:
        return False
    books.counters.preemptions += 1
    stop_running(books, victim)
    victim.state = PREEMPTED
    leave_if_retired(books, victim)
    settle_preempted(books)
    return True


cdef void settle_preempted(Books* books) noexcept nogil:
    """Queue the preempted sequences whose last step has retired."""
    cdef int32_t row
    cdef Sequence* seq
    if books.num_parted == 0:
        return
    for row in range(books.limits.max_num_seqs):
        seq = books.row_owner[row]
        if seq == NULL or seq.state != PARTED:
            continue
        if not swap_out(books, seq):
            books.counters.preempted_tokens += seq.computed
        release_row(books, seq)
        queue_push(books, seq, seq.num_tokens - seq.host_tokens)
    books.num_parted = 0


cdef int32_t lost_blocks(const Books* books, const Sequence* seq) noexcept nogil:
    """Blocks of the sequence that nobody else keeps alive."""
    cdef int32_t count = 0
    cdef int32_t i
    for i in range(seq.num_blocks):
        count += books.pool.refs[seq.blocks[i]] == 1
    return count


cdef bint swap_out(Books* books, Sequence* seq) noexcept nogil:
    """Send a sequence's blocks to the host; False: no room, or computing again costs less."""
    cdef int32_t num_blocks = blocks_for(seq.computed)
    cdef int32_t i, host
    if (num_blocks == 0 or num_blocks > books.num_free_host
            or books.num_swap_out + num_blocks > books.limits.max_swaps
            or lost_blocks(books, seq) * BLOCK_SIZE <= books.limits.swap_cost * num_blocks):
        return False
    for i in range(num_blocks):
        books.num_free_host -= 1
        host = books.free_host[books.num_free_host]
        seq.host_blocks[i] = host
        books.swap_out[2 * books.num_swap_out] = seq.blocks[i]
        books.swap_out[2 * books.num_swap_out + 1] = host
        books.num_swap_out += 1
    seq.num_host = num_blocks
    seq.host_tokens = seq.computed
    books.counters.swaps_out += 1
    books.counters.swapped_blocks += num_blocks
    return True
