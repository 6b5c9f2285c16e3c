"""The step arena's layout, as numbers. See arena.pxd for what they mean."""

HEADER_WORDS: int
H_STEP: int
H_NUM_ROWS: int
H_NUM_TOKENS: int
H_NUM_DECODES: int
H_NUM_TABLE_UPDATES: int
H_NUM_PARAM_UPDATES: int
H_NUM_COPIES: int
H_NUM_SWAP_OUT: int
H_NUM_SWAP_IN: int
H_ROWS: int
H_Q_START: int
H_KV_LEN: int
H_FLAGS: int
H_TOKENS: int
H_TABLE_UPDATES: int
H_PARAM_UPDATES: int
H_COPIES: int
H_SWAP_OUT: int
H_SWAP_IN: int
H_NUM_WORDS: int
H_NUM_SAMPLED: int
H_MAX_LOGPROBS: int
H_FEATURES: int
F_SAMPLE: int
F_TOKEN_ON_DEVICE: int
S_RANDOM: int
S_TOP_K: int
S_TOP_P: int
S_MIN_P: int
S_MIN_TOKENS: int
S_PENALTIES: int
S_BIAS: int
PARAM_WORDS: int
P_ROW: int
P_TEMPERATURE: int
P_TOP_P: int
P_MIN_P: int
P_TOP_K: int
P_SEED_LOW: int
P_SEED_HIGH: int
P_PRESENCE: int
P_FREQUENCY: int
P_REPETITION: int
P_MIN_LEN: int
P_PROMPT_LEN: int
P_NUM_LOGPROBS: int
P_NUM_END_IDS: int
P_END_IDS: int
MAX_END_IDS: int

MACROS: dict[str, int]
"""All of them by name, for the compiler of the CUDA kernels."""
