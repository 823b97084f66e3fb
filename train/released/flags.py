"""The flags, losses and miners of the paper's released code, and their counterparts here."""

from typing import Any, NamedTuple


class Flag(NamedTuple):
    """A flag of the released code; one with default False is a switch, a list takes several."""

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
    "loss_oproxy_detach_proxies": Flag(False, "no counterpart; `--proxy-lr-mult 0` comes close"),
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
        2.0, "no counterpart: `--loss angular` has no added N-pair loss"
    ),
    "loss_angular_npair_l2": Flag(
        0.005, "no counterpart: `--loss angular` has no added N-pair loss"
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
    "miner_rho_distance_cp": Flag(0.2, "no counterpart: positives never stand in for negatives"),
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
MINER_NAMES = {  # released name: (name here, what is lost)
    "distance": ("distance-weighted", ""),
    "semihard": ("semihard", ""),
    "softhard": ("hard", "hard takes every triplet that violates the order, not one per image"),
    "random": ("none", "all triplets of the batch instead of random ones"),
    "npair": ("none", ""),  # the losses that take it form these tuples themselves
    "lifted": ("none", ""),
    "rho_distance": ("distance-weighted", "positives never stand in for negatives"),
    "random_distance": ("distance-weighted", "labels are not shuffled"),
    "intra_random": ("none", "no tuples within one class"),
    "parametric": ("none", "it reads flags that the released parser lacks"),
}


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
