"""The losses as modules: values from the definitions, gradients, training behaviour, errors."""

import copy
import math

import pytest
import torch

import nivmf_fast
from nivmf_fast import (
    CosineProxyLoss,
    ELNivMFLoss,
    EuclideanProxyLoss,
    KLVMFLoss,
    NivMFLoss,
    NonIsotropicVonMisesFisher,
    VMFProductKernelLoss,
    VonMisesFisher,
)

P, D, B = 7, 6, 10
LOSSES = {
    "el-nivmf": lambda **o: ELNivMFLoss(P, D, n_samples=8, **o),
    "el-vmf": lambda **o: VMFProductKernelLoss(P, D, rho=1.0, **o),
    "b-vmf": lambda **o: VMFProductKernelLoss(P, D, rho=0.5, **o),
    "kl-vmf": lambda **o: KLVMFLoss(P, D, **o),
    "nivmf": lambda **o: NivMFLoss(P, D, **o),
    "l2": lambda **o: EuclideanProxyLoss(P, D, **o),
    "cos": lambda **o: CosineProxyLoss(P, D, **o),
}


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(3)
    loss = LOSSES[name](**{"temperature": 0.5, "concentration": 4.0, **options}).double()
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


def test_the_loss_is_the_mean_cross_entropy_of_the_similarities(name: str) -> None:
    loss, (e, y) = make(name), batch()
    expected = torch.nn.functional.cross_entropy(loss.similarity(e, seed=5), y)
    torch.testing.assert_close(loss(e, y, seed=5), expected, rtol=1e-10, atol=1e-12)


def test_every_gradient_is_right(name: str) -> None:
    """Against finite differences; EL-nivMF through its proxies alone (its samples' gradients are
    estimates, tested with the sampler)."""
    loss, (e, y) = make(name, guidance_weight=0.3), batch()
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


def test_an_empty_batch_gives_zero(name: str) -> None:
    loss = make(name, guidance_weight=0.0)
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
