"""What would make a run smaller, cheapest first, and what each saves."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastdmd.config import Config
from fastdmd.config.checks import problems_of_compile, problems_of_memory, problems_of_precision
from fastdmd.config.toml import to_toml
from fastdmd.plan.estimate import MARGIN, RESERVE, Plan, make_plan, peaks_of
from fastdmd.plan.gpus import GPU


def levers(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield changes that take memory off, each on top of the others.

    Those before the last two change no result but by rounding; the last two take one byte for each frozen
    weight, and for each of AdamW's moments.
    """
    size = config.run.batch_size
    if size > 1:
        accum = config.run.grad_accum * size
        config = replace(config, run=replace(config.run, batch_size=1, grad_accum=accum))
        yield f"run.batch_size = 1 and run.grad_accum = {accum}", config
    if config.validation.batch_size > 1:
        config = replace(config, validation=replace(config.validation, batch_size=1))
        yield "validation.batch_size = 1", config
    if config.memory.guidance != "two_calls":
        config = in_two_calls(config)
        yield "memory.guidance = 'two_calls'", config
    for key, value in (
        ("checkpointing", "selective"),
        ("checkpointing", "full"),
        ("offload", "block_inputs"),
        ("ffn_chunks", 8),
        ("stream_base", True),
    ):
        memory = replace(config.memory, **{key: value})
        changed = replace(config, memory=memory)
        if memory != config.memory and allowed(config, changed):
            config = changed
            yield f"memory.{key} = {to_toml(value)}".replace('"', "'"), config
    stored = "float8" if config.precision.linear == "float8" else "int8"
    low = replace(config, precision=replace(config.precision, frozen=stored))
    if config.precision.frozen == "compute" and is_valid(low):
        config = low
        yield f"precision.frozen = '{stored}'", config
    plain = [role for role, table in config.optim.items() if table.name == "adamw"]
    smaller = {role: replace(config.optim[role], name="adamw8bit") for role in plain}
    coded = replace(config, optim={**config.optim, **smaller})
    if plain and is_valid(coded):
        yield " and ".join(f"optim.{role}.name = 'adamw8bit'" for role in plain), coded


def is_valid(config: Config) -> bool:
    """Return whether a configuration's [precision] goes together with the rest."""
    return not list(config.precision.problems()) and not list(problems_of_precision(config))


def allowed(config: Config, changed: Config) -> bool:
    """Return whether a change of [memory] goes further on the way from none to full, and can be had."""
    order = ("none", "selective", "full")
    back = order.index(changed.memory.checkpointing) < order.index(config.memory.checkpointing)
    problems = (changed.memory.problems(), problems_of_memory(changed), problems_of_compile(changed))
    return not back and not any(list(each) for each in problems)


def in_two_calls(config: Config) -> Config:
    """Return a configuration in which the sides of guidance are two calls."""
    return replace(config, memory=replace(config.memory, guidance="two_calls"))


def remedies(config: Config, plan: Plan, gpu: GPU) -> Iterator[str]:
    """Yield what each lever saves until the run fits, and what is left to do where none is enough."""
    for text, changed in levers(config):
        smaller = make_plan(changed)
        if smaller.peak < plan.peak:
            yield f"{text} saves {(plan.peak - smaller.peak) / 1e9:.1f} GB"
        plan = smaller
        if plan.fits(gpu):
            return
    yield (
        f"then {plan.need / 1e9:.1f} GB are needed still; use a larger GPU, fewer data.frames, or a student "
        "of adapters (student.train = 'lora')"
    )


@dataclass(frozen=True)
class Room:
    """The largest micro-batch that fits, and what share of a sample's time it saves."""

    batch_size: int
    gain: float


def largest_batch(config: Config, plan: Plan, gpu: GPU) -> Room | None:
    """Return the largest micro-batch of a run that fits; None where not even its own does.

    From a plan of one sample more: bytes of a phase and work are linear in the samples. What does not grow
    with them is the optimizer's traffic and that of weights and gradients; reading weights for products is
    not in the rates.
    """
    if not plan.fits(gpu):
        return None
    size = config.run.batch_size
    more = make_plan(replace(config, run=replace(config.run, batch_size=size + 1)), check=False)
    now, then = peaks_of(config, plan.phases), peaks_of(config, more.phases)
    room = (gpu.memory - RESERVE) / MARGIN
    largest = size + min(int((room - now[name]) // max(then[name] - now[name], 1)) for name in now)
    sample = more.seconds(gpu) - plan.seconds(gpu)
    fixed = plan.seconds(gpu) - size * sample
    return Room(largest, 1 - (sample + fixed / largest) / (sample + fixed / size))
