"""The CUDA log-PPK: compiled without spills, right on the host (tests/cuda_on_host.h) and on a GPU.

On the host the very kernels and launchers run thread by thread, tensor-core products included, and
are compared with the float64 reference; only the hardware's own arithmetic is left for a GPU.
"""

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SPLIT
from torch import Tensor

from nivmf_fast import reference

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "log_ppk_kernel.cu"
ARCHITECTURES = ("sm_80", "sm_90")

# ---- compiled for real


@pytest.fixture(scope="session")
def ptxas_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ptxas' report on every kernel: from the build if that is newer than the sources."""
    built = ROOT / "build" / "ptxas.txt"
    newest = max(file.stat().st_mtime for file in (ROOT / "csrc").glob("*"))
    if built.exists() and built.stat().st_mtime > newest:
        text = built.read_text()
        if all(f"for '{name}'" in text for name in ARCHITECTURES):
            return text
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("nvcc was not found; needed to compile the kernels and read their spills")
    flags = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in ARCHITECTURES]
    target = tmp_path_factory.mktemp("ptxas") / "log_ppk.o"
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "--threads=2", *flags, "-c"]
    done = subprocess.run([*command, SOURCE, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(ptxas_report: str, architecture: str) -> None:
    entry = rf"entry function '(\S+)' for '{architecture}'(.*?)Used (\d+) registers"
    kernels = {
        name: re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", body)
        for name, body, _ in re.findall(entry, ptxas_report, re.DOTALL)
        if "ppk" in name
    }
    for kernel in ("prepare", "own", "forward", "log_ppk", "pair", "gradient", "reduce"):
        assert any(f"{kernel}_kernel" in name for name in kernels), kernel
    assert all(kernels.values())
    assert [name for name, found in kernels.items() if found.groups() != ("0", "0")] == []


# ---- run on the host


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("samples", "images", "proxies", "dim")),
        *((name, ctypes.c_bool) for name in ("exact", "projection")),
        *((name, ctypes.c_int64) for name in ("precision", "workspace")),
        ("keep", ctypes.c_bool),
    ]


class Pointers(ctypes.Structure):
    """LogPpkInputs, and LogPpkGradients in its first four."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "loc", "k", "temperature", "labels")]


class Options(NamedTuple):
    exact: bool = True
    projection: bool = True
    precision: int = 0
    workspace: int = 1 << 28
    keep: bool = True

    @property
    def normalizer(self) -> str:
        return "exact" if self.exact else "released"


class Case(NamedTuple):
    samples: Tensor
    loc: Tensor
    concentration: Tensor
    temperature: Tensor
    labels: Tensor

    def double(self) -> "Case":
        return Case(*(t.double() for t in self[:4]), self.labels)


def make_case(
    N: int, B: int, P: int, D: int, T: float, dtype: torch.dtype, spread: float = 0.05,
    length: float = 20.0, seed: int = 0,
) -> Case:  # fmt: skip
    """Samples near the middle between their own and another proxy: a loss that is never solved."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    loc, labels = unit(normal(P, D)), torch.randint(P, (B,), generator=generator)
    other = torch.randint(P, (B,), generator=generator)
    tilt = 2 * T / length * normal(N, B, 1)
    noise = 0.3 * min(1, 0.01 + 30 * T / length**0.5) / D**0.5 * normal(N, B, D)
    samples = unit((0.5 + tilt) * loc[labels] + (0.5 - tilt) * loc[other] + noise)
    concentration = length * torch.exp(spread * normal(P, D))
    temperature = torch.tensor(T, dtype=torch.float64)
    return Case(
        *(t.to(dtype).contiguous() for t in (samples, loc, concentration, temperature)), labels
    )


class Plan(NamedTuple):
    """What csrc/log_ppk_plan.h decides: sizes in proxies' blocks of `tile`, and bytes."""

    tile: int
    blocks: int
    chunk: int
    back_chunk: int
    saved: int
    forward: int
    backward: int


class Result(NamedTuple):
    losses: Tensor
    partial: Tensor
    gradients: list[Tensor]  # samples, loc, concentration, temperature


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The kernels as functions of tensors on the CPU; outputs and scratch start as NaN."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler; needed to run the kernels on the host")
    target = tmp_path_factory.mktemp("host") / "log_ppk.so"
    command = [compiler, "-std=c++17", "-O2", "-w", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests" / "host_log_ppk.cpp"
    done = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    for name in ("host_launches", "host_copies", *(f"{part}_bytes_{dtype}" for part, dtype in
                 itertools.product(("saved", "forward", "backward"), ("f32", "f64")))):  # fmt: skip
        getattr(library, name).restype = ctypes.c_int64

    def nan_like(*tensors: Tensor) -> list[Tensor]:
        return [torch.full_like(t, math.nan) for t in tensors]

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    def prepare(case: Case, options: Options) -> tuple[Callable[..., Any], Any, Any]:
        N, B, D = case.samples.shape
        sizes = Sizes(N, B, len(case.loc), D, *options)
        suffix = "f32" if case.samples.dtype == torch.float32 else "f64"

        def call(name: str, *arguments: Any) -> Any:
            return getattr(library, f"{name}_{suffix}")(ctypes.byref(sizes), *arguments)

        def buffer(name: str) -> Tensor:
            return torch.full((call(f"{name}_bytes"),), 255, dtype=torch.uint8)

        return call, buffer, ctypes.byref(Pointers(*(t.data_ptr() for t in case)))

    def proxy_nca(case: Case, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        call, buffer, inputs = prepare(case, options)
        B = case.samples.shape[1]
        losses = torch.full((B,), math.nan, dtype=case.samples.dtype)
        partial = torch.full((4, B), math.nan, dtype=torch.float64)
        saved, scratch = buffer("saved"), buffer("forward")
        outputs = (pointer(t) for t in (losses, partial, saved, scratch))
        assert call("proxy_nca", inputs, *outputs) == 0
        return losses, partial, saved

    def proxy_nca_backward(
        case: Case, options: Options, grad: Tensor, partial: Tensor, saved: Tensor
    ) -> list[Tensor]:
        call, buffer, inputs = prepare(case, options)
        out, scratch = nan_like(*case[:4]), buffer("backward")
        pointers = (pointer(t) for t in (grad, partial, saved, scratch))
        gradients = ctypes.byref(Pointers(*(t.data_ptr() for t in out), 0))
        assert call("proxy_nca_backward", inputs, *pointers, gradients) == 0
        return out

    def log_ppk(case: Case, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        call, buffer, inputs = prepare(case, options)
        B, P = case.samples.shape[1], len(case.loc)
        out, rest = nan_like(case.samples.new_empty(B, P), case.samples.new_empty(2, B, P))
        common, scratch = torch.zeros((), dtype=torch.float64), buffer("forward")
        outputs = (pointer(t) for t in (out, rest, common, scratch))
        assert call("log_ppk", inputs, *outputs) == 0
        return out, rest, common

    def log_ppk_backward(case: Case, options: Options, grad: Tensor, rest: Tensor) -> list[Tensor]:
        call, buffer, inputs = prepare(case, options)
        out, scratch = nan_like(*case[:4]), buffer("backward")
        pointers = (pointer(t) for t in (grad, rest, scratch))
        gradients = ctypes.byref(Pointers(*(t.data_ptr() for t in out), 0))
        assert call("log_ppk_backward", inputs, *pointers, gradients) == 0
        return out

    def plan(
        *shape: int, options: Options, double: bool = False, tensor_cores: bool = True
    ) -> Plan:
        fields = (ctypes.c_int64 * len(Plan._fields))()
        function = library.plan_f64 if double else library.plan_f32
        function(ctypes.byref(Sizes(*shape, *options)), ctypes.c_bool(tensor_cores), fields)
        return Plan(*fields)

    def both(case: Case, options: Options, grad: Tensor) -> Result:
        losses, partial, saved = proxy_nca(case, options)
        return Result(losses, partial, proxy_nca_backward(case, options, grad, partial, saved))

    return SimpleNamespace(
        proxy_nca=proxy_nca, proxy_nca_backward=proxy_nca_backward, both=both, log_ppk=log_ppk,
        log_ppk_backward=log_ppk_backward, launches=library.host_launches,
        copies=library.host_copies, seed=library.host_seed, plan=plan,
    )  # fmt: skip


def incoming(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7)).to(dtype) + 0.5


def eager(case: Case, options: Options, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [t.clone().requires_grad_() for t in case[:4]]
    losses = reference.proxy_nca(
        *leaves[:3], case.labels, leaves[3], options.normalizer, options.projection
    )
    return losses.detach(), torch.autograd.grad(losses, leaves, grad)


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


EPS = torch.finfo(torch.float32).eps
FFMA, MMA = 33, 520  # proxies: on either side of the choice of tiles
OPTIONS = [Options(e, p) for e, p in itertools.product((True, False), repeat=2)]
SHAPES = [(1, 1, 2, 2), (3, 5, 7, 17), (5, 14, FFMA, 64), (40, 3, FFMA, 9), (32, 2, 65, 36)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_the_reference_to_rounding(
    host: SimpleNamespace, shape: tuple[int, int, int, int], options: Options
) -> None:
    case = make_case(*shape, 0.5, torch.float64)
    grad = incoming(shape[1], dtype=torch.float64)
    expected, gradients = eager(case, options, grad)
    result = host.both(case, options, grad)
    torch.testing.assert_close(result.losses, expected, rtol=1e-11, atol=1e-12)
    for ours, exact in zip(result.gradients, gradients, strict=True):
        assert error(ours, exact) < 1e-11


@pytest.mark.parametrize("T", [0.003, 0.1, 1.0])
@pytest.mark.parametrize(
    ("shape", "spread"),
    [((5, 13, 100, 64), 0.05), ((5, 13, MMA, 40), 0.05), ((70, 2, 577, 33), 0.3)],
    ids=str,
)
def test_float32_errs_no_more_than_eager(
    host: SimpleNamespace, shape: tuple[int, int, int, int], spread: float, T: float
) -> None:
    case, options = make_case(*shape, T, torch.float32, spread), Options()
    grad = incoming(shape[1], dtype=torch.float32)
    expected, gradients = eager(case.double(), options, grad.double())
    losses, rounded = eager(case, options, grad)
    assert expected.mean() > 0.1
    result = host.both(case, options, grad)
    assert (result.losses - expected).abs().max() <= 2 * (losses - expected).abs().max()
    allowed = SPLIT if shape[2] >= MMA else 32 * EPS  # 19 are needed, by the temperature's alone
    for ours, theirs, exact in zip(result.gradients, rounded, gradients, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + allowed


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_every_form_runs_on_tensor_cores(host: SimpleNamespace, options: Options) -> None:
    case = make_case(5, 13, MMA, 30, 0.1, torch.float32)
    grad = incoming(13, dtype=torch.float32)
    expected, gradients = eager(case.double(), options, grad.double())
    result = host.both(case, options, grad)
    assert (result.losses - expected).abs().max() < 2e-4
    for ours, exact in zip(result.gradients, gradients, strict=True):
        assert error(ours, exact) < 2e-5


def test_fast_is_three_products_of_bf16(host: SimpleNamespace) -> None:
    case, options = make_case(5, 13, MMA, 128, 0.1, torch.float32), Options(precision=1)
    grad = incoming(13, dtype=torch.float32)
    expected, gradients = eager(case.double(), options, grad.double())
    result = host.both(case, options, grad)
    assert 2e-5 < (result.losses - expected).abs().max() < 2e-3
    for ours, exact in zip(result.gradients, gradients, strict=True):
        assert error(ours, exact) < 2e-4


@pytest.mark.parametrize(("P", "workspace"), [(70, 30_000), (MMA, 200_000)])
def test_a_small_workspace_changes_nothing_but_rounding(
    host: SimpleNamespace, P: int, workspace: int
) -> None:
    case = make_case(5, 13, P, 40, 0.1, torch.float32)
    grad = incoming(13, dtype=torch.float32)
    before = host.launches()
    whole = host.both(case, Options(), grad)
    whole_launches = host.launches() - before
    chunked = host.both(case, Options(workspace=workspace), grad)
    assert host.launches() - before > 3 * whole_launches  # it was cut into chunks
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-6, atol=1e-5)
    for a, b in zip(chunked.gradients, whole.gradients, strict=True):
        assert error(a, b.double()) < 2e-5


def test_tensor_cores_take_float32_and_many_proxies(host: SimpleNamespace) -> None:
    def tile(P: int, **device: bool) -> int:
        found: int = host.plan(5, 112, P, 128, options=Options(), **device).tile
        return found

    assert tile(513) == 64
    assert tile(512) == tile(513, double=True) == tile(513, tensor_cores=False) == 32


@pytest.mark.parametrize("keep", [True, False])
def test_a_forward_of_11318_proxies_takes_three_launches(host: SimpleNamespace, keep: bool) -> None:
    plan = host.plan(5, 112, 11318, 512, options=Options(keep=keep))
    assert 1 + 2 * -(-plan.blocks // plan.chunk) == 3  # the own proxies; prepare and forward
    assert plan.forward <= 1 << 28


def test_a_chunk_of_a_million_proxies_fills_half_the_workspace(host: SimpleNamespace) -> None:
    plan = host.plan(5, 112, 1_000_000, 512, options=Options(keep=False))
    tile = 64 * (2 * 512 * 4 + 16)  # bytes: linear and spread, and 16 of scalars per proxy
    assert plan.blocks == 15625
    assert plan.chunk * tile <= 1 << 27 < (plan.chunk + 1) * tile
    assert plan.saved == 10 * 64 * 8  # the products with the own proxy alone
    assert plan.forward <= 1 << 28
    assert plan.backward <= 1 << 28


@pytest.mark.parametrize(("double", "tensor_cores"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("shape", [(5, 112), (1, 1), (70, 16), (13, 3000)], ids=str)
def test_memory_stays_within_the_workspace(
    host: SimpleNamespace, shape: tuple[int, int], double: bool, tensor_cores: bool
) -> None:
    device, itemsize = {"double": double, "tensor_cores": tensor_cores}, 8 if double else 4
    for P, D in itertools.product((1, 100, 513, 11318, 1_000_000), (2, 128, 512)):
        for workspace in (1 << 26, 1 << 28, 1 << 30):
            kept, least = (
                host.plan(*shape, P, D, options=Options(workspace=workspace, keep=keep), **device)
                for keep in (True, False)
            )
            half, state = workspace // 2, (1 << 21) + 64 * itemsize * math.prod(shape)
            slabs = 16 * math.prod(shape) * D * itemsize
            for plan in (kept, least):
                assert 1 <= plan.chunk <= plan.blocks
                assert 1 <= plan.back_chunk <= plan.blocks
                assert plan.forward <= half + state
            # Where panels are kept, log-PPK's backward still needs one of its own: at most a half.
            assert kept.back_chunk == 1 or kept.backward <= workspace + slabs + state
            assert least.back_chunk == 1 or least.backward <= half + slabs + state
            assert kept.saved <= half + state
            assert least.saved <= state


def test_few_proxies_take_four_launches(host: SimpleNamespace) -> None:
    case = make_case(5, 13, 100, 64, 0.1, torch.float32)
    before = host.launches()
    host.both(case, Options(), incoming(13, dtype=torch.float32))
    assert host.launches() - before == 4


@pytest.mark.parametrize("shape", [(5, 13, 300, 64), (5, 13, 1300, 20)], ids=str)
def test_keeping_nothing_costs_no_launch_and_no_bit(
    host: SimpleNamespace, shape: tuple[int, int, int, int]
) -> None:
    case, results, launches = make_case(*shape, 0.1, torch.float32), [], []
    grad = incoming(shape[1], dtype=torch.float32)
    for options in (Options(keep=True), Options(keep=False)):
        before = host.launches()
        losses, partial, saved = host.proxy_nca(case, options)
        launches.append(host.launches() - before)
        gradients = host.proxy_nca_backward(case, options, grad, partial, saved)
        results.append(([losses, partial], gradients, len(saved)))
    (kept, exact, size), (forward, ours, least) = results
    assert launches[0] == launches[1] <= 3
    assert least < size / 50
    assert all(map(torch.equal, kept, forward))
    for a, b in zip(ours, exact, strict=True):
        assert error(a, b.double()) < 1e-6


@pytest.mark.parametrize("shape", [(5, 13, 70, 20), (40, 3, 70, 20), (5, 13, MMA, 20)], ids=str)
def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(
    host: SimpleNamespace, shape: tuple[int, int, int, int]
) -> None:
    case, results = make_case(*shape, 0.01, torch.float32), []
    for seed in (1, 2):
        host.seed(seed)
        result = host.both(case, Options(), incoming(shape[1], dtype=torch.float32))
        results.append([result.losses, result.partial, *result.gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("P", [480, 1500])
def test_dead_tiles_are_skipped_and_not_missed(host: SimpleNamespace, P: int) -> None:
    """The same scores are recomputed with and without the maxima; only the skipping differs."""
    case = make_case(5, 13, P, 32, 0.003, torch.float32)
    grad = incoming(13, dtype=torch.float32)
    panels = 2 * 4 * (P + 64) * 64
    options = Options(workspace=4 * panels)
    losses, partial, saved = host.proxy_nca(case, options)
    assert losses.mean() > 0.1

    def backward(saved: Tensor) -> tuple[list[Tensor], int]:
        before = host.copies()
        return host.proxy_nca_backward(case, options, grad, partial, saved), host.copies() - before

    # Maxima come after the own pairs: raised to the top, they declare every tile alive.
    tile = 64 if P > 512 else 32
    blocks = -(-P // tile)
    rows = -(-13 // (tile // 5)) * tile
    own = -(-rows * 8 // 256) * 256 if P > 512 else 0
    alive = saved.clone()
    alive[own : own + blocks * rows // tile * (tile // 5) * 4].view(torch.float32).fill_(1e30)
    skipped, work = backward(saved)
    complete, all_work = backward(alive)
    assert work < all_work / 2
    for a, b in zip(skipped, complete, strict=True):
        assert error(a, b.double()) < 1e-7


@pytest.mark.parametrize("P", [100, 700])
def test_ranges_of_proxies_combine_to_the_whole(host: SimpleNamespace, P: int) -> None:
    case = make_case(3, 6, P, 24, 0.1, torch.float64 if P == 100 else torch.float32)
    tolerance = 1e-11 if P == 100 else 2e-5
    case.labels[case.labels >= P - 20] = 3  # no label in the last range
    grad = incoming(6, dtype=case.samples.dtype)
    whole = host.both(case, Options(), grad)
    cuts = list(itertools.pairwise([0, P // 7, P - 20, P]))
    parts = [
        case._replace(loc=case.loc[a:b], concentration=case.concentration[a:b],
                      labels=case.labels - a)
        for a, b in cuts
    ]  # fmt: skip
    calls = [host.proxy_nca(part, Options()) for part in parts]
    partials = torch.stack([call[1] for call in calls])
    T = case.temperature.double()
    rows = []
    for top, log_z in ((partials[:, 0], partials[:, 1]), (partials[:, 2], partials[:, 3])):
        highest = top.amax(0)
        rows += [highest, torch.logsumexp((top - highest) / T + log_z, 0)]
    combined = torch.stack(rows)
    loss = (combined[0] - combined[2]) / T + combined[1] - combined[3]
    torch.testing.assert_close(loss, whole.losses.double(), rtol=tolerance, atol=tolerance)
    shards = [
        host.proxy_nca_backward(part, Options(), grad, combined, call[2])
        for part, call in zip(parts, calls, strict=True)
    ]
    x, loc, k, t = zip(*shards, strict=True)
    joined = [sum(x), torch.cat(loc), torch.cat(k), sum(t)]
    for ours, all_at_once in zip(joined, whole.gradients, strict=True):
        assert error(ours, all_at_once.double()) < tolerance


@pytest.mark.parametrize("P", [40, MMA])
def test_bad_values_give_nan_where_they_belong(host: SimpleNamespace, P: int) -> None:
    case = make_case(5, 14, P, 24, 0.1, torch.float32)
    case.labels[2], case.labels[3] = P, -(1 << 62)
    case.samples[1, 5, 0] = math.nan
    losses, partial, saved = host.proxy_nca(case, Options())
    bad = torch.zeros(14, dtype=torch.bool)
    bad[[2, 3, 5]] = True
    assert torch.equal(losses.isnan(), bad)
    assert (partial[2, [2, 3]] == -math.inf).all()
    grad = incoming(14, dtype=torch.float32)
    dx = host.proxy_nca_backward(case, Options(), grad, partial, saved)[0]
    assert torch.equal(dx.isnan().all(-1).all(0), bad)
    assert torch.equal(dx.isnan().any(-1).any(0), bad)

    for T in (0.0, -1.0, math.nan):
        result = host.both(case._replace(temperature=torch.tensor(T)), Options(), grad)
        assert result.losses.isnan().all()
        assert all(g.isnan().all() for g in result.gradients)
    case.concentration[P - 1, 0] = -1
    assert host.proxy_nca(case, Options())[0].isnan().all()


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((3, 5, 7, 17), torch.float64, Options()),
        ((3, 5, 7, 17), torch.float64, Options(False, False, workspace=5000)),
        ((70, 2, 33, 9), torch.float64, Options()),
        ((5, 7, 40, 33), torch.float32, Options()),
        ((5, 7, MMA, 33), torch.float32, Options(False)),
        ((70, 2, MMA, 33), torch.float32, Options(workspace=150_000)),
    ],
    ids=str,
)
def test_log_ppk_is_the_reference(
    host: SimpleNamespace, shape: tuple[int, int, int, int], dtype: torch.dtype, options: Options
) -> None:
    case = make_case(*shape, 0.1, dtype)
    out, rest, common = host.log_ppk(case, options)
    exact = case.double()
    leaves = [t.clone().requires_grad_() for t in exact[:4]]
    form = options.normalizer, options.projection
    left_out = reference.prepare_proxies(exact.loc, exact.concentration, *form).common - common
    expected = reference.log_ppk(*leaves, *form, constants=False) + left_out / leaves[3]
    rounding, tolerance = (1e-11, 1e-11) if dtype == torch.float64 else (5e-5, 2e-5)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=rounding, atol=rounding)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    ours = host.log_ppk_backward(case, options, grad, rest)
    for value, exact_value in zip(ours, gradients, strict=True):
        assert error(value, exact_value) < tolerance


# ---- on a GPU


@pytest.fixture(scope="session")
def gpu() -> SimpleNamespace:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    ops = torch.ops.nivmf_kernels

    def both(case: Case, options: Options, grad: Tensor) -> Result:
        x, loc, k, temperature, labels = case
        losses, partial, saved = ops.proxy_nca(x, loc, k, labels, temperature, *options)
        gradients = ops.proxy_nca_backward(
            grad, x, loc, k, labels, temperature, partial, saved, *options
        )
        return Result(losses, partial, list(gradients))

    return SimpleNamespace(both=both)


def on_gpu(case: Case) -> Case:
    return Case(*(t.cuda() for t in case))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("T", [0.003, 1.0])
@pytest.mark.parametrize(
    "shape",
    [(5, 112, 100, 128), (112, 5, 100, 128), (13, 7, 513, 33), (64, 16, 1500, 512)],
    ids=str,
)
def test_gpu_errs_as_little_as_the_host(
    gpu: SimpleNamespace, shape: tuple[int, int, int, int], T: float, fast: bool
) -> None:
    case, options = make_case(*shape, T, torch.float32), Options(precision=int(fast))
    grad = incoming(shape[1], dtype=torch.float32)
    expected, gradients = eager(case.double(), options, grad.double())
    losses, rounded = eager(case, options, grad)
    result = gpu.both(on_gpu(case), options, grad.cuda())
    factor = 20 if fast else 2
    worst = factor * (losses - expected).abs().max() + EPS * expected.abs().max()
    assert (result.losses.cpu() - expected).abs().max() <= worst
    for ours, theirs, exact in zip(result.gradients, rounded, gradients, strict=True):
        assert error(ours.cpu(), exact) <= factor * error(theirs, exact) + SPLIT


@pytest.mark.parametrize("P", [100, 3000])
def test_gpu_repeats_its_bits_and_replays_in_a_graph(gpu: SimpleNamespace, P: int) -> None:
    case = on_gpu(make_case(5, 112, P, 128, 0.01, torch.float32))
    grad = incoming(112, dtype=torch.float32).cuda()
    first = gpu.both(case, Options(), grad)
    second = gpu.both(case, Options(), grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gpu.both(case, Options(), grad)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for other in (second, replayed):
        assert torch.equal(first.losses, other.losses)
        for a, b in zip(first.gradients, other.gradients, strict=True):
            assert torch.equal(a, b)


def test_gpu_takes_four_launches_for_few_proxies(gpu: SimpleNamespace) -> None:
    case = on_gpu(make_case(5, 112, 100, 128, 0.1, torch.float32))
    grad = incoming(112, dtype=torch.float32).cuda()
    gpu.both(case, Options(), grad)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gpu.both(case, Options(), grad)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 4, names
