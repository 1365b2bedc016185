"""The discriminator's heads and losses, and DMD with them, against an independent implementation in float64.

B batch, D width; logits and maps as in gan.py.
"""

from copy import deepcopy
from itertools import chain
from typing import Any

import mlp
import pytest
import torch
from score_definition import BASE, BATCH, FLOW_SHIFT, Definition, close, column, make_rng
from test_dmd import make
from tiny import make_config
from torch import Tensor, nn

from fastdmd import train
from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods import gan
from fastdmd.methods.dmd import Config
from fastdmd.models.net import Call
from fastdmd.run import build
from fastdmd.schedule import FlowSchedule

GAN: dict[str, Any] = {"gan_weight": 0.3, "gan_critic_weight": 0.4, "gan_layers": (0, 2)}
# another value of each key, and what else the discriminator depends on
CHANGES: list[dict[str, Any]] = [
    {},
    {"gan_weight": 0.7},
    {"gan_critic_weight": 0.9},
    {"gan_layers": (1,)},
    {"score_timestep_range": (0.5, 0.6)},
    {"score_window": "both"},
    {"grad_frames": 1},
    {"critic_train_guidance": 2.5},
    {"critic_guidance": 1.5},
]
STUDENT_ONLY = {"gan_weight", "grad_frames", "critic_guidance"}
CRITIC_ONLY = {"gan_critic_weight", "critic_train_guidance"}


# ------------------------------------------------------------------------------------- heads


def project(head: gan.Head, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(projection [B, D, ..], logits [B, ..]), written down once more with the channels last."""

    def layer(part: Any, x: Tensor) -> Tensor:
        convolution, norm, _ = part
        y = x @ convolution.weight[:, :, 0].T + convolution.bias
        B, *_, D = y.shape
        y = y.reshape(B, -1, groups, D // groups)
        mean = y.mean((1, 3), keepdim=True)
        y = (y - mean) / (((y - mean) ** 2).mean((1, 3), keepdim=True) + norm.eps).sqrt()
        y = y.reshape(x.shape) * norm.weight + norm.bias
        return torch.where(y > 0, y, 0.01 * y)

    h = layer(head.first, x.movedim(1, -1))
    h = h + layer(head.residual, h)
    return h.movedim(-1, 1), h @ head.last.weight[0, :, 0] + head.last.bias


@pytest.mark.parametrize(("width", "groups"), [(8, 8), (48, 24), (96, 32), (34, 17), (37, 1)])
@pytest.mark.parametrize("tokens", [(2, 3, 2), (3, 4)], ids=["video", "image"])
def test_heads_are_those_of_the_definition(width, groups, tokens):
    torch.manual_seed(0)
    heads = gan.Heads([width, width]).double()
    for norm in (m for m in heads.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    maps = [torch.randn(3, width, *tokens, dtype=torch.float64) for _ in range(2)]
    projections, logits = heads(maps)
    for head, x, projection, logit in zip(heads.heads, maps, projections, logits, strict=True):
        want, want_logit = project(head, x, groups)
        torch.testing.assert_close(projection, want.flatten(2))
        torch.testing.assert_close(logit, want_logit.flatten(1)[:, None])


def test_heads_do_not_mix_samples():
    torch.manual_seed(0)
    heads, x, y = gan.Heads([8]), torch.randn(2, 8, 2, 2), torch.randn(2, 8, 2, 2)
    [apart], [on_end] = heads([x])[1], gan.halves(heads([torch.cat([x, y])])[1])[0]
    torch.testing.assert_close(apart, on_end)


def test_a_block_that_is_not_there_is_told_with_its_key():
    net = Denoiser(mlp.Deep(0), FlowSchedule(1.0))
    assert len(gan.make_heads(net, (0, 2), "method.gan_layers").heads) == 2
    for layers in ((0, 3), (-1,)):
        with pytest.raises(ValueError, match=rf"^method.gan_layers: no block {layers[-1]} .* use 0 to 2$"):
            gan.make_heads(net, layers, "method.gan_layers")


# ------------------------------------------------------------------------------------ losses


def slopes(loss: Any, *logits: list[Tensor]) -> tuple[float, list[float]]:
    """Return the loss, and its gradient in every logit."""
    leaves = [[x.clone().requires_grad_() for x in maps] for maps in logits]
    value = loss(*leaves)
    value.backward()
    return float(value.detach()), [float(g) for x in chain(*leaves) for g in x.grad.flatten()]


def test_losses_and_their_slopes():
    """Give no slope in the hinge to a real far above and a fake far below the margin; softplus saturates."""
    fake, real = [torch.tensor([[[-2.0, 0.5]]]).double()], [torch.tensor([[[3.0, 0.25]]]).double()]
    value, slope = slopes(gan.hinge_d, fake, real)
    assert value == pytest.approx((0 + 1.5) / 2 + (0 + 0.75) / 2)
    assert slope == pytest.approx([0, 0.5, 0, -0.5])
    value, slope = slopes(gan.hinge_g, fake)
    assert value == pytest.approx((3 + 0.5) / 2)
    assert slope == pytest.approx([-0.5, -0.5])
    assert slopes(gan.hinge_g, real)[1] == pytest.approx([0, -0.5])

    sigmoid = {
        x: float(torch.tensor(x).double().sigmoid()) for x in (-3.0, -2.0, -0.5, -0.25, 0.25, 0.5, 2.0, 3.0)
    }
    log = {x: -float(torch.tensor(p).double().log()) for x, p in sigmoid.items()}  # softplus(-x)
    value, slope = slopes(gan.softplus_d, fake, real)
    assert value == pytest.approx((log[2.0] + log[-0.5]) / 2 + (log[3.0] + log[0.25]) / 2)
    assert slope == pytest.approx(
        [x / 2 for x in (sigmoid[-2.0], sigmoid[0.5], -sigmoid[-3.0], -sigmoid[-0.25])]
    )
    value, slope = slopes(gan.softplus_g, fake)
    assert value == pytest.approx((log[-2.0] + log[0.5]) / 2)
    assert slope == pytest.approx([-sigmoid[2.0] / 2, -sigmoid[-0.5] / 2])


def test_all_maps_count_alike():
    """Also where one has more positions."""
    maps = [torch.full((1, 1, 4), 3.0), torch.full((1, 1, 1), -1.0)]
    assert float(gan.hinge_g(maps)) == pytest.approx((0 + 2) / 2)


def test_feature_matching_pulls_the_fake_only():
    fake, real = (
        torch.tensor([[[1.0, 2.0]]], requires_grad=True),
        torch.tensor([[[0.0, 5.0]]], requires_grad=True),
    )
    loss = gan.feature_matching([fake], [real])
    loss.backward()
    assert float(loss.detach()) == pytest.approx((1 + 9) / 2)
    assert fake.grad.flatten().tolist() == pytest.approx([1.0, -3.0])
    assert real.grad is None


# ------------------------------------------------------------------------------ DMD with a GAN


def make_nets(layers: tuple[int, ...] = GAN["gan_layers"]) -> dict[str, Denoiser]:
    schedule = FlowSchedule(FLOW_SHIFT)
    nets = mlp.deep_nets(schedule, ("student", "teacher", "critic"))
    torch.manual_seed(7)
    return mlp.with_heads(nets, make(gan_weight=1.0, gan_layers=layers).make_heads(nets), schedule)


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


class WithGAN(Definition):
    """The step of DMD2 in float64."""

    def logits(self, x: Tensor, s: Tensor) -> Tensor:
        """Of all maps, [maps, B, positions]."""
        cond = Cond(BATCH.cond.text.double())
        _, maps = self.nets["critic"](x, 1000 * s, cond, Call(layers=self.keys["gan_layers"]))
        judged = [project(head, m, 8)[1] for head, m in zip(self.nets["disc"].heads, maps, strict=True)]
        return torch.stack([x.flatten(1) for x in judged])

    def student_gradient(self) -> Tensor:
        """Return the DMD loss, plus gan_weight mean softplus(-D) on the frames that carry it.

        D judges at a score time of its own.
        """
        x0_g, exit_t, next_t = self.rollout()
        self.rollout = lambda: (x0_g, exit_t, next_t)
        _, _, _, x0_fake, x0_real = self.student_scores()
        gap, p = (x0_fake - x0_real).detach(), (x0_g - x0_real).detach()
        direction = torch.stack([gap[i] / p[i].abs().mean() for i in range(4)])
        s = self.score_time(exit_t, next_t)
        carrying = x0_g.detach().clone()
        carrying[:, :, self.frames()] = x0_g[:, :, self.frames()]
        D = self.logits((1 - column(s)) * carrying + column(s) * self.normal(), s)
        loss = (x0_g * direction)[:, :, self.frames()].mean() + self.keys["gan_weight"] * softplus(-D).mean()
        for net in self.nets.values():
            net.zero_grad()
        loss.backward()
        return mlp.gradient(self.nets["student"])

    def critic_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, gradient of the critic, gradient of the heads)."""
        x0_g, exit_t, next_t = self.rollout()
        s, eps, x0_g = self.score_time(exit_t, next_t), self.normal(), x0_g.detach()
        z = (1 - column(s)) * x0_g + column(s) * eps
        real = (1 - column(s)) * BATCH.x0.double() + column(s) * self.normal()
        learned = self.guided_v("critic", z, s, self.keys["critic_train_guidance"]) - (eps - x0_g)
        judged = softplus(self.logits(z, s)).mean() + softplus(-self.logits(real, s)).mean()
        loss = learned.square().mean() + self.keys["gan_critic_weight"] * judged
        loss.backward()
        return loss.detach(), mlp.gradient(self.nets["critic"]), mlp.gradient(self.nets["disc"])


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_student_gradient_is_that_of_the_definition(change):
    keys = GAN | change
    nets = make_nets(keys["gan_layers"])
    loss, metrics = mlp.loss(make(**keys), "student", nets, BATCH, make_rng(), {})
    loss.backward()
    got = mlp.gradient(nets["student"].net)
    assert close(got, WithGAN(nets, make_rng(), **BASE | keys).student_gradient())
    if "gan_layers" not in change:  # other heads
        base = WithGAN(nets, make_rng(), **BASE | GAN).student_gradient()
        assert close(got, base) == (change.keys() <= CRITIC_ONLY)
    assert metrics.keys() == {"dmd_grad_abs", "normalizer", "score_gap", "gan_student"}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_critic_and_heads_learn_by_the_definition(change):
    """D's loss reaches the critic too: its hidden states are trained to tell."""
    keys = GAN | change
    nets = make_nets(keys["gan_layers"])
    loss, metrics = mlp.loss(make(**keys), "critic", nets, BATCH, make_rng("critic0"), {})
    loss.backward()
    value, critic, disc = WithGAN(nets, make_rng("critic0"), **BASE | keys).critic_gradients()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    assert close(mlp.gradient(nets["critic"].net), critic)
    assert close(mlp.gradient(nets["disc"].net), disc)
    if "gan_layers" not in change:
        _, base, _ = WithGAN(nets, make_rng("critic0"), **BASE | GAN).critic_gradients()
        assert close(mlp.gradient(nets["critic"].net), base) == (change.keys() <= STUDENT_ONLY)
    assert metrics.keys() == {"gan_critic"}


def test_every_key_has_a_case():
    assert {key for change in CHANGES for key in change} >= GAN.keys()


def test_dmd_itself_is_what_it_was():
    """With a weight of 0 to the bit, and the weight only adds."""
    nets = make_nets()
    for phase, added in (("student", "gan_student"), ("critic", "gan_critic")):
        plain, _ = mlp.loss(make(), phase, nets, BATCH, make_rng(phase), {})
        off, metrics = mlp.loss(make(gan_weight=0.0), phase, nets, BATCH, make_rng(phase), {})
        assert torch.equal(plain, off)
        assert added not in metrics
        on, metrics = mlp.loss(make(**GAN), phase, nets, BATCH, make_rng(phase), {})
        weight = GAN["gan_weight" if phase == "student" else "gan_critic_weight"]
        torch.testing.assert_close(on - weight * metrics[added], plain)
    method, roles = make(gan_weight=0.0), {"student": "train", "teacher": "frozen", "critic": "train"}
    assert method.config.roles == roles
    assert method.trains("critic") == ("critic",)
    assert make(**GAN).config.roles == {**roles, "disc": "heads"}


@pytest.mark.parametrize(("phase", "learns"), [("student", {"student"}), ("critic", {"critic", "disc"})])
def test_only_what_the_phase_trains_gets_a_gradient(phase, learns):
    nets, method = make_nets(), make(**GAN)
    assert set(method.trains(phase)) == learns
    for role, net in nets.items():
        net.net.requires_grad_(role in method.trains(phase))
    mlp.loss(method, phase, nets, BATCH, make_rng(), {})[0].backward()
    assert mlp.with_gradient(nets) == learns
    if phase == "critic":
        assert all(p.grad is not None for p in nets["disc"].net.parameters())


@pytest.mark.parametrize(("w", "parts"), [(1.0, 2), (2.5, 3)])
def test_one_call_of_the_critic_serves_its_loss_and_the_discriminator(w, parts):
    """Fake, real and, under guidance, the fake's other side."""
    nets, carry = make_nets(), {}
    mlp.loss(make(**GAN, critic_train_guidance=w), "critic", nets, BATCH, make_rng(), carry)
    [call] = nets["critic"].net.calls
    assert len(call.x_t) == 4 * parts
    assert torch.equal(call.model_t, call.model_t[:4].repeat(parts))
    assert len(call.model_t[:4].unique()) == 4
    text = [BATCH.cond.text, BATCH.cond.text, BATCH.uncond.text][:parts]
    assert torch.equal(call.text, torch.cat(text))
    fake, real = call.x_t[:4], call.x_t[4:8]
    sigma = call.model_t[:4].view(-1, 1, 1, 1, 1) / 1000
    eps = [(x - (1 - sigma) * x0) / sigma for x, x0 in ((fake, carry["x0_g"]), (real, BATCH.x0))]
    assert not torch.allclose(eps[0], eps[1])
    if parts == 3:
        assert torch.equal(call.x_t[8:], fake)


def test_data_without_latents_is_refused():
    bare = Batch(BATCH.cond, BATCH.uncond, mlp.SHAPE)
    with pytest.raises(ValueError, match=r"^method.gan_weight > 0 needs data with latents"):
        mlp.loss(make(**GAN), "critic", make_nets(), bare, make_rng(), {})
    assert make(**GAN).config.needs_latents
    assert not make().config.needs_latents


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({}, []),
        ({"gan_weight": -1.0}, ["gan_weight"]),
        ({"gan_weight": 0.0}, ["gan_layers"]),
        ({"gan_weight": 0.0, "gan_layers": ()}, []),
        ({"gan_critic_weight": 0.0}, ["gan_critic_weight"]),
        ({"gan_layers": ()}, ["gan_layers"]),
        ({"gan_layers": (2, 0)}, ["gan_layers"]),
        ({"gan_layers": (1, 1)}, ["gan_layers"]),
        ({"guidance": 1.0, "denoising_timesteps": ()}, ["denoising_timesteps"]),
    ],
    ids=str,
)
def test_problems_name_the_key(change, keys):
    assert [key for key, _ in Config(name="dmd", **BASE | GAN | change).problems()] == keys


def test_a_run_trains_its_discriminator(tmp_path):
    """Beside the critic, every step; the student only where it is its turn."""
    overrides = ("method.gan_weight=0.1", "method.gan_layers=[0]", "optim.disc.lr=1e-3")
    run = build(make_config(tmp_path, "dmd", *overrides))
    moved = []
    for _ in range(2):
        before = {role: deepcopy(run.nets[role].net.state_dict()) for role in run.optimizers}
        values = train.take_step(run)
        assert {"train/gan_critic", "train/grad_norm_disc"} <= values.keys()
        now = {role: run.nets[role].net.state_dict() for role in run.optimizers}
        moved.append(
            {role for role in now if any(not torch.equal(now[role][k], v) for k, v in before[role].items())}
        )
    assert moved == [{"student", "critic", "disc"}, {"critic", "disc"}]
