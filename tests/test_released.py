"""Command lines of the released code, translated: to the presets, and to flags that parse."""

import math
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("pytorch_metric_learning")

from train.cli import parse
from train.config import Config, RunError, by_flag
from train.losses import build_loss
from train.presets import PRESETS
from train.released import FLAGS, LOSS_NAMES, MINER_NAMES, table, translate

DOCS = Path(__file__).parent.parent / "docs" / "migrating.md"
ENVIRONMENT = {"--preset", "--out", "--data-root", "--device", "--tracker", "--project"}
COMMON = (
    "--seed 0 --gpu $gpu --source_path $parent_folder --project $project --log_online "
    "--no_train_metrics"
)
_PANC = "--loss proxyvmf_panc --loss_proxyvmf_temp 0.003 --loss_proxyvmf_templrmulti 200 "
_PANC += "--loss_proxyvmf_warmstart --loss_proxyvmf_n_samples 5 "
_DISTANCE = "--dataset cub200 --n_epochs 50 --bs 106 --gamma 0 --embed_dim 512 "
_DISTANCE += "--loss_proxyvmf_proxylrmulti 5000 --loss_proxyvmf_conclrmulti 50000 "
_DISTANCE += "--loss_proxyvmf_init_norm_multiplier 150 --loss_proxyvmf_templrmulti 500 "
_DISTANCE += "--loss_proxyvmf_warmstart "
RELEASED_RUNS = {  # flag by flag as released
    "cub200-r50-128": _PANC
    + "--dataset cub200 --n_epochs 250 --tau 25 50 --gamma 0.3 --embed_dim 128 "
    "--loss_proxyvmf_proxylrmulti 5000 --loss_proxyvmf_conclrmulti 20000 "
    "--loss_proxyvmf_concentration 6 --loss_proxyvmf_init_norm_multiplier 30 "
    "--loss_proxyvmf_guidance_w 3",
    "cub200-r50-512": _PANC
    + "--dataset cub200 --n_epochs 250 --tau 31 --gamma 0.1 --embed_dim 512 "
    "--loss_proxyvmf_proxylrmulti 5000 --loss_proxyvmf_conclrmulti 20000 "
    "--loss_proxyvmf_concentration 18 --loss_proxyvmf_init_norm_multiplier 50 "
    "--loss_proxyvmf_guidance_w 5",
    "cars196-r50-128": _PANC
    + "--dataset cars196 --n_epochs 300 --tau 60 80 --gamma 0.1 --embed_dim 128 "
    "--loss_proxyvmf_proxylrmulti 7500 --loss_proxyvmf_conclrmulti 7500 "
    "--loss_proxyvmf_concentration 9 --loss_proxyvmf_init_norm_multiplier 12 "
    "--loss_proxyvmf_guidance_w 0.3",
    "cars196-r50-512": _PANC
    + "--dataset cars196 --n_epochs 300 --tau 105 170 --gamma 0.2 --embed_dim 512 "
    "--loss_proxyvmf_proxylrmulti 5000 --loss_proxyvmf_conclrmulti 20000 "
    "--loss_proxyvmf_concentration 22 --loss_proxyvmf_init_norm_multiplier 10 "
    "--loss_proxyvmf_guidance_w 0.1",
    "cub200-distance-el-nivmf": _DISTANCE
    + "--loss proxyvmf_panc --loss_proxyvmf_concentration 50 --loss_proxyvmf_temp 1 "
    "--loss_proxyvmf_n_samples 10 --loss_proxyvmf_guidance_w 0",
    "cub200-distance-el-vmf": _DISTANCE
    + "--loss proxyvmf --loss_proxyvmf_rho 1 --loss_proxyvmf_concentration 10 "
    "--loss_proxyvmf_temp 1",
    "cub200-distance-b-vmf": _DISTANCE
    + "--loss proxyvmf --loss_proxyvmf_rho 0.5 --loss_proxyvmf_concentration 10 "
    "--loss_proxyvmf_temp 1",
    "cub200-distance-kl-vmf": _DISTANCE
    + "--loss proxyvmf_kl --loss_proxyvmf_concentration 10 --loss_proxyvmf_temp 1",
    "cub200-distance-nivmf": _DISTANCE
    + "--loss proxynca_nivmf --loss_proxyvmf_concentration 10 --loss_proxyvmf_temp 0.03125",
    "cub200-distance-l2": _DISTANCE
    + "--loss proxynca_l2 --loss_proxyvmf_concentration 200 --loss_proxyvmf_temp 1",
    "cub200-distance-cos": _DISTANCE
    + "--loss proxynca_cos --loss_proxyvmf_concentration 10 --loss_proxyvmf_temp 0.00390625",
}


def lines(command: str) -> tuple[list[str], str]:
    *comments, last = translate(command).splitlines()
    assert all(line.startswith("# --") for line in comments)
    return comments, last


def parsed(command: str) -> Config:
    words = shlex.split(lines(command)[1])
    assert words[:3] == ["python", "-m", "train"]
    return parse(words[3:], PRESETS)


def changed(command: str) -> dict[str, object]:
    """The differences between the translated command and its preset."""
    config = parsed(command)
    preset = by_flag(PRESETS[config.preset])
    return {flag: v for flag, v in by_flag(config).items() if v != preset[flag]}


@pytest.mark.parametrize("preset", RELEASED_RUNS)
def test_the_released_runs_are_the_presets(preset: str) -> None:
    """Field by field, apart from data folder, device, output and tracker."""
    config = parsed(f"python main.py {COMMON} {RELEASED_RUNS[preset]}")
    assert config.preset == preset
    released, shipped = asdict(config), asdict(PRESETS[preset])
    for part in ("model", "loss", "optim"):
        assert released[part] == shipped[part]
    values, expected = by_flag(config), by_flag(PRESETS[preset])
    different = {flag for flag, value in values.items() if value != expected[flag]}
    assert different == {"--out", "--data-root", "--device", "--tracker", "--project"}
    assert different < ENVIRONMENT
    assert (config.device, config.tracker, config.project) == ("cuda:$gpu", "wandb", "$project")
    assert config.data.data_root == Path("$parent_folder")


def test_every_released_run_is_a_preset_and_the_others_are_this_projects() -> None:
    assert set(PRESETS) - set(RELEASED_RUNS) >= {"glyphs", "sop-r50-128", "sop-r50-512"}
    assert set(RELEASED_RUNS) <= set(PRESETS)


def test_the_command_of_the_released_readme_leaves_out_a_flag() -> None:
    run = RELEASED_RUNS["cars196-r50-128"] + " --seed 0"
    run = run.replace("--loss_proxyvmf_init_norm_multiplier 12 ", "")
    comments, last = lines(run)
    assert comments == []
    assert last == "python -m train --preset cars196-r50-128 --init-norm-multiplier 100"


def test_lines_continued_as_in_the_released_examples_are_read() -> None:
    for end in (
        "cub200 \\\n--bs 106",
        "cub200\\\n--bs 106",
        "cub200\\ \n--bs 106",
        "cub200 --bs 106",
    ):
        config = parsed(f"python main.py --loss proxynca_cos --dataset {end}  # a comment")
        assert (config.data.name, config.data.batch_size) == ("cub200", 106)


def test_shell_variables_stay() -> None:
    last = lines("python main.py --gpu $gpu --source_path $data/sets --seed $seed")[1]
    assert '--device "cuda:$gpu"' in last
    assert '--data-root "$data/sets"' in last and '--seed "$seed"' in last


def test_released_defaults_are_spelled_out() -> None:
    config = parsed("python main.py")
    assert (config.data.name, config.data.batch_size, config.data.workers) == ("cars196", 64, 6)
    assert (config.epochs, config.seed, config.optim.schedule) == (150, 1, "constant")
    assert (config.loss.name, config.loss.temperature, config.loss.warmstart) == (
        *("el-vmf", 0.01),
        False,
    )
    assert config.model.freeze_batchnorm and not config.model.normalize_output
    assert config.model.init_norm_multiplier == 100 and config.model.embed_dim == 512
    optim = config.optim
    assert (optim.proxy_lr_mult, optim.conc_lr_mult, optim.temp_lr_mult) == (5000, 50000, 500)


def test_every_option_arrives() -> None:
    config = parsed(
        "CUDA_VISIBLE_DEVICES=1 python main.py --loss proxyvmf_panc --dataset online_products "
        "--use_tv_split --tv_split_by_samples --tv_split_perc 0.8 --augmentation adv --lr 2e-5 "
        "--fc_lr 1e-3 --decay 1e-3 --n_epochs 40 --kernels 3 --bs 32 --seed 7 --gamma 0.5 "
        "--tau 10 20 --optim sgd --warmup 2 --embed_dim 64 --arch bninception_frozen_double "
        "--storage_metrics e_recall@1 --gpu 2 --save_path here --savename run --use_float16 "
        "--samples_per_class 4 --evaluation_metrics c_recall@1 --loss_proxyvmf_bindev "
        "--loss_proxyvmf_bindev_dim 1 --loss_proxyvmf_bindev_alpha 2 "
        "--loss_proxyvmf_bindev_delta 0.5 --loss_proxyvmf_subsample_p 0.25"
    )
    data, model, loss, optim = config.data, config.model, config.loss, config.optim
    assert (data.name, data.validation, data.train_share) == ("online_products", "samples", 0.8)
    assert (data.augmentation, data.workers, data.batch_size) == ("adv", 3, 32)
    assert data.samples_per_class == 4
    assert (model.backbone, model.pooling, model.embed_dim) == ("bninception", "avg+max", 64)
    assert model.freeze_batchnorm and model.init_norm_multiplier is None
    assert (optim.lr, optim.embedding_lr, optim.weight_decay) == (2e-5, 1e-3, 1e-3)
    assert (optim.optimizer, optim.warmup, optim.amp) == ("sgd", 2, "float16")
    assert (optim.schedule, optim.milestones, optim.gamma) == ("step", (10, 20), 0.5)
    assert (config.epochs, config.seed, config.device) == (40, 7, "cuda:2")
    assert (config.storage_metric, config.clustering) == ("e_recall@1", False)
    assert config.out == Path("here/run")
    assert loss.bindev and loss.bindev_axis == "classes" and loss.negative_share == 0.25
    assert (loss.bindev_alpha, loss.bindev_delta) == (2.0, 0.5)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_released_loss_becomes_one_that_builds(name: str) -> None:
    if not LOSS_NAMES[name]:
        with pytest.raises(RunError, match=f"--loss {name} has no counterpart"):
            translate(f"python main.py --loss {name}")
        return
    config = parsed(f"python main.py --loss {name}")
    assert config.loss.name == LOSS_NAMES[name]
    # the defaults here are the released ones; its distance miner switches a penalty of snr off
    assert config.loss.loss_options == ('{"embedding_reg_weight": 0.0}' if name == "snr" else "{}")
    assert config.loss.miner_options == "{}"
    build_loss(config.loss, 6, 8)


@pytest.mark.parametrize("miner", MINER_NAMES)
def test_every_released_miner_becomes_one_that_builds(miner: str) -> None:
    config = parsed(f"python main.py --loss triplet --batch_mining {miner}")
    assert config.loss.miner == MINER_NAMES[miner][0]
    build_loss(config.loss, 6, 8)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("proxynca --loss_proxynca_scale 2", {"--loss-options": '{"softmax_scale": 4.0}'}),
        ("arcface --loss_arcface_lr 0.001", {"--proxy-lr-mult": 100.0}),
        (
            "arcface --loss_arcface_angular_margin 0.25",
            {"--loss-options": f'{{"margin": {math.degrees(0.25)}}}'},
        ),
        ("softmax", {"--proxy-lr-mult": 1.0}),
        ("oproxy --loss_oproxy_lrmulti 900", {"--proxy-lr-mult": 900.0}),
        ("margin --loss_margin_beta_constant", {"--loss-options": '{"learn_beta": false}'}),
        (
            "softtriplet --loss_softtriplet_lambda 20 --loss_softtriplet_n_centroids 5",
            {"--loss-options": '{"centers_per_class": 5, "la": 20.0}'},
        ),
        (
            "triplet --batch_mining semihard --loss_triplet_margin 0.3",
            {"--miner-options": '{"margin": 0.3}', "--loss-options": '{"margin": 0.3}'},
        ),
        (
            "snr --miner_distance_upper_cutoff 1.2",
            {
                "--miner-options": '{"nonzero_loss_cutoff": 1.2}',
                "--loss-options": '{"embedding_reg_weight": 0.0}',
            },
        ),
        (
            "multisimilarity --loss_multisimilarity_margin 0.2",
            {"--miner": "multi-similarity", "--miner-options": '{"epsilon": 0.2}'},
        ),
    ],
)
def test_options_of_inherited_losses_arrive(flags: str, expected: dict[str, object]) -> None:
    result = changed(f"python main.py --loss {flags}")
    assert {flag: result[flag] for flag in expected} == expected
    build_loss(parsed(f"python main.py --loss {flags}").loss, 6, 8)


@pytest.mark.parametrize(
    ("flags", "comment"),
    [
        ("--data_sampler d2_coreset", "# --data_sampler: no counterpart: batches are always"),
        ("--evaltypes a b", "# --evaltypes: no counterpart: a network has one embedding"),
        ("--loss_proxyvmf_mode old", "# --loss_proxyvmf_mode: no counterpart: one of two fits"),
        ("--loss_triplet_margin 1", "# --loss_triplet_margin: --loss proxyvmf does not read it"),
        ("--loss_proxyvmf_guidance_w 1", "# --loss_proxyvmf_guidance_w: --loss proxyvmf does not"),
        ("--loss_proxyvmf_bindev", "# --loss_proxyvmf_bindev: similarities are relative to the"),
        ("--storage_metrics nmi f1", "# --storage_metrics: only the first, nmi"),
        ("--gpu 0 1", "# --gpu: only the first"),
        (
            "--loss proxynca_l2 --loss_proxyvmf_warmstart",
            "# --loss_proxyvmf_warmstart: honoured here; the released code ignores it",
        ),
        ("--loss triplet --batch_mining random", "# --batch_mining: random is none here: all"),
    ],
)
def test_what_cannot_be_honoured_is_a_comment(flags: str, comment: str) -> None:
    (line,) = lines(f"python main.py {flags}")[0]
    assert line.startswith(comment)
    parsed(f"python main.py {flags}")


@pytest.mark.parametrize(
    "flags", ["--no_train_metrics", "--wandb_key secret", "--loss_proxyvmf_prenorm", "--kernels 6"]
)
def test_what_is_not_needed_is_left_out(flags: str) -> None:
    assert translate(f"python main.py {flags}") == translate("python main.py")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--los cub", r"ambiguous option: --los"),
        ("--n_epoch_s 3", r"the released code has no flag --n_epoch_s \(did you mean --n_epochs"),
        ("--dataset cup200", r"has no --dataset cup200 \(did you mean cub200\?\)"),
        ("--loss proxyvfm", r"has no --loss proxyvfm \(did you mean proxyvmf"),
        ("--loss snr --batch_mining distanc", r"--batch_mining distanc \(did you mean distance"),
        ("--optim lion", "has no --optim lion: it knows adam, adamw, sgd"),
        ("--arch vgg", "--arch is 'vgg', but must name resnet50, googlenet or bninception"),
        ("--bs many", "argument --bs: invalid int value: 'many'"),
        ("--project 'a", "No closing quotation"),
        ("--loss_proxyvmf_rho 0.7", "--loss_proxyvmf_rho is 0.7, but el-vmf has 1 and b-vmf 0.5"),
        ("\npython main.py --bs 4", "one command at a time"),
    ],
)
def test_wrong_commands_are_one_clear_line(command: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        translate(f"python main.py {command}")
    assert "\n" not in str(caught.value)


# --- docs/migrating.md


def test_the_page_has_every_released_flag() -> None:
    assert len(FLAGS) == 123
    assert table() in DOCS.read_text(encoding="utf-8")


def test_the_page_has_every_released_loss_and_miner() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| `")]
    pairs = {
        (name, there)
        for names, theirs in rows
        for name in re.findall(r"`([\w-]+)`", names)
        for there in re.findall(r"[\w-]+", theirs)
    }
    assert {(name, there or "none") for name, there in LOSS_NAMES.items()} <= pairs
    assert {(name, there) for name, (there, _) in MINER_NAMES.items()} <= pairs


def test_every_option_on_the_page_exists() -> None:
    text = DOCS.read_text(encoding="utf-8")
    ours = {*by_flag(Config()), "--from-released", "--help"}
    ours |= {f"--no-{flag[2:]}" for flag, v in by_flag(Config()).items() if isinstance(v, bool)}
    released = {f"--{name}" for name in FLAGS}
    assert set(re.findall(r"--[a-z][\w-]*", text)) <= ours | released
    for row in table().splitlines()[2:]:  # the third column is of this project alone
        assert set(re.findall(r"--[a-z][\w-]*", row.split("|")[3])) <= ours
