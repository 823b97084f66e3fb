"""The typed configuration of a run and of the other commands, with the bounds of every value."""

import dataclasses
import difflib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from train import metric_learning

# The losses and miners known by name, besides the library's; train/losses.py builds them.
INHERITED_LOSSES = tuple(metric_learning.LOSSES)
MINERS = ("none", *metric_learning.MINERS)
T = TypeVar("T")

_LOSS_HELP = (
    "Loss: el-nivmf, el-vmf, b-vmf, kl-vmf, nivmf, l2, cos, as in the paper; from "
    f"pytorch-metric-learning {', '.join(INHERITED_LOSSES)}; "
    "or package.module:factory of your own, called with (num_classes, embed_dim, **loss_options)."
)
_MINER_HELP = f"Miner of tuples for an inherited loss without proxies: {', '.join(MINERS)}."


def paper_losses() -> tuple[str, ...]:
    """Names of the library's losses, from its table; loads torch, which --help does without."""
    from nivmf_fast.losses import PAPER_LOSSES

    return tuple(PAPER_LOSSES)


class RunError(Exception):
    """A problem with the user's input or machine, not a bug; only its one line is shown."""


class Diverged(RunError):
    """The loss or the embeddings of a run are not finite any more."""


@dataclass(frozen=True)
class AtLeast:
    """A lower bound, as an annotation of a field; of a tuple, it applies to every entry."""

    minimum: float

    def holds(self, value: float) -> bool:
        return value >= self.minimum

    def __str__(self) -> str:
        return f"at least {self.minimum}"


@dataclass(frozen=True)
class Positive:
    """An annotation like `AtLeast`: above 0, and at most `maximum`."""

    maximum: float = math.inf

    def holds(self, value: float) -> bool:
        return 0 < value <= self.maximum

    def __str__(self) -> str:
        return "above 0" if self.maximum == math.inf else f"above 0 and at most {self.maximum:g}"


@dataclass(frozen=True)
class DataConfig:
    name: Annotated[str, tyro.conf.arg(name="dataset")] = "glyphs"
    """Data set: glyphs (rendered on first use), cub200, cars196, online_products, or any
    folder DATA_ROOT/NAME/CLASS/*.jpg of class folders."""
    data_root: Path = Path("~/.cache/nivmf_fast")
    """Folder that holds the data sets."""
    glyph_characters: Annotated[int, AtLeast(4)] = 200
    """Characters of the glyph set; the first half trains, the second half tests."""
    glyph_images: Annotated[int, AtLeast(2)] = 40
    """Images per character."""
    augmentation: Literal["none", "base", "big", "adv", "red"] = "none"
    """Augmentation of training images: none (whole images, kept in memory: for small sets), base
    (random resized crop, flip), big (the same, larger), adv (with grey and colour jitter), red
    (random crop)."""
    image_size: Annotated[int | None, AtLeast(8)] = None
    """Width and height of the images in pixels; by default 28 with --augmentation none, otherwise
    224 (big 256, GoogLeNet 227)."""
    batch_size: Annotated[int, AtLeast(1)] = 100
    """Images in a batch, over all processes."""
    samples_per_class: Annotated[int, AtLeast(1)] = 2
    """Images drawn from each class; a batch draws batch_size / samples_per_class classes."""
    validation: Literal["none", "class", "samples"] = "none"
    """Evaluate on a part of the training half instead of the test classes: the last classes, or the
    last images of every class."""
    train_share: Annotated[float, Positive(1)] = 0.7
    """Share of the training half that a validation split leaves for training."""
    workers: Annotated[int, AtLeast(0)] = 0
    """Processes that read images, for each training process."""
    skip_bad_images: bool = False
    """Report images that cannot be read and continue without them."""


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = "conv"
    """Network before the embedding layer: conv (small and grey, for glyphs), bninception,
    googlenet, any name that timm knows (resnet50, vit_small_patch14_dinov2, ...), or
    package.module:factory of your own, which returns a module from images to features."""
    pretrained: str = "none"
    """Initial weights of the backbone: imagenet (downloaded), none, or a file of a state dict."""
    freeze_batchnorm: bool = False
    """Keep BatchNorm layers in eval mode, with their statistics unchanged."""
    pooling: Literal["avg", "avg+max"] = "avg"
    """Global pooling before the embedding layer."""
    width: Annotated[int, AtLeast(1)] = 16
    """Channels of the conv net's first block; each further block has twice as many."""
    embed_dim: Annotated[int, AtLeast(2)] = 64
    """Dimension of the embedding."""
    init_norm: Annotated[float | None, Positive()] = None
    """Initial mean of the embedding norm, which is the images' concentration: the embedding layer
    is scaled to it on training images."""
    init_norm_multiplier: Annotated[float | None, Positive()] = None
    """Multiply the embedding layer's initial weight by this."""
    max_norm: Annotated[float | None, Positive()] = None
    """Upper bound of the embedding norm: a norm r becomes r / (1 + r / max_norm)."""
    normalize_output: bool = False
    """Embeddings of norm 1, for losses without uncertainty."""


@dataclass(frozen=True)
class LossConfig:
    name: Annotated[str, tyro.conf.arg(name="loss", help=_LOSS_HELP)] = "el-nivmf"
    concentration: float = 10.0
    """Length of the raw proxies and, in non-isotropic losses, initial value of K's entries."""
    temperature: float = 0.01
    """Initial temperature of the softmax."""
    learn_temperature: bool = True
    """Train the temperature."""
    n_samples: int = 20
    """Samples drawn from each image's distribution (el-nivmf)."""
    normalizer: str = "exact"
    """Form of log C_D: exact, or released, as in the paper's code (el-nivmf, nivmf)."""
    projection: bool = True
    """Use cos(K x, K mu), as in the density, rather than cos(x, K mu) (el-nivmf, nivmf)."""
    temperature_outside: bool = False
    """Divide by the temperature after the mean over the samples (el-nivmf)."""
    guidance_weight: float = 0.0
    """Weight of a ProxyAnchor loss on the same proxies' directions, added to the loss."""
    warmstart: bool = True
    """Start every proxy at its class's mean embedding."""
    bindev: bool = False
    """Use a binomial deviance of the similarities, as in ProxyAnchor, instead of a softmax."""
    bindev_alpha: float = 1.0
    """Factor of the similarities in the binomial deviance."""
    bindev_delta: float = 0.0
    """Margin of the similarities in the binomial deviance."""
    bindev_axis: Literal["images", "classes"] = "images"
    """Axis over which the binomial deviance sums inside the logarithm."""
    negative_share: float = 1.0
    """Share of the negative proxies that the loss uses, drawn anew in each step."""
    backend: str = "auto"
    """Backend of el-nivmf and nivmf: auto, or one that `python -m nivmf_fast` lists as usable."""
    precision: str = "float32"
    """Products in el-nivmf and nivmf: float32, or fast, which is cheaper and less accurate."""
    workspace: int | None = None
    """Scratch memory of el-nivmf and nivmf, in bytes; by default 64 MiB on a CPU, 256 MiB on a
    GPU."""
    miner: Annotated[str, tyro.conf.arg(help=_MINER_HELP)] = "none"
    loss_options: str = "{}"
    """Further arguments of an inherited loss, or of your own, as JSON."""
    miner_options: str = "{}"
    """Further arguments of the miner, as JSON."""


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimiser; sgd has momentum 0.9."""
    lr: Annotated[float, Positive()] = 1e-5
    """Learning rate of the network."""
    weight_decay: Annotated[float, AtLeast(0)] = 4e-4
    """Weight decay on the network."""
    embedding_lr: Annotated[float | None, Positive()] = None
    """Learning rate of the embedding layer; that of the network by default."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Schedule of the learning rates: times gamma after each milestone, along a cosine to zero at
    the last batch, or constant."""
    milestones: Annotated[tuple[int, ...], AtLeast(1)] = ()
    """Epochs after which the learning rates are multiplied by gamma."""
    gamma: Annotated[float, Positive()] = 0.3
    """Factor of the learning rates at a milestone."""
    warmup: Annotated[int, AtLeast(0)] = 0
    """Initial epochs, which train only the embedding layer and the loss."""
    proxy_lr_mult: Annotated[float, AtLeast(0)] = 5000.0
    """Learning rate of the proxies' directions, as a multiple of lr."""
    conc_lr_mult: Annotated[float, AtLeast(0)] = 50000.0
    """Learning rate of the proxies' concentrations, as a multiple of lr."""
    temp_lr_mult: Annotated[float, AtLeast(0)] = 500.0
    """Learning rate of the temperature, as a multiple of lr."""
    clip_grad: Annotated[float | None, Positive()] = None
    """Clip the norm of the network's gradient to this."""
    amp: Literal["none", "bfloat16", "float16"] = "none"
    """Precision of the network under autocast; losses stay float32."""
    compile: bool = False
    """Compile the network with torch.compile."""


@dataclass(frozen=True)
class Config:
    preset: str = "glyphs"
    """Set of defaults that other flags override; the list is above."""
    epochs: Annotated[int, AtLeast(1)] = 150
    """Passes over the training images."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Seed of everything random except the data set: same seed, same machine, same metrics."""
    seeds: Annotated[tuple[int, ...], AtLeast(0)] = ()
    """Several runs, one for each seed, in folders of --out, and a table of mean and deviation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Run folder; without it runs/PRESET-001, -002, ..."""
    resume: bool = False
    """Continue the run in --out (or the newest of the preset) after its last checkpoint."""
    limit_batches: Annotated[int | None, AtLeast(1)] = None
    """At most this many batches per epoch, to try things out."""
    evaluate_every: Annotated[int, AtLeast(1)] = 1
    """Epochs from one evaluation to the next; the last is always evaluated."""
    clustering: bool = True
    """Evaluate NMI and F1 of k-means, which takes the most time on large sets."""
    storage_metric: str = "c_recall@1"
    """Column of metrics.csv by which checkpoint_best.pt is chosen."""
    checkpoint_batches: Annotated[int | None, AtLeast(1)] = None
    """Batches between checkpoints within an epoch; there is always one after each epoch."""
    class_parallel: bool = False
    """Under torchrun, spread the classes over the processes, if a GPU cannot hold them all."""
    tensorboard: bool = True
    """Also write the metrics for TensorBoard."""
    tracker: Literal["none", "wandb", "comet"] = "none"
    """Online tracker, if it is installed."""
    project: str = "nivmf_fast"
    """Project name at the online tracker."""
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
        """Raise a RunError for impossible values, and for values that exclude each other.

        The loss's constructor checks its own options; see `train.losses.check_loss`.
        """
        for flag, value, notes in flags(self):
            bounds = [note for note in notes if isinstance(note, (AtLeast, Positive))]
            entries = value if isinstance(value, tuple) else (value,)
            for bound, entry in itertools.product(bounds, entries):
                if entry is not None and not bound.holds(entry):
                    raise RunError(f"{flag} is {entry}, but must be {bound}")
        data, model, loss = self.data, self.model, self.loss
        for flag, text in (
            ("--loss-options", loss.loss_options),
            ("--miner-options", loss.miner_options),
        ):
            if not _is_json_object(text):
                example = f"{flag} '{{\"margin\": 0.2}}'"
                raise RunError(f"{flag} is {text!r}, but must be a JSON object, as in {example}")
        for flag, name, known in (
            ("--loss", loss.name, paper_losses() + INHERITED_LOSSES),
            ("--miner", loss.miner, MINERS),
        ):
            if name not in known and (flag == "--miner" or ":" not in name):
                raise RunError(f"{flag} is {name!r}{nearest(name, known)}; --help lists all")
        if model.init_norm is not None and model.init_norm_multiplier is not None:
            raise RunError("--init-norm and --init-norm-multiplier exclude each other: give one")
        if len(set(self.seeds)) < len(self.seeds):
            raise RunError(f"--seeds are {self.seeds}, but must differ from each other")
        if data.batch_size % data.samples_per_class:
            raise RunError(
                f"--batch-size is {data.batch_size}, but must be a multiple of "
                f"--samples-per-class, which is {data.samples_per_class}"
            )


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def flags(config: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the flag, the value and the annotations of each value of a configuration."""
    hints = get_type_hints(type(config), include_extras=True)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from flags(value)
            continue
        own = "dataset" if isinstance(config, DataConfig) else "loss"
        name = own if item.name == "name" else item.name.replace("_", "-")
        yield f"--{name}", value, getattr(hints[item.name], "__metadata__", ())


def by_flag(config: Any) -> dict[str, Any]:
    """Map the flags of a configuration to their values."""
    return {flag: value for flag, value, _ in flags(config)}


def _from_dict(kind: type[T], values: dict[str, Any]) -> T:
    arguments = {}
    for name, value in values.items():
        hint = get_type_hints(kind)[name]
        if dataclasses.is_dataclass(hint):
            value = _from_dict(hint, value)
        elif value is not None and hint in (Path, Path | None):
            value = Path(value)
        elif hint == tuple[int, ...]:
            value = tuple(value)
        arguments[name] = value
    return kind(**arguments)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest known names, to be added to the message about an unknown one."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a checkpoint again, on any split, and export the embeddings."""

    checkpoint: Path
    """Checkpoint of a run."""
    split: Literal["test", "validation", "train"] = "test"
    """Images to evaluate on."""
    export: Path | None = None
    """Write embeddings, directions, concentrations, labels and paths here, as .npz."""
    json: Path | None = None
    """Write the metrics here."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    data_root: Path | None = None
    """Folder that holds the data sets; that of the run by default."""
    dataset: str | None = None
    """Another data set; that of the run by default."""
    workers: int | None = None
    """Processes that read images; as in the run by default."""
    clustering: bool = True
    """Evaluate NMI and F1 of k-means too."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs in a table and a plot."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of runs with several seeds."""
    out: Path = Path("comparison")
    """Folder for compare.csv, compare.md and compare.png."""
    row: Literal["last", "best"] = "last"
    """Epoch that counts: the last, or the best by --metric (which peeks at the test classes)."""
    metric: str = "c_recall@1"
    """Column of metrics.csv to plot, and by which --row best chooses."""


@dataclass(frozen=True)
class SweepConfig:
    """Tune losses with equal effort, run each with several seeds, and compare them."""

    name: tyro.conf.Positional[Literal["glyphs-distances"]]
    """glyphs-distances: the paper's seven losses on the glyphs, each tuned with equal effort on
    classes held out of the training half, then run with --seeds."""
    out: Path = Path("runs/glyphs-distances")
    """Folder of all runs, the table and the plot; finished runs in it are not repeated."""
    trials: int = 8
    """Settings tried for each loss."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the final runs."""
    jobs: int | None = None
    """Runs at a time; one for each core by default, or one on a GPU."""
    losses: tuple[str, ...] = ()
    """Losses to compare; all by default."""
    data_root: Path | None = None
    """Folder that holds the data sets."""
    limit_batches: int | None = None
    """At most this many batches per epoch, to try things out."""
