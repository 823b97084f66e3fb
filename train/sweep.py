"""Compare losses: tune each with equal effort, then run it with several seeds."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from nivmf_fast.losses import PAPER_LOSSES
from train import compare
from train.config import Config, Diverged, RunError, SweepConfig, nearest
from train.loop import train
from train.presets import PRESETS
from train.report import REPORT
from train.run_folder import RunFolder, read_metrics

METRIC = "c_recall@1"
TUNING_SEED = 1000  # of the trials; the final runs have others


@dataclass(frozen=True)
class Candidate:
    """A loss, and the ranges from which its settings are drawn, log-uniformly."""

    loss: str
    temperature: tuple[float, float]
    concentration: tuple[float, float] = (4.0, 64.0)
    init_norm: tuple[float, float] = (4.0, 64.0)
    lr: tuple[float, float] = (1e-3, 6e-3)
    max_norm: float | None = None  # as a multiple of init_norm

    def setting(self, base: Config, point: list[float]) -> Config:
        """The configuration at a point of the unit cube."""
        ranges = (self.temperature, self.concentration, self.init_norm, self.lr)
        values = [
            float(f"{low * (high / low) ** share:.4g}")
            for (low, high), share in zip(ranges, point, strict=True)
        ]
        temperature, concentration, init_norm, lr = values
        bound = None if self.max_norm is None else self.max_norm * init_norm
        loss = replace(
            base.loss, name=self.loss, temperature=temperature, concentration=concentration
        )
        return replace(
            base,
            loss=loss,
            model=replace(base.model, init_norm=init_norm, max_norm=bound),
            optim=replace(base.optim, lr=lr),
        )


# Likelihoods and the squared distance have temperatures around 1; a cosine, far below. The last
# candidate shows what a bound of the norm does to its informativeness.
LIKELIHOOD = (0.1, 4.0)
TEMPERATURES = {"l2": (1.0, 64.0), "cos": (1 / 64, 0.25)}
CANDIDATES = {
    **{name: Candidate(name, TEMPERATURES.get(name, LIKELIHOOD)) for name in PAPER_LOSSES},
    "el-nivmf-bounded": Candidate("el-nivmf", LIKELIHOOD, max_norm=2.0),
}


def sweep(config: SweepConfig) -> None:
    """Tune and run the candidates; write trials.csv, and their table and plot."""
    names = config.losses or tuple(CANDIDATES)
    for name in names:
        if name not in CANDIDATES:
            hint = nearest(name, CANDIDATES)
            raise RunError(f"--losses has {name!r}{hint}, but knows {', '.join(CANDIDATES)}")
    if config.trials < 1 or not config.seeds:
        raise RunError("a sweep needs at least one trial (--trials) and one seed (--seeds)")
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    base = replace(
        PRESETS["glyphs"],
        limit_batches=config.limit_batches,
        tensorboard=False,
        device="auto" if torch.cuda.is_available() else "cpu",
    )
    if config.data_root:
        base = replace(base, data=replace(base.data, data_root=config.data_root))
    jobs = config.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)

    # the same points of the unit cube for every loss: effort and luck are equal
    points = SobolEngine(4, scramble=True, seed=0).draw(config.trials, dtype=torch.float64)
    trials: dict[str, list[Config]] = {}
    for name in names:
        trials[name] = [
            replace(
                CANDIDATES[name].setting(base, point),
                out=out / "trials" / name / f"{i:02d}",
                seed=TUNING_SEED,
                data=replace(base.data, validation="class"),
                evaluate_every=base.epochs,
                clustering=False,
            )
            for i, point in enumerate(points.tolist())
        ]
    run_all([trial for group in trials.values() for trial in group], jobs, "trials")
    best = {}
    rows: list[dict[str, object]] = []
    for name, group in trials.items():
        scores = [score(trial) for trial in group]
        best[name] = group[max(range(len(group)), key=lambda i: scores[i])]
        for trial, value in zip(group, scores, strict=True):
            rows.append(
                {
                    "loss": name,
                    "trial": trial.folder.name,
                    "temperature": trial.loss.temperature,
                    "concentration": trial.loss.concentration,
                    "init_norm": trial.model.init_norm,
                    "max_norm": trial.model.max_norm or "",
                    "lr": trial.optim.lr,
                    f"validation {METRIC}": value,
                    "chosen": "yes" if trial is best[name] else "",
                }
            )
    RunFolder(out).write("trials.csv", compare.table_csv(rows[0], rows).encode())

    finals = [
        replace(
            best[name],
            out=out / name / f"seed-{seed}",
            seed=seed,
            data=base.data,
            evaluate_every=1,
            clustering=True,
        )
        for name in names
        for seed in config.seeds
    ]
    run_all(finals, jobs, "final runs")
    compare.write([compare.Group.read(out / name, "last") for name in names], out, METRIC)


def score(trial: Config) -> float:
    """The validation metric of a trial; -inf if it diverged."""
    try:
        return read_metrics(trial.folder / "metrics.csv")[-1][METRIC]
    except (RunError, KeyError):
        return -math.inf


def run_all(configs: list[Config], jobs: int, what: str) -> None:
    """Run them, `jobs` at a time, skipping finished ones."""
    waiting = [config for config in configs if not is_finished(config)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    done = len(configs) - len(waiting)
    with (
        tqdm(total=len(configs), initial=done, desc=what, unit="run", disable=None) as bar,
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
    ):
        futures = {pool.submit(run_one, config, threads): config for config in waiting}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_finished(config: Config) -> bool:
    """Whether a run has finished, or diverged, with these settings; others are an error."""
    folder = config.folder
    stored = folder / "config.json"
    if not stored.exists():
        return False
    if json.loads(stored.read_text()) != json.loads(config.to_json()):
        raise RunError(f"{folder} has a run with other settings: give another --out")
    return (folder / REPORT).exists() or (folder / "failed.txt").exists()


def run_one(config: Config, threads: int) -> None:
    """One run, its output in a .log next to its folder; a diverged one is recorded, not raised."""
    torch.set_num_threads(threads)
    folder = config.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with redirect_output(folder.with_name(f"{folder.name}.log")):
        try:
            train(replace(config, resume=folder.exists()))
        except Diverged as error:
            RunFolder(folder).write("failed.txt", f"{error}\n".encode())


@contextlib.contextmanager
def redirect_output(file: Path) -> Iterator[None]:
    """Redirect stdout and stderr to a file."""
    with file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        stderr, sys.stderr = sys.stderr, log
        try:
            yield
        finally:
            sys.stderr = stderr
