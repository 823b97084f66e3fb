"""The commands of `python -m train` other than training: evaluate, compare and sweep."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.backbone import backbone_input
from train.compare import compare
from train.config import Config, EvaluateConfig, RunError
from train.data import load
from train.distributed import processes
from train.embed import embed_readable, metrics
from train.model import build_model
from train.run_folder import RunFolder, read_checkpoint
from train.sweep import sweep


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate a checkpoint again, and export the embeddings."""
    with processes(config.device) as ranks:
        checkpoint = read_checkpoint(config.checkpoint, ranks.device)
        try:
            stored = Config.from_json(checkpoint["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{config.checkpoint} is not a checkpoint of this version: {error!r}"
            ) from None
        changed = {
            "data_root": config.data_root,
            "name": config.dataset,
            "workers": config.workers,
        }
        changed = {name: value for name, value in changed.items() if value is not None}
        run = dataclasses.replace(
            stored,
            data=dataclasses.replace(stored.data, **changed),
            clustering=config.clustering,
        )
        with ranks.main_first():
            sets = load(run.data, *backbone_input(run.model))
        if config.split not in sets:
            raise RunError(
                f"--split is {config.split!r}, but the run has no validation split: "
                f"choose one of {', '.join(sets)}"
            )
        state = checkpoint["model"]
        model_config = dataclasses.replace(run.model, pretrained="none")
        model = build_model(model_config, image_size=sets["train"].size).to(ranks.device)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RunError(
                f"{config.checkpoint} does not fit its configuration: {reason}"
            ) from None
        features, images = embed_readable(model, sets[config.split], run, ranks)
        if not ranks.is_main:
            return
        row = {"epoch": checkpoint["epoch"], **metrics(run, features, images)}
        width = max(map(len, row))
        print(f"{config.checkpoint}, epoch {row['epoch']}, {len(images)} images ({config.split})")
        for name, value in row.items():
            print(f"  {name:{width}}  {value:.6g}")
        if config.json:
            text = json.dumps(row, indent=2) + "\n"
            write(config.json, text.encode())
        if config.export:
            features = features.cpu()
            concentration = features.norm(dim=1)
            content = io.BytesIO()
            np.savez(
                content,
                features=features.numpy(),
                loc=(features / concentration[:, None].clamp(min=1e-12)).numpy(),
                concentration=concentration.numpy(),
                labels=images.labels.numpy(),
                classes=np.array(images.classes),
                paths=np.array(images.paths),
            )
            write(config.export, content.getvalue())


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(path.parent).write(path.name, content)
    print(f"wrote {path}")


RUN: dict[str, Callable[[Any], None]] = {"evaluate": evaluate, "compare": compare, "sweep": sweep}
