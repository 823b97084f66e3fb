"""The log-normaliser and its derivatives: against golden values and mpmath, on every backend."""

import functools
import math

import mpmath
import pytest
import torch
from conftest import device_of, golden

import nivmf_fast
from nivmf_fast import special
from nivmf_fast._schemas import Normalizer

NORMALIZER_BACKENDS = ["reference", "cpu", "cuda"]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
OFF_GRID_DIMS = [2, 3, 4, 7, 11, 25, 26, 27, 33, 34, 35, 47, 63, 127, 300, 511, 999, 20_000, 65_536]


def derivative(k: torch.Tensor, dim: int, order: int, backend: str) -> torch.Tensor:
    k = k.to(device_of(backend))
    return torch.ops.nivmf_fast.vmf_log_normalizer(k, dim, order, backend).cpu()


@functools.cache
def truth(k: float, dim: int) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """g, A and A' at the exact value of a float."""
    with mpmath.workdps(40):
        x, half = mpmath.mpf(k), mpmath.mpf(dim) / 2
        if k < 2e4:  # convergent series, as many terms as k
            scale = mpmath.hyp0f1(half, x * x / 4)
            A = x / dim * mpmath.hyp0f1(half + 1, x * x / 4) / scale
            g = -mpmath.log(scale)
        else:  # the asymptotic series of the Bessel functions
            A = mpmath.besseli(half, x) / mpmath.besseli(half - 1, x)
            power = (half - 1) * mpmath.log(2 / x) + mpmath.loggamma(half)
            g = -mpmath.log(mpmath.besseli(half - 1, x)) - power
        return g, A, 1 - A * A - (dim - 1) * A / x


def relative(value: float, exact: mpmath.mpf) -> float:
    return float(abs(mpmath.mpf(value) - exact) / abs(exact)) if exact != 0 else abs(value)


@pytest.mark.parametrize("backend", NORMALIZER_BACKENDS)
def test_g_and_A_match_the_golden_values(backend: str, dtype: torch.dtype) -> None:
    rows: dict[int, list[list[str]]] = {}
    for row in golden("log_cp")["rows"]:
        rows.setdefault(row[0], []).append(row)
    assert len(rows) > 10
    for dim, entries in rows.items():
        k64 = torch.tensor([float(r[1]) for r in entries], dtype=torch.float64)
        k = k64.to(dtype)
        g, A = derivative(k, dim, 0, backend).double(), -derivative(k, dim, 1, backend).double()
        for i, row in enumerate(entries):
            # a concentration that float32 rounds is another concentration: to first order
            shift = float(k[i].double() - k64[i])
            exact_g = mpmath.mpf(row[3]) - mpmath.mpf(row[4]) * shift
            exact_A = mpmath.mpf(row[4]) + mpmath.mpf(row[5]) * shift
            assert relative(g[i].item(), exact_g) <= TOLERANCE[dtype], (dim, row[1])
            assert relative(A[i].item(), exact_A) <= TOLERANCE[dtype], (dim, row[1])


@pytest.mark.parametrize("dim", OFF_GRID_DIMS)
@pytest.mark.parametrize("backend", NORMALIZER_BACKENDS)
def test_g_and_A_match_mpmath_off_the_golden_grid(
    backend: str, dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(dim)
    decades = 9 if dim < 100 else 7  # from 1e-3; beyond, mpmath takes minutes
    exponents = decades * torch.rand(8, generator=generator) - 3
    k = (10**exponents).to(dtype)  # numbers that float32 holds
    g, A, dA = (derivative(k, dim, order, backend).double() for order in (0, 1, 2))
    for i in range(len(k)):
        exact_g, exact_A, exact_dA = truth(k[i].item(), dim)
        assert relative(g[i].item(), exact_g) <= TOLERANCE[dtype], k[i]
        assert relative(-A[i].item(), exact_A) <= TOLERANCE[dtype], k[i]
        assert relative(-dA[i].item(), exact_dA) <= 5 * TOLERANCE[dtype], k[i]


@pytest.mark.parametrize("dim", [2, 3, 8, 25, 26, 33, 34, 64, 128, 512, 4096])
@pytest.mark.parametrize("backend", NORMALIZER_BACKENDS)
def test_first_derivative_is_continuous_where_the_branches_meet(
    backend: str, dim: int, dtype: torch.dtype
) -> None:
    plan = special._plan(dim, dtype)
    borders = [math.sqrt(plan.taylor * dim * (dim + 2))] + [plan.large] * (plan.lift > 0)
    for border in borders:
        at = torch.tensor([border], dtype=dtype)
        below = above = at
        for _ in range(3):
            below = torch.nextafter(below, torch.zeros_like(at))
            above = torch.nextafter(above, torch.full_like(at, math.inf))
        A = -derivative(torch.cat([below, above]), dim, 1, backend).double()
        step = (
            float((above - below).double()) / border
        )  # A itself moves by at most this, relatively
        assert abs(A[1] / A[0] - 1) <= step + 0.5 * TOLERANCE[dtype], border


@pytest.mark.parametrize("dim", [2, 3, 64, 512])
@pytest.mark.parametrize("backend", NORMALIZER_BACKENDS)
def test_concentration_zero_gives_exact_values(backend: str, dim: int, dtype: torch.dtype) -> None:
    k = torch.zeros(3, dtype=dtype)
    g, dg, d2g = (derivative(k, dim, order, backend) for order in (0, 1, 2))
    assert (g == 0).all() and (dg == 0).all()
    torch.testing.assert_close(-d2g, torch.full_like(k, 1 / dim), rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", NORMALIZER_BACKENDS)
def test_impossible_concentrations_give_nan(backend: str, dtype: torch.dtype) -> None:
    k = torch.tensor([-1.0, math.nan, math.inf], dtype=dtype)
    for order in (0, 1, 2):
        assert derivative(k, 5, order, backend).isnan().all()


@pytest.mark.parametrize("backend", NORMALIZER_BACKENDS)
@pytest.mark.parametrize("dim", [2, 3, 40, 512])
def test_concentrations_beyond_1e18_give_nan(backend: str, dim: int, dtype: torch.dtype) -> None:
    limit = torch.tensor(special.MAX_CONCENTRATION, dtype=dtype)
    beyond = torch.nextafter(limit, torch.tensor(math.inf, dtype=dtype))
    k = torch.stack([limit, beyond, torch.tensor(1e30, dtype=dtype)])
    for order in (0, 1, 2):
        assert derivative(k, dim, order, backend).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("normalizer", ["exact", "released"])
def test_a_proxy_longer_than_1e18_gives_nan(
    backend: str, normalizer: Normalizer, dtype: torch.dtype
) -> None:
    device = device_of(backend)
    loc = torch.eye(3, 8, dtype=dtype, device=device)  # |K mu| is the concentration
    samples = torch.nn.functional.normalize(loc + 0.1, dim=-1)[None]
    concentration = torch.full((3, 8), 20.0, dtype=dtype, device=device)
    concentration[1] = 0.9e18
    options = {"validate": False, "normalizer": normalizer, "backend": backend}
    given = samples, loc, concentration
    assert nivmf_fast.log_ppk(*given, **options).isfinite().all()
    concentration[1] = 1.1e18
    assert nivmf_fast.log_ppk(*given, **options)[:, 1].isnan().all()
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    assert nivmf_fast.proxy_nca(*given, labels, **options).isnan().all()


@pytest.mark.parametrize("dim", [2, 3, 5, 26, 34, 512])
def test_derivatives_are_consistent_to_second_order(dim: int) -> None:
    k = torch.tensor([0.02, 0.5, 3.0, 23.9, 40.1, 500.0], dtype=torch.float64, requires_grad=True)

    def log_normalizer(k: torch.Tensor) -> torch.Tensor:
        return nivmf_fast.vmf_log_normalizer(k, dim)

    other = k.detach() * 1.2 + 0.1

    def difference(k: torch.Tensor) -> torch.Tensor:
        return nivmf_fast.vmf_log_normalizer_difference(k, other, dim)

    for function in (log_normalizer, difference):
        assert torch.autograd.gradcheck(function, (k,))
        assert torch.autograd.gradgradcheck(function, (k,))
    assert torch.autograd.gradcheck(lambda k: nivmf_fast.vmf_mean_resultant_length(k, dim), (k,))


def test_a_third_derivative_is_refused() -> None:
    k = torch.tensor(3.0, requires_grad=True)
    for function in (nivmf_fast.vmf_log_normalizer, special.vmf_log_normalizer):
        (first,) = torch.autograd.grad(function(k, 5), k, create_graph=True)
        (second,) = torch.autograd.grad(first, k, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable twice"):
            torch.autograd.grad(second, k)


@pytest.mark.parametrize("dim", [3, 25, 26, 64, 128, 512, 2048])
def test_difference_form_keeps_relative_accuracy(dim: int, dtype: torch.dtype) -> None:
    k0 = torch.tensor([0.5, 7.0, 60.0, 900.0], dtype=dtype)
    for ratio in (1.001, 1.1, 3.0):
        k = k0 * ratio
        value = special.vmf_log_normalizer_difference(k, k0, dim)
        for i in range(len(k)):
            exact = truth(k[i].item(), dim)[0] - truth(k0[i].item(), dim)[0]
            # below D = 26 a float64 subtraction; float64 itself then keeps 1e-15 / (ratio - 1)
            bound = 1e-6 if dtype == torch.float32 else 1e-11
            assert relative(value[i].item(), exact) <= bound, (k0[i], ratio)


def test_the_constant_is_the_uniform_density() -> None:
    k = torch.tensor([0.0, 4.0], dtype=torch.float64)
    for dim, area in ((2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)):
        full = nivmf_fast.vmf_log_normalizer(k, dim)
        short = nivmf_fast.vmf_log_normalizer(k, dim, constants=False)
        torch.testing.assert_close(full, short - math.log(area), rtol=1e-14, atol=1e-14)


def test_debye_polynomials_are_the_published_ones() -> None:
    rows = [[str(c) for c in row] for row in special.debye_coefficients(4)]
    assert rows[0] == ["1/8", "-5/24"]
    assert rows[1] == ["1/16", "-3/8", "5/16"]
    assert rows[2] == ["25/384", "-531/640", "221/128", "-1105/1152"]
    assert rows[3] == ["13/128", "-71/32", "531/64", "-339/32", "565/128"]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"dim must be an int from 2 .* got 1"):
        nivmf_fast.vmf_log_normalizer(torch.ones(2), 1)
    with pytest.raises(TypeError, match=r"concentration must have a floating type .*int64"):
        nivmf_fast.vmf_log_normalizer(torch.ones(2, dtype=torch.int64), 3)
    with pytest.raises(TypeError, match=r"concentration must be a torch.Tensor; got float"):
        nivmf_fast.vmf_log_normalizer(2.0, 3)  # type: ignore[arg-type]


def test_half_precision_is_computed_in_float32() -> None:
    k = torch.tensor([0.5, 30.0])
    for half in (torch.float16, torch.bfloat16):
        value = nivmf_fast.vmf_log_normalizer(k.to(half), 64)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, nivmf_fast.vmf_log_normalizer(k, 64))
