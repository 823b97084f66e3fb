"""A run from top to bottom: data, network, loss, optimiser, epochs, evaluation, files."""

import io
import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nivmf_fast import which_backend
from train import evaluate, report
from train.config import Config, LossConfig, OptimConfig, RunError
from train.data import ClassBalancedBatches, ImageSet, load
from train.model import CHANNELS, LOSS_OPS, EmbeddingNet, build_loss
from train.run_folder import BEST, LAST, RunFolder

STORAGE_METRIC = "c_recall@1"  # whose improvement makes a checkpoint the best one


@dataclass
class State:
    """All that a checkpoint holds: a run that loads it ends as if it had never stopped."""

    model: EmbeddingNet
    loss: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: LambdaLR
    random: torch.Generator  # draws the batches and the loss's seeds
    epoch: int = 0  # that is done
    history: list[dict[str, float]] = field(
        default_factory=list
    )  # a row of metrics.csv for each epoch

    def parts(self) -> list[tuple[str, Any]]:
        names = ("model", "loss", "optimiser", "schedule")
        return [(name, getattr(self, name)) for name in names]

    def to_dict(self) -> dict[str, Any]:
        content = {name: part.state_dict() for name, part in self.parts()}
        content |= {"random": self.random.get_state(), "torch_random": torch.get_rng_state()}
        if torch.cuda.is_available():
            content["cuda_random"] = torch.cuda.get_rng_state_all()
        return content | {"epoch": self.epoch, "history": self.history}

    def load_dict(self, content: dict[str, Any]) -> None:
        for name, part in self.parts():
            part.load_state_dict(content[name])
        self.random.set_state(content["random"].cpu())
        torch.set_rng_state(content["torch_random"].cpu())
        if torch.cuda.is_available() and "cuda_random" in content:
            torch.cuda.set_rng_state_all([state.cpu() for state in content["cuda_random"]])
        self.epoch, self.history = content["epoch"], content["history"]


def train(config: Config) -> None:
    """Train and evaluate as configured, and leave everything in the run folder."""
    device = choose_device(config.device)
    folder = RunFolder.open(config)
    checkpoint = folder.load(LAST, device) if config.resume else None
    if (
        checkpoint
        and checkpoint["epoch"] == config.epochs
        and (folder.path / report.REPORT).exists()
    ):
        print(f"finished already: {folder.path / report.REPORT} (nothing was changed)")
        return
    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True

    train_set, test_set = load(config.data, CHANNELS[config.model.backbone])
    pixels = train_set.images.float() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)).clamp(min=1e-3)
    model = EmbeddingNet(config.model, mean, std).to(device)
    loss = build_loss(config.loss, len(train_set.classes), config.model.embed_dim).to(device)
    random = torch.Generator().manual_seed(config.seed)
    batches = ClassBalancedBatches(
        train_set.labels, config.data.batch_size, config.data.samples_per_class, random
    )
    steps = min(len(batches), config.limit_batches or len(batches))
    optimiser, schedule = build_optimiser(config.optim, model, loss, steps * config.epochs)
    state = State(model, loss, optimiser, schedule, random)
    raw_recall = evaluate.retrieve(test_set.images.flatten(1), test_set.labels, "e").recall(1)
    describe(config, device, model, train_set, test_set, raw_recall)

    folder.create(config)

    if checkpoint:
        try:
            state.load_dict(checkpoint)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{folder.path / LAST} does not fit this run ({reason})") from None
        folder.write_metrics(state.history)  # the last run may have ended before it could
        print(f"resuming after epoch {state.epoch} of {config.epochs}")
    else:
        if config.resume:
            print(f"no checkpoint in {folder.path}: starting afresh")
        some = train_set.images[:: max(1, len(train_set) // 1000)].to(device)  # of every class
        model.calibrate(some, config.model.init_norm)
        if config.loss.warmstart:
            loss.warmstart(embed(model, train_set, device), train_set.labels.to(device))

    total = steps * config.epochs
    with tqdm(total=total, initial=state.epoch * steps, unit="batch", disable=None) as bar:
        while state.epoch < config.epochs:
            row = train_epoch(state, train_set, batches, steps, device, bar)
            if not math.isfinite(row["loss"]):
                raise RunError(
                    f"the loss is {row['loss']} in epoch {row['epoch']}: try a smaller --lr"
                )
            start = time.perf_counter()
            features = embed(model, test_set, device)
            embedded = time.perf_counter()
            row |= evaluate.evaluate(
                features, test_set.labels.to(device), test_set.degradation, config.seed
            )
            row |= {
                "seconds_embed": embedded - start,
                "seconds_evaluate": time.perf_counter() - embedded,
            }
            best = max((r[STORAGE_METRIC] for r in state.history), default=-1.0)
            state.history.append(row)
            state.epoch += 1
            if row[STORAGE_METRIC] > best:
                folder.save(
                    BEST, state.to_dict()
                )  # before the last: a kill in between repeats the epoch
            folder.save(LAST, state.to_dict())
            folder.write_metrics(state.history)
            seconds = sum(value for name, value in row.items() if name.startswith("seconds_"))
            tqdm.write(
                f"epoch {state.epoch}/{config.epochs}  loss {row['loss']:.4f}  "
                f"recall@1 {row['c_recall@1']:.4f} (cosine) {row['e_recall@1']:.4f} (Euclidean)  "
                f"MAP@R {row['c_MAP@R']:.4f}  {seconds:.1f} s"
            )

    features = embed(model, test_set, device).cpu()
    content = io.BytesIO()
    np.savez(
        content,
        features=features.numpy(),
        labels=test_set.labels.numpy(),
        paths=np.array(test_set.paths),
    )
    folder.write("embeddings_test.npz", content.getvalue())
    report.write(folder, config, state.history, features, test_set, raw_recall)
    print(f"report: {folder.path / report.REPORT}")


def train_epoch(
    state: State,
    train_set: ImageSet,
    batches: ClassBalancedBatches,
    steps: int,
    device: torch.device,
    bar: "tqdm[None]",
) -> dict[str, float]:
    """One epoch's steps; the mean loss and the seconds they took."""
    start = time.perf_counter()
    recall = f"{state.history[-1][STORAGE_METRIC]:.3f}" if state.history else "-"
    state.model.train()
    losses = torch.zeros((), dtype=torch.float64, device=device)
    for step, batch in zip(range(steps), batches, strict=False):
        seed = int(torch.randint(2**62, (), generator=state.random))
        embeddings = state.model(train_set.images[batch].to(device))
        try:
            value = state.loss(embeddings, train_set.labels[batch].to(device), seed=seed)
        except ValueError as error:  # the loss takes no embeddings that are not finite
            raise RunError(
                f"epoch {state.epoch + 1} diverged ({error}): try a smaller --lr"
            ) from None
        state.optimiser.zero_grad()
        value.backward()
        state.optimiser.step()
        state.schedule.step()
        losses += value.detach()
        bar.update()
        if step % 10 == 9 and not bar.disable:
            bar.set_postfix(
                epoch=state.epoch + 1, loss=f"{losses.item() / (step + 1):.3f}", recall=recall
            )
    temperature = float(state.loss.temperature.detach())
    return {
        "epoch": state.epoch + 1,
        "loss": losses.item() / steps,
        "temperature": temperature,
        "seconds_train": time.perf_counter() - start,
    }


@torch.no_grad()
def embed(
    model: EmbeddingNet, images: ImageSet, device: torch.device, batch_size: int = 500
) -> Tensor:
    """The embeddings [n, D] of a whole set, in eval mode."""
    model.eval()
    return torch.cat([model(batch.to(device)) for batch in images.images.split(batch_size)])


def build_optimiser(
    config: OptimConfig, model: nn.Module, loss: nn.Module, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Adam over the network and the loss's own groups, and the schedule of their learning rates."""
    network = {"params": model.parameters(), "lr": config.lr, "weight_decay": config.weight_decay}
    proxies = loss.param_groups(
        config.lr,
        proxy_lr_mult=config.proxy_lr_mult,
        concentration_lr_mult=config.conc_lr_mult,
        temperature_lr_mult=config.temp_lr_mult,
    )
    optimiser = torch.optim.Adam([network, *proxies])

    def share(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / total_steps))

    return optimiser, LambdaLR(
        optimiser, share if config.schedule == "cosine" else lambda step: 1.0
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise RunError(f"--device {name} cannot be used here: {reason}") from None
    return device


def describe(
    config: Config,
    device: torch.device,
    model: EmbeddingNet,
    train_set: ImageSet,
    test_set: ImageSet,
    raw_recall: float,
) -> None:
    """Say what is about to run."""
    size = sum(p.numel() for p in model.parameters())
    backends = loss_backends(config.loss, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"device   {device}{threads}")
    print(f"loss     {config.loss.name}, backend {backends}")
    print(
        f"train    {len(train_set)} images of {len(train_set.classes)} classes, {config.data.name}"
    )
    print(
        f"test     {len(test_set)} images of {len(test_set.classes)} other classes; "
        f"raw pixels have recall@1 {raw_recall:.4f}"
    )
    print(f"model    {config.model.backbone} to {config.model.embed_dim}, {size:,} parameters")
    print(f"run      {config.folder}", flush=True)


def loss_backends(config: LossConfig, device: torch.device) -> str:
    """What computes each op of the loss, where it has any of its own."""
    backend, ops = "auto", LOSS_OPS[config.name]
    if "proxy_nca" in ops:
        backend = config.backend
    try:
        chosen = [f"{which_backend(op, device, backend=backend)} ({op})" for op in ops]
    except (ValueError, RuntimeError) as error:
        raise RunError(f"--backend {config.backend}: {error}") from None
    return ", ".join(chosen) or "torch"
