# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Checks a new request, allocates it and its sequences, and queues the first of them."""

from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, malloc, realloc
from libc.string cimport memcpy, memset

from hashlib import blake2b

from zllm.errors import InvalidRequest
from zllm.native.arena cimport MAX_END_IDS, S_MIN_P, S_RANDOM, S_TOP_K, S_TOP_P
from zllm.native.block_pool cimport BLOCK_SIZE
from zllm.native.books cimport Tenant, queue_push
from zllm.native.radix_tree cimport Match, tree_match
from zllm.native.sequence cimport (
    CONTEXT_LIMIT,
    FORK,
    LENGTH,
    Sequence,
    blocks_for,
    request_free,
    sequence_free,
    sequence_new,
)

MAX_SEQUENCES = 1 << 16
MANY_TENANTS = 1024


cdef int require_valid(const Books* books, int64_t prompt_len, int64_t max_tokens,
                       int64_t min_tokens, int64_t num_end_ids,
                       int64_t num_sequences) except -1:
    """Raise InvalidRequest for what can never run."""
    cdef int64_t usable = books.pool.num_blocks - 1
    if prompt_len < 1:
        raise InvalidRequest("prompt", "is empty; give at least one token")
    if prompt_len >= books.limits.max_model_len:
        raise InvalidRequest(
            "prompt",
            f"has {prompt_len} tokens, but prompt and answer together may have "
            f"{books.limits.max_model_len} at most; shorten it",
        )
    if blocks_for(<int32_t> prompt_len) > usable:
        raise InvalidRequest(
            "prompt",
            f"has {prompt_len} tokens, but the KV cache holds {usable * 16}; "
            "shorten it or enlarge the cache",
        )
    if max_tokens < 1:
        raise InvalidRequest("stopping.max_tokens", f"is {max_tokens}; it must be at least 1")
    if min_tokens < 0:
        raise InvalidRequest("stopping.min_tokens", f"is {min_tokens}; it must be at least 0")
    if min_tokens > 0 and num_end_ids > MAX_END_IDS:
        raise InvalidRequest(
            "stopping.stop_token_ids",
            f"with min_tokens at most {MAX_END_IDS} end ids (EOS and stop_token_ids) are "
            f"possible, not {num_end_ids}; give fewer",
        )
    if not 1 <= num_sequences <= MAX_SEQUENCES:
        raise InvalidRequest(
            "sampling.num_sequences",
            f"is {num_sequences}; it must be from 1 to {MAX_SEQUENCES}",
        )
    return 0


cdef Request* new_request(Books* books, const int32_t[::1] prompt, int64_t max_tokens,
                          int64_t min_tokens, const int32_t[::1] end_ids,
                          int32_t num_sequences) except NULL:
    """A valid request with its sequences, not in the books yet; all else in it is zero."""
    cdef Request* request = <Request*> calloc(1, sizeof(Request))
    cdef int64_t room = books.limits.max_model_len - prompt.shape[0]
    cdef bint complete
    if request == NULL:
        raise MemoryError("no memory for one more request")
    request.prompt_len = <int32_t> prompt.shape[0]
    request.max_len = request.prompt_len + <int32_t> min(max_tokens, room)
    request.length_finish = LENGTH if max_tokens <= room else CONTEXT_LIMIT
    request.min_len = request.prompt_len + <int32_t> min(min_tokens, room)
    request.cached_tokens = -1
    request.num_end_ids = <int32_t> end_ids.shape[0]
    request.end_ids = <int32_t*> malloc((request.num_end_ids + 1) * sizeof(int32_t))
    complete = request.end_ids != NULL and add_members(request, num_sequences, &prompt[0])
    if not complete:
        drop_request(request)
        raise MemoryError(f"no memory for {num_sequences} sequences of {request.max_len} tokens")
    if request.num_end_ids:
        memcpy(request.end_ids, &end_ids[0], request.num_end_ids * sizeof(int32_t))
    return request


cdef bint add_members(Request* request, int32_t count, const int32_t* prompt) noexcept nogil:
    """The request's sequences: the first computes the prompt, the others fork from it."""
    cdef Sequence* seq
    cdef int32_t i
    for i in range(count):
        seq = sequence_new(request)
        if seq == NULL:
            return False
        memcpy(seq.tokens, prompt, request.prompt_len * sizeof(int32_t))
        seq.num_tokens = request.prompt_len
        if i:
            seq.state = FORK
            seq.source = 0
    return True


cdef void drop_request(Request* request) noexcept nogil:
    cdef int32_t i
    for i in range(request.num_indices):
        sequence_free(request.members[i])
    request_free(request)


cdef int32_t uncached_tokens(const Books* books, const Request* request) noexcept nogil:
    """Tokens of a new request's prompt that the cache does not hold now. The last one is computed
    in any case."""
    cdef Sequence* seq = request.members[0]
    cdef Match match
    if not books.caching or request.bypass_cache:
        return seq.num_tokens
    # What it writes to the sequence's block table is not counted there: num_blocks stays 0.
    match = tree_match(&books.tree, request.salt, seq.tokens, seq.num_tokens - 1, seq.blocks)
    return seq.num_tokens - match.num_blocks * BLOCK_SIZE - match.partial_tokens


cdef void insert_request(Books* books, Request* request, int32_t uncached) noexcept nogil:
    """Put a complete request into the books."""
    cdef int32_t i
    request.first_arrival = books.num_arrivals << 20
    for i in range(request.num_indices):
        request.members[i].arrival = request.first_arrival + i
        request.members[i].born = books.counters.admissions
    books.num_arrivals += 1
    books.num_live += request.num_indices
    books.num_forks += request.num_indices - 1
    books.tenants[request.tenant].num_live += request.num_indices
    queue_push(books, request.members[0], uncached)


cdef int32_t tenant_index(Books* books, dict tenants, str name) except -1:
    """The tenant's index; where there are many, a new one takes the place of one that is idle."""
    cdef int32_t index
    cdef void* grown
    if name in tenants:
        return tenants[name]
    if len(tenants) >= MANY_TENANTS:
        for other, index in tenants.items():
            if books.tenants[index].num_live == 0:
                del tenants[other]
                tenants[name] = index
                memset(&books.tenants[index], 0, sizeof(Tenant))
                return index
    index = books.num_tenants
    grown = realloc(books.tenants, (index + 1) * sizeof(Tenant))
    if grown == NULL:
        raise MemoryError("no memory for one more tenant")
    books.tenants = <Tenant*> grown
    memset(&books.tenants[index], 0, sizeof(Tenant))
    books.num_tenants += 1
    tenants[name] = index
    return index


cdef Salt salt_of(str text):
    """128 bits that stand for a salt; the empty one is zero."""
    cdef Salt salt
    cdef const uint8_t[::1] digest
    memset(&salt, 0, sizeof(Salt))
    if text:
        digest = blake2b(text.encode(), digest_size=16).digest()
        memcpy(&salt, &digest[0], sizeof(Salt))
    return salt


cdef int32_t features_of(const Request* request) noexcept nogil:
    """S_ bits that a request always needs; greedy ones ignore all filters."""
    cdef int32_t features = 0
    if request.temperature > 0:
        features |= S_RANDOM
        if request.top_k > 0:
            features |= S_TOP_K
        if request.top_p < 1:
            features |= S_TOP_P
        if request.min_p > 0:
            features |= S_MIN_P
    return features
