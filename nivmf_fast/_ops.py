"""Op schemas, fake kernels, which backends exist and how one is chosen: the only file that knows.

Each op of the library is one `nivmf_fast::` operator whose last argument names the backend; it
hands its arguments to that backend's implementation. The compiled libraries fill the operators of
the `nivmf_kernels` namespace, whose schemas stand here so that both libraries share them.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nivmf_fast import _schemas, reference, special
from nivmf_fast._schemas import SCHEMAS, Options

_OLD = "bool exact, bool projection, bool fast, int workspace"  # until all backends take Options
_kernels = torch.library.Library("nivmf_kernels", "DEF")
_ops = torch.library.Library("nivmf_fast", "DEF")
for _name, (_arguments, _returns) in SCHEMAS.items():
    _kernels.define(f"{_name}({_arguments.replace(_schemas._OPTIONS, _OLD)}) -> {_returns}")
    _ops.define(f"{_name}({_arguments}, str backend) -> {_returns}")


# --- which backends there are


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops: was it built, can it run here, and if not, why and what to do."""

    name: str
    built: bool
    usable: bool
    reason: str = ""
    remedy: str = ""


_HERE = Path(__file__).parent


def build_info() -> dict[str, Any]:
    """What the build recorded: the torch it was built for, compilers, what is off and why."""
    path = _HERE / "_build_info.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _load(name: str) -> Backend:
    """Load the compiled library of a backend, or find out why that cannot be."""
    info, stem = build_info(), f"_C_{name}"
    rebuild = "NIVMF_REQUIRE_EXT=1 pip install --no-deps . in the source tree (says what fails)"
    library = _HERE / f"{stem}.so"
    if not library.is_file():
        reason = info.get("off", {}).get(stem, "it was not built")
        return Backend(name, False, False, reason, info.get("remedy", {}).get(stem, rebuild))
    if name == "cuda" and not torch.version.cuda:
        return Backend(
            name, True, False, "this torch is a CPU build", "install a CUDA build of torch"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        built_for = info.get("torch", "an unknown version")
        reason = f"built for torch {built_for}, it does not load under {torch.__version__}: {error}"
        return Backend(name, True, False, reason, rebuild)
    return Backend(name, True, True)


_libraries = {name: _load(name) for name in ("cpu", "cuda")}


@functools.cache
def backends() -> dict[str, Backend]:
    """Every backend by name, with its state on this machine."""
    no_gpu = "no CUDA device is visible", "run on a machine with an NVIDIA GPU and its driver"
    found = {"reference": Backend("reference", True, True), **_libraries}
    if found["cuda"].usable and not torch.cuda.is_available():
        found["cuda"] = Backend("cuda", True, False, *no_gpu)
    if importlib.util.find_spec("triton") is None:
        reason = "the triton package is not installed"
        found["triton"] = Backend("triton", False, False, reason, "pip install triton")
    elif torch.cuda.is_available() or _triton_interpreted():
        found["triton"] = Backend("triton", True, True)
    else:
        found["triton"] = Backend("triton", True, False, *no_gpu)
    return found


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _implemented(op: str, backend: str) -> bool:
    if backend == "reference":
        return True
    if backend in ("cpu", "cuda"):
        name = f"nivmf_kernels::{op}"
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, backend.upper())
    return op in _triton()


@functools.cache
def _triton() -> dict[str, Callable[..., Any]]:
    from nivmf_fast.triton import log_ppk, log_ppk_prepare, vmf_sampler, vmf_sampler_backward

    return {
        "vmf_rsample": vmf_sampler.vmf_rsample,
        "vmf_rsample_backward": vmf_sampler_backward.vmf_rsample_backward,
        "log_ppk": log_ppk.log_ppk,
        "log_ppk_backward": log_ppk.log_ppk_backward,
        "proxy_nca": log_ppk.proxy_nca,
        "proxy_nca_backward": log_ppk.proxy_nca_backward,
        "saved_like": log_ppk_prepare.saved_like,
    }


def which_backend(
    op: str, device: torch.device | str, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> str:
    """The backend that computes `op` ("vmf_rsample", "proxy_nca", ...) on a device.

    "auto" takes the first usable of: on CPUs cpu, reference; on CUDA cuda, triton, reference;
    elsewhere reference. A backend asked for by name is used or an error says why it cannot be.

    Raises:
        ValueError: unknown op or backend name.
        RuntimeError: the backend asked for cannot compute this here; says why and what to do.

    Example:
        >>> import nivmf_fast
        >>> nivmf_fast.which_backend("vmf_rsample", "cpu", backend="reference")
        'reference'
    """
    return _choose(op, torch.device(device).type, dtype, backend)


@functools.cache  # what is built and usable does not change while the process lives
def _choose(op: str, device: str, dtype: torch.dtype, backend: str) -> str:
    known = [name for name in SCHEMAS if not name.endswith("_backward")]
    if op not in SCHEMAS:
        raise ValueError(f"op must be one of {', '.join(known)}; got {op!r}")
    if backend == "auto":
        order = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device, ())
        usable = (b for b in order if backends()[b].usable and _implemented(op, b))
        return next(usable, "reference")
    if backend not in backends():
        raise ValueError(f"backend must be one of auto, {', '.join(backends())}; got {backend!r}")
    state = backends()[backend]
    here = [b for b in backends() if b == "reference" or _runs_on(b, device)]
    here = [b for b in here if backends()[b].usable and _implemented(op, b)]
    choices = f"usable here for {op}: {', '.join(here)}"
    if not state.usable:
        raise RuntimeError(
            f"backend {backend!r} cannot be used: {state.reason}; {choices}. "
            f"To change that: {state.remedy}"
        )
    if not _implemented(op, backend):
        raise RuntimeError(f"backend {backend!r} has no {op}; {choices}")
    if not (backend == "reference" or _runs_on(backend, device)):
        raise RuntimeError(
            f"backend {backend!r} does not compute on {device} tensors; {choices}. "
            "Move the tensors or choose another backend"
        )
    return backend


def _runs_on(backend: str, device: str) -> bool:
    if backend == "triton" and _triton_interpreted():
        return True
    return device == ("cpu" if backend == "cpu" else "cuda")


# --- the ops


def _reference_rsample(*args: Any) -> tuple[Tensor, Tensor]:
    draw = reference.vmf_rsample(*args)
    return draw.samples, draw.one_minus_w


_REFERENCE: dict[str, Callable[..., Any]] = {
    "vmf_log_normalizer": special.log_normalizer_derivative,
    "vmf_rsample": _reference_rsample,
    "vmf_rsample_backward": reference.vmf_rsample_backward,
    "log_ppk": reference.log_ppk_forward,
    "log_ppk_backward": reference.log_ppk_backward,
    "proxy_nca": reference.proxy_nca_forward,
    "proxy_nca_backward": reference.proxy_nca_backward,
}


def _without_autocast(function: Callable[..., Any], first: Tensor, *args: Any) -> Any:
    with torch.autocast(first.device.type, enabled=False):
        return function(first, *args)


@functools.cache
def _implementation(op: str, backend: str) -> Callable[..., Any]:
    if backend == "reference":
        return functools.partial(_without_autocast, _REFERENCE[op])
    if backend == "triton":
        return _triton()[op]
    return getattr(torch.ops.nivmf_kernels, op).default  # type: ignore[no-any-return]


def _old(options: Options) -> tuple[bool, bool, bool, int]:
    exact, projection, precision, workspace, keep = options
    return exact, projection, precision == 1, workspace if keep else 0


def _register(op: str) -> None:
    def run(first: Tensor, *args: Any) -> Any:
        *others, backend = args
        chosen = _choose(op, first.device.type, first.dtype, backend)
        if not op.startswith("vmf"):
            options = Options(*others[-5:])
            others[-5:] = _old(options) if chosen in ("cpu", "cuda") else [options]
        return _implementation(op, chosen)(first, *others)

    _ops.impl(op, run, "CompositeExplicitAutograd")


for _name in SCHEMAS:
    _register(_name)


@torch.library.register_fake("nivmf_fast::vmf_log_normalizer", lib=_ops)
def _(concentration: Tensor, dim: int, order: int, backend: str) -> Tensor:
    return torch.empty_like(concentration, memory_format=torch.contiguous_format)


@torch.library.register_fake("nivmf_fast::vmf_rsample", lib=_ops)
def _(
    loc: Tensor, concentration: Tensor, n: int, seed: Tensor, image_offset: int, backend: str
) -> tuple[Tensor, Tensor]:
    return loc.new_empty(n, *loc.shape), concentration.new_empty(n, *concentration.shape)


@torch.library.register_fake("nivmf_fast::vmf_rsample_backward", lib=_ops)
def _(
    grad: Tensor,
    samples: Tensor,
    one_minus_w: Tensor,
    loc: Tensor,
    concentration: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return loc.new_empty(loc.shape), concentration.new_empty(concentration.shape)


@torch.library.register_fake("nivmf_fast::log_ppk", lib=_ops)
def _(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *options, backend = options_and_backend
    chosen = _choose("log_ppk", samples.device.type, samples.dtype, backend)
    values = samples.new_empty(samples.shape[1], loc.shape[0])
    saved = _saved("log_ppk", chosen, samples, loc, Options(*options))
    return values, saved, samples.new_empty((), dtype=torch.float64)


@torch.library.register_fake("nivmf_fast::proxy_nca", lib=_ops)
def _(
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    B = samples.shape[1]
    *options, backend = options_and_backend
    chosen = _choose("proxy_nca", samples.device.type, samples.dtype, backend)
    saved = _saved("proxy_nca", chosen, samples, loc, Options(*options))
    return samples.new_empty(B), samples.new_empty(4, B, dtype=torch.float64), saved


def _gradients(
    samples: Tensor, loc: Tensor, concentration: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    inputs = samples, loc, concentration, temperature
    return tuple(t.new_empty(t.shape) for t in inputs)


@torch.library.register_fake("nivmf_fast::log_ppk_backward", lib=_ops)
def _(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    temperature: Tensor,
    saved: Tensor,
    *options_and_backend: Any,
) -> tuple[Tensor, ...]:
    return _gradients(samples, loc, concentration, temperature)


@torch.library.register_fake("nivmf_fast::proxy_nca_backward", lib=_ops)
def _(
    grad: Tensor,
    samples: Tensor,
    loc: Tensor,
    concentration: Tensor,
    labels: Tensor,
    temperature: Tensor,
    partial: Tensor,
    saved: Tensor,
    *options_and_backend: Any,
) -> tuple[Tensor, ...]:
    return _gradients(samples, loc, concentration, temperature)


def _saved(op: str, backend: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
    """A tensor like the one that a backend saves for the backward; what is in it is its affair."""
    (N, B, D), P = samples.shape, loc.shape[0]
    if backend == "triton":
        like: Tensor = _triton()["saved_like"](op, samples, loc, options)
        return like
    *_, workspace = _old(options)
    if op == "log_ppk":
        return samples.new_empty(2, B, P)
    if backend == "cuda":
        double = samples.dtype == torch.float64
        count = torch.ops.nivmf_kernels.proxy_nca_saved_on_cuda
        return samples.new_empty(count(N, B, P, D, double, workspace))
    if backend == "cpu":  # as proxy_nca_saved_layout in log_ppk_cpu.cpp
        width = min(128, (P + 15) // 16 * 16)
        panels, scores = (P + width - 1) // width, 2 * N * B * width
        kept = panels * scores * samples.element_size() <= workspace - workspace // 8
        return samples.new_empty(panels, B + (scores if kept else 0))
    return samples.new_empty(0)
