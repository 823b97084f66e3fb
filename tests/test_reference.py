"""The specification itself: the random stream, the density, the losses, the gradients."""

import itertools
import math

import pytest
import torch
from conftest import golden, relative_l2

from nivmf_fast import reference, special

OPTIONS = list(itertools.product(["exact", "released"], [True, False]))


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v]) for v in values]


def signed(high: int, low: int) -> torch.Tensor:
    value = (high << 32) | low
    return torch.tensor(value - (1 << 64) if value >> 63 else value)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32, 10 rounds; key words (low, high)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    drawn = reference.philox(words(*counter), signed(key[1], key[0]))
    assert tuple(int(w) for w in drawn) == expected


def test_uniforms_stay_in_the_half_open_interval() -> None:
    ends = torch.tensor([0, 0xFFFFFFFF])
    for dtype in (torch.float32, torch.float64):
        u = reference.uniform(ends, dtype)
        assert 0 < u[0] < 1e-9
        assert 1 - 1e-7 < u[1] <= 1


@pytest.mark.parametrize("n", [16, 48])
def test_quadrature_is_exact_for_polynomials(n: int) -> None:
    nodes, weights = (torch.tensor(row, dtype=torch.float64) for row in special.gauss_legendre(n))
    for power in range(2 * n):
        assert abs(float((weights * nodes**power).sum()) - 1 / (power + 1)) < 1e-14


def test_dw_dconcentration_matches_the_golden_values(dtype: torch.dtype) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1e-11
    for dim in sorted({row[0] for row in golden("vmf_marginal")["rows"]}):
        rows = [row for row in golden("vmf_marginal")["rows"] if row[0] == dim]
        # near w = -1 rounding 1 - w to the dtype already loses 1 + w: nothing could be exact there
        rows = [r for r in rows if float(r[4]) < 1.99]
        gap, k, exact = (
            torch.tensor([float(r[i]) for r in rows], dtype=torch.float64) for i in (4, 1, 5)
        )
        value = reference.vmf_dw_dconcentration(gap.to(dtype), k.to(dtype), dim).double()
        worst = ((value - exact) / exact).abs().max()
        assert worst <= bound, (dim, float(worst))


def circle_or_sphere(entry: dict, n: int) -> tuple[torch.Tensor, float]:
    """Points of a midpoint rule and the measure of each."""
    step = 2 * math.pi / n
    angle = (torch.arange(n, dtype=torch.float64) + 0.5) * step
    if entry["D"] == 2:
        return torch.stack([angle.cos(), angle.sin()], -1), step
    height = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1
    radius = (1 - height**2).sqrt()[:, None]
    grid = torch.stack(
        [radius * angle.cos(), radius * angle.sin(), height[:, None].expand(n, n)], -1
    )
    return grid.view(-1, 3), step * 2 / n


@pytest.mark.parametrize("entry", golden("nivmf")["entries"], ids=lambda e: str(e["K_diagonal"]))
def test_the_nivmf_score_is_the_log_of_a_density(entry: dict) -> None:
    D = entry["D"]
    loc = torch.tensor([[float(v) for v in entry["mu_proxy_unnormalised"]]], dtype=torch.float64)
    loc = loc / loc.norm()
    kappa = torch.tensor([[float(v) for v in entry["K_diagonal"]]], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def log_density(x: torch.Tensor) -> torch.Tensor:
        return reference.log_ppk(x[None], loc, kappa, one)[:, 0]

    for point, expected in entry["log_density_at_points"]:
        x = torch.tensor([[float(v) for v in point]], dtype=torch.float64)
        assert abs(float(log_density(x / x.norm())) - float(expected)) < 1e-11
    x, measure = circle_or_sphere(entry, 20_000 if D == 2 else 1_000)
    assert abs(float(log_density(x).exp().sum()) * measure - 1) < 1e-4


def parameters(
    D: int, P: int, B: int, N: int, dtype: torch.dtype, spread: float = 0.2, kappa: float = 5.0
) -> tuple[torch.Tensor, ...]:
    """Samples near their proxies, and proxies near each other, so that the loss stays above 0."""
    g = torch.Generator().manual_seed(D + P)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    loc = unit(normal(P, D), dim=-1)
    labels = torch.randint(P, (B,), generator=g)
    samples = unit(0.3 * loc[labels] + normal(N, B, D) / D**0.5, dim=-1)
    concentration = kappa * torch.exp(spread * normal(P, D))
    return samples.to(dtype), loc.to(dtype), concentration.to(dtype), labels


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(("normalizer", "projection"), OPTIONS)
def test_log_ppk_and_proxy_nca_pass_gradcheck(
    normalizer: str, projection: bool, outside: bool
) -> None:
    samples, loc, kappa, labels = parameters(4, 5, 3, 2, torch.float64)
    T = torch.tensor(0.7, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (samples, loc, kappa, T)]
    options = (normalizer, projection, outside)
    # the common part of the bias has no gradient of its own: leave the constants to the value test
    assert torch.autograd.gradcheck(
        lambda x, m, k, T: reference.log_ppk(x, m, k, T, *options, constants=False).diff(dim=1),
        inputs,
        fast_mode=True,
    )
    assert torch.autograd.gradcheck(
        lambda x, m, k, T: reference.proxy_nca(x, m, k, labels, T, *options),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(("normalizer", "projection"), OPTIONS)
def test_proxy_nca_is_the_cross_entropy_of_log_ppk(
    normalizer: str, projection: bool, outside: bool
) -> None:
    samples, loc, kappa, labels = parameters(6, 9, 7, 4, torch.float64)
    T = torch.tensor(0.2, dtype=torch.float64)
    options = (normalizer, projection, outside)
    s = reference.log_ppk(samples, loc, kappa, T, *options)
    expected = torch.nn.functional.cross_entropy(s, labels, reduction="none")
    loss = reference.proxy_nca(samples, loc, kappa, labels, T, *options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["exact", "released"])
def test_the_four_forms_are_what_the_formula_says(normalizer: str) -> None:
    """Each term written down on its own, in float64, constants included."""
    samples, loc, kappa, _ = parameters(5, 4, 3, 2, torch.float64)
    one = torch.ones((), dtype=torch.float64)
    from scipy.special import ive

    for projection in (True, False):
        k_mu = kappa * loc
        n = k_mu.norm(dim=-1)
        nu = 5 / 2 - 1
        log_c = (
            nu * n.log()
            - 2.5 * math.log(2 * math.pi)
            - torch.from_numpy(ive(nu, n.numpy())).log()
            - n
        )
        k_x = kappa * samples[:, :, None]
        if projection:
            inner = (k_mu * k_x).sum(-1) / k_x.norm(dim=-1)
        else:
            inner = (k_mu * samples[:, :, None]).sum(-1)
        last = 5 * k_x.norm(dim=-1).log() if normalizer == "exact" else n.log()
        log_p = log_c + inner + kappa.log().sum(-1) - last
        expected = torch.logsumexp(log_p, 0) - math.log(2)
        value = reference.log_ppk(samples, loc, kappa, one, normalizer, projection)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "bound"),
    # on tied images float32 itself ends: a score near 8 has an ulp of 1e-6, 3e-4 after the division
    [("mixed", 5e-5), ("tied", 2.5e-4)],
)
def test_float32_keeps_the_loss_and_its_gradients_at_small_temperature(
    batch: str, bound: float
) -> None:
    """T = 0.003, D = 512, kappa spread 5%: every rounding error of a score is multiplied by 333."""
    samples, loc, kappa, labels = hard_batch(tied=batch == "tied")
    results = {}
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (samples, loc, kappa)]
        T = torch.tensor(0.003).to(dtype).requires_grad_()  # the same number in both
        loss = reference.proxy_nca(*inputs, labels, T)
        results[dtype] = loss.detach(), torch.autograd.grad(loss.mean(), [*inputs, T])
    loss32, gradients32 = results[torch.float32]
    loss64, gradients64 = results[torch.float64]
    assert loss64.mean() > 0.1  # a solved batch has no gradient and proves nothing
    if batch == "tied":
        assert 0.9 < loss64.min() < loss64.max() < 1.1
    assert (loss32 - loss64).abs().max() <= 2e-3
    for name, value, exact in zip(
        ("samples", "loc", "concentration"), gradients32, gradients64, strict=False
    ):
        assert relative_l2(value, exact) <= bound, name
    assert abs(float(gradients32[3] / gradients64[3]) - 1) <= 1e-4


def hard_batch(
    tied: bool, D: int = 512, P: int = 100, B: int = 112, N: int = 5
) -> tuple[torch.Tensor, ...]:
    """float32 images that lean on their own proxy: by a common amount, which leaves some solved
    and some far off, or each just so much that it ties with its rivals (a loss of 1)."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    loc, noise = unit(normal(P, D), dim=-1), normal(N, B, D) / D**0.5
    kappa = 20 * torch.exp(0.05 * normal(P, D))
    labels = torch.randint(P, (B,), generator=g)
    lean = torch.full((B, 1), 0.2, dtype=torch.float64)
    if tied:
        T = torch.tensor(0.003, dtype=torch.float64)
        low, high = torch.zeros_like(lean), torch.full_like(lean, 2.0)
        for _ in range(40):
            lean = (low + high) / 2
            samples = unit(lean * loc[labels] + noise, dim=-1)
            solved = reference.proxy_nca(samples, loc, kappa, labels, T)[:, None] < 1
            low, high = torch.where(solved, low, lean), torch.where(solved, lean, high)
    samples = unit(lean * loc[labels] + noise, dim=-1)
    return samples.float(), loc.float(), kappa.float(), labels


@pytest.mark.parametrize("normalizer", ["exact", "released"])
def test_an_unknown_label_gives_nan_for_its_image_alone(normalizer: str) -> None:
    samples, loc, kappa, labels = parameters(5, 4, 3, 2, torch.float64)
    T = torch.ones((), dtype=torch.float64)
    good = reference.proxy_nca(samples, loc, kappa, labels, T, normalizer)
    for bad in (-1, 4, 2**40):
        wrong = labels.clone()
        wrong[1] = bad
        loss = reference.proxy_nca(samples, loc, kappa, wrong, T, normalizer)
        assert loss[1].isnan()
        assert torch.equal(loss[[0, 2]], good[[0, 2]])


def test_isotropic_proxies_are_plain_vmfs() -> None:
    """log p of K = kappa I is log C_D(kappa) + kappa mu.x; its average over vMF images is exact."""
    samples, loc, _, _ = parameters(7, 4, 3, 2, torch.float64)
    kappa = torch.tensor([0.3, 2.0, 11.0, 70.0], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    from nivmf_fast import special

    value = reference.log_ppk(samples[:1], loc, kappa[:, None].expand(-1, 7), one)
    expected = special.vmf_log_normalizer(kappa, 7) + kappa * (samples[0] @ loc.T)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
