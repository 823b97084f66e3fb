"""Growth of cost: exponents in B, N, P and D, and a model of classes spread over processes."""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from benchmarks import timing
from benchmarks.cases import CASES, Problem, Shape
from benchmarks.report import grid, number
from nivmf_fast.distributed import ClassParallelELNivMFLoss

# --- exponents

BASE = Shape(B=112, N=5, P=2000, D=128)
AXES = {
    "B": (28, 56, 112, 224, 448),
    "N": (2, 4, 8, 16),
    "P": (1000, 2000, 4000, 8000, 16_000),
    "D": (64, 128, 256, 512, 1024),
}
LIMIT = 1.05  # an exponent above it needs a sentence in EXPLAINED
MEASURED = {"time": "median_ms", "memory": "memory_mb"}
# The backward is some 30% slower without the scores: measured with workspace=1 << 20 and 64 << 20.
SCORES = (
    "the B N P scores kept for the backward stay in the caches while they are few; later they come "
    "from memory, and those that do not fit the workspace are recomputed"
)
EXPLAINED = {("time", "B"): SCORES, ("time", "N"): SCORES, ("time", "P"): SCORES}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of y over x on logarithmic scales, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def explained(quantity: str, letter: str, value: float) -> str:
    if value <= LIMIT:
        return ""
    return EXPLAINED.get((quantity, letter), "**unexplained**")


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Fit exponents of time and memory of a `proxy_nca` step in each of B, N, P and D."""
    base = BASE._replace(P=20_000) if args.device == "cuda" else BASE
    fits = []
    for letter, values in AXES.items():
        factor = getattr(base, letter) // getattr(BASE, letter)
        sizes = [factor * value for value in values]
        steps, points = {}, []
        for size in sizes:
            shape = base._replace(**{letter: size})
            problem = Problem("proxy_nca", shape, 1.0, args.device)
            name, make = next(CASES["proxy_nca"](problem))
            steps[str(size)] = make()
            steps[str(size)]()
            memory = timing.peak_memory(steps[str(size)], args.device)
            points.append({"size": size, "case": name, "memory_mb": memory})
        times = timing.measure(steps, args.device, args.seconds / 4)
        for point in points:
            point |= times[str(point["size"])]
        for quantity, key in MEASURED.items():
            ys = [point[key] for point in points]
            if None not in ys and min(ys) > 0:
                value = exponent(sizes, ys)
                fits.append({"letter": letter, "quantity": quantity, "exponent": value,
                             "explained": explained(quantity, letter, value),
                             "points": points})  # fmt: skip
    rows = [
        (
            fit["letter"],
            fit["quantity"],
            f"{fit['exponent']:.2f}",
            f"{fit['points'][0]['size']:,} to {fit['points'][-1]['size']:,}",
            " to ".join(number(fit["points"][i][MEASURED[fit["quantity"]]]) for i in (0, -1)),
            fit["explained"],
        )
        for fit in fits
    ]
    shape = ", ".join(f"{k} {v:,}" for k, v in base._asdict().items())
    text = (
        f"`proxy_nca`, forward and backward, T = 1, around {shape}; one varies at a time. Time in "
        "ms, peak memory above the inputs (gradients included) in MB. An exponent above "
        f"{LIMIT} is explained in its row.\n\n"
        + grid(("of", "what", "exponent", "sizes", "values", "why above 1.05"), rows)
    )
    return {"base": base._asdict(), "fits": fits, "markdown": text}


# --- classes over processes

WORLDS = (1, 2)
B, N, D = 128, 5, 64  # of the measured steps
PROXIES = (4000, 16_000, 64_000)
QUICK_PROXIES = (2000, 8000)
MESSAGES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)  # floats of an all_gather without a step
TABLE_P = (10**4, 10**5, 10**6, 10**7, 10**8)
TABLE_W = (1, 8, 64, 1024)
COPIES = 4  # of the slice: parameters, gradients, Adam's two moments
TENSORS = 2  # proxies and their concentrations, each [P, D]
COLLECTIVES = 7  # of a step
WORKSPACE = 256 << 20  # bytes of scratch that the kernels take at most on a GPU
HARDWARE = {  # flag: (default, unit, meaning)
    "flops": (50e12, "flop/s", "of the loss's arithmetic, in float32"),
    "memory-bandwidth": (3e12, "byte/s", "of a GPU's memory, for the optimiser"),
    "gpu-memory": (80e9, "byte", "of a GPU"),
    "bandwidth": (25e9, "byte/s", "of each process into the network"),
    "latency": (10e-6, "s", "of one message"),
    "overhead": (1e-3, "s", "of a step, whatever its size"),
}


def add_hardware(parser: argparse.ArgumentParser) -> None:
    for flag, (default, unit, meaning) in HARDWARE.items():
        text = f"{meaning}, in {unit}; {default:g} by default"
        parser.add_argument(f"--{flag}", type=float, default=default, metavar="X", help=text)
    parser.add_argument("--global-batch", type=int, default=1024, help="B of the table")
    parser.add_argument("--dimension", type=int, default=512, help="D of the table")


def class_parallel(args: argparse.Namespace) -> dict[str, Any]:
    """Time steps with classes over 1 and 2 processes; fit a cost model, and extrapolate it."""
    worlds = WORLDS
    if args.device == "cuda":
        worlds = tuple(W for W in WORLDS if torch.cuda.device_count() >= W)
    proxies = QUICK_PROXIES if args.quick else PROXIES
    points: list[dict[str, Any]] = []
    for W in worlds:
        with tempfile.TemporaryDirectory() as folder:
            work = (W, args.device, proxies, args.seconds, folder)
            torch.multiprocessing.spawn(_worker, work, nprocs=W)
            points += torch.load(Path(folder) / "points.pt")
    for point in (p for p in points if p["P"]):
        counted = point["bytes"], point["messages"]
        expected = bytes_per_step(point["W"], B, D), COLLECTIVES * (point["W"] - 1)
        if counted != expected:
            raise SystemExit(
                f"a step sends {counted} bytes and messages, not {expected}: the model is stale"
            )
    model = fit(points)
    hardware = {flag: getattr(args, flag.replace("-", "_")) for flag in HARDWARE}
    table = predict(args.global_batch, args.dimension, hardware)
    text = _markdown(points, model, hardware, table, args)
    return {"points": points, "model": model, "hardware": hardware, "table": table,
            "markdown": text}  # fmt: skip


def _worker(
    rank: int, W: int, device: str, proxies: Sequence[int], seconds: float, folder: str
) -> None:
    """Time steps with more and more classes, and collectives alone; rank 0 keeps the figures."""
    torch.set_num_threads(1)
    place = device
    if device == "cuda":
        torch.cuda.set_device(rank)
        place = f"cuda:{rank}"
    store = f"file://{folder}/store"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=W)
    points = []
    g = torch.Generator().manual_seed(rank)
    for P in proxies:
        torch.manual_seed(0)
        loss = ClassParallelELNivMFLoss(P, D, n_samples=N, temperature=1.0).to(place)
        embeddings = (10 * torch.randn(B // W, D, generator=g)).to(place).requires_grad_()
        labels = torch.randint(P, (B // W,), generator=g).to(place)
        parameters = [embeddings, *loss.parameters()]

        def step(loss=loss, embeddings=embeddings, labels=labels, parameters=parameters) -> Any:
            grads = torch.autograd.grad(loss(embeddings, labels, seed=3), parameters)
            return dict(enumerate(grads))

        step()
        loss.group.sent = 0
        # torch.profiler would hold the group, whose threads then outlive the interpreter.
        with mock.patch.object(loss.group, "_call", wraps=loss.group._call) as collectives:
            step()
        sent, messages = loss.group.sent, collectives.call_count
        memory = timing.peak_memory(step, device)
        held = sum(p.nbytes for p in loss.parameters()) / 1e6
        times = _together(step, device, W, seconds)
        points.append({"W": W, "P": P, "bytes": sent, "messages": messages * (W - 1),
                       "step_mb": memory, "parameters_mb": held, **times})  # fmt: skip
    for size in MESSAGES if W > 1 else ():
        mine = torch.randn(size, device=place)
        parts = [torch.empty_like(mine) for _ in range(W)]
        times = _together(lambda m=mine, p=parts: dist.all_gather(p, m), device, W, seconds)
        points.append({"W": W, "P": 0, "bytes": mine.nbytes * (W - 1), "messages": W - 1,
                       **times})  # fmt: skip
    if rank == 0:
        torch.save(points, Path(folder) / "points.pt")
    dist.destroy_process_group()


def _together(step: Any, device: str, W: int, seconds: float) -> dict[str, float]:
    """Time a step that all processes run equally often."""
    for _ in range(2):
        step()
    start = time.perf_counter()
    step()
    once = torch.tensor([time.perf_counter() - start])
    if device == "cuda":
        once = once.cuda()
    dist.broadcast(once, 0)
    stages = timing.Stages(device)
    for _ in range(min(200, max(5, int(seconds / once.item())))):
        with stages("step"):
            step()
    return stages.summary()["step"]


def fit(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Fit time = a + b P/W + bytes / bandwidth + latency messages to the relative errors.

    Points without classes are collectives alone, without the constant a.
    """
    rows = np.array(
        [[p["P"] > 0, p["P"] / p["W"], p["bytes"], p["messages"]] for p in points], dtype=float
    )
    seconds = np.array([p["median_ms"] / 1e3 for p in points])
    weighted = rows / seconds[:, None]
    scale = np.maximum(np.linalg.norm(weighted, axis=0), np.finfo(float).tiny)
    a, b, c, d = nnls(weighted / scale, np.ones(len(points)))[0] / scale
    predicted = rows @ np.array([a, b, c, d])
    for point, value in zip(points, predicted, strict=True):
        point["model_ms"] = 1e3 * value
        point["model_error"] = value / (point["median_ms"] / 1e3) - 1
    worst = max(abs(p["model_error"]) for p in points if p["P"])
    return {"a_s": a, "b_s_per_class": b, "s_per_byte": c,
            "latency_s": d, "worst_error": worst}  # fmt: skip


def bytes_per_step(W: int, batch: int, dimension: int) -> float:
    """Bytes that a process sends: directions, norms, labels, log sums, and returned gradients.

    They are those listed in nivmf_fast/distributed/__init__.py, for equal counts in all processes.
    """
    width = math.ceil(batch / W)
    gathered = width * (4 * (dimension + 1) + 8) + 4 * 8  # and the handshake
    combined = 2 * width * 4 * 8  # four numbers of each image there, and four back, in float64
    scattered = width * 4 * (dimension + 1)
    return (gathered + combined + scattered) * (W - 1) + 2 * 4 * (W - 1) / W


def predict(batch: int, dimension: int, hardware: dict[str, float]) -> list[dict[str, float]]:
    """Predict time, memory and bytes of a step and its optimiser, for the table's P and W."""
    rows = []
    for P in TABLE_P:
        for W in TABLE_W:
            slice_ = math.ceil(P / W) * dimension
            held = 4 * TENSORS * COPIES * slice_
            memory = held + WORKSPACE + 2 * 4 * N * batch * dimension  # samples, their gradient
            flops = 16 * N * batch * slice_  # 4 forward, 12 backward with one recompute
            moved = held * 7 / COPIES  # Adam reads four and writes three
            sent = bytes_per_step(W, batch, dimension)
            seconds = (
                hardware["overhead"]
                + flops / hardware["flops"]
                + moved / hardware["memory-bandwidth"]
                + sent / hardware["bandwidth"]
                + COLLECTIVES * (W - 1) * hardware["latency"]
            )
            rows.append({"P": P, "W": W, "seconds": seconds, "bytes": sent,
                         "memory": memory,
                         "fits": memory <= hardware["gpu-memory"]})  # fmt: skip
    return rows


def _markdown(
    points: Sequence[dict[str, Any]],
    model: dict[str, float],
    hardware: dict[str, float],
    table: Sequence[dict[str, float]],
    args: argparse.Namespace,
) -> str:
    steps = [p for p in points if p["P"]]
    measured = grid(
        ("W", "P", "median ms", "p10", "p90", "model ms", "error", "bytes sent", "MB of a step"),
        [
            (str(p["W"]), f"{p['P']:,}", *(number(p[k]) for k in ("median_ms", "p10_ms", "p90_ms")),
             number(p["model_ms"]), f"{100 * p['model_error']:+.0f}%", f"{p['bytes']:,}",
             number(p["step_mb"]))
            for p in steps
        ],
    )  # fmt: skip
    assumed = ", ".join(
        f"--{flag} {hardware[flag]:g} {unit} ({meaning})"
        for flag, (_, unit, meaning) in HARDWARE.items()
    )
    predicted = grid(
        ("P", "W", "ms of a step", "GB of a process", "MB sent by a process"),
        [
            (f"{r['P']:,}", f"{r['W']:,}", number(1e3 * r["seconds"]),
             number(r["memory"] / 1e9) + ("" if r["fits"] else " (does not fit)"),
             number(r["bytes"] / 1e6))
            for r in table
        ],
    )  # fmt: skip
    return (
        f"Measured, B {B}, N {N}, D {D}, one thread per process, forward and backward; the model "
        f"time = a + b P/W + bytes / bandwidth + latency x messages has a = "
        f"{1e3 * model['a_s']:.3g} ms, b = {1e6 * model['b_s_per_class']:.3g} µs, 1 / bandwidth "
        f"= {1e9 * model['s_per_byte']:.3g} s/GB, latency = {1e6 * model['latency_s']:.3g} µs, and "
        f"errs by at most {100 * model['worst_error']:.0f}% on these points. Collectives alone "
        f"are fitted too.\n\n{measured}\n\n"
        f"The following table is computed from that model, not measured: {assumed}; "
        f"--global-batch {args.global_batch}, --dimension {args.dimension}, N {N}, T = 1, Adam's "
        "step included, and every collective a ring of W - 1 messages, the slowest "
        f"algorithm.\n\n{predicted}"
    )
