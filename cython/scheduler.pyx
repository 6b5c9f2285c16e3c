# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The scheduler's face: Python objects come in and go out here, and nowhere below; those of a
step are in step_objects.pyx.

Each call does its work in one nogil pass over the books (books.pxd). The order of a step is
plan, launch, commit; plan(n) may come before commit(n - 1).
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

import numpy as np

from zllm.errors import ConfigError, InvalidRequest, Overloaded, RequestExists
from zllm.native.block_pool cimport pool_available
from zllm.native.books cimport (
    Books,
    Limits,
    Step,
    books_free,
    books_init,
    books_reserve,
    end_sequence,
    queue_push,
    step_of,
)
from zllm.native.checks cimport verify_books
from zllm.native.intake cimport (
    drop_request,
    features_of,
    insert_request,
    new_request,
    require_valid,
    salt_of,
    tenant_index,
    uncached_tokens,
)
from zllm.native.intervals cimport BOUNDS, NUM_BOUNDS, Intervals
from zllm.native.packing cimport Packed, arena_words, pack_step
from zllm.native.planner cimport expire_waiting, plan_step
from zllm.native.radix_tree cimport Salt, tree_flush
from zllm.native.retire cimport EventList, Started, drain_ended, retire_step
from zllm.native.sequence cimport (
    ABORTED,
    Request,
    Sequence,
    blocks_for,
    sequence_new,
)
from zllm.native.step_objects cimport Plan, new_events, new_plan

POLICIES = ("fcfs", "priority", "sjf", "lpm", "fair")  # in the order of policy.pxd


cdef int grow(void** buffer, size_t size) noexcept nogil:
    """Enlarge a buffer; -1 when memory ran out, and then it is as it was."""
    cdef void* grown = realloc(buffer[0], size)
    if grown == NULL:
        return -1
    buffer[0] = grown
    return 0


cdef class Scheduler:
    cdef Books books
    cdef EventList found
    cdef Started* started
    cdef Py_ssize_t found_capacity
    cdef dict ids                   # request id -> address of its Request
    cdef dict tenants               # name -> index into the books' tenants
    cdef int64_t max_queued_requests
    cdef int64_t max_queued_tokens
    cdef readonly int64_t arena_words

    def __cinit__(
        self,
        *,
        int32_t num_blocks,
        int32_t max_num_seqs,
        int32_t max_num_batched_tokens,
        int32_t max_model_len,
        int32_t num_host_blocks=0,
        bint enable_prefix_caching=True,
        str policy="fcfs",
        int64_t max_queued_requests=4096,
        int64_t max_queued_tokens=16777216,
        int64_t patience=1024,
        double swap_cost=0.0,
    ):
        cdef Limits limits
        cdef int32_t max_blocks = blocks_for(max_model_len)
        self.ids = {}
        self.tenants = {}
        if num_blocks < 2:
            raise ConfigError(f"num_blocks is {num_blocks}: block 0 is reserved, give at least 2")
        if max_num_seqs < 1 or max_num_batched_tokens < 1 or max_model_len < 1:
            raise ConfigError(
                f"max_num_seqs ({max_num_seqs}), max_num_batched_tokens "
                f"({max_num_batched_tokens}) and max_model_len ({max_model_len}) "
                "must be at least 1"
            )
        if policy not in POLICIES:
            raise ConfigError(f"policy is {policy!r}: choose one of {', '.join(POLICIES)}")
        # Every running sequence may decode in every step.
        limits.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        limits.max_num_batched_tokens = max_num_batched_tokens
        limits.max_model_len = max_model_len
        limits.max_updates = (4 * max_blocks + 32 * limits.max_num_seqs
                              + blocks_for(max_num_batched_tokens))
        limits.max_copies = limits.max_num_seqs
        limits.max_swaps = 2 * max_blocks if num_host_blocks > 0 else 0
        limits.num_host_blocks = max(0, num_host_blocks)
        limits.swap_cost = swap_cost
        limits.patience = patience
        limits.policy = POLICIES.index(policy)
        limits.max_held = (limits.max_copies + 2 * limits.max_num_seqs
                           + blocks_for(max_num_batched_tokens))
        if books_init(&self.books, limits, num_blocks, enable_prefix_caching) < 0:
            raise MemoryError(f"no memory for the books of {num_blocks} blocks")
        self.arena_words = arena_words(&limits)
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self._reserve(limits.max_num_seqs)
        self.started = <Started*> malloc(limits.max_num_seqs * sizeof(Started))
        if self.started == NULL:
            raise MemoryError(f"no memory for {limits.max_num_seqs} sequences")

    def __dealloc__(self):
        books_free(&self.books)
        free(self.found.request_ids)
        free(self.found.indices)
        free(self.found.tokens)
        free(self.found.finishes)
        free(self.found.rows)
        free(self.started)

    cdef int _reserve(self, Py_ssize_t arriving) except -1:
        """Room to report that every sequence ends, and the tokens of a step."""
        cdef Py_ssize_t ends = self.books.num_live + self.books.num_ended + arriving
        cdef Py_ssize_t n = self.books.limits.max_num_seqs + ends
        if books_reserve(&self.books, <int32_t> ends) < 0:
            raise MemoryError("no memory for one more sequence")
        if n <= self.found_capacity:
            return 0
        n *= 2
        if (grow(<void**> &self.found.request_ids, n * sizeof(int64_t)) < 0
                or grow(<void**> &self.found.indices, n * sizeof(int32_t)) < 0
                or grow(<void**> &self.found.tokens, n * sizeof(int32_t)) < 0
                or grow(<void**> &self.found.finishes, n) < 0
                or grow(<void**> &self.found.rows, n * sizeof(int32_t)) < 0):
            raise MemoryError("no memory for one more sequence")
        self.found_capacity = n
        return 0

    def add(
        self,
        int64_t request_id,
        prompt,
        *,
        double now,
        int64_t max_tokens,
        int64_t min_tokens=0,
        tuple eos_token_ids=(),
        tuple stop_token_ids=(),
        float temperature=1.0,
        float top_p=1.0,
        int32_t top_k=0,
        float min_p=0.0,
        uint64_t seed=0,
        int32_t num_logprobs=-1,
        int32_t priority=0,
        str salt="",
        bint bypass_cache=False,
        str tenant="",
        double queue_timeout=0.0,
        double time_limit=0.0,
        int32_t num_sequences=1,
    ):
        """Queue a request; see scheduler.pyi."""
        cdef const int32_t[::1] tokens = prompt
        cdef Request* request
        cdef int32_t tenant_number, uncached
        cdef Salt salt_number = salt_of(salt)
        eos = tuple(dict.fromkeys(eos_token_ids))
        stops = tuple(t for t in dict.fromkeys(stop_token_ids) if t not in eos)
        end_ids = np.array(eos + stops, np.int32)
        if request_id in self.ids:
            raise RequestExists("request_id", f"{request_id} is that of a live request")
        require_valid(&self.books, tokens.shape[0], max_tokens, min_tokens, len(end_ids),
                      num_sequences)
        self._require_place()
        self._reserve(num_sequences)
        tenant_number = tenant_index(&self.books, self.tenants, tenant)
        request = new_request(&self.books, tokens, max_tokens, min_tokens, end_ids, num_sequences)
        request.id = request_id
        request.tenant = tenant_number
        request.num_eos = <int32_t> len(eos)
        request.bypass_cache = bypass_cache
        request.num_logprobs = num_logprobs
        request.priority = priority
        request.salt = salt_number
        request.seed = seed
        request.temperature = temperature
        request.top_p = top_p
        request.min_p = min_p
        request.top_k = top_k
        request.features = features_of(request)
        request.arrived = now
        request.queue_deadline = now + queue_timeout if queue_timeout > 0 else INFINITY
        request.deadline = now + time_limit if time_limit > 0 else INFINITY
        uncached = uncached_tokens(&self.books, request)
        if not self._has_room(uncached):
            drop_request(request)
            raise Overloaded(
                f"{self.books.waiting_tokens} uncached prompt tokens wait already and these are "
                f"{uncached} more (max_queued_tokens is {self.max_queued_tokens}); try again later")
        insert_request(&self.books, request, uncached)
        self.ids[request_id] = <uintptr_t> request

    def fork(self, int64_t request_id, int32_t index, int32_t token):
        """Add a sequence to a live request; see scheduler.pyi."""
        cdef Request* request
        cdef Sequence* source
        cdef Sequence* seq
        address = self.ids.get(request_id)
        if address is None:
            raise InvalidRequest("request_id", f"{request_id} is not that of a live request")
        request = <Request*> <uintptr_t> address
        source = request.members[index] if 0 <= index < request.num_indices else NULL
        if source == NULL or source.finish or source.num_tokens <= request.prompt_len:
            raise InvalidRequest("index", f"sequence {index} has no sampled token, or has ended")
        self._reserve(1)
        seq = sequence_new(request)
        if seq == NULL:
            raise MemoryError(f"no memory for a sequence of {request.max_len} tokens")
        memcpy(seq.tokens, source.tokens, source.num_tokens * sizeof(int32_t))
        seq.num_tokens = source.num_tokens
        seq.tokens[seq.num_tokens - 1] = token
        seq.source = index
        seq.arrival = request.first_arrival + seq.index
        seq.born = self.books.counters.admissions
        self.books.tenants[request.tenant].num_live += 1
        self.books.num_live += 1
        queue_push(&self.books, seq, 1)
        return seq.index

    cdef int _require_place(self) except -1:
        if self.books.num_waiting >= self.max_queued_requests:
            raise Overloaded(f"{self.books.num_waiting} requests wait already, as many as "
                             f"max_queued_requests lets; try again later")
        return 0

    cdef bint _has_room(self, int32_t tokens) noexcept nogil:
        """One alone always fits, however long."""
        cdef Books* books = &self.books
        return not books.num_waiting or books.waiting_tokens + tokens <= self.max_queued_tokens

    def abort(self, int64_t request_id):
        """End a request with FinishReason.ABORTED; see scheduler.pyi."""
        cdef Request* request
        cdef int32_t i
        address = self.ids.get(request_id)
        if address is None:
            return False
        request = <Request*> <uintptr_t> address
        for i in range(request.num_indices - 1, -1, -1):
            if request.members[i] != NULL and request.members[i].finish == 0:
                if request.num_members == 1:
                    end_sequence(&self.books, request.members[i], ABORTED)
                    break  # the request may be freed
                end_sequence(&self.books, request.members[i], ABORTED)
        self._forget_finished()
        return True

    cdef void _forget_finished(self):
        cdef int32_t i
        for i in range(self.books.num_finished):
            del self.ids[self.books.finished[i]]
        self.books.num_finished = 0

    def plan(self, double now, arena):
        """Decide the next step and pack it; see scheduler.pyi."""
        cdef Step* step
        cdef Packed packed
        cdef Py_buffer view
        cdef int32_t num_swap_out = 0
        cdef int32_t num_swap_in = 0
        if self.books.num_planned - self.books.num_committed > 1:
            raise ValueError("two steps are in flight: commit the older one before planning")
        PyObject_GetBuffer(arena, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        if view.itemsize != 4 or view.len < self.arena_words * 4:
            PyBuffer_Release(&view)
            raise ValueError(f"arena must be int32 and have {self.arena_words} words at least")
        with nogil:
            step = plan_step(&self.books, now)
            if step != NULL:
                num_swap_out = self.books.num_swap_out
                num_swap_in = self.books.num_swap_in
                packed = pack_step(&self.books, step, <int32_t*> view.buf)
        PyBuffer_Release(&view)
        if self.books.num_finished:
            self._forget_finished()
        if step == NULL:
            return None
        return new_plan(step, &packed, num_swap_out, num_swap_in)

    def commit(self, Plan plan not None, tokens, double now):
        """Take the sampled token of each row; see scheduler.pyi."""
        cdef Step* step = step_of(&self.books, plan.step)
        cdef Py_buffer view
        cdef int32_t num_started
        if plan.step != self.books.num_committed or plan.step >= self.books.num_planned:
            raise ValueError(f"plan {plan.step} is not the oldest that is in flight "
                             f"({self.books.num_committed})")
        PyObject_GetBuffer(tokens, &view, PyBUF_SIMPLE)
        if view.itemsize != 4 or view.len < step.num_rows * 4:
            PyBuffer_Release(&view)
            raise ValueError(f"tokens must be int32 and have {step.num_rows} entries")
        self.found.count = 0
        with nogil:
            num_started = retire_step(&self.books, step, <const int32_t*> view.buf, &self.found,
                                      self.started, now)
        PyBuffer_Release(&view)
        if self.books.num_finished:
            self._forget_finished()
        return new_events(&self.found, self.started, num_started)

    def poll(self, double now):
        """Finishes that need no step; see scheduler.pyi."""
        expire_waiting(&self.books, now)
        if self.books.num_ended == 0:
            return None
        self.found.count = 0
        drain_ended(&self.books, &self.found)
        self._forget_finished()
        return new_events(&self.found, NULL, 0)

    def has_work(self):
        """Whether any sequence is live, or a finish is not reported yet."""
        return self.books.num_live > 0 or self.books.num_ended > 0

    def flush_cache(self):
        """Drop cached blocks that nothing uses; returns how many."""
        return tree_flush(&self.books.tree)

    def stats(self):
        """Plain counters and gauges."""
        cdef Books* books = &self.books
        return {
            "running": books.num_running,
            "waiting": books.num_waiting,
            "waiting_tokens": books.waiting_tokens,
            "blocks_total": books.pool.num_blocks - 1,
            "blocks_free": pool_available(&books.pool),
            "blocks_empty": books.pool.num_empty,
            "blocks_cached": books.tree.num_nodes,
            "hit_tokens": books.counters.hit_tokens,
            "query_tokens": books.counters.query_tokens,
            "evictions": books.tree.num_evictions,
            "folded_blocks": books.counters.folded_blocks,
            "preemptions": books.counters.preemptions,
            "preempted_tokens": books.counters.preempted_tokens,
            "swaps_out": books.counters.swaps_out,
            "swaps_in": books.counters.swaps_in,
            "swapped_blocks": books.counters.swapped_blocks,
            "host_blocks_free": books.num_free_host + books.num_leaving_host,
            "forks": books.counters.forks,
            "generated_tokens": books.counters.generated_tokens,
            "admissions": books.counters.admissions,
            "steps": books.num_committed,
        }

    def inter_token(self):
        """Intervals between tokens of a sequence; see scheduler.pyi."""
        cdef Intervals* intervals = &self.books.intervals
        bounds = tuple([BOUNDS[i] for i in range(NUM_BOUNDS)])
        return bounds, tuple([count for count in intervals.counts]), intervals.seconds

    def check(self):
        """Verify every invariant of pool, tree, rows and queues; raises InvariantError."""
        verify_books(&self.books)
