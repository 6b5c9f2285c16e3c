# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Match, insert and evict on the tree of cached blocks.

Who references a node references its ancestors, and releases the deepest first. So in the pool's
idle list every node stands before its ancestors: the oldest idle block is always a leaf, and
eviction needs no walk.
"""

from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from zllm.native.block_pool cimport BLOCK_SIZE, pool_push_empty, pool_take, pool_unlink


cdef int tree_init(Tree* tree, Pool* pool) noexcept nogil:
    """An empty tree over the pool's blocks. -1 when memory ran out."""
    tree.pool = pool
    tree.num_nodes = 0
    tree.num_evictions = 0
    tree.nodes = <Node*> calloc(pool.num_blocks, sizeof(Node))
    tree.tokens = <int32_t*> calloc(<size_t> pool.num_blocks * BLOCK_SIZE, sizeof(int32_t))
    if not (tree.nodes and tree.tokens):
        tree_free(tree)
        return -1
    return 0


cdef void tree_free(Tree* tree) noexcept nogil:
    free(tree.nodes)
    free(tree.tokens)
    tree.nodes = NULL
    tree.tokens = NULL


cdef inline uint32_t weight(int32_t node) noexcept nogil:
    """A node's heap weight in its treap: fixed, and unrelated to the order of tokens."""
    cdef uint32_t x = <uint32_t> node * <uint32_t> 0x9E3779B1
    x ^= x >> 15
    x *= <uint32_t> 0x85EBCA77
    return x ^ (x >> 13)


cdef inline int32_t common_prefix(const int32_t* a, const int32_t* b, int32_t n) noexcept nogil:
    cdef int32_t i = 0
    while i < n and a[i] == b[i]:
        i += 1
    return i


cdef inline int compare_salts(Salt a, Salt b) noexcept nogil:
    if a.low != b.low:
        return -1 if a.low < b.low else 1
    if a.high != b.high:
        return -1 if a.high < b.high else 1
    return 0


cdef inline int32_t find_child(const Tree* tree, Salt salt, int32_t parent, const int32_t* tokens,
                               int32_t n, int32_t* length) noexcept nogil:
    """The child that shares most of its first tokens with the n given; `length`: how many."""
    cdef int32_t node = tree.nodes[parent].children
    cdef int32_t best = 0
    cdef int32_t common
    cdef const int32_t* own
    cdef int order
    length[0] = 0
    while node:
        order = compare_salts(salt, tree.nodes[node].salt) if parent == 0 else 0
        if order == 0:
            own = tree.tokens + <int64_t> node * BLOCK_SIZE
            if n == BLOCK_SIZE and memcmp(own, tokens, BLOCK_SIZE * sizeof(int32_t)) == 0:
                length[0] = BLOCK_SIZE
                return node
            common = common_prefix(own, tokens, n)
            if common > length[0]:
                best = node
                length[0] = common
            if common == n:
                return node
            order = -1 if tokens[common] < own[common] else 1
        node = tree.nodes[node].left if order < 0 else tree.nodes[node].right
    return best


cdef Match tree_match(const Tree* tree, Salt salt, const int32_t* tokens, int32_t num_tokens,
                      int32_t* blocks) noexcept nogil:
    """The longest cached prefix of the tokens; its whole blocks are written to `blocks`."""
    cdef Match match
    cdef int32_t node = 0
    cdef int32_t child, n, length
    match.num_blocks = 0
    match.partial = 0
    match.partial_tokens = 0
    while num_tokens > 0:
        n = min(num_tokens, BLOCK_SIZE)
        child = find_child(tree, salt, node, tokens, n, &length)
        if length < BLOCK_SIZE:
            if length:
                match.partial = child
                match.partial_tokens = length
            break
        blocks[match.num_blocks] = child
        match.num_blocks += 1
        node = child
        tokens += BLOCK_SIZE
        num_tokens -= BLOCK_SIZE
    return match


cdef inline void replace_in_treap(Tree* tree, int32_t parent, int32_t up, int32_t old,
                                  int32_t new) noexcept nogil:
    """Let `new` (0: nothing) stand where `old` stood below `up` in the parent's treap."""
    if up == 0:
        tree.nodes[parent].children = new
    elif tree.nodes[up].left == old:
        tree.nodes[up].left = new
    else:
        tree.nodes[up].right = new
    if new:
        tree.nodes[new].up = up


cdef void rotate_up(Tree* tree, int32_t node) noexcept nogil:
    """Exchange a node with the one above it in its treap, keeping the order."""
    cdef Node* nodes = tree.nodes
    cdef int32_t above = nodes[node].up
    cdef int32_t moved
    replace_in_treap(tree, nodes[node].parent, nodes[above].up, above, node)
    if nodes[above].left == node:
        moved = nodes[node].right
        nodes[above].left = moved
        nodes[node].right = above
    else:
        moved = nodes[node].left
        nodes[above].right = moved
        nodes[node].left = above
    nodes[above].up = node
    if moved:
        nodes[moved].up = above


cdef int32_t tree_insert(Tree* tree, Salt salt, int32_t parent, int32_t block,
                         const int32_t* tokens) noexcept nogil:
    """Cache a referenced block below a referenced parent; returns the node that holds the
    tokens: another block when they are cached already."""
    cdef Node* nodes = tree.nodes
    cdef int32_t node = nodes[parent].children
    cdef int32_t up = 0
    cdef int32_t common
    cdef const int32_t* own
    cdef int order = 0
    while node:
        order = compare_salts(salt, nodes[node].salt) if parent == 0 else 0
        if order == 0:
            own = tree.tokens + <int64_t> node * BLOCK_SIZE
            common = common_prefix(own, tokens, BLOCK_SIZE)
            if common == BLOCK_SIZE:
                return node
            order = -1 if tokens[common] < own[common] else 1
        up = node
        node = nodes[node].left if order < 0 else nodes[node].right
    memset(&nodes[block], 0, sizeof(Node))
    memcpy(tree.tokens + <int64_t> block * BLOCK_SIZE, tokens, BLOCK_SIZE * sizeof(int32_t))
    nodes[block].salt = salt
    nodes[block].parent = parent
    nodes[block].up = up
    if up == 0:
        nodes[parent].children = block
    elif order < 0:
        nodes[up].left = block
    else:
        nodes[up].right = block
    while nodes[block].up and weight(block) > weight(nodes[block].up):
        rotate_up(tree, block)
    tree.pool.cached[block] = 1
    tree.num_nodes += 1
    return block


cdef void tree_remove(Tree* tree, int32_t block) noexcept nogil:
    """Forget a leaf; whoever references the block keeps it."""
    cdef Node* nodes = tree.nodes
    cdef int32_t left = nodes[block].left
    cdef int32_t right = nodes[block].right
    while left and right:
        rotate_up(tree, left if weight(left) > weight(right) else right)
        left = nodes[block].left
        right = nodes[block].right
    replace_in_treap(tree, nodes[block].parent, nodes[block].up, block, left if left else right)
    tree.pool.cached[block] = 0
    tree.num_nodes -= 1


cdef int32_t tree_take(Tree* tree) noexcept nogil:
    """A block with one reference: an empty one, else the least recently used leaf; 0: none."""
    cdef Pool* pool = tree.pool
    cdef int32_t block = pool_take(pool)
    if block or pool.oldest == 0:
        return block
    block = pool.oldest
    pool_unlink(pool, block)
    tree_remove(tree, block)
    tree.num_evictions += 1
    pool.refs[block] = 1
    return block


cdef int32_t tree_flush(Tree* tree) noexcept nogil:
    """Empty every idle block; returns how many there were."""
    cdef int32_t block
    cdef int32_t count = 0
    while tree.pool.oldest:
        block = tree.pool.oldest
        pool_unlink(tree.pool, block)
        tree_remove(tree, block)
        pool_push_empty(tree.pool, block)
        count += 1
    return count
