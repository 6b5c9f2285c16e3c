"""The step arena: everything the device must be told for one step, in one int32 array.

The scheduler packs it where the torch runner and the CUDA batch preparation read it. This file is
the layout's one home; `arena.pyx` gives the same numbers to Python, from where they reach the CUDA
sources as macros.

    header          HEADER_WORDS words, the H_ fields below
    rows            R      device row of each sequence in this step; decodes first, then chunks
    q_start         R + 1  first token of each row within `tokens`; q_start[R] == T
    kv_len          R      tokens already in the KV cache before this step (a row's first position)
    flags           R      F_ bits
    tokens          T      token ids; ignored where F_TOKEN_ON_DEVICE
    table_updates   3 * U  (row, index, block): block_table[row][index] = block
    param_updates   PARAM_WORDS * P   (row, then the P_ words): sampling parameters of a row
    copies          2 * C  (source block, target block), done before the forward pass
    swap_out        2 * O  (device block, host block), done before copies
    swap_in         2 * I  (host block, device block), done after swap_out, before copies

Sections stand in this order without gaps; each one's word offset is in the header. The last
header words are zero. Block 0 belongs to nobody: padding tokens write there. Row max_num_seqs
(one more than sequences have) is the padding row.
"""

cdef enum:
    HEADER_WORDS = 32

    # Header fields.
    H_STEP = 0            # step number, modulo 2**31
    H_NUM_ROWS = 1        # R
    H_NUM_TOKENS = 2      # T
    H_NUM_DECODES = 3     # rows with one token each, standing first
    H_NUM_TABLE_UPDATES = 4
    H_NUM_PARAM_UPDATES = 5
    H_NUM_COPIES = 6
    H_NUM_SWAP_OUT = 7
    H_NUM_SWAP_IN = 8
    H_ROWS = 9            # offsets, in words from the arena's start
    H_Q_START = 10
    H_KV_LEN = 11
    H_FLAGS = 12
    H_TOKENS = 13
    H_TABLE_UPDATES = 14
    H_PARAM_UPDATES = 15
    H_COPIES = 16
    H_SWAP_OUT = 17
    H_SWAP_IN = 18
    H_NUM_WORDS = 19      # words in use, header included
    H_NUM_SAMPLED = 20    # rows with F_SAMPLE
    H_MAX_LOGPROBS = 21   # largest num_logprobs over sampled rows; -1: nobody wants any
    H_FEATURES = 22       # S_ bits: what the sampled rows of this step need, ORed

    # Row flags.
    F_SAMPLE = 1          # sample a token after the row's last token
    F_TOKEN_ON_DEVICE = 2  # the row's one token is the last one sampled for it (overlap)

    # Sampling features (H_FEATURES): a step of greedy rows launches the argmax alone.
    S_RANDOM = 1          # some temperature > 0
    S_TOP_K = 2
    S_TOP_P = 4
    S_MIN_P = 8
    S_MIN_TOKENS = 16     # some row may not end yet
    S_PENALTIES = 32
    S_BIAS = 64

    # A parameter update: the row, then its sampling parameters. F32 words hold a float's bits.
    PARAM_WORDS = 32
    P_ROW = 0
    P_TEMPERATURE = 1     # f32; 0 is greedy
    P_TOP_P = 2           # f32
    P_MIN_P = 3           # f32
    P_TOP_K = 4           # 0: off
    P_SEED_LOW = 5
    P_SEED_HIGH = 6
    P_PRESENCE = 7        # f32
    P_FREQUENCY = 8       # f32
    P_REPETITION = 9      # f32; 1: off
    P_MIN_LEN = 10        # no end token may be sampled while the row is shorter than this
    P_PROMPT_LEN = 11
    P_NUM_LOGPROBS = 12   # -1: none
    P_NUM_END_IDS = 13
    P_END_IDS = 14        # EOS and stop ids, at most MAX_END_IDS; used only with P_MIN_LEN
    MAX_END_IDS = 18
