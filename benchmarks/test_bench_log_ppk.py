"""log-PPK under pytest-benchmark: pytest benchmarks --benchmark-only."""

import pytest
import torch

from benchmarks.cases import CASES, SHAPES, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPARED = ("nivmf_fast (", "batched eager", "matrix products only")


@pytest.mark.parametrize("temperature", [1.0, 0.003])
@pytest.mark.parametrize("shape", ["cub-128", "cub-512"])
@pytest.mark.parametrize("op", ["proxy_nca", "log_ppk"])
@pytest.mark.parametrize("kind", COMPARED)
def test_step(benchmark, kind, op, shape, temperature):
    benchmark.group = f"{op} {shape} T={temperature:g}"
    problem = Problem(op, SHAPES[shape], temperature, DEVICE)
    step = next(make for name, make in CASES[op](problem) if name.startswith(kind))()

    def synchronised() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)
