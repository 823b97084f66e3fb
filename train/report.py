"""The pictures of a run, and one HTML page with them and the numbers."""

import base64
import html
import io
import math
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from train.config import Config
from train.data import ImageSet
from train.evaluate import Retrieval, retrieve, spearman
from train.run_folder import RunFolder

REPORT = "report.html"
TILE, GAP = 84, 6  # pixels of a picture in a mosaic, and between two
RIGHT, WRONG, INK, ACCENT, SOFT = "#2a9d5c", "#d1495b", "#22303c", "#2b6cb0", "#9db4c8"
LINE: dict[str, Any] = {"color": ACCENT, "ms": 4}
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8894a0",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def write(
    folder: RunFolder,
    config: Config,
    history: list[dict[str, float]],
    features: Tensor,
    test_set: ImageSet,
    raw_recall: float | None,
) -> None:
    """Write curves.png, certainty.png, gallery.png, norm.png and, last of all, report.html."""
    found = retrieve(features, test_set.labels, "c")
    right = (test_set.labels[found.nearest] == test_set.labels[:, None]).numpy()
    norm = features.norm(dim=1)
    with matplotlib.rc_context(STYLE):
        figures = {
            "certainty.png": certainty(test_set, norm, right[:, 0]),
            "norm.png": norm_against_degradation(norm, test_set.degradation, right[:, 0]),
            "gallery.png": gallery(test_set, norm, found, right),
            "curves.png": curves(history, raw_recall),
        }
        pictures = {name: png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        folder.write(name, picture)
    folder.write(REPORT, page(config, history, raw_recall, test_set, pictures).encode())


def curves(history: list[dict[str, float]], raw_recall: float | None) -> Figure:
    """Loss and retrieval by epoch."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] for row in history], [row["loss"] for row in history], "o-", **LINE)
    left.set(title="Training loss", xlabel="epoch")
    evaluated = [row for row in history if "c_recall@1" in row]
    epochs = [row["epoch"] for row in evaluated]
    lines = [
        ("c_recall@1", "recall@1, cosine", ACCENT),
        ("e_recall@1", "recall@1, Euclidean", "#e08e2b"),
        ("c_MAP@R", "MAP@R, cosine", "#7b5ea7"),
    ]
    for name, label, colour in lines:
        values = [row[name] for row in evaluated]
        right.plot(epochs, values, "o-", **LINE | {"color": colour}, label=label)
    if raw_recall is not None:
        right.axhline(raw_recall, color="#8894a0", ls="--", lw=1, label="recall@1 of raw pixels")
    right.set(title="Retrieval on unseen classes", xlabel="epoch", ylim=(0, 1))
    right.legend(loc="upper left", ncols=2, fontsize=9)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="#e3e8ed")
        axes.set_axisbelow(True)
    return figure


def certainty(
    test_set: ImageSet, norm: Tensor, right: NDArray[np.bool_], count: int = 30
) -> Figure:
    """The most and the least certain images, framed by whether their nearest neighbour is right."""
    order = norm.argsort(descending=True, stable=True).tolist()
    count = min(count, len(order) // 2)
    parts = [("Most certain", order[:count]), ("Least certain", order[-count:])]
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    for axes, (title, chosen) in zip(figure.subplots(2, 1), parts, strict=True):
        rows = math.ceil(count / 10)
        tiles = [_tile(test_set, i, RIGHT if right[i] else WRONG) for i in chosen]
        _show(axes, _mosaic(tiles, rows, math.ceil(count / rows)))
        low, high = norm[chosen].min(), norm[chosen].max()
        axes.set_title(
            f"{title}: norm {low:.1f} to {high:.1f}, nearest neighbour right (green) for "
            f"{right[chosen].sum()} of {len(chosen)}"
        )
    return figure


def gallery(
    test_set: ImageSet, norm: Tensor, found: Retrieval, right: NDArray[np.bool_], rows: int = 8
) -> Figure:
    """Queries from the most certain (top) to the least, each with its nearest neighbours."""
    order = norm.argsort(descending=True, stable=True)
    rows = min(rows, len(order))
    queries = order[torch.linspace(0, len(order) - 1, 2 * rows + 1)[1::2].long()].tolist()
    k = found.nearest.shape[1]
    lines = []
    for query in queries:
        frames = [RIGHT if hit else WRONG for hit in right[query]]
        neighbours = map(_tile, [test_set] * k, found.nearest[query].tolist(), frames)
        blank = np.full((TILE + 2 * GAP, GAP * 4, 3), 255, np.uint8)
        lines.append(np.hstack([_tile(test_set, query, INK), blank, *neighbours]))
    figure = Figure(figsize=(9.1, 0.82 * rows + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.vstack(lines))
    side = TILE + 2 * GAP
    axes.set_yticks(
        (np.arange(rows) + 0.5) * side, [f"norm {norm[query]:.3g}" for query in queries]
    )
    headings = ["query", f"its {k} nearest neighbours: right in green, wrong in red"]
    axes.set_xticks([side / 2, side + 4 * GAP + k * side / 2], headings)
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    axes.spines[:].set_visible(False)
    return figure


def norm_against_degradation(
    norm: Tensor, degradation: Tensor | None, right: NDArray[np.bool_]
) -> Figure:
    """Norm and recall@1 against degradation, if that is known, and recall@1 against the norm."""
    panels = 2 if degradation is None else 3
    figure = Figure(figsize=(4.4 * panels, 3.7), layout="constrained")
    first, *rest = figure.subplots(1, panels)
    values = norm.numpy()
    if degradation is None:
        first.hist(values, bins=40, color=SOFT)
        first.set(title="Embedding norm", xlabel="norm", ylabel="images")
    else:
        known = degradation.numpy()
        first.scatter(known, values, s=4, alpha=0.25, color=ACCENT, lw=0)
        tenths = np.array_split(known.argsort(kind="stable"), 10)
        middle = [[np.median(of[part]) for part in tenths] for of in (known, values)]
        first.plot(*middle, "o-", color=WRONG, ms=5, label="median of each tenth")
        rank = f"Norm and degradation: Spearman {spearman(norm, degradation):.2f}"
        first.set(title=rank, xlabel="degradation of the image", ylabel="embedding norm")
        first.legend(loc="upper right", fontsize=9)
        _tenths(
            rest.pop(0), known, right, ("cleanest", "worst"), "Recall@1 by tenth of degradation"
        )
    _tenths(
        rest[0], -values, right, ("most certain", "least certain"), "Recall@1 by tenth of the norm"
    )
    return figure


def _tenths(
    axes: Any, values: NDArray[Any], right: NDArray[np.bool_], ends: tuple[str, str], title: str
) -> None:
    recalls = [right[part].mean() for part in np.array_split(values.argsort(kind="stable"), 10)]
    bars = axes.bar(range(10), recalls, color=SOFT, width=0.85)
    axes.bar_label(bars, [f"{recall:.2f}" for recall in recalls], fontsize=8, color=INK, padding=2)
    axes.set(title=title, ylim=(0, 1.05), xticks=(-0.45, 9.45))
    for label, side in zip(axes.set_xticklabels(ends), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(axis="x", length=0)


def _tile(test_set: ImageSet, index: int, frame: str) -> NDArray[np.uint8]:
    """One image with a frame, on white."""
    image = test_set.thumbnail(index, TILE)
    line = GAP // 2
    framed = Image.new("RGB", (TILE + 2 * line,) * 2, frame)
    framed.paste(image, (line, line))
    tile = Image.new("RGB", (TILE + 2 * GAP,) * 2, "white")
    tile.paste(framed, (GAP - line, GAP - line))
    return np.asarray(tile)


def _mosaic(tiles: list[NDArray[np.uint8]], rows: int, columns: int) -> NDArray[np.uint8]:
    tiles = tiles + [np.full_like(tiles[0], 255)] * (rows * columns - len(tiles))
    return np.vstack([np.hstack(tiles[r * columns : (r + 1) * columns]) for r in range(rows)])


def _show(axes: Any, picture: NDArray[np.uint8]) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.axis("off")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, facecolor="white")
    return buffer.getvalue()


CAPTIONS = {
    "certainty.png": "The norm of an embedding encodes how certain the model is of an image. Green "
    "frame: the nearest neighbour shows the same class; red: it does not.",
    "norm.png": "How the norm follows the quality of an image, and predicts failed retrieval.",
    "gallery.png": "Queries from the whole range of certainty, the most certain on top, with their "
    "nearest neighbours by cosine among the evaluated images.",
    "curves.png": "Loss and retrieval by epoch.",
}
CSS = """
:root { color-scheme: light dark; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.5rem 0; }
.cards div { background: var(--soft); border-radius: .6rem; padding: .6rem 1.1rem; }
.cards b { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
img { width: 100%; background: white; border-radius: .6rem; }
figure { margin: 2.5rem 0; } figcaption { margin-bottom: .6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { padding: .25rem .7rem; text-align: right; font-variant-numeric: tabular-nums; }
tr:nth-child(even) { background: var(--soft); } th:first-child { text-align: left; }
pre { background: var(--soft); padding: 1rem; border-radius: .6rem; overflow-x: auto; }
"""


def _cell(value: float | None) -> str:
    return "<td></td>" if value is None else f"<td>{value:.4g}</td>"


def page(
    config: Config,
    history: list[dict[str, float]],
    raw_recall: float | None,
    test_set: ImageSet,
    pictures: dict[str, bytes],
) -> str:
    """One HTML page that needs no other file."""
    last = history[-1]
    cards = [
        ("recall@1, cosine", last["c_recall@1"]),
        ("recall@1, Euclidean", last["e_recall@1"]),
        ("MAP@R, cosine", last["c_MAP@R"]),
        ("AUROC of right or wrong, from the norm", last["auroc_norm"]),
    ]
    if "spearman_norm_degradation" in last:
        cards.append(("Spearman of norm and degradation", last["spearman_norm_degradation"]))
    if raw_recall is not None:
        cards.append(("recall@1 of raw pixels", raw_recall))
    boxes = "".join(f"<div><b>{value:.3f}</b>{label}</div>" for label, value in cards)
    figures = "".join(
        f"<figure><figcaption>{CAPTIONS[name]}</figcaption>"
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
        for name, data in pictures.items()
    )
    table = "".join(
        f"<tr><th>{name}</th>{''.join(_cell(row.get(name)) for row in history)}</tr>"
        for name in last
    )
    unseen = "" if config.data.validation == "samples" else " that were never trained on"
    title = html.escape(f"{config.loss.name} on {config.data.name}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{CSS}</style></head><body>
<h1>{title}</h1>
<p>{len(test_set):,} test images of {len(test_set.classes)} classes{unseen};
epoch {int(last["epoch"])} of {config.epochs}, seed {config.seed}.</p>
<div class="cards">{boxes}</div>
{figures}
<h2>Every epoch</h2><div class="wide"><table>{table}</table></div>
<h2>Configuration</h2><pre>{html.escape(config.to_json())}</pre>
</body></html>
"""
