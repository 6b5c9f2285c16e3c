# cython: language_level=3, cdivision=True
"""Every invariant of pool, tree, rows and queue, counted anew from the sequences up."""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport calloc, free

from zllm.errors import InvariantError
from zllm.native.books cimport Step
from zllm.native.radix_tree cimport Node, Tree
from zllm.native.block_pool cimport BLOCK_SIZE, Pool
from zllm.native.sequence cimport PARTED, PREEMPTED, RUNNING, WAITING, ZOMBIE, Sequence, blocks_for


cdef int require(bint holds, str what) except -1:
    if not holds:
        raise InvariantError(what)
    return 0


cdef int verify_books(Books* books) except -1:
    cdef int32_t* refs = <int32_t*> calloc(books.pool.num_blocks, sizeof(int32_t))
    if refs == NULL:
        raise MemoryError("no memory to check the books")
    try:
        verify_rows(books, refs)
        verify_queue(books)
        verify_host(books)
        verify_steps(books, refs)
        verify_pool(&books.pool, refs)
        verify_tree(&books.tree)
    finally:
        free(refs)
    return 0


cdef int verify_rows(Books* books, int32_t* refs) except -1:
    """Row owners and running sequences; adds their references to `refs`."""
    cdef int32_t row, i
    cdef int32_t running = 0
    cdef int32_t owned = 0
    cdef int32_t parted = 0
    cdef Sequence* seq
    for row in range(books.limits.max_num_seqs):
        seq = books.row_owner[row]
        if seq == NULL:
            continue
        owned += 1
        require(seq.row == row, f"row {row} belongs to a sequence of row {seq.row}")
        require(seq.state in (RUNNING, PREEMPTED, PARTED, ZOMBIE), f"row {row}: state {seq.state}")
        require(seq.state in (RUNNING, PARTED) or seq.in_flight > 0,
                f"row {row} should have been released")
        parted += seq.state == PARTED
        require((seq.state == ZOMBIE) == (seq.finish != 0), f"row {row}: finish {seq.finish}")
        require(seq.num_sent <= seq.num_blocks, f"row {row}: more table entries sent than held")
        require(seq.num_cached <= seq.num_blocks, f"row {row}: more blocks cached than held")
        require(blocks_for(seq.computed) <= seq.num_blocks, f"row {row}: tokens without a block")
        require(seq.computed <= seq.num_tokens + seq.pending, f"row {row}: computed too far")
        require(seq.num_tokens + seq.pending <= seq.request.max_len, f"row {row}: too long")
        for i in range(seq.num_blocks):
            require(0 < seq.blocks[i] < books.pool.num_blocks,
                    f"row {row}: block {seq.blocks[i]} does not exist")
            refs[seq.blocks[i]] += 1
        for i in range(seq.num_cached):
            require(books.pool.cached[seq.blocks[i]],
                    f"row {row}: block {seq.blocks[i]} left the tree")
            require(books.tree.nodes[seq.blocks[i]].parent == (seq.blocks[i - 1] if i else 0),
                    f"row {row}: block {seq.blocks[i]} hangs elsewhere in the tree")
        running += seq.state == RUNNING
    require(running == books.num_running, f"{running} rows run, not {books.num_running}")
    for i in range(books.num_running):
        seq = books.running[i]
        require(seq.state == RUNNING and books.row_owner[seq.row] == seq,
                f"running sequence {i} has no row")
    require(owned + books.num_free_rows == books.limits.max_num_seqs, "rows do not add up")
    for i in range(books.num_free_rows):
        require(books.row_owner[books.free_rows[i]] == NULL,
                f"row {books.free_rows[i]} is free and owned")
    require(parted == books.num_parted, f"{parted} sequences are parted, not {books.num_parted}")
    require(owned + books.num_waiting + books.num_forks == books.num_live,
            "live sequences do not add up")
    return 0


cdef int verify_queue(Books* books) except -1:
    cdef Sequence* seq = books.first
    cdef Sequence* before = NULL
    cdef int32_t count = 0
    cdef int64_t tokens = 0
    while seq != NULL:
        require(seq.prev == before, "the queue's links disagree")
        require(before == NULL or before.arrival < seq.arrival, "the queue is out of order")
        require(seq.state == WAITING, f"a sequence in the queue has state {seq.state}")
        require(seq.row == -1 and seq.num_blocks == 0 and seq.in_flight == 0
                and seq.pending == 0, "a waiting sequence holds something")
        count += 1
        tokens += seq.queued_tokens
        before = seq
        seq = seq.next
    require(before == books.last, "the queue's end is wrong")
    require(count == books.num_waiting, f"{count} sequences wait, not {books.num_waiting}")
    require(tokens == books.waiting_tokens, f"{tokens} tokens wait, not {books.waiting_tokens}")
    return 0


cdef int verify_host(Books* books) except -1:
    """Every host block is empty, about to be, or keeps tokens of one waiting sequence."""
    cdef int32_t count = books.num_free_host + books.num_leaving_host
    cdef int32_t i
    cdef Sequence* seq = books.first
    cdef uint8_t* seen = <uint8_t*> calloc(books.limits.num_host_blocks + 1, 1)
    if seen == NULL:
        raise MemoryError("no memory to check the host blocks")
    try:
        for i in range(books.num_free_host):
            seen[books.free_host[i]] += 1
        for i in range(books.num_leaving_host):
            seen[books.leaving_host[i]] += 1
        while seq != NULL:
            require(seq.host_tokens < max(1, seq.num_tokens), "the host keeps too many tokens")
            require(seq.num_host == blocks_for(seq.host_tokens), "host blocks and tokens differ")
            for i in range(seq.num_host):
                seen[seq.host_blocks[i]] += 1
            count += seq.num_host
            seq = seq.next
        for i in range(books.limits.num_host_blocks):
            require(seen[i] == 1, f"host block {i} has {seen[i]} users")
    finally:
        free(seen)
    require(count == books.limits.num_host_blocks, "host blocks do not add up")
    return 0


cdef int verify_steps(Books* books, int32_t* refs) except -1:
    """Steps in flight against the sequences' counts; adds held references to `refs`."""
    cdef int64_t number
    cdef int32_t i, row
    cdef int64_t in_flight = 0
    cdef int64_t planned = 0
    cdef Step* step
    require(0 <= books.num_planned - books.num_committed <= 2, "too many steps in flight")
    for number in range(books.num_committed, books.num_planned):
        step = &books.steps[number & 1]
        require(step.number == number, f"step {number} is not where it belongs")
        planned += step.num_rows
        for i in range(step.num_held):
            refs[step.held[i]] += 1
        for i in range(step.num_rows):
            require(step.seqs[i].row >= 0, f"step {number} holds a sequence without a row")
    for row in range(books.limits.max_num_seqs):
        if books.row_owner[row] != NULL:
            in_flight += books.row_owner[row].in_flight
    require(in_flight == planned, f"{in_flight} rows are in flight, not {planned}")
    return 0


cdef int verify_pool(Pool* pool, const int32_t* refs) except -1:
    """Reference counts, the stack of empty blocks and the list of idle ones."""
    cdef int32_t block
    cdef int32_t before = 0
    cdef int32_t used = 0
    cdef int32_t empty = 0
    cdef int32_t idle = 0
    for block in range(1, pool.num_blocks):
        require(pool.refs[block] == refs[block],
                f"block {block} has {refs[block]} users, not {pool.refs[block]}")
        used += refs[block] > 0
    block = pool.empty
    while block and empty <= pool.num_empty:
        require(refs[block] == 0 and not pool.cached[block], f"block {block} is not empty")
        empty += 1
        block = pool.next[block]
    block = pool.oldest
    while block and idle <= pool.num_idle:
        require(refs[block] == 0 and pool.cached[block], f"block {block} is not idle")
        require(pool.prev[block] == before, f"the idle list breaks at block {block}")
        idle += 1
        before = block
        block = pool.next[block]
    require(pool.newest == before, "the idle list's end is wrong")
    require(empty == pool.num_empty, f"{empty} blocks are empty, not {pool.num_empty}")
    require(idle == pool.num_idle, f"{idle} blocks are idle, not {pool.num_idle}")
    require(used + empty + idle == pool.num_blocks - 1, "blocks do not add up")
    return 0


cdef int verify_tree(Tree* tree) except -1:
    """Links and order of every treap; that idle nodes stand before their idle ancestors."""
    cdef Pool* pool = tree.pool
    cdef Node* nodes = tree.nodes
    cdef uint8_t* passed = <uint8_t*> calloc(pool.num_blocks, 1)
    cdef int32_t block, child
    cdef int32_t count = 0
    if passed == NULL:
        raise MemoryError("no memory to check the tree")
    try:
        for block in range(1, pool.num_blocks):
            if not pool.cached[block]:
                continue
            count += 1
            require(nodes[block].parent == 0 or pool.cached[nodes[block].parent],
                    f"node {block} has lost its parent")
            for child in (nodes[block].left, nodes[block].right):
                require(child == 0 or (nodes[child].up == block
                                       and nodes[child].parent == nodes[block].parent),
                        f"node {child} is not where node {block} has it")
            if nodes[block].left:
                require(ordered(tree, nodes[block].left, block), f"node {block} is out of order")
            if nodes[block].right:
                require(ordered(tree, block, nodes[block].right), f"node {block} is out of order")
            if nodes[block].up == 0:
                require(nodes[nodes[block].parent].children == block,
                        f"node {block} cannot be reached")
        block = pool.oldest
        while block:
            require(not passed[nodes[block].parent] or nodes[block].parent == 0,
                    f"node {block} would be evicted after its parent")
            passed[block] = 1
            block = pool.next[block]
    finally:
        free(passed)
    require(count == tree.num_nodes, f"{count} blocks are cached, not {tree.num_nodes}")
    return 0


cdef bint ordered(const Tree* tree, int32_t a, int32_t b) noexcept:
    """Whether node a stands before node b among their siblings."""
    cdef int32_t i
    cdef const int32_t* left = tree.tokens + <int64_t> a * BLOCK_SIZE
    cdef const int32_t* right = tree.tokens + <int64_t> b * BLOCK_SIZE
    if tree.nodes[a].parent == 0:
        if tree.nodes[a].salt.low != tree.nodes[b].salt.low:
            return tree.nodes[a].salt.low < tree.nodes[b].salt.low
        if tree.nodes[a].salt.high != tree.nodes[b].salt.high:
            return tree.nodes[a].salt.high < tree.nodes[b].salt.high
    for i in range(BLOCK_SIZE):
        if left[i] != right[i]:
            return left[i] < right[i]
    return False
