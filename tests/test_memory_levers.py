"""What [memory] gives up or moves changes no bit, and takes what it says."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURE, make_config, write_wan
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastdmd import config as configs
from fastdmd import train
from fastdmd.config import Config
from fastdmd.models.attention import Dense
from fastdmd.models.stream import Stream
from fastdmd.models.wan.layers import Block, WanConfig
from fastdmd.plan.step import trace
from fastdmd.run import Run, build

ROOT = Path(__file__).parents[1]
FULL, SELECTIVE = "memory.checkpointing='full'", "memory.checkpointing='selective'"
OFFLOAD, STREAM = "memory.offload='block_inputs'", "memory.stream_base=true"
VSA = ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'", "model.attention.critic='vsa'")
SID = "method.name='sid'"


def deep(here: Path, method: str, *overrides: str, layers: int = 4) -> Config:
    make_config(here, method)
    write_wan(here / "wan", replace(ARCHITECTURE, num_layers=layers))
    return configs.load(here / f"{method}.toml", overrides)


def state(run: Run) -> dict[str, Tensor]:
    """Return all that a run trains, and its average."""
    found = {f"{role}.{name}": x for role, each in run.optimizers.items() for name, x in each.masters.items()}
    return found | ({f"ema.{name}": x for name, x in run.ema.shadow.items()} if run.ema else {})


def same_steps(plain: Run, other: Run, steps: int = 2) -> None:
    for _ in range(steps):
        assert train.take_step(plain) == train.take_step(other)
    wanted, found = state(plain), state(other)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


CASES = {
    "dmd": ("dmd",),
    "dmd_sparse": ("dmd", *VSA),
    "lora_sparse": ("dmd_lora", *VSA),
    "sid_lora": ("dmd_lora", SID),
    "causal_sid": ("causal_sid",),
}


@pytest.mark.parametrize("lever", [(SELECTIVE,), (FULL, OFFLOAD), (SELECTIVE, OFFLOAD)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_is_kept_recomputed_or_on_the_host_changes_no_bit(tmp_path, case, lever):
    plain = build(deep(tmp_path / "plain", *CASES[case]))
    same_steps(plain, build(deep(tmp_path / "other", *CASES[case], *lever)))


# ------------------------------------------------------------------ selective

SHAPE = WanConfig(num_attention_heads=12, attention_head_dim=16, num_layers=1, ffn_dim=1120)  # 1.3B, / 8


def called(block: Block, L: int = 256) -> tuple[Tensor, tuple[Any, ...]]:
    D = SHAPE.width
    x = torch.randn(1, L, D, requires_grad=True)
    rope = torch.stack([torch.ones(L, 1, 16), torch.zeros(L, 1, 16)])[:, None].squeeze(1)
    return x, (torch.randn(1, 8, D), torch.randn(1, 6, 1, D) * 0.1, rope, Dense())


def kept(selective: bool) -> float:
    """Return what lives after the forward of a block, its output with it, in hidden states."""
    torch.manual_seed(0)
    block = Block(SHAPE, gated=False)
    block.selective = selective
    x, arguments = called(block)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = block(x, *arguments)
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in record.key_averages()) / x.nbytes


def test_a_selective_block_keeps_two_hidden_states():
    """Its output, and self-attention's with a log-sum-exp for each head and token."""
    assert kept(selective=False) > 25
    assert 2 <= kept(selective=True) < 2.2


class Ops(TorchDispatchMode):
    """Count attention ops by whether they are of self-attention, in a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_flash_attention_for_cpu" in func.name() and "backward" not in func.name():
            self.made["self" if args[0].shape[2] == args[1].shape[2] else "cross"] += 1
        return func(*args, **(kwargs or {}))


def test_a_selective_block_repeats_cross_attention_alone():
    block = Block(SHAPE, gated=False)
    x, arguments = called(block)
    counted = {}
    for selective in (False, True):
        block.selective = selective
        out = block(x, *arguments)
        with Ops() as ops:
            out.sum().backward()
        counted[selective] = dict(ops.made)
    assert counted == {False: {}, True: {"cross": 1}}


# ------------------------------------------------------------------ offload


def test_inputs_of_blocks_go_to_the_host_one_by_one(tmp_path):
    run = build(deep(tmp_path, "dmd_lora", FULL, OFFLOAD))
    train.take_step(run)  # the student's exit and two updates of the critic, of which one is in this step
    offload = run.nets["student"].net.offload
    assert offload is not None
    assert offload.held == 2 * 4
    last = offload.last
    assert last is not None
    assert last.ready is last.host is last.before is None  # nothing stays, on the device or the host


def test_a_plan_has_the_inputs_of_blocks_on_the_host(tmp_path):
    size = ("data.resolution=[24, 24]", "data.frames=6", "memory.guidance='two_calls'")
    peaks = {}
    for name, keys in {"device": (FULL,), "host": (FULL, OFFLOAD)}.items():
        phases = trace(deep(tmp_path / name, "dmd_lora", *size, *keys), None).phases
        peaks[name] = phases["student + critic: critic, backward"].by["kept graph"]
    x = 2 * 6 * 12 * 12 * 24 * 4
    assert peaks["device"] - peaks["host"] == 4 * x  # one a block; what is fetched is of the working set


# ------------------------------------------------------------------ stream


def slots_of(stream: Stream) -> list[tuple[int, int]]:
    return [(slot.data_ptr(), slot.data_ptr() + slot.nbytes) for slot in stream.slots]


class Watched:
    """Watch that a streamed block computes with weights in its own slot, forward and backward."""

    def __init__(self, net: Any) -> None:
        self.stream: Stream = net.stream
        self.seen: Counter[str] = Counter()
        for index, block in enumerate(net.blocks):
            block.register_forward_pre_hook(lambda block, _, index=index: self.check(index, block, "forward"))
            block.ffn.net[2].register_full_backward_hook(
                lambda layer, *_, index=index, block=block: self.check(index, block, "backward")
            )

    def check(self, index: int, block: nn.Module, when: str) -> None:
        first, last = slots_of(self.stream)[index % 2]
        for name, p in block.named_parameters():
            inside = first <= p.data_ptr() < last
            assert inside == (".lora_" not in name), (when, index, name)
        others = {i for i in range(len(self.stream.host)) if i not in self.stream.at}
        for i in others:
            for p in self.stream.parameters[i]:
                assert p.data_ptr() >= self.stream.host[i].data_ptr()
        self.seen[when] += 1


@pytest.mark.parametrize("layers", [3, 4])
def test_two_blocks_at_most_are_on_the_device(tmp_path, layers):
    run = build(deep(tmp_path, "dmd_lora", FULL, STREAM, layers=layers))
    net = run.nets["student"].net
    watched = Watched(net)
    for _ in range(2):
        train.take_step(run)
    assert watched.seen["backward"] > 0
    assert watched.seen["forward"] > watched.seen["backward"]
    assert net.stream.most == 2
    assert net.stream.loads <= watched.seen["forward"] + 2  # one ahead is one that would come anyway


STREAMED = {
    "dmd": ("dmd",),
    "lora_sparse": ("dmd_lora", *VSA),
    "lora_bf16": ("dmd_lora", "precision.compute='bf16'"),
    "sid": ("dmd", SID),
    "sid_lora": ("dmd_lora", SID),
    "causal_lora": ("dmd_lora", SID, "rollout={mode='causal', frames_per_block=2}", "data.frames=4"),
    "lcm_lora": ("lcm_lora",),
}


@pytest.mark.parametrize("case", STREAMED)
def test_a_streamed_run_is_the_resident_one(tmp_path, case):
    """With the inputs of blocks on the host too."""
    plain = build(deep(tmp_path / "plain", *STREAMED[case]))
    other = build(deep(tmp_path / "other", *STREAMED[case], FULL, STREAM, OFFLOAD))
    streams = [net.stream for net in {d.net for d in other.nets.values()} if net.stream is not None]
    assert len(streams) == 1
    same_steps(plain, other)
    assert streams[0].most == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_dmd", "tiny_sid", "tiny_selfforcing_dmd"])
def test_the_demos_streamed_and_offloaded_are_the_resident_ones(tmp_path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    lora = (
        "student.train='lora'",
        "critic.train='lora'",
        "lora={rank=8, alpha=8.0, targets=['to_q', 'to_k', 'to_v', 'to_out.0', 'ffn.net.2']}",
    )
    runs = [
        build(configs.load(f"configs/{name}.toml", [f"run.output_dir='{tmp_path}'", *lora, *keys]))
        for keys in ((), (FULL, STREAM, OFFLOAD))
    ]
    same_steps(*runs)


def test_a_streamed_run_is_exported_and_goes_on(tmp_path):
    config = deep(tmp_path, "dmd_lora", FULL, STREAM, "run.max_steps=2")
    run = train.train(config)
    longer = replace(config, run=replace(config.run, max_steps=4))
    resident = replace(longer, memory=replace(longer.memory, stream_base=False))
    assert train.train(resident).step == 4
    assert run.step == 2


def test_a_plan_has_two_blocks_of_a_streamed_base(tmp_path):
    weights = {}
    for layers in (4, 6):
        for name, keys in {"resident": (FULL,), "streamed": (FULL, STREAM)}.items():
            fixed = trace(deep(tmp_path / f"{name}{layers}", "dmd_lora", *keys, layers=layers), None).fixed
            weights[name, layers] = fixed["weights, student + teacher + critic"]
    block = (weights["resident", 6] - weights["resident", 4]) / 2
    assert weights["streamed", 4] == pytest.approx(weights["streamed", 6], abs=512)
    saved = weights["resident", 4] - weights["streamed", 4]
    assert saved == pytest.approx(2 * block, rel=0.2)  # small tensors are rounded to 512 bytes where apart


def test_blocks_that_differ_are_not_streamed():
    with pytest.raises(ValueError, match=r"^memory.stream_base: the network's blocks are not alike"):
        Stream([nn.Linear(3, 3), nn.Linear(3, 4)], torch.device("cpu"))


# ------------------------------------------------------------------ feed-forward in chunks


@pytest.mark.parametrize("keys", [(), (FULL,)])
def test_a_feed_forward_in_chunks_is_the_whole_one(tmp_path, keys):
    plain = build(deep(tmp_path / "plain", "dmd_lora"))
    other = build(deep(tmp_path / "other", "dmd_lora", "memory.ffn_chunks=5", *keys))
    chunks = []
    ffn = other.nets["student"].net.blocks[0].ffn
    ffn.net[0].register_forward_pre_hook(lambda _, args: chunks.append(args[0].shape[1]))
    first, second = train.take_step(plain), train.take_step(other)
    assert first.keys() == second.keys()
    assert all(second[name] == pytest.approx(first[name], rel=1e-4) for name in first)
    assert max(chunks) == -(-48 // 5)


def test_chunks_take_less_of_the_working_set(tmp_path):
    size = ("data.resolution=[24, 24]", "data.frames=6", FULL)
    wide = replace(ARCHITECTURE, num_layers=2, ffn_dim=960)
    peaks = []
    for n in (1, 8):
        here = tmp_path / str(n)
        make_config(here, "dmd_lora")
        write_wan(here / "wan", wide)
        config = configs.load(here / "dmd_lora.toml", [*size, f"memory.ffn_chunks={n}"])
        peaks.append(max(phase.peak for phase in trace(config, None).phases.values()))
    assert peaks[1] < 0.7 * peaks[0]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("dmd", (OFFLOAD,), "memory.offload: blocks keep more than their inputs; set memory.checkpointing"),
        ("dmd", (STREAM, SELECTIVE), "memory.stream_base: a block's weights are gone in the backward; set"),
        ("flow", (STREAM, FULL), "memory.stream_base: every network is trained whole; set student.train"),
        ("dmd", ("memory.ffn_chunks=0",), "memory.ffn_chunks: 0 is not positive"),
        ("sdxl_dmd", (SELECTIVE,), "memory.checkpointing: 'selective' is for video"),
        ("sdxl_dmd", (STREAM, FULL), "memory.stream_base: is for blocks that are alike"),
        ("sdxl_dmd", (OFFLOAD, FULL), "memory.offload: is for blocks that are alike"),
        ("dmd", ("memory.checkpointing='some'",), "memory.checkpointing: 'some' is not one of"),
    ],
)
def test_what_memory_refuses(tmp_path, method, keys, message):
    with pytest.raises(ValueError, match="memory") as e:
        make_config(tmp_path, method, *keys)
    assert message in str(e.value)
