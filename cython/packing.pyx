# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Fills the arena, whose layout is in arena.pxd, in one pass over the step's rows."""

from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from zllm.native.arena cimport *
from zllm.native.sequence cimport Request, Sequence


cdef int64_t arena_words(const Limits* limits) noexcept nogil:
    """Words that the largest step needs."""
    return (HEADER_WORDS + 4 * <int64_t> limits.max_num_seqs + 1 + limits.max_num_batched_tokens
            + 3 * <int64_t> limits.max_updates
            + PARAM_WORDS * <int64_t> limits.max_num_seqs
            + 2 * <int64_t> limits.max_copies + 4 * <int64_t> limits.max_swaps)


cdef inline int32_t float_bits(float value) noexcept nogil:
    cdef int32_t bits
    memcpy(&bits, &value, sizeof(bits))
    return bits


cdef void pack_params(const Sequence* seq, int32_t* out) noexcept nogil:
    cdef const Request* request = seq.request
    cdef int32_t num_end_ids = min(request.num_end_ids, MAX_END_IDS)
    memset(out, 0, PARAM_WORDS * sizeof(int32_t))
    out[P_ROW] = seq.row
    out[P_TEMPERATURE] = float_bits(request.temperature)
    out[P_TOP_P] = float_bits(request.top_p)
    out[P_MIN_P] = float_bits(request.min_p)
    out[P_TOP_K] = request.top_k
    # Sequences of one request draw from seeds that differ in the index.
    out[P_SEED_LOW] = <int32_t> <uint32_t> request.seed
    out[P_SEED_HIGH] = (<int32_t> (request.seed >> 32)) ^ seq.index
    out[P_REPETITION] = float_bits(1.0)
    out[P_MIN_LEN] = request.min_len
    out[P_PROMPT_LEN] = request.prompt_len
    out[P_NUM_LOGPROBS] = request.num_logprobs
    out[P_NUM_END_IDS] = num_end_ids
    memcpy(out + P_END_IDS, request.end_ids, num_end_ids * sizeof(int32_t))


cdef Packed pack_step(Books* books, Step* step, int32_t* arena) noexcept nogil:
    """Write all sections and the header; the device knows then what the step's rows need."""
    cdef int32_t num_rows = step.num_rows
    cdef int32_t* rows = arena + HEADER_WORDS
    cdef int32_t* q_start = rows + num_rows
    cdef int32_t* kv_len = q_start + num_rows + 1
    cdef int32_t* flags = kv_len + num_rows
    cdef int32_t* tokens = flags + num_rows
    cdef int32_t* updates = tokens + step.num_tokens
    cdef int32_t* params = updates + 3 * step.num_updates
    cdef int32_t* copies = params + PARAM_WORDS * step.num_params
    cdef int32_t* swap_out = copies + 2 * step.num_copies
    cdef int32_t* swap_in = swap_out + 2 * books.num_swap_out
    cdef int32_t* end = swap_in + 2 * books.num_swap_in
    cdef Packed packed
    cdef Sequence* seq
    cdef int32_t r, q_len, start, i
    cdef int32_t position = 0
    packed.max_logprobs = -1
    packed.features = 0
    packed.num_words = <int32_t> (end - arena)
    memset(arena, 0, HEADER_WORDS * sizeof(int32_t))
    arena[H_STEP] = <int32_t> (step.number & 0x7FFFFFFF)
    arena[H_NUM_ROWS] = num_rows
    arena[H_NUM_TOKENS] = step.num_tokens
    arena[H_NUM_DECODES] = step.num_decodes
    arena[H_NUM_TABLE_UPDATES] = step.num_updates
    arena[H_NUM_PARAM_UPDATES] = step.num_params
    arena[H_NUM_COPIES] = step.num_copies
    arena[H_NUM_SWAP_OUT] = books.num_swap_out
    arena[H_NUM_SWAP_IN] = books.num_swap_in
    arena[H_ROWS] = <int32_t> (rows - arena)
    arena[H_Q_START] = <int32_t> (q_start - arena)
    arena[H_KV_LEN] = <int32_t> (kv_len - arena)
    arena[H_FLAGS] = <int32_t> (flags - arena)
    arena[H_TOKENS] = <int32_t> (tokens - arena)
    arena[H_TABLE_UPDATES] = <int32_t> (updates - arena)
    arena[H_PARAM_UPDATES] = <int32_t> (params - arena)
    arena[H_COPIES] = <int32_t> (copies - arena)
    arena[H_SWAP_OUT] = <int32_t> (swap_out - arena)
    arena[H_SWAP_IN] = <int32_t> (swap_in - arena)
    arena[H_NUM_WORDS] = packed.num_words
    arena[H_NUM_SAMPLED] = step.num_sampled
    for r in range(num_rows):
        seq = step.seqs[r]
        start = step.kv_len[r]
        q_len = step.q_len[r]
        rows[r] = seq.row
        q_start[r] = position
        kv_len[r] = start
        flags[r] = step.flags[r]
        if step.flags[r] & F_TOKEN_ON_DEVICE:
            tokens[position] = 0
        elif q_len == 1:
            tokens[position] = seq.tokens[start]
        else:
            memcpy(tokens + position, seq.tokens + start, q_len * sizeof(int32_t))
        position += q_len
        for i in range(seq.num_sent, seq.num_blocks):
            updates[0] = seq.row
            updates[1] = i
            updates[2] = seq.blocks[i]
            updates += 3
        seq.num_sent = seq.num_blocks
        if seq.needs_params:
            pack_params(seq, params)
            params += PARAM_WORDS
            seq.needs_params = 0
        if step.flags[r] & F_SAMPLE:
            packed.max_logprobs = max(packed.max_logprobs, seq.request.num_logprobs)
            packed.features |= seq.request.features
            if start + q_len < seq.request.min_len:
                packed.features |= S_MIN_TOKENS
    q_start[num_rows] = position
    memcpy(copies, step.copies, 2 * step.num_copies * sizeof(int32_t))
    memcpy(swap_out, books.swap_out, 2 * books.num_swap_out * sizeof(int32_t))
    memcpy(swap_in, books.swap_in, 2 * books.num_swap_in * sizeof(int32_t))
    books.num_swap_out = 0
    books.num_swap_in = 0
    arena[H_MAX_LOGPROBS] = packed.max_logprobs
    arena[H_FEATURES] = packed.features
    return packed
