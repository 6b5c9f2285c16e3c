"""How long tokens of one sequence are apart: counted by length, at the cost of a few compares."""

from libc.stdint cimport int64_t

cdef enum:
    NUM_BOUNDS = 24

cdef extern from *:
    """
    static const double zllm_interval_bounds[] = {
        0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04,
        0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0,
    };
    """
    const double* BOUNDS "zllm_interval_bounds"

cdef struct Intervals:
    int64_t[NUM_BOUNDS + 1] counts  # up to each bound, above the one before; last: above all
    double seconds                  # their sum


cdef inline void count_interval(Intervals* intervals, double seconds) noexcept nogil:
    cdef int i = 0
    while i < NUM_BOUNDS and seconds > BOUNDS[i]:
        i += 1
    intervals.counts[i] += 1
    intervals.seconds += seconds
