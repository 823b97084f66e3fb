"""The typed configuration of a run, and the command line that fills it in."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

LossName = Literal["el-nivmf", "el-vmf", "b-vmf", "kl-vmf", "nivmf", "l2", "cos"]
T = TypeVar("T")


class RunError(Exception):
    """What ends a run and is no defect of the program: its one line is all that the user sees."""


@dataclass(frozen=True)
class DataConfig:
    name: Annotated[str, tyro.conf.arg(name="dataset")] = "glyphs"
    """Data set: `glyphs` is rendered when first needed; any other NAME must lie in the CUB200
    layout at DATA_ROOT/NAME/images/001.Class/*.png (or .jpg)."""
    data_root: Path = Path("~/.cache/nivmf_fast")
    """Folder that holds the data sets."""
    glyph_characters: int = 200
    """Characters of the glyph set; the first half trains, the second half tests."""
    glyph_images: int = 40
    """Images of each character."""
    image_size: int = 28
    """Images become square, this many pixels wide."""
    batch_size: int = 100
    """Images in a batch."""
    samples_per_class: int = 2
    """Images drawn of a class; a batch draws batch_size / samples_per_class classes."""


@dataclass(frozen=True)
class ModelConfig:
    backbone: Literal["conv"] = "conv"
    """Network before the embedding layer."""
    width: int = 16
    """Channels of the conv net's first block; each further block has twice as many."""
    embed_dim: int = 64
    """Dimension of the embedding."""
    init_norm: float = 10.0
    """Mean embedding norm, which is the images' concentration, at the start: the embedding layer is
    scaled to it."""


@dataclass(frozen=True)
class LossConfig:
    name: Annotated[LossName, tyro.conf.arg(name="loss")] = "el-nivmf"
    """Proxy loss: the similarity of image and proxy that it is built on."""
    concentration: float = 16.0
    """Length of the raw proxies and, for the non-isotropic losses, start of every entry of K."""
    temperature: float = 1.0
    """Temperature of the softmax at the start."""
    learn_temperature: bool = True
    """Train the temperature."""
    n_samples: int = 5
    """Samples drawn of each image's distribution (el-nivmf)."""
    normalizer: str = "exact"
    """How log C_D is computed (el-nivmf, nivmf)."""
    projection: bool = True
    """Take cos(K x, K mu), as the density has it, rather than cos(x, K mu) (el-nivmf, nivmf)."""
    temperature_outside: bool = False
    """Divide by the temperature after the mean over the samples (el-nivmf)."""
    guidance_weight: float = 0.0
    """Weight of a ProxyAnchor loss on the same proxies' directions, added to the loss."""
    warmstart: bool = True
    """Start every proxy at its class's mean embedding."""
    backend: str = "auto"
    """What computes el-nivmf and nivmf: auto, or what `python -m nivmf_fast` lists as usable."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-3
    """Adam's learning rate."""
    weight_decay: float = 0.0
    """Weight decay on the network."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rates: down to zero at the last batch, or none."""
    proxy_lr_mult: float = 5.0
    """Learning rate of the proxies' directions, as a multiple of lr."""
    conc_lr_mult: float = 5.0
    """Learning rate of the proxies' concentrations, as a multiple of lr."""
    temp_lr_mult: float = 1.0
    """Learning rate of the temperature, as a multiple of lr."""


@dataclass(frozen=True)
class Config:
    preset: str = "glyphs"
    """Set of defaults that other flags override: glyphs, or glyphs-tiny for a check in seconds."""
    epochs: int = 8
    """Rounds over the training images, each followed by an evaluation."""
    seed: int = 0
    """Seed of everything random but the data set: same seed, same machine, same metrics."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Run folder; without it runs/PRESET-001, -002, ..."""
    resume: bool = False
    """Continue the run in --out (or the newest of the preset) after its last checkpoint."""
    limit_batches: int | None = None
    """At most this many batches per epoch, to try things out."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def folder(self) -> Path:
        assert self.out is not None, "parse fills it in"
        return self.out

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        return _from_dict(cls, json.loads(text))

    def check(self) -> None:
        """Raise a RunError for a value that no run can have."""
        data, model, loss, optim = self.data, self.model, self.loss, self.optim
        at_least: list[tuple[str, float | None, float]] = [
            ("--epochs", self.epochs, 1),
            ("--seed", self.seed, 0),
            ("--limit-batches", self.limit_batches, 1),
            ("--image-size", data.image_size, 8),
            ("--glyph-images", data.glyph_images, 2),
            ("--glyph-characters", data.glyph_characters, 4),
            ("--samples-per-class", data.samples_per_class, 1),
            ("--batch-size", data.batch_size, 1),
            ("--width", model.width, 1),
            ("--embed-dim", model.embed_dim, 2),
            ("--n-samples", loss.n_samples, 1),
            ("--guidance-weight", loss.guidance_weight, 0),
            ("--weight-decay", optim.weight_decay, 0),
            ("--proxy-lr-mult", optim.proxy_lr_mult, 0),
            ("--conc-lr-mult", optim.conc_lr_mult, 0),
            ("--temp-lr-mult", optim.temp_lr_mult, 0),
        ]
        for flag, value, least in at_least:
            if value is not None and not value >= least:
                raise RunError(f"{flag} is {value}, but must be at least {least}")
        positive = [("--lr", optim.lr), ("--init-norm", model.init_norm)]
        for flag, value in [*positive, ("--temperature", loss.temperature)]:
            if not value > 0:
                raise RunError(f"{flag} is {value}, but must be above 0")
        if data.batch_size % data.samples_per_class:
            raise RunError(
                f"--batch-size is {data.batch_size}, but must be a multiple of "
                f"--samples-per-class, which is {data.samples_per_class}"
            )


@dataclass(frozen=True)
class _Early:
    """What decides about the defaults of all the rest."""

    preset: str | None = None
    out: Path | None = None
    resume: bool = False


def parse(arguments: Sequence[str], presets: dict[str, Config]) -> Config:
    """The preset's values, or with --resume those stored in the folder, overridden by the flags."""
    early, _ = _cli(_Early, arguments, _Early(), add_help=False)
    preset = early.preset or Config.preset
    if preset not in presets:
        raise RunError(f"--preset is {preset!r}, but must be one of {', '.join(presets)}")
    folder = early.out or _numbered_folder(preset, newest=early.resume)
    stored = _stored(folder) if early.resume else None
    default = dataclasses.replace(stored or presets[preset], out=early.out, resume=False)
    config, unknown = _cli(Config, arguments, default)
    if unknown:
        near = difflib.get_close_matches(unknown[0], _by_flag(config), n=2)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise RunError(f"unknown argument {unknown[0]}{hint}; --help lists all flags")
    config = dataclasses.replace(config, out=folder)
    if stored:
        asked = _by_flag(config)
        for flag, value in _by_flag(stored).items():
            if value != asked[flag] and flag not in ("--out", "--resume"):
                raise RunError(
                    f"the run in {folder} has {flag} {value}, not {asked[flag]}: "
                    "resume it as it is, or start another with another --out"
                )
    config.check()
    return config


def _cli(
    kind: type[T], arguments: Sequence[str], default: T, add_help: bool = True
) -> tuple[T, list[str]]:
    """tyro's parser, its framed error messages made into one line."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                kind,
                prog="python -m train",
                description="Train and evaluate a retrieval model.",
                args=list(arguments),
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
                add_help=add_help,
            )
    except SystemExit as error:
        if not error.code:  # --help
            raise
        # A title, the error, and after a rule the help: with or without a frame around.
        plain = re.sub(r"\x1b\[[0-9;]*m", "", messages.getvalue())
        rows = [row.strip(" │") for row in plain.splitlines()[1:]]
        blocks = itertools.groupby(rows, key=lambda row: bool(row.strip("╭╮╰╯─- ")))
        first = next((" ".join(block) for is_text, block in blocks if is_text), "bad arguments")
        reason = first.removeprefix("Error parsing ").rstrip(".")
        raise RunError(f"{reason}; --help lists all flags") from None


def _numbered_folder(preset: str, newest: bool) -> Path:
    """The newest of runs/PRESET-001, ..., or else the next."""
    pattern = re.compile(re.escape(preset) + r"-(\d{3,})")
    there = Path("runs").glob(f"{preset}-*")
    numbers = [int(match[1]) for path in there if (match := pattern.fullmatch(path.name))]
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


def _by_flag(config: Any) -> dict[str, Any]:
    """Every value of a configuration under its flag's name."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= _by_flag(value)
        else:
            own = "dataset" if isinstance(config, DataConfig) else "loss"
            name = own if item.name == "name" else item.name.replace("_", "-")
            values[f"--{name}"] = value
    return values


def _from_dict(kind: type[T], values: dict[str, Any]) -> T:
    arguments = {}
    for name, value in values.items():
        hint = get_type_hints(kind)[name]
        if dataclasses.is_dataclass(hint):
            value = _from_dict(hint, value)
        elif value is not None and hint in (Path, Path | None):
            value = Path(value)
        arguments[name] = value
    return kind(**arguments)
