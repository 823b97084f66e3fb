"""The state of a run, and how a checkpoint saves and loads it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from train.config import Config
from train.distributed import Ranks
from train.model import EmbeddingNet
from train.run_folder import RunFolder


@dataclass
class State:
    """Everything that a checkpoint holds: a run that loads it ends as if it had never stopped."""

    model: EmbeddingNet
    loss: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    epoch: int = 0  # completed
    step: int = 0  # completed, of the next epoch
    losses: float = 0.0  # sum over these steps
    seconds: float = 0.0  # spent on these steps
    history: list[dict[str, float]] = field(default_factory=list)  # rows of metrics.csv

    def parts(self) -> list[tuple[str, Any]]:
        names = ("model", "loss", "optimiser", "schedule", "scaler")
        return [(name, getattr(self, name)) for name in names]

    def position(self) -> dict[str, Any]:
        names = ("epoch", "step", "losses", "seconds", "history")
        return {name: getattr(self, name) for name in names}

    def end_epoch(self, row: dict[str, float], metric: str) -> bool:
        """Add an epoch's row of metrics.csv; return whether it is the best so far by `metric`."""
        best = max((r[metric] for r in self.history if metric in r), default=-math.inf)
        self.history.append(row)
        self.epoch, self.step, self.losses, self.seconds = self.epoch + 1, 0, 0.0, 0.0
        return row.get(metric, -math.inf) > best

    def save(self, config: Config, ranks: Ranks, folder: RunFolder, best: bool = False) -> None:
        """Write the last checkpoint and, with `best`, the best."""
        content = {name: part.state_dict() for name, part in self.parts()}
        content |= {"torch_random": torch.get_rng_state(), "config": config.to_json()}
        if torch.cuda.is_available():
            content["cuda_random"] = torch.cuda.get_rng_state_all()
        content |= self.position()
        if config.class_parallel:  # every process writes its classes; this names their folder
            name = f"classes-{self.epoch}-{self.step}"
            slices = self.loss.sharded_state_dict(self.optimiser)
            dcp.save(slices, checkpoint_id=folder.path / name, no_dist=ranks.size == 1)
            content |= {"classes": name, "loss": {}}
            content["optimiser"]["state"] = self.without_classes(content["optimiser"]["state"])
        if ranks.is_main:
            folder.save(content, best)
            if config.class_parallel:
                folder.drop_classes()

    def without_classes(self, state: dict[int, Any]) -> dict[int, Any]:
        """Drop an optimiser's state of the loss's parameters, which is saved slice by slice."""
        own = {id(parameter) for parameter in self.loss.parameters()}
        every = [p for group in self.optimiser.param_groups for p in group["params"]]
        return {i: value for i, value in state.items() if id(every[i]) not in own}

    def load(self, content: dict[str, Any], ranks: Ranks, folder: Path) -> None:
        for name, part in self.parts():
            if name != "loss" or "classes" not in content:
                part.load_state_dict(content[name])
        if "classes" in content:
            slices = self.loss.sharded_state_dict(self.optimiser)
            dcp.load(slices, checkpoint_id=folder / content["classes"], no_dist=ranks.size == 1)
        torch.set_rng_state(content["torch_random"].cpu())
        if torch.cuda.is_available() and "cuda_random" in content:
            torch.cuda.set_rng_state_all([state.cpu() for state in content["cuda_random"]])
        for name in self.position():
            setattr(self, name, content[name])
