"""Which results of a block the backward finds kept, where all else of the block is computed anew.

Those of self-attention: its output and log-sum-exp are 2 hidden states of some 34 to 48 that a block would
keep, and computing them again is 10 % of a cycle. Cross-attention is cheap to repeat, and keeping it would
double the memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,  # pyright: ignore[reportUnknownVariableType]
)

DENSE = {  # q, k, v [B, N, L, K] are the first arguments
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "fastdmd::attention",  # which stands in for them in a plan
}
SPARSE = {"fastdmd::vsa_fine", "fastdmd::vsa_select"}  # of self-attention only


def policy(ctx: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Return whether the results of an op are kept."""
    name: str = op.name()
    kept = name in SPARSE
    if name in DENSE:
        q, k, *_ = args
        kept = q.shape[2] == k.shape[2]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


contexts: Callable[[], Any] = partial(create_selective_checkpoint_contexts, policy)
