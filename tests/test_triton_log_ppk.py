"""Triton log-PPK: every shipped configuration compiles without spills, and agrees with float64.

Without a GPU the kernels run in Triton's interpreter, in a separate process, because it must be
switched on before triton is imported. Planes are float32 there, rounded to bfloat16, so that the
precision modes are computed as on the GPU, apart from the tensor cores' own rounding.
"""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SPLIT
from torch import Tensor

from nivmf_fast import reference
from nivmf_fast._schemas import PRECISIONS, Options

pytest.importorskip("triton", reason="the triton package is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nivmf_fast.triton import log_ppk as kernels
from nivmf_fast.triton import log_ppk_backward, log_ppk_prepare

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
runs = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="no GPU; test_the_kernels_run_in_the_interpreter runs this case",
)
on_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
)
OPTIONS = [(True, True), (True, False), (False, True), (False, False)]  # exact, projection
options = pytest.mark.parametrize(("exact", "projection"), OPTIONS)
LENGTH = 20.0  # |K mu| of all proxies
GRADIENTS = ("samples", "loc", "concentration", "temperature")


def make_options(
    exact: bool = True,
    projection: bool = True,
    *,
    fast: bool = False,
    workspace: int = 1 << 28,
    keep: bool = True,
) -> Options:
    precision = PRECISIONS.index("fast" if fast else "float32")
    return Options(exact, projection, precision, workspace, keep)


# --- ahead-of-time compilation

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SIZES = (5, 112, 1000, 512)  # N, B, P, D


def launches(monkeypatch: pytest.MonkeyPatch, architecture: str, mode: str) -> list[Any]:
    """Every kernel launch of the four functions, recorded instead of run."""
    calls: dict[Any, Any] = {}

    def record(kernel: Any, grid: Any, arguments: Any, constants: Any, tile: Any = None) -> None:
        ones = tuple(type(a) is int and a == 1 for a in arguments)  # constants to the compiler
        calls.setdefault(
            (kernel, tuple(constants.items()), ones), (kernel, arguments, constants, tile)
        )

    machine = architecture, 132, torch.bfloat16
    monkeypatch.setattr(log_ppk_prepare.Problem, "launch", staticmethod(record))
    monkeypatch.setattr(log_ppk_prepare, "machine", lambda _: machine)
    N, B, P, D = SIZES
    dtype = torch.float64 if mode == "float64" else torch.float32
    x, loc, kappa = torch.rand(N, B, D, dtype=dtype), *torch.rand(2, P, D, dtype=dtype)
    labels, T = torch.zeros(B, dtype=torch.int64), torch.ones((), dtype=dtype)
    fast = mode == "fast"
    # nothing kept; several tiles to a maximum; last the ordinary one, which the backward follows
    for others in ({"keep": False}, {"workspace": 1 << 17}, {}):
        options = make_options(fast=fast, **others)
        losses, partial, saved = kernels.proxy_nca(x, loc, kappa, labels, T, options)
    kernels.proxy_nca_backward(losses, x, loc, kappa, labels, T, partial, saved, options)
    similarity, saved, _ = kernels.log_ppk(x, loc, kappa, T, options)
    kernels.log_ppk_backward(similarity, x, loc, kappa, T, saved, options)
    return list(calls.values())


def compiled(kernel: Any, arguments: Any, constants: Any, tile: Any, capability: int) -> Any:
    """As the just-in-time compiler would: sizes of 1 are constants, multiples of 16 are known."""
    signature, constexprs, attributes = {}, {}, {}
    values = dict(zip([n for n in kernel.arg_names if n not in constants], arguments, strict=True))
    for i, name in enumerate(kernel.arg_names):
        value = constants.get(name, values.get(name))
        if name in constants or (type(value) is int and value == 1):
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=log_ppk_prepare.compile_options(tile),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel; a spill needs stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        run = [tool, "--dump-resource-usage", path]
        text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


@compiles
@pytest.mark.parametrize("mode", ["float32", "fast", "float64"])
@pytest.mark.parametrize(
    ("architecture", "capability", "shared"), [("sm_80", 80, 163 << 10), ("sm_90", 90, 227 << 10)]
)
def test_every_configuration_compiles_without_spills(
    architecture: str, capability: int, shared: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernel, arguments, constants, tile in launches(monkeypatch, architecture, mode):
        binary = compiled(kernel, arguments, constants, tile, capability)
        registers, stack = resources(binary.asm["cubin"])
        what = f"{kernel.__name__} {constants} {tile}"
        print(f"{registers:4} registers {binary.metadata.shared:7} bytes shared  {what}")
        assert stack == 0, f"{what} spills: {stack} bytes of stack"
        assert binary.metadata.shared <= shared, what


# --- agreement with the reference


@compiles
@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases themselves run on the GPU")
def test_the_kernels_run_in_the_interpreter() -> None:
    serial = ["-n0"] if importlib.util.find_spec("xdist") else []
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", *serial],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def unit(t: Tensor) -> Tensor:
    return t / torch.linalg.vector_norm(t, dim=-1, keepdim=True)


def problem(
    N: int, B: int, P: int, D: int, T: float, spread: float = 0.05, length: float = LENGTH,
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Unsolved data in float64: near-equal proxies, whose scores differ by a few T."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    kappa = length * torch.exp(spread * normal(P, D))
    loc = unit(unit(normal(D)) + 3 * T / length * normal(P, D))
    kappa = kappa[:1] * (kappa / kappa[:1]) ** min(1.0, 10 * T)
    return {
        "samples": unit(normal(N, B, D)),
        "loc": loc,
        "concentration": kappa,
        "labels": torch.randint(0, P, (B,), generator=g),
        "temperature": torch.tensor(T, dtype=torch.float64),
    }


def typed(data: dict[str, Tensor], dtype: torch.dtype, device: str = DEVICE) -> dict[str, Tensor]:
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in data.items()}


def inputs(data: dict[str, Tensor], labels: bool) -> list[Tensor]:
    names = ["samples", "loc", "concentration", *["labels"] * labels, "temperature"]
    return [data[name] for name in names]


def kernel_result(
    op: str, data: dict[str, Tensor], grad: Tensor, *form: bool, **others: Any
) -> list[Tensor]:
    """The value and the gradients in samples, loc, concentration, temperature."""
    args, options = inputs(data, op == "proxy_nca"), make_options(*form, **others)
    if op == "proxy_nca":
        value, *saved = kernels.proxy_nca(*args, options)
    else:
        value, *saved, _ = kernels.log_ppk(*args, options)
    backward = getattr(kernels, f"{op}_backward")
    return [value, *backward(grad.to(value), *args, *saved, options)]


def reference_result(
    op: str, data: dict[str, Tensor], grad: Tensor, exact: bool, projection: bool
) -> list[Tensor]:
    data = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in data.items()}
    names = {"normalizer": "exact" if exact else "released", "projection": projection}
    if op == "proxy_nca":
        value = reference.proxy_nca(*inputs(data, True), **names)
    else:
        value = reference.log_ppk(*inputs(data, False), constants=False, **names)
    value.backward(grad.to(value))
    return [value.detach(), *(data[name].grad for name in GRADIENTS)]


def relative(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(
    op: str, data: dict[str, Tensor], exact: bool, projection: bool, dtype: torch.dtype,
    **others: Any,
) -> list[Tensor]:  # fmt: skip
    """Errors at most twice those of eager code in the same type, but for what is derived here.

    Values: half an ulp of a score of |K mu| = 20, over T. Gradients in float32: SPLIT. In float64
    the truth is rounded as well: 4 ulp of what makes a bias, D logarithms and |K mu|, over T.
    """
    data = typed(data, dtype)
    T = data["temperature"].item()
    shape = (data["samples"].shape[1], *[len(data["loc"])] * (op == "log_ppk"))
    grad = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = kernel_result(op, data, grad, exact, projection, **others)
    truth = reference_result(op, typed(data, torch.float64), grad, exact, projection)
    eager = reference_result(op, data, grad, exact, projection)
    single = dtype == torch.float32
    half_ulp, bias = torch.finfo(dtype).eps / 2, data["loc"].shape[1] + LENGTH
    absolute = (found[0].double() - truth[0]).abs().max().item()
    plain = (eager[0].double() - truth[0]).abs().max().item()
    assert absolute <= 2 * plain + (LENGTH if single else 8 * bias) * half_ulp / T, "value"
    for name, f, t, e in zip(GRADIENTS, found[1:], truth[1:], eager[1:], strict=True):
        assert f.dtype == dtype
        assert f.shape == t.shape
        floor = SPLIT if single else 8 * bias * half_ulp / T
        assert relative(f, t) <= 2 * relative(e, t) + floor, f"gradient in {name}"
    return found


@runs
@options
@pytest.mark.parametrize("op", ["proxy_nca", "log_ppk"])
def test_values_and_gradients_agree(op: str, exact: bool, projection: bool) -> None:
    found = check(op, problem(3, 30, 70, 17, 0.1), exact, projection, torch.float32)
    if op == "proxy_nca":
        assert found[0].mean() > 0.1


@runs
@pytest.mark.parametrize("op", ["proxy_nca", "log_ppk"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 17, 33, 3), (3, 5, 65, 130)], ids=str)
def test_ragged_shapes_in_several_chunks_agree_in_float64(
    op: str, shape: tuple[int, int, int, int]
) -> None:
    check(op, problem(*shape, 0.3), True, True, torch.float64, workspace=1 << 18)


@runs
@pytest.mark.parametrize(("spread", "bound"), [(0.05, 2e-3), (0.3, 2e-2)])
def test_loss_is_exact_at_the_smallest_temperature(spread: float, bound: float) -> None:
    data = typed(problem(2, 16, 32, 512, 0.003, spread), torch.float32)
    grad = torch.ones(16)
    truth = reference_result("proxy_nca", typed(data, torch.float64), grad, True, True)
    assert truth[0].mean() > 0.1
    found = kernel_result("proxy_nca", data, grad, True, True)
    assert (found[0].double() - truth[0]).abs().max() <= bound
    if spread == 0.05:
        errors = [relative(f, t) for f, t in zip(found[1:], truth[1:], strict=True)]
        assert max(errors) <= 5e-5, dict(zip(GRADIENTS, errors, strict=True))
    fast, *_ = kernels.proxy_nca(*inputs(data, True), make_options(fast=True))
    assert (fast.double() - truth[0]).abs().max() <= 5 * bound


@runs
def test_shards_combine_to_the_whole() -> None:
    data = typed(problem(2, 20, 70, 24, 0.1), torch.float32)
    data["labels"] = data["labels"].clamp(min=10)  # none in the first shard
    options, T = make_options(workspace=1 << 20), data["temperature"]
    grad = torch.linspace(0.5, 1, 20, device=DEVICE)
    whole = kernels.proxy_nca(*inputs(data, True), options)
    wanted = kernels.proxy_nca_backward(grad, *inputs(data, True), *whole[1:], options)

    shards = []
    for first, end in [(0, 9), (9, 52), (52, 70)]:
        own = {k: v[first:end] for k, v in data.items() if k in ("loc", "concentration")}
        own = {**data, **{k: v.contiguous() for k, v in own.items()}}
        shards.append(inputs({**own, "labels": data["labels"] - first}, True))
    results = [kernels.proxy_nca(*shard, options) for shard in shards]
    parts = torch.stack([partial for _, partial, _ in results])
    tops, logs = parts[:, ::2], parts[:, 1::2]
    top = tops.amax(0)
    log_z = torch.logsumexp((tops - top) / T.double() + logs, 0)
    partial = torch.stack([top[0], log_z[0], top[1], log_z[1]])
    loss = (top[0] - top[1]) / T.double() + log_z[0] - log_z[1]
    assert relative(loss, whole[0]) <= 1e-6
    found = [
        kernels.proxy_nca_backward(grad, *shard, partial, saved, options)
        for shard, (_, _, saved) in zip(shards, results, strict=True)
    ]
    samples, loc, concentration, temperature = zip(*found, strict=True)
    together = sum(samples), torch.cat(loc), torch.cat(concentration), sum(temperature)
    for name, f, w in zip(GRADIENTS, together, wanted, strict=True):
        assert relative(f, w) <= 2e-6, name  # z is centred on each shard's own mean bias


@runs
def test_skipping_dead_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # a chain of well-separated groups of like proxies: an image's weight lies in one group
    data = problem(1, 24, 256, 32, 0.003)
    group = torch.arange(256) // 32
    centers = unit(torch.randn(8, 32, generator=torch.Generator().manual_seed(2)).double())
    data["loc"] = unit(centers[group] + (data["loc"] - data["loc"].mean(0)))
    data["labels"] = torch.arange(24) // 12 * 32 + data["labels"] % 32
    noise = data["samples"] * 0.2
    data["samples"] = unit(centers[group[data["labels"]]] + noise)
    data = typed(data, torch.float32)
    launch, live = log_ppk_prepare.Problem.launch, []

    def watch(kernel: Any, grid: Any, arguments: Any, *others: Any) -> None:
        launch(kernel, grid, arguments, *others)
        if kernel is log_ppk_backward._plan_rows:
            live.append(arguments[5].float().mean().item())

    monkeypatch.setattr(log_ppk_prepare.Problem, "launch", staticmethod(watch))
    grad = torch.ones(24)
    skipped = kernel_result("proxy_nca", data, grad, True, True)
    monkeypatch.setattr(log_ppk_backward, "dead_log2", lambda dtype, logits: -float("inf"))
    full = kernel_result("proxy_nca", data, grad, True, True)
    assert skipped[0].mean() > 0.1
    assert live[0] < 0.5
    assert live[1] == 1
    for name, s, f in zip(GRADIENTS, skipped[1:], full[1:], strict=True):
        assert relative(s, f) <= 1e-7, name


@runs
def test_float64_skips_only_what_float64_cannot_hold() -> None:
    """The second tile's proxies have weights near 1e-11: above 2^-53, below 2^-24 a logit."""
    data = problem(1, 12, 64, 32, 1.0)
    direction = torch.zeros(2, 32, dtype=torch.float64)
    direction[0, 0], direction[1, :2] = 1, torch.tensor([-0.28, 0.96])
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)).double()
    data["loc"] = unit(direction[torch.arange(64) // 32] + 0.01 * noise)
    data["samples"] = unit(direction[:1] + 0.02 * data["samples"])
    data["labels"] %= 32
    found = check("proxy_nca", data, True, True, torch.float64)
    grad = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = reference_result("proxy_nca", typed(data, torch.float64), grad, True, True)
    for name, f, t in zip(GRADIENTS[1:3], found[2:4], truth[2:4], strict=True):
        assert 1e-12 < t[32:].abs().max() < 2.0**-24
        assert relative(f[32:], t[32:]) <= 1e-12, name


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(5, 112, 2048, 128), (10, 1024, 2048, 128)], ids=str)
def test_scratch_stays_within_the_workspace(
    keep: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planes of a chunk in half of it, maxima in a quarter, none if no backward follows."""
    monkeypatch.setattr(log_ppk_prepare.Problem, "launch", staticmethod(lambda *_: None))
    monkeypatch.setattr(log_ppk_prepare, "machine", lambda _: ("sm_80", 108, torch.bfloat16))
    N, B, P, D = shape
    x, loc, T = torch.rand(N, B, D), torch.rand(P, D), torch.ones(())
    options = make_options(workspace=1 << 20, keep=keep)
    for backward in (False, True):
        p = log_ppk_prepare.Problem(x, loc, loc, T, options, nca=True, backward=backward)
        one_tile = p.planes * p.pitch * p.tile.proxies * 4  # of linear and spread, 2 bytes each
        assert p.chunk == 1 or p.proxy_planes.nbytes <= options.workspace // 2
        assert p.proxy_planes.nbytes == p.chunk * one_tile
        if not backward:
            assert 1 < p.chunk < p.tiles
    _, _, saved = kernels.proxy_nca(x, loc, loc, torch.zeros(B, dtype=torch.int64), T, options)
    maxima = log_ppk_prepare.view(saved, P, N * B, x.dtype).maxima
    assert bool(maxima.numel()) == keep
    assert maxima.nbytes <= options.workspace // 4


@runs
def test_chunks_may_end_amid_the_tiles_of_a_maximum() -> None:
    data, grad = typed(problem(2, 20, 200, 4, 0.1), torch.float32), torch.ones(20)
    kept, results = [], []
    for workspace in (1 << 28, 3 << 10):  # 7 chunks of one tile, of which 2 share a maximum
        _, _, saved = kernels.proxy_nca(*inputs(data, True), make_options(workspace=workspace))
        kept.append(log_ppk_prepare.view(saved, 200, 40, torch.float32).maxima.view(-1, 40))
        results.append(kernel_result("proxy_nca", data, grad, workspace=workspace))
    fine, coarse = kept
    assert len(fine) / len(coarse) == 7 / 4
    padded = torch.cat([fine, fine[-1:]])
    assert torch.equal(coarse, padded.view(4, 2, 40).amax(1))
    for name, one, many in zip(("value", *GRADIENTS), *results, strict=True):
        assert relative(many, one) <= 2e-6, name


@runs
@pytest.mark.parametrize("workspace", [1 << 12, 1 << 28])
def test_the_loss_does_not_depend_on_whether_a_backward_follows(workspace: int) -> None:
    data, grad = typed(problem(2, 20, 70, 24, 0.1), torch.float32), torch.ones(20)
    kept, not_kept = (
        kernel_result("proxy_nca", data, grad, workspace=workspace, keep=keep)
        for keep in (True, False)
    )
    assert torch.equal(kept[0], not_kept[0])
    for name, k, n in zip(GRADIENTS, kept[1:], not_kept[1:], strict=True):
        assert relative(n, k) <= 1e-6, name


@runs
def test_bad_values_give_nan_for_their_image_alone() -> None:
    data = typed(problem(2, 8, 20, 5, 0.1), torch.float32)
    good = kernel_result("proxy_nca", data, torch.ones(8), True, True)
    data["labels"][1], data["labels"][2] = -1, 20
    options = make_options(workspace=1 << 20)
    losses, partial, saved = kernels.proxy_nca(*inputs(data, True), options)
    bad = torch.tensor([0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    assert torch.equal(losses.isnan().cpu(), bad)
    assert torch.equal(losses.cpu()[~bad], good[0].cpu()[~bad])
    assert partial[2, 1:3].tolist() == [-float("inf")] * 2
    grads = kernels.proxy_nca_backward(losses, *inputs(data, True), partial, saved, options)
    assert torch.equal(grads[0].isnan().all(-1).all(0).cpu(), bad)
    assert grads[0].cpu()[:, ~bad].isfinite().all()

    data["samples"][1, 5, 2] = float("nan")
    bad[5] = True
    assert torch.equal(kernels.proxy_nca(*inputs(data, True), options)[0].isnan().cpu(), bad)
    data["temperature"].zero_()
    assert kernels.proxy_nca(*inputs(data, True), options)[0].isnan().all()


@runs
@pytest.mark.parametrize("op", ["proxy_nca", "log_ppk"])
def test_an_empty_batch_has_gradients_of_zero(op: str) -> None:
    data = typed(problem(2, 0, 5, 4, 0.1), torch.float32)
    grad = torch.zeros(0, *[5] * (op == "log_ppk"))
    value, *grads = kernel_result(op, data, grad, True, True)
    assert value.shape == grad.shape
    assert all(bool((g == 0).all()) for g in grads)
    assert [g.shape for g in grads] == [data[name].shape for name in GRADIENTS]


@runs
@pytest.mark.parametrize("workspace", [1 << 10, 1 << 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fake_kernels_know_what_is_saved(dtype: torch.dtype, workspace: int) -> None:
    data = typed(problem(2, 5, 70, 4, 0.3), dtype)
    for op, keep in itertools.product(("proxy_nca", "log_ppk"), (True, False)):
        options = make_options(workspace=workspace, keep=keep)
        saved = getattr(kernels, op)(*inputs(data, op == "proxy_nca"), options)
        like = log_ppk_prepare.saved_like(op, data["samples"], data["loc"], options)
        found = saved[-1] if op == "proxy_nca" else saved[1]
        assert (like.shape, like.dtype, like.device) == (found.shape, found.dtype, found.device)
    check("proxy_nca", data, True, True, dtype, workspace=workspace)  # few maxima, one tile a chunk


@runs
def test_results_repeat_to_the_bit() -> None:
    data = typed(problem(2, 20, 40, 24, 0.1), torch.float32)
    first, second = (kernel_result("proxy_nca", data, torch.ones(20), True, True) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- on a GPU only: sizes that the interpreter cannot reach


@on_gpu
@options
@pytest.mark.parametrize("op", ["proxy_nca", "log_ppk"])
@pytest.mark.parametrize("T", [0.003, 0.1, 1.0])
@pytest.mark.parametrize(
    "shape", [(5, 112, 100, 128), (10, 112, 98, 512), (5, 112, 2049, 1000)], ids=str
)
def test_paper_shapes_agree(
    op: str, shape: tuple[int, int, int, int], T: float, exact: bool, projection: bool
) -> None:
    check(op, problem(*shape, T), exact, projection, torch.float32)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_results_repeat_to_the_bit_and_agree(dtype: torch.dtype) -> None:
    data = problem(5, 112, 11318, 128, 0.01)
    first = check("proxy_nca", data, True, True, dtype)
    grad = torch.rand(112, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    second = kernel_result("proxy_nca", typed(data, dtype), grad, True, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_gpu
def test_extra_memory_stays_within_the_workspace() -> None:
    data = typed(problem(5, 256, 100_000, 128, 0.01), torch.float32)
    workspace = 64 << 20
    kernel_result("proxy_nca", data, torch.ones(256), True, True, workspace=workspace)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel_result("proxy_nca", data, torch.ones(256), True, True, workspace=workspace)
    outputs = 4 * (data["samples"].numel() + 2 * data["loc"].numel())
    assert torch.cuda.max_memory_allocated() - before <= outputs + 1.5 * workspace


@on_gpu
def test_offsets_beyond_32_bits() -> None:
    P, D = 4_400_000, 512  # P D > 2^31
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GB of free GPU memory")
    loc = torch.zeros(P, D, device="cuda")
    loc[:, 0] = 1
    loc[-1].zero_()
    loc[-1, 1] = 1  # the last proxy alone points at the images
    concentration = torch.full((P, D), 20.0, device="cuda")
    samples = torch.zeros(1, 4, D, device="cuda")
    samples[..., 1] = 1
    labels = torch.full((4,), P - 1, device="cuda")
    T, options = torch.tensor(0.5, device="cuda"), make_options()
    args = samples, loc, concentration, labels, T
    losses, partial, saved = kernels.proxy_nca(*args, options)
    expected = torch.log1p(torch.tensor((P - 1) * 1.0).double() * torch.exp(torch.tensor(-40.0)))
    torch.testing.assert_close(losses.double().cpu(), expected.expand(4), rtol=1e-3, atol=1e-9)
    gradients = kernels.proxy_nca_backward(losses, *args, partial, saved, options)
    assert all(bool(g[-4:].isfinite().all()) for g in gradients[1:3])


@on_gpu
def test_a_step_can_be_captured_in_a_graph() -> None:
    data = typed(problem(5, 112, 100, 128, 0.1), torch.float32)
    grad = torch.ones(112)
    grad = grad.to(DEVICE)
    eager = kernel_result("proxy_nca", data, grad, True, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel_result("proxy_nca", data, grad, True, True)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
