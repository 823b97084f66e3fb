"""Translate command lines of the paper's released code: `python -m train --from-released "..."`.

Its flags, with their defaults there and what they are here, are the table of docs/migrating.md.
"""

import argparse
import json
import math
import re
import shlex
from typing import Any, NamedTuple, NoReturn

from train.config import RunError, by_flag, nearest
from train.losses import LOSSES, MINERS
from train.presets import PRESETS


class Flag(NamedTuple):
    """A flag of the released code; a default of False is a switch, a list takes several values."""

    default: Any
    here: str  # Markdown: the option, or why there is none


_UNREAD = "not needed: the released code never reads it"
_SAMPLER = "no counterpart: batches are always class-balanced"
_SAMPLER_UNREAD = f"{_SAMPLER}; the released code never reads it"
_NO_LOSS = "no counterpart: pytorch-metric-learning has no such loss"
_ALL_METRICS = "not needed: all metrics are computed"

FLAGS: dict[str, Flag] = {
    # data
    "dataset": Flag("cars196", "`--dataset`"),
    "use_tv_split": Flag(
        False, "`--validation class`; that part is then evaluated instead of the test classes"
    ),
    "tv_split_by_samples": Flag(False, "`--validation samples`"),
    "tv_split_perc": Flag(0.7, "`--train-share`"),
    "augmentation": Flag("base", "`--augmentation`"),
    # training
    "lr": Flag(1e-5, "`--lr`"),
    "fc_lr": Flag(-1.0, "`--embedding-lr`; -1 is `None`"),
    "decay": Flag(4e-4, "`--weight-decay`"),
    "n_epochs": Flag(150, "`--epochs`"),
    "kernels": Flag(6, "`--workers`"),
    "bs": Flag(64, "`--batch-size`"),
    "seed": Flag(1, "`--seed`; several runs at once: `--seeds`"),
    "scheduler": Flag("step", "`--schedule`: `step`, or `constant` for none"),
    "gamma": Flag(0.3, "`--gamma`"),
    "tau": Flag([1000], "`--milestones`; `--schedule constant` if none is within the epochs"),
    "optim": Flag("adam", "`--optimizer`"),
    "loss": Flag("proxyvmf", "`--loss`, see the table below"),
    "batch_mining": Flag("distance", "`--miner`, see the table below"),
    "warmup": Flag(0, "`--warmup`; the loss's own parameters are trained in it too, as there"),
    # network
    "embed_dim": Flag(512, "`--embed-dim`"),
    "not_pretrained": Flag(False, "`--pretrained none` (there for ResNet-50 only)"),
    "arch": Flag(
        "resnet50_frozen",
        "`--backbone`, with `--freeze-batchnorm` for `_frozen`, `--normalize-output` for "
        "`_normalize`, `--pooling avg+max` for `_double`",
    ),
    # evaluation
    "no_train_metrics": Flag(False, "not needed: the training images are not evaluated"),
    "evaluate_on_gpu": Flag(False, "not needed: metrics are computed where the network is"),
    "evaluation_metrics": Flag(
        [
            *("c_recall@1", "c_recall@2", "e_recall@1", "e_recall@2", "e_recall@4"),
            *("c_nmi", "nmi", "f1", "mAP_1000", "c_mAP_1000", "c_f1"),
        ],
        f"{_ALL_METRICS}; without NMI and F1: `--no-clustering`",
    ),
    "storage_metrics": Flag(["c_recall@1"], "`--storage-metric`, one"),
    "evaltypes": Flag(["discriminative"], "no counterpart: a network has one embedding"),
    # set-up
    "gpu": Flag([0], "`--device cuda:N`, one; several: `torchrun`"),
    "savename": Flag("group_plus_seed", "`--out`"),
    "source_path": Flag("path_to_training_data", "`--data-root`"),
    "save_path": Flag("Training_Results", "`--out`"),
    "use_float16": Flag(False, "`--amp float16`"),
    "log_online": Flag(False, "`--tracker wandb`"),
    "wandb_key": Flag("", "not needed: `wandb login` once, outside of command lines"),
    "project": Flag("benchmark_cars196", "`--project`"),
    "group": Flag("proxyvmf_panc", "not needed: a folder is named after its preset, or by `--out`"),
    # inherited losses
    "loss_contrastive_pos_margin": Flag(0.0, "`--loss-options`: pos_margin"),
    "loss_contrastive_neg_margin": Flag(1.0, "`--loss-options`: neg_margin"),
    "loss_triplet_margin": Flag(0.2, "`--loss-options`: margin"),
    "loss_margin_margin": Flag(0.2, "`--loss-options`: margin"),
    "loss_margin_beta_lr": Flag(5e-4, "`--proxy-lr-mult`, as a multiple of `--lr`"),
    "loss_margin_beta": Flag(1.2, "`--loss-options`: beta"),
    "loss_margin_nu": Flag(0.0, "`--loss-options`: nu"),
    "loss_margin_beta_constant": Flag(False, "`--loss-options`: learn_beta, false"),
    "loss_proxynca_lrmulti": Flag(50.0, "`--proxy-lr-mult`"),
    "loss_proxynca_scale": Flag(3.0, "`--loss-options`: softmax_scale, its square"),
    "loss_proxynca_dim": Flag(1, "no counterpart: sums run over the proxies of an image, as for 1"),
    "loss_oproxy_lrmulti": Flag(2000.0, "`--proxy-lr-mult`"),
    "loss_oproxy_lrmulti_hyper": Flag(2000.0, _UNREAD),
    "loss_oproxy_pos_alpha": Flag(32.0, "`--loss-options`: alpha"),
    "loss_oproxy_neg_alpha": Flag(32.0, "`--loss-options`: alpha, the same for both"),
    "loss_oproxy_pos_delta": Flag(0.1, "`--loss-options`: margin"),
    "loss_oproxy_neg_delta": Flag(-0.1, "`--loss-options`: margin, the same for both"),
    "loss_oproxy_proxy_div": Flag(8.0, _UNREAD),
    "loss_oproxy_init_dev": Flag(0.0, _UNREAD),
    "loss_oproxy_mode": Flag("anchor", "no counterpart: sums run over the images of a class"),
    "loss_oproxy_euclidean": Flag(False, "no counterpart: proxy-anchor compares cosines"),
    "loss_oproxy_detach_proxies": Flag(False, "no counterpart; `--proxy-lr-mult 0` is near"),
    "loss_oproxy_unique": Flag(False, "not needed: every class counts once"),
    # the paper's losses
    "loss_proxyvmf_guidance_w": Flag(0.0, "`--guidance-weight`"),
    "loss_proxyvmf_proxylrmulti": Flag(5000.0, "`--proxy-lr-mult`"),
    "loss_proxyvmf_conclrmulti": Flag(50000.0, "`--conc-lr-mult`"),
    "loss_proxyvmf_templrmulti": Flag(500.0, "`--temp-lr-mult`"),
    "loss_proxyvmf_concentration": Flag(10.0, "`--concentration`"),
    "loss_proxyvmf_rho": Flag(1.0, "`--loss el-vmf` for 1, `--loss b-vmf` for 0.5"),
    "loss_proxyvmf_warmstart": Flag(False, "`--warmstart`"),
    "loss_proxyvmf_learnable_temp": Flag(
        True, "`--learn-temperature`; there it cannot be switched off"
    ),
    "loss_proxyvmf_temp": Flag(0.01, "`--temperature`"),
    "loss_proxyvmf_n_samples": Flag(20, "`--n-samples`"),
    "loss_proxyvmf_init_norm_multiplier": Flag(100.0, "`--init-norm-multiplier`"),
    "loss_proxyvmf_bindev": Flag(False, "`--bindev`"),
    "loss_proxyvmf_bindev_dim": Flag(0, "`--bindev-axis`: `images` for 0, `classes` for 1"),
    "loss_proxyvmf_bindev_alpha": Flag(1.0, "`--bindev-alpha`"),
    "loss_proxyvmf_bindev_delta": Flag(0.0, "`--bindev-delta`, which is a margin on both sides"),
    "loss_proxyvmf_prenorm": Flag(False, _UNREAD),
    "loss_proxyvmf_mode": Flag(
        "new", "no counterpart: one of two fits of log C_D; see `--normalizer` below"
    ),
    "loss_proxyvmf_loss": Flag("base", _UNREAD),
    "loss_proxyvmf_subsample_p": Flag(1.0, "`--negative-share`"),
    # inherited losses again
    "loss_npair_l2": Flag(0.005, "`--loss-options`: embedding_reg_weight"),
    "loss_angular_alpha": Flag(45.0, "`--loss-options`: alpha"),
    "loss_angular_npair_ang_weight": Flag(
        2.0, "no counterpart: `--loss angular` is without an N-pair loss beside it"
    ),
    "loss_angular_npair_l2": Flag(
        0.005, "no counterpart: `--loss angular` is without an N-pair loss beside it"
    ),
    "loss_multisimilarity_pos_weight": Flag(2.0, "`--loss-options`: alpha"),
    "loss_multisimilarity_neg_weight": Flag(40.0, "`--loss-options`: beta"),
    "loss_multisimilarity_margin": Flag(
        0.1, "`--miner-options`: epsilon, of `--miner multi-similarity`"
    ),
    "loss_multisimilarity_thresh": Flag(0.5, "`--loss-options`: base"),
    "loss_lifted_neg_margin": Flag(1.0, "`--loss-options`: neg_margin"),
    "loss_lifted_l2": Flag(0.005, "`--loss-options`: embedding_reg_weight"),
    "loss_quadruplet_margin_alpha_1": Flag(0.2, _NO_LOSS),
    "loss_quadruplet_margin_alpha_2": Flag(0.2, _NO_LOSS),
    "loss_softtriplet_n_centroids": Flag(2, "`--loss-options`: centers_per_class"),
    "loss_softtriplet_margin_delta": Flag(0.01, "`--loss-options`: margin"),
    "loss_softtriplet_gamma": Flag(0.1, "`--loss-options`: gamma"),
    "loss_softtriplet_lambda": Flag(8.0, "`--loss-options`: la"),
    "loss_softtriplet_reg_weight": Flag(0.2, "`--loss-options`: weight_reg_weight"),
    "loss_softtriplet_lrmulti": Flag(1.0, "`--proxy-lr-mult`"),
    "loss_softmax_lr": Flag(1e-5, "`--proxy-lr-mult`, as a multiple of `--lr`"),
    "loss_softmax_temperature": Flag(0.05, "`--loss-options`: temperature"),
    "loss_histogram_nbins": Flag(
        65, "no counterpart by name: give `--loss` a factory around its HistogramLoss"
    ),
    "loss_snr_margin": Flag(0.2, "`--loss-options`: margin"),
    "loss_snr_reg_lambda": Flag(0.005, "`--loss-options`: embedding_reg_weight"),
    "loss_arcface_lr": Flag(5e-4, "`--proxy-lr-mult`, as a multiple of `--lr`"),
    "loss_arcface_angular_margin": Flag(0.5, "`--loss-options`: margin, in degrees"),
    "loss_arcface_feature_scale": Flag(16.0, "`--loss-options`: scale"),
    "temp_ned": Flag(0.1, "no counterpart: the vote of neighbours has no temperature"),
    # miners
    "miner_distance_lower_cutoff": Flag(0.5, "`--miner-options`: cutoff"),
    "miner_distance_upper_cutoff": Flag(
        1.4, "`--miner-options`: nonzero_loss_cutoff; there it is read and never applied"
    ),
    "miner_rho_distance_lower_cutoff": Flag(0.5, "`--miner-options`: cutoff"),
    "miner_rho_distance_upper_cutoff": Flag(1.4, "`--miner-options`: nonzero_loss_cutoff"),
    "miner_rho_distance_cp": Flag(0.2, "no counterpart: no positives in the place of negatives"),
    # batches
    "data_sampler": Flag("class_random", _SAMPLER),
    "samples_per_class": Flag(2, "`--samples-per-class`"),
    "data_batchmatch_bigbs": Flag(512, _SAMPLER),
    "data_batchmatch_ncomps": Flag(10, _SAMPLER),
    "data_storage_no_update": Flag(False, _SAMPLER),
    "data_d2_coreset_lambda": Flag(1.0, _SAMPLER),
    "data_gc_coreset_lim": Flag(1e-9, _SAMPLER),
    "data_sampler_lowproj_dim": Flag(-1, _SAMPLER),
    "data_sim_measure": Flag("euclidean", _SAMPLER_UNREAD),
    "data_gc_softened": Flag(False, _SAMPLER),
    "data_idx_full_prec": Flag(False, _SAMPLER),
    "data_mb_mom": Flag(-1.0, _SAMPLER_UNREAD),
    "data_mb_lr": Flag(1.0, _SAMPLER_UNREAD),
}

# Released name -> name here; "" where there is none. proxynca_kl is what the released registry
# calls the loss that its examples call proxyvmf_kl.
LOSS_NAMES = {
    "proxyvmf_panc": "el-nivmf",
    "proxyvmf": "el-vmf",
    "proxyvmf_kl": "kl-vmf",
    "proxynca_kl": "kl-vmf",
    "proxynca_nivmf": "nivmf",
    "proxynca_l2": "l2",
    "proxynca_cos": "cos",
    "oproxy": "proxy-anchor",
    "proxynca": "proxy-nca",
    "softmax": "normalized-softmax",
    "arcface": "arcface",
    "softtriplet": "soft-triple",
    "triplet": "triplet",
    "margin": "margin",
    "contrastive": "contrastive",
    "multisimilarity": "multi-similarity",
    "lifted": "lifted",
    "npair": "n-pair",
    "angular": "angular",
    "snr": "snr",
    "quadruplet": "",
    "histogram": "",
    "adversarial_separation": "",
}
MINER_NAMES = {  # and what is lost
    "distance": ("distance-weighted", ""),
    "semihard": ("semihard", ""),
    "softhard": ("hard", "hard takes every triplet that violates the order, not one of each image"),
    "random": ("none", "all triplets of the batch in the place of random ones"),
    "npair": ("none", ""),  # the losses that take it form these tuples themselves
    "lifted": ("none", ""),
    "rho_distance": ("distance-weighted", "no positives in the place of negatives"),
    "random_distance": ("distance-weighted", "labels are not shuffled"),
    "intra_random": ("none", "no tuples of one class"),
    "parametric": ("none", "it reads flags that the released parser does not have"),
}
_RESNET50 = PRESETS["cub200-r50-128"].model.backbone  # with the weights meant
_MINED = ("triplet", "margin", "contrastive", "snr")


def translate(command: str) -> str:
    """The equivalent `python -m train ...`, after a comment line for what cannot be had.

    It starts from the preset that is nearest and spells out the rest.

    Raises:
        RunError: unknown flags and values, a loss that has no counterpart.
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


def table() -> str:
    """The Markdown table of all flags."""
    rows = ["| released | its default | here |", "|---|---|---|"]
    for name, flag in FLAGS.items():
        values = flag.default if isinstance(flag.default, list) else [flag.default]
        default = " ".join(
            ("on" if v else "off") if isinstance(v, bool) else v if isinstance(v, str) else f"{v:g}"
            for v in values
        )
        rows.append(f"| `--{name}` | {default} | {flag.here} |")
    return "\n".join(rows)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RunError(f"the released code's command line: {message}")


def _parse(command: str) -> dict[str, Any]:
    """The flags given, with their values."""
    try:  # a backslash before the line's end, even with a space after it or none before
        words = shlex.split(re.sub(r"\\[ \t]*(\n|$)", " ", command), comments=True)
    except ValueError as error:
        raise RunError(f"the released code's command line: {error}") from None
    starts = [i for i, word in enumerate(words) if word.endswith("main.py")]
    if len(starts) > 1:
        raise RunError("the released code's command line: one command at a time, please")
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
            parser.add_argument(f"--{name}", type=_or_variable if variable else kind, **options)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        hint = nearest(unknown[0], [f"--{name}" for name in FLAGS])
        raise RunError(f"the released code has no flag {unknown[0]}{hint}")
    return vars(given)


def _or_variable(text: str) -> int | str:
    """A number, or a variable of the shell, which the translation keeps."""
    return text if text.startswith("$") else int(text)


def _wanted(old: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that matter, by this project's flags, and notes by the released ones."""
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
    """Of the flags that a released loss reads."""
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
        notes["arch"] = "no counterpart for _he: the embedding layer starts as PyTorch has it"
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
    """As JSON, the options that are not the default."""
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
