"""Time whole steps, interleaved; measure their memory, errors and repeatability."""

import collections
import contextlib
import ctypes
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nivmf_fast

Results = dict[str, Tensor]
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# glibc returns freed blocks above the threshold to the system. It is set low, so that the resident
# set is the memory in use, and afterwards as high as glibc itself would have moved it, so that a
# timed step does not fetch its memory anew.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1


def _once(step: Callable[[], Results], device: str, flush: Tensor | None) -> float:
    """Seconds of one step; on CUDA by events, with a cold L2 cache."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    if flush is not None:
        flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    steps: dict[str, Callable[[], Results]], device: str, seconds: float, least: int
) -> dict[str, list[float]]:
    """Return all times of each step in ms; the steps take turns, so that load affects all alike.

    In a turn a step runs once, or for an eighth of `seconds`. There are as many turns as fit into
    `seconds` times the number of steps, but at least `least`.
    """
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device == "cuda" else None
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    taken, deadline = 0, time.perf_counter() + seconds * len(steps)
    while taken < least or time.perf_counter() < deadline:
        taken += 1
        for name, step in steps.items():
            end = time.perf_counter() + seconds / 8
            times[name].append(_once(step, device, flush) * 1e3)
            while time.perf_counter() < end:
                times[name].append(_once(step, device, flush) * 1e3)
    return times


def measure(
    steps: dict[str, Callable[[], Results]], device: str, seconds: float
) -> dict[str, dict[str, float]]:
    """Median, p10 and p90 in ms of each step, over at least three turns."""
    return {k: summarise(ms) for k, ms in interleave(steps, device, seconds, least=3).items()}


def summarise(ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ms, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(ms),
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "min_ms": min(ms),
        "runs": len(ms),
    }


def peak_memory(step: Callable[[], Results], device: str) -> float | None:
    """Peak MB above what was held before, results included; on CPUs the resident set, on Linux."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = step()
    del results
    peak = _status("VmHWM") - before
    libc.mallopt(MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(TRIM_THRESHOLD, 64 << 20)
    return peak / 1e6


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def relative_errors(got: Results, want: Results | None) -> dict[str, float]:
    """Relative L2 error of each result."""
    if want is None:
        return {}
    return {
        name: float((got[name].double() - want[name]).norm() / want[name].norm())
        for name in want
        if name in got and got[name].shape == want[name].shape
    }


def repeats(step: Callable[[], Results]) -> bool:
    first = {name: t.clone() for name, t in step().items()}
    second: dict[str, Any] = step()
    return all(torch.equal(t, second[name]) for name, t in first.items())


def counts(step: Callable[[], Results], device: str) -> dict[str, int | None]:
    """Kernel launches and host synchronisations of a step; on CPUs there are none to count."""
    if device != "cuda":
        return {"launches": None, "host_syncs": None}
    # the difference of two runs, since each has what the profiler itself adds at its end
    one, two = (collections.Counter(events(step, device, times)) for times in (1, 2))
    more = {name: two[name] - one[name] for name in two}
    return {
        "launches": sum(n for name, n in more.items() if name.startswith(LAUNCHES)),
        "host_syncs": sum(n for name, n in more.items() if name.startswith(SYNCS)),
    }


def events(step: Callable[[], Results], device: str, times: int = 1) -> list[str]:
    """Names of the ops, calls and kernels that torch.profiler sees in `times` steps."""
    return [event.name for event in profiled(step, device, times).events() or ()]


def profiled(step: Callable[[], Any], device: str, times: int = 1) -> torch.profiler.profile:
    """Profile `times` steps, after one that is not profiled."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(times):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    return profile


class Stages:
    """Times of the named parts of a loop, in ms; on CUDA by events, read after the loop."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._marks.setdefault(name, []).append((begin, self._now()))

    def _now(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def summary(self) -> dict[str, dict[str, float]]:
        if self.device != "cuda":
            spans = {k: [1e3 * (e - b) for b, e in v] for k, v in self._marks.items()}
        else:
            torch.cuda.synchronize()
            spans = {k: [b.elapsed_time(e) for b, e in v] for k, v in self._marks.items()}
        return {name: summarise(ms) for name, ms in spans.items()}


def ceilings(device: str, seconds: float = 0.5) -> dict[str, float]:
    """Peak rates of the machine: copies in GB/s, read and written, and products in GFLOP/s."""
    n, size = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 28)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def took(step: Callable[[], Any]) -> float:
        return measure({"": step}, device, seconds)[""]["min_ms"] / 1e3

    best = {"copy_gb_per_s": 2 * size / took(lambda: target.copy_(source)) / 1e9}
    a, b = torch.randn(2, n, n, device=device)
    forms = [("float32", a, b, "highest")]
    if device == "cuda":
        forms += [("tf32", a, b, "high"), ("bfloat16", a.bfloat16(), b.bfloat16(), "highest")]
    before = torch.get_float32_matmul_precision()
    for name, left, right, precision in forms:
        torch.set_float32_matmul_precision(precision)
        rate = 2 * n**3 / took(lambda x=left, y=right: x @ y) / 1e9
        best[f"matmul_{name}_gflop_per_s"] = rate
    torch.set_float32_matmul_precision(before)
    return best


def machine(device: str) -> dict[str, Any]:
    """The machine, the versions, the commit and the date of the figures."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = Path("/proc/cpuinfo").read_text().split("model name")
        cpu = names[1].splitlines()[0].strip("\t: ") if len(names) > 1 else cpu
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of other processes: best 0
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "nivmf_fast": nivmf_fast.__version__,
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
