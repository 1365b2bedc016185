"""The frozen parts of a Wan 2.1 folder: UMT5 text encoder and video VAE, from diffusers and transformers.

B batch, C channel, T frames, H W space, S text tokens.
"""

# transformers and diffusers have no types
# pyright: basic

from collections.abc import Sequence
from html import unescape
from typing import Any

import ftfy
import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.log import Progress
from fastdmd.models.component import SAFE
from fastdmd.models.lowbit import store_low_bit

TEXT_TOKENS = 512


def clean(prompt: str) -> str:
    """Return a prompt as WanPipeline takes it: mended, HTML unescaped twice, single spaces."""
    return " ".join(unescape(unescape(ftfy.fix_text(prompt))).split())


class TextEncoder:
    """Prompts -> text [n, 512, D] on the host, zeros behind each prompt's last token, as Wan was trained."""

    def __init__(
        self, path: str, device: torch.device, dtype: torch.dtype, codes: torch.dtype | None = None
    ) -> None:
        from transformers import (
            T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
            UMT5EncoderModel,
        )

        self.tokenizer = T5TokenizerFast.from_pretrained(path, subfolder="tokenizer", **SAFE)
        self.model: Any = UMT5EncoderModel.from_pretrained(
            path, subfolder="text_encoder", dtype=dtype, attn_implementation="sdpa", **SAFE
        )
        self.model.requires_grad_(False).eval()
        if codes is not None:
            store_low_bit(self.model, codes)
        self.device = device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], batch_size: int = 8) -> Cond:
        """Encode prompts; the encoder, larger than a 1.3B student, is on the device only meanwhile."""
        self.model.to(self.device)
        done, progress = [], Progress("encoding prompts", len(prompts))
        for first in range(0, len(prompts), batch_size):
            tokens = self.tokenizer(
                [clean(prompt) for prompt in prompts[first : first + batch_size]],
                padding="max_length",
                max_length=TEXT_TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            mask = tokens.attention_mask.to(self.device)
            text = self.model(tokens.input_ids.to(self.device), mask).last_hidden_state
            done.append((text * mask[..., None]).cpu())
            progress.show(min(first + batch_size, len(prompts)))
        self.model.to("cpu")
        return Cond(torch.cat(done))


@torch.no_grad()
def decode(path: str, x0: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Decode latents [B, C, T, H, W], one at a time, to uint8 [B, 4 T - 3, 8 H, 8 W, 3] on the host."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae: Any = AutoencoderKLWan.from_pretrained(path, subfolder="vae", torch_dtype=dtype, **SAFE)
    vae.to(device)
    mean, std = (
        torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    videos = [vae.decode(x.to(device, dtype)[None] * std + mean, return_dict=False)[0] for x in x0]
    video = torch.cat(videos).float().cpu().clamp(-1, 1)
    return (video * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
