"""Translate a command line of the paper's released code into one of `python -m train`."""

import argparse
import json
import math
import re
import shlex
from typing import Any, NoReturn

from train.config import RunError, by_flag, nearest
from train.metric_learning import LOSSES, MINERS
from train.presets import PRESETS
from train.released.flags import FLAGS, LOSS_NAMES, MINER_NAMES

_RESNET50 = PRESETS["cub200-r50-128"].model.backbone  # with the weights meant
_MINED = ("triplet", "margin", "contrastive", "snr")


def translate(command: str) -> str:
    """Return the equivalent `python -m train ...`, after comments on flags without counterpart.

    The command starts from the nearest preset and spells out the differences.

    Raises:
        RunError: unknown flags and values, a loss without counterpart.
    """
    given = _parse(command)
    old = {name: flag.default for name, flag in FLAGS.items()} | given
    wanted, notes = _wanted(old, given)
    for name in given:
        reason = FLAGS[name].here
        if reason.startswith("no counterpart") and old[name] != FLAGS[name].default:
            notes.setdefault(name, reason)

    def missing(preset: str) -> dict[str, Any]:
        values = by_flag(PRESETS[preset])
        return {flag: value for flag, value in wanted.items() if values[flag] != value}

    preset = min(PRESETS, key=lambda name: ("--loss" in missing(name), len(missing(name))))
    words = ["python -m train", f"--preset {preset}"]
    words += [_written(flag, value) for flag, value in missing(preset).items()]
    lines = [f"# --{name}: {' '.join(reason.split())}" for name, reason in notes.items()]
    return "\n".join([*lines, " ".join(words)])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RunError(f"the released code's command line: {message}")


def _parse(command: str) -> dict[str, Any]:
    """Parse the flags given, with their values."""
    try:  # join continued lines, even with a space after the backslash or none before it
        words = shlex.split(re.sub(r"\\[ \t]*(\n|$)", " ", command), comments=True)
    except ValueError as error:
        raise RunError(f"the released code's command line: {error}") from None
    starts = [i for i, word in enumerate(words) if word.endswith("main.py")]
    if len(starts) > 1:
        raise RunError("the released code's command line: give one command at a time")
    if starts:
        words = words[starts[0] + 1 :]
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name, flag in FLAGS.items():
        several = isinstance(flag.default, list)
        kind = type(flag.default[0] if several else flag.default)
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            options = {"nargs": "+"} if several else {}
            variable = name in ("gpu", "seed")
            parser.add_argument(f"--{name}", type=_int_or_variable if variable else kind, **options)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        hint = nearest(unknown[0], [f"--{name}" for name in FLAGS])
        raise RunError(f"the released code has no flag {unknown[0]}{hint}")
    return vars(given)


def _int_or_variable(text: str) -> int | str:
    """A number, or a shell variable, which the translation keeps."""
    return text if text.startswith("$") else int(text)


def _wanted(old: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that matter, by this project's flags, and notes by released flags."""
    name = _one_of("loss", old["loss"], LOSS_NAMES)
    loss, notes = LOSS_NAMES[name], {}
    if not loss:
        raise RunError(f"--loss {name} has no counterpart here; docs/migrating.md lists all")
    wanted = _general(old, given, notes)
    wanted |= {"--warmstart": False, "--guidance-weight": 0, "--negative-share": 1}
    wanted |= {"--bindev": False, "--miner": "none", "--init-norm": None}
    wanted |= {"--init-norm-multiplier": None, "--loss-options": "{}", "--miner-options": "{}"}
    wanted["--loss"] = loss
    if loss in LOSSES:
        wanted |= _inherited(name, loss, old, notes)
    else:
        wanted |= _paper(name, loss, old, given, notes)
    for flag in given:
        other = flag.startswith("loss_") and not flag.startswith(_prefixes(name))
        if other and flag not in notes and not FLAGS[flag].here.startswith("not needed"):
            notes[flag] = f"--loss {name} does not read it"
    return wanted, notes


def _prefixes(loss: str) -> tuple[str, ...]:
    """Prefixes of the flags that a released loss reads."""
    if LOSS_NAMES[loss] not in LOSSES:
        return (
            ("loss_proxyvmf_", "loss_oproxy_") if loss == "proxyvmf_panc" else ("loss_proxyvmf_",)
        )
    return (f"loss_{loss}_",)


def _general(old: dict[str, Any], given: dict[str, Any], notes: dict[str, str]) -> dict[str, Any]:
    """Data, network, optimiser, evaluation, files."""
    arch = old["arch"]
    backbone = next((b for b in ("resnet50", "googlenet", "bninception") if b in arch), None)
    if backbone is None:
        raise RunError(f"--arch is {arch!r}, but must name resnet50, googlenet or bninception")
    if "_he" in arch:
        notes["arch"] = "no counterpart for _he: the embedding layer starts with PyTorch's defaults"
    if old["not_pretrained"] and backbone != "resnet50":
        notes["not_pretrained"] = f"the released code ignores it for {backbone}; honoured here"
    within = tuple(epoch for epoch in old["tau"] if epoch < old["n_epochs"])
    constant = old["scheduler"] == "none" or not within
    if old["scheduler"] not in ("step", "none"):
        notes["scheduler"] = f"{old['scheduler']} is step: the released code has no other"
    validation = "samples" if old["tv_split_by_samples"] else "class"
    datasets = ("cub200", "cars196", "online_products")
    augmentations = ("base", "adv", "big", "red")
    wanted = {
        "--dataset": _one_of("dataset", old["dataset"], datasets),
        "--validation": validation if old["use_tv_split"] else "none",
        "--augmentation": _one_of("augmentation", old["augmentation"], augmentations),
        "--image-size": None,
        "--batch-size": old["bs"],
        "--samples-per-class": old["samples_per_class"],
        "--workers": old["kernels"],
        "--backbone": _RESNET50 if backbone == "resnet50" else backbone,
        "--pretrained": "none" if old["not_pretrained"] else "imagenet",
        "--freeze-batchnorm": "frozen" in arch and backbone != "googlenet",
        "--normalize-output": "normalize" in arch,
        "--pooling": "avg+max" if "double" in arch and backbone == "bninception" else "avg",
        "--embed-dim": old["embed_dim"],
        "--epochs": old["n_epochs"],
        "--seed": old["seed"],
        "--optimizer": _one_of("optim", old["optim"], ("adam", "adamw", "sgd")),
        "--lr": old["lr"],
        "--embedding-lr": None if old["fc_lr"] < 0 else old["fc_lr"],
        "--weight-decay": old["decay"],
        "--warmup": old["warmup"],
        "--schedule": "constant" if constant else "step",
        "--clustering": any(
            "nmi" in metric or "f1" in metric for metric in old["evaluation_metrics"]
        ),
        "--storage-metric": old["storage_metrics"][0],
        "--amp": "float16" if old["use_float16"] else "none",
    }
    if not constant:
        wanted |= {"--milestones": tuple(old["tau"]), "--gamma": old["gamma"]}
    if old["use_tv_split"]:
        wanted["--train-share"] = old["tv_split_perc"]
    if len(old["storage_metrics"]) > 1:
        notes["storage_metrics"] = f"only the first, {old['storage_metrics'][0]}"
    if old["log_online"]:
        wanted |= {"--tracker": "wandb", "--project": old["project"]}
    if "gpu" in given:
        wanted["--device"] = f"cuda:{old['gpu'][0]}"
    if len(old["gpu"]) > 1:
        notes["gpu"] = "only the first, as in the released code; several: torchrun"
    if "source_path" in given:
        wanted["--data-root"] = old["source_path"]
    if given.keys() & {"savename", "save_path"}:
        name = given.get("savename", f"{old['group']}_s{old['seed']}")
        wanted["--out"] = f"{given.get('save_path', 'runs')}/{name}"
    return wanted


def _paper(
    name: str, loss: str, old: dict[str, Any], given: dict[str, Any], notes: dict[str, str]
) -> dict[str, Any]:
    """The losses of the paper."""

    def of(flag: str) -> Any:
        return old[f"loss_proxyvmf_{flag}"]

    if name == "proxyvmf" and of("rho") != 1:
        if of("rho") != 0.5:
            raise RunError(
                f"--loss_proxyvmf_rho is {of('rho')}, but el-vmf has 1 and b-vmf 0.5; others: "
                f"--loss nivmf_fast:VMFProductKernelLoss "
                f"--loss-options '{{\"rho\": {of('rho')}, ...}}'"
            )
        loss = "b-vmf"
    # There only a loss with proxyvmf in its name is warm-started and starts at larger norms.
    if "proxyvmf" not in name:
        for flag in ("warmstart", "init_norm_multiplier"):
            if f"loss_proxyvmf_{flag}" in given:
                notes[f"loss_proxyvmf_{flag}"] = (
                    f"honoured here; the released code ignores it for --loss {name}"
                )
    scaled = "proxyvmf" in name or "loss_proxyvmf_init_norm_multiplier" in given
    wanted = {
        "--loss": loss,
        "--concentration": of("concentration"),
        "--temperature": of("temp"),
        "--learn-temperature": True,
        "--proxy-lr-mult": of("proxylrmulti"),
        "--conc-lr-mult": of("conclrmulti"),
        "--temp-lr-mult": of("templrmulti"),
        "--warmstart": of("warmstart"),
        "--init-norm-multiplier": of("init_norm_multiplier") if scaled else None,
        "--negative-share": of("subsample_p"),
        "--bindev": of("bindev"),
    }
    if "resnet50" not in old["arch"]:
        wanted["--init-norm-multiplier"] = None
        if "loss_proxyvmf_init_norm_multiplier" in given:
            notes["loss_proxyvmf_init_norm_multiplier"] = "the released code scales resnet50 only"
    if loss == "el-nivmf":
        wanted |= {"--n-samples": of("n_samples"), "--guidance-weight": of("guidance_w")}
        for flag in ("pos_alpha", "neg_alpha", "pos_delta", "neg_delta", "mode"):
            if old[f"loss_oproxy_{flag}"] != FLAGS[f"loss_oproxy_{flag}"].default:
                notes[f"loss_oproxy_{flag}"] = "guidance has alpha 32, delta 0.1, sums over images"
    elif of("guidance_w"):
        notes["loss_proxyvmf_guidance_w"] = f"--loss {name} does not read it"
    if of("bindev"):
        wanted |= {
            "--bindev-alpha": of("bindev_alpha"),
            "--bindev-delta": of("bindev_delta"),
            "--bindev-axis": "classes" if of("bindev_dim") == 1 else "images",
        }
        notes["loss_proxyvmf_bindev"] = (
            "similarities are relative to the uniform density here, without the constant of "
            "log C_D, and delta is a margin on both sides"
        )
    return wanted


def _inherited(name: str, loss: str, old: dict[str, Any], notes: dict[str, str]) -> dict[str, Any]:
    """The losses and miners that come from pytorch-metric-learning."""

    def of(flag: str) -> Any:
        return old[f"loss_{name}_{flag}"]

    def multiple(flag: str) -> float:
        return float(f"{of(flag) / old['lr']:.12g}")

    wanted: dict[str, Any] = {}
    options: dict[str, Any] = {}
    match loss:
        case "proxy-anchor":
            options = {"alpha": of("pos_alpha"), "margin": of("pos_delta")}
            wanted["--proxy-lr-mult"] = of("lrmulti")
            if of("neg_alpha") != of("pos_alpha"):
                notes["loss_oproxy_neg_alpha"] = "one alpha for both: that of the positives"
            if of("neg_delta") != -of("pos_delta"):
                notes["loss_oproxy_neg_delta"] = "one margin for both: that of the positives"
        case "proxy-nca":
            options = {"softmax_scale": of("scale") ** 2}
            wanted["--proxy-lr-mult"] = of("lrmulti")
        case "normalized-softmax":
            options = {"temperature": of("temperature")}
            wanted["--proxy-lr-mult"] = multiple("lr")
        case "arcface":
            options = {"margin": math.degrees(of("angular_margin")), "scale": of("feature_scale")}
            wanted["--proxy-lr-mult"] = multiple("lr")
        case "soft-triple":
            names = ("n_centroids", "lambda", "gamma", "margin_delta", "reg_weight")
            options = dict(zip(LOSSES[loss].defaults, map(of, names), strict=True))
            wanted["--proxy-lr-mult"] = of("lrmulti")
        case "margin":
            options = {key: of(key) for key in ("margin", "nu", "beta")}
            options["learn_beta"] = not of("beta_constant")
            wanted["--proxy-lr-mult"] = multiple("beta_lr")
        case "triplet":
            options = {"margin": of("margin")}
        case "contrastive":
            options = {key: of(key) for key in ("pos_margin", "neg_margin")}
        case "multi-similarity":
            options = {"alpha": of("pos_weight"), "beta": of("neg_weight"), "base": of("thresh")}
            wanted["--miner"] = "multi-similarity"
            wanted["--miner-options"] = _changed(MINERS, "multi-similarity", epsilon=of("margin"))
        case "lifted":
            options = {"neg_margin": of("neg_margin"), "embedding_reg_weight": of("l2")}
        case "n-pair":
            options = {"embedding_reg_weight": of("l2")}
        case "angular":
            options = {"alpha": of("alpha")}
        case "snr":
            options = {"margin": of("margin"), "embedding_reg_weight": of("reg_lambda")}
            if old["batch_mining"] == "distance":  # which switches it off there
                options["embedding_reg_weight"] = 0.0
    wanted["--loss-options"] = _changed(LOSSES, loss, **options)
    if loss in _MINED:
        mining = _one_of("batch_mining", old["batch_mining"], MINER_NAMES)
        miner, lost = MINER_NAMES[mining]
        wanted["--miner"] = miner
        if lost:
            notes["batch_mining"] = f"{mining} is {miner} here: {lost}"
        if miner == "distance-weighted":
            prefix = "miner_rho_distance" if mining == "rho_distance" else "miner_distance"
            cutoffs = old[f"{prefix}_lower_cutoff"], old[f"{prefix}_upper_cutoff"]
            changed = _changed(MINERS, miner, cutoff=cutoffs[0], nonzero_loss_cutoff=cutoffs[1])
            wanted["--miner-options"] = changed
        elif miner == "semihard" and "margin" in options:
            wanted["--miner-options"] = _changed(MINERS, miner, margin=options["margin"])
    return wanted


def _changed(known: dict[str, Any], name: str, **options: Any) -> str:
    """The options that differ from the defaults, as JSON."""
    defaults = known[name].defaults
    return json.dumps({key: v for key, v in options.items() if v != defaults[key]})


def _one_of(flag: str, value: str, known: Any) -> str:
    if value not in known:
        hint = nearest(value, known) or f": it knows {', '.join(known)}"
        raise RunError(f"the released code has no --{flag} {value}{hint}")
    return value


def _written(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([flag, *map(_word, values)])


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = str(value)
    return f'"{text}"' if "$" in text and '"' not in text else shlex.quote(text)
