"""Train and evaluate: `python -m train --preset glyphs`; --help lists all flags and commands.

python -m train --preset cub200-r50-128 --data-root DIR        the paper's run
python -m train --preset glyphs --seeds 0 1 2 3 4              mean and deviation
torchrun --nproc-per-node=4 -m train --preset sop-r50-512 ...  several GPUs
python -m train --out RUN --resume                             continue after a crash
python -m train evaluate --checkpoint RUN/checkpoint_best.pt   evaluate again, export
python -m train compare RUN RUN ...                            table and plot
python -m train sweep glyphs-distances                         compare the losses
python -m train --from-released "python main.py ..."           the equivalent command here
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; print an expected failure as one line on stderr."""
    folder: Path | None = None
    line, code = "interrupted", 130
    try:
        # Imported here, so that Ctrl-C while torch loads prints one line, too.
        from train.cli import COMMANDS, parse, parse_command
        from train.config import RunError
        from train.presets import PRESETS

        arguments = sys.argv[1:] if arguments is None else list(arguments)
        try:
            if arguments[:1] == ["--from-released"]:
                from train.released import translate

                print(translate(" ".join(arguments[1:])))
                return 0
            if arguments and arguments[0] in COMMANDS:
                command = parse_command(arguments[0], arguments[1:])
                from train import commands

                commands.RUN[arguments[0]](command)
                return 0
            config = parse(arguments, PRESETS)
            from train.loop import train

            folder = config.folder
            train(config)
            return 0
        except RunError as error:
            line, code, folder = f"error: {error}", 1, None
        except BrokenPipeError:  # whoever read our output has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            line, code = f"error: {error.strerror or error}{where}", 1
    except KeyboardInterrupt:
        pass
    if folder and (folder / "checkpoint_last.pt").exists():
        line += f" (the last checkpoint is complete: --resume --out {folder} continues)"
    print(" ".join(line.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
