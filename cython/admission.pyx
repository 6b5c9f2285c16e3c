# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Admits waiting sequences in the policy's order, as long as all their known tokens find a block.

What is there already is shared: the blocks of a fork's source, the cached prefix, or what was
swapped out to the host. A block shared up to its middle is copied before the step.
"""

from zllm.native.block_pool cimport BLOCK_SIZE, pool_available, pool_reference, pool_release
from zllm.native.books cimport end_sequence, queue_remove, release_host
from zllm.native.policy cimport next_waiting
from zllm.native.radix_tree cimport Match, tree_match
from zllm.native.rows cimport copy_block, extend_table, schedule_chunk
from zllm.native.sequence cimport CONTEXT_LIMIT, RUNNING, Request, Sequence, blocks_for


cdef void admit_waiting(Books* books, Step* step, int32_t budget, double now) noexcept nogil:
    """Admit until rows, blocks, the queue or the budget of tokens are used up."""
    cdef Sequence* seq
    cdef int32_t before
    cdef int32_t promised
    if books.first == NULL or books.num_free_rows == 0:
        return
    if books.stalled == books.pool.num_returned:
        return
    promised = blocks_promised(books)
    while books.num_free_rows and budget > 0:
        seq = next_waiting(books)
        before = step.num_tokens
        if seq == NULL or not admit(books, step, seq, budget, &promised, now):
            return
        budget -= step.num_tokens - before


cdef int32_t blocks_promised(const Books* books) noexcept nogil:
    """Blocks that running sequences still need for their known tokens."""
    cdef int32_t count = 0
    cdef int32_t i
    cdef const Sequence* seq
    for i in range(books.num_running):
        seq = books.running[i]
        count += max(0, blocks_for(seq.num_tokens) - seq.num_blocks)
    return count


cdef inline Sequence* source_of(const Sequence* seq) noexcept nogil:
    """The running sequence whose blocks a fork may share; NULL: none."""
    cdef Sequence* source
    if seq.source < 0:
        return NULL
    source = seq.request.members[seq.source]
    if source == NULL or source.state != RUNNING or source.computed < seq.num_tokens - 1:
        return NULL
    return source


cdef inline bint is_ready(const Step* step, const Sequence* source,
                          const Sequence* fork) noexcept nogil:
    """Whether steps before this one computed the tokens that the fork shares."""
    if source.admitted == step.number:
        return False
    return source.planned != step.number or source.previous >= fork.num_tokens - 1


cdef Match find_shared(Books* books, Sequence* seq, const Sequence* source) noexcept nogil:
    """The sequence's tokens that are computed already; whole blocks go into its table. The last
    token is always computed again: its logits are wanted."""
    cdef Match match
    cdef int32_t shared = seq.num_tokens - 1
    cdef int32_t i
    match.num_blocks = 0
    match.partial = 0
    match.partial_tokens = 0
    if source != NULL:
        match.num_blocks = shared // BLOCK_SIZE
        match.partial_tokens = shared % BLOCK_SIZE
        if match.partial_tokens:
            match.partial = source.blocks[match.num_blocks]
        for i in range(match.num_blocks):
            seq.blocks[i] = source.blocks[i]
    elif books.caching and not seq.request.bypass_cache:
        match = tree_match(&books.tree, seq.request.salt, seq.tokens, shared, seq.blocks)
        if match.num_blocks * BLOCK_SIZE + match.partial_tokens <= seq.host_tokens:
            match.partial = 0  # the host has more
            match.partial_tokens = 0
    return match


cdef bint admit(Books* books, Step* step, Sequence* seq, int32_t budget, int32_t* promised,
                double now) noexcept nogil:
    """Give a waiting sequence a row, what is shared of its tokens, and its first chunk.

    The blocks `promised` to running sequences are left to them, and a margin for their decodes.
    """
    cdef Sequence* source = source_of(seq)
    cdef Match match
    cdef int32_t i, wanted
    if blocks_for(seq.num_tokens) >= books.pool.num_blocks:
        end_sequence(books, seq, CONTEXT_LIMIT)  # it filled the pool before it was preempted
        return True
    if (step.num_updates + blocks_for(seq.num_tokens) > books.limits.max_updates
            or step.num_copies == books.limits.max_copies
            or books.num_swap_in + seq.num_host > books.limits.max_swaps
            or (source != NULL and not is_ready(step, source, seq))):
        return False
    match = find_shared(books, seq, source)
    for i in range(match.num_blocks):
        pool_reference(&books.pool, seq.blocks[i])
    wanted = blocks_for(seq.num_tokens) - match.num_blocks
    wanted += promised[0] + (books.num_running + 3) // 4
    if match.partial:
        pool_reference(&books.pool, match.partial)
        if wanted > pool_available(&books.pool):
            pool_release(&books.pool, match.partial)
            match.partial = 0
            match.partial_tokens = 0
    if wanted > pool_available(&books.pool):
        for i in range(match.num_blocks - 1, -1, -1):
            pool_release(&books.pool, seq.blocks[i])
        books.stalled = books.pool.num_returned
        return False
    queue_remove(books, seq)
    take_row(books, step, seq)
    seq.num_blocks = match.num_blocks
    seq.num_cached = match.num_blocks if source == NULL else min(match.num_blocks,
                                                                 source.num_cached)
    seq.computed = match.num_blocks * BLOCK_SIZE + match.partial_tokens
    if match.partial:
        extend_table(books, seq, seq.num_blocks + 1)
        copy_block(books, step, match.partial, seq.blocks[match.num_blocks])
    if seq.num_host:
        swap_in(books, seq)
    note_admission(books, seq, now)
    schedule_chunk(books, step, seq, budget)
    promised[0] += blocks_for(seq.num_tokens) - seq.num_blocks
    return True


cdef void take_row(Books* books, const Step* step, Sequence* seq) noexcept nogil:
    books.num_free_rows -= 1
    seq.row = books.free_rows[books.num_free_rows]
    books.row_owner[seq.row] = seq
    books.running[books.num_running] = seq
    books.num_running += 1
    seq.state = RUNNING
    seq.needs_params = 1
    seq.admitted = step.number


cdef void swap_in(Books* books, Sequence* seq) noexcept nogil:
    """Fetch from the host what the cache did not have."""
    cdef int32_t i
    if seq.computed < seq.host_tokens:
        for i in range(seq.num_blocks, seq.num_host):
            extend_table(books, seq, i + 1)
            books.swap_in[2 * books.num_swap_in] = seq.host_blocks[i]
            books.swap_in[2 * books.num_swap_in + 1] = seq.blocks[i]
            books.num_swap_in += 1
            books.counters.swapped_blocks += 1
        seq.computed = seq.host_tokens
        books.counters.swaps_in += 1
    release_host(books, seq)


cdef void note_admission(Books* books, Sequence* seq, double now) noexcept nogil:
    """Count it, and charge the tenant for the tokens that must be computed."""
    cdef Request* request = seq.request
    books.counters.admissions += 1
    books.tenants[request.tenant].deficit -= seq.num_tokens - seq.computed
    if seq.source >= 0:
        books.counters.forks += seq.num_blocks > 0
        seq.source = -1  # from here on it has tokens of its own
    elif request.cached_tokens < 0:
        request.cached_tokens = seq.computed
        request.admitted = now
        books.counters.query_tokens += seq.num_tokens
        books.counters.hit_tokens += seq.computed
