# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Rows, queue and the life of a sequence (its states: sequence.pxd).

Row and blocks are given up in one place, `release_row`, once the last step in flight that names the
sequence has retired.
"""

from libc.math cimport INFINITY
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memmove, memset

from zllm.native.block_pool cimport pool_free, pool_init, pool_release
from zllm.native.radix_tree cimport tree_free, tree_init
from zllm.native.sequence cimport (
    FORK,
    PARTED,
    PREEMPTED,
    RUNNING,
    WAITING,
    ZOMBIE,
    request_free,
    sequence_free,
    waiting_deadline,
)


cdef int books_init(Books* books, Limits limits, int32_t num_blocks, bint caching) noexcept nogil:
    """Empty books. -1 when memory ran out; books_free is right in either case."""
    cdef int32_t rows = limits.max_num_seqs
    cdef int32_t row
    cdef Step* step
    cdef int i
    cdef bint complete = True
    memset(books, 0, sizeof(Books))
    books.limits = limits
    books.caching = caching
    books.stalled = -1
    books.earliest = INFINITY
    if pool_init(&books.pool, num_blocks) < 0 or tree_init(&books.tree, &books.pool) < 0:
        return -1
    books.row_owner = <Sequence**> calloc(rows, sizeof(Sequence*))
    books.free_rows = <int32_t*> malloc(rows * sizeof(int32_t))
    books.running = <Sequence**> malloc(rows * sizeof(Sequence*))
    if not (books.row_owner and books.free_rows and books.running):
        return -1
    for row in range(rows):
        books.free_rows[row] = rows - 1 - row
    books.num_free_rows = rows
    books.free_host = <int32_t*> malloc((limits.num_host_blocks + 1) * sizeof(int32_t))
    books.leaving_host = <int32_t*> malloc((limits.num_host_blocks + 1) * sizeof(int32_t))
    books.swap_out = <int32_t*> malloc((2 * limits.max_swaps + 1) * sizeof(int32_t))
    books.swap_in = <int32_t*> malloc((2 * limits.max_swaps + 1) * sizeof(int32_t))
    if not (books.free_host and books.leaving_host and books.swap_out and books.swap_in):
        return -1
    for i in range(limits.num_host_blocks):
        books.free_host[i] = limits.num_host_blocks - 1 - i
    books.num_free_host = limits.num_host_blocks
    for i in range(2):
        step = &books.steps[i]
        step.seqs = <Sequence**> malloc(rows * sizeof(Sequence*))
        step.kv_len = <int32_t*> malloc(rows * sizeof(int32_t))
        step.q_len = <int32_t*> malloc(rows * sizeof(int32_t))
        step.flags = <uint8_t*> malloc(rows)
        step.copies = <int32_t*> malloc(<size_t> limits.max_copies * 2 * sizeof(int32_t))
        step.held = <int32_t*> malloc(<size_t> limits.max_held * sizeof(int32_t))
        if not (step.seqs and step.kv_len and step.q_len and step.flags
                and step.copies and step.held):
            complete = False
    return 0 if complete else -1


cdef void free_forks(Books* books, Request* request) noexcept nogil:
    cdef int32_t i
    for i in range(request.num_indices):
        if request.members[i] != NULL and request.members[i].state == FORK:
            free_member(books, request.members[i])


cdef void books_free(Books* books) noexcept nogil:
    cdef int i
    cdef int32_t row
    cdef Sequence* seq
    while books.first != NULL:
        seq = books.first
        queue_remove(books, seq)
        free_forks(books, seq.request)
        free_member(books, seq)
    if books.row_owner != NULL:
        for row in range(books.limits.max_num_seqs):
            seq = books.row_owner[row]
            if seq != NULL:
                free_forks(books, seq.request)
                free_member(books, seq)
    for i in range(2):
        free(books.steps[i].seqs)
        free(books.steps[i].kv_len)
        free(books.steps[i].q_len)
        free(books.steps[i].flags)
        free(books.steps[i].copies)
        free(books.steps[i].held)
    free(books.row_owner)
    free(books.free_rows)
    free(books.running)
    free(books.ended)
    free(books.finished)
    free(books.tenants)
    free(books.free_host)
    free(books.leaving_host)
    free(books.swap_out)
    free(books.swap_in)
    tree_free(&books.tree)
    pool_free(&books.pool)
    memset(books, 0, sizeof(Books))


cdef int books_reserve(Books* books, int32_t capacity) noexcept nogil:
    """Room to note the end of so many sequences. -1 when memory ran out."""
    cdef void* grown
    if capacity <= books.capacity:
        return 0
    capacity = max(capacity, 2 * books.capacity, 64)
    grown = realloc(books.ended, capacity * sizeof(Ended))
    if grown == NULL:
        return -1
    books.ended = <Ended*> grown
    grown = realloc(books.finished, capacity * sizeof(int64_t))
    if grown == NULL:
        return -1
    books.finished = <int64_t*> grown
    books.capacity = capacity
    return 0


cdef void queue_push(Books* books, Sequence* seq, int32_t tokens) noexcept nogil:
    """Put a sequence at its place in the queue, which is in order of arrival; `tokens` of it are to
    be computed, as far as is known."""
    cdef Sequence* after = NULL
    cdef Sequence* before = books.last
    seq.state = WAITING
    if before != NULL and before.arrival > seq.arrival:  # it comes back: near the front
        after = books.first
        while after.arrival < seq.arrival:
            after = after.next
        before = after.prev
    seq.prev = before
    seq.next = after
    if before != NULL:
        before.next = seq
    else:
        books.first = seq
    if after != NULL:
        after.prev = seq
    else:
        books.last = seq
    books.earliest = min(books.earliest, waiting_deadline(seq))
    books.num_waiting += 1
    books.stalled = -1
    seq.queued_tokens = tokens
    books.waiting_tokens += tokens


cdef void queue_remove(Books* books, Sequence* seq) noexcept nogil:
    if seq.prev != NULL:
        seq.prev.next = seq.next
    else:
        books.first = seq.next
    if seq.next != NULL:
        seq.next.prev = seq.prev
    else:
        books.last = seq.prev
    seq.prev = NULL
    seq.next = NULL
    books.num_waiting -= 1
    books.stalled = -1
    books.waiting_tokens -= seq.queued_tokens


cdef void stop_running(Books* books, Sequence* seq) noexcept nogil:
    """Take a sequence off the list of running ones; it keeps row and blocks for now."""
    cdef int32_t i = 0
    while books.running[i] != seq:
        i += 1
    books.num_running -= 1
    memmove(&books.running[i], &books.running[i + 1],
            (books.num_running - i) * sizeof(Sequence*))


cdef void queue_forks(Books* books, Request* request) noexcept nogil:
    """Queue the request's forks: the blocks that they share are computed, or never will be."""
    cdef int32_t i
    cdef Sequence* seq
    for i in range(request.num_indices):
        seq = request.members[i]
        if seq != NULL and seq.state == FORK:
            books.num_forks -= 1
            queue_push(books, seq, 1)


cdef void release_row(Books* books, Sequence* seq) noexcept nogil:
    """Give up row and blocks. The deepest block goes first: see radix_tree.pyx."""
    cdef int32_t i
    for i in range(seq.num_blocks - 1, -1, -1):
        pool_release(&books.pool, seq.blocks[i])
    seq.num_blocks = 0
    seq.num_sent = 0
    seq.num_cached = 0
    seq.computed = 0
    books.row_owner[seq.row] = NULL
    books.free_rows[books.num_free_rows] = seq.row
    books.num_free_rows += 1
    books.pool.num_returned += 1
    seq.row = -1


cdef void release_host(Books* books, Sequence* seq) noexcept nogil:
    """Give up host blocks; they are empty once the next step has been packed."""
    cdef int32_t i
    for i in range(seq.num_host):
        books.leaving_host[books.num_leaving_host] = seq.host_blocks[i]
        books.num_leaving_host += 1
    seq.num_host = 0
    seq.host_tokens = 0


cdef void free_member(Books* books, Sequence* seq) noexcept nogil:
    cdef Request* request = seq.request
    release_host(books, seq)
    books.num_live -= 1
    if seq.state == FORK:
        books.num_forks -= 1
    books.tenants[request.tenant].num_live -= 1
    request.members[seq.index] = NULL
    request.num_members -= 1
    if request.num_members == 0:
        request_free(request)
    sequence_free(seq)


cdef void leave_if_retired(Books* books, Sequence* seq) noexcept nogil:
    """The one way out of a row, for a sequence that is preempted or has ended."""
    if seq.in_flight:
        return
    if seq.state == PREEMPTED:
        seq.state = PARTED
        books.num_parted += 1
    else:
        release_row(books, seq)
        free_member(books, seq)


cdef void finish_sequence(Books* books, Sequence* seq, int reason) noexcept nogil:
    """Note that a sequence has ended and let go of it; its caller reports that."""
    cdef Request* request = seq.request
    seq.finish = reason
    request.num_unfinished -= 1
    if request.num_unfinished == 0:
        books.finished[books.num_finished] = request.id
        books.num_finished += 1
    if seq.index == 0 and books.num_forks:
        queue_forks(books, request)
    if seq.state == FORK:
        free_member(books, seq)
        return
    if seq.state == WAITING:
        queue_remove(books, seq)
        free_member(books, seq)
        return
    if seq.state == RUNNING:
        stop_running(books, seq)
    elif seq.state == PARTED:
        books.num_parted -= 1
    seq.state = ZOMBIE
    leave_if_retired(books, seq)


cdef void end_sequence(Books* books, Sequence* seq, int reason) noexcept nogil:
    """End a sequence outside of a commit; the next commit or poll reports it."""
    cdef Ended* ended = &books.ended[books.num_ended]
    books.num_ended += 1
    ended.request_id = seq.request.id
    ended.index = seq.index
    ended.finish = reason
    finish_sequence(books, seq, reason)
