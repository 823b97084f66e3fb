"""The Triton sampler: compiled ahead of time, interpreted on the CPU, and run where a GPU is.

test_vmf_rsample.py has the tests of every backend, which include this one on a GPU. The interpreter
must be switched on before triton is imported, so a second process, this file run as a script, makes
the interpreted calls: few programs of many rows, since its time depends on the number of operations
and not of elements.
"""

import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from filelock import FileLock
from torch import Tensor

from nivmf_fast import reference

triton = pytest.importorskip("triton", reason="pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nivmf_fast.triton import vmf_sampler, vmf_sampler_backward  # noqa: E402

backward_kernel = vmf_sampler_backward._backward_kernel

DIMS = (2, 3, 5, 16, 64, 130)
GRADIENTS = (*((D, 10) for D in DIMS), (3, 1), (3, 35), (16, 1), (16, 35), (4100, 3))  # D, N
SEED = torch.tensor(-81985529216486896)  # both of its words in use, and the sign
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")


# --- the compiler


def compiled(kernel: Any, dtype: torch.dtype, arch: int, shape: dict[str, int]) -> Any:
    names = kernel.arg_names
    types = dict.fromkeys(names, "*fp32" if dtype == torch.float32 else "*fp64")
    types |= {"n": "i32", "B": "i32", "image_offset": "i64", "seed": "*i64"}
    types |= dict.fromkeys(shape, "constexpr")
    unaligned = {"n", "B", "image_offset", "seed", "concentration", *shape}
    if kernel is backward_kernel:
        unaligned.add("one_minus_w")
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in shape.items() if name in names},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in unaligned
        },
    )
    options = {"num_warps": shape["num_warps"], "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("D", [3, 16, 130, 512, 4096, 5000])
def test_no_register_spills(D: int, dtype: torch.dtype, arch: int, tmp_path: Path) -> None:
    """One dimension of each kind: odd, several rows a warp, not full, whole, the largest block
    (float64: beyond it), beyond it."""
    kinds = {
        vmf_sampler._rsample_kernel: vmf_sampler._forward_shape(D, dtype.itemsize),
        backward_kernel: vmf_sampler_backward._backward_shape(10, D, dtype.itemsize),
    }
    for kernel, shape in kinds.items():
        binary = compiled(kernel, dtype, arch, shape)
        used = resources(binary, tmp_path)
        assert used["REG"] > 0
        assert used["STACK"] == used["LOCAL"] == 0, (kernel, shape, used)
        if kernel is vmf_sampler._rsample_kernel and D % 4 == 0:  # stores of 16 bytes
            assert re.search(r"st\.global\.v(4\.b32|2\.b64)", binary.asm["ptx"])


# --- the calls that are interpreted, and repeated on a GPU


def distributions(B: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    loc = torch.randn(B, D, generator=torch.Generator().manual_seed(D), dtype=torch.float64)
    concentration = torch.tensor([0.0, 0.3, 5.5, 17.0, 100.0, 1e5], dtype=dtype)
    return loc.to(dtype), concentration.repeat(B)[:B]


def sample_call(D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    n, B = (60, 900) if D <= 16 and dtype == torch.float32 else (20, 100)
    return *distributions(B, D, dtype), n, SEED, 2**32 - 50  # the image's word wraps around


def gradient_call(D: int, dtype: torch.dtype, n: int, B: int) -> tuple[Tensor, ...]:
    loc, concentration = distributions(B, D, dtype)
    draw = reference.vmf_rsample(loc, concentration, n, SEED)
    grad = torch.randn(draw.samples.shape, generator=torch.Generator().manual_seed(n)).to(dtype)
    return grad, draw.samples, draw.one_minus_w, loc, concentration


def golden_rows(D: int) -> tuple[Tensor, ...]:
    """Concentration, 1 - w, dw/dconcentration; not where rounding 1 - w moves 1 + w."""
    rows = [row for row in golden("vmf_marginal")["rows"] if int(row[0]) == D]
    columns = torch.tensor(
        [[float(row[i]) for i in (1, 4, 5)] for row in rows], dtype=torch.float64
    )
    return tuple(columns[columns[:, 1] < 1.999].T.contiguous())


def golden_call(D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """With G = loc the gradient in the concentration is dw/dconcentration itself."""
    concentration, p, _ = golden_rows(D)
    loc, across = torch.zeros(2, D, dtype=torch.float64)
    loc[0], loc[1], across[0], across[1] = 0.8, -0.6, 0.6, 0.8
    samples = (1 - p)[:, None] * loc + (p * (2 - p)).sqrt()[:, None] * across
    tensors = loc.expand_as(samples)[None], samples[None], p[None], loc.expand_as(samples)
    return tuple(t.to(dtype).contiguous() for t in (*tensors, concentration))


def bad_call() -> tuple[Any, ...]:
    """Every second image is bad."""
    loc, concentration = distributions(14, 5, torch.float32)
    loc[1], loc[3, 2], loc[5, 0] = 0, math.nan, math.inf
    concentration[[7, 9, 11, 13]] = torch.tensor([-1, math.inf, math.nan, 1e19])
    return loc, concentration, 3, SEED, 0


def largest_call(dtype: torch.dtype) -> tuple[Any, ...]:
    """The largest concentration, and the next number."""
    largest = torch.full((2,), 1e18, dtype=dtype)
    largest[1] = torch.nextafter(largest[1], largest.new_full((), math.inf))
    return torch.eye(2, 5, dtype=dtype), largest, 3, SEED, 0


def all_calls() -> dict[tuple[Any, ...], tuple[str, tuple[Any, ...]]]:
    """By key: the name of a function and its arguments."""
    forward, backward = "vmf_rsample", "vmf_rsample_backward"
    calls: dict[tuple[Any, ...], tuple[str, tuple[Any, ...]]] = {}
    for dtype in (torch.float32, torch.float64):
        for D in DIMS:
            calls["samples", D, dtype] = forward, sample_call(D, dtype)
        for D, n in GRADIENTS:
            B = 40 if D <= 130 else 2
            calls["gradient", D, dtype, n] = backward, gradient_call(D, dtype, n, B)
        for D in (2, 3, 4, 5, 8, 16, 64, 128, 512):
            calls["golden", D, dtype] = backward, golden_call(D, dtype)
        for n, B in ((0, 3), (2, 0)):
            loc, k = distributions(B, 5, dtype)
            calls["empty", n, B, dtype] = forward, (loc, k, n, SEED, 0)
            grad, p = loc.new_zeros(n, B, 5), loc.new_zeros(n, B)
            calls["empty gradient", n, B, dtype] = backward, (grad, grad, p, loc, k)
    calls["samples", 4100, torch.float32] = (
        forward,
        (*distributions(2, 4100, torch.float32), 2, SEED, 0),
    )
    for D in (5, 16, 130):
        loc, k = distributions(7, D, torch.float32)
        for i, j in ((0, 7), (0, 3), (3, 7)):
            calls["as shipped", D, i, j] = forward, (loc[i:j], k[i:j], 2, SEED, i)
        arguments = gradient_call(D, torch.float32, 3, 7)
        for i, j in ((0, 7), (0, 3), (3, 7)):
            parts = [t[:, i:j].contiguous() for t in arguments[:3]] + [
                t[i:j] for t in arguments[3:]
            ]
            calls["gradient as shipped", D, i, j] = backward, tuple(parts)
    for dtype in (torch.float32, torch.float64):
        calls["largest", dtype] = forward, largest_call(dtype)
    calls["bad",] = forward, bad_call()
    draw = reference.vmf_rsample(*bad_call())
    calls["bad gradient",] = backward, (draw.samples, *draw[:2], *bad_call()[:2])
    loc, k = distributions(4, 16, torch.float32)
    calls["operator",] = "operator", (loc, k, 3, SEED, 0)
    return calls


def operator(*args: Any) -> tuple[Tensor, ...]:
    """The op of the library, routed to Triton, and its gradients."""
    loc, concentration = (t.clone().requires_grad_() for t in args[:2])
    x, p = torch.ops.nivmf_fast.vmf_rsample(loc, concentration, *args[2:], "triton")
    return x.detach(), p, *torch.autograd.grad(x.pow(3).sum(), (loc, concentration))


def moved(tensor: Tensor, device: str) -> Tensor:
    """To the same place behind the start of its memory: a slice keeps its alignment."""
    shift = tensor.storage_offset()
    room = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
    return room[shift:].view(tensor.shape).copy_(tensor)


def call(name: str, args: tuple[Any, ...], device: str) -> tuple[Tensor, ...]:
    functions = {
        "operator": operator,
        "vmf_rsample": vmf_sampler.vmf_rsample,
        "vmf_rsample_backward": vmf_sampler_backward.vmf_rsample_backward,
    }
    function = functions[name]
    results = function(*(moved(t, device) if torch.is_tensor(t) else t for t in args))
    return tuple(result.cpu() for result in results)


def interpret(source: Path, results: Path) -> None:
    """The second process: all calls, those not "as shipped" in blocks of as many rows as can be."""
    forward, backward = vmf_sampler._forward_shape, vmf_sampler_backward._backward_shape
    limit = 2**20  # elements of a block

    def wide_forward(D: int, itemsize: int) -> dict[str, int]:
        shape = forward(D, itemsize)
        return {**shape, "ROWS": min(2**16, limit // shape["BLOCK_D"])}

    def wide_backward(n: int, D: int, itemsize: int) -> dict[str, int]:
        shape = backward(n, D, itemsize)
        return {**shape, "SAMPLES": 16, "IMAGES": min(64, limit // 16 // shape["BLOCK_D"])}

    made = {}
    for key, (name, args) in torch.load(source, weights_only=False).items():
        shipped = "as shipped" in key[0]
        vmf_sampler._forward_shape = forward if shipped else wide_forward
        vmf_sampler_backward._backward_shape = backward if shipped else wide_backward
        made[key] = call(name, args, "cpu")
    torch.save(made, results)


@functools.cache
def calls() -> dict[tuple[Any, ...], tuple[str, tuple[Any, ...]]]:
    return all_calls()


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=needs_gpu)])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Tensor, ...]]:
    """The results of a call, by its key."""
    if request.param == "cuda":
        return lambda *key: call(*calls()[key], "cuda")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # once for all workers
        folder = folder.parent
    source, results = folder / "triton_calls.pt", folder / "triton_results.pt"
    with FileLock(folder / "triton.lock"):
        if not results.exists():
            torch.save(calls(), source)
            command = [sys.executable, "-W", "ignore", __file__, str(source), str(results)]
            subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    made = torch.load(results, weights_only=False)
    return lambda *key: made[key]


# --- samples


@pytest.mark.parametrize("D", [*DIMS, 4100])
def test_samples_are_those_of_the_reference(run: Any, D: int) -> None:
    """To 2e-5, but where a decision is so near that float32 may take it otherwise: these are
    counted, of over 200,000 samples in all."""
    x, p = run("samples", D, torch.float32)
    loc, k, n, seed, offset = calls()["samples", D, torch.float32][1]
    exact = reference.vmf_rsample(
        loc.double(), k.double(), n, seed, offset, stream_dtype=torch.float32
    )
    sure = exact.margin > 2e-5 + 2e-9 * D
    assert (~sure).sum() <= max(1, 1e-3 * sure.numel())
    assert (x - exact.samples).abs()[sure].max() < 2e-5
    assert (p / exact.one_minus_w - 1).abs()[sure].max() < 1e-3
    assert (x.double().norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("D", DIMS)
def test_samples_in_float64_follow_the_same_words(run: Any, D: int) -> None:
    x, p = run("samples", D, torch.float64)
    exact = reference.vmf_rsample(*calls()["samples", D, torch.float64][1])
    sure = exact.margin > 1e-9
    assert (x - exact.samples).abs()[sure].max() < 1e-12
    assert (p / exact.one_minus_w - 1).abs()[sure].max() < 1e-11


@pytest.mark.parametrize("what", ["as shipped", "gradient as shipped"])
@pytest.mark.parametrize("D", [5, 16, 130])
def test_an_image_does_not_depend_on_its_batch(run: Any, what: str, D: int) -> None:
    """Bitwise, and wherever in memory the slice begins."""
    whole, first, second = (run(what, D, i, j) for i, j in ((0, 7), (0, 3), (3, 7)))
    axis = 1 if what == "as shipped" else 0
    for all_images, *parts in zip(whole, first, second, strict=True):
        assert torch.equal(all_images, torch.cat(parts, axis))


# --- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("D", "n"), GRADIENTS)
def test_gradients_are_those_of_the_reference(run: Any, D: int, n: int, dtype: torch.dtype) -> None:
    into_loc, into_k = run("gradient", D, dtype, n)
    arguments = [t.double() for t in calls()["gradient", D, dtype, n][1]]
    exact_loc, exact_k = reference.vmf_rsample_backward(*arguments)
    grad, x, p, loc, k = arguments
    length = loc.norm(dim=-1, keepdim=True)
    rounding = torch.finfo(dtype).eps
    size = grad.norm(dim=-1).sum(0)[:, None] / length
    assert ((into_loc - exact_loc).abs() < 10 * rounding * size).all()

    # x and mu are rounded, and their difference may be small: that much is not the kernel's doing
    mu, w, s2 = loc / length, 1 - p, p * (2 - p)
    along, apart = (grad * mu).sum(-1).abs(), (grad * (x - w[..., None] * mu)).sum(-1).abs()
    phi = reference.vmf_dw_dconcentration(p, k, D) / s2
    blur = 4 * rounding * grad.norm(dim=-1)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-10
    bound = (phi * (tolerance * (s2 * along + apart) + blur)).sum(0)
    assert ((into_k - exact_k).abs() < bound).all()


@pytest.mark.parametrize("D", [2, 3, 4, 5, 8, 16, 64, 128, 512])
def test_the_quantile_gradient_is_exact(run: Any, D: int) -> None:
    """dw/dconcentration against 20-digit values."""
    exact = golden_rows(D)[2]
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        _, value = run("golden", D, dtype)
        assert ((value / exact - 1).abs() < tolerance).all()


# --- edges


def test_a_bad_image_is_nan_and_leaves_the_others_alone(run: Any) -> None:
    good, bad = slice(0, None, 2), slice(1, None, 2)
    for images, key in ((1, "bad"), (0, "bad gradient")):
        for result in run(key):
            result = result.movedim(images, 0)
            assert result[good].isfinite().all()
            assert result[bad].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_largest_concentration_is_that_of_the_reference(run: Any, dtype: torch.dtype) -> None:
    exact = reference.vmf_rsample(*largest_call(dtype))
    for result, wanted in zip(run("largest", dtype), exact, strict=False):
        assert torch.equal(result.isnan(), wanted.isnan())
        assert wanted[:, 0].isfinite().all() and wanted[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_no_samples_and_no_images(run: Any, dtype: torch.dtype) -> None:
    for n, B in ((0, 3), (2, 0)):
        x, p = run("empty", n, B, dtype)
        assert x.shape == (n, B, 5) and p.shape == (n, B)
        for result in run("empty gradient", n, B, dtype):
            assert len(result) == B and (result == 0).all()


def test_the_operator_reaches_the_kernels(run: Any) -> None:
    x, p, into_loc, into_k = run("operator")
    loc, k, *others = calls()["operator",][1]
    exact = reference.vmf_rsample(loc, k, *others)
    torch.testing.assert_close(x, exact.samples, atol=2e-5, rtol=0)
    torch.testing.assert_close(p, exact.one_minus_w, atol=2e-5, rtol=1e-4)
    gradients = reference.vmf_rsample_backward(3 * x.square(), x, p, loc, k)
    torch.testing.assert_close((into_loc, into_k), gradients, atol=1e-5, rtol=1e-3)


# --- only where a GPU is


@needs_gpu
@pytest.mark.parametrize("D", [3, 130, 512, 5000])
def test_cuda_graphs_replay_with_a_new_seed(D: int) -> None:
    loc, k = (t.cuda() for t in distributions(20, D, torch.float32))
    seed, grad = torch.zeros((), dtype=torch.int64, device="cuda"), torch.randn(10, 20, D).cuda()

    def step() -> tuple[Tensor, ...]:
        draw = vmf_sampler.vmf_rsample(loc, k, 10, seed, 0)
        return *draw, *vmf_sampler_backward.vmf_rsample_backward(grad, *draw, loc, k)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (7, -(2**40)):
        seed.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@needs_gpu
def test_ten_runs_give_the_same_bits() -> None:
    for key in (("samples", 16, torch.float32), ("gradient", 3, torch.float32, 35)):
        first, *others = (call(*calls()[key], "cuda") for _ in range(10))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@needs_gpu
def test_offsets_pass_31_bits() -> None:
    B, D = 2**22 + 5, 512
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    loc = torch.randn(8, D, device="cuda").repeat(B // 8 + 1, 1)[:B]
    k = torch.full((B,), 50.0, device="cuda")
    seed = torch.tensor(3, device="cuda")
    x, p = vmf_sampler.vmf_rsample(loc, k, 1, seed, 0)
    tail = vmf_sampler.vmf_rsample(loc[-9:].clone(), k[-9:].clone(), 1, seed, B - 9)
    assert torch.equal(x[:, -9:], tail[0]) and torch.equal(p[:, -9:], tail[1])


if __name__ == "__main__":
    interpret(*map(Path, sys.argv[1:]))
