"""Normaliser of the von Mises-Fisher distribution and its derivatives, in every dimension.

The uniform (Debye) expansion of the Bessel function I_nu is taken in logarithmic form, at an order
lifted until the expansion is accurate, and then stepped back by the stable recurrence; a Taylor
form keeps relative accuracy near zero. Derivation: docs/math.md, "The normaliser". The order-th
derivative of

    g(k) = log C_D(k) - log C_D(0)        with  g' = -A_D,  g'' = -A_D'

is one function of `order`, so that differentiating raises the order by one.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

MAX_DIM = 65_536
MAX_CONCENTRATION = 1e18  # k * k overflows float32 not much further out
THIRD_DERIVATIVE = (
    "the vMF log-normaliser is differentiable twice and the mean resultant length once; "
    "a higher derivative was asked for"
)
_TERMS = 13  # of the Debye series, the most that any dimension and precision needs


def debye_coefficients(terms: int = _TERMS) -> list[list[Fraction]]:
    """Coefficients of P_1 .. P_terms, where log sum_j U_j(t) / nu^j = sum_j P_j(t^2) / S^j.

    The U_j are the polynomials of the uniform expansion of I_nu (DLMF 10.41.10); the logarithm of
    their series is taken in exact fractions. P_j has j + 1 coefficients, lowest power first.
    """
    u = [[Fraction(1)]]  # of U_j / t^j in powers of t^2
    for j in range(terms):
        following = [Fraction(0)] * (j + 2)
        for i, c in enumerate(u[j]):
            power = j + 2 * i
            following[i] += c * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            following[i + 1] -= c * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
        u.append(following)
    log_u: list[list[Fraction]] = [[]]
    for j in range(1, terms + 1):  # from j u_j = sum_i i l_i u_(j-i)
        row = list(u[j])
        for i in range(1, j):
            for p, a in enumerate(log_u[i]):
                for q, b in enumerate(u[j - i]):
                    row[p + q] -= Fraction(i, j) * a * b
        log_u.append(row)
    return log_u[1:]


# The coefficients of R = sum_j P_j / S^j, and of one and two applications of S d/dS to it: Q and W
# (up to the sign) multiply each coefficient by its power of 1/S
_P = debye_coefficients()
_SERIES = [
    [
        [float(c * math.prod(j + 2 * i + 2 * w for w in range(weight))) for i, c in enumerate(row)]
        for j, row in enumerate(_P, start=1)
    ]
    for weight in range(3)
]


@dataclass(frozen=True)
class _Plan:
    """Constants that depend on the dimension and the precision alone."""

    dim: int
    nu: float  # D/2 - 1
    lift: int  # steps from the lifted order back to nu
    terms: int  # of the Debye series
    large: float  # from this concentration on, the unlifted form (only if lift > 0)
    taylor: float  # bound of (k/D) (k/(D+2)) for the Taylor form


def _plan(dim: int, dtype: torch.dtype) -> _Plan:
    nu = dim / 2 - 1
    if dtype == torch.float64:
        lift, large, taylor = max(0, math.ceil(16 - nu)), 40.0, 1e-4
        # csrc has 5, 8, 10, 13, for 2e-14 in A' at the smallest dimension; these leave 2e-13 there
        terms = 4 if dim >= 512 else 6 if dim >= 128 else 8 if dim >= 64 else 13
    else:
        lift, large, taylor = max(0, math.ceil(12 - nu)), 24.0, 4e-3
        terms = 1 if dim >= 512 else 2 if dim >= 128 else 3 if dim >= 48 else 4
    return _Plan(dim, nu, lift, terms, large, taylor)


def _series(inv_s: Tensor, tau: Tensor, terms: int, weight: int, first: int = 1) -> Tensor:
    """R (weight 0), Q (1) or W (2), from its term `first` on, by Horner's rule in 1/S and tau."""
    total = torch.zeros_like(inv_s)
    for row in reversed(_SERIES[weight][first - 1 : terms]):
        poly = torch.zeros_like(tau)
        for c in reversed(row):
            poly = poly * tau + c
        total = (total + poly) * inv_s
    return total * inv_s ** (first - 1)


def _series_at_zero(nu: float, terms: int) -> float:
    # truncated as in _series, so that g(0) = 0 exactly
    return sum(sum(row) / nu**j for j, row in enumerate(_SERIES[0][:terms], start=1))


def _debye(k: Tensor, plan: _Plan, order: int) -> Tensor:
    """The order-lifted form: the expansion at nu + lift, then `lift` backward steps."""
    nu = plan.nu + plan.lift
    s = torch.hypot(k, k.new_full((), nu))
    inv_s, tau = 1 / s, (nu / s).square()
    u = inv_s.square()
    q = (k / nu) * (k / (nu + s))  # S/nu - 1
    Q = _series(inv_s, tau, plan.terms, 1)
    A = k * (1 / (nu + s) - u * (0.5 + Q))
    B = (nu + nu * (nu / (s + k))) / (nu + s) + k * u * (0.5 + Q)
    dA = tau.sqrt() / (nu + s) + u * (
        (1 - tau) * (1 + _series(inv_s, tau, plan.terms, 2)) - 0.5 - Q
    )
    log_m = nu * (q - torch.log1p(q / 2)) - 0.5 * torch.log1p(q)
    log_m = log_m + (_series(inv_s, tau, plan.terms, 0) - _series_at_zero(nu, plan.terms))
    p = torch.zeros_like(k)
    for j in range(plan.lift, 0, -1):
        d = plan.dim + 2 * j - 2
        e = k * A / d
        p = p + e + p * e
        if j % 4 == 0:  # before the product of ratios overflows float32
            log_m, p = log_m + torch.log1p(p), torch.zeros_like(p)
        r = 1 / (d + k * A)
        B, dA, A = (d - k * B) * r, (d - k * k * dA) * r * r, k * r
    return (-(log_m + torch.log1p(p)), -A, -dA)[order]


def _unlifted(k: Tensor, plan: _Plan, order: int) -> Tensor:
    """The form for large k in low dimension: the expansion at nu itself, valid at nu = 0 too."""
    nu = plan.nu
    s = torch.hypot(k, k.new_full((), nu))
    inv_s, tau = 1 / s, (nu / s).square()
    if order == 0:
        constant = math.lgamma(nu + 1) + nu * math.log(2) - 0.5 * math.log(2 * math.pi)
        log_m_minus_k = (
            constant + nu * (nu / (s + k)) - nu * torch.log(nu + s) - 0.5 * torch.log(s)
        ) + _series(inv_s, tau, plan.terms, 0)
        return -(k + log_m_minus_k)
    u = inv_s.square()
    Q = _series(inv_s, tau, plan.terms, 1)
    if order == 1:
        return -k * (1 / (nu + s) - u * (0.5 + Q))
    W = _series(inv_s, tau, plan.terms, 2)
    return -(tau.sqrt() / (nu + s) + u * ((1 - tau) * (1 + W) - 0.5 - Q))


def _taylor_coefficients(D: int) -> tuple[float, float, float]:
    c2 = 2 * (D + 2) / (D + 4)
    c3 = (5 * D + 12) * (D + 2) / ((D + 4) * (D + 6))
    c4 = (14 * D + 48) * (D + 2) ** 2 / ((D + 4) * (D + 6) * (D + 8))
    return c2, c3, c4


def _taylor_argument(k: Tensor, dim: int) -> Tensor:
    return (k / dim) * (k / (dim + 2))


def _taylor(k: Tensor, plan: _Plan, order: int) -> Tensor:
    D = plan.dim
    c2, c3, c4 = _taylor_coefficients(D)
    y = _taylor_argument(k, D)
    if order == 0:
        return -(k * k / (2 * D)) * (1 - y * (1 / 2 - y * (c2 / 3 - y * (c3 / 4 - y * c4 / 5))))
    if order == 1:
        return -(k / D) * (1 - y * (1 - y * (c2 - y * (c3 - y * c4))))
    return -(1 / D) * (1 - y * (3 - y * (5 * c2 - y * (7 * c3 - y * 9 * c4))))


def check_dim(dim: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int) or not 2 <= dim <= MAX_DIM:
        raise ValueError(
            f"dim must be an int from 2 to {MAX_DIM:,} (a sphere in R^dim); got {dim!r}"
        )


def log_normalizer_derivative(concentration: Tensor, dim: int, order: int) -> Tensor:
    """The order-th derivative (0, 1 or 2) of g = log C_D(k) - log C_D(0); not differentiable.

    Computed in the tensor's own float32 or float64. Negative or NaN input and values above 1e18
    give NaN.
    """
    plan = _plan(dim, concentration.dtype)
    k = concentration
    valid = (k >= 0) & (k <= MAX_CONCENTRATION)  # NaN compares false
    k = torch.where(valid, k, 0)
    small = _taylor_argument(k, dim) < plan.taylor
    value = torch.where(small, _taylor(k, plan, order), _debye(k, plan, order))
    if plan.lift > 0:
        # the clamp keeps S away from 0 where this branch is not selected (D = 2, k = 0)
        value = torch.where(k > plan.large, _unlifted(k.clamp(min=plan.large), plan, order), value)
    return torch.where(valid, value, math.nan)


class _LogNormalizer(torch.autograd.Function):
    """Derivatives by raising the order: autograd through `where` would give NaN."""

    @staticmethod
    def forward(ctx: Any, concentration: Tensor, dim: int, order: int) -> Tensor:
        ctx.save_for_backward(concentration)
        ctx.dim, ctx.order = dim, order
        return log_normalizer_derivative(concentration, dim, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.order == 2:
            raise RuntimeError(THIRD_DERIVATIVE)
        (concentration,) = ctx.saved_tensors
        return grad * _LogNormalizer.apply(concentration, ctx.dim, ctx.order + 1), None, None


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, concentration: Tensor, reference: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(concentration, reference)
        ctx.dim = dim
        return _difference(concentration, reference, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        k, k0 = ctx.saved_tensors
        into_k = grad * _LogNormalizer.apply(k, ctx.dim, 1)
        return into_k, -grad * _LogNormalizer.apply(k0, ctx.dim, 1), None


def _difference(k: Tensor, k0: Tensor, dim: int) -> Tensor:
    plan = _plan(dim, k.dtype)
    if plan.lift > 0:  # low dimension: subtracting in float64 is accurate enough
        g, g0 = (log_normalizer_derivative(x.double(), dim, 0) for x in (k, k0))
        return (g - g0).to(k.dtype)
    nu = plan.nu
    s, s0 = (torch.hypot(x, x.new_full((), nu)) for x in (k, k0))
    ds = (k - k0) * ((k + k0) / (s + s0))
    i, i0 = 1 / s, 1 / s0
    first = 1 / 8 - (5 / 24) * nu**2 * (i * i + i * i0 + i0 * i0)  # of S^-1 P_1
    higher, higher0 = (_series(x, (nu * x).square(), plan.terms, 0, first=2) for x in (i, i0))
    far = -(
        (ds - nu * torch.log1p(ds / (nu + s0)) - 0.5 * torch.log1p(ds / s0))
        + (-ds * i * i0 * first + (higher - higher0))
    )
    # near zero those series cancel; there g is a polynomial in y, divided by y - y0 here
    y, y0 = _taylor_argument(k, dim), _taylor_argument(k0, dim)
    quotient, power = torch.zeros_like(y), torch.ones_like(y)  # power: (y^n - y0^n) / (y - y0)
    for n, c in enumerate((1.0, 1.0, *_taylor_coefficients(dim)), start=1):
        quotient = quotient + (-1) ** n * c / n * power
        power = y * power + y0**n
    near = (k - k0) * (k + k0) / (2 * dim) * quotient
    return torch.where(torch.maximum(y, y0) < plan.taylor, near, far)


def log_uniform_density(dim: int) -> float:
    """log C_D(0) = lgamma(D/2) - log 2 - (D/2) log pi, the uniform distribution's log density."""
    return math.lgamma(dim / 2) - math.log(2) - (dim / 2) * math.log(math.pi)


def vmf_log_normalizer(concentration: Tensor, dim: int, *, constants: bool = True) -> Tensor:
    """log C_D(k), or g = log C_D(k) - log C_D(0) with `constants=False`; twice differentiable."""
    g: Tensor = _LogNormalizer.apply(concentration, dim, 0)
    return g + log_uniform_density(dim) if constants else g


def vmf_mean_resultant_length(concentration: Tensor, dim: int) -> Tensor:
    """A_D(k) = I_{D/2}(k) / I_{D/2-1}(k); differentiable once."""
    A: Tensor = -_LogNormalizer.apply(concentration, dim, 1)
    return A


def vmf_log_normalizer_difference(concentration: Tensor, reference: Tensor, dim: int) -> Tensor:
    """g(k) - g(k0) without the cancellation of the plain difference; twice differentiable."""
    k, k0 = torch.broadcast_tensors(concentration, reference)
    difference: Tensor = _Difference.apply(k, k0, dim)
    return difference


@functools.cache
def gauss_legendre(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights on [0, 1], by Newton's iteration on the Legendre polynomial.

    In Python's arithmetic, so that kernels compiled with them are the same on every machine.
    """
    nodes, weights = [], []
    for i in range(n):
        x, slope = math.cos(math.pi * (i + 0.75) / (n + 0.5)), 0.0
        for _ in range(8):
            before, value = 1.0, x
            for j in range(2, n + 1):
                before, value = value, ((2 * j - 1) * x * value - (j - 1) * before) / j
            slope = n * (x * value - before) / (x * x - 1)
            x -= value / slope
        nodes.append((1 - x) / 2)
        weights.append(1 / ((1 - x * x) * slope * slope))
    return tuple(nodes), tuple(weights)
