"""What a role's network is: an average, adapters that alone learn, a student that goes block by block."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tiny import ARCHITECTURE, make_config, write_toml
from torch import Tensor

from fastdmd import config as configs
from fastdmd import train
from fastdmd.evaluation import evaluate
from fastdmd.export import export_student
from fastdmd.models.family import Options
from fastdmd.models.lora import merged
from fastdmd.models.sdxl import folder as sdxl_folder
from fastdmd.models.wan import folder
from fastdmd.models.wan.causal import CausalWan
from fastdmd.models.wan.net import Wan
from fastdmd.rng import Rng
from fastdmd.run import Run, build


def parameters(run: Run, role: str) -> dict[str, Tensor]:
    """Return what a role's network is made of, as a network of its own."""
    return {name: p.detach().clone() for name, p in merged(run.nets[role].net, role).items()}


def learned(run: Run, role: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.nets[role].trainable.items()}


def two_samples() -> Rng:
    return Rng(0, 0, "data", range(2), "cpu")


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("how", ["lcm", "sdxl_lcm", "sdxl_lcm_lora"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_target_is_the_student_s_average_after_every_step(tmp_path, how, compute):
    run = build(make_config(tmp_path, how, f"precision.compute='{compute}'", "ema.start_step=0"))
    start = learned(run, "target")
    assert changed(start, learned(run, "student")) == set()
    for _ in range(2):
        train.take_step(run)
        assert run.ema
        target = learned(run, "target")
        assert changed({n: shadow.to(target[n]) for n, shadow in run.ema.shadow.items()}, target) == set()
        own = run.nets["target"].trainable.values()
        assert not [p for p in own if p.requires_grad or p.grad is not None]
    assert changed(target, learned(run, "student"))
    assert changed(start, target)


def test_a_student_s_own_start_is_the_student_s_and_its_average_s_only(tmp_path):
    config = write_toml(tmp_path, "lcm")
    other = Wan(ARCHITECTURE)
    folder.save(tmp_path / "other", ARCHITECTURE, other.state_dict())
    run = build(configs.load(config, [f"student.path='{tmp_path / 'other'}'"]))
    theirs = load_file(tmp_path / "wan" / "transformer" / "diffusion_pytorch_model.safetensors")
    ours = dict(other.state_dict())
    for role, start in {"student": ours, "target": ours, "teacher": theirs}.items():
        assert changed(parameters(run, role), start) == set(), role
    assert changed(ours, theirs)


@pytest.mark.parametrize("how", ["lcm_lora", "sdxl_lcm_lora"])
def test_adapters_are_all_that_learns_and_is_kept(tmp_path, how):
    run = build(make_config(tmp_path, how))
    net = run.nets["student"].net
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train.take_step(run)
    moved = changed(before, dict(net.named_parameters()))
    adapters = {name for name in before if ".lora_A.student." in name or ".lora_B.student." in name}
    average = {name.replace(".student.", ".target.") for name in adapters}
    assert moved & adapters
    assert moved <= adapters | average
    own = set(run.nets["student"].trainable)
    assert len(own) == len(adapters)
    assert own == set(run.optimizers["student"].masters) == set(run.ema.shadow if run.ema else ())
    assert {name for name, p in net.named_parameters() if p.requires_grad} == adapters


def test_modules_can_be_trained_whole_beside_adapters(tmp_path):
    run = build(make_config(tmp_path, "lcm_lora", 'lora.modules=["proj_out"]'))
    assert {"proj_out.weight", "proj_out.bias"} < set(run.optimizers["student"].masters)
    before = parameters(run, "student")
    train.take_step(run)
    assert "proj_out.bias" in changed(before, parameters(run, "student"))


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_an_export_of_adapters_is_merged_in_float32(tmp_path, weights):
    """Read a bfloat16 student: its rounded weights, and unrounded adapters that it averages or learns."""
    run = train.train(
        make_config(tmp_path, "lcm_lora", "precision.compute='bf16'", f"validation.weights='{weights}'")
    )
    export_student(run.folder, tmp_path / "out")
    out = dict(folder.load(tmp_path / "out").named_parameters())
    start = parameters(run, "teacher")
    assert run.ema
    kept = run.ema.shadow if weights == "ema" else run.optimizers["student"].masters
    found = {name.partition(".lora_")[0] for name in kept}
    assert found
    for name in found:
        A, B = (kept[f"{name}.lora_{side}.weight"] for side in "AB")
        merged = start[f"{name}.weight"].float() + 4.0 / 2 * B @ A
        torch.testing.assert_close(out[f"{name}.weight"], merged, rtol=1e-6, atol=1e-7)
        assert not torch.equal(merged, merged.bfloat16().float())


@pytest.mark.parametrize("how", ["lcm_lora", "sdxl_lcm_lora"])
def test_an_export_of_adapters_computes_what_the_student_does(tmp_path, how):
    """Merged, and beside it the adapters by themselves."""
    run = train.train(
        make_config(tmp_path, how, "validation.teacher_reference=false", "optim.student.lr=0.1")
    )
    export_student(run.folder, tmp_path / "out")
    batch = run.world.batch(two_samples())
    w = torch.full((2,), 2.0) if run.config.method.guidance_embedding else None
    out = tmp_path / "out"
    net = sdxl_folder.load(out, 256) if "sdxl" in how else folder.load(out)
    x, t = torch.randn(2, *run.world.latent_shape), torch.tensor([999.0, 500.0])
    cond = replace(batch.cond, guidance=w)
    with torch.no_grad(), evaluate.validation_weights(run):
        student, teacher = run.nets["student"], run.nets["teacher"]
        want = student.features(x, t, cond, ())[0]
        torch.testing.assert_close(net(x, t, cond).F, want, rtol=1e-4, atol=1e-4)
        start = teacher.features(x, t, batch.cond, ())[0]
        assert float((want - start).abs().max()) > 1e-2
    file = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert len(file) == len(run.optimizers["student"].masters)


def test_an_sdxl_student_opens_in_diffusers(tmp_path):
    run = train.train(make_config(tmp_path, "sdxl_lcm", "validation.teacher_reference=false"))
    export_student(run.folder, tmp_path / "out")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    assert unet.config.time_cond_proj_dim == 256
    assert StableDiffusionXLPipeline.load_config(tmp_path / "out")["scheduler"] == [
        "diffusers",
        "LCMScheduler",
    ]


def test_a_causal_student_is_trained_and_sampled_block_by_block(tmp_path, monkeypatch):
    run = build(make_config(tmp_path, "causal_sid"))
    kinds = {role: isinstance(net.net, CausalWan) for role, net in run.nets.items()}
    assert kinds == {"student": True, "teacher": False, "critic": False}
    videos = []
    real = CausalWan.start_video
    monkeypatch.setattr(
        CausalWan, "start_video", lambda net, shape: videos.append(tuple(shape)) or real(net, shape)
    )
    train.take_step(run)
    assert videos == [(2, 3, 4, 8, 8)]
    evaluate.sample(run, "student", run.world.prompts[:2], 0)
    assert len(videos) == 2


def test_causal_samples_are_those_of_the_cached_walk(tmp_path):
    """A later block does not change an earlier one, which a bidirectional sampler would."""
    run = build(make_config(tmp_path, "causal_sid"))
    cond = run.world.cond(run.world.prompts[:2])
    noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[:, :, 2:] += 1.0
    with torch.no_grad():
        first, second = (run.method.sample(run.nets, x, cond, cond, two_samples()) for x in (noise, other))
    assert torch.equal(first[:, :, :2], second[:, :, :2])
    assert not torch.equal(first[:, :, 2:], second[:, :, 2:])


def test_causal_samples_hold_their_context_at_its_noise(tmp_path):
    run = build(make_config(tmp_path, "causal_sid"))
    noisy = make_config(tmp_path, "causal_sid", "rollout.context_noise=0.3").make_method()
    cond = run.world.cond(run.world.prompts[:2])
    noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean, other = (m.sample(run.nets, noise, cond, cond, two_samples()) for m in (run.method, noisy))
    assert torch.equal(clean[:, :, :2], other[:, :, :2])
    assert not torch.allclose(clean[:, :, 2:], other[:, :, 2:])


@pytest.mark.parametrize(
    ("how", "student"),
    [
        ("lcm", Options()),
        ("causal_sid", Options(causal=True)),
        ("sdxl_lcm", Options(guidance_embedding=True)),
    ],
)
def test_options_by_role(tmp_path, how, student):
    config = configs.load(write_toml(tmp_path, how))
    assert config.role_options("student") == config.role_options("target") == student
    assert config.role_options("teacher") == config.role_options("critic") == Options()


def test_add_lora_refuses_a_name_that_is_none(tmp_path):
    config = make_config(tmp_path, "lcm_lora", 'lora.targets=["to_qq"]')
    with pytest.raises(ValueError, match=r"lora\.targets: no layer is called to_qq"):
        build(config)


RECOMPUTED = {"dmd": {"student", "critic"}, "causal_sid": {"student", "teacher", "critic"}}


@pytest.mark.parametrize("how", RECOMPUTED)
def test_checkpointing_recomputes_and_changes_nothing(tmp_path, how):
    """In frozen networks too, through which SiD's gradient passes."""
    read, calls = {}, {"none": Counter(), "full": Counter()}
    for memory, count in calls.items():
        run = build(make_config(tmp_path / memory, how, f"memory.checkpointing='{memory}'"))
        for role, net in run.nets.items():
            # before: a recomputation ends as soon as it has what the backward wants
            net.net.blocks[0].register_forward_pre_hook(
                lambda *_, role=role, count=count: count.update([role])
            )
        read[memory] = train.take_step(run)
    assert read["none"] == pytest.approx(read["full"], rel=1e-4)
    assert set(calls["full"] - calls["none"]) == RECOMPUTED[how]


def test_sdxl_has_noise_in_its_folder_and_no_frames(tmp_path):
    path = write_toml(tmp_path, "sdxl_dmd")
    with pytest.raises(configs.ConfigError, match=r"rollout\.grad_frames: the model makes images"):
        configs.load(path, ["rollout.grad_frames=1"])
    assert configs.load(path).make_schedule().flow_shift == 1
    other = shutil.copytree(tmp_path / "sdxl", tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    assert configs.load(path, [f"teacher.path='{other}'"]).teacher
    bare = shutil.copytree(tmp_path / "sdxl", tmp_path / "bare", ignore=shutil.ignore_patterns("scheduler"))
    assert configs.load(path, [f"critic.path='{bare}'"]).critic
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(
        configs.ConfigError, match=r"teacher\.path: its scheduler/ has .*v_prediction.*model\.path .*epsilon"
    ):
        configs.load(path, [f"teacher.path='{other}'"])
    shutil.rmtree(tmp_path / "sdxl" / "scheduler")
    with pytest.raises(configs.ConfigError, match=r"model\.path: .* has no scheduler/scheduler_config\.json"):
        configs.load(path)
