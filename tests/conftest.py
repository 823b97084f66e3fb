"""Shared by the tests: the backends present on this machine, golden values, small image sets."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nivmf_fast

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core: threads would only wait for each other
    torch.set_num_threads(1)

# Files whose tests share slow fixtures: one worker runs all tests of such a file.
TOGETHER = {
    *("test_commands.py", "test_data_parallel.py", "test_distributed.py"),
    *("test_log_ppk_cuda.py", "test_train.py", "test_triton_log_ppk.py", "test_triton_sampler.py"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if Path(file).name in TOGETHER else nodeid

    return Scheduling(config, log)


GOLDEN = Path(__file__).parent / "golden"

# Relative L2 error allowed in float32 gradients, beyond twice eager code's, if products run on
# tensor cores (CUDA with more than 512 proxies, Triton). Numbers are two bfloat16 planes of 8 bits
# there: each operand keeps a residual of at most 2^-17, and the product of the two low planes,
# at most 2^-16, is left out: 2^-15 at worst, and 2^-18 as a root mean square over random mantissas,
# which is what a sum of many terms shows. The last factor is for terms that cancel: d_concentration
# is a difference of two such products, and 2.6 is the largest factor measured on the host. Scores
# keep three planes, and with them float32's accuracy: nothing of this is multiplied by 1 / T.
SPLIT = 2.0**-18 * 3


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def device_of(backend: str) -> str:
    """The device that a backend is tested on; skips, with the reason, if it cannot run here."""
    state = nivmf_fast.backends()[backend]
    if not state.usable:
        pytest.skip(f"backend {backend}: {state.reason}")
    return "cpu" if backend in ("reference", "cpu") else "cuda"


@pytest.fixture(params=list(nivmf_fast.backends()))
def backend(request: pytest.FixtureRequest) -> str:
    device_of(request.param)
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def relative_l2(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.cpu().double() - truth.cpu().double()).norm() / truth.double().norm())


def allocated(call: Callable[[], Any]) -> int:
    """The bytes of tensors that a call holds at most, as their allocator counts them."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in steps))


def write_tree(root: Path, dataset: str, classes: int = 8, images: int = 4) -> Path:
    """A small set of JPEG images in a data set's own layout: each class a colour, with noise.

    The layout is that of cub200, cars196 or online_products, and for another name that of plain
    class folders. Returns the set's folder.
    """
    from PIL import Image  # the library's tests do without it

    folder, lists = root / dataset, ("train", "test")
    base = folder if dataset not in ("cub200", "cars196", "online_products") else folder / "images"
    rng = np.random.default_rng(0)
    rows: dict[str, list[str]] = {part: ["image_id class_id super_class_id path"] for part in lists}
    number = 0
    for label in range(1, classes + 1):
        name = {
            "cub200": f"{label:03d}.Bird_{label}",
            "cars196": f"Maker Model {label:03d}",
            "online_products": ("bicycle_final", "chair_final")[label % 2],
        }.get(dataset, f"class_{label:03d}")
        (base / name).mkdir(parents=True, exist_ok=True)
        colour = rng.integers(256, size=3)
        for index in range(images):
            number += 1
            file = f"{label}_{index}.jpg"
            noisy = colour + rng.normal(0, 20, (40, 48, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(base / name / file)
            part = lists[label > classes // 2]
            rows[part].append(f"{number} {label} {1 + label % 2} {name}/{file}")
    if dataset == "online_products":
        (folder / "Info_Files").mkdir()
        for part in lists:
            (folder / f"Info_Files/Ebay_{part}.txt").write_text("\n".join(rows[part]) + "\n")
    (folder / "PARTIAL").touch()  # no whole data set is meant
    return folder
