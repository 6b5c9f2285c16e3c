"""The scheduler's whole state, and the moves that keep its books balanced."""

from libc.stdint cimport int32_t, int64_t, uint8_t

from zllm.native.block_pool cimport Pool
from zllm.native.intervals cimport Intervals
from zllm.native.radix_tree cimport Tree
from zllm.native.sequence cimport Request, Sequence

cdef struct Step:
    int64_t number
    int32_t num_rows
    int32_t num_tokens
    int32_t num_decodes
    int32_t num_sampled
    int32_t num_updates         # entries of block tables to send
    int32_t num_params
    int32_t num_copies
    int32_t num_held
    Sequence** seqs             # by row of the step
    int32_t* kv_len
    int32_t* q_len
    uint8_t* flags
    int32_t* copies             # (source, target) pairs
    int32_t* held               # blocks that lose a reference when the step has retired

cdef struct Ended:
    int64_t request_id
    int32_t index
    uint8_t finish

cdef struct Limits:
    int32_t max_num_seqs
    int32_t max_num_batched_tokens
    int32_t max_model_len
    int32_t max_updates         # entries of block tables a step can carry
    int32_t max_copies
    int32_t max_held
    int32_t max_swaps           # blocks a step can carry in each direction
    int32_t num_host_blocks
    double swap_cost            # tokens computed in the time a block goes to the host and back
    int64_t patience            # admissions that may pass over a request
    int policy

cdef struct Counters:
    int64_t hit_tokens
    int64_t query_tokens
    int64_t preemptions
    int64_t preempted_tokens
    int64_t generated_tokens
    int64_t folded_blocks
    int64_t swaps_out           # sequences
    int64_t swaps_in
    int64_t swapped_blocks      # in both directions
    int64_t forks
    int64_t admissions

cdef struct Tenant:
    int64_t deficit             # tokens it may still be served before others come first
    int64_t num_live            # sequences that are not freed

cdef struct Books:
    Limits limits
    Pool pool
    Tree tree
    Counters counters
    Intervals intervals         # between tokens of a sequence
    bint caching
    Sequence** row_owner        # by device row
    int32_t* free_rows          # stack
    int32_t num_free_rows
    Sequence** running          # in order of admission
    int32_t num_running
    Sequence* first             # the queue, in order of arrival
    Sequence* last
    int32_t num_waiting
    int64_t waiting_tokens
    int64_t num_arrivals
    Ended* ended                # finishes that no commit has reported yet
    int32_t num_ended
    int64_t* finished           # ids of requests whose last sequence ended
    int32_t num_finished
    int32_t num_live            # sequences that are not freed
    int32_t num_forks           # of these in state FORK
    int32_t num_parted          # of these in state PARTED
    Tenant* tenants
    int32_t num_tenants
    int32_t* free_host          # stack of empty host blocks
    int32_t num_free_host
    int32_t* leaving_host       # host blocks that the next step's copies may still touch
    int32_t num_leaving_host
    int32_t* swap_out           # pairs for the next step
    int32_t num_swap_out
    int32_t* swap_in
    int32_t num_swap_in
    int32_t capacity            # of ended and finished; at least num_live + num_ended
    int64_t stalled             # Pool.num_returned when admission failed; -1: it may succeed
    double earliest             # no deadline of the queue is before this
    int64_t num_planned
    int64_t num_committed
    Step[2] steps               # by step number modulo 2

cdef int books_init(Books* books, Limits limits, int32_t num_blocks, bint caching) noexcept nogil
cdef void books_free(Books* books) noexcept nogil
cdef int books_reserve(Books* books, int32_t capacity) noexcept nogil
cdef void queue_push(Books* books, Sequence* seq, int32_t tokens) noexcept nogil
cdef void queue_remove(Books* books, Sequence* seq) noexcept nogil
cdef void stop_running(Books* books, Sequence* seq) noexcept nogil
cdef void queue_forks(Books* books, Request* request) noexcept nogil
cdef void release_row(Books* books, Sequence* seq) noexcept nogil
cdef void release_host(Books* books, Sequence* seq) noexcept nogil
cdef void leave_if_retired(Books* books, Sequence* seq) noexcept nogil
cdef void finish_sequence(Books* books, Sequence* seq, int reason) noexcept nogil
cdef void end_sequence(Books* books, Sequence* seq, int reason) noexcept nogil


cdef inline Step* step_of(Books* books, int64_t number) noexcept nogil:
    return &books.steps[number & 1]
