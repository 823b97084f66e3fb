"""The folder of one run, whose files are replaced atomically."""

import contextlib
import csv
import dataclasses
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from train.config import Config, RunError

LAST, PREVIOUS, BEST = "checkpoint_last.pt", "checkpoint_previous.pt", "checkpoint_best.pt"


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, config: Config) -> "RunFolder":
        """Open the run's folder; without --resume it must be empty or absent."""
        path = config.folder
        if path.exists() and not path.is_dir():
            raise RunError(f"--out {path} is a file, not a folder")
        if not config.resume and path.is_dir() and any(path.iterdir()):
            raise RunError(
                f"{path} is not empty: continue that run with --resume, or give another --out"
            )
        for file in path.glob(".*.*.beside"):  # left by a process killed while writing
            file.unlink()
        return cls(path)

    def create(self, config: Config) -> None:
        """Create the folder and config.json; called late, so that bad data leave no folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            stored = dataclasses.replace(config, resume=False)
            self.write("config.json", stored.to_json().encode())

    def write(self, name: str, content: bytes, keep: str | None = None) -> None:
        """Write a file atomically: write a temporary one next to it, then rename that.

        With `keep`, the old file stays under that name.
        """
        target = self.path / name
        beside = target.with_name(f".{name}.{os.getpid()}.beside")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep and target.exists():
                target.replace(self.path / keep)
            beside.replace(target)
        except OSError as error:
            error.filename = str(target)  # a full disk does not say which file
            raise
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Write the last checkpoint and, with `best`, the best; keep the previous one too."""
        buffer = io.BytesIO()  # torch.save to a full disk would raise an error that does not say so
        torch.save(state, buffer)
        if best:  # before the last: a kill in between repeats the epoch
            self.write(BEST, buffer.getvalue())
        self.write(LAST, buffer.getvalue(), keep=PREVIOUS)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Load the newest readable checkpoint; None if there is none."""
        error = None
        for name in (LAST, PREVIOUS):
            if (self.path / name).exists():
                try:
                    state = read_checkpoint(self.path / name, device)
                except RunError as unreadable:
                    error = error or unreadable
                    continue
                if error:
                    print(f"{error}: continuing from {name}")
                return state
        if error:
            raise error
        return None

    def drop_classes(self) -> None:
        """Delete the class folders that no checkpoint refers to."""
        files = [self.path / name for name in (LAST, PREVIOUS, BEST)]
        needed = {
            torch.load(file, map_location="cpu", mmap=True, weights_only=True).get("classes")
            for file in files
            if file.exists()
        }
        for folder in self.path.glob("classes-*"):
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """Write metrics.csv, one row per epoch; seconds, which differ in equal runs, come last."""
        names = {name: None for row in history for name in row}  # not all epochs are evaluated
        ordered = sorted(names, key=lambda name: name.startswith("seconds_"))
        text = io.StringIO()
        writer = csv.DictWriter(text, ordered, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.2f}" if k.startswith("seconds_") else repr(v) for k, v in row.items()}
            for row in history
        )
        self.write("metrics.csv", text.getvalue().encode())


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint file."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it holds no dictionary")
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # damaged bytes make the unpickler fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{path} is not a readable checkpoint ({reason})") from None
    return state


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.csv; a row lacks the columns that its epoch did not evaluate."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        values = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in rows]
    except FileNotFoundError:
        raise RunError(f"there is no {path}: is it the folder of a run?") from None
    except (OSError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not a table of metrics: {error}") from None
    if not values:
        raise RunError(f"{path} holds no epoch")
    return values
