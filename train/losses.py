"""Build the loss of a run: one of those known by name, or your own.

| loss | from | takes a miner |
|---|---|---|
| `nivmf_fast.losses.PAPER_LOSSES` | nivmf_fast | no: it compares with proxies |
| `train.metric_learning.LOSSES` | pytorch-metric-learning | those without proxies |
| package.module:factory | you | no: it may mine inside |
"""

import contextlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nivmf_fast import which_backend
from nivmf_fast.distributed import CLASS_PARALLEL
from nivmf_fast.losses import PAPER_LOSSES
from train.config import LossConfig, RunError, nearest
from train.metric_learning import LOSSES, MINERS, Entry

COMMON = (  # options of every loss of the paper
    *("concentration", "temperature", "learn_temperature", "guidance_weight"),
    *("bindev_alpha", "bindev_delta", "bindev_axis", "negative_share"),
)
OPTIONS = {  # further options, by an op that the loss calls
    "vmf_rsample": ("n_samples", "temperature_outside"),
    "proxy_nca": ("normalizer", "projection", "precision", "workspace", "backend"),
}


def build_loss(
    config: LossConfig, num_classes: int, embed_dim: int, class_parallel: bool = False
) -> nn.Module:
    """Build the loss; all are called as `loss(embeddings, labels, seed=, image_offset=)`."""
    _check(config, class_parallel)
    if config.name in PAPER_LOSSES:
        return _paper_loss(config, num_classes, embed_dim, class_parallel)
    if config.name in LOSSES:
        return _metric_learning_loss(config, num_classes, embed_dim)
    return CustomLoss(_custom_loss(config, num_classes, embed_dim))


def check_loss(config: LossConfig, class_parallel: bool = False) -> None:
    """Raise a RunError, before any data is read, for options that the loss refuses or ignores."""
    _check(config, class_parallel)
    if config.name in PAPER_LOSSES:  # any number of classes will do
        with torch.random.fork_rng(devices=[]):
            _paper_loss(config, 2, 2, class_parallel=False)


def loss_backends(config: LossConfig, device: torch.device) -> str:
    """Name the backend of each op that the loss calls, or torch if it calls none."""
    ops = PAPER_LOSSES[config.name][0].ops if config.name in PAPER_LOSSES else ()
    backend = config.backend if "proxy_nca" in ops else "auto"
    try:
        chosen = [f"{which_backend(op, device, backend=backend)} ({op})" for op in ops]
    except (ValueError, RuntimeError) as error:
        raise RunError(f"--backend {config.backend}: {error}") from None
    return ", ".join(chosen) or "torch"


def _check(config: LossConfig, class_parallel: bool) -> None:
    """Raise a RunError for an option that this loss would silently ignore."""
    name, paper = config.name, config.name in PAPER_LOSSES
    if config.miner != "none" and not (name in LOSSES and LOSSES[name].takes_miner):
        takers = ", ".join(other for other, entry in LOSSES.items() if entry.takes_miner)
        raise RunError(f"--miner {config.miner} goes with {takers}, not with --loss {name}")
    if config.miner == "none" and json.loads(config.miner_options):
        raise RunError(f"--miner-options {config.miner_options} need a --miner")
    if paper and json.loads(config.loss_options):
        raise RunError(
            f"--loss-options are for inherited losses and your own; {name} has flags: see --help"
        )
    for flag, unused in (
        ("--guidance-weight 0", config.guidance_weight == 0),
        ("--no-bindev", not config.bindev),
        ("--negative-share 1", config.negative_share == 1),
    ):
        if not (paper or unused):
            raise RunError(f"--loss {name} needs {flag}: that is for the paper's losses only")
    parallel = [other for other, (kind, _) in PAPER_LOSSES.items() if kind in CLASS_PARALLEL]
    if class_parallel and name not in parallel:
        known = ", ".join(parallel)
        raise RunError(f"--class-parallel goes with {known}, not with --loss {name}")


def _paper_loss(
    config: LossConfig, num_classes: int, embed_dim: int, class_parallel: bool
) -> nn.Module:
    kind, options = PAPER_LOSSES[config.name]
    names = [*COMMON, *(name for op in kind.ops for name in OPTIONS.get(op, ()))]
    options = {name: getattr(config, name) for name in names} | options
    options["form"] = "bindev" if config.bindev else "nca"
    if class_parallel:
        kind = CLASS_PARALLEL[kind]
    try:
        return kind(num_classes, embed_dim, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        argument = str(error).partition(" ")[0]
        flag = f"--{argument.replace('_', '-')} of " if argument in vars(config) else ""
        raise RunError(f"{flag}loss {config.name}: {error}") from None


# --- from pytorch-metric-learning


class MetricLearningLoss(nn.Module):
    """A loss of pytorch-metric-learning and its miner, called and trained as the paper's are."""

    decomposes = False  # into terms of single images

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        seed: int | Tensor | None = None,
        image_offset: int = 0,
    ) -> Tensor:
        """Loss of the batch in float32; `seed` decides what a miner draws."""
        e = _full_precision(embeddings)
        with torch.autocast(e.device.type, enabled=False), _seeded(seed, e.device):
            return self.loss(e, labels, self.miner(e, labels) if self.miner else None)

    @torch.no_grad()
    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        """Start every proxy at the mean direction of its class, keeping its length.

        soft-triple keeps its random start: equal centres of a class would stay equal.
        """
        weight = getattr(self.loss, "W", None)
        proxies = getattr(self.loss, "proxies", None) if weight is None else weight.T
        if proxies is None:
            return
        directions = nn.functional.normalize(embeddings.to(proxies), dim=-1)
        mean = torch.zeros_like(proxies).index_add_(0, labels.to(proxies.device), directions)
        length = torch.linalg.vector_norm(proxies, dim=-1, keepdim=True)
        started = nn.functional.normalize(mean, dim=-1) * length
        proxies.copy_(torch.where((mean != 0).any(-1, keepdim=True), started, proxies))

    def param_groups(
        self,
        lr: float,
        *,
        proxy_lr_mult: float = 1.0,
        concentration_lr_mult: float = 1.0,
        temperature_lr_mult: float = 1.0,
    ) -> list[dict[str, Any]]:
        """One group, without weight decay, of what the loss learns: proxies or margins."""
        return _one_group(self.loss, lr * proxy_lr_mult)


def _metric_learning_loss(
    config: LossConfig, num_classes: int, embed_dim: int
) -> MetricLearningLoss:
    try:
        from pytorch_metric_learning import distances, losses, miners, regularizers
    except ImportError as error:
        raise RunError(
            f"--loss {config.name} needs pytorch-metric-learning ({error}): "
            "pip install pytorch-metric-learning"
        ) from None
    kind = getattr(losses, LOSSES[config.name].kind)
    options = _options(
        "--loss-options", config.name, LOSSES[config.name], kind, config.loss_options
    )
    learned = {"num_classes": num_classes, "embedding_size": embed_dim}
    fixed: dict[str, Any] = {
        name: value
        for name, value in learned.items()
        if name in inspect.signature(kind.__init__).parameters
    }
    with _naming("--loss-options", config.name):
        match config.name:
            case "lifted":  # of raw embeddings, hence with a penalty on their length
                fixed["distance"] = distances.LpDistance(normalize_embeddings=False)
                fixed["embedding_regularizer"] = regularizers.LpRegularizer()
            case "n-pair":  # of raw embeddings too
                fixed["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
                fixed["embedding_regularizer"] = regularizers.LpRegularizer()
            case "snr":
                fixed["distance"] = distances.SNRDistance()
                fixed["embedding_regularizer"] = regularizers.ZeroMeanRegularizer()
            case "soft-triple" if options["weight_reg_weight"] and options["centers_per_class"] > 1:
                fixed["weight_regularizer"] = regularizers.SparseCentersRegularizer(
                    num_classes, options["centers_per_class"]
                )
        loss = kind(**fixed, **options)
    if config.miner == "none":
        return MetricLearningLoss(loss)
    entry = MINERS[config.miner]
    kind = getattr(miners, entry.kind)
    options = _options("--miner-options", config.miner, entry, kind, config.miner_options)
    with _naming("--miner-options", config.miner):
        return MetricLearningLoss(loss, kind(**options))


def _options(flag: str, name: str, entry: Entry, kind: type, text: str) -> dict[str, Any]:
    """The entry's defaults, overridden by the options given."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    defaults |= entry.defaults
    defaults.pop("num_classes", None)  # of losses to which it is optional
    given = json.loads(text)
    for key, value in given.items():
        if key not in defaults:
            accepted = ", ".join(sorted(defaults)) or "none"
            raise RunError(
                f"{flag} of {name}: unknown {key!r}{nearest(key, defaults)}; it accepts {accepted}"
            )
        default = defaults[key]
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if isinstance(default, bool) != isinstance(value, bool) or (
            number and not isinstance(value, (int, float))
        ):
            like = json.dumps(default)
            raise RunError(f"{flag} of {name}: {key} is {value!r}, but must be as {like} is")
    return entry.defaults | given


@contextlib.contextmanager
def _naming(flag: str, name: str) -> Iterator[None]:
    """Turn a constructor's error into a RunError that names the flag."""
    try:
        yield
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or "it refuses these values"
        raise RunError(f"{flag} of {name}: {reason}") from None


# --- your own


class CustomLoss(nn.Module):
    """Wrap a module called as `loss(embeddings, labels)`, adding what a run needs and it lacks.

    `seed` and `image_offset` of its forward, `param_groups`, `warmstart`, `decomposes` and
    `temperature` are used if it has them; see `nivmf_fast.losses.ProxyLoss` for their meaning.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.decomposes = bool(getattr(inner, "decomposes", False))

    @property
    def temperature(self) -> Any:
        return self.inner.temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        seed: int | Tensor | None = None,
        image_offset: int = 0,
    ) -> Tensor:
        e = _full_precision(embeddings)
        extra = _accepted(self.inner.forward, seed=seed, image_offset=image_offset)
        with torch.autocast(e.device.type, enabled=False):
            return self.inner(e, labels, **extra)

    def warmstart(self, embeddings: Tensor, labels: Tensor) -> None:
        if hasattr(self.inner, "warmstart"):
            self.inner.warmstart(embeddings, labels)

    def param_groups(self, lr: float, **multipliers: float) -> list[dict[str, Any]]:
        if hasattr(self.inner, "param_groups"):
            groups = self.inner.param_groups
            return list(groups(lr, **_accepted(groups, **multipliers)))
        return _one_group(self.inner, lr * multipliers.get("proxy_lr_mult", 1.0))


def _custom_loss(config: LossConfig, num_classes: int, embed_dim: int) -> nn.Module:
    path, _, attribute = config.name.partition(":")
    if not path or not attribute:
        raise RunError(f"--loss is {config.name!r}, but must be as in package.module:factory")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise RunError(
            f"--loss {config.name}: {error}; is it installed, or in this folder?"
        ) from None
    if not callable(factory := getattr(module, attribute, None)):
        hint = nearest(attribute, vars(module))
        raise RunError(f"--loss {config.name}: {path} has no function {attribute}{hint}")
    options = json.loads(config.loss_options)
    signature = inspect.signature(factory)
    try:
        signature.bind(num_classes, embed_dim, **options)
    except TypeError as error:
        raise RunError(
            f"--loss {config.name} is called with (num_classes, embed_dim, **loss_options), but is "
            f"{attribute}{signature}: {error}"
        ) from None
    loss = factory(num_classes, embed_dim, **options)
    if not isinstance(loss, nn.Module):
        raise RunError(
            f"--loss {config.name} must return a torch.nn.Module, but returned a "
            f"{type(loss).__name__}"
        )
    return loss


# --- shared


def _full_precision(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


@contextlib.contextmanager
def _seeded(seed: int | Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from the seed alone, and leave the run's generators unchanged."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        yield


def _one_group(loss: nn.Module, lr: float) -> list[dict[str, Any]]:
    parameters = list(loss.parameters())
    group = {"name": "proxies", "params": parameters, "lr": lr, "weight_decay": 0.0}
    return [group] if parameters else []


def _accepted(function: Callable[..., Any], **values: Any) -> dict[str, Any]:
    """The keyword arguments that the function accepts."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return values
    return {name: value for name, value in values.items() if name in parameters}
