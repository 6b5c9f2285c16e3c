# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Puts rows into a step. Blocks are taken here, and nowhere later."""

from zllm.native.arena cimport F_SAMPLE, F_TOKEN_ON_DEVICE
from zllm.native.block_pool cimport BLOCK_SIZE
from zllm.native.books cimport step_of
from zllm.native.radix_tree cimport tree_take
from zllm.native.sequence cimport blocks_for


cdef Step* open_step(Books* books) noexcept nogil:
    """The next step, empty."""
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
    return step


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


cdef void add_row(Books* books, Step* step, Sequence* seq, int32_t q_len) noexcept nogil:
    """Put a sequence, whose blocks are there, into the step."""
    cdef int32_t row = step.num_rows
    cdef int32_t flags = 0
    step.seqs[row] = seq
    step.kv_len[row] = seq.computed
    step.q_len[row] = q_len
    if seq.computed >= seq.num_tokens:
        flags = F_TOKEN_ON_DEVICE
    seq.previous = seq.computed
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


cdef bint schedule_chunk(Books* books, Step* step, Sequence* seq, int32_t budget) noexcept nogil:
    """As much of a sequence's known tokens as budget and blocks allow; False: no block."""
    cdef int32_t length = min(seq.num_tokens, seq.computed + budget)
    if not has_room(books, step, seq, blocks_for(length)):
        return True
    if not extend_table(books, seq, blocks_for(length)):
        length = seq.num_blocks * BLOCK_SIZE
    if length <= seq.computed:
        return False
    add_row(books, step, seq, length - seq.computed)
    return True


cdef void copy_block(Books* books, Step* step, int32_t source, int32_t target) noexcept nogil:
    """Copy a referenced block before the step; the reference goes when the step has retired."""
    step.copies[2 * step.num_copies] = source
    step.copies[2 * step.num_copies + 1] = target
    step.num_copies += 1
    step.held[step.num_held] = source
    step.num_held += 1
