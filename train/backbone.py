"""The network before the embedding layer: its architecture, and the weights it starts from."""

import importlib
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from train.bninception import BNInception
from train.config import ModelConfig, RunError, nearest

# timm and torchvision.models take seconds to import, so they are imported where needed.

BUILT_IN = ("conv", "bninception", "googlenet")
# Mean and standard deviation of the channels, as the weights were trained with them.
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: MeanStd = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE: MeanStd = (
    (0.502, 0.4588, 0.4078),
    (0.0039, 0.0039, 0.0039),
)  # red first, as in the images
# GoogLeNet's: torchvision's transform_input converts to it from images normalised by IMAGENET.
TENSORFLOW: MeanStd = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BN_INCEPTION_URL = "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"
CLASSIFIER = re.compile(
    r"((fc|last_linear|classifier|head|head\.fc|head_dist|classifier\.\d)\.(weight|bias)|aux\d\..*)"
)
Weights = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Backbone:
    """A network from normalised images to features [n, F], or to a map of them [n, F, h, w]."""

    module: nn.Module
    features: int
    channels: int  # of the images
    image_size: int | None  # None: any
    mean: Tensor  # of the channels, images in [0, 1]
    std: Tensor
    bgr: bool = False  # whether to reverse the channels after normalising


class GlobalPool(nn.Module):
    """Mean over a map [n, F, h, w], as [n, F, 1, 1]; for avg+max, plus its maximum."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return mean + x.amax((2, 3), keepdim=True) if self.pooling == "avg+max" else mean


def build_backbone(config: ModelConfig, image_size: int | None = None) -> Backbone:
    """Build the configured backbone with its initial weights, for images of that size."""
    name = config.backbone
    channels, own_size = backbone_input(config)
    size = image_size or own_size or (28 if name == "conv" else 224)
    mean_std = IMAGENET
    if name == "conv":
        module, mean_std = _conv(config), ((0.0,), (1.0,))
    elif name == "bninception":
        module, mean_std = _bninception(config), CAFFE
    elif name == "googlenet":
        module, mean_std = _googlenet(config), TENSORFLOW
    elif ":" in name:
        module = _custom(config)
    else:
        module, mean_std = _timm(config, size)
    features = _count_features(module, config, channels, size)
    mean, std = (torch.tensor(values) for values in mean_std)
    return Backbone(module, features, channels, own_size, mean, std, bgr=name == "bninception")


def backbone_input(config: ModelConfig) -> tuple[int, int | None]:
    """The channels of the images that a backbone takes, and its image size if it has its own."""
    name = config.backbone
    if name in BUILT_IN:
        return (1 if name == "conv" else 3), (227 if name == "googlenet" else None)
    if ":" in name:
        return 3, None
    cfg = _timm_cfg(name)
    return cfg.input_size[0], cfg.input_size[-1] if cfg.fixed_input_size else None


def _count_features(module: nn.Module, config: ModelConfig, channels: int, size: int) -> int:
    """Count the output features by a trial run, which also shows whether the size is accepted."""
    try:
        with torch.no_grad():
            features = module.eval()(torch.zeros(1, channels, size, size))
    except Exception as error:  # user code may raise anything
        raise RunError(
            f"--backbone {config.backbone} fails on images of {size} pixels ({_reason(error)}): "
            "choose another --image-size"
        ) from None
    if not isinstance(features, Tensor) or features.ndim not in (2, 4):
        came = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise RunError(
            f"--backbone {config.backbone} makes {came} of one image, but must make features "
            "[n, F] or a map of them [n, F, h, w]"
        )
    pools_itself = config.backbone == "conv" or (":" in config.backbone and features.ndim == 2)
    if config.pooling == "avg+max" and pools_itself:
        raise _no_map(config)
    return features.shape[1]


def _conv(config: ModelConfig) -> nn.Module:
    """Three small blocks for grey images of 28 pixels."""
    channels = [1, config.width, 2 * config.width, 4 * config.width]
    blocks: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise(channels):
        for c in (c_in, c_out):
            blocks += [
                nn.Conv2d(c, c_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
        blocks.append(nn.MaxPool2d(2))
    return _started(nn.Sequential(*blocks, nn.AdaptiveMaxPool2d(3), nn.Flatten()), config)


def _bninception(config: ModelConfig) -> nn.Module:
    return _started(BNInception(), config, lambda: _download(BN_INCEPTION_URL))


def _googlenet(config: ModelConfig) -> nn.Module:
    from torchvision import models

    url = models.GoogLeNet_Weights.IMAGENET1K_V1.url
    net = models.googlenet(weights=None, aux_logits=False, init_weights=config.pretrained == "none")
    net.avgpool, net.fc = GlobalPool(config.pooling), nn.Identity()
    return _started(net, config, lambda: _download(url))


def _custom(config: ModelConfig) -> nn.Module:
    """Call the user's factory."""
    place, _, name = config.backbone.partition(":")
    try:
        module = getattr(importlib.import_module(place), name)()
    except Exception as error:  # user code may raise anything
        raise RunError(f"--backbone {config.backbone}: {_reason(error)}") from None
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise RunError(
            f"--backbone {config.backbone} returns a {kind}, but must return a torch module"
        )
    return _started(module, config)


def _timm_cfg(name: str) -> Any:
    """timm's description of a model's weights and of the images that they were trained on."""
    import timm

    if not timm.is_model(name):
        hint = nearest(name, [*BUILT_IN, *timm.list_models()])
        raise RunError(
            f"--backbone is {name!r}{hint}, but must be {', '.join(BUILT_IN)}, "
            "package.module:factory or a name that timm.list_models() has"
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # resnet50.TAG
        raise RunError(f"--backbone {name}: {_reason(error)}") from None


def _timm(config: ModelConfig, size: int) -> tuple[nn.Module, MeanStd]:
    """Build a timm model without its classifier; return it with its training mean and deviation."""
    import timm
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

    name, cfg = config.backbone, _timm_cfg(config.backbone)
    options: dict[str, Any] = {"num_classes": 0}
    if cfg.fixed_input_size:
        options["img_size"] = size
    if config.pooling == "avg+max":
        options["global_pool"] = "avgmax"

    def create() -> nn.Module:
        if config.pretrained == "imagenet":
            options.update(pretrained=True, pretrained_cfg_overlay=_timm_source(cfg))
        return timm.create_model(name, **options)

    try:
        net = _try_download(config, create) if config.pretrained == "imagenet" else create()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if config.pooling == "avg+max":
            raise _no_map(config) from None
        raise RunError(f"--backbone {name}: {_reason(error)}") from None
    if config.pooling == "avg+max":
        pools = [layer for layer in net.modules() if isinstance(layer, SelectAdaptivePool2d)]
        pools = [pool for pool in pools if pool.pool_type.endswith("avgmax")]
        if not pools:
            raise _no_map(config)
        for pool in pools:  # timm's avgmax is half the sum
            pool.add_module("pool", nn.Sequential(pool.pool, _Twice()))
    if config.pretrained not in ("none", "imagenet"):
        # timm's own conversion of weights: names of other releases, position embeddings of another
        # image size.
        adapt = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        net = _started(net, config, adapt=adapt)
    return net, (cfg.mean, cfg.std)


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _no_map(config: ModelConfig) -> RunError:
    return RunError(
        f"--pooling avg+max needs a backbone that ends in a map of features, but "
        f"{config.backbone} has its own way to pool: use --pooling avg"
    )


def _started(
    module: nn.Module,
    config: ModelConfig,
    imagenet: Callable[[], Weights] | None = None,
    adapt: Callable[[Weights, nn.Module], Weights] | None = None,
) -> nn.Module:
    """Load the weights that --pretrained asks for into the module."""
    if config.pretrained == "none":
        return module
    if config.pretrained == "imagenet":
        if imagenet is None:
            raise RunError(
                f"--pretrained imagenet: there are no such weights of {config.backbone}; "
                "give a file with --pretrained PATH, or use --pretrained none"
            )
        weights, source = _try_download(config, imagenet), "imagenet"
    else:
        source = config.pretrained
        weights = _read(Path(source).expanduser())
    if adapt:
        try:
            weights = adapt(weights, module)
        except Exception as error:  # it may raise anything on unexpected names and shapes
            raise RunError(
                f"--pretrained {source} does not fit {config.backbone} ({_reason(error)})"
            ) from None
    wanted = module.state_dict()
    weights = {
        # some files from Caffe hold BatchNorm's vectors as rows
        name: tensor[0] if name in wanted and tensor.shape == (1, *wanted[name].shape) else tensor
        for name, tensor in weights.items()
        if name in wanted or not CLASSIFIER.fullmatch(name)
    }
    missing = [k for k in wanted if k not in weights and not k.endswith("num_batches_tracked")]
    unknown = [k for k in weights if k not in wanted]
    reshaped = [
        f"{k} is {list(v.shape)} for {list(wanted[k].shape)}"
        for k, v in weights.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
    faults = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds if names]
    if faults:
        raise RunError(
            f"--pretrained {source} does not fit {config.backbone}: of {len(wanted)} tensors "
            f"{', '.join(faults)}"
        )
    module.load_state_dict(weights, strict=False)
    return module


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(path: Path) -> Weights:
    """Read a backbone's state dict from a file, which may be a checkpoint of this project."""
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(
            f"--pretrained {path}: no such file; it is imagenet, none or the file of a state dict"
        ) from None
    except Exception as error:  # damaged bytes make the readers fail in any way
        raise RunError(f"--pretrained {path} cannot be read ({_reason(error)})") from None
    for entry in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise RunError(f"--pretrained {path} holds no state dict, which has tensors by name")
    weights = {  # without the prefixes of DistributedDataParallel and torch.compile
        re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
    of_backbone = {
        name.removeprefix("backbone.").removeprefix("_orig_mod."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
    return of_backbone or weights


def _download(url: str) -> Weights:
    """Load a state dict from torch.hub's cache; download it first if it is missing."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).exists():
        _check_reachable(url)
    return torch.hub.load_state_dict_from_url(
        url, map_location="cpu", check_hash=True, weights_only=True
    )


def _timm_source(cfg: Any) -> dict[str, str]:
    """Where timm is to take a model's weights from: the cached file, if there is one."""
    import huggingface_hub as hub

    if cfg.hf_hub_id:
        files = [cfg.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
        cached = [hub.try_to_load_from_cache(cfg.hf_hub_id, file) for file in files]
        found = [file for file in cached if isinstance(file, str)]
        if found:
            return {"file": found[0]}
        _check_reachable(hub.constants.ENDPOINT)
    return {}


def _try_download(config: ModelConfig, fetch: Callable[[], T]) -> T:
    """Call `fetch`; if it fails, raise a RunError that says how to do without."""
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"--pretrained imagenet: the weights of {config.backbone} cannot be fetched "
            f"({_reason(error)}); give a file with --pretrained PATH, or use --pretrained none"
        ) from None


def _check_reachable(url: str) -> None:
    """Fail at once if there is no network; the downloaders would retry for a minute."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=5).close()
    except HTTPError:
        pass  # an answer
    except OSError as error:
        raise OSError(f"{url}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", "") or error)
    return (text or type(error).__name__).strip().splitlines()[0]
