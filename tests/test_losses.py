"""The losses as modules: values from the definitions, gradients, training behaviour, errors."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nivmf_fast
from nivmf_fast import (
    ELNivMFLoss,
    NivMFLoss,
    NonIsotropicVonMisesFisher,
    VMFProductKernelLoss,
    VonMisesFisher,
    distributed,
)
from nivmf_fast.losses import PAPER_LOSSES

P, D, B = 7, 6, 10


@pytest.fixture(params=PAPER_LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(3)
    kind, own = PAPER_LOSSES[name]
    own = {**own, "n_samples": 8} if kind is ELNivMFLoss else own
    loss = kind(P, D, **{"temperature": 0.5, "concentration": 4.0, **own, **options}).double()
    if loss.concentration is not None:  # classes that differ
        with torch.no_grad():
            loss.concentration.mul_(
                torch.linspace(0.5, 2, loss.concentration.numel()).view_as(loss.concentration)
            )
    return loss


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    embeddings = 3 * torch.randn(B, D, generator=g, dtype=torch.float64)
    return embeddings, torch.randint(P, (B,), generator=g)


class CalledOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op.namespace == "nivmf_fast":
            self.names.add(op.name().removeprefix("nivmf_fast::"))
        return op(*args, **(kwargs or {}))


def test_a_loss_names_the_ops_that_it_calls(name: str) -> None:
    loss, (e, y) = make(name), batch()
    with CalledOps() as called:
        loss(e, y, seed=5)
    assert called.names == set(loss.ops)


def test_class_parallel_forms_are_public_and_named_after_their_losses() -> None:
    for kind, parallel in distributed.CLASS_PARALLEL.items():
        assert issubclass(parallel, kind)
        assert parallel.__name__ == f"ClassParallel{kind.__name__}"
        assert getattr(distributed, parallel.__name__) is parallel
    forms = {parallel.__name__ for parallel in distributed.CLASS_PARALLEL.values()}
    assert set(distributed.__all__) == forms | {"ClassParallelLoss", "CLASS_PARALLEL"}


def test_similarities_are_those_of_the_paper(name: str) -> None:
    """Each from its definition, by the distributions: differences over proxies, in which the
    constants that a softmax does not see are gone."""
    loss, (e, _) = make(name), batch()
    mu, k = torch.nn.functional.normalize(e, dim=-1), e.norm(dim=-1)
    T = loss.temperature.detach()
    loc = torch.nn.functional.normalize(loss.proxies.detach(), dim=-1)
    kappa = None if loss.concentration is None else loss.concentration.detach()
    if name == "el-nivmf":
        x = nivmf_fast.vmf_rsample(mu, k, 8, seed=5)
        log_p = NonIsotropicVonMisesFisher(loc, kappa).log_prob(x[:, :, None])
        expected = torch.logsumexp(log_p / T, 0)
    elif name == "nivmf":
        expected = NonIsotropicVonMisesFisher(loc, kappa).log_prob(mu[:, None]) / T
    elif name in ("el-vmf", "b-vmf"):
        rho = 1.0 if name == "el-vmf" else 0.5
        x = nivmf_fast.HypersphericalUniform(D, dtype=torch.float64).rsample((400_000,), seed=0)
        image = VonMisesFisher(mu[:2, None], k[:2, None]).log_prob(x)
        proxy = VonMisesFisher(loc[:, None], kappa[:, None]).log_prob(x)
        log_integral = torch.logsumexp(rho * (image[:, None] + proxy), -1)
        expected = log_integral / T
    elif name == "kl-vmf":
        p, q = VonMisesFisher(mu[:, None], k[:, None]), VonMisesFisher(loc, kappa)
        expected = -torch.distributions.kl_divergence(p, q) / T
    elif name == "l2":
        expected = -torch.cdist(e, kappa[:, None] * loc).square() / T
    else:
        expected = mu @ loc.T / T
    s = loss.similarity(e, seed=5).detach()
    tolerance = 0.3 if name in ("el-vmf", "b-vmf") else 1e-9  # Monte Carlo integral, two images
    difference = (s - s[:, :1])[: len(expected)] - (expected - expected[:, :1])
    assert difference.abs().max() < tolerance


def test_similarities_are_relative_to_the_uniform_distribution(name: str) -> None:
    """In absolute terms, with which a binomial deviance compares its margins."""
    loss, (e, _) = make(name), batch()
    mu, k, T = torch.nn.functional.normalize(e, dim=-1), e.norm(dim=-1), loss.temperature.detach()
    loc = loss.directions.detach()
    kappa = None if loss.concentration is None else loss.concentration.detach()
    uniform = nivmf_fast.HypersphericalUniform(D, dtype=torch.float64).log_prob(mu[0])
    if name == "el-nivmf":
        x = nivmf_fast.vmf_rsample(mu, k, 8, seed=5)
        log_p = NonIsotropicVonMisesFisher(loc, kappa).log_prob(x[:, :, None]) - uniform
        expected = torch.logsumexp(log_p / T, 0) - math.log(8)
    elif name == "nivmf":
        density = NonIsotropicVonMisesFisher(loc, kappa).log_prob(mu[:, None])
        expected = (density - uniform) / T
    elif name in ("el-vmf", "b-vmf"):
        ppk = nivmf_fast.vmf_log_ppk(mu, k, loc, kappa, loss.rho)
        # of v / u in place of v, integrated under the uniform distribution u
        expected = (ppk + (1 - 2 * loss.rho) * uniform) / T
    elif name == "kl-vmf":
        expected = -nivmf_fast.vmf_kl(mu, k, loc, kappa) / T
    elif name == "l2":
        expected = -torch.cdist(e, kappa[:, None] * loc).square() / T
    else:
        expected = mu @ loc.T / T
    torch.testing.assert_close(loss.similarity(e, seed=5).detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"normalizer": "released"}, {"temperature_outside": True}])
def test_similarities_move_with_the_concentrations(options: dict[str, object]) -> None:
    """Halving all of them changes s_ij as it changes the library's densities."""
    e, _ = batch()
    values = []
    for factor in (1.0, 0.5):
        loss = make("el-nivmf", **options)
        with torch.no_grad():
            loss.concentration.mul_(factor)
        loc, k = torch.nn.functional.normalize(e, dim=-1), e.norm(dim=-1)
        x = nivmf_fast.vmf_rsample(loc, k, 8, seed=5)
        proxies = loss.directions, loss.concentrations, loss.temperature
        values.append(loss.similarity(e, seed=5) - nivmf_fast.log_ppk(x, *proxies, **options))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(values[0], values[0][:1, :1].expand(B, P), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["el-nivmf", "nivmf", "el-vmf"])
def test_logits_keep_their_digits_in_float32(name: str) -> None:
    """With the constant of the density they would be near 289,000, where float32 has steps of
    0.03."""
    D = 512
    torch.manual_seed(0)
    loss = {
        "el-nivmf": lambda: ELNivMFLoss(P, D, n_samples=4, temperature=0.003),
        "nivmf": lambda: NivMFLoss(P, D, temperature=0.003),
        "el-vmf": lambda: VMFProductKernelLoss(P, D, temperature=0.003),
    }[name]()
    e = torch.nn.functional.normalize(torch.randn(B, D), dim=-1) * 5
    single = loss.similarity(e, seed=1).detach().double()
    double = loss.double().similarity(e.double(), seed=1).detach()
    assert double.abs().max() > 1
    assert (single - double).abs().max() < 2e-3


AXES = ("images", "classes")


def binomial(s: torch.Tensor, y: torch.Tensor, axis: str, a: float, d: float) -> torch.Tensor:
    """Term by term."""
    attract, repel = [], []
    for row, labels in (
        [(s[:, j], y == j) for j in range(P)]
        if axis == "images"
        else [(s[i], torch.arange(P) == y[i]) for i in range(B)]
    ):
        if labels.any():
            attract.append(torch.log(1 + torch.exp(-a * (row[labels] - d)).sum()))
        repel.append(torch.log(1 + torch.exp(a * (row[~labels] + d)).sum()))
    return torch.stack(attract).mean() + torch.stack(repel).mean()


@pytest.mark.parametrize("axis", AXES)
def test_bindev_is_a_binomial_deviance_of_the_similarities(name: str, axis: str) -> None:
    e, y = batch()
    loss = make(name, form="bindev", bindev_alpha=0.7, bindev_delta=0.4, bindev_axis=axis)
    expected = binomial(loss.similarity(e, seed=5), y, axis, 0.7, 0.4)
    torch.testing.assert_close(loss(e, y, seed=5), expected, rtol=1e-10, atol=1e-12)
    guided = make(name, form="bindev", bindev_axis=axis, guidance_weight=2.0)
    plain = make(name, form="bindev", bindev_axis=axis)
    guidance = binomial(
        torch.nn.functional.normalize(e, dim=-1) @ loss.directions.T, y, "images", 32, 0.1
    )
    difference = guided(e, y, seed=5) - plain(e, y, seed=5)
    torch.testing.assert_close(difference, 2 * guidance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", AXES)
def test_bindev_of_extreme_similarities_is_finite(axis: str) -> None:
    loss, (e, y) = make("l2", form="bindev", bindev_axis=axis, temperature=1e-4).float(), batch()
    e = e.float().requires_grad_()
    value = loss(e, y)
    value.backward()
    assert value > 1e5 and value.isfinite()
    assert all(p.grad.isfinite().all() for p in (e, *loss.parameters()))


def kept_of(loss: torch.nn.Module, e: torch.Tensor, y: torch.Tensor, seed: int) -> torch.Tensor:
    """The proxies that a loss looks at: those it has a gradient for."""
    loss.zero_grad()
    loss(e, y, seed=seed).backward()
    return loss.proxies.grad.abs().sum(1).nonzero()[:, 0]


@pytest.mark.parametrize("form", ["nca", "bindev"])
def test_a_share_of_the_negatives_is_the_loss_on_fewer_proxies(name: str, form: str) -> None:
    e, _ = batch()
    y = torch.tensor([5, 5, 5, 5, 1, 1, 1, 1, 1, 5])  # two classes, and five others
    loss = make(name, form=form, negative_share=0.4)
    kept = kept_of(loss, e, y, seed=3)
    assert len(kept) == 4 and {1, 5} <= set(kept.tolist())
    s = loss.similarity(e, seed=3)[:, kept]
    own = (y[:, None] == kept).int().argmax(1)
    if form == "nca":
        expected = torch.nn.functional.cross_entropy(s, own)
    else:
        expected = nivmf_fast.proxy_loss.binomial_deviance(s, own, 1.0, 0.0, "images")
    torch.testing.assert_close(loss(e, y, seed=3), expected, rtol=1e-10, atol=1e-12)


def test_the_seed_draws_the_negatives() -> None:
    loss, (e, _) = make("cos", negative_share=0.4), batch()
    y = torch.tensor([5, 5, 5, 5, 1, 1, 1, 1, 1, 5])
    drawn = [tuple(kept_of(loss, e, y, seed).tolist()) for seed in range(60)]
    assert drawn == [tuple(kept_of(loss, e, y, seed).tolist()) for seed in range(60)]
    assert drawn[7] == tuple(kept_of(loss, e, y, torch.tensor(7)).tolist())
    counts = torch.tensor([sum(j in kept for kept in drawn) for j in (0, 2, 3, 4, 6)])
    assert counts.sum() == 120  # two of five, each about as often as another
    assert counts.min() > 10 and counts.max() < 38
    torch.manual_seed(0)
    first = loss(e, y).item()
    torch.manual_seed(0)
    assert loss(e, y).item() == first


def test_a_small_share_keeps_a_negative_and_a_full_batch_has_none() -> None:
    e, _ = batch()
    loss = make("cos", negative_share=0.01)
    assert len(kept_of(loss, e, torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1, 0]), seed=0)) == 6
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2])
    torch.testing.assert_close(loss(e, y, seed=0), make("cos")(e, y))


@pytest.mark.parametrize(
    ("options", "decomposes"),
    [
        ({}, True),
        ({"form": "bindev", "bindev_axis": "classes"}, True),
        ({"form": "bindev", "bindev_axis": "images"}, False),
        ({"guidance_weight": 0.5}, False),
        ({"negative_share": 0.5}, False),
    ],
)
def test_a_loss_that_decomposes_is_the_mean_of_its_parts(
    name: str, options: dict[str, object], decomposes: bool
) -> None:
    loss, (e, y) = make(name, **options), batch()
    assert loss.decomposes is decomposes
    whole = loss(e, y, seed=9)
    slices = ((0, 4), (4, B))
    parts = [(j - i) * loss(e[i:j], y[i:j], seed=9, image_offset=i) for i, j in slices]
    assert torch.isclose(whole, sum(parts) / B, rtol=1e-9) == decomposes


def test_the_loss_is_the_mean_cross_entropy_of_the_similarities(name: str) -> None:
    loss, (e, y) = make(name), batch()
    expected = torch.nn.functional.cross_entropy(loss.similarity(e, seed=5), y)
    torch.testing.assert_close(loss(e, y, seed=5), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_weight": 0.3},
        {"form": "bindev", "bindev_axis": "images", "bindev_delta": 0.2},
        {"form": "bindev", "bindev_axis": "classes", "bindev_alpha": 0.5},
        {"negative_share": 0.5},
    ],
    ids=["nca", "bindev-images", "bindev-classes", "negative-share"],
)
def test_every_gradient_is_right(name: str, options: dict[str, object]) -> None:
    """Against finite differences; EL-nivMF through its proxies alone (its samples' gradients are
    estimates, tested with the sampler)."""
    loss, (e, y) = make(name, **options), batch()
    if name != "el-nivmf":
        e.requires_grad_()

    def value(*parameters: torch.Tensor) -> torch.Tensor:
        names = [n for n, _ in loss.named_parameters()]
        state = dict(zip(names, parameters[1:], strict=True))
        return torch.func.functional_call(loss, state, (parameters[0], y), {"seed": 2})

    assert torch.autograd.gradcheck(value, (e, *loss.parameters()), atol=1e-5, fast_mode=True)


def test_descent_solves_a_batch(name: str) -> None:
    loss, (e, y) = make(name, temperature=1.0).float(), batch()
    embeddings = torch.nn.Parameter(e.float())
    groups = loss.param_groups(0.1, proxy_lr_mult=3, concentration_lr_mult=2)
    optimiser = torch.optim.Adam([{"params": [embeddings], "lr": 0.1}, *groups])
    first = last = loss(embeddings, y, seed=0).item()
    for step in range(60):
        optimiser.zero_grad()
        value = loss(embeddings, y, seed=step)
        value.backward()
        optimiser.step()
        last = value.item()
    assert last < 0.5 * first
    assert all(p.isfinite().all() for p in loss.parameters())


def test_a_zero_embedding_has_zero_gradient(name: str) -> None:
    loss, (e, y) = make(name), batch()
    e[3] = 0
    e.requires_grad_()
    value = loss(e, y, seed=0)
    value.backward()
    assert value.isfinite()
    assert (e.grad[3] == 0).all()
    assert e.grad.isfinite().all()
    assert (e.grad[:3] != 0).any()


def test_half_embeddings_under_autocast_are_computed_in_float32(name: str) -> None:
    loss, (e, y) = make(name).float(), batch()
    half = e.to(torch.bfloat16)
    plain = loss(half.float(), y, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(half, y, seed=0)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["nca", "bindev"])
def test_an_empty_batch_gives_zero(name: str, form: str) -> None:
    loss = make(name, guidance_weight=0.0, form=form)
    e = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    value = loss(e, torch.zeros(0, dtype=torch.int64), seed=0)
    value.backward()
    assert value == 0


def test_a_state_dict_restores_the_loss(name: str) -> None:
    loss, (e, y) = make(name), batch()
    other = copy.deepcopy(loss)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    assert loss(e, y, seed=1) != other(e, y, seed=1)
    other.load_state_dict(loss.state_dict())
    assert loss(e, y, seed=1) == other(e, y, seed=1)


def test_warmstart_puts_proxies_at_their_class_means(name: str) -> None:
    loss, (e, _) = make(name), batch()
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 4, 4, 4])
    before = loss.proxies.detach().clone()
    loss.warmstart(e, y)
    directions = torch.nn.functional.normalize(e, dim=-1)
    for j in (0, 1, 2, 4):
        mean = directions[y == j].mean(0)
        torch.testing.assert_close(loss.directions[j].detach(), mean / mean.norm())
        assert abs(float(loss.proxies[j].detach().norm()) - 4.0) < 1e-6  # `concentration`
    assert torch.equal(loss.proxies[[3, 5, 6]], before[[3, 5, 6]])


def test_samples_do_not_depend_on_the_batch_split() -> None:
    """Two slices of a batch with one seed and their offsets give the loss of the whole."""
    loss, (e, y) = make("el-nivmf"), batch()
    whole = loss(e, y, seed=9)
    parts = [loss(e[i:j], y[i:j], seed=9, image_offset=i) * (j - i) for i, j in ((0, 4), (4, 10))]
    torch.testing.assert_close(whole, sum(parts) / B, rtol=1e-12, atol=0)
    torch.manual_seed(0)
    first, second = loss(e, y), loss(e, y)
    torch.manual_seed(0)
    assert first == loss(e, y) != second


def test_options_reach_the_kernel() -> None:
    e, y = batch()
    values = {
        make("el-nivmf", normalizer=n, projection=p, temperature_outside=t)(e, y, seed=0).item()
        for n in ("exact", "released")
        for p in (True, False)
        for t in (True, False)
    }
    assert len(values) == 8


def test_concentrations_are_clamped_from_below() -> None:
    loss = make("nivmf")
    with torch.no_grad():
        loss.concentration.fill_(-3.0)
    assert (loss.concentrations == 0.1).all()
    assert loss(*batch()).isfinite()


def test_the_temperature_learns_unless_fixed_and_stays_positive() -> None:
    free, fixed = make("cos"), make("cos", learn_temperature=False)
    assert float(free.temperature) == pytest.approx(0.5, rel=1e-6)
    assert "log_temperature" not in dict(fixed.named_parameters())
    assert "log_temperature" in fixed.state_dict()
    optimiser = torch.optim.SGD(free.param_groups(0.0, temperature_lr_mult=1.0), lr=100.0)
    for group in optimiser.param_groups:
        if group["name"] == "temperature":
            group["lr"] = 100.0
    free(*batch()).backward()
    optimiser.step()
    assert free.temperature > 0


def test_param_groups_cover_every_parameter_once(name: str) -> None:
    loss = make(name)
    groups = loss.param_groups(
        0.1, proxy_lr_mult=2.0, concentration_lr_mult=3.0, temperature_lr_mult=4.0
    )
    rates = {g["name"]: g["lr"] for g in groups}
    expected = {"proxies": 0.2, "concentration": 0.3, "temperature": 0.4}
    if name == "cos":
        del expected["concentration"]
    assert rates == pytest.approx(expected)
    assert all(g["weight_decay"] == 0 for g in groups)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in loss.parameters()}


def test_guidance_is_proxy_anchor() -> None:
    """Against the definition, class by class."""
    loss, (e, y) = make("cos", guidance_weight=1.0), batch()
    plain = make("cos")
    cosine = (torch.nn.functional.normalize(e, dim=-1) @ loss.directions.T).detach()
    attract, repel = [], []
    for j in range(P):
        own = y == j
        if own.any():
            attract.append(torch.log1p(torch.exp(-32 * (cosine[own, j] - 0.1)).sum()))
        repel.append(torch.log1p(torch.exp(32 * (cosine[~own, j] + 0.1)).sum()))
    expected = torch.stack(attract).mean() + torch.stack(repel).mean()
    torch.testing.assert_close(loss(e, y) - plain(e, y), expected, rtol=1e-9, atol=1e-9)


# --- wrong arguments


def test_wrong_batches_are_named(name: str) -> None:
    loss, (e, y) = make(name), batch()
    for arguments, error, message in (
        (
            (e[:, :4], y),
            ValueError,
            r"embeddings must have shape \[B, D\] with D = 6; got \[10, 4\]",
        ),
        ((e[0], y), ValueError, r"embeddings must have shape"),
        ((e.long(), y), TypeError, r"embeddings must be a floating tensor"),
        ((e, y[:3]), ValueError, r"labels must have shape \[B\] = \[10\]; got \[3\]"),
        ((e, y.int()), TypeError, r"labels must be a torch.int64 tensor; got torch.int32"),
        ((e, y + P), ValueError, r"labels must be in 0 .. 6; got"),
        ((e, y - P), ValueError, r"labels must be in 0 .. 6; got -"),
        ((e * math.nan, y), ValueError, r"embeddings must be finite; got nan"),
        ((e.to("meta"), y), ValueError, r"embeddings are on meta, the proxies on cpu"),
    ):
        with pytest.raises(error, match=message):
            loss(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"concentration": -1.0}, "concentration must be positive"),
        ({"guidance_weight": -1.0}, "guidance_weight must be >= 0"),
        ({"form": "softmax"}, "form must be 'nca' or 'bindev'; got 'softmax'"),
        ({"bindev_axis": "proxies"}, "bindev_axis must be 'images' or 'classes'; got 'proxies'"),
        ({"bindev_alpha": 0.0}, "bindev_alpha must be positive and finite; got 0.0"),
        ({"bindev_delta": math.inf}, "bindev_delta must be finite; got inf"),
        ({"negative_share": 0.0}, "negative_share must be above 0 and at most 1; got 0.0"),
        ({"normalizer": "exactly"}, "normalizer must be 'exact' or 'released'; got 'exactly'"),
        ({"precision": "tf32"}, "precision must be 'float32' or 'fast'; got 'tf32'"),
        ({"n_samples": 0}, "n_samples must be an int, at least 1; got 0"),
        ({"num_classes": 0}, "num_classes must be an int, at least 1; got 0"),
        ({"embedding_dim": 1}, "embedding_dim must be an int, at least 2; got 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELNivMFLoss(**{"num_classes": P, "embedding_dim": D, **options})
