"""The sampler on every backend: the distribution, the one stream, the gradients, the edges."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import device_of, relative_l2

import nivmf_fast
from nivmf_fast import reference, special

DIMS = [2, 3, 5, 16, 64, 128, 512, 2048]
CONCENTRATIONS = [0.0, 1e-3, 1.0, 10.0, 60.0, 200.0, 2000.0, 1e5]


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def draw(
    backend: str, loc: torch.Tensor, k: torch.Tensor | float, n: int, **options: object
) -> torch.Tensor:
    device = device_of(backend)
    k = torch.full((len(loc),), k, dtype=loc.dtype) if isinstance(k, float) else k
    return nivmf_fast.vmf_rsample(loc.to(device), k.to(device), n, backend=backend, **options)


def one_minus_w(x: torch.Tensor, loc: torch.Tensor) -> torch.Tensor:
    return (x.cpu().double() - loc.double()).square().sum(-1) / 2


def marginal_cdf(dim: int, k: float) -> Callable[[np.ndarray], np.ndarray]:
    """CDF of 1 - w by quadrature in the angle: density exp(k cos a) sin(a)^(D-2)."""

    def log_density(a: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            power = (dim - 2) * np.log(np.sin(a)) if dim > 2 else 0.0
        return -2 * k * np.sin(a / 2) ** 2 + power

    coarse = np.linspace(0, math.pi, 400_001)
    height = log_density(coarse)
    inside = coarse[height > np.nanmax(height) - 50]
    angle = np.linspace(inside[0], inside[-1], 100_001)
    density = np.nan_to_num(np.exp(log_density(angle) - np.nanmax(height)))
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return lambda gap: np.interp(2 * np.arcsin(np.sqrt(gap / 2)), angle, cdf / cdf[-1])


@pytest.mark.parametrize("dim", DIMS)
def test_the_angle_follows_its_exact_law(backend: str, dim: int) -> None:
    """Kolmogorov-Smirnov and the first two moments of w = loc . x.

    The sampler of the research code would fail at once: at D = 128 its mean cosine is 0.723 for
    0.731 at concentration 200, more than 5 standard errors here, and -0.226 for 0.153 at 20.
    """
    n, images = 10, 2000 if dim <= 128 else 500
    if backend == "reference":  # eager: a tenth of the draws
        images //= 10
    p_values = []
    for cell, k in enumerate(CONCENTRATIONS):
        loc = unit(images, dim, seed=cell)
        gap = one_minus_w(draw(backend, loc, k, n, seed=1000 * dim + cell), loc).flatten()
        result = scipy.stats.kstest(gap.clamp(0, 2).numpy(), marginal_cdf(dim, k))
        p_values.append(result.pvalue)
        exact = torch.tensor(k, dtype=torch.float64)
        A = float(special.vmf_mean_resultant_length(exact, dim))
        variance = -float(special.log_normalizer_derivative(exact, dim, 2))
        z_mean = (float(gap.mean()) - (1 - A)) / math.sqrt(variance / len(gap))
        assert abs(z_mean) < 4, (k, z_mean)
        spread = (gap - (1 - A)).square()
        z_variance = (float(spread.mean()) - variance) / float(spread.std()) * len(gap) ** 0.5
        assert abs(z_variance) < 5, (k, z_variance)
    assert min(p_values) > 1e-3, p_values
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3, p_values


@pytest.mark.parametrize(("dim", "k"), [(128, 200.0), (128, 20.0)])
def test_the_bias_of_the_research_sampler_would_be_seen(backend: str, dim: int, k: float) -> None:
    released = {200.0: 0.723, 20.0: -0.226}[k]  # mean cosines measured on the research code
    loc = unit(500, dim)
    w = 1 - one_minus_w(draw(backend, loc, k, 10, seed=7), loc)
    error = float(w.std()) / w.numel() ** 0.5
    A = float(special.vmf_mean_resultant_length(torch.tensor(k, dtype=torch.float64), dim))
    assert abs(float(w.mean()) - A) < 4 * error
    assert abs(released - A) > 8 * error


@pytest.mark.parametrize("dim", [2, 3, 5, 16, 128])
def test_the_tangent_direction_is_uniform_whatever_the_angle(backend: str, dim: int) -> None:
    """In each third of w the tangent directions have mean 0 and second moment 1 / (D - 1)."""
    loc = torch.zeros(4000, dim)
    loc[:, -1] = 1  # the tangent space is then the other coordinates
    for k in (1.0, 60.0):
        x = draw(backend, loc, k, 5, seed=11).cpu().double().view(-1, dim)
        tangent = torch.nn.functional.normalize(x[:, :-1], dim=-1)
        for third in tangent[x[:, -1].argsort()].chunk(3):
            n, m = len(third), dim - 1
            z = third.mean(0) * math.sqrt(n * m)
            assert z.abs().max() < 5
            second = third.T @ third / n - torch.eye(m, dtype=torch.float64) / m
            assert second.abs().max() < 6 * math.sqrt(2 / n) / m ** (0.5 if m == 1 else 1)


@pytest.mark.parametrize("dim", [2, 3, 16, 130, 512])
def test_samples_have_unit_length_for_every_direction(
    backend: str, dim: int, dtype: torch.dtype
) -> None:
    special_locs = torch.zeros(3, dim, dtype=dtype)
    special_locs[0, 0], special_locs[1, 0], special_locs[2, -1] = 1, -1, 1
    loc = torch.cat([special_locs, unit(50, dim, dtype=dtype)])
    for k in (0.0, 1.0, 300.0, 1e6):
        x = draw(backend, loc, k, 20, seed=3)
        length = x.double().norm(dim=-1)
        assert (length - 1).abs().max() <= 1e-6
    close = one_minus_w(x, loc)  # k = 1e6 keeps to loc: +-e_1 and the pole included
    assert close.max() < 1e-6 * (dim + 40)


# --- one stream


@pytest.mark.parametrize("dim", [2, 3, 5, 16, 64, 130, 512])
def test_every_backend_draws_the_samples_of_the_reference(backend: str, dim: int) -> None:
    """Equal to 2e-5 but where the reference's margin says that float32 may go another way: those
    are counted, and fewer than one in a thousand."""
    if backend == "reference":
        pytest.skip("the reference against itself")
    n, images = 20, 160  # 7 dimensions x 10 concentrations x 3,200: over 200,000 samples in all
    excepted = total = 0
    for k in (0.0, 0.5, 3.0, 10.0, 30.0, 100.0, 500.0, 5e3, 1e5, 1e6):
        loc = unit(images, dim, seed=int(k))
        exact = reference.vmf_rsample(
            loc.double(),
            torch.full((images,), k, dtype=torch.float64),
            n,
            torch.tensor(5),
            3,
            stream_dtype=torch.float32,
        )
        x = draw(backend, loc, k, n, seed=5, image_offset=3).cpu()
        sure = exact.margin > 2e-5 + 2e-9 * dim
        assert (x - exact.samples).abs()[sure].max() < 2e-5, k
        excepted, total = excepted + int((~sure).sum()), total + sure.numel()
    assert excepted < 1e-3 * total


def test_float64_kernels_agree_with_the_reference(backend: str) -> None:
    for dim in (2, 5, 64, 130):
        loc, k = unit(40, dim, dtype=torch.float64), torch.logspace(-2, 4, 40).double()
        exact = reference.vmf_rsample(loc, k, 10, torch.tensor(9))
        x = draw(backend, loc, k, 10, seed=9).cpu()
        assert (x - exact.samples).abs()[exact.margin > 1e-11].max() < 1e-11


def test_a_sample_depends_on_its_indices_alone(backend: str) -> None:
    """Bitwise the same in any batch split, for any number of samples, and again and again."""
    for dim in (3, 64, 257):
        loc, k = unit(800, dim), torch.logspace(-1, 4, 800)
        whole = draw(backend, loc, k, 4, seed=2)
        parts = [
            draw(backend, loc[i:j], k[i:j], 4, seed=2, image_offset=i)
            for i, j in ((0, 8), (8, 9), (9, 300), (300, 800))
        ]
        assert torch.equal(whole, torch.cat(parts, dim=1))
        assert torch.equal(whole[:2], draw(backend, loc, k, 2, seed=2))
        for _ in range(10):
            assert torch.equal(whole, draw(backend, loc, k, 4, seed=2))
        assert not torch.equal(whole, draw(backend, loc, k, 4, seed=3))


def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    if backend not in ("cpu", "reference"):
        pytest.skip("a matter of CPU backends")
    loc, k = unit(50, 130), torch.logspace(-1, 4, 50)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mu, kappa = loc.clone().requires_grad_(), k.clone().requires_grad_()
            x = draw(backend, mu, kappa, 7, seed=2)
            results.append((x, *torch.autograd.grad((x * x.detach().cos()).sum(), (mu, kappa))))
    finally:
        torch.set_num_threads(before)
    if backend == "cpu":  # the reference sums with torch, whose order may depend on threads
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(results[0][0], other[0]) for other in results[1:])


def test_image_offset_reaches_past_31_bits(backend: str) -> None:
    loc, k = unit(4, 5), torch.full((4,), 9.0)
    offset = 2**32 - 4
    x = draw(backend, loc, k, 3, seed=0, image_offset=offset).cpu()
    exact = reference.vmf_rsample(loc, k, 3, torch.tensor(0), offset).samples
    torch.testing.assert_close(x, exact, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="image_offset must be from 0 to 4294967292"):
        draw(backend, loc, k, 3, seed=0, image_offset=offset + 1)


def test_seeds_come_from_torch_generators(backend: str) -> None:
    device = device_of(backend)
    loc, k = unit(3, 4), torch.full((3,), 9.0)
    torch.manual_seed(5)
    first, second = draw(backend, loc, k, 2), draw(backend, loc, k, 2)
    torch.manual_seed(5)
    assert torch.equal(first, draw(backend, loc, k, 2))
    assert not torch.equal(first, second)
    pair = [torch.Generator(device).manual_seed(1) for _ in range(2)]
    drawn = [draw(backend, loc, k, 2, generator=g) for g in pair]
    assert torch.equal(*drawn)
    seed = torch.tensor(-7, device=device)
    assert torch.equal(draw(backend, loc, k, 2, seed=seed), draw(backend, loc, k, 2, seed=-7))


# --- gradients


@pytest.mark.parametrize("dim", [2, 3, 5, 15, 16, 64, 128, 512])
def test_backward_matches_the_reference_in_float64(
    backend: str, dim: int, dtype: torch.dtype
) -> None:
    device = device_of(backend)
    images, n = 60, 6
    loc = 3 * unit(images, dim, dtype=dtype)  # of any length: the gradient is then tangent / 3
    k = torch.logspace(-2, 4, images, dtype=torch.float64).to(dtype)
    x, gap = torch.ops.nivmf_fast.vmf_rsample(
        loc.to(device), k.to(device), n, torch.tensor(4, device=device), 0, backend
    )
    grad = unit(n, images, dim, seed=8, dtype=dtype).to(device)
    into_loc, into_k = torch.ops.nivmf_fast.vmf_rsample_backward(
        grad, x, gap, loc.to(device), k.to(device), backend
    )
    tensors = (t.cpu().double() for t in (grad, x, gap, loc, k))
    exact_loc, exact_k = reference.vmf_rsample_backward(*tensors)
    assert relative_l2(into_loc, exact_loc) < (2e-6 if dtype == torch.float32 else 1e-12)
    # each image on its own: the concentrations span six decades, and so do the gradients
    scale = exact_k.abs() + reference.vmf_dw_dconcentration(
        gap.cpu().double(), k.cpu().double(), dim
    ).abs().mean(0)
    worst = ((into_k.cpu().double() - exact_k).abs() / scale).max()
    assert worst < (5e-5 if dtype == torch.float32 else 1e-10), float(worst)


@pytest.mark.parametrize("dim", [2, 3, 5, 16, 64, 512])
def test_the_concentration_gradient_is_unbiased(backend: str, dim: int) -> None:
    """E[dw/dk] = A'. Differentiating the accepted proposal alone gives 0.80 A' at D = 3, k = 1."""
    images = 1000 if backend == "reference" else 20_000
    for k in (0.0, 1.0, 10.0, 60.0, 2000.0):
        loc = unit(images, dim)
        kappa = torch.full((images,), k, requires_grad=True)
        x = draw(backend, loc, kappa, 1, seed=int(k) + dim)
        (dw,) = torch.autograd.grad((x.cpu() * loc).sum(), kappa)
        exact = torch.tensor(k, dtype=torch.float64)
        expected = -float(special.log_normalizer_derivative(exact, dim, 2))
        z = (float(dw.double().mean()) - expected) / (float(dw.double().std()) / images**0.5)
        assert abs(z) < 4.5, (k, z)


@pytest.mark.parametrize("dim", [2, 3, 5, 16, 64])
def test_the_direction_gradient_is_unbiased_for_a_quadratic(backend: str, dim: int) -> None:
    """E[(c.x)^2] = A/k + (1 - D A/k) (c.mu)^2: a linear function could not see a missing term.

    Autograd through the projection of the normals would give 1.283 for 1.400 at D = 5, k = 6.
    """
    images = 2000 if backend == "reference" else 40_000
    mu, c = unit(2, dim, seed=dim)
    tangent = torch.nn.functional.normalize(c - (c @ mu) * mu, dim=-1)
    for k in (0.5, 6.0, 40.0, 300.0):
        loc = mu.repeat(images, 1).requires_grad_()
        x = draw(backend, loc, k, 1, seed=int(k) + dim).cpu()
        A = float(special.vmf_mean_resultant_length(torch.tensor(k, dtype=torch.float64), dim))
        for f, expected in (
            ((x @ c).square(), 2 * (1 - dim * A / k) * float(c @ mu) * float(c @ tangent)),
            (x @ c, A * float(c @ tangent)),
        ):
            (grad,) = torch.autograd.grad(f.sum(), loc, retain_graph=True)
            slope = grad.double() @ tangent.double()
            z = (float(slope.mean()) - expected) / (float(slope.std()) / images**0.5)
            assert abs(z) < 4.5, (k, z)
            assert (grad @ mu).abs().max() < 1e-4 * grad.abs().max()  # and tangent


def test_a_second_derivative_is_refused(backend: str) -> None:
    k = torch.full((2,), 3.0, requires_grad=True)
    x = draw(backend, unit(2, 5), k, 4, seed=0)
    (first,) = torch.autograd.grad(x.square().sum() + x.sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="vmf_rsample can be differentiated once"):
        first.sum().backward()


# --- edges


def test_shapes_strides_and_types(backend: str) -> None:
    loc, k = unit(6, 12), torch.linspace(1, 50, 6)
    plain = draw(backend, loc, k, 3, seed=1)
    assert torch.equal(draw(backend, loc.T.contiguous().T, k, 3, seed=1), plain)
    strided = torch.stack([k, k], 1)[:, 0]
    assert torch.equal(draw(backend, loc, strided, 3, seed=1), plain)
    one = draw(backend, loc[:1].expand(4, -1), k[:1].expand(4), 3, seed=1)
    assert torch.equal(one[:, 0], plain[:, 0])
    assert draw(backend, loc, k, 0).shape == (0, 6, 12)
    assert draw(backend, loc[:0], k[:0], 3).shape == (3, 0, 12)
    for half in (torch.float16, torch.bfloat16):
        x = draw(backend, loc.to(half), k.to(half), 3, seed=1)
        assert x.dtype == torch.float32
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-6  # loc is normalised in float32
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            assert torch.equal(draw(backend, loc.to(half), k.to(half), 3, seed=1), x)
    empty = loc[:0].clone().requires_grad_()
    draw(backend, empty, k[:0], 3).sum().backward()
    assert empty.grad.shape == (0, 12)


def test_a_bad_image_is_nan_and_leaves_the_others_alone(backend: str) -> None:
    loc, k = unit(6, 7), torch.full((6,), 9.0)
    good = draw(backend, loc, k, 3, seed=1)
    k[1], k[2], k[3] = -1.0, math.nan, math.inf
    loc[4] = 0
    loc[5, 2] = math.nan
    x = draw(backend, loc, k, 3, seed=1, validate=False)
    assert torch.equal(x[:, 0], good[:, 0])
    assert x[:, 1:].isnan().all()


def test_bad_arguments_are_named() -> None:
    loc, k = unit(3, 4), torch.ones(3)
    call = nivmf_fast.vmf_rsample
    with pytest.raises(ValueError, match=r"loc must have shape \[B, D\]; got \[4\]"):
        call(loc[0], k, 2)
    with pytest.raises(ValueError, match=r"concentration must have shape \[B\] = \[3\]; got \[2\]"):
        call(loc, k[:2], 2)
    with pytest.raises(ValueError, match=r"dim must be an int from 2"):
        call(loc[:, :1], k, 2)
    with pytest.raises(ValueError, match=r"concentration must be >= 0; got -1.0 at \[0\]"):
        call(loc, -k, 2)
    with pytest.raises(ValueError, match=r"concentration must be >= 0; got nan"):
        call(loc, k * math.nan, 2)
    with pytest.raises(ValueError, match=r"loc must be of nonzero length; .* at \[0\]"):
        call(loc * 0, k, 2)
    with pytest.raises(ValueError, match=r"n must be at least 0; got -1"):
        call(loc, k, -1)
    with pytest.raises(TypeError, match=r"n must be an int; got 2.0"):
        call(loc, k, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loc must have a floating type .* got torch.int64"):
        call(loc.long(), k, 2)
    with pytest.raises(ValueError, match="seed or generator, not both"):
        call(loc, k, 2, seed=1, generator=torch.Generator())
    with pytest.raises(TypeError, match="seed must be an int or a 0-d int64 tensor"):
        call(loc, k, 2, seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu"):
        call(loc, k, 2, backend="gpu")


def test_operator_contracts(backend: str) -> None:
    device = device_of(backend)
    loc, k = unit(3, 20).to(device).requires_grad_(), torch.full((3,), 9.0, device=device)
    k.requires_grad_()
    seed = torch.tensor(1, device=device)
    rsample = torch.ops.nivmf_fast.vmf_rsample.default
    torch.library.opcheck(rsample, (loc, k, 2, seed, 0, backend))
    x, gap = rsample(loc.detach(), k.detach(), 2, seed, 0, backend)
    torch.library.opcheck(
        torch.ops.nivmf_fast.vmf_rsample_backward.default,
        (torch.ones_like(x), x, gap, loc.detach(), k.detach(), backend),
    )
    normalizer = "auto" if backend == "triton" else backend  # which has none of its own
    torch.library.opcheck(torch.ops.nivmf_fast.vmf_log_normalizer.default, (k, 20, 0, normalizer))


def test_the_graph_compiles_whole(backend: str) -> None:
    device = device_of(backend)

    def loss(loc: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        x = nivmf_fast.vmf_rsample(loc, k, 3, seed=4, backend=backend)
        return x[..., 0].square().sum() + nivmf_fast.vmf_log_normalizer(k, 6).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        loc, k = unit(4, 6).to(device).requires_grad_(), torch.full((4,), 9.0, device=device)
        k.requires_grad_()
        value = function(loc, k)
        results.append((value.detach(), *torch.autograd.grad(value, (loc, k))))
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(eager, whole, rtol=1e-6, atol=1e-7)


def test_a_cuda_graph_draws_what_its_seed_tensor_says(backend: str) -> None:
    if backend not in ("cuda", "triton"):
        pytest.skip("a matter of GPU backends")
    loc, k = unit(9, 33).cuda().requires_grad_(), torch.full((9,), 20.0, device="cuda")
    k.requires_grad_()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        x = nivmf_fast.vmf_rsample(loc, k, 4, seed=seed, backend=backend)
        return (x.detach(), *torch.autograd.grad(x.square()[..., 0].sum(), (loc, k)))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_importing_the_library_takes_no_gpu_memory() -> None:
    code = "import nivmf_fast, torch; raise SystemExit(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
