"""What tests share: the backends present on this machine, and golden values."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nivmf_fast import _ops

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core: threads would only wait for each other
    torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def device_of(backend: str) -> str:
    """The device that a backend is tested on; skips, with the reason, if it cannot run here."""
    state = _ops.backends()[backend]
    if not state.usable:
        pytest.skip(f"backend {backend}: {state.reason}")
    return "cpu" if backend in ("reference", "cpu") else "cuda"


@pytest.fixture(params=["reference", "cpu", "cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    device_of(request.param)
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def relative_l2(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.cpu().double() - truth.cpu().double()).norm() / truth.double().norm())
