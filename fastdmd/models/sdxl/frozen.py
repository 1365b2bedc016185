"""The frozen parts of an SDXL folder, from diffusers and transformers: two text encoders and the image VAE.

B batch, C channel, H W space.
"""

# transformers and diffusers have no types
# pyright: basic

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.log import Progress
from fastdmd.models.component import SAFE
from fastdmd.models.lowbit import store_low_bit


class TextEncoder:
    """Prompts -> text [n, 77, 768 + 1280], pooled [n, 1280] on the host (SDXL 2307.01952, section 2.1).

    Text is both encoders' last layer but one, side by side; pooled is the second's projection. An empty
    prompt is zeros in both, as the other side of guidance is in SDXL's pipelines.
    """

    def __init__(
        self, path: str, device: torch.device, dtype: torch.dtype, codes: torch.dtype | None = None
    ) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.parts: list[tuple[Any, Any]] = []  # tokenizer, encoder
        for end, kind in ("", CLIPTextModel), ("_2", CLIPTextModelWithProjection):
            # with its attention named, a config.json that names a kernel to fetch and run has no say
            model = kind.from_pretrained(
                path, subfolder=f"text_encoder{end}", dtype=dtype, attn_implementation="sdpa", **SAFE
            )
            tokenizer = CLIPTokenizer.from_pretrained(path, subfolder=f"tokenizer{end}", **SAFE)
            if codes is not None:
                store_low_bit(model, codes)
            self.parts.append((tokenizer, model.requires_grad_(False).eval()))
        self.device = device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> Cond:
        """Encode prompts; the encoders are on the device only while they work."""
        self._move(self.device)
        texts = []
        pools = []
        progress = Progress("encoding prompts", len(prompts))
        for first in range(0, len(prompts), batch_size):
            chunk = list(prompts[first : first + batch_size])
            written = torch.tensor([bool(prompt.strip()) for prompt in chunk], device=self.device)
            outs = [self._encode(tokenizer, model, chunk) for tokenizer, model in self.parts]
            text = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
            texts.append((text * written[:, None, None]).cpu())
            pools.append((outs[1].text_embeds * written[:, None]).cpu())
            progress.show(first + len(chunk))
        self._move("cpu")
        return Cond(torch.cat(texts), torch.cat(pools))

    def _encode(self, tokenizer: Any, model: Any, prompts: list[str]) -> Any:
        length = tokenizer.model_max_length
        tokens = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        # no mask: CLIP saw its padding in training
        return model(tokens.input_ids.to(self.device), output_hidden_states=True)

    def _move(self, device: torch.device | str) -> None:
        for _, model in self.parts:
            model.to(device)


@torch.no_grad()
def decode(path: str, x0: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Decode latents [B, C, H, W], one at a time, to uint8 [B, 1, 8 H, 8 W, 3] on the host.

    In float32 where the folder asks for it by `force_upcast`, as SDXL's does: its activations leave float16.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(path, subfolder="vae", **SAFE)
    dtype = torch.float32 if vae.config.force_upcast else dtype
    scale = vae.config.scaling_factor
    vae.to(device, dtype)
    images = [vae.decode(x.to(device, dtype)[None] / scale, return_dict=False)[0].float().cpu() for x in x0]
    image = torch.cat(images).clamp(-1, 1)
    return (image * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)[:, None]
