"""What a backward computes anew, and which results it finds kept all the same.

Of a block under selective checkpointing those of self-attention: its output and log-sum-exp are 2 hidden
states of some 34 to 48 that the block would keep, and computing them again is 10 % of a cycle.
Cross-attention is cheap to repeat, and keeping it would double the memory.
"""

# torch.utils.checkpoint has no types
# pyright: basic

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
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


keep_self_attention: Callable[[], Any] = partial(create_selective_checkpoint_contexts, policy)


def recompute(run: Callable[..., Any], *arguments: Any, contexts: Callable[[], Any] | None = None) -> Any:
    """Return what a function makes of its arguments; its backward computes it anew, under `contexts`.

    Nothing in a network is random, so no generator is put back.
    """
    if contexts is None:
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
