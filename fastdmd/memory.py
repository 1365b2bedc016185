"""What a run gives up for memory, or keeps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastdmd.models.net import Checkpointing


@dataclass(frozen=True, kw_only=True)
class Config:
    """The table [memory]."""

    # what of a block the backward computes anew: selective is all but self-attention
    checkpointing: Checkpointing = "none"
    # both sides in one batched call, or in two for less memory; auto: in one, unless the plan at the head of
    # a run says that only two fit the GPU
    guidance: Literal["auto", "one_call", "two_calls"] = "auto"
    offload: Literal["none", "block_inputs"] = "none"  # what waits for the backward in host memory
    stream_base: bool = False  # frozen blocks in host memory, two of them on the device
    ffn_chunks: int = 1  # of tokens, in which a feed-forward is computed, each anew in the backward

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.offload != "none" and self.checkpointing == "none":
            yield "offload", "blocks keep more than their inputs; set memory.checkpointing = 'full' too"
        if self.stream_base and self.checkpointing != "full":
            yield (
                "stream_base",
                "a block's weights are gone in the backward; set memory.checkpointing = 'full'",
            )
        if self.ffn_chunks < 1:
            yield "ffn_chunks", f"{self.ffn_chunks} is not positive; 1 computes all tokens at once"
