"""What would make a run smaller, cheapest first, and what each saves."""

from collections.abc import Iterator
from dataclasses import replace

from fastdmd.config import Config
from fastdmd.config.checks import problems_of_memory, problems_of_precision
from fastdmd.config.toml import to_toml
from fastdmd.plan.estimate import Plan, make_plan
from fastdmd.plan.gpus import GPU


def levers(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield changes that take memory off, each on top of the others.

    They change no result, but for the last, which rounds AdamW's moments to 8 bits.
    """
    size = config.run.batch_size
    if size > 1:
        accum = config.run.grad_accum * size
        config = replace(config, run=replace(config.run, batch_size=1, grad_accum=accum))
        yield f"run.batch_size = 1 and run.grad_accum = {accum}", config
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
    low = replace(config, precision=replace(config.precision, frozen="int8"))
    if config.precision.frozen == "compute" and not list(problems_of_precision(low)):
        config = low
        yield "precision.frozen = 'int8'", config
    plain = [role for role, table in config.optim.items() if table.name == "adamw"]
    if plain:
        smaller = {role: replace(config.optim[role], name="adamw8bit") for role in plain}
        text = " and ".join(f"optim.{role}.name = 'adamw8bit'" for role in plain)
        yield text, replace(config, optim={**config.optim, **smaller})


def allowed(config: Config, changed: Config) -> bool:
    """Return whether a change of [memory] goes further on the way from none to full, and can be had."""
    order = ("none", "selective", "full")
    back = order.index(changed.memory.checkpointing) < order.index(config.memory.checkpointing)
    return not back and not list(changed.memory.problems()) and not list(problems_of_memory(changed))


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


def largest_batch(config: Config, plan: Plan, gpu: GPU) -> int:
    """Return the largest micro-batch that fits; each sample more takes what the next one does."""
    size = config.run.batch_size
    more = make_plan(replace(config, run=replace(config.run, batch_size=size + 1)))
    if not plan.fits(gpu):
        return 0
    return size + (gpu.memory - plan.need) // max(more.need - plan.need, 1)
