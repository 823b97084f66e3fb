"""How it is timed: whole steps, by turns, with memory, error and repeatability beside the time."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]


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


def measure(
    steps: dict[str, Callable[[], Results]], device: str, seconds: float
) -> dict[str, dict[str, float]]:
    """Median, p10 and p90 in ms of each step; they take turns, so that all meet the same machine.

    Every step runs at least 3 times and until `seconds` times the number of steps have passed.
    """
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if device == "cuda" else None
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds * len(steps)
    while len(next(iter(times.values()))) < 3 or time.perf_counter() < deadline:
        for name, step in steps.items():
            times[name].append(_once(step, device, flush) * 1e3)
    return {name: _summary(values) for name, values in times.items()}


def _summary(ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ms, n=10, method="inclusive")
    return {
        "median_ms": statistics.median(ms),
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "min_ms": min(ms),
        "runs": len(ms),
    }


def peak_memory(step: Callable[[], Results], device: str) -> float | None:
    """MB above what was held before, results included; on CPUs the resident set, Linux only."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = step()
    del results
    return (_status("VmHWM") - before) / 1e6


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
