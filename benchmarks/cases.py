"""The timed cases: shapes, data, and for every op this library's backends and its baselines.

A case is a function without arguments that runs one whole step, forward and backward, and returns
named results; all cases of an op must return the same numbers, which is checked before timing.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nivmf_fast
from benchmarks.samplers import SAMPLERS, scipy_loop
from nivmf_fast import reference

Step = Callable[[], dict[str, Tensor]]


class Shape(NamedTuple):
    B: int  # images
    N: int  # samples per image
    P: int  # proxies
    D: int  # dimensions


SHAPES = {
    "cub-128": Shape(112, 5, 100, 128),
    "cub-512": Shape(112, 10, 100, 512),
    "cars-128": Shape(112, 5, 98, 128),
    "cars-512": Shape(112, 10, 98, 512),
    "sop-128": Shape(112, 5, 11_318, 128),
    "sop-512": Shape(112, 5, 11_318, 512),
    "1e5-128": Shape(112, 5, 100_000, 128),
    "1e5-512": Shape(112, 5, 100_000, 512),
    "1e6-128": Shape(512, 5, 1_000_000, 128),
    "1e6-512": Shape(512, 5, 1_000_000, 512),
}


@dataclass
class Problem:
    op: str
    shape: Shape
    temperature: float
    device: str
    dtype: torch.dtype = torch.float32
    backends: tuple[str, ...] = ()  # of this library; all that run here if empty

    def __post_init__(self) -> None:
        B, N, P, D = self.shape
        g = torch.Generator().manual_seed(0)
        unit = torch.nn.functional.normalize
        loc = unit(torch.randn(P, D, generator=g), dim=-1)
        kappa = 20 * torch.exp(0.05 * torch.randn(P, D, generator=g))
        self.labels = torch.randint(P, (B,), generator=g).to(self.device)
        image = unit(loc[self.labels.cpu()] + torch.randn(B, D, generator=g) * 2 / D**0.5, dim=-1)
        self.image, self.k = image.to(self.device), torch.full((B,), 60.0, device=self.device)
        x = nivmf_fast.vmf_rsample(image, self.k.cpu(), N, seed=0, backend="reference")
        tensors = x, loc, kappa, torch.tensor(self.temperature)
        self.inputs = [t.to(self.device, self.dtype).requires_grad_() for t in tensors]

    def double(self) -> "Problem":
        return Problem(self.op, self.shape, self.temperature, self.device, torch.float64)


# kernels first: the others are compared with the first case of an op
BACKENDS = tuple(sorted(nivmf_fast.backends(), key=lambda name: name == "reference"))
NAMES = ("value", "samples", "loc", "concentration", "temperature")


def _step(problem: Problem, forward: Callable[..., Tensor]) -> Step:
    """One forward and backward of a function of the inputs, whose values are summed."""

    def step() -> dict[str, Tensor]:
        value = forward(*problem.inputs)
        gradients = torch.autograd.grad(value.sum(), problem.inputs)
        return dict(zip(NAMES, (value.detach(), *gradients), strict=True))

    return step


# --- log-PPK and proxy-NCA: baselines


def _eager(problem: Problem) -> Callable[..., Tensor]:
    if problem.op == "log_ppk":
        return reference.log_ppk
    labels = problem.labels
    return lambda x, loc, kappa, T: reference.proxy_nca(x, loc, kappa, labels, T)


def _per_image(problem: Problem) -> Callable[..., Tensor]:
    """The research code's way: one image after the other, with [N, P, D] numbers each."""

    def log_density(x: Tensor, loc: Tensor, kappa: Tensor) -> Tensor:  # [N, D] -> [N, P]
        k_mu = kappa * loc
        length = k_mu.norm(dim=-1)
        g = nivmf_fast.vmf_log_normalizer(length, loc.shape[-1], constants=False)
        k_x = x[:, None] * kappa
        x_length = k_x.norm(dim=-1)
        # centred, otherwise float32 loses all digits of the differences at a small temperature
        log_volume = torch.log(kappa / x_length.detach().mean()).sum(-1)
        shrink = loc.shape[-1] * torch.log(x_length / x_length.detach().mean())
        return g + (k_x * k_mu).sum(-1) / x_length + log_volume - shrink

    def forward(x: Tensor, loc: Tensor, kappa: Tensor, T: Tensor) -> Tensor:
        rows = []
        for i in range(x.shape[1]):
            s = torch.logsumexp(log_density(x[:, i], loc, kappa) / T, 0) - math.log(len(x))
            if problem.op == "proxy_nca":
                s = torch.logsumexp(s, 0) - s[problem.labels[i]]
            else:  # the constant that log_density leaves out
                s = s + nivmf_fast.vmf_log_normalizer(torch.zeros_like(T), loc.shape[-1]) / T
            rows.append(s)
        return torch.stack(rows)

    return forward


def _chunked(problem: Problem, chunk: int = 4096) -> Callable[..., Tensor]:
    """Batched over chunks of proxies, whose scores are recomputed in the backward."""

    def part(x: Tensor, loc: Tensor, kappa: Tensor, T: Tensor) -> Tensor:  # [B], raw log sum
        proxies = reference.prepare_proxies(loc, kappa)
        z = reference.score(x, proxies, "exact", True)
        top = z.detach().amax((0, 2))
        rest = torch.logsumexp((z - top[:, None]) / T, (0, 2))
        return (top + proxies.common).double() / T + rest

    def forward(x: Tensor, loc: Tensor, kappa: Tensor, T: Tensor) -> Tensor:
        pieces = zip(loc.split(chunk), kappa.split(chunk), strict=True)
        sums = [checkpoint(part, x, m, k, T, use_reentrant=False) for m, k in pieces]
        own = torch.stack(
            [part(x[:, i : i + 1], loc[j : j + 1], kappa[j : j + 1], T)
             for i, j in enumerate(problem.labels.tolist())]
        )  # fmt: skip
        return (torch.logsumexp(torch.stack(sums), 0) - own[:, 0]).to(x.dtype)

    return forward


def _products_only(problem: Problem) -> Step:
    """The floor: the six matrix products of a step and nothing else."""
    x, loc, kappa, _ = (t.detach() for t in problem.inputs)
    x = x.flatten(0, 1)
    G = torch.full((len(x), len(loc)), 1e-3, dtype=x.dtype, device=x.device)

    def step() -> dict[str, Tensor]:
        x @ loc.T, x @ kappa.T
        G @ loc, G @ kappa
        return {"loc": G.T @ x, "concentration": G.T @ x}

    return step


def _cuda_graph(step: Step) -> Step:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


def _library(problem: Problem, backend: str) -> Callable[..., Tensor]:
    if problem.op == "log_ppk":
        return functools.partial(nivmf_fast.log_ppk, backend=backend)
    return lambda x, loc, kappa, T: nivmf_fast.proxy_nca(
        x, loc, kappa, problem.labels, T, backend=backend
    )


def _kernel_cases(problem: Problem) -> Iterator[tuple[str, Callable[[], Step]]]:
    for backend in _backends(problem):
        yield f"nivmf_fast ({backend})", lambda b=backend: _step(problem, _library(problem, b))
    B, N, P, _ = problem.shape
    fits = 8 * 4 * B * N * P < 24e9  # eager code keeps about eight arrays of all scores
    if fits:
        yield "batched eager", lambda: _step(problem, _eager(problem))
        yield "torch.compile", lambda: _step(problem, torch.compile(_eager(problem)))
    if P <= 1000:
        yield "per-image loop", lambda: _step(problem, _per_image(problem))
    if P > 4096 and problem.op == "proxy_nca":
        yield "chunked + checkpointed", lambda: _step(problem, _chunked(problem))
    if fits and problem.device == "cuda":
        yield "CUDA graph of eager", lambda: _cuda_graph(_step(problem, _eager(problem)))
    if 4 * B * N * P < 24e9:
        yield "matrix products only", lambda: _products_only(problem)


# --- the sampler


def _sampler_step(problem: Problem, draw: Callable[[Tensor, Tensor], Tensor]) -> Step:
    loc, k = problem.image.clone().requires_grad_(), problem.k.clone().requires_grad_()

    def step() -> dict[str, Tensor]:
        x = draw(loc, k)
        torch.autograd.grad(x.sum(), (loc, k))
        return {"samples": x.detach()}

    return step


def _sampler_cases(problem: Problem) -> Iterator[tuple[str, Callable[[], Step]]]:
    B, N, _, D = problem.shape
    loc, k = problem.image, problem.k
    seed = torch.zeros((), dtype=torch.int64, device=problem.device)
    backends = _backends(problem)
    for backend in backends:
        yield (
            f"nivmf_fast ({backend})",
            lambda b=backend: _sampler_step(
                problem, lambda m, c: nivmf_fast.vmf_rsample(m, c, N, seed=seed, backend=b)
            ),
        )
    yield (
        "nivmf_fast, forward only",  # of the first backend
        lambda: (
            lambda: {"samples": nivmf_fast.vmf_rsample(loc, k, N, seed=seed, backend=backends[0])}
        ),
    )
    yield (
        "torch.randn of the same shape",
        lambda: lambda: {"floor": torch.randn(N, B, D, device=problem.device)},
    )
    for name, draw in SAMPLERS.items():
        if draw is not scipy_loop or (problem.device == "cpu" and D <= 128):  # slow elsewhere
            yield name, lambda draw=draw: lambda: {"samples": draw(loc, k, N)}


def _backends(problem: Problem) -> list[str]:
    if problem.backends:
        return list(problem.backends)
    found = []
    for backend in BACKENDS:
        try:
            nivmf_fast.which_backend(problem.op, problem.device, problem.dtype, backend)
        except RuntimeError:
            continue
        if backend != "triton" or problem.device == "cuda":
            found.append(backend)
    return found if problem.op == "vmf_rsample" else [b for b in found if b != "reference"]


CASES: dict[str, Callable[[Problem], Iterator[tuple[str, Callable[[], Step]]]]] = {
    "proxy_nca": _kernel_cases,
    "log_ppk": _kernel_cases,
    "vmf_rsample": _sampler_cases,
}


def truth(problem: Problem) -> dict[str, Tensor] | None:
    """Run the same step in float64, if that fits into memory."""
    B, N, P, _ = problem.shape
    if problem.op == "vmf_rsample" or 8 * 8 * B * N * P > 8e9:
        return None
    double: Any = problem.double()
    return _step(double, _eager(double))()


def tangential(results: dict[str, Tensor] | None, problem: Problem) -> dict[str, Tensor] | None:
    """Project the samples' gradient onto the sphere: the other component is arbitrary."""
    if results is None or problem.op == "vmf_rsample" or "samples" not in results:
        return results
    grad = results["samples"]
    x = problem.inputs[0].detach().to(grad)
    return results | {"samples": grad - (grad * x).sum(-1, keepdim=True) * x}
