"""Where the time of training goes: the ops of one small step, and the stages of whole runs."""

import argparse
import collections
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nivmf_fast
from benchmarks import timing
from benchmarks.cases import CASES, SHAPES, Problem, Step
from benchmarks.report import grid, number

SHOWN = 12  # ops or kernels listed
EPOCH_STEPS = 40  # of the glyph run that are timed
STAGES = ("data", "network", "sampler", "loss", "optimiser", "evaluation")
SAMPLER = {"nivmf_fast::vmf_rsample", "nivmf_fast::vmf_rsample_backward"}
IMAGE_CLASSES = (100, 11_318)  # CUB200's and Stanford Online Products'


def small_step(device: str) -> Step:
    """Forward and backward of `proxy_nca` at CUB's size, on the preferred backend."""
    return next(CASES["proxy_nca"](Problem("proxy_nca", SHAPES["cub-128"], 1.0, device)))[1]()


def kernels_of(profile: torch.profiler.profile) -> collections.Counter[str]:
    """Count the runs of each kernel on the GPU."""
    on_gpu = torch.autograd.DeviceType.CUDA
    return collections.Counter(e.name for e in profile.events() if e.device_type == on_gpu)


def own_launches(profile: torch.profiler.profile) -> int:
    """Count the launches of the loss's own kernels, those of namespace nivmf::ppk."""
    return sum(n for name, n in kernels_of(profile).items() if "ppk" in name)


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Profile the loss step at P = 100: launches and ops, with their times."""
    do = small_step(args.device)
    profile = timing.profiled(do, args.device)
    cuda = args.device == "cuda"
    rows = []
    for e in profile.key_averages():
        on_gpu = e.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == cuda:
            us = e.self_device_time_total if cuda else e.self_cpu_time_total
            rows.append({"name": e.key, "count": e.count, "self_us": us})
    rows.sort(key=lambda row: -row["self_us"])
    count = sum(row["count"] for row in rows)
    counted = timing.counts(do, args.device)
    if cuda:
        said = (
            f"{counted['launches']} launches ({own_launches(profile)} of the loss's own kernels), "
            f"{counted['host_syncs']} host synchronisations"
        )
    else:
        said = f"{count} ops and calls of autograd; launches are counted on CUDA only"
    table = grid(
        ("kernel" if cuda else "op", "times", "µs"),
        [(f"`{r['name'][:70]}`", str(r["count"]), number(r["self_us"])) for r in rows[:SHOWN]],
    )
    text = f"`proxy_nca` at B 112, N 5, P 100, D 128, forward and backward: {said}.\n\n{table}"
    return {**counted, "count": count, "rows": rows, "markdown": text}


# --- a glyph run


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="glyphs", choices=("glyphs", "glyphs-tiny"))
    parser.add_argument("--data-root", type=Path, help="of the glyphs, rendered on first use")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Time an epoch of the glyph run and its evaluation, with the run's own code, by stages."""
    # imported here: pillow, timm and scikit-learn are needed by this command alone
    from train.backbone import backbone_input
    from train.data import ClassBalancedBatches, load, train_batches
    from train.distributed import Ranks
    from train.embed import (
        calibration_images,
        channel_statistics,
        embed,
        embed_readable,
        metrics,
    )
    from train.loop import build_optimiser
    from train.losses import build_loss
    from train.model import build_model
    from train.presets import PRESETS

    config = PRESETS[args.preset]
    if args.data_root:
        config = replace(config, data=replace(config.data, data_root=args.data_root))
    ranks = Ranks(0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    sets = load(config.data, *backbone_input(config.model))
    images = sets["train"]
    sample = calibration_images(images)
    model = build_model(config.model, channel_statistics(images, sample), images.size)
    loss = build_loss(config.loss, len(images.classes), config.model.embed_dim)
    data = config.data
    batches = ClassBalancedBatches(images.labels, data.batch_size, data.samples_per_class, 0)
    optimiser, schedule = build_optimiser(config.optim, model, loss, len(batches), config.epochs)
    model.calibrate(sample, config.model.init_norm)
    features, kept = embed(model, images, config, ranks)
    loss.warmstart(features, images.labels[kept])

    stages = timing.Stages("cpu")
    limit = min(len(batches), 10 if args.quick else EPOCH_STEPS)
    waiting = train_batches(
        images, batches.epoch(0, limit=limit), slice(None), data.workers, pin_memory=False
    )
    model.train()
    for _ in range(limit):
        with stages("data"):
            batch = next(waiting)
        torch.manual_seed(batch.seed)
        with stages("network"):
            embeddings = model(batch.images)
        leaf, value = loss_step(stages, loss, embeddings, batch.labels, batch.seed)
        with stages("network, backward"):
            embeddings.backward(leaf.grad)
        with stages("optimiser"):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    if not torch.isfinite(value):
        raise SystemExit(f"the loss is {value}: this run diverged, so its times mean nothing")
    share = sampler_share(loss, leaf.detach(), batch.labels)
    evaluations = 2 if args.quick else 3
    for _ in range(evaluations):
        with stages("evaluation"):
            features, shown = embed_readable(model, sets["test"], config, ranks)
            metrics(config, features, shown)
    spans = stages.summary()
    return _split(args.preset, spans, share, len(batches), config.epochs)


def loss_step(
    stages: timing.Stages, loss: nn.Module, embeddings: Tensor, labels: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Run the loss's forward and backward apart from the network's; return a leaf with gradient."""
    with stages("loss"):
        leaf = embeddings.detach().float().requires_grad_()
        value = loss(leaf, labels, seed=seed)
        value.backward()
    return leaf, value.detach()


def sampler_share(loss: nn.Module, embeddings: Tensor, labels: Tensor, times: int = 20) -> float:
    """Share of the sampler, forward and backward, in the loss's time on the CPU."""

    def once() -> None:
        with torch.profiler.record_function("whole loss"):
            loss(embeddings.clone().requires_grad_(), labels, seed=0).backward()

    spent = {
        e.key: e.cpu_time_total for e in timing.profiled(once, "cpu", times).key_averages()
    }  # in µs
    return sum(spent.get(name, 0.0) for name in SAMPLER) / spent["whole loss"]


def _split(
    preset: str, spans: dict[str, dict[str, float]], sampler: float, steps: int, epochs: int
) -> dict[str, Any]:
    backward = spans.pop("network, backward")
    per_step = {name: spans[name] for name in ("data", "network", "loss", "optimiser")}
    times = (*("median_ms", "p10_ms", "p90_ms"),)
    ms = {name: {key: span[key] for key in times} for name, span in per_step.items()}
    ms["network"] = {key: ms["network"][key] + backward[key] for key in times}
    ms["sampler"] = {key: ms["loss"][key] * sampler for key in times}
    ms["loss"] = {key: ms["loss"][key] * (1 - sampler) for key in times}
    ms["evaluation"] = {key: spans["evaluation"][key] for key in times}
    run = {
        name: epochs * (1 if name == "evaluation" else steps) * ms[name]["median_ms"] / 1e3
        for name in STAGES
    }
    whole = sum(run.values())
    rows = [
        (name, *(number(ms[name][key]) for key in times), number(run[name]),
         f"{100 * run[name] / whole:.1f}%")
        for name in STAGES
    ]  # fmt: skip
    text = (
        f"`{preset}`, {epochs} epochs of {steps} steps, each with an evaluation; rendering, "
        "loading and the report are left out. ms of a step (of an evaluation), and seconds and "
        "share of the run. Network and loss are forward and backward; the sampler is its share "
        "of the loss in torch.profiler.\n\n"
        + grid(("stage", "median ms", "p10", "p90", "s of the run", "share"), rows)
    )
    stages = {name: {**ms[name], "run_s": run[name], "share": run[name] / whole} for name in STAGES}
    return {"preset": preset, "steps": steps, "epochs": epochs, "stages": stages, "markdown": text}


# --- ResNet-50


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="resnet50", help="of timm")
    parser.add_argument("--batch-size", type=int, default=112)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20)


def resnet(args: argparse.Namespace) -> dict[str, Any]:
    """Time training steps on random images: the share of sampler and loss, D 512, N 5, T 1."""
    import timm

    rows = []
    for amp in (False, True) if args.device == "cuda" else (False,):
        for P in IMAGE_CLASSES:
            torch.manual_seed(0)
            model = timm.create_model(args.backbone, num_classes=512).to(args.device)
            model = model.to(memory_format=torch.channels_last).train()
            loss = nivmf_fast.ELNivMFLoss(P, 512, n_samples=5, temperature=1.0).to(args.device)
            parameters = [{"params": model.parameters()}, *loss.param_groups(lr=1e-4)]
            optimiser = torch.optim.Adam(parameters, lr=1e-4)
            images = torch.randn(args.batch_size, 3, args.pixels, args.pixels, device=args.device)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = torch.randint(P, (args.batch_size,), device=args.device)
            for warm in (False, True):
                stages = timing.Stages(args.device)
                for seed in range(args.steps if warm else 3):
                    with stages("step"):
                        with torch.autocast(args.device, torch.bfloat16, enabled=amp):
                            embeddings = model(images)
                        leaf, _ = loss_step(stages, loss, embeddings, labels, seed)
                        embeddings.backward(leaf.grad.to(embeddings.dtype))
                        optimiser.step()
                        optimiser.zero_grad()
            spans = stages.summary()
            share = spans["loss"]["median_ms"] / spans["step"]["median_ms"]
            row = {"P": P, "amp": "bfloat16" if amp else "none", "share": share}
            rows.append(row | {name: spans[name] for name in ("step", "loss")})
    table = grid(
        ("P", "amp", "step, ms", "sampler and loss, ms", "share"),
        [
            (f"{r['P']:,}", r["amp"], *(number(r[n]["median_ms"]) for n in ("step", "loss")),
             f"{100 * r['share']:.2f}%")
            for r in rows
        ],
    )  # fmt: skip
    text = (
        f"{args.backbone}, {args.batch_size} random images of {args.pixels} pixels, Adam; medians "
        f"of {args.steps} steps. The loss is forward and backward, without Adam's update of "
        f"its proxies.\n\n{table}"
    )
    return {"rows": rows, "markdown": text}
