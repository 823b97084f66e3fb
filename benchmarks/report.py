"""Reports built from the measurements: tables, plots, comparisons, README's section.

A results file is one JSON object. `machine` describes the machine and the versions; every other key
holds the results of one command of `python -m benchmarks`, and may be missing.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- figures: written by `python -m benchmarks readme` -->"
END = "<!-- end of figures -->"
Rows = list[dict[str, Any]]


def read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{file} is not a results file ({error}): write one with --json") from None
    if not isinstance(found, dict) or "machine" not in found:
        raise SystemExit(f"{file} is not a results file (no 'machine'): write one with --json")
    return found


def write(file: Path, found: dict[str, Any]) -> None:
    """Write the file, and the same as Markdown next to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(found))


def grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None, form: str = ".3g") -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if form == ".3g" and abs(value) >= 1000 else f"{value:{form}}"


def markdown(found: dict[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value)
    parts = [f"# Benchmarks\n\n{about}"]
    if "parts" in found:
        rows = [(p["name"], p["state"], number(p["seconds"]), p["said"]) for p in found["parts"]]
        parts.append("## Parts\n\n" + grid(("part", "state", "seconds", "last words"), rows))
    if "ceilings" in found:
        rows = [(name.replace("_", " "), number(v)) for name, v in found["ceilings"].items()]
        parts.append("## Ceilings\n\n" + grid(("rate", "measured"), rows))
    if "results" in found:
        parts.append("## Kernels\n\n" + "\n\n".join(map(case_table, found["results"])))
    for name, title in SECTIONS.items():
        if name in found:
            parts.append(f"## {title}\n\n{found[name]['markdown']}")
    return "\n\n".join(parts) + "\n"


SECTIONS = {
    "growth": "Growth of cost",
    "step": "The small step, op by op",
    "train": "A training run on the CPU",
    "resnet": "A training step of ResNet-50",
    "scale": "Classes spread over processes",
}


def title(result: dict[str, Any]) -> str:
    shape = ", ".join(f"{k} = {v}" for k, v in result["dimensions"].items())
    return f"{result['op']}, {result['shape']} ({shape}), T = {result['temperature']:g}"


def case_table(result: dict[str, Any]) -> str:
    header = ("case", "median ms", "p10", "p90", "over ours", "memory MB", "launches", "syncs",
              "value error", "worst gradient", "bits repeat")  # fmt: skip
    lines = []
    for row in result["rows"]:
        if "failed" in row:
            lines.append([row["case"], f"failed: {row['failed']}", *[""] * (len(header) - 2)])
            continue
        errors = dict(row["errors"])
        value = errors.pop("value", None)
        lines.append(
            [
                row["case"],
                *(number(row[key]) for key in ("median_ms", "p10_ms", "p90_ms")),
                number(row["ratio"], ".2f"),
                number(row["memory_mb"], ".1f"),
                number(row["launches"]),
                number(row["host_syncs"]),
                number(value, ".1e"),
                number(max(errors.values(), default=None), ".1e"),
                "yes" if row["repeats"] else "no",
            ]
        )
    return f"### {title(result)}\n\n{grid(header, lines)}"


# --- two files


def timed(found: dict[str, Any]) -> dict[tuple[str, str, float, str], dict[str, float]]:
    return {
        (result["op"], result["shape"], result["temperature"], row["case"]): row
        for result in found.get("results", [])
        for row in result["rows"]
        if "failed" not in row
    }


def against(new: dict[str, Any], old: dict[str, Any]) -> tuple[str, bool]:
    """Compare two files: the text, and whether a case became slower beyond the spread of both.

    It did if nine tenths of its new times are above nine tenths of its old ones.
    """
    before, after = timed(old), timed(new)
    verdicts: dict[str, list[str]] = {"slower": [], "faster": []}
    same = 0
    for key in before.keys() & after.keys():
        b, a = before[key], after[key]
        verdict = "slower" if a["p10_ms"] > b["p90_ms"] else "faster"
        if verdict == "faster" and not a["p90_ms"] < b["p10_ms"]:
            same += 1
            continue
        op, shape, T, case = key
        verdicts[verdict].append(
            f"{verdict}: {op}, {shape}, T = {T:g}, {case}: {a['median_ms'] / b['median_ms']:.2f} "
            f"times, {b['median_ms']:.3g} ({b['p10_ms']:.3g} to {b['p90_ms']:.3g}) to "
            f"{a['median_ms']:.3g} ms ({a['p10_ms']:.3g} to {a['p90_ms']:.3g})"
        )
    lines = [*sorted(verdicts["slower"]), *sorted(verdicts["faster"])]
    lines.append(f"{same} cases are within their spread (p10 to p90)")
    alone = [(before.keys() - after.keys(), "old"), (after.keys() - before.keys(), "new")]
    lines += [f"only in the {which} file: {len(keys)} cases" for keys, which in alone if keys]
    if not before.keys() & after.keys():
        raise SystemExit("the files have no case in common: compare runs of the same --op, --shape")
    there, here = old["machine"], new["machine"]
    lines += [
        f"warning: {key} was {there.get(key)} and is {here.get(key)}"
        for key in ("device", "threads", "torch")
        if there.get(key) != here.get(key)
    ]
    return "\n".join(lines), bool(verdicts["slower"])


# --- plots


def plots(found: dict[str, Any], folder: Path) -> list[Path]:
    """Plot time and memory against P and error against T, as PNG and SVG."""
    import matplotlib  # only plots need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in sorted({r["op"] for r in found.get("results", [])} - {"vmf_rsample"}):
        results = [r for r in found["results"] if r["op"] == op]
        dims = sorted({r["dimensions"]["D"] for r in results})
        for name, draw in PLOTS.items():
            figure, axes = plt.subplots(
                1, len(dims), figsize=(6 * len(dims), 4.5), squeeze=False, layout="constrained"
            )
            for axis, D in zip(axes[0], dims, strict=True):
                draw(axis, [r for r in results if r["dimensions"]["D"] == D], found)
                axis.set(xscale="log", yscale="log", title=f"{op}, D = {D}")
                axis.grid(alpha=0.3)
                if axis.lines:
                    axis.legend(fontsize=7)
            about = found["machine"]
            figure.suptitle(f"{about['device']}, torch {about['torch']}, {about['commit']}")
            for suffix in ("png", "svg"):
                written.append(folder / f"{op}-{name}.{suffix}")
                figure.savefig(written[-1], dpi=120)
            plt.close(figure)
    return written


def _lines(axis: Any, results: Rows, x: str, y: Any) -> None:
    """Draw a line for each case over `x`, which is P or T, at each value of the other."""
    series: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for result in results:
        P, T = result["dimensions"]["P"], result["temperature"]
        for row in result["rows"]:
            value = None if "failed" in row else y(row, result)
            if value is not None:
                other, at = (T, P) if x == "P" else (P, T)
                series.setdefault((row["case"], other), []).append((at, value))
    cases = list(dict.fromkeys(case for case, _ in series))
    others = sorted({other for _, other in series}, reverse=True)
    for (case, other), points in series.items():
        axis.plot(
            *zip(*sorted(points), strict=True),
            color=f"C{cases.index(case)}",
            linestyle=("-", "--", ":", "-.")[others.index(other) % 4],
            marker="o",
            markersize=4,
            label=f"{case}, {'T' if x == 'P' else 'P'} = {other:g}",
        )


def _rows(result: dict[str, Any]) -> int:
    size: dict[str, int] = result["dimensions"]
    return size["B"] * size["N"]


def _time(axis: Any, results: Rows, found: dict[str, Any]) -> None:
    _lines(axis, results, "P", lambda row, result: 1e3 * row["median_ms"] / _rows(result))
    rate = found.get("ceilings", {}).get("matmul_float32_gflop_per_s")
    if rate:
        shapes = sorted({(r["dimensions"]["P"], r["dimensions"]["D"]) for r in results})
        floor = [(P, 12 * P * D / rate / 1e3) for P, D in shapes]  # six products of 2 P D flop
        axis.plot(*zip(*floor, strict=True), "k--+", label="roofline: six products, float32 matmul")
    axis.set(xlabel="P, proxies", ylabel="time of a step per sample, µs")


def _memory(axis: Any, results: Rows, found: dict[str, Any]) -> None:
    _lines(axis, results, "P", lambda row, result: row["memory_mb"] or None)
    axis.set(xlabel="P, proxies", ylabel="peak memory above the inputs, MB")


def _error(axis: Any, results: Rows, found: dict[str, Any]) -> None:
    _lines(axis, results, "T", lambda row, result: max(row["errors"].values(), default=0) or None)
    axis.set(xlabel="T, temperature", ylabel="worst relative error against float64")


PLOTS = {"time": _time, "memory": _memory, "error": _error}


# --- README


def newest(folder: Path = RESULTS) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The newest results with times of kernels, of a GPU and of a CPU."""
    files = [read(file) for file in sorted(folder.glob("*.json"))]
    files = sorted((f for f in files if f.get("results")), key=lambda f: f["machine"]["date"])
    on_gpu = [f for f in files if f["machine"].get("cuda")]
    on_cpu = [f for f in files if not f["machine"].get("cuda")]
    return (on_gpu or [None])[-1], (on_cpu or [None])[-1]


def figures(gpu: dict[str, Any] | None, cpu: dict[str, Any] | None) -> str:
    """README's section: our case of every problem against the alternatives."""
    if gpu is None and cpu is None:
        return "No results are committed yet: `make bench` measures a CPU, `make gpu` a GPU."
    parts = [] if gpu else ["No GPU result exists yet (`make gpu` makes one). On a CPU:"]
    for found in (f for f in (gpu, cpu) if f):
        about = found["machine"]
        count = f", {about['threads']} thread" + "s" * (about["threads"] != 1)
        unit = "" if about.get("cuda") else count
        parts.append(
            f"{about['device']}{unit}, torch {about['torch']}, commit {about['commit']}: medians "
            "of a forward and backward in float32 (p10 to p90), the other methods as multiples of "
            "it. The sampler's baselines run the forward pass only."
        )
        names = {"batched eager": "batched eager", "torch.compile": "torch.compile",
                 "per-image loop": "per-image loop", "torch.randn": "`torch.randn`"}  # fmt: skip
        lines = []
        for result in found["results"]:
            rows = [row for row in result["rows"] if "failed" not in row]
            ours = next((row for row in rows if row["case"].startswith("nivmf_fast (")), None)
            if ours is None:
                continue
            ratios = [
                next((f"{r['median_ms'] / ours['median_ms']:.1f}"
                      for r in rows if r["case"].startswith(name)), "")
                for name in names
            ]  # fmt: skip
            size = ", ".join(f"{k} {v:,}" for k, v in result["dimensions"].items())
            sampler = result["op"] == "vmf_rsample"
            temperature = "" if sampler else f"{result['temperature']:g}"
            size = size if not sampler else ", ".join(s for s in size.split(", ") if s[0] != "P")
            spread = (ours[key] for key in ("median_ms", "p10_ms", "p90_ms"))
            time = "{} ms ({} to {})".format(*(f"{value:.3g}" for value in spread))
            lines.append([f"`{result['op']}`", size, temperature, time, *ratios])
        header = ("op", "shape", "T", "nivmf_fast", *names.values())
        parts.append(grid(header, lines))
    return "\n\n".join(parts)


def readme(file: Path = README, folder: Path = RESULTS, check: bool = False) -> int:
    """Write the section between the two markers; with `check`, only report whether it is stale."""
    text = file.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{file} must have one line {BEGIN} and after it one line {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{figures(*newest(folder))}\n{END}{after}"
    if check and wanted != text:
        print(f"the figures in {file} are stale: run python -m benchmarks readme")
    elif not check and wanted != text:
        file.write_text(wanted)
    return int(check and wanted != text)
