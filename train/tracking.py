"""Live metrics for experiment trackers: TensorBoard, Weights & Biases, Comet."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from train.config import Config, RunError

Log = Callable[[dict[str, float], int], None]


@contextlib.contextmanager
def trackers(config: Config, start: int) -> Iterator[Log]:
    """Open the configured trackers; `start` is the number of epochs already completed."""
    with contextlib.ExitStack() as stack:
        logs: list[Log] = []
        if config.tensorboard:
            logs.append(_tensorboard(stack, config.folder / "tensorboard", start))
        if config.tracker == "wandb":
            logs.append(_wandb(stack, config))
        elif config.tracker == "comet":
            logs.append(_comet(stack, config))

        def log(row: dict[str, float], epoch: int) -> None:
            for each in logs:
                each(row, epoch)

        yield log


def check(config: Config) -> None:
    """Raise a RunError, before the run begins, if a configured tracker is not installed."""
    module = {"wandb": "wandb", "comet": "comet_ml"}.get(config.tracker)
    for flag, name in (
        (f"--tracker {config.tracker}", module),
        ("--tensorboard", "tensorboard" if config.tensorboard else None),
    ):
        if name is None:
            continue
        try:
            __import__(name)
        except ImportError:
            other = "--no-tensorboard" if name == "tensorboard" else "--tracker none"
            raise RunError(
                f"{flag} needs the package {name}: pip install {name.replace('_', '-')}, "
                f"or go without: {other}"
            ) from None


def _tensorboard(stack: contextlib.ExitStack, folder: Path, start: int) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    # drops what an interrupted run wrote after its last checkpoint
    writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
    stack.callback(writer.close)

    def log(row: dict[str, float], epoch: int) -> None:
        for name, value in row.items():
            group = "seconds" if name.startswith("seconds_") else "metrics"
            writer.add_scalar(f"{group}/{name}", value, epoch)
        writer.flush()

    return log


def _wandb(stack: contextlib.ExitStack, config: Config) -> Log:
    import wandb

    run = wandb.init(
        project=config.project,
        group=config.preset,
        name=config.folder.name,
        id=f"{config.folder.resolve().parent.name}-{config.folder.name}",
        resume="allow",
        config=json.loads(config.to_json()),
    )
    stack.callback(run.finish)  # the next seed is a run of its own
    return lambda row, epoch: run.log(row, step=epoch)


def _comet(stack: contextlib.ExitStack, config: Config) -> Log:
    import comet_ml

    experiment = comet_ml.start(project_name=config.project)
    stack.callback(experiment.end)
    experiment.set_name(config.folder.name)
    experiment.log_parameters(json.loads(config.to_json()))
    return lambda row, epoch: experiment.log_metrics(row, step=epoch)
