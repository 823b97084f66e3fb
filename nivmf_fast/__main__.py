"""`python -m nivmf_fast`: report what is installed, built and usable here, for bug reports."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from nivmf_fast import _backends


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "none visible to torch"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        yield f"{gpu.name}, {memory:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"


def _facts() -> Iterator[tuple[str, str]]:
    build = _backends.build_info()
    yield "nivmf_fast", f"{_version('nivmf-fast')} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} in {sys.prefix}"
    yield "torch", f"{torch.__version__}, kernels built for {build.get('torch', 'no torch')}"
    yield "triton", _version("triton")
    yield "cuda", torch.version.cuda or "none (this torch is a CPU build)"
    yield "compiler", build.get("compiler", "none")
    nvcc = f"{build['nvcc']} for {build['cuda_architectures']}" if "nvcc" in build else "none"
    yield "nvcc", nvcc
    yield "platform", platform.platform()
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{capability}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    for gpu in _gpus():
        yield "gpu", gpu


def _report() -> Iterator[str]:
    for name, fact in _facts():
        yield f"{name:<12}{fact}"
    yield ""
    yield f"{'backend':<12}{'built':<7}usable"
    for name, state in _backends.backends().items():
        built, usable = ("yes" if fact else "no" for fact in (state.built, state.usable))
        yield f"{name:<12}{built:<7}{usable:<8}{state.reason}".rstrip()
        if state.remedy:
            yield f"{'':<12}to change that: {state.remedy}"


if __name__ == "__main__":
    print("\n".join(_report()))
