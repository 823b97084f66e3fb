"""The distributions as torch.distributions: shapes, moments, densities, divergences, fits."""

import doctest
import importlib
import math
from pathlib import Path

import pytest
import scipy.stats
import torch
from torch.distributions import kl_divergence

import nivmf_fast
from nivmf_fast import HypersphericalUniform, NonIsotropicVonMisesFisher, VonMisesFisher
from nivmf_fast.distributed import ClassParallelLoss
from nivmf_fast.proxy_loss import ProxyLoss


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


LIBRARY = Path(nivmf_fast.__file__).parent
MODULES = [
    ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(LIBRARY.rglob("*.py"))
    if path.stem != "__main__" and path.parent.name != "triton"
]


@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_the_documentation_runs(name: str) -> None:
    torch.manual_seed(0)
    names = {"torch": torch} | {name: getattr(nivmf_fast, name) for name in nivmf_fast.__all__}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.failed == 0


@pytest.mark.parametrize(
    "subject",
    [
        *(getattr(nivmf_fast, name) for name in nivmf_fast.__all__),
        ProxyLoss,
        ClassParallelLoss,
        VonMisesFisher.fit,
        NonIsotropicVonMisesFisher.fit,
    ],
    ids=lambda subject: subject.__qualname__,
)
def test_what_is_public_has_an_example_that_runs(subject: object) -> None:
    assert subject.__module__ in MODULES
    assert doctest.DocTestFinder(recurse=False).find(subject)[0].examples


@pytest.mark.parametrize(
    ("loc_batch", "k_batch", "batch"),
    [((), (), ()), ((3,), (), (3,)), ((), (4,), (4,)), ((2, 1), (3,), (2, 3)), ((0,), (), (0,))],
)
def test_batch_and_event_shapes_broadcast(
    loc_batch: tuple[int, ...], k_batch: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    k = torch.full(k_batch, 7.0)
    plain = VonMisesFisher(unit(*loc_batch, 5, dtype=torch.float32), k)
    diagonal = NonIsotropicVonMisesFisher(plain.loc, k[..., None] * torch.linspace(0.5, 2, 5))
    for d in (plain, diagonal):
        assert (d.batch_shape, d.event_shape) == (batch, (5,))
        x = d.rsample((6, 2))
        assert x.shape == (6, 2, *batch, 5)
        assert d.sample().shape == (*batch, 5)
        assert d.log_prob(x).shape == (6, 2, *batch)
        assert d.log_prob(x[0]).shape == (2, *batch)
        assert d.mean.shape == d.mode.shape == (*batch, 5)
        assert d.entropy().shape == batch
        wide = d.expand((9, *batch))
        assert wide.batch_shape == (9, *batch)
        assert wide.rsample((2,)).shape == (2, 9, *batch, 5)
        assert wide.log_prob(wide.sample((2,))).shape == (2, 9, *batch)
    assert plain.variance.shape == (*batch, 5)
    uniform = HypersphericalUniform(5, batch_shape=batch)
    assert uniform.sample((4,)).shape == (4, *batch, 5)
    assert uniform.expand((2, *batch)).entropy().shape == (2, *batch)


@pytest.mark.parametrize("dim", [2, 3, 10])
def test_log_prob_matches_scipy(dim: int) -> None:
    loc, x = unit(1, dim)[0], unit(50, dim)
    for k in (0.1, 3.0, 80.0):
        d = VonMisesFisher(loc, torch.tensor(k, dtype=torch.float64))
        expected = scipy.stats.vonmises_fisher(loc.numpy(), k).logpdf(x.numpy())
        torch.testing.assert_close(
            d.log_prob(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-10
        )
        entropy = scipy.stats.vonmises_fisher(loc.numpy(), k).entropy()
        assert abs(float(d.entropy()) - entropy) < 1e-9


def test_log_prob_stays_accurate_where_its_terms_are_huge() -> None:
    """At concentration 1e6 the normaliser and the exponent cancel five digits of float32."""
    loc = unit(1, 64, dtype=torch.float32)[0]
    k = torch.tensor(1e6)
    x = VonMisesFisher(loc, k).sample((100,))
    value = VonMisesFisher(loc, k).log_prob(x)
    exact = VonMisesFisher(loc.double(), k.double(), validate_args=False).log_prob(x.double())
    assert (value - exact).abs().max() < 1e-3
    assert (
        1e6 * (x @ loc) - 1e6 * (x.double() @ loc.double())
    ).abs().max() > 1e-2  # the plain form


@pytest.mark.parametrize("dim", [2, 3, 8, 64])
@pytest.mark.parametrize("k", [0.0, 2.0, 50.0])
def test_moments_and_entropy_are_those_of_the_samples(dim: int, k: float) -> None:
    d = VonMisesFisher(unit(1, dim)[0], torch.tensor(k, dtype=torch.float64))
    x = d.sample((40_000,))
    n = len(x)
    assert ((x.mean(0) - d.mean) / (d.variance / n).sqrt()).abs().max() < 4.5
    centered = (x - d.mean).square()
    assert ((centered.mean(0) - d.variance) / (centered.std(0) / n**0.5)).abs().max() < 4.5
    surprise = -d.log_prob(x)
    assert abs(float(surprise.mean() - d.entropy())) < 4.5 * float(surprise.std()) / n**0.5 + 1e-9


def test_the_entropy_and_divergences_are_differentiable() -> None:
    k = torch.tensor([0.5, 9.0, 200.0], dtype=torch.float64, requires_grad=True)
    loc, other = unit(3, 6), unit(4, 6)[:3]

    def with_loc(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        d = VonMisesFisher(loc, k)
        fixed = VonMisesFisher(other, torch.full((3,), 12.0, dtype=torch.float64))
        return (
            d.entropy(),
            kl_divergence(d, fixed),
            kl_divergence(fixed, d),
            kl_divergence(d, HypersphericalUniform(6)),
            d.log_prob(other),
        )

    assert torch.autograd.gradcheck(with_loc, (k,))


@pytest.mark.parametrize("dim", [2, 3, 40])
def test_divergences_are_the_mean_difference_of_log_densities(dim: int) -> None:
    loc = unit(2, dim)
    p = VonMisesFisher(loc[0], torch.tensor(4.0, dtype=torch.float64))
    q = VonMisesFisher(loc[1], torch.tensor(9.0, dtype=torch.float64))
    u = HypersphericalUniform(dim, dtype=torch.float64)
    for first, second in ((p, q), (p, u), (u, q)):
        x = first.sample((40_000,))
        gap = first.log_prob(x) - second.log_prob(x)
        error = 4.5 * float(gap.std()) / len(x) ** 0.5
        assert abs(float(gap.mean() - kl_divergence(first, second))) < error + 1e-9
    assert float(kl_divergence(p, p)) == 0
    near = VonMisesFisher(loc[0], torch.tensor(4.0 + 1e-5, dtype=torch.float64))
    assert 0 < float(kl_divergence(p, near)) < 1e-9


def test_divergences_broadcast() -> None:
    p = VonMisesFisher(unit(3, 1, 5), torch.tensor(2.0, dtype=torch.float64))
    q = VonMisesFisher(unit(4, 5), torch.tensor(3.0, dtype=torch.float64))
    assert kl_divergence(p, q).shape == (3, 4)
    single = kl_divergence(VonMisesFisher(p.loc[1, 0], 2.0), VonMisesFisher(q.loc[2], 3.0))
    torch.testing.assert_close(kl_divergence(p, q)[1, 2], single)


@pytest.mark.parametrize(("dim", "k"), [(2, 3.0), (3, 0.7), (16, 50.0), (128, 300.0), (3, 1e4)])
def test_fit_recovers_the_parameters(dim: int, k: float) -> None:
    true = VonMisesFisher(unit(2, dim), torch.tensor([k, 2 * k], dtype=torch.float64))
    fitted = VonMisesFisher.fit(true.rsample((20_000,), seed=1))
    assert ((fitted.concentration - true.concentration) / true.concentration).abs().max() < 0.06
    assert (fitted.loc * true.loc).sum(-1).min() > 1 - 3 * dim / (20_000 * min(k, k**2 / dim))


def test_fit_solves_the_likelihood_equation() -> None:
    """At the fit the gradient of the mean log-likelihood vanishes: to float64, weights included."""
    x = VonMisesFisher(unit(1, 9)[0], torch.tensor(6.0, dtype=torch.float64)).sample((500,))
    weights = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = VonMisesFisher.fit(x, weights).concentration.requires_grad_()
    d = VonMisesFisher(VonMisesFisher.fit(x, weights).loc, k)
    (grad,) = torch.autograd.grad((weights / weights.sum() * d.log_prob(x)).sum(), k)
    assert grad.abs() < 1e-12
    single = VonMisesFisher.fit(x[:1])
    assert single.concentration > 1e10
    torch.testing.assert_close(single.loc, x[0])
    opposite = VonMisesFisher.fit(torch.stack([x[0], -x[0]]))
    assert opposite.concentration == 0


# --- the non-isotropic one


@pytest.fixture
def skewed() -> NonIsotropicVonMisesFisher:
    loc = torch.nn.functional.normalize(torch.tensor([1.0, 2, 3], dtype=torch.float64), dim=-1)
    return NonIsotropicVonMisesFisher(loc, torch.tensor([9.0, 3.0, 6.0], dtype=torch.float64))


def test_the_nivmf_is_a_density_and_samples_follow_it(skewed: NonIsotropicVonMisesFisher) -> None:
    """Importance weights p / uniform average to 1, and moments under both agree."""
    n = 200_000
    uniform = HypersphericalUniform(3, dtype=torch.float64)
    flat = uniform.rsample((n,), seed=0)
    weight = (skewed.log_prob(flat) - uniform.log_prob(flat)).exp()
    assert abs(float(weight.mean()) - 1) < 4.5 * float(weight.std()) / n**0.5
    x = skewed.rsample((n,), seed=1)
    for power in (1, 2):
        under_p = x**power
        under_uniform = weight[:, None] * flat**power
        error = ((under_p.var(0) + under_uniform.var(0)) / n).sqrt()
        assert ((under_p.mean(0) - under_uniform.mean(0)) / error).abs().max() < 4.5


def test_nivmf_moments_and_mode(skewed: NonIsotropicVonMisesFisher) -> None:
    x = skewed.rsample((200_000,), seed=3)
    assert ((skewed.mean - x.mean(0)) / (x.std(0) / len(x) ** 0.5)).abs().max() < 5
    surprise = -skewed.log_prob(x)
    # the entropy is itself an estimate from 131,072 samples
    assert abs(float(surprise.mean() - skewed.entropy())) < 6 * float(surprise.std()) / 300
    everywhere = HypersphericalUniform(3, dtype=torch.float64).rsample((200_000,), seed=4)
    assert skewed.log_prob(skewed.mode) >= skewed.log_prob(everywhere).max()
    mode = skewed.mode.clone().requires_grad_()
    (grad,) = torch.autograd.grad(skewed.log_prob(mode / mode.norm()), mode)
    assert grad.norm() < 1e-6


def test_isotropic_concentrations_give_the_plain_vmf() -> None:
    loc, x = unit(4, 20), unit(30, 1, 20)
    k = torch.tensor([0.2, 3.0, 40.0, 900.0], dtype=torch.float64)
    plain = VonMisesFisher(loc, k)
    diagonal = NonIsotropicVonMisesFisher(loc, k[:, None].expand(-1, 20))
    torch.testing.assert_close(diagonal.log_prob(x), plain.log_prob(x), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(diagonal.entropy(), plain.entropy(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(diagonal.mode, loc, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diagonal.rsample((5,), seed=3), plain.rsample((5,), seed=3))


def test_nivmf_samples_carry_gradients(skewed: NonIsotropicVonMisesFisher) -> None:
    """dE[f]/dkappa through the samples equals the derivative of E[f] by importance weighting."""
    kappa = skewed.concentration.clone().requires_grad_()
    d = NonIsotropicVonMisesFisher(skewed.loc, kappa)
    c = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    n = 100_000
    (pathwise,) = torch.autograd.grad((d.rsample((n,), seed=5) @ c).square().mean(), kappa)
    x = skewed.rsample((n,), seed=6)
    baseline = (x @ c).square().mean()
    score = ((x @ c).square() - baseline) * d.log_prob(x)  # score-function estimate
    (by_score,) = torch.autograd.grad(score.mean(), kappa)
    torch.testing.assert_close(pathwise, by_score, rtol=0.1, atol=3e-3)


def test_nivmf_fit_recovers_the_parameters(skewed: NonIsotropicVonMisesFisher) -> None:
    x = skewed.rsample((20_000,), seed=7)
    fitted = NonIsotropicVonMisesFisher.fit(x)
    torch.testing.assert_close(fitted.concentration, skewed.concentration, rtol=0.08, atol=0)
    assert (fitted.loc * skewed.loc).sum() > 0.999
    assert fitted.log_prob(x).mean() >= skewed.log_prob(x).mean()


# --- wrong arguments


@pytest.mark.parametrize(
    ("loc", "concentration", "error", "message"),
    [
        (torch.ones(3), 1.0, ValueError, r"loc must consist of unit vectors; got length 1\.73"),
        (torch.eye(3), torch.tensor([1.0, -2.0, 3.0]), ValueError, r">= 0 .* got -2.0 at \[1\]"),
        (torch.eye(3)[0], math.nan, ValueError, r"concentration must be >= 0 .* got nan"),
        (torch.ones(4, 1), 1.0, ValueError, r"loc must have shape .* D from 2 .* got \[4, 1\]"),
        (torch.tensor(1.0), 1.0, ValueError, r"loc must have shape"),
        (torch.eye(3), torch.ones(4), ValueError, r"loc of shape .*\[3, 3\].*\[4\] must broadcast"),
        (torch.eye(3).long(), 1.0, TypeError, r"loc must be a floating tensor .* torch.int64"),
        ([0.0, 1.0], 1.0, TypeError, r"loc must be a floating tensor .* list"),
    ],
)
def test_wrong_parameters_are_named(
    loc: object, concentration: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VonMisesFisher(loc, concentration)  # type: ignore[arg-type]


def test_wrong_nivmf_parameters_are_named() -> None:
    loc = torch.eye(3)
    with pytest.raises(ValueError, match=r"concentration must be > 0 .* got 0.0 at \[0, 1\]"):
        NonIsotropicVonMisesFisher(loc, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"concentration must have shape \[.., D\] with D = 3"):
        NonIsotropicVonMisesFisher(loc, torch.ones(3, 2))


def test_wrong_samples_are_refused() -> None:
    d = VonMisesFisher(torch.eye(3)[0], 2.0)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.ones(3))
    with pytest.raises(ValueError, match=r"samples must be unit vectors"):
        VonMisesFisher.fit(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"samples must be a tensor \[n, .., D\]"):
        VonMisesFisher.fit(torch.ones(3))
    with pytest.raises(ValueError, match=r"weights must be \[n\] = \[3\]"):
        VonMisesFisher.fit(torch.eye(3), torch.ones(2))
    with pytest.raises(ValueError, match="dim must be an int from 2"):
        HypersphericalUniform(1)


def test_half_precision_directions_are_unit_enough() -> None:
    loc = unit(5, 300).to(torch.bfloat16)
    d = VonMisesFisher(loc, torch.tensor(20.0))
    assert d.rsample((2,)).dtype == torch.float32
