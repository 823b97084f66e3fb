"""The sampler under pytest-benchmark: pytest benchmarks --benchmark-only."""

import pytest
import torch

from benchmarks.cases import CASES, SHAPES, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPARED = ("nivmf_fast (", "nivmf_fast, forward only", "torch.randn", "vectorised", "per-image")


@pytest.mark.parametrize("shape", ["cub-128", "cub-512"])
@pytest.mark.parametrize("kind", COMPARED)
def test_draw(benchmark, kind, shape):
    benchmark.group = f"vmf_rsample {shape}"
    problem = Problem("vmf_rsample", SHAPES[shape], 1.0, DEVICE)
    step = next(make for name, make in CASES["vmf_rsample"](problem) if name.startswith(kind))()

    def synchronised() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=1)
