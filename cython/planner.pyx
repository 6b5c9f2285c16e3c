# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Decides a step: all decodes, then chunks of prompts that end with them, admissions, long prompts.

The tokens that decodes leave are shared equally by the running prefills and the queue. Who needs
less than a share is served first and whole, so a giant prompt holds back neither short prompts nor
arrivals; what they leave goes to the giants.
"""

from libc.math cimport INFINITY

from zllm.native.admission cimport admit_waiting
from zllm.native.arena cimport F_SAMPLE
from zllm.native.block_pool cimport pool_available
from zllm.native.books cimport end_sequence, queue_forks
from zllm.native.preemption cimport (
    coming_blocks,
    fills_pool_alone,
    oldest_running,
    preempt_one,
    settle_preempted,
)
from zllm.native.rows cimport (
    add_row,
    extend_table,
    has_room,
    is_decode,
    is_prefill,
    open_step,
    schedule_chunk,
)
from zllm.native.sequence cimport (
    CONTEXT_LIMIT,
    QUEUE_TIMEOUT,
    TIME_LIMIT,
    Sequence,
    blocks_for,
    waiting_deadline,
)


cdef Step* plan_step(Books* books, double now) noexcept nogil:
    """The next step, its rows' blocks taken; NULL when nothing can run."""
    cdef Step* step = open_step(books)
    cdef int32_t share, giants
    settle_preempted(books)
    expire_running(books, now)
    expire_waiting(books, now)
    schedule_decodes(books, step)
    if step.num_rows < books.num_running:
        share = count_prefills(books, step) + (books.first != NULL)
        share = max(1, tokens_left(books, step) // max(1, share))
        schedule_chunks(books, step, share, False)
        giants = count_prefills(books, step)
        admit_waiting(books, step, tokens_left(books, step) - giants * share, now)
        schedule_chunks(books, step, 0, True)
    else:
        admit_waiting(books, step, tokens_left(books, step), now)
    if step.num_rows == 0:
        return NULL
    while books.num_leaving_host:  # nothing in this step is swapped out any more
        books.num_leaving_host -= 1
        books.free_host[books.num_free_host] = books.leaving_host[books.num_leaving_host]
        books.num_free_host += 1
    books.num_planned += 1
    if books.num_forks:
        queue_ready_forks(books, step)
    return step


cdef void queue_ready_forks(Books* books, const Step* step) noexcept nogil:
    """Queue the forks whose prompt this step completes."""
    cdef int32_t r
    for r in range(step.num_rows):
        if step.seqs[r].index == 0 and step.flags[r] & F_SAMPLE:
            queue_forks(books, step.seqs[r].request)


cdef inline int32_t tokens_left(const Books* books, const Step* step) noexcept nogil:
    return books.limits.max_num_batched_tokens - step.num_tokens


cdef void expire_running(Books* books, double now) noexcept nogil:
    cdef int32_t i
    for i in range(books.num_running - 1, -1, -1):
        if books.running[i].request.deadline <= now:
            end_sequence(books, books.running[i], TIME_LIMIT)


cdef void expire_waiting(Books* books, double now) noexcept nogil:
    """End the waiting sequences whose time is over."""
    cdef Sequence* seq = books.first
    cdef Sequence* after
    if now < books.earliest:
        return
    books.earliest = INFINITY
    while seq != NULL:
        after = seq.next
        if seq.request.deadline <= now:
            end_sequence(books, seq, TIME_LIMIT)
        elif waiting_deadline(seq) <= now:
            end_sequence(books, seq, QUEUE_TIMEOUT)
        else:
            books.earliest = min(books.earliest, waiting_deadline(seq))
        seq = after


cdef int32_t decode_blocks(const Books* books) noexcept nogil:
    """Blocks that the decodes of this step need."""
    cdef int32_t count = 0
    cdef int32_t i
    cdef const Sequence* seq
    for i in range(books.num_running):
        seq = books.running[i]
        count += is_decode(seq) and blocks_for(seq.computed + 1) > seq.num_blocks
    return count


cdef void schedule_decodes(Books* books, Step* step) noexcept nogil:
    """One token of every sequence that has only its last one to compute."""
    cdef int32_t i
    cdef int32_t needed
    cdef Sequence* seq
    if pool_available(&books.pool) < books.num_running:
        while (decode_blocks(books) > pool_available(&books.pool) + coming_blocks(books)
                and preempt_one(books, step)):
            pass
    for i in range(books.num_running):
        seq = books.running[i]
        if not is_decode(seq):
            continue
        needed = blocks_for(seq.computed + 1)
        if not has_room(books, step, seq, needed):
            continue
        if needed > seq.num_blocks and not extend_table(books, seq, needed):
            if fills_pool_alone(books, seq):
                end_sequence(books, seq, CONTEXT_LIMIT)
                break
            continue
        add_row(books, step, seq, 1)
    step.num_decodes = step.num_rows


cdef int32_t count_prefills(const Books* books, const Step* step) noexcept nogil:
    """Running sequences with a prompt to continue that are not in the step."""
    cdef int32_t count = 0
    cdef int32_t i
    for i in range(books.num_running):
        count += is_prefill(books.running[i]) and books.running[i].planned != step.number
    return count


cdef void schedule_chunks(Books* books, Step* step, int32_t share, bint giants) noexcept nogil:
    """Continue prefills: those that need no more than the share, or all, in equal parts."""
    cdef int32_t i = 0
    cdef int32_t left = tokens_left(books, step)
    cdef int32_t parts = count_prefills(books, step)
    cdef Sequence* seq
    while i < books.num_running and left > 0:
        seq = books.running[i]
        i += 1
        if seq.planned == step.number or not is_prefill(seq):
            continue
        if not giants and seq.num_tokens - seq.computed > share:
            continue
        if make_room(books, step, seq):
            i = 0  # the list has moved
            parts = count_prefills(books, step)
        elif schedule_chunk(books, step, seq, max(1, left // parts) if giants else left):
            left = tokens_left(books, step)
            parts -= 1
        elif fills_pool_alone(books, seq):
            end_sequence(books, seq, CONTEXT_LIMIT)
            return


cdef bint make_room(Books* books, const Step* step, const Sequence* seq) noexcept nogil:
    """Preempt for the oldest prefill if no block is there or about to be; False: did not."""
    if blocks_for(seq.computed + 1) <= seq.num_blocks or seq != oldest_running(books):
        return False
    if pool_available(&books.pool) + coming_blocks(books) > 0:
        return False
    return preempt_one(books, step)
