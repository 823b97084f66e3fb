"""Device functions of log-PPK: a tile of scores, products over bfloat16 planes, an image's softmax.

z = num - D/2 log1p(delta) + bias, num = x . linear / sqrt(1 + delta), delta = x^2 . spread.
Called by the kernels in the other log_ppk files. Rows: row s B + i is sample s of image i.
Design: docs/design/log_ppk_triton.md.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# log1p(m) = m + m^2 p(m) on [-1/3, 1/3], minimax in the relative error
_LOG1P = tl.constexpr(
    (
        -0.12948963046073914,
        0.14004763960838318,
        -0.12167154252529144,
        0.14001159369945526,
        -0.16682305932044983,
        0.20010747015476227,
        -0.24999716877937317,
        0.3333320915699005,
        -0.5,
    )
)


@triton.jit
def log1p(d):
    """log(1 + d), to 1.6e-7 in float32: a factor D / 2T multiplies the error, and tl.log there is
    lg2.approx."""
    u = 1 + d
    if d.dtype == tl.float64:
        value = tl.log(u) + (d - (u - 1)) / u
    else:
        exponent = (u.to(tl.int32, bitcast=True) - 0x3F2AAAAB) >> 23  # u / 2^e in [2/3, 4/3)
        shrink = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        m = tl.fma(d, shrink, shrink - 1)  # exact where it matters: d itself if e = 0
        p = tl.full(d.shape, _LOG1P[0], tl.float32)
        for i in tl.static_range(1, 9):
            p = tl.fma(p, m, _LOG1P[i])
        value = tl.fma(exponent.to(tl.float32), _LN2, tl.fma(m * m, p, m))
    return tl.where(u > 0, value, float("nan"))


@triton.jit
def inverse_root(u):
    y = tl.rsqrt(u)
    return y * (1.5 - 0.5 * u * y * y)  # one Newton step: rsqrt.approx is too inaccurate at small T


@triton.jit
def load_temperature(pointer):
    t = tl.load(pointer).to(tl.float64)
    return tl.where(t > 0, t, float("nan"))


@triton.jit
def load_scales(kbar, proxies, mask, DTYPE: tl.constexpr):
    """kbar, the geometric mean of each proxy's concentrations, as hi + lo, and its inverse."""
    scale = tl.load(kbar + proxies, mask=mask, other=1.0)
    hi = scale.to(DTYPE)
    return hi, (scale - hi.to(tl.float64)).to(DTYPE), (1 / scale).to(DTYPE)


@triton.jit
def proxy_coefficients(mu, kappa, hi, lo, inverse, PROJECTION: tl.constexpr):
    """linear, spread = (kappa / kbar)^2 - 1 without cancellation, and kappa / kbar - 1."""
    excess = ((kappa - hi) - lo) * inverse
    linear = kappa * mu
    if PROJECTION:
        linear += linear * excess
    return linear, excess * (2 + excess), excess


@triton.jit
def store_planes(value, out, at, plane, PLANES: tl.constexpr):
    """Store value as a sum of PLANES bfloat16 numbers, largest first; unchanged if PLANES is 1."""
    for p in tl.static_range(PLANES):
        part = value
        if PLANES > 1:  # in bits, because a cast truncates in the interpreter
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            part = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
        tl.store(out + p * plane + at, part.to(out.dtype.element_ty))
        value -= part


@triton.jit
def add_product(total, a, a_plane, b, b_plane, PLANES: tl.constexpr):
    """total + a @ b, over the pairs of planes whose product matters, smallest first."""
    a0, b0 = tl.load(a), tl.load(b)
    step = tl.zeros(total.shape, total.dtype)
    if PLANES > 1:
        a1, b1 = tl.load(a + a_plane), tl.load(b + b_plane)
        if PLANES > 2:
            a2, b2 = tl.load(a + 2 * a_plane), tl.load(b + 2 * b_plane)
            step = tl.dot(a2, b0, step, input_precision="ieee", out_dtype=total.dtype)
            step = tl.dot(a0, b2, step, input_precision="ieee", out_dtype=total.dtype)
            step = tl.dot(a1, b1, step, input_precision="ieee", out_dtype=total.dtype)
        step = tl.dot(a1, b0, step, input_precision="ieee", out_dtype=total.dtype)
        step = tl.dot(a0, b1, step, input_precision="ieee", out_dtype=total.dtype)
    return total + tl.dot(a0, b0, step, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def score_tile(
    x, x2, x_plane, linear, spread, proxy_plane, bias, row0, local0, proxy0, P, D, PITCH,
    EXACT: tl.constexpr, PROJECTION: tl.constexpr,
    PLANES: tl.constexpr, SPREAD_PLANES: tl.constexpr,
    ROWS: tl.constexpr, PROXIES: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Scores z of rows x proxies, the projected product num = x . linear / |..|, and 1 / |..|.

    z = num - D/2 log1p(delta) + bias, delta = x^2 . spread, |..| = sqrt(1 + delta). The chunk's
    planes hold proxy `proxy0` at `local0`; rows are PITCH numbers long, D padded by zeros.
    """
    i, j, k = tl.arange(0, ROWS), tl.arange(0, PROXIES), tl.arange(0, DEPTH)
    first_x, first_proxy = tl.cast(row0, tl.int64) * PITCH, tl.cast(local0, tl.int64) * PITCH
    x, x2, linear, spread = x + first_x, x2 + first_x, linear + first_proxy, spread + first_proxy
    at_x = i[:, None] * PITCH + k[None, :]
    at_proxy = k[:, None] + j[None, :] * PITCH
    num = tl.zeros((ROWS, PROXIES), DTYPE)
    delta = tl.zeros((ROWS, PROXIES), DTYPE)
    for _ in range(0, PITCH, DEPTH):
        num = add_product(num, x + at_x, x_plane, linear + at_proxy, proxy_plane, PLANES)
        if EXACT or PROJECTION:
            a, b = x2 + at_x, spread + at_proxy
            delta = add_product(delta, a, x_plane, b, proxy_plane, SPREAD_PLANES)
        at_x += DEPTH
        at_proxy += DEPTH
    inverse_length = inverse_root(1 + delta)
    if PROJECTION:
        num *= inverse_length
    shift = tl.load(bias + proxy0 + j, mask=proxy0 + j < P, other=0.0)
    z = num + shift.to(DTYPE)[None, :]
    if EXACT:
        z -= (0.5 * D) * log1p(delta)
    return z, num, inverse_length


@triton.jit
def known_label(labels, images, mask, P):
    label = tl.load(labels + images, mask=mask, other=-1)
    return tl.where((label >= 0) & (label < P), label, -1).to(tl.int32)


@triton.jit
def image_constants(partial, common, temperature, images, mask, DTYPE: tl.constexpr):
    """Maximum and lse of log2 weight = (z - maximum) log2(e) / T - lse.

    The maximum is rounded to DTYPE, and lse makes up for the rounding.
    """
    maximum = tl.load(partial[0] + images, mask=mask, other=0.0) - common
    log_sum = tl.load(partial[1] + images, mask=mask, other=0.0)
    hi = maximum.to(DTYPE)
    return hi, ((log_sum + (maximum - hi.to(tl.float64)) / temperature) * LOG2E).to(DTYPE)
