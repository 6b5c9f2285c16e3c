# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Decides a step: all decodes, then chunks of running prefills, then admissions.

Blocks are taken here, when a row is scheduled. When they run out, sequences are preempted; the
oldest running sequence never is, so it advances and ends, and so do all after it. A preempted
sequence whose last step is still in flight gives its blocks back when that retires: until then
the rows that wait for them stand still.
"""

from zllm.native.arena cimport F_SAMPLE, F_TOKEN_ON_DEVICE
from zllm.native.block_pool cimport pool_available, pool_reference, pool_release
from zllm.native.books cimport (
    end_sequence,
    hold_until_retired,
    leave_if_retired,
    queue_remove,
    step_of,
    stop_running,
)
from zllm.native.radix_tree cimport Match, tree_match, tree_take
from zllm.native.sequence cimport (
    CONTEXT_LIMIT,
    PREEMPTED,
    QUEUE_TIMEOUT,
    RUNNING,
    TIME_LIMIT,
    Request,
    Sequence,
    blocks_for,
)


cdef Step* plan_step(Books* books, double now) noexcept nogil:
    """The next step, its rows' blocks taken; NULL when nothing can run."""
    cdef Step* step = step_of(books, books.num_planned)
    step.number = books.num_planned
    step.num_rows = 0
    step.num_tokens = 0
    step.num_decodes = 0
    step.num_sampled = 0
    step.num_updates = 0
    step.num_params = 0
    step.num_copies = 0
    step.num_held = 0
    expire_running(books, now)
    schedule_decodes(books, step)
    schedule_chunks(books, step)
    admit_waiting(books, step, now)
    if step.num_rows == 0:
        return NULL
    books.num_planned += 1
    return step


cdef void expire_running(Books* books, double now) noexcept nogil:
    cdef int32_t i
    for i in range(books.num_running - 1, -1, -1):
        if books.running[i].request.deadline <= now:
            end_sequence(books, books.running[i], TIME_LIMIT)


cdef void expire_waiting(Books* books, double now) noexcept nogil:
    """End the waiting sequences whose time is over."""
    cdef Sequence* seq = books.first
    cdef Sequence* after
    while seq != NULL:
        after = seq.next
        if seq.request.deadline <= now:
            end_sequence(books, seq, TIME_LIMIT)
        elif seq.request.queue_deadline <= now and seq.request.cached_tokens < 0:
            end_sequence(books, seq, QUEUE_TIMEOUT)
        seq = after


cdef inline int32_t planned_len(const Sequence* seq) noexcept nogil:
    """The sequence's length once all planned steps have run."""
    return seq.num_tokens + seq.pending


cdef inline bint is_decode(const Sequence* seq) noexcept nogil:
    """Whether one token remains to be computed, and its successor is wanted."""
    return (planned_len(seq) - seq.computed == 1
            and planned_len(seq) < seq.request.max_len)


cdef inline bint has_room(const Books* books, const Step* step, const Sequence* seq,
                          int32_t num_blocks) noexcept nogil:
    """Whether the arena can carry the row's table updates."""
    return (step.num_updates + num_blocks - seq.num_sent <= books.limits.max_updates)


cdef void add_row(Step* step, Sequence* seq, int32_t q_len) noexcept nogil:
    """Put a sequence, whose blocks are there, into the step."""
    cdef int32_t row = step.num_rows
    cdef int32_t flags = 0
    step.seqs[row] = seq
    step.kv_len[row] = seq.computed
    step.q_len[row] = q_len
    if seq.computed >= seq.num_tokens:
        flags = F_TOKEN_ON_DEVICE
    seq.computed += q_len
    if seq.computed == planned_len(seq):
        flags |= F_SAMPLE
        seq.pending += 1
        step.num_sampled += 1
    step.flags[row] = flags
    step.num_rows += 1
    step.num_tokens += q_len
    step.num_updates += seq.num_blocks - seq.num_sent
    step.num_params += seq.needs_params
    seq.planned = step.number
    seq.in_flight += 1


cdef bint extend_table(Books* books, Sequence* seq, int32_t num_blocks) noexcept nogil:
    """Take blocks until the sequence has so many; False when they ran out."""
    cdef int32_t block
    while seq.num_blocks < num_blocks:
        block = tree_take(&books.tree)
        if block == 0:
            return False
        seq.blocks[seq.num_blocks] = block
        seq.num_blocks += 1
    return True


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


cdef Sequence* choose_victim(const Books* books, const Step* step) noexcept nogil:
    """The sequence that loses least: fewest tokens to compute again, then the latest arrival.
    Never the oldest, and none that this step holds already."""
    cdef const Sequence* oldest = oldest_running(books)
    cdef Sequence* victim = NULL
    cdef Sequence* seq
    cdef int32_t i
    for i in range(books.num_running):
        seq = books.running[i]
        if seq == oldest or seq.planned == step.number:
            continue
        if (victim == NULL or seq.computed < victim.computed
                or (seq.computed == victim.computed and seq.arrival > victim.arrival)):
            victim = seq
    return victim


cdef void preempt(Books* books, Sequence* seq) noexcept nogil:
    """Send a sequence back to the queue; it computes its tokens again later."""
    books.counters.preemptions += 1
    books.counters.preempted_tokens += seq.computed
    stop_running(books, seq)
    seq.state = PREEMPTED
    leave_if_retired(books, seq)


cdef int32_t blocks_wanted(const Books* books) noexcept nogil:
    """Blocks that the decodes of this step need."""
    cdef int32_t count = 0
    cdef int32_t i
    cdef const Sequence* seq
    for i in range(books.num_running):
        seq = books.running[i]
        count += is_decode(seq) and blocks_for(seq.computed + 1) > seq.num_blocks
    return count


cdef void schedule_decodes(Books* books, Step* step) noexcept nogil:
    cdef int32_t i = 0
    cdef int32_t needed
    cdef Sequence* seq
    cdef Sequence* victim
    if pool_available(&books.pool) < books.num_running:
        while blocks_wanted(books) > pool_available(&books.pool) + coming_blocks(books):
            victim = choose_victim(books, step)
            if victim == NULL:
                break
            preempt(books, victim)
    while i < books.num_running and step.num_tokens < books.limits.max_num_batched_tokens:
        seq = books.running[i]
        i += 1
        if not is_decode(seq):
            continue
        needed = blocks_for(seq.computed + 1)
        if not has_room(books, step, seq, needed):
            continue
        if not extend_table(books, seq, needed):
            if fills_pool_alone(books, seq):
                end_sequence(books, seq, CONTEXT_LIMIT)
                break
            continue
        add_row(step, seq, 1)
    step.num_decodes = step.num_rows


cdef void schedule_chunks(Books* books, Step* step) noexcept nogil:
    """Continue the prefills of running sequences."""
    cdef int32_t i = 0
    cdef int32_t budget
    cdef Sequence* seq
    cdef Sequence* victim
    cdef Sequence* oldest = oldest_running(books)
    while i < books.num_running:
        seq = books.running[i]
        i += 1
        budget = books.limits.max_num_batched_tokens - step.num_tokens
        if budget <= 0:
            return
        if seq.num_tokens - seq.computed < 2 or seq.planned == step.number:
            continue
        if seq == oldest:
            while (blocks_for(seq.computed + 1) > seq.num_blocks
                    and pool_available(&books.pool) + coming_blocks(books) == 0):
                victim = choose_victim(books, step)
                if victim == NULL:
                    break
                preempt(books, victim)
                i = 0  # the list has moved; rows of this step are skipped above
        if not schedule_chunk(books, step, seq, budget):
            if fills_pool_alone(books, seq):
                end_sequence(books, seq, CONTEXT_LIMIT)
                return


cdef bint schedule_chunk(Books* books, Step* step, Sequence* seq, int32_t budget) noexcept nogil:
    """As much of a sequence's known tokens as budget and blocks allow; False: no token."""
    cdef int32_t length = min(seq.num_tokens, seq.computed + budget)
    if not has_room(books, step, seq, blocks_for(length)):
        return True
    if not extend_table(books, seq, blocks_for(length)):
        length = seq.num_blocks * 16
    if length <= seq.computed:
        return False
    add_row(step, seq, length - seq.computed)
    return True


cdef int32_t blocks_promised(const Books* books) noexcept nogil:
    """Blocks that running sequences still need: their known tokens', and a margin for decodes."""
    cdef int32_t count = 0
    cdef int32_t i
    cdef const Sequence* seq
    for i in range(books.num_running):
        seq = books.running[i]
        count += max(0, blocks_for(seq.num_tokens) - seq.num_blocks)
    return count + (books.num_running + 3) // 4


cdef void admit_waiting(Books* books, Step* step, double now) noexcept nogil:
    cdef Sequence* seq = books.first
    cdef int32_t promised
    if seq == NULL or books.num_free_rows == 0:
        return
    promised = blocks_promised(books)
    while (seq != NULL and books.num_free_rows
            and step.num_tokens < books.limits.max_num_batched_tokens):
        if not admit(books, step, seq, promised, now):
            return
        promised = blocks_promised(books)
        seq = books.first


cdef bint admit(Books* books, Step* step, Sequence* seq, int32_t promised,
                double now) noexcept nogil:
    """Give a waiting sequence a row, the cached part of its tokens and its first chunk."""
    cdef Request* request = seq.request
    cdef Match match
    cdef int32_t i, wanted
    if seq.blocked == books.pool.num_returned:
        return False
    if blocks_for(seq.num_tokens) >= books.pool.num_blocks:
        end_sequence(books, seq, CONTEXT_LIMIT)  # it filled the pool before it was preempted
        return True
    if step.num_updates + blocks_for(seq.num_tokens) > books.limits.max_updates:
        return False
    match.num_blocks = 0
    match.partial = 0
    match.partial_tokens = 0
    if books.caching and not request.bypass_cache:
        # The last token is computed in any case: its logits are wanted.
        match = tree_match(&books.tree, request.salt, seq.tokens, seq.num_tokens - 1, seq.blocks)
    for i in range(match.num_blocks):
        pool_reference(&books.pool, seq.blocks[i])
    wanted = blocks_for(seq.num_tokens) - match.num_blocks + promised
    if match.partial:
        pool_reference(&books.pool, match.partial)
        if wanted > pool_available(&books.pool) or step.num_copies == books.limits.max_copies:
            pool_release(&books.pool, match.partial)
            match.partial = 0
    if wanted > pool_available(&books.pool):
        if match.partial:
            pool_release(&books.pool, match.partial)
        for i in range(match.num_blocks - 1, -1, -1):
            pool_release(&books.pool, seq.blocks[i])
        seq.blocked = books.pool.num_returned
        return False
    queue_remove(books, seq)
    take_row(books, seq)
    seq.num_blocks = match.num_blocks
    seq.num_cached = match.num_blocks
    seq.computed = match.num_blocks * 16
    if match.partial:
        extend_table(books, seq, seq.num_blocks + 1)
        step.copies[2 * step.num_copies] = match.partial
        step.copies[2 * step.num_copies + 1] = seq.blocks[seq.num_blocks - 1]
        step.num_copies += 1
        hold_until_retired(books, step, match.partial)
        seq.computed += match.partial_tokens
    if request.cached_tokens < 0:
        request.cached_tokens = seq.computed
        request.admitted = now
        books.counters.admissions += 1
        books.counters.queue_seconds += now - request.arrived
        books.counters.query_tokens += seq.num_tokens
        books.counters.hit_tokens += seq.computed
    schedule_chunk(books, step, seq, books.limits.max_num_batched_tokens - step.num_tokens)
    return True


cdef void take_row(Books* books, Sequence* seq) noexcept nogil:
    books.num_free_rows -= 1
    seq.row = books.free_rows[books.num_free_rows]
    books.row_owner[seq.row] = seq
    books.running[books.num_running] = seq
    books.num_running += 1
    seq.state = RUNNING
    seq.needs_params = 1
