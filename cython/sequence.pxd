"""Requests and their sequences, as the scheduler keeps them."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from zllm.native.radix_tree cimport Salt

cdef enum State:
    FORK          # shares another sequence's tokens; queued once those are computed
    WAITING       # in the queue, without row and blocks
    RUNNING       # has a row
    PREEMPTED     # leaves its row once its steps in flight have retired
    PARTED        # these have: the next plan swaps it out or not, and queues it
    ZOMBIE        # ended; leaves its row once its steps in flight have retired, then is freed

cdef enum Finish:  # the numbers of runtime/messages.py
    NONE = 0
    EOS = 1
    STOP = 2
    LENGTH = 3
    CONTEXT_LIMIT = 4
    TIME_LIMIT = 5
    ABORTED = 6
    QUEUE_TIMEOUT = 100
    ERROR = 101

cdef struct Sequence

cdef struct Request:
    int64_t id
    int64_t first_arrival       # of its first sequence; the others follow by index
    Sequence** members          # by index; NULL once freed
    int32_t num_indices
    int32_t num_members         # sequences that are not freed yet
    int32_t num_unfinished
    int32_t prompt_len
    int32_t max_len             # length at which a sequence ends: by max_tokens or the context
    int32_t min_len             # no end token before this length
    uint8_t length_finish       # what ending at max_len is called
    uint8_t bypass_cache
    uint8_t started             # its first token is out
    int32_t cached_tokens       # found in the cache at its first admission; -1 before that
    int32_t features            # S_ bits
    int32_t num_logprobs
    int32_t priority            # higher goes first
    int32_t tenant
    int32_t num_eos             # the first num_eos of end_ids are EOS, the rest stop ids
    int32_t num_end_ids
    int32_t* end_ids
    Salt salt
    uint64_t seed
    float temperature
    float top_p
    float min_p
    int32_t top_k
    double arrived
    double admitted
    double queue_deadline
    double deadline

cdef struct Sequence:
    Request* request
    Sequence* prev              # neighbours in the queue
    Sequence* next
    int64_t arrival             # total order of sequences
    int64_t planned             # the last step that holds it
    int64_t admitted            # the step that gave it its row
    int64_t born                # Counters.admissions when it arrived
    double token_at             # when its last token was committed; 0: it has sampled none
    int32_t queued_tokens       # what it counts for in Books.waiting_tokens
    int64_t matched             # the step for which match_len was looked up
    int32_t match_len           # cached tokens, for policies that ask
    int32_t index               # within its request
    int32_t source              # a fork: whose blocks it may share, by index; -1: no fork
    uint8_t state
    uint8_t finish
    uint8_t needs_params        # the device does not know its row's parameters yet
    int32_t in_flight           # planned steps that are not committed
    int32_t row                 # -1: none
    int32_t num_tokens          # known tokens
    int32_t pending             # tokens that steps in flight sample
    int32_t computed            # tokens in the KV cache once all planned steps have run
    int32_t previous            # the same before the last of them
    int32_t num_blocks
    int32_t num_sent            # entries of the block table that the device has
    int32_t num_cached          # leading blocks of the table that are nodes of the tree
    int32_t* blocks
    int32_t* tokens             # room for max_len
    int32_t num_host            # host blocks that keep its first host_tokens tokens
    int32_t host_tokens
    int32_t* host_blocks

cdef Sequence* sequence_new(Request* request) noexcept nogil
cdef void sequence_free(Sequence* seq) noexcept nogil
cdef void request_free(Request* request) noexcept nogil


cdef inline int32_t blocks_for(int32_t num_tokens) noexcept nogil:
    return (num_tokens + 15) >> 4


cdef inline double waiting_deadline(const Sequence* seq) noexcept nogil:
    """When a waiting sequence ends; one that was admitted before has no queue timeout."""
    if seq.request.cached_tokens < 0 and seq.request.queue_deadline < seq.request.deadline:
        return seq.request.queue_deadline
    return seq.request.deadline


cdef inline int end_of(const Request* request, int32_t length, int32_t token) noexcept nogil:
    """Why a sequence ends with this token at this length, the token included; 0: it goes on."""
    cdef int32_t i
    if length > request.min_len:
        for i in range(request.num_end_ids):
            if request.end_ids[i] == token:
                return EOS if i < request.num_eos else STOP
    return request.length_finish if length >= request.max_len else NONE
