"""The folder of one run: what lies in it, and that every file in it is whole."""

import contextlib
import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

import torch

from train.config import Config, RunError

LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, config: Config) -> "RunFolder":
        """The run's folder; one that already holds something is only for --resume."""
        path = config.folder
        if path.exists() and not path.is_dir():
            raise RunError(f"--out {path} is a file, not a folder")
        if not config.resume and path.is_dir() and any(path.iterdir()):
            raise RunError(
                f"{path} is not empty: continue that run with --resume, or give another --out"
            )
        return cls(path)

    def create(self, config: Config) -> None:
        """Make the folder, with the configuration in it; late, so that bad data leave nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            stored = dataclasses.replace(config, resume=False)
            self.write("config.json", stored.to_json().encode())

    def write(self, name: str, content: bytes) -> None:
        """Write beside and rename: at every moment the file is the old one or the new one."""
        target = self.path / name
        beside = target.with_name(f".{name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except OSError as error:
            error.filename = str(target)  # a full disk does not say which file
            raise
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()

    def save(self, name: str, state: dict[str, Any]) -> None:
        buffer = (
            io.BytesIO()
        )  # torch.save to a full disk would raise a RuntimeError that does not say so
        torch.save(state, buffer)
        self.write(name, buffer.getvalue())

    def load(self, name: str, device: torch.device) -> dict[str, Any] | None:
        """A checkpoint's state, or None where there is none."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # damaged bytes make the unpickler fail in any way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RunError(f"{path} is not a readable checkpoint ({reason})") from None
        return state

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """metrics.csv, one row per epoch; last the seconds, which alone differ in equal runs."""
        names = sorted(history[0], key=lambda name: name.startswith("seconds_"))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.2f}" if k.startswith("seconds_") else repr(v) for k, v in row.items()}
            for row in history
        )
        self.write("metrics.csv", text.getvalue().encode())
