"""Parse the command line into a configuration, or raise a RunError of one line."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from train.config import (
    CompareConfig,
    Config,
    EvaluateConfig,
    RunError,
    SweepConfig,
    by_flag,
    nearest,
)

COMMANDS = {"evaluate": EvaluateConfig, "compare": CompareConfig, "sweep": SweepConfig}
CHANGEABLE = {  # flags that may differ when a run is resumed
    *("--out", "--resume", "--device", "--data-root", "--workers"),
    *("--tensorboard", "--tracker", "--project"),
}
T = TypeVar("T")


def parse_command(
    name: str, arguments: Sequence[str]
) -> EvaluateConfig | CompareConfig | SweepConfig:
    """Parse the arguments of a command other than training."""
    config, unknown = _cli(COMMANDS[name], arguments, None, prog=f"python -m train {name}")
    if unknown:
        raise RunError(f"unknown argument {unknown[0]}; `{name} --help` lists all")
    return config


@dataclass(frozen=True)
class _Early:
    """The flags that decide the defaults of all others."""

    preset: str | None = None
    out: Path | None = None
    resume: bool = False


def parse(arguments: Sequence[str], presets: dict[str, Config]) -> Config:
    """Start from the preset, or with --resume from the stored configuration; flags override it."""
    early, _ = _cli(_Early, arguments, _Early(), add_help=False)
    preset = early.preset or Config.preset
    if preset not in presets:
        raise RunError(f"--preset is {preset!r}, but must be one of {', '.join(presets)}")
    folder = early.out or _numbered_folder(preset, newest=early.resume)
    stored = _stored(folder) if early.resume else None
    default = dataclasses.replace(stored or presets[preset], out=early.out, resume=False)
    config, unknown = _cli(Config, arguments, default, description=_description(presets))
    if unknown:
        hint = nearest(unknown[0], by_flag(config))
        raise RunError(f"unknown argument {unknown[0]}{hint}; --help lists all flags")
    config = dataclasses.replace(config, out=folder)
    if stored:
        asked = by_flag(config)
        for flag, value in by_flag(stored).items():
            if value != asked[flag] and flag not in CHANGEABLE:
                raise RunError(
                    f"the run in {folder} has {flag} {value}, not {asked[flag]}: "
                    "resume it as it is, or start another with another --out"
                )
    config.check()
    return config


def _description(presets: Iterable[str]) -> str:
    return (
        "Train and evaluate a retrieval model. Other commands (each has --help): "
        "`evaluate` a checkpoint again, `compare` runs, `sweep` settings; "
        "--from-released 'python main.py ...' translates a command of the paper's code. "
        f"Presets: {', '.join(presets)}."
    )


def _cli(
    kind: type[T],
    arguments: Sequence[str],
    default: T | None,
    add_help: bool = True,
    prog: str = "python -m train",
    description: str | None = None,
) -> tuple[T, list[str]]:
    """Call tyro's parser; turn its framed error messages into one line."""
    messages = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
                add_help=add_help,
                **given,
            )
    except SystemExit as error:
        if not error.code:  # --help
            raise
        # tyro prints a title, the error and, below a rule, a hint, with or without a frame.
        plain = re.sub(r"\x1b\[[0-9;]*m", "", messages.getvalue())
        rows = [row.strip(" │") for row in plain.splitlines()[1:]]
        blocks = itertools.groupby(rows, key=lambda row: bool(row.strip("╭╮╰╯─- ")))
        first = next((" ".join(block) for is_text, block in blocks if is_text), "bad arguments")
        reason = first.removeprefix("Error parsing ").rstrip(".")
        raise RunError(f"{reason}; --help lists all flags") from None


def _numbered_folder(preset: str, newest: bool) -> Path:
    """The newest folder of runs/PRESET-001, ..., or the next free one."""
    pattern = re.compile(re.escape(preset) + r"-(\d{3,})")
    folders = Path("runs").glob(f"{preset}-*")
    numbers = [int(match[1]) for path in folders if (match := pattern.fullmatch(path.name))]
    number = max(numbers, default=0) + (0 if newest and numbers else 1)
    return Path("runs") / f"{preset}-{number:03d}"


def _stored(folder: Path) -> Config | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return Config.from_json(path.read_text(encoding="utf-8"))
    except (TypeError, KeyError, ValueError) as error:
        raise RunError(f"{path} is not a configuration of this version: {error}") from None
