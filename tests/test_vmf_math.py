"""The mathematics that CPU and GPU share in csrc: on the host, against exact values."""

import functools
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from conftest import golden
from mpmath import mpf
from numpy.typing import NDArray

from nivmf_fast import special
from nivmf_fast._schemas import dead_log2

ROOT = Path(__file__).parent.parent
DTYPES = [np.float32, np.float64]
# relative to the value (h: to the larger of |h| and 1), each about twice what the formulas reach
NORMALIZER_TOLERANCE = {
    np.float32: {"g": 5e-7, "h": 1e-6, "A": 5e-7, "1 - A": 2e-6, "A'": 4e-6},
    np.float64: {"g": 2e-14, "h": 2e-14, "A": 5e-15, "1 - A": 2e-14, "A'": 2e-14},
}
# the expansion of dw/dk in 1 / (D - 1) begins at D = 16 in float32, at D = 512 in float64
GRADIENT_TOLERANCE = {np.float32: 2e-5, np.float64: 2e-13}


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """The headers as a Python module, built once into build/."""
    pytest.importorskip("pybind11", reason="pip install pybind11 to test the device math")
    pytest.importorskip("ninja", reason="pip install ninja to test the device math")
    import pybind11
    from torch.utils import cpp_extension

    directory = ROOT / "build" / "host_math"
    directory.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "host_math",
        [str(ROOT / "tests" / "host_math.cpp")],
        extra_include_paths=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_cflags=["-std=c++17", "-O1"],
        build_directory=str(directory),
    )


@functools.cache
def exact_normalizer(k: float | str, dim: int) -> dict[str, mpf]:
    """g, h, A, 1 - A, A' of exactly this concentration; 60 digits outlast the cancellations."""
    with mpmath.workdps(60):
        x, half = mpf(k), mpf(dim) / 2
        if x < 2e4:  # a convergent series of about k terms
            scale = mpmath.hyp0f1(half, x * x / 4)
            g, A = -mpmath.log(scale), x / dim * mpmath.hyp0f1(half + 1, x * x / 4) / scale
        else:
            bessel = mpmath.besseli(half - 1, x)
            A = mpmath.besseli(half, x) / bessel
            g = (half - 1) * mpmath.log(x / 2) - mpmath.loggamma(half) - mpmath.log(bessel)
        slope = 1 - A * A - (dim - 1) * A / x if x else mpf(1) / dim
        return {"g": g, "h": g + x, "A": A, "1 - A": 1 - A, "A'": slope}


@functools.cache
def exact_phi(p: float, k: float, dim: int) -> mpf:
    """(dw/dk) / (1 - w^2) at exactly 1 - w = p, by integrating -(dF/dk) / f over a tail."""
    with mpmath.workdps(20):
        w, x, A = 1 - mpf(p), mpf(k), exact_normalizer(k, dim)["A"]
        s, theta = mpmath.sqrt(p * (2 - mpf(p))), mpmath.acos(w)

        def log_ratio(angle: mpf) -> mpf:  # of the density in the angle to its value at theta
            return x * (mpmath.cos(angle) - w) + (dim - 2) * mpmath.log(mpmath.sin(angle) / s)

        end = mpf(0) if w >= A else mpmath.pi
        near, far = theta, end  # cut where the density has fallen by e^-50
        while abs(far - near) > mpf("0.01") * abs(far - theta):
            middle = (near + far) / 2
            near, far = (middle, far) if log_ratio(middle) > -50 else (near, middle)
        pieces = mpmath.linspace(theta, far, 7)

        def integrand(angle: mpf) -> mpf:
            return (mpmath.cos(angle) - A) * mpmath.exp(log_ratio(angle))

        return abs(mpmath.quad(integrand, pieces)) / s


def error(value: Any, exact: mpf, floor: float = 0.0) -> float:
    value = value if isinstance(value, mpf) else mpf(float(value))
    return float(abs(value - exact) / max(abs(exact), mpf(floor), mpf("1e-300")))


def check_normalizer(
    host: ModuleType, dim: int, ks: NDArray[Any], exact: list[dict[str, mpf]]
) -> None:
    for (name, limit), column in zip(
        NORMALIZER_TOLERANCE[ks.dtype.type].items(), host.log_normalizer(ks, dim), strict=True
    ):
        for k, value, values in zip(ks, column, exact, strict=True):
            assert error(value, values[name], 1.0 if name == "h" else 0.0) <= limit, (name, dim, k)


def test_the_exact_values_of_these_tests_are_the_golden_ones() -> None:
    rows = [row for row in golden("log_cp")["rows"] if float(row[1]) < 2e4][::23]
    assert len(rows) > 20
    with mpmath.workdps(40):
        for dim, k, _, *texts in rows:
            exact = exact_normalizer(k, dim)
            for name, text in zip(("g", "A", "A'", "1 - A"), texts, strict=True):
                assert error(exact[name], mpf(text)) < 1e-22, (name, dim, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalizer_is_exact_at_the_golden_points(host: ModuleType, dtype: type) -> None:
    points = defaultdict(list)
    with mpmath.workdps(30):
        for dim, text, _, g, A, slope, complement in golden("log_cp")["rows"]:
            k, A, slope = dtype(text), mpf(A), mpf(slope)
            shift = mpf(float(k)) - mpf(text)  # k is rounded: to first order in that
            g = mpf(g) - A * shift
            values = {"g": g, "h": g + float(k), "A": A + slope * shift, "A'": slope}
            points[dim].append((k, values | {"1 - A": mpf(complement) - slope * shift}))
    assert len(points) > 10
    for dim, pairs in points.items():
        check_normalizer(host, dim, np.array([k for k, _ in pairs]), [v for _, v in pairs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 6, 13, 25, 26, 33, 34, 47, 63, 127, 300, 511, 3000, 65536])
def test_normalizer_is_exact_between_the_golden_points(
    host: ModuleType, dtype: type, dim: int
) -> None:
    small = (4e-3 if dtype is np.float32 else 1e-4) ** 0.5 * (dim * (dim + 2)) ** 0.5
    ks = [1e-12, 7e-4, 0.37, 3.3, 23.99, 24.01, 39.99, 40.01, 173.0, 4321.0]
    ks += [0.999 * small, 1.001 * small, *([9.87e5] if dim < 5000 else [])]
    k = np.array(ks, dtype)
    check_normalizer(host, dim, k, [exact_normalizer(float(x), dim) for x in k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 40, 512])
def test_normalizer_at_the_ends(host: ModuleType, dtype: type, dim: int) -> None:
    at_zero = [v[0] for v in host.log_normalizer(np.zeros(1, dtype), dim)]
    assert at_zero == [0, 0, 0, 1, dtype(1) / dtype(dim)]
    impossible = np.array([-1, np.nan, 1.01e18, 1e30, np.inf, -np.inf], dtype)
    for column in host.log_normalizer(impossible, dim):
        assert np.isnan(column).all()
    for column in host.log_normalizer(np.array([1e17, 1e18], dtype), dim):
        assert np.isfinite(column).all()


# The smallest dimensions with their number of terms. Two normalisers check each other, so they need
# not be one, but each choice here is on purpose: C++ has terms for 2e-14 in A' in float64, Python
# for 2e-13.
TERMS = {
    np.float32: {2: (4, 4), 48: (3, 3), 128: (2, 2), 512: (1, 1)},
    np.float64: {2: (13, 13), 64: (10, 8), 128: (8, 6), 512: (5, 4)},
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_constants_are_those_of_python(host: ModuleType, dtype: type) -> None:
    name = np.dtype(dtype).name
    torch_dtype = getattr(torch, name)
    assert host.max_concentration == special.MAX_CONCENTRATION
    for dim in (2, 3, 25, 26, 33, 34, 47, 48, 63, 64, 127, 128, 511, 512, 65_536):
        plan = special._plan(dim, torch_dtype)
        lifts, terms, large, taylor = getattr(host, f"normalizer_plan_{name}")(dim)
        assert (terms, plan.terms) == TERMS[dtype][max(d for d in TERMS[dtype] if d <= dim)]
        assert (lifts, large, dtype(taylor)) == (plan.lift, plan.large, dtype(plan.taylor))
    for n, proxies in ((1, 1), (5, 100), (3, 11_318), (64, 50_000)):
        dead = getattr(host, f"dead_log2_{name}")(n, proxies)
        expected = dead_log2(torch_dtype, n * proxies)
        assert dead == pytest.approx(expected, rel=2 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dw_dk_is_exact_at_the_golden_quantiles(host: ModuleType, dtype: type) -> None:
    points = defaultdict(list)
    for dim, k, _, w, p, dw, _ in golden("vmf_marginal")["rows"]:
        # phi is smooth up to w = -1, but the golden 1 + w has lost its digits there
        if dtype(k) == float(k) and 1 + mpf(w) > 0.01:
            points[dim, float(k)].append((dtype(p), mpf(dw) / (mpf(p) * (1 + mpf(w)))))
    assert sum(map(len, points.values())) > 300
    for (dim, k), pairs in points.items():
        phi = host.radial_gradient(np.array([p for p, _ in pairs], dtype), k, dim)
        for value, (p, exact) in zip(phi, pairs, strict=True):
            assert error(value, exact) <= GRADIENT_TOLERANCE[dtype], (dim, k, p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 4, 6, 15, 16, 40, 511, 512])
def test_dw_dk_is_exact_between_the_golden_quantiles(
    host: ModuleType, dtype: type, dim: int
) -> None:
    for k in (0.3, 7.0, 33.0, 3000.0):
        mean, spread = (float(exact_normalizer(k, dim)[name]) for name in ("1 - A", "A'"))
        ps = [mean + z * spread**0.5 for z in (-2.5, -0.7, 0.01, 1.3, 3.5)]
        p = np.array([p for p in ps if 0.001 * mean < p < 2], dtype)
        k = float(dtype(k))
        for i, value in enumerate(host.radial_gradient(p, k, dim)):
            exact = exact_phi(float(p[i]), k, dim)
            assert error(value, exact) <= GRADIENT_TOLERANCE[dtype], (dim, k, p[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3, 15, 16, 600])
def test_dw_dk_is_finite_and_smooth_at_the_poles(host: ModuleType, dtype: type, dim: int) -> None:
    for k in (0.0, 1e-3, 50.0, 1e6):
        north = host.radial_gradient(np.array([0, 1e-12], dtype), k, dim)
        assert np.isfinite(north).all() and abs(north[0] / north[1] - 1) < 1e-3
    south = host.radial_gradient(np.array([2, 1.999999], dtype), 1.0, dim)
    assert np.isfinite(south).all() and abs(south[0] / south[1] - 1) < 1e-3
    uniform = host.radial_gradient(np.array([0, 0.3, 1.7, 2], dtype), 0.0, dim)
    assert uniform == pytest.approx([1 / (dim - 1)] * 4, rel=GRADIENT_TOLERANCE[dtype])


# Random123 1.14, kat_vectors, philox 4x32 10: counter, key, result
PHILOX_KNOWN_ANSWERS = {
    "zeros": (
        [0x00000000, 0x00000000, 0x00000000, 0x00000000],
        [0x00000000, 0x00000000],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    "ones": (
        [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
        [0xFFFFFFFF, 0xFFFFFFFF],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize("name", PHILOX_KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(host: ModuleType, name: str) -> None:
    counter, key, answer = PHILOX_KNOWN_ANSWERS[name]
    assert list(host.philox(counter, key)) == answer


def test_uniforms_lie_in_the_half_open_unit_interval(host: ModuleType) -> None:
    words = np.array([0, 1, 2**31, 2**32 - 129, 2**32 - 1], np.uint32)
    expected = words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33
    assert host.uniform(words).tolist() == expected.astype(np.float32).tolist()
    assert host.uniform(words)[0] == 2.0**-33 and host.uniform(words)[-1] == 1


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 4e-7), (np.float64, 8e-16)])
def test_normals_follow_their_uniforms(host: ModuleType, dtype: type, limit: float) -> None:
    near_one = 1 - 2.0 ** -np.arange(1, 25)
    u0 = np.concatenate([2.0 ** -np.arange(34), near_one, np.linspace(1e-3, 1, 999)]).astype(dtype)
    u1 = np.concatenate([np.linspace(1e-4, 1, 1003), np.arange(1, 9) / 8, near_one]).astype(dtype)
    a, b = (x.ravel() for x in np.meshgrid(u0, u1))
    # extended precision; sin and cos of the exactly reduced angle
    r = np.sqrt(-2 * np.log(a.astype(np.longdouble)))
    turn = b.astype(np.longdouble)
    angle = 2 * np.arctan2(np.longdouble(0), np.longdouble(-1)) * (turn - np.round(turn))
    normals = r * np.cos(angle), r * np.sin(angle)
    for value, exact in zip(host.box_muller(a, b), normals, strict=True):
        assert (np.abs(value - exact) <= limit * np.abs(r)).all()


def test_offsets_go_beyond_32_bits(host: ModuleType) -> None:
    rows = [(9, 1023, 1024, 2**20), (2**33, 5, 7, 3), (3, 2**31, 2**32, 2)]
    for sample, image, batch, dim in rows:
        offset = host.row_offset(sample, image, batch, dim)
        assert offset == (sample * batch + image) * dim > 2**31
