"""Compare runs in a table and a plot."""

import csv
import io
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from train.config import CompareConfig, RunError
from train.report import INK, SOFT, STYLE, png
from train.run_folder import RunFolder, read_metrics

Rows = list[dict[str, float]]
COLUMNS = {  # of the Markdown table; the CSV has all
    "c_recall@1": "recall@1, cosine",
    "e_recall@1": "recall@1, Euclidean",
    "c_MAP@R": "MAP@R, cosine",
    "c_mAP_1000": "mAP@1000, cosine",
    "c_nmi": "NMI, cosine",
    "auroc_norm": "AUROC of the norm",
    "spearman_norm_degradation": "Spearman of norm and degradation",
}
COLOURS = ("#2b6cb0", "#e08e2b", "#2a9d5c", "#d1495b", "#7b5ea7", "#5aa7a7", "#8c6d46", "#c77cae")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, or a single run."""

    name: str
    labels: list[str]  # of the runs
    runs: list[Rows]
    chosen: Rows  # the row that counts, of each run

    @classmethod
    def read(cls, folder: Path, row: str, metric: str = "c_recall@1") -> "Group":
        """Read the folder of one run, or of runs seed-0, seed-1, ..."""
        seeds = [p for p in folder.glob("seed-*/metrics.csv") if p.parent.name[5:].isdigit()]
        paths = sorted(seeds, key=lambda p: int(p.parent.name[5:])) or [folder / "metrics.csv"]
        runs = [read_metrics(path) for path in paths]
        chosen = []
        for rows in runs:
            evaluated = [r for r in rows if metric in r]
            if not evaluated:
                known = ", ".join(rows[-1])
                raise RunError(f"{folder} has no column {metric}: choose --metric from {known}")
            best = max(evaluated, key=lambda r: r[metric])
            chosen.append(best if row == "best" else evaluated[-1])
        return cls(folder.name, [path.parent.name for path in paths], runs, chosen)

    def values(self, metric: str) -> list[float]:
        return [row[metric] for row in self.chosen if metric in row]

    def columns(self) -> list[str]:
        names = {name: None for row in self.chosen for name in row}
        return [name for name in names if not name.startswith("seconds_")]


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample deviation (n - 1), which is None for a single value."""
    if not values:
        return math.nan, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def markdown(groups: list[Group]) -> str:
    """One line for each run or group of seeds: mean and deviation of the main metrics."""
    shown = [name for name in COLUMNS if any(group.values(name) for group in groups)]
    head = ["run", "seeds", "epoch", *(COLUMNS[name] for name in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group in groups:
        cells = [group.name, str(len(group.runs)), "/".join(unique(group.values("epoch")))]
        for name in shown:
            mean, deviation = mean_and_deviation(group.values(name))
            spread = "" if deviation is None else f" ± {deviation:.3f}"
            cells.append("" if math.isnan(mean) else f"{mean:.3f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def unique(values: list[float]) -> list[str]:
    return list(dict.fromkeys(f"{value:g}" for value in values))


def seeds_csv(group: Group) -> str:
    """A row for each seed, then mean and deviation."""
    rows: list[dict[str, object]] = []
    for run, row in zip(group.labels, group.chosen, strict=True):
        rows.append({"run": run, **{name: row.get(name, "") for name in group.columns()}})
    for label, which in (("mean", 0), ("deviation", 1)):
        summary = {n: mean_and_deviation(group.values(n))[which] for n in group.columns()}
        rows.append({"run": label, **{n: "" if v is None else v for n, v in summary.items()}})
    return table_csv(["run", *group.columns()], rows)


def groups_csv(groups: list[Group]) -> str:
    """A row for each group, with mean and deviation of every metric."""
    names = list({name: None for group in groups for name in group.columns()})
    rows: list[dict[str, object]] = []
    for group in groups:
        row: dict[str, object] = {"run": group.name, "seeds": len(group.runs)}
        for name in names:
            mean, deviation = mean_and_deviation(group.values(name))
            row[name] = "" if math.isnan(mean) else mean
            row[f"{name} deviation"] = "" if deviation is None else deviation
        rows.append(row)
    return table_csv(["run", "seeds", *(n for m in names for n in (m, f"{m} deviation"))], rows)


def table_csv(names: Iterable[str], rows: Iterable[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(groups: list[Group], metric: str) -> Figure:
    """Plot a metric by epoch, and its final value, with the deviation over the seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, group in enumerate(groups):
        colour = COLOURS[i % len(COLOURS)]
        epochs = sorted({row["epoch"] for rows in group.runs for row in rows if metric in row})
        at = [
            [r[metric] for rows in group.runs for r in rows if r["epoch"] == e and metric in r]
            for e in epochs
        ]
        pairs = [mean_and_deviation(values) for values in at]
        means = [mean for mean, _ in pairs]
        spread = [deviation or 0.0 for _, deviation in pairs]
        left.plot(epochs, means, "o-", ms=3, color=colour, label=group.name)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        left.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
        mean, deviation = mean_and_deviation(group.values(metric))
        right.barh(i, mean, xerr=deviation, color=colour, alpha=0.8, ecolor=INK, capsize=3)
        right.plot(group.values(metric), [i] * len(group.chosen), "|", color=INK, ms=9)
        right.annotate(
            f"{mean:.3f}",
            (0, i),
            (5, 0),
            textcoords="offset points",
            va="center",
            color="white",
            fontsize=9,
        )
    title = COLUMNS.get(metric, metric)
    left.set(title=title, xlabel="epoch")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(axis="y", color=SOFT, alpha=0.4)
    left.legend(fontsize=9)
    right.set(title="Mean and deviation over the seeds; each run a mark", xlabel=title)
    right.set_yticks(range(len(groups)), [group.name for group in groups])
    right.invert_yaxis()
    return figure


def compare(config: CompareConfig) -> None:
    """Write the table and the plot of the configured runs."""
    if not config.runs:
        raise RunError("compare needs at least one run folder: python -m train compare RUN RUN ...")
    groups = [Group.read(folder, config.row, config.metric) for folder in config.runs]
    write(groups, config.out, config.metric)


def write(groups: list[Group], out: Path, metric: str) -> None:
    """Write compare.csv, compare.md and compare.png into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(out)
    with matplotlib.rc_context(STYLE):
        picture = png(plot(groups, metric))
    folder.write("compare.csv", groups_csv(groups).encode())
    folder.write("compare.md", markdown(groups).encode())
    folder.write("compare.png", picture)
    print(markdown(groups), end="")
    print(f"wrote {out}/compare.csv, compare.md, compare.png")
