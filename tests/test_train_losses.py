"""The losses of a run: every name builds, learns and repeats; wrong options are one clear line."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("pytorch_metric_learning")

from nivmf_fast.losses import PAPER_LOSSES
from train.config import INHERITED_LOSSES, MINERS, LossConfig, RunError
from train.losses import MetricLearningLoss, build_loss
from train.metric_learning import LOSSES

P, D, B = 6, 8, 12
WITH_PROXIES = ("proxy-anchor", "proxy-nca", "normalized-softmax", "arcface", "soft-triple")
WITH_MINER = tuple(name for name in INHERITED_LOSSES if name not in WITH_PROXIES)


def build(name: str, seed: int = 0, **options: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    options = {"loss_options": "{}", "miner_options": "{}"} | options
    return build_loss(replace(LossConfig(name=name), **options), P, D)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    embeddings = torch.randn(B, D, generator=g)
    return embeddings, torch.arange(B) // 2 % P


def test_losses_with_proxies_take_no_miner() -> None:
    assert {name for name, entry in LOSSES.items() if entry.takes_miner} == set(WITH_MINER)


@pytest.mark.parametrize("name", [*PAPER_LOSSES, *INHERITED_LOSSES])
def test_every_loss_is_called_alike(name: str) -> None:
    e, y = batch()
    loss = build(name)
    e.requires_grad_()
    loss(e, y, seed=0, image_offset=0).backward()
    assert e.grad.isfinite().all() and (e.grad != 0).any()


@pytest.mark.parametrize("name", INHERITED_LOSSES)
def test_descent_solves_a_batch(name: str) -> None:
    e, y = batch()
    loss = build(name)
    embeddings = torch.nn.Parameter(e)
    groups = loss.param_groups(
        0.05, proxy_lr_mult=2.0, concentration_lr_mult=1.0, temperature_lr_mult=1.0
    )
    optimiser = torch.optim.Adam([{"params": [embeddings], "lr": 0.05}, *groups])
    first = last = loss(embeddings, y, seed=0, image_offset=0).item()
    for step in range(40):
        optimiser.zero_grad()
        value = loss(embeddings, y, seed=step)
        value.backward()
        optimiser.step()
        last = value.item()
    assert last < 0.85 * first
    assert embeddings.isfinite().all()


@pytest.mark.parametrize("name", ["el-nivmf", "nivmf"])
def test_precision_and_workspace_reach_their_loss(name: str) -> None:
    options = build(name, precision="fast", workspace=1 << 20).kernel_options
    assert (options["precision"], options["workspace"]) == ("fast", 1 << 20)


def test_the_papers_options_reach_their_loss() -> None:
    loss = build(
        "nivmf",
        bindev=True,
        bindev_alpha=2.0,
        bindev_delta=0.3,
        bindev_axis="classes",
        negative_share=0.5,
        guidance_weight=0.1,
        temperature=0.25,
        learn_temperature=False,
    )
    assert (loss.form, loss.bindev_alpha, loss.bindev_delta) == ("bindev", 2.0, 0.3)
    assert (loss.bindev_axis, loss.negative_share, loss.guidance_weight) == ("classes", 0.5, 0.1)
    assert float(loss.temperature) == pytest.approx(0.25) and loss.form == "bindev"
    assert not any("temperature" in name for name, _ in loss.named_parameters())
    assert build("b-vmf").rho == 0.5 and build("el-vmf").rho == 1.0
    assert build("el-nivmf", n_samples=3).n_samples == 3


# --- against the definitions: the released code's parameters, in pytorch-metric-learning's reading


def test_proxy_anchor_is_its_definition() -> None:
    loss, (e, y) = build("proxy-anchor"), batch()
    y = y.clamp(max=3)  # two classes without images
    cosine = normalize(e) @ normalize(loss.loss.proxies).T
    own = torch.nn.functional.one_hot(y, P).bool()
    attract = torch.where(own, torch.exp(-32 * (cosine - 0.1)), 0).sum(0).log1p()
    repel = torch.where(own, 0, torch.exp(32 * (cosine + 0.1))).sum(0).log1p()
    torch.testing.assert_close(loss(e, y), attract.sum() / 4 + repel.mean())


def test_proxy_nca_is_its_definition() -> None:
    """Embeddings and proxies of length 3."""
    loss, (e, y) = build("proxy-nca"), batch()
    distance = torch.cdist(3 * normalize(e), 3 * normalize(loss.loss.proxies)).square()
    torch.testing.assert_close(loss(e, y), torch.nn.functional.cross_entropy(-distance, y))


def test_arcface_is_its_definition() -> None:
    """An angular margin of 0.5 radians, a scale of 16."""
    loss, (e, y) = build("arcface"), batch()
    cosine = normalize(e) @ normalize(loss.loss.W.T).T
    own = torch.nn.functional.one_hot(y, P).bool()
    logits = 16 * torch.where(own, torch.cos(cosine.acos() + 0.5), cosine)
    assert (cosine[own].acos() < math.pi - 0.5).all()
    torch.testing.assert_close(loss(e, y), torch.nn.functional.cross_entropy(logits, y))


def test_the_pair_losses_are_their_definitions() -> None:
    e, y = batch()
    x = normalize(e)
    distance = torch.cdist(x, x)
    same, other = y[:, None] == y, y[:, None] != y
    same = same & ~torch.eye(B, dtype=torch.bool)
    triplets = same[:, :, None] & other[:, None, :]

    def mean_above_zero(values: torch.Tensor) -> torch.Tensor:
        return values[values > 0].mean()

    gap = (distance[:, :, None] - distance[:, None, :] + 0.2)[triplets].relu()
    torch.testing.assert_close(build("triplet")(e, y), mean_above_zero(gap))
    near, far = distance[same], (1 - distance[other]).relu()
    contrastive = mean_above_zero(near) + mean_above_zero(far)
    torch.testing.assert_close(build("contrastive")(e, y), contrastive)

    cosine = x @ x.T
    attract = torch.where(same, torch.exp(-2 * (cosine - 0.5)), 0).sum(1).log1p() / 2
    repel = torch.where(other, torch.exp(40 * (cosine - 0.5)), 0).sum(1).log1p() / 40
    torch.testing.assert_close(build("multi-similarity")(e, y), (attract + repel).mean())

    raw = torch.cdist(e, e)
    pull = torch.where(same, raw, -math.inf).logsumexp(1)
    push = torch.where(other, 1 - raw, -math.inf).logsumexp(1)
    penalty = 0.005 * e.norm(dim=1).mean()
    torch.testing.assert_close(build("lifted")(e, y), (pull + push).relu().mean() + penalty)

    beta = torch.full((B, B, B), 1.2)
    pull = (distance[:, :, None] - beta + 0.2).relu().expand(B, B, B)[triplets]
    push = (beta - distance[:, None, :] + 0.2).relu().expand(B, B, B)[triplets]
    expected = (pull + push).sum() / ((pull > 0).sum() + (push > 0).sum())
    torch.testing.assert_close(build("margin")(e, y), expected)

    snr = (x[:, None] - x).var(2) / x.var(1)[:, None]
    gap = (snr[:, :, None] - snr[:, None, :] + 0.2)[triplets].relu()
    zero_mean = 0.005 * e.sum(1).abs().mean()
    torch.testing.assert_close(build("snr")(e, y), mean_above_zero(gap) + zero_mean)


def test_the_normalized_softmax_and_soft_triple_are_their_definitions() -> None:
    e, y = batch()
    loss = build("normalized-softmax")
    logits = normalize(e) @ normalize(loss.loss.W, dim=0) / 0.05
    torch.testing.assert_close(loss(e, y), torch.nn.functional.cross_entropy(logits, y))

    loss = build("soft-triple")
    centres = normalize(loss.loss.fc, dim=0)
    s = (normalize(e) @ centres).view(B, P, 2)
    relaxed = (torch.softmax(s / 0.1, 2) * s).sum(2)
    logits = 8 * (relaxed - 0.01 * torch.nn.functional.one_hot(y, P))
    pairs = (centres.T[::2] * centres.T[1::2]).sum(1)
    penalty = 0.2 * torch.sqrt(2 - 2 * pairs).sum() / (2 * P)
    expected = torch.nn.functional.cross_entropy(logits, y) + penalty
    torch.testing.assert_close(loss(e, y), expected)


# --- what a run needs of them


@pytest.mark.parametrize("name", INHERITED_LOSSES)
def test_they_are_computed_in_float32_under_autocast(name: str) -> None:
    loss, (e, y) = build(name), batch()
    half = e.bfloat16()
    plain = loss(half.float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(half, y)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=1e-6)
    assert all(p.dtype == torch.float32 for p in loss.parameters())


@pytest.mark.parametrize("name", INHERITED_LOSSES)
def test_param_groups_hold_every_parameter_without_weight_decay(name: str) -> None:
    loss = build(name)
    groups = loss.param_groups(0.1, proxy_lr_mult=3.0, concentration_lr_mult=5.0)
    held = [p for group in groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in loss.parameters()]
    assert bool(held) == (name in (*WITH_PROXIES, "margin"))
    assert all(g["lr"] == pytest.approx(0.3) and g["weight_decay"] == 0 for g in groups)
    assert not hasattr(loss, "temperature") and not loss.decomposes


@pytest.mark.parametrize("name", WITH_PROXIES)
def test_warmstart_turns_proxies_to_their_class_means(name: str) -> None:
    loss, (e, y) = build(name), batch()
    y = y.clamp(max=3)

    def proxies() -> torch.Tensor:
        weight = getattr(loss.loss, "W", None)
        return (
            loss.loss.fc.T
            if name == "soft-triple"
            else (loss.loss.proxies if weight is None else weight.T)
        )

    before = proxies().detach().clone()
    loss.warmstart(e, y)
    after = proxies().detach()
    if name == "soft-triple":
        assert torch.equal(after, before)
        return
    for j in range(4):
        mean = normalize(normalize(e[y == j]).mean(0), dim=0)
        torch.testing.assert_close(normalize(after[j], dim=0), mean)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    assert torch.equal(after[4:], before[4:])


@pytest.mark.parametrize("name", WITH_MINER)
def test_warmstart_without_proxies_does_nothing(name: str) -> None:
    loss = build(name)
    before = copy.deepcopy(loss.state_dict())
    loss.warmstart(*batch())
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize("miner", [m for m in MINERS if m != "none"])
@pytest.mark.parametrize("name", WITH_MINER)
def test_every_miner_serves_every_loss_of_tuples(name: str, miner: str) -> None:
    loss, (e, y) = build(name, miner=miner), batch()
    e.requires_grad_()
    value = loss(e, y, seed=0)
    value.backward()
    assert value.isfinite() and e.grad.isfinite().all()


def test_a_miner_changes_the_tuples() -> None:
    e, y = batch()
    values = {
        miner: build("triplet", miner=miner)(e, y, seed=0).item()
        for miner in ("none", "semihard", "hard", "easy-hard", "batch-hard", "distance-weighted")
    }
    assert len(set(values.values())) == len(values)


def test_the_seed_alone_decides_what_a_miner_draws() -> None:
    loss, (e, y) = build("triplet", miner="distance-weighted"), batch()
    before = torch.get_rng_state()
    first = [loss(e, y, seed=seed).item() for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers moved"
    torch.rand(3)
    assert first == [loss(e, y, seed=torch.tensor(seed)).item() for seed in range(8)]
    assert len(set(first)) > 1
    assert len({loss(e, y).item() for _ in range(8)}) > 1


@pytest.mark.parametrize("name", INHERITED_LOSSES)
def test_a_batch_of_one_class_is_no_error(name: str) -> None:
    loss, (e, _) = build(name), batch()
    e.requires_grad_()
    value = loss(e, torch.zeros(B, dtype=torch.int64))
    value.backward()
    assert value.isfinite()


def test_options_override_the_defaults() -> None:
    e, y = batch()
    wide = build("triplet", loss_options='{"margin": 0.9}')
    assert wide.loss.margin == 0.9 and wide(e, y) != build("triplet")(e, y)
    miner = build("triplet", miner="angular", miner_options='{"angle": 30}').miner
    assert miner.angle == pytest.approx(math.radians(30))
    assert not list(build("margin", loss_options='{"learn_beta": false}').parameters())
    plain = build("soft-triple", loss_options='{"weight_reg_weight": 0}')
    assert plain.loss.weight_regularizer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "cos", "miner": "hard"},
            "--miner hard goes with triplet, margin, .*not with --l",
        ),
        ({"name": "arcface", "miner": "all"}, "--miner all goes with .*not with --loss arcface"),
        ({"name": "triplet", "miner_options": '{"a": 1}'}, '--miner-options {"a": 1} need a --min'),
        (
            {"name": "cos", "loss_options": '{"a": 1}'},
            "--loss-options are for inherited losses and",
        ),
        ({"name": "triplet", "guidance_weight": 1.0}, "--loss triplet needs --guidance-weight 0"),
        ({"name": "triplet", "bindev": True}, "--loss triplet needs --no-bindev"),
        ({"name": "snr", "negative_share": 0.5}, "--loss snr needs --negative-share 1"),
        (
            {"name": "triplet", "loss_options": '{"margn": 1}'},
            r"--loss-options of triplet: unknown 'margn' \(did you mean margin\?\); it accepts "
            "margin, smooth_loss, swap, triplets_per_anchor$",
        ),
        (
            {"name": "triplet", "loss_options": '{"margin": "a"}'},
            "margin is 'a', but must be as 0.2",
        ),
        ({"name": "triplet", "loss_options": '{"swap": 1}'}, "swap is 1, but must be as false is"),
        ({"name": "margin", "loss_options": '{"num_classes": 3}'}, "unknown 'num_classes'"),
        (
            {"name": "triplet", "miner": "hard", "miner_options": '{"epsilon": 1}'},
            "--miner-options of hard: unknown 'epsilon'; it accepts margin, type_of_triplets",
        ),
        (
            {"name": "snr", "miner": "easy-hard", "miner_options": '{"pos_strategy": "x"}'},
            "--miner-options of easy-hard: .*must be one of",
        ),
        ({"name": "nivmf", "normalizer": "x"}, "loss nivmf: normalizer must be 'exact' or"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        build(**options)


# --- one's own

OWN = """
import torch

class Plain(torch.nn.Module):
    def __init__(self, num_classes, embed_dim, scale=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_classes, embed_dim))
        self.scale = scale
    def forward(self, embeddings, labels):
        assert embeddings.dtype == torch.float32
        return torch.nn.functional.cross_entropy(self.scale * embeddings @ self.weight.T, labels)

class Full(Plain):
    decomposes = True
    temperature = torch.tensor(0.5)
    def forward(self, embeddings, labels, *, seed):
        return super().forward(embeddings, labels) * 0 + seed
    def param_groups(self, lr, proxy_lr_mult):
        return [{"params": [self.weight], "lr": 7 * lr * proxy_lr_mult}]
    def warmstart(self, embeddings, labels):
        self.weight.data.zero_()

def no_module(num_classes, embed_dim):
    return "x"

def broken(num_classes, embed_dim):
    raise TypeError("bad argument type within")

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own")
def test_a_loss_of_ones_own_gets_what_it_lacks() -> None:
    e, y = batch()
    loss = build("own_losses:Plain", loss_options=json.dumps({"scale": 2.0}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(e.bfloat16(), y, seed=4, image_offset=0)
    expected = torch.nn.functional.cross_entropy(torch.zeros(B, P), y)
    torch.testing.assert_close(value, expected)
    (group,) = loss.param_groups(0.1, proxy_lr_mult=2.0, temperature_lr_mult=1.0)
    assert group["lr"] == pytest.approx(0.2) and group["params"] == [loss.inner.weight]
    loss.warmstart(e, y)
    assert (loss.inner.weight == 1).all()
    assert not loss.decomposes and not hasattr(loss, "temperature")


@pytest.mark.usefixtures("own")
def test_a_loss_of_ones_own_may_have_all_of_it() -> None:
    e, y = batch()
    loss = build("own_losses:Full")
    assert loss(e, y, seed=4, image_offset=2) == 4
    (group,) = loss.param_groups(0.1, proxy_lr_mult=2.0, temperature_lr_mult=1.0)
    assert group["lr"] == pytest.approx(1.4)
    loss.warmstart(e, y)
    assert (loss.inner.weight == 0).all()
    assert loss.decomposes and loss.temperature == 0.5


def test_a_class_of_the_library_is_a_factory() -> None:
    e, y = batch()
    loss = build("nivmf_fast:VMFProductKernelLoss", loss_options='{"rho": 0.7}')
    assert loss.inner.rho == 0.7
    names = [g["name"] for g in loss.param_groups(0.1, proxy_lr_mult=2.0, temperature_lr_mult=1.0)]
    assert names == ["proxies", "concentration", "temperature"]
    assert loss(e, y, seed=0, image_offset=0).isfinite()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_lossses:Plain", "{}", "No module named 'own_lossses'; is it installed, or in this"),
        ("own_losses:Plane", "{}", r"own_losses has no function Plane \(did you mean Plain\?\)"),
        ("own_losses:number", "{}", "own_losses has no function number"),
        ("own_losses:", "{}", "must be as in package.module:factory"),
        ("own_losses:no_module", "{}", "must return a torch.nn.Module, but returned a str"),
        (
            "own_losses:Plain",
            '{"scal": 1}',
            r"is Plain\(num_classes, embed_dim, scale=1.0\): .*scal'",
        ),
    ],
)
def test_a_loss_of_ones_own_that_cannot_be_built(name: str, options: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        build(name, loss_options=options)


@pytest.mark.usefixtures("own")
def test_a_defect_within_ones_own_loss_keeps_its_trace() -> None:
    with pytest.raises(TypeError, match="bad argument type within"):
        build("own_losses:broken")


def test_the_adapter_is_a_plain_module() -> None:
    loss = build("proxy-anchor")
    other = build("proxy-anchor", seed=1)
    assert isinstance(loss, MetricLearningLoss)
    assert loss(*batch()) != other(*batch())
    other.load_state_dict(loss.state_dict())
    assert loss(*batch()) == other(*batch())
