# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Allocation of sequences. Buffers have their final size from the start, so that no step allocates;
pages that are never written cost nothing."""

from libc.stdlib cimport calloc, free, malloc


cdef Sequence* sequence_new(Request* request, int32_t index) noexcept nogil:
    """A waiting sequence without tokens; NULL when memory ran out."""
    cdef Sequence* seq = <Sequence*> calloc(1, sizeof(Sequence))
    if seq == NULL:
        return NULL
    seq.request = request
    seq.index = index
    seq.state = WAITING
    seq.row = -1
    seq.planned = -1
    seq.blocked = -1
    seq.tokens = <int32_t*> malloc(<size_t> request.max_len * sizeof(int32_t))
    seq.blocks = <int32_t*> malloc(<size_t> blocks_for(request.max_len) * sizeof(int32_t))
    if seq.tokens == NULL or seq.blocks == NULL:
        sequence_free(seq)
        return NULL
    request.num_members += 1
    request.num_unfinished += 1
    return seq


cdef void sequence_free(Sequence* seq) noexcept nogil:
    if seq != NULL:
        free(seq.tokens)
        free(seq.blocks)
        free(seq)


cdef void request_free(Request* request) noexcept nogil:
    if request != NULL:
        free(request.end_ids)
        free(request)
