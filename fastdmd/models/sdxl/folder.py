"""Diffusers folders of SDXL: the UNet in and out with no key map, the noise table, and a whole pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.models import component
from fastdmd.models.sdxl.net import FIXED, SDXL, SDXLConfig
from fastdmd.schedule import VPSchedule

COND_PROJ = "unet.time_embedding.cond_proj.weight"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}  # diffusers' names, ours
LEVELS = (
    "transformer_layers_per_block",
    "attention_head_dim",
)  # diffusers takes one number for all levels too
COMPONENTS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The keys of `scheduler/scheduler_config.json` that define the noise, with SDXL's values."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear in sqrt(beta); or "linear"
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"

    def schedule(self) -> VPSchedule:
        """Return the schedule of alphas_cumprod in float64; diffusers has the same in float32."""
        power = {"scaled_linear": 0.5, "linear": 1.0}[self.beta_schedule]
        ends = self.beta_start**power, self.beta_end**power
        betas = torch.linspace(*ends, self.num_train_timesteps, dtype=torch.float64) ** (1 / power)
        return VPSchedule((1 - betas).cumprod(0), PREDICTIONS[self.prediction_type])


def read_noise(folder: Path) -> Noise:
    """Read `folder/scheduler`; ValueError for an unsupported noise table or prediction type."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no scheduler/scheduler_config.json, which says the noise; name an SDXL"
        )
    raw = component.read_json(path)
    noise = Noise(**component.known(raw, Noise))
    for key, values in {
        "beta_schedule": ("scaled_linear", "linear"),
        "prediction_type": tuple(PREDICTIONS),
    }.items():
        if (value := getattr(noise, key)) not in values:
            raise ValueError(f"{path}: {key} = {value!r} is not one of {', '.join(values)}; name an SDXL")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if raw.get(key):
            raise ValueError(
                f"{path}: {key} = {raw[key]!r} gives a noise table of another kind; name an SDXL"
            )
    return noise


def make_schedule(folder: Path | None) -> VPSchedule:
    """Return the noise of a diffusers folder; without one, SDXL's own."""
    return (Noise() if folder is None else read_noise(folder)).schedule()


def read_config(folder: Path) -> SDXLConfig:
    """Return the architecture of `folder/unet`; ValueError for what is not an SDXL."""
    raw = component.read_config(folder, "unet", "UNet2DConditionModel", "SDXL")
    # diffusers writes every key; what an older one left out was as it is here, but for these
    raw = {"addition_embed_type": None, "use_linear_projection": False, **raw}
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{folder}: unet has {key} = {raw[key]!r}, and SDXL {value!r}; name an SDXL")
    needed = {f.name for f in fields(SDXLConfig)} - {"time_cond_proj_dim", "sample_size"}
    if absent := sorted(needed - set(raw)):
        raise ValueError(
            f"{folder / 'unet' / 'config.json'} has no {', '.join(absent)}; download or save the folder again"
        )
    keys = component.known(raw, SDXLConfig)
    keys |= {
        key: (keys[key],) * len(keys["block_out_channels"]) for key in LEVELS if isinstance(keys[key], int)
    }
    config = SDXLConfig(**keys)
    for key, message in config.problems():
        raise ValueError(f"{folder}: unet has {key}: {message}")
    if (ups := raw.get("up_block_types")) != list(config.up_block_types):
        raise ValueError(
            f"{folder}: unet has up_block_types = {ups}, no mirror of its down_block_types; name an SDXL"
        )
    return config


def with_guidance(config: SDXLConfig, time_cond_proj_dim: int | None) -> SDXLConfig:
    """Return an architecture with a guidance embedding of that width; None leaves it as it is."""
    return config if time_cond_proj_dim is None else replace(config, time_cond_proj_dim=time_cond_proj_dim)


def open_weights(folder: Path, net: SDXL) -> component.Weights:
    """Return the weights of a diffusers folder by the names of an SDXL.

    A guidance embedding is zero where the folder has none. A folder that has one was trained with it: another
    width is refused.
    """
    had = read_config(folder).time_cond_proj_dim
    has = net.config.time_cond_proj_dim
    if None not in (had, has) and had != has:
        raise ValueError(f"{folder}: unet has a guidance embedding of width {had}, not {has}; use {had}")
    expected = net.state_dict()
    weights = component.open_weights(folder / "unet").renamed(lambda name: f"unet.{name}")
    if had is None and COND_PROJ in expected:
        weights = weights.with_zeros({COND_PROJ: tuple(expected[COND_PROJ].shape)})
    weights.check(expected)
    return weights


def load(folder: str | Path, time_cond_proj_dim: int | None = None) -> SDXL:
    """Return the UNet of a diffusers folder in float32 on the CPU.

    time_cond_proj_dim: the width of a guidance embedding that it has; None: as the folder has it.
    """
    with torch.device("meta"):
        net = SDXL(with_guidance(read_config(Path(folder)), time_cond_proj_dim))
    component.read_into(net, open_weights(Path(folder), net), torch.device("cpu"), torch.float32)
    return net


def save(folder: str | Path, config: SDXLConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `folder/unet` as diffusers does; `weights` by the names of SDXL."""
    named = {name.removeprefix("unet."): value for name, value in weights.items()}
    component.write(Path(folder) / "unet", {"_class_name": "UNet2DConditionModel", **config.keys()}, named)


def ddim_scheduler(noise: Noise) -> Any:
    """Return diffusers' solver of a many-step model.

    It is `sampler.ode` on `VPSchedule.solver_grid`, where steps divide 1,000.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        **asdict(noise), clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )


def lcm_scheduler(noise: Noise, times: Sequence[float], schedule: VPSchedule) -> Any:
    """Return the `LCMScheduler` whose steps are `times` (descending, in (0, 1], first 1).

    It takes every k-th step of an even solver from 1, so one number is free: the solver's steps, 50 for
    LCM's own. Raise ValueError when no number gives `times`.
    """
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    def of(steps: int) -> Any:
        scheduler: Any = LCMScheduler(**asdict(noise), original_inference_steps=steps)
        scheduler.set_timesteps(len(times))
        return scheduler

    most = noise.num_train_timesteps
    wanted = schedule.model_t(torch.tensor(times, dtype=torch.float64)).long()
    for steps in (50, *range(len(times), most + 1)):
        if len(times) <= steps <= most and torch.equal((scheduler := of(steps)).timesteps, wanted):
            return scheduler
    raise ValueError(
        f"method.denoising_timesteps = {[round(1000 * t, 3) for t in times]} are not steps of diffusers' "
        f"LCMScheduler; even ones are, e.g. "
        f"{[round(1000 * (n + 1) / most, 3) for n in of(most).timesteps.tolist()]}"
    )


def make_scheduler(times: Sequence[float] | None, schedule: VPSchedule, source: Path | None) -> Any:
    """Return diffusers' scheduler of a student that re-noises at `times`, or of many steps.

    The noise is that of `source`.
    """
    noise = read_noise(source) if source else Noise()
    return ddim_scheduler(noise) if times is None else lcm_scheduler(noise, times, schedule)


def export(
    folder: Path, config: SDXLConfig, weights: Mapping[str, Tensor], scheduler: Any, source: Path | None
) -> None:
    """Write a diffusers folder; text encoders, tokenizers and VAE are copied from `source` if it has them.

    Empty prompts are zeros in both embeddings, as SDXL's guidance has them.
    """
    from diffusers import __version__

    save(folder, config, weights)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": __version__}
    index |= {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "force_zeros_for_empty_prompt": True,
    }
    component.write_index(folder, index, COMPONENTS, source)
