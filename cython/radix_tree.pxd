"""Cached prefixes: a tree whose every edge is one block of 16 tokens.

A node is a cached block, so a block's number is its node's number and nothing is allocated after
construction; node 0 is the root. The children of a node are a treap ordered by their tokens (below
the root by salt first): one descent finds the exact child and the one with the longest common
prefix. See docs/decisions/010-radix-tree.md.
"""

from libc.stdint cimport int32_t, int64_t, uint64_t

from zllm.native.block_pool cimport Pool

cdef struct Salt:
    uint64_t low
    uint64_t high

cdef struct Node:
    Salt salt               # only children of the root are ordered by it
    int32_t parent
    int32_t children        # root of the treap of children; 0: a leaf
    int32_t left            # this node's place in its parent's treap
    int32_t right
    int32_t up

cdef struct Tree:
    Pool* pool
    Node* nodes
    int32_t* tokens         # 16 per node
    int32_t num_nodes       # cached blocks
    int64_t num_evictions

cdef struct Match:
    int32_t num_blocks      # whole blocks that match
    int32_t partial         # a child whose first tokens match; 0: none
    int32_t partial_tokens  # how many of its tokens match, 1 to 15

cdef int tree_init(Tree* tree, Pool* pool) noexcept nogil
cdef void tree_free(Tree* tree) noexcept nogil
cdef Match tree_match(const Tree* tree, Salt salt, const int32_t* tokens, int32_t num_tokens,
                      int32_t* blocks) noexcept nogil
cdef int32_t tree_insert(Tree* tree, Salt salt, int32_t parent, int32_t block,
                         const int32_t* tokens) noexcept nogil
cdef void tree_remove(Tree* tree, int32_t block) noexcept nogil
cdef int32_t tree_take(Tree* tree) noexcept nogil
cdef int32_t tree_flush(Tree* tree) noexcept nogil
