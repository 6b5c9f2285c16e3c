"""The rows of the step being planned."""

from libc.stdint cimport int32_t

from zllm.native.books cimport Books, Step
from zllm.native.sequence cimport Sequence

cdef Step* open_step(Books* books) noexcept nogil
cdef bint extend_table(Books* books, Sequence* seq, int32_t num_blocks) noexcept nogil
cdef void add_row(Books* books, Step* step, Sequence* seq, int32_t q_len) noexcept nogil
cdef bint schedule_chunk(Books* books, Step* step, Sequence* seq, int32_t budget) noexcept nogil
cdef void copy_block(Books* books, Step* step, int32_t source, int32_t target) noexcept nogil


cdef inline int32_t planned_len(const Sequence* seq) noexcept nogil:
    """The sequence's length once all planned steps have run."""
    return seq.num_tokens + seq.pending


cdef inline bint is_decode(const Sequence* seq) noexcept nogil:
    """Whether one token remains to be computed, and its successor is wanted."""
    return (planned_len(seq) - seq.computed == 1
            and planned_len(seq) < seq.request.max_len)


cdef inline bint is_prefill(const Sequence* seq) noexcept nogil:
    """Whether several known tokens remain to be computed."""
    return seq.num_tokens - seq.computed > 1


cdef inline bint has_room(const Books* books, const Step* step, const Sequence* seq,
                          int32_t num_blocks) noexcept nogil:
    """Whether the arena can carry the row's table updates."""
    return step.num_updates + num_blocks - seq.num_sent <= books.limits.max_updates
