"""The table of backends: their kernels, whether they can run here, and the choice of one."""

import functools
import importlib
import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nivmf_fast import reference, special
from nivmf_fast._schemas import SAVED_SCHEMA, SCHEMAS, Options, takes_options

_HERE = Path(__file__).parent

# The compiled libraries implement these operators; the public ops add `backend` to the arguments.
_kernels = torch.library.Library("nivmf_kernels", "DEF")
for _name, (_arguments, _returns) in SCHEMAS.items():
    _kernels.define(f"{_name}({_arguments}) -> {_returns}")


class BackendState(NamedTuple):
    """Whether a backend was built and is usable here; if not, why, and how to change that."""

    built: bool
    usable: bool
    reason: str = ""
    remedy: str = ""


_NO_GPU = BackendState(
    True,
    False,
    "no CUDA device is visible",
    "run on a machine with an NVIDIA GPU and its driver",
)


def build_info() -> dict[str, Any]:
    """The build's record: the torch it was built for, compilers, and what was left out and why."""
    path = _HERE / "_build_info.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


class Backend(ABC):
    """A way to compute the ops of `_schemas.py`; the subclasses are the kinds."""

    def __init__(self, name: str, *devices: str) -> None:
        self.name, self._devices = name, devices

    def state(self) -> BackendState:
        """Whether the backend was built, and whether it can run on this machine."""
        return BackendState(True, True)

    @abstractmethod
    def has(self, op: str) -> bool:
        """Whether the backend, if usable, implements an op."""

    @abstractmethod
    def function(self, op: str) -> Callable[..., Any]:
        """The op's implementation, which takes the op's arguments except `backend`."""

    @abstractmethod
    def saved_like(self, op: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
        """A tensor shaped as the one that log-PPK or proxy-NCA saves; its contents are private."""

    def runs_on(self, device: str) -> bool:
        """Whether the backend computes on tensors of a type of device."""
        return device in self._devices


class Reference(Backend):
    """Eager PyTorch, on every device."""

    def has(self, op: str) -> bool:
        return True

    def function(self, op: str) -> Callable[..., Any]:
        operators: dict[str, Callable[..., Any]] = {
            "vmf_log_normalizer": special.log_normalizer_derivative,
            "vmf_rsample": lambda *args: reference.vmf_rsample(*args)[:2],
            "vmf_rsample_backward": reference.vmf_rsample_backward,
            "log_ppk": reference.log_ppk_forward,
            "log_ppk_backward": reference.log_ppk_backward,
            "proxy_nca": reference.proxy_nca_forward,
            "proxy_nca_backward": reference.proxy_nca_backward,
        }
        function = _packed(op, operators[op])

        def without_autocast(first: Tensor, *args: Any) -> Any:
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *args)

        return without_autocast

    def saved_like(self, op: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
        return samples.new_empty((2, samples.shape[1], len(loc)) if op == "log_ppk" else 0)

    def runs_on(self, device: str) -> bool:
        return True


class Compiled(Backend):
    """A library built from csrc/, which registers its kernels for its device when loaded."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        # Defined even if the library is missing, because the fake kernels need it there too.
        self._saved = f"proxy_nca_saved_{name}"
        _kernels.define(f"{self._saved}({SAVED_SCHEMA}) -> int[]")
        self.library = self._load()

    def _load(self) -> BackendState:
        info, stem = build_info(), f"_C_{self.name}"
        rebuild = "NIVMF_REQUIRE_EXT=1 pip install --no-deps . in the source tree (reports errors)"
        library = _HERE / f"{stem}.so"
        if not library.is_file():
            reason = info.get("off", {}).get(stem, "it was not built")
            return BackendState(False, False, reason, info.get("remedy", {}).get(stem, rebuild))
        if "cuda" in self._devices and not torch.version.cuda:
            reason = "this torch is a CPU build"
            return BackendState(True, False, reason, "install a CUDA build of torch")
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            built_for = info.get("torch", "an unknown version")
            reason = f"built for torch {built_for}, it does not load under {torch.__version__}"
            return BackendState(True, False, f"{reason}: {error}", rebuild)
        return BackendState(True, True)

    def state(self) -> BackendState:
        no_gpu = "cuda" in self._devices and not torch.cuda.is_available()
        return _NO_GPU if self.library.usable and no_gpu else self.library

    def has(self, op: str) -> bool:
        (device,) = self._devices
        name = f"nivmf_kernels::{op}"
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())

    def function(self, op: str) -> Callable[..., Any]:
        return getattr(torch.ops.nivmf_kernels, op).default  # type: ignore[no-any-return]

    def saved_like(self, op: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
        (N, B, D), P = samples.shape, len(loc)
        if op == "log_ppk":
            return samples.new_empty(2, B, P)
        shape = getattr(torch.ops.nivmf_kernels, self._saved)
        return samples.new_empty(shape(N, B, P, D, samples.dtype == torch.float64, *options))


class Cpu(Compiled):
    """The library for CPUs; torch.compile traces its ops once for all batch sizes."""

    def saved_like(self, op: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
        symbolic = any(isinstance(size, torch.SymInt) for size in (*samples.shape, len(loc)))
        if op == "proxy_nca" and symbolic:
            N, B, _ = samples.shape
            shape = self.saved_shape(N, B, len(loc), samples.element_size(), options)
            return samples.new_empty(shape)
        return super().saved_like(op, samples, loc, options)

    @staticmethod
    def saved_shape(N: int, B: int, P: int, itemsize: int, options: Options) -> tuple[int, int]:
        # repeats proxy_nca_saved_cpu: C++ takes no symbolic sizes, so that calling it would make
        # torch.compile recompile for every batch size
        width = min(128, (P + 15) // 16 * 16)
        panels, scores, workspace = (P + width - 1) // width, 2 * N * B * width, options.workspace
        kept = options.keep and panels * scores * itemsize <= workspace - workspace // 8
        return panels, B + (scores if kept else 0)


class Triton(Backend):
    """Triton kernels, on CUDA and under Triton's interpreter on every device."""

    def state(self) -> BackendState:
        if importlib.util.find_spec("triton") is None:
            reason = "the triton package is not installed"
            return BackendState(False, False, reason, "pip install triton")
        here = torch.cuda.is_available() or self._interpreted
        return BackendState(True, True) if here else _NO_GPU

    @property
    def _interpreted(self) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    @functools.cached_property
    def _functions(self) -> dict[str, Callable[..., Any]]:
        from nivmf_fast.triton import log_ppk, vmf_sampler, vmf_sampler_backward

        return {
            "vmf_rsample": vmf_sampler.vmf_rsample,
            "vmf_rsample_backward": vmf_sampler_backward.vmf_rsample_backward,
            "log_ppk": log_ppk.log_ppk,
            "log_ppk_backward": log_ppk.log_ppk_backward,
            "proxy_nca": log_ppk.proxy_nca,
            "proxy_nca_backward": log_ppk.proxy_nca_backward,
        }

    def has(self, op: str) -> bool:
        return op in self._functions

    def function(self, op: str) -> Callable[..., Any]:
        return _packed(op, self._functions[op])

    def saved_like(self, op: str, samples: Tensor, loc: Tensor, options: Options) -> Tensor:
        from nivmf_fast.triton import log_ppk_prepare

        return log_ppk_prepare.saved_like(op, samples, loc, options)

    def runs_on(self, device: str) -> bool:
        return self._interpreted or super().runs_on(device)


def _packed(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt a function that takes one `Options` to the flat options of an op."""
    if not takes_options(op):
        return function
    count = len(Options._fields)
    return lambda *args: function(*args[:-count], Options(*args[-count:]))


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Reference("reference"),
        Cpu("cpu", "cpu"),
        Compiled("cuda", "cuda"),
        Triton("triton", "cuda"),
    )
}
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # by device


def backends() -> dict[str, BackendState]:
    """List the backends by name, with their state on this machine.

    Returns:
        For each: whether it was built, whether it is usable, and if not the reason and a remedy.

    Example:
        >>> import nivmf_fast
        >>> nivmf_fast.backends()["reference"].usable
        True
    """
    return {name: _state(name) for name in BACKENDS}


# Cached: it does not change while the process lives.
@functools.cache
def _state(name: str) -> BackendState:
    return BACKENDS[name].state()


def _computes(name: str, op: str, device: str) -> bool:
    backend = BACKENDS[name]
    return _state(name).usable and backend.has(op) and backend.runs_on(device)


def which_backend(
    op: str, device: torch.device | str, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> str:
    """Name the backend that computes `op` ("vmf_rsample", "proxy_nca", ...) on a device.

    "auto" takes the first usable of: on CPUs cpu, reference; on CUDA cuda, triton, reference;
    elsewhere reference. A backend asked for by name is used, or an error explains why it cannot be.

    Args:
        op: the name of a public function with a `backend` argument.
        device: where the tensors are.
        dtype: their type; every backend computes float32 and float64.
        backend: "auto", or a name in `backends()`.

    Returns:
        A name in `backends()`.

    Raises:
        ValueError: unknown op or backend name.
        RuntimeError: the backend asked for cannot compute this here; explains why, and the remedy.

    Example:
        >>> import nivmf_fast
        >>> nivmf_fast.which_backend("vmf_rsample", "cpu", backend="reference")
        'reference'
    """
    return choose(op, torch.device(device).type, backend).name


@functools.cache
def choose(op: str, device: str, backend: str) -> Backend:
    """Choose as `which_backend` does, on a type of device; returns the backend itself."""
    if op not in SCHEMAS:
        known = ", ".join(name for name in SCHEMAS if not name.endswith("_backward"))
        raise ValueError(f"op must be one of {known}; got {op!r}")
    if backend == "auto":
        order = _PREFERRED.get(device, ("reference",))
        return BACKENDS[next(name for name in order if _computes(name, op, device))]
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    state = _state(backend)
    here = ", ".join(name for name in BACKENDS if _computes(name, op, device))
    choices = f"usable here for {op}: {here}"
    if not state.usable:
        raise RuntimeError(
            f"backend {backend!r} cannot be used: {state.reason}; {choices}. "
            f"To change that: {state.remedy}"
        )
    if not BACKENDS[backend].has(op):
        raise RuntimeError(f"backend {backend!r} has no {op}; {choices}")
    if not BACKENDS[backend].runs_on(device):
        raise RuntimeError(
            f"backend {backend!r} does not compute on {device} tensors; {choices}. "
            "Move the tensors or choose another backend"
        )
    return BACKENDS[backend]


@functools.cache
def implementation(op: str, device: str, backend: str) -> Callable[..., Any]:
    """The function that computes `op` on a type of device, from the op's arguments."""
    return choose(op, device, backend).function(op)
