"""Time this library against the alternatives, and show where the time goes.

python -m benchmarks --op proxy_nca --shape cub-128 sop-512    kernels and their baselines
python -m benchmarks --json new.json --against old.json        exit with 1 if anything is slower
python -m benchmarks all                                       all CPU figures, to results/
python -m benchmarks gpu                                       the same for a GPU (`make gpu`)
python -m benchmarks ceilings                                  peak rates of copies and products
python -m benchmarks growth                                    exponents of time and memory
python -m benchmarks step                                      a small step, op by op
python -m benchmarks train                                     a glyph run, stage by stage
python -m benchmarks resnet                                    the loss's share in a ResNet-50 step
python -m benchmarks scale                                     classes over processes, up to 1e8
python -m benchmarks readme                                    results/ into README's figures
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import gpu, report, scale, timing, training
from benchmarks.cases import BACKENDS, CASES, SHAPES
from benchmarks.kernels import Found, kernels

QUICK = 0.2  # seconds per case


def ceilings(args: argparse.Namespace) -> Found:
    return {"ceilings": timing.ceilings(args.device, args.seconds)}


def section(name: str, measure: Callable[[argparse.Namespace], Found]) -> Callable[..., Found]:
    """Make a command of a measurement that has its own Markdown."""

    def command(args: argparse.Namespace) -> Found:
        return {name: measure(args)}

    return command


growth = section("growth", scale.growth)
step = section("step", training.step)
train = section("train", training.train)
resnet = section("resnet", training.resnet)
class_parallel = section("scale", scale.class_parallel)


def everything(args: argparse.Namespace) -> Found:
    """Measure all that a CPU can show, in under six minutes; write the file after each part."""
    file = args.json or report.RESULTS / f"{args.device}-{args.about['commit']}.json"
    found: Found = {"results": []}
    args.json = None
    for op, shapes in (
        ("proxy_nca", ["cub-128", "cub-512", "sop-512"]),
        ("vmf_rsample", ["cub-128", "cub-512"]),
    ):
        args.op, args.shape = [op], shapes
        found["results"] += kernels(args)["results"]
        report.write(file, {"machine": args.about, **found})
    for command in ("ceilings", "growth", "step", "train", "scale"):
        found |= COMMANDS[command](args)
        report.write(file, {"machine": args.about, **found})
    args.json = file
    return found


COMMANDS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "kernels": kernels,
    "all": everything,
    "ceilings": ceilings,
    "growth": growth,
    "step": step,
    "train": train,
    "resnet": resnet,
    "scale": class_parallel,
}


def parser(command: str) -> argparse.ArgumentParser:
    about = __doc__ if command == "kernels" else COMMANDS[command].__doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=None, help="per case; default 1")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} seconds per case")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to FILE, and as .md"
    )
    parser.set_defaults(temperature=[1.0, 0.003], backend=[], against=None, plots=None)
    if command == "kernels":
        parser.add_argument("--op", nargs="+", choices=CASES, default=["proxy_nca", "vmf_rsample"])
        parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="SHAPE",
                            default=["cub-128", "cub-512"], help=", ".join(SHAPES))  # fmt: skip
        parser.add_argument("--temperature", nargs="+", type=float)
        parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: all usable")
        parser.add_argument("--against", type=Path, metavar="FILE", help="compare with this file")
    if command in ("kernels", "all"):
        parser.add_argument("--plots", type=Path, metavar="DIR", help="PNG and SVG")
    if command in ("all", "scale"):
        scale.add_hardware(parser)
    if command in ("all", "train"):
        training.add_data(parser)
    if command == "resnet":
        training.add_images(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    command, rest = "kernels", list(arguments)
    if rest and not rest[0].startswith("-"):
        command, *rest = rest
    if command == "gpu":
        return gpu.main(rest)
    if command == "readme":
        if rest not in ([], ["--check"]):
            raise SystemExit(f"readme takes --check or nothing; got {' '.join(rest)}")
        return report.readme(check=bool(rest))
    if command not in COMMANDS:
        known = ", ".join([*COMMANDS, "gpu", "readme"])
        raise SystemExit(f"there is no command {command!r}: {known}")
    args = parser(command).parse_args(rest)
    if args.seconds is None:
        args.seconds = QUICK if args.quick else 1.0
    old = report.read(args.against) if args.against else None  # before any measurement
    args.about = timing.machine(args.device)
    found = {"machine": args.about, **COMMANDS[command](args)}
    if args.plots and "ceilings" not in found:
        found |= ceilings(args)  # for the roofline
    found_last = {key: value for key, value in found.items() if key != "results"}
    print(report.markdown(found_last))  # the kernels' tables have been printed
    if args.json:
        report.write(args.json, found)
        print(f"wrote {args.json}")
    for file in report.plots(found, args.plots) if args.plots else ():
        print(f"wrote {file}")
    if old is None:
        return 0
    text, slower = report.against(found, old)
    print(text)
    return int(slower)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
