"""Where peers keep what: orders of weights and cache rows, as plain arithmetic.

Nothing is imported, so that the checks run without PyTorch. `exact.py` reads tensors by these.
"""

# A FlashMLA page, its rows' values first and their scales after them: per row 448 FP8 values and 64 bf16
# ones, then 8 bytes of which 7 are scales of 64 values each. Pages begin at multiples of the value bytes.
PAGE = 64
FP8_VALUES, BF16_VALUES, SCALED = 448, 64, 64
VALUE_BYTES = FP8_VALUES + 2 * BF16_VALUES
SCALE_BYTES = 8
FLASHMLA_PAGE = -(-PAGE * (VALUE_BYTES + SCALE_BYTES) // VALUE_BYTES) * VALUE_BYTES
# A page of DeepGEMM's index keys: 64 rows of 128 FP8 values, then their scales, f32.
INDEX_DIM = 128
INDEX_PAGE = PAGE * (INDEX_DIM + 4)

# Marlin packs tiles of 16 inputs and 64 outputs.
MARLIN_INPUTS, MARLIN_OUTPUTS = 16, 64


def marlin_place(at: int) -> tuple[int, int]:
    """Input and output, within their tile, of the packed code `at` of 1024."""
    lane, quarter, code = at // 32, at // 8 % 4, at % 8
    # Even slots lie in the low half of a word, odd ones in the high half.
    slot = 2 * code if code < 4 else 2 * code - 7
    half, row = divmod(slot, 4)
    return 2 * (lane % 4) + row % 2 + 8 * (row // 2), 16 * quarter + lane // 4 + 8 * half


def marlin_scale_place(at: int) -> int:
    """Output, within 64, of the scale `at`."""
    permuted = at // 4 * 4 + (0, 2, 1, 3)[at % 4]
    return permuted // 8 + 8 * (permuted % 8)


def expert_of(pair: int, n_experts: int) -> int:
    """The expert of a pair of token and choice: spread evenly, in no order."""
    return pair * 7919 % n_experts


def expert_blocks(n_pairs: int, n_experts: int, block: int) -> tuple[list[int], list[int]]:
    """Pairs of token and expert as Marlin and Humming take them: grouped by expert, each group padded to
    whole blocks, and the expert of each block."""
    pairs, experts = [], []
    for expert in range(n_experts):
        own = [pair for pair in range(n_pairs) if expert_of(pair, n_experts) == expert]
        own += [n_pairs] * (-len(own) % block)
        pairs += own
        experts += [expert] * (len(own) // block)
    return pairs, experts
