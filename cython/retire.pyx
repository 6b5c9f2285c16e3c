# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Takes a step's tokens: appends them, finds who ended, caches the blocks that filled up."""

from zllm.native.arena cimport F_SAMPLE
from zllm.native.block_pool cimport BLOCK_SIZE, pool_reference, pool_release
from zllm.native.books cimport (
    finish_sequence,
    leave_if_retired,
    step_of,
)
from zllm.native.intervals cimport count_interval
from zllm.native.radix_tree cimport tree_insert
from zllm.native.sequence cimport ERROR, RUNNING, ZOMBIE, Sequence, end_of


cdef inline void report(EventList* events, int64_t request_id, int32_t index, int32_t token,
                        int finish, int32_t row) noexcept nogil:
    cdef int32_t i = events.count
    events.request_ids[i] = request_id
    events.indices[i] = index
    events.tokens[i] = token
    events.finishes[i] = finish
    events.rows[i] = row
    events.count = i + 1


cdef void drain_ended(Books* books, EventList* events) noexcept nogil:
    """Report the sequences that ended outside of a commit."""
    cdef int32_t i
    for i in range(books.num_ended):
        report(events, books.ended[i].request_id, books.ended[i].index, -1,
               books.ended[i].finish, -1)
    books.num_ended = 0


cdef int32_t retire_step(Books* books, Step* step, const int32_t* tokens, EventList* events,
                         Started* started, double now) noexcept nogil:
    """Retire a step; returns how many requests got their first token in it."""
    cdef int32_t num_started = 0
    cdef int32_t r, token
    cdef int finish
    cdef Sequence* seq
    books.num_committed += 1
    for r in range(step.num_held):
        pool_release(&books.pool, step.held[r])
    step.num_held = 0
    for r in range(step.num_rows):
        seq = step.seqs[r]
        seq.in_flight -= 1
        if seq.state == ZOMBIE:
            leave_if_retired(books, seq)
            continue
        finish = 0
        token = tokens[r]
        if step.flags[r] & F_SAMPLE:
            seq.pending -= 1
        if token < 0:
            report(events, seq.request.id, seq.index, -1, ERROR, -1)
            finish_sequence(books, seq, ERROR)
            continue
        if step.flags[r] & F_SAMPLE:
            seq.tokens[seq.num_tokens] = token
            seq.num_tokens += 1
            books.counters.generated_tokens += 1
            if seq.token_at > 0:
                count_interval(&books.intervals, now - seq.token_at)
            seq.token_at = now
            books.tenants[seq.request.tenant].deficit -= 1
            finish = end_of(seq.request, seq.num_tokens, token)
            if not seq.request.started:
                seq.request.started = 1
                started[num_started].request_id = seq.request.id
                started[num_started].cached_tokens = seq.request.cached_tokens
                started[num_started].queued = seq.request.admitted - seq.request.arrived
                started[num_started].prefill = now - seq.request.admitted
                num_started += 1
            report(events, seq.request.id, seq.index, token, finish, r)
        if books.caching and not seq.request.bypass_cache:
            cache_blocks(books, seq, step.kv_len[r] + step.q_len[r])
        if finish:
            finish_sequence(books, seq, finish)
        elif seq.state != RUNNING:
            leave_if_retired(books, seq)
    drain_ended(books, events)
    return num_started


cdef inline void cache_blocks(Books* books, Sequence* seq, int32_t written) noexcept nogil:
    """Put the blocks that are full now into the tree. Where another sequence has cached the
    same tokens meanwhile, its block takes the place of ours in the table."""
    cdef int32_t i, parent, block, node
    while (seq.num_cached + 1) * BLOCK_SIZE <= written:
        i = seq.num_cached
        parent = seq.blocks[i - 1] if i else 0
        block = seq.blocks[i]
        node = tree_insert(&books.tree, seq.request.salt, parent, block,
                           seq.tokens + i * BLOCK_SIZE)
        if node != block:
            if not let_go(books, seq, block):
                return  # the next commit goes on
            pool_reference(&books.pool, node)
            seq.blocks[i] = node
            seq.num_sent = min(seq.num_sent, i)
            books.counters.folded_blocks += 1
        seq.num_cached += 1
        if seq.num_cached * BLOCK_SIZE <= seq.request.prompt_len:
            books.stalled = -1  # who waits with the same prompt may need fewer blocks now


cdef bint let_go(Books* books, const Sequence* seq, int32_t block) noexcept nogil:
    """Release a sequence's duplicate once no step in flight reads it; False: no room to note
    that."""
    cdef Step* newest = step_of(books, books.num_planned - 1)
    if seq.in_flight == 0:
        pool_release(&books.pool, block)
        return True
    if newest.num_held == books.limits.max_held:
        return False
    newest.held[newest.num_held] = block
    newest.num_held += 1
    return True
