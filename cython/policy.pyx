# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The order of admission.

    fcfs      first come, first served
    priority  the highest priority first
    sjf       the shortest job first: the fewest tokens to compute before its next token, as known
              when it was queued
    lpm       the longest cached prefix first
    fair      deficit longest prefix match (Cao et al. 2025, "Locality-aware Fair Scheduling in LLM
              Serving"): as lpm, among the tenants that were not served more than their share

Ties go to the earlier arrival. No policy starves a request: after `patience` admissions the oldest
one in the queue goes first whatever the policy says, so a request with n older ones before it is
admitted after at most patience + n others.
"""

from libc.stdint cimport int32_t

from zllm.native.radix_tree cimport Match, tree_match


cdef Sequence* next_waiting(Books* books) noexcept nogil:
    """The sequence to admit next; NULL when none waits."""
    cdef Sequence* seq = books.first
    cdef Sequence* best = seq
    if (seq == NULL or books.limits.policy == FCFS
            or books.counters.admissions - seq.born >= books.limits.patience):
        return seq
    if books.limits.policy == LPM:
        return longest_match(books)
    if books.limits.policy == FAIR:
        refill_deficits(books)
        return longest_match(books)
    while seq != NULL:
        if books.limits.policy == PRIORITY:
            if seq.request.priority > best.request.priority:
                best = seq
        elif seq.queued_tokens < best.queued_tokens:
            best = seq
        seq = seq.next
    return best


cdef void refill_deficits(Books* books) noexcept nogil:
    """Unless a waiting tenant has something left, give all of them a quantum, as often as it
    takes. Who was idle has at most one quantum."""
    cdef Sequence* seq = books.first
    cdef int64_t highest = books.tenants[seq.request.tenant].deficit
    cdef int64_t refill
    cdef int32_t i
    while seq != NULL:
        highest = max(highest, books.tenants[seq.request.tenant].deficit)
        seq = seq.next
    if highest > 0:
        return
    refill = (-highest // QUANTUM + 1) * QUANTUM
    for i in range(books.num_tenants):
        books.tenants[i].deficit = min(QUANTUM, books.tenants[i].deficit + refill)


cdef int32_t cached_len(Books* books, Sequence* seq) noexcept nogil:
    """How many of its tokens are cached, looked up once a step."""
    cdef Match match
    if seq.matched != books.num_planned:
        seq.matched = books.num_planned
        seq.match_len = seq.host_tokens
        if books.caching and not seq.request.bypass_cache:
            match = tree_match(&books.tree, seq.request.salt, seq.tokens, seq.num_tokens - 1,
                               seq.blocks)
            seq.match_len = max(seq.match_len, match.num_blocks * 16 + match.partial_tokens)
    return seq.match_len


cdef Sequence* longest_match(Books* books) noexcept nogil:
    """Of the oldest sequences that may be served, the one with most tokens cached."""
    cdef Sequence* seq = books.first
    cdef Sequence* best = NULL
    cdef int32_t longest = -1
    cdef int32_t seen = 0
    while seq != NULL and seen < MATCH_WINDOW:
        if books.limits.policy == LPM or books.tenants[seq.request.tenant].deficit > 0:
            seen += 1
            if cached_len(books, seq) > longest:
                best = seq
                longest = seq.match_len
        seq = seq.next
    return best
