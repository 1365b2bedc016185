"""SDXL (arXiv 2307.01952): diffusers' `UNet2DConditionModel` as a role's network.

B batch, C channel, H W space, S text tokens, D cross_attention_dim, P pooled_dim, G time_cond_proj_dim.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fastdmd.batch import Cond
from fastdmd.models.lora import base_of
from fastdmd.models.net import PLAIN, Call, Checkpointing, Net, Out
from fastdmd.models.norm import GroupNorm, replace_group_norms
from fastdmd.models.recompute import recompute
from fastdmd.schedule import wide
from fastdmd_kernels.norm import prepare as prepare_norm

UP = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
# keys of diffusers' config.json that fastdmd's SDXL fixes, with the value it has
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "use_linear_projection": True,
}
TIME_IDS = 6  # original height and width, crop top and left, target height and width


@dataclass(frozen=True, kw_only=True)
class SDXLConfig:
    """The keys of diffusers' `unet/config.json` that define an SDXL; lists have a number for each level."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    attention_head_dim: tuple[int, ...] = (5, 10, 20)  # the number of heads, whatever diffusers calls it
    layers_per_block: int = 2
    norm_num_groups: int = 32
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 128  # the side of latents that a pipeline makes by default
    time_cond_proj_dim: int | None = None  # of a guidance embedding; LCM uses 256

    @property
    def up_block_types(self) -> tuple[str, ...]:
        return tuple(UP[kind] for kind in reversed(self.down_block_types))

    def keys(self) -> dict[str, Any]:
        """Return all keys that diffusers needs."""
        return {**FIXED, **asdict(self), "up_block_types": self.up_block_types}

    @property
    def text_dim(self) -> int:
        return self.cross_attention_dim

    @property
    def grain(self) -> tuple[int, int]:
        """Return what latents along H, W have to be multiples of: every level but the last halves them."""
        side = 2 ** (len(self.block_out_channels) - 1)
        return side, side

    @property
    def pooled_dim(self) -> int:
        return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

    def shallow(self, depth: int) -> Self:
        """Return the architecture with at most `depth` transformer blocks on each level."""
        levels = tuple(min(depth, n) for n in self.transformer_layers_per_block)
        return replace(self, transformer_layers_per_block=levels)

    def problems(self) -> Iterator[tuple[str, str]]:
        levels = len(self.block_out_channels)
        for key in ("down_block_types", "transformer_layers_per_block", "attention_head_dim"):
            if (n := len(getattr(self, key))) != levels:
                yield key, f"has {n} values for {levels} levels; give it one for each of block_out_channels"
        if strange := set(self.down_block_types) - set(UP):
            yield "down_block_types", f"{min(strange)!r} is not one of {', '.join(UP)}; use one of them"
        for key, value in asdict(self).items():
            numbers: tuple[Any, ...] = (
                cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
            )
            if any(isinstance(n, int) and n < 1 for n in numbers):
                yield key, f"{value} is not positive; SDXL uses {getattr(SDXLConfig, key)}"
                return  # by which the rest would divide
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            yield (
                "norm_num_groups",
                f"{self.norm_num_groups} does not divide {list(self.block_out_channels)}; use 8",
            )
        for width, heads in zip(self.block_out_channels, self.attention_head_dim, strict=False):
            if width % heads:
                yield (
                    "attention_head_dim",
                    f"{heads} heads do not divide {width} channels; use a number that does",
                )
        if self.pooled_dim < 1:
            least = TIME_IDS * self.addition_time_embed_dim
            yield (
                "projection_class_embeddings_input_dim",
                f"{self.projection_class_embeddings_input_dim} leaves nothing of pooled text beside "
                f"{TIME_IDS} x addition_time_embed_dim = {least}; use more",
            )


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding of guidance [B], float32 [B, dim].

    Sines come first; an odd dim ends in a zero. It is LCM's (2310.04378), of 1000 g for the g of its
    `cond + g (cond - uncond)`, which is w - 1.
    """
    half = dim // 2
    freq = torch.exp(
        torch.arange(half, device=w.device, dtype=torch.float32) * (-math.log(10000.0) / (half - 1))
    )
    angle = 1000 * (w.float() - 1)[:, None] * freq
    return torch.cat([angle.sin(), angle.cos(), angle.new_zeros(len(w), dim % 2)], dim=1)


class SDXL(Net):
    """A role's network: x_t [B, C, H, W], model_t [B], Cond -> F [B, C, H, W].

    model_t is an index into the noise table.
    """

    def __init__(self, config: SDXLConfig) -> None:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        super().__init__()
        self.config = config
        self.unet: Any = UNet2DConditionModel(**config.keys())
        replace_group_norms(self.unet)
        widths = config.block_out_channels
        self.widths = *widths, widths[-1], *reversed(widths)
        # hooks that stay: a compiler cannot follow one that comes and goes with a call
        self.wanted: tuple[int, ...] = ()
        self.maps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            block.register_forward_hook(partial(self._keep, index))
        if config.time_cond_proj_dim is not None:  # zero, so that a student starts as its teacher
            nn.init.zeros_(self.unet.time_embedding.cond_proj.weight)

    def recompute_blocks(self, how: Checkpointing) -> None:
        super().recompute_blocks(how)
        assert how != "selective"  # the configuration was checked
        if how == "full":
            self.unet.enable_gradient_checkpointing(self._recomputed)
        else:
            self.unet.disable_gradient_checkpointing()

    def _recomputed(self, module: nn.Module, *arguments: object) -> Any:
        """Return what a module makes of its arguments, computed anew in the backward by the same role."""
        role = list(self.acting)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._acting_as(role)

        if not role:  # a compiler takes contexts of another kind only
            return recompute(module.__call__, *arguments)
        return recompute(module.__call__, *arguments, contexts=contexts)

    @contextmanager
    def _acting_as(self, role: Sequence[str]) -> Generator[None]:
        """Take the adapters and copies of a role inside."""
        before = list(self.acting)
        self.acting[:] = role
        try:
            yield
        finally:
            self.acting[:] = before

    def prepare(
        self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, dense: bool = False
    ) -> None:
        """Choose the norms."""
        for module in self.unet.modules():
            if isinstance(module, GroupNorm):
                prepare_norm("group_norm", device, dtype, (module.num_channels, module.num_groups))

    @torch.no_grad()
    def start_from_scratch(self) -> Self:
        """Set random weights to train from: residual branches and the output start at zero (2105.05233)."""
        for name, parameter in self.named_parameters():
            if name.rpartition(".")[0].endswith((".conv2", ".proj_out", ".conv_out")):
                parameter.zero_()
        return self

    @property
    def blocks(self) -> list[nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the blocks that go down, the middle one and those that go up."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    @property
    def units(self) -> list[nn.Module]:
        """Return the parts that diffusers recomputes: a compiler takes no role from inside a checkpoint."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        return [m for m in self.unet.modules() if isinstance(m, ResnetBlock2D | BasicTransformerBlock)]

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        """Return F, and the hidden states [B, D, H', W'] after the blocks `call.layers`.

        Each is on its own grid.
        """
        assert not call.blocks, "SDXL makes images"
        dtype = base_of(self.unet.conv_in).weight.dtype
        if cond.pooled is None or cond.time_ids is None:
            raise ValueError(
                "SDXL needs Cond.pooled and Cond.time_ids beside the text; this world gives neither"
            )
        embedding = self._guidance_embedding(cond.guidance)
        self.wanted = call.layers
        self.acting[:] = [] if call.role is None else [call.role]
        (F,) = self.unet(
            x_t.to(dtype),
            model_t,
            cond.text.to(dtype),
            timestep_cond=None if embedding is None else embedding.to(dtype),
            added_cond_kwargs={"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids},
            return_dict=False,
        )
        maps = self.maps
        # a recomputed block keeps nothing
        self.wanted = ()
        self.maps = {}
        return Out(F, [wide(maps[index]) for index in sorted(maps)])

    def _keep(self, index: int, block: nn.Module, inputs: object, out: Any) -> None:
        """Keep what a block returns, where the call that runs wants it; a block down also gives its skips."""
        if index in self.wanted:
            self.maps[index] = out[0] if isinstance(out, tuple) else out

    def _guidance_embedding(self, w: Tensor | None) -> Tensor | None:
        """Return the embedding [B, G] of the guidance, None without one.

        Raise ValueError when only one of condition and network has it.
        """
        dim = self.config.time_cond_proj_dim
        if w is None and dim is None:
            return None
        if w is None:
            raise ValueError(
                f"time_cond_proj_dim is {dim}, so SDXL has a guidance embedding; set Cond.guidance"
            )
        if dim is None:
            raise ValueError(
                "Cond.guidance is set, and this SDXL has no guidance embedding; "
                "use one with time_cond_proj_dim = 256"
            )
        return guidance_embedding(w, dim)

    def flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return multiply-adds x 2 of one forward of a latent [B, C, H, W], without adapters."""
        B, *latent = shape
        return B * sum(_flops(self.config, tuple(latent), text_tokens))

    def attention_flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return those of scores and of what they weigh, in one forward of a latent [B, C, H, W]."""
        B, *latent = shape
        _, attention = _flops(self.config, tuple(latent), text_tokens)
        return B * attention


@lru_cache(maxsize=32)
def _flops(config: SDXLConfig, latent: tuple[int, ...], text_tokens: int) -> tuple[int, int]:
    """Count the FLOPs of one sample's products with weights, and of its attention, on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net, x_t = SDXL(config), torch.empty(1, *latent)
        cond = Cond(
            torch.empty(1, text_tokens, config.cross_attention_dim),
            torch.empty(1, config.pooled_dim),
            torch.empty(1, TIME_IDS),
            None if config.time_cond_proj_dim is None else torch.empty(1),
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(x_t, torch.empty(1), cond)
    by_op = counter.get_flop_counts()["Global"]
    weighed = sum(
        by_op.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    )
    return weighed, counter.get_total_flops() - weighed
