"""A training run from start to end: data, network, loss, optimiser, epochs, evaluation, files."""

import contextlib
import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from train import compare, evaluate, report, tracking
from train.backbone import backbone_input
from train.config import Config, Diverged, OptimConfig, RunError
from train.data import ClassBalancedBatches, ImageSet, load, train_batches
from train.distributed import Ranks, processes
from train.embed import (
    autocast,
    calibration_images,
    channel_statistics,
    embed,
    embed_readable,
    metrics,
)
from train.losses import build_loss, check_loss, loss_backends
from train.model import EmbeddingNet, build_model
from train.run_folder import LAST, RunFolder
from train.state import State

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}


def train(config: Config) -> None:
    """Train and evaluate as configured, for one seed or several; everything goes to the folder."""
    with processes(config.device) as ranks:
        config = ranks.broadcast(config)  # whose folder the main process has numbered
        if not config.seeds:
            run(config, ranks)
            return
        check_loss(config.loss, config.class_parallel)  # before there is a folder
        group = RunFolder.open(config) if ranks.is_main else RunFolder(config.folder)
        if ranks.is_main:
            group.create(config)
        folders = [config.folder / f"seed-{seed}" for seed in config.seeds]
        for seed, folder in zip(config.seeds, folders, strict=True):
            resume = config.resume and folder.exists()
            run(replace(config, seed=seed, seeds=(), out=folder, resume=resume), ranks)
        if ranks.is_main:
            table = compare.Group.read(config.folder, "last")
            group.write("seeds.csv", compare.seeds_csv(table).encode())
            group.write("seeds.md", compare.markdown([table]).encode())
            print(compare.markdown([table]))


def run(config: Config, ranks: Ranks) -> None:
    """Train and evaluate once, or resume where a run stopped."""
    device = ranks.device
    folder = RunFolder.open(config) if ranks.is_main else RunFolder(config.folder)
    checkpoint = folder.load(device) if config.resume else None
    finished = checkpoint and checkpoint["epoch"] == config.epochs
    if finished and (folder.path / report.REPORT).exists():
        if ranks.is_main:
            print(f"finished already: {folder.path / report.REPORT} (nothing was changed)")
        return
    check(config, ranks)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True

    channels, crop = backbone_input(config.model)
    with ranks.main_first():  # glyphs are rendered and weights downloaded once
        sets = load(config.data, channels, crop)
        train_set, test_set = sets["train"], sets.get("validation", sets["test"])
        sample = calibration_images(train_set)
        model_config = replace(config.model, pretrained="none") if checkpoint else config.model
        statistics = channel_statistics(train_set, sample)
        model = build_model(model_config, statistics, train_set.size).to(device)
    data, classes, dim = config.data, len(train_set.classes), config.model.embed_dim
    loss = build_loss(config.loss, classes, dim, config.class_parallel).to(device)
    batches = ClassBalancedBatches(
        train_set.labels, data.batch_size, data.samples_per_class, config.seed
    )
    steps = min(len(batches), config.limit_batches or len(batches))
    optimiser, schedule = build_optimiser(config.optim, model, loss, steps, config.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=config.optim.amp == "float16")
    state = State(model, loss, optimiser, schedule, scaler)
    pixels, raw_recall = test_set.images, None
    if pixels is not None:
        raw_recall = evaluate.retrieve(pixels.flatten(1), test_set.labels, "e").recall(1)
    if ranks.is_main:
        describe(config, ranks, model, train_set, test_set, raw_recall)
        folder.create(config)

    if checkpoint:
        resume(config, state, checkpoint, ranks, folder)
    else:
        if config.resume and ranks.is_main:
            print(f"no checkpoint in {folder.path}: starting afresh")
        initialise(config, state, train_set, sample, ranks)

    network = wrap(config, model, ranks)
    embedded: tuple[Tensor, ImageSet] | None = None
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tracking.trackers(config, state.epoch)) if ranks.is_main else None
        bar = tqdm(
            total=steps * config.epochs,
            initial=state.epoch * steps + state.step,
            unit="batch",
            disable=None if ranks.is_main else True,
        )
        stack.enter_context(bar)
        while state.epoch < config.epochs:
            row = train_epoch(config, state, network, train_set, batches, steps, ranks, folder, bar)
            if (state.epoch + 1) % config.evaluate_every == 0 or state.epoch + 1 == config.epochs:
                embedded, columns = evaluate_epoch(config, model, test_set, ranks)
                row |= columns
            best = state.end_epoch(row, config.storage_metric)
            state.save(config, ranks, folder, best)
            if log:
                folder.write_metrics(state.history)
                log(row, state.epoch)
                tqdm.write(summary(config, row))

    if embedded is None:  # all epochs were done when the run was resumed
        embedded = embed_readable(model, test_set, config, ranks)
    if ranks.is_main:
        finish(config, state, folder, *embedded, raw_recall)


def check(config: Config, ranks: Ranks) -> None:
    """Raise a RunError, before any data is read, for settings that would fail later."""
    if ranks.is_main:
        tracking.check(config)
    check_loss(config.loss, config.class_parallel)
    if config.data.batch_size % ranks.size:
        raise RunError(
            f"--batch-size is {config.data.batch_size}, but must be a multiple of the number of "
            f"processes, which is {ranks.size}"
        )


def resume(
    config: Config, state: State, checkpoint: dict[str, Any], ranks: Ranks, folder: RunFolder
) -> None:
    """Load a checkpoint, and print where the run resumes."""
    try:
        state.load(checkpoint, ranks, folder.path)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{folder.path / LAST} does not fit this run ({reason})") from None
    if ranks.is_main:
        if state.history:
            folder.write_metrics(state.history)  # the last run may have ended before it could
        print(f"resuming after epoch {state.epoch} of {config.epochs}, batch {state.step}")


def initialise(
    config: Config, state: State, train_set: ImageSet, sample: Tensor, ranks: Ranks
) -> None:
    """Prepare the first step: BatchNorm statistics, the mean norm, the proxies."""
    state.model.calibrate(sample.to(ranks.device), config.model.init_norm)
    if config.loss.warmstart and hasattr(state.loss, "warmstart"):
        features, kept = embed(state.model, train_set, config, ranks)
        labels = train_set.labels[kept].to(ranks.device)
        if config.class_parallel:  # each process passes its own images
            part = ranks.share(len(kept))
            features, labels = features[part.start : part.stop], labels[part.start : part.stop]
        state.loss.warmstart(features, labels)


def train_epoch(
    config: Config,
    state: State,
    network: nn.Module,
    train_set: ImageSet,
    batches: ClassBalancedBatches,
    steps: int,
    ranks: Ranks,
    folder: RunFolder,
    bar: "tqdm[None]",
) -> dict[str, float]:
    """Run the remaining steps of an epoch; return its mean loss, temperature and seconds."""
    start, before = time.perf_counter(), state.seconds
    device, model, loss, spread = ranks.device, state.model, state.loss, config.class_parallel
    size = config.data.batch_size // ranks.size
    part = slice(ranks.rank * size, (ranks.rank + 1) * size)
    recall = (
        f"{state.history[-1].get(config.storage_metric, math.nan):.3f}" if state.history else "-"
    )
    network.train()
    losses = torch.tensor(state.losses, dtype=torch.float64, device=device)
    left = batches.epoch(state.epoch, skip=state.step, limit=steps)
    cuda = device.type == "cuda"
    for batch in train_batches(train_set, left, part, config.data.workers, pin_memory=cuda):
        train_set.warn_unreadable(batch.bad)
        # the network's random numbers depend on the step alone, not on what came before
        torch.manual_seed(batch.seed + ranks.rank)
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        with autocast(config.optim, device):
            embeddings = network(images)
        try:
            value = global_loss(loss, embeddings.float(), labels, batch.seed, ranks, spread)
        except ValueError as error:  # the loss refuses embeddings that are not finite
            raise Diverged(
                f"epoch {state.epoch + 1} diverged ({error}): try a smaller --lr"
            ) from None
        state.optimiser.zero_grad()
        state.scaler.scale(value).backward()
        if not spread:
            ranks.mean(p.grad for p in loss.parameters())
        if state.epoch < config.optim.warmup:
            for parameter in model.backbone_parameters():
                parameter.grad = None
        if config.optim.clip_grad is not None:
            state.scaler.unscale_(state.optimiser)
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        state.schedule.step()
        losses += value.detach()
        state.step += 1
        bar.update()
        every = config.checkpoint_batches
        if every and state.step % every == 0 and state.step < steps:
            ranks.mean([losses])
            state.losses, state.seconds = losses.item(), before + time.perf_counter() - start
            state.save(config, ranks, folder)
        if state.step % 10 == 0 and not bar.disable:
            mean = f"{losses.item() / state.step:.3f}"
            bar.set_postfix(epoch=state.epoch + 1, loss=mean, recall=recall)
    ranks.mean([losses])
    row = {"epoch": state.epoch + 1, "loss": losses.item() / steps}
    if not math.isfinite(row["loss"]):
        raise Diverged(f"the loss is {row['loss']} in epoch {row['epoch']}: try a smaller --lr")
    if hasattr(loss, "temperature"):
        row["temperature"] = float(loss.temperature.detach())
    return row | {"seconds_train": before + time.perf_counter() - start}


def global_loss(
    loss: nn.Module,
    embeddings: Tensor,
    labels: Tensor,
    seed: int,
    ranks: Ranks,
    class_parallel: bool = False,
) -> Tensor:
    """Return a loss whose mean over the processes is the loss of the whole batch.

    Each process has a slice of the batch, which suffices for a mean of one term per image. Any
    other loss sees the whole batch in every process; class-parallel ones gather it themselves.
    """
    if class_parallel:
        return loss(ranks.scaled(embeddings), labels, seed=seed)
    if getattr(loss, "decomposes", False):
        return loss(embeddings, labels, seed=seed, image_offset=ranks.rank * len(embeddings))
    return loss(ranks.gather_batch(embeddings), ranks.gather(labels), seed=seed)


def wrap(config: Config, model: EmbeddingNet, ranks: Ranks) -> nn.Module:
    """Wrap the network for training: in parallel over processes, compiled."""
    network: nn.Module = model
    if ranks.size > 1 and model.batchnorms() and not config.model.freeze_batchnorm:
        if ranks.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        elif ranks.is_main:
            print(
                "warning: on the CPU every process has BatchNorm statistics of its own; "
                "--freeze-batchnorm makes the result independent of the number of processes"
            )
    if ranks.size > 1:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids)
    return torch.compile(network) if config.optim.compile else network


def evaluate_epoch(
    config: Config, model: EmbeddingNet, test_set: ImageSet, ranks: Ranks
) -> tuple[tuple[Tensor, ImageSet], dict[str, float]]:
    """Embed and evaluate a set: embeddings, their images, and columns of metrics.csv."""
    start = time.perf_counter()
    features, images = embed_readable(model, test_set, config, ranks)
    middle = time.perf_counter()
    row: dict[str, float] = ranks.broadcast(
        metrics(config, features, images) if ranks.is_main else None
    )
    if config.storage_metric not in row:
        raise RunError(
            f"--storage-metric is {config.storage_metric!r}, but must be one of {', '.join(row)}"
        )
    row["seconds_embed"] = middle - start
    row["seconds_evaluate"] = time.perf_counter() - middle
    return (features, images), row


def finish(
    config: Config,
    state: State,
    folder: RunFolder,
    features: Tensor,
    images: ImageSet,
    raw_recall: float | None,
) -> None:
    """Write the last embeddings and the report."""
    features = features.cpu()
    content = io.BytesIO()
    labels, paths = images.labels.numpy(), np.array(images.paths)
    np.savez(content, features=features.numpy(), labels=labels, paths=paths)
    folder.write("embeddings_test.npz", content.getvalue())
    report.write(folder, config, state.history, features, images, raw_recall)
    print(f"report: {folder.path / report.REPORT}")


def build_optimiser(
    config: OptimConfig, model: EmbeddingNet, loss: nn.Module, steps: int, epochs: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Build the optimiser over network and loss, and the schedule of its learning rates."""
    decay = {"weight_decay": config.weight_decay}
    head_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    groups = [
        {"params": model.backbone_parameters(), "lr": config.lr, **decay},
        {"params": model.head_parameters(), "lr": head_lr, **decay},
    ]
    if hasattr(loss, "param_groups"):
        groups += loss.param_groups(
            config.lr,
            proxy_lr_mult=config.proxy_lr_mult,
            concentration_lr_mult=config.conc_lr_mult,
            temperature_lr_mult=config.temp_lr_mult,
        )
    elif own := list(loss.parameters()):
        groups.append({"params": own, "lr": config.lr * config.proxy_lr_mult, "weight_decay": 0.0})
    optimiser = OPTIMISERS[config.optimizer]([group for group in groups if group["params"]])

    def factor(step: int) -> float:
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / (steps * epochs)))
        if config.schedule == "step":
            return config.gamma ** sum(step // steps >= epoch for epoch in config.milestones)
        return 1.0

    return optimiser, LambdaLR(optimiser, factor)


def describe(
    config: Config,
    ranks: Ranks,
    model: EmbeddingNet,
    train_set: ImageSet,
    test_set: ImageSet,
    raw_recall: float | None,
) -> None:
    """Print what is about to run."""
    device = ranks.device
    size = sum(p.numel() for p in model.parameters())
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    several = f", {ranks.size} processes" if ranks.size > 1 else ""
    several += ", classes spread over them" if config.class_parallel else ""
    split = "test" if config.data.validation == "none" else "validate"
    raw = "" if raw_recall is None else f"; raw pixels have recall@1 {raw_recall:.4f}"
    which = "the same" if config.data.validation == "samples" else "other"
    print(f"device   {device}{threads}{several}")
    print(f"loss     {config.loss.name}, backend {loss_backends(config.loss, device)}")
    print(
        f"train    {len(train_set)} images of {len(train_set.classes)} classes, {config.data.name}"
    )
    print(f"{split:8} {len(test_set)} images of {len(test_set.classes)} {which} classes{raw}")
    print(f"model    {config.model.backbone} to {config.model.embed_dim}, {size:,} parameters")
    print(f"run      {config.folder}", flush=True)


def summary(config: Config, row: dict[str, float]) -> str:
    """An epoch in one line."""
    seconds = sum(value for name, value in row.items() if name.startswith("seconds_"))
    shown = [f"epoch {int(row['epoch'])}/{config.epochs}", f"loss {row['loss']:.4f}"]
    if "c_recall@1" in row:
        shown.append(
            f"recall@1 {row['c_recall@1']:.4f} (cosine) {row['e_recall@1']:.4f} (Euclidean)"
        )
        shown.append(f"MAP@R {row['c_MAP@R']:.4f}")
    return "  ".join([*shown, f"{seconds:.1f} s"])
