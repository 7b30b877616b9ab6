"""Other implementations of the operators that `fathom bench kernels` times, by name.

A peer is a function from a shape and the folder that `prepare.py` filled to its `Work`, or to `None`
where it does not have the operator. It raises `Absent` where its library is not on this machine.
Nothing is imported before a peer is asked.
"""

from collections.abc import Callable
from pathlib import Path

from attention import deepgemm_index, flashmla_attention
from experts import humming_experts, marlin_experts, torch_experts
from linear import deepgemm_linear, torch_linear
from work import Work

PEERS: dict[str, Callable[[dict, Path], Work | None]] = {
    "torch": torch_linear,
    "torch experts": torch_experts,
    "deepgemm": deepgemm_linear,
    "marlin": marlin_experts,
    "humming": humming_experts,
    "flashmla": flashmla_attention,
    "deepgemm and topk": deepgemm_index,
}

# Operators that some peer has.
OPERATORS = {"fp8_linear", "bf16_linear", "experts", "attention", "index_select"}

# What is not timed, with the reason.
NOT_TIMED = {
    "transformers": "`fathom bench kernels` does not time whole layers; layer.py does",
    "deepselect": "vLLM's build of it holds code for sm_100 alone; torch.topk selects in its place",
}
