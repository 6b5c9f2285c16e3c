# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Allocation of sequences. Buffers have their final size from the start, so that no step allocates;
pages that are never written cost nothing."""

from libc.stdlib cimport calloc, free, malloc, realloc


cdef Sequence* sequence_new(Request* request) noexcept nogil:
    """One more member of the request, without tokens; NULL when memory ran out."""
    cdef Sequence* seq
    cdef size_t num_blocks = blocks_for(request.max_len)
    cdef void* members = realloc(request.members,
                                 (request.num_indices + 1) * sizeof(Sequence*))
    if members == NULL:
        return NULL
    request.members = <Sequence**> members
    seq = <Sequence*> calloc(1, sizeof(Sequence))
    if seq == NULL:
        return NULL
    seq.request = request
    seq.index = request.num_indices
    seq.source = -1
    seq.row = -1
    seq.planned = -1
    seq.matched = -1
    seq.tokens = <int32_t*> malloc(<size_t> request.max_len * sizeof(int32_t))
    seq.blocks = <int32_t*> malloc(num_blocks * sizeof(int32_t))
    seq.host_blocks = <int32_t*> malloc(num_blocks * sizeof(int32_t))
    if not (seq.tokens and seq.blocks and seq.host_blocks):
        sequence_free(seq)
        return NULL
    request.members[seq.index] = seq
    request.num_indices += 1
    request.num_members += 1
    request.num_unfinished += 1
    return seq


cdef void sequence_free(Sequence* seq) noexcept nogil:
    if seq != NULL:
        free(seq.tokens)
        free(seq.blocks)
        free(seq.host_blocks)
        free(seq)


cdef void request_free(Request* request) noexcept nogil:
    if request != NULL:
        free(request.members)
        free(request.end_ids)
        free(request)
