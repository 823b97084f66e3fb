"""Train and evaluate: `python -m train --preset glyphs`; --help lists all flags."""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; what ends a run and is no defect of the program is one line on stderr."""
    folder: Path | None = None
    line, code = "interrupted", 130
    try:
        # Imported here: Ctrl-C in the seconds that torch takes to load is no stack trace either.
        from train.config import RunError, parse
        from train.presets import PRESETS

        try:
            config = parse(sys.argv[1:] if arguments is None else arguments, PRESETS)
            from train.loop import train

            folder = config.folder
            train(config)
            return 0
        except RunError as error:
            line, code, folder = f"error: {error}", 1, None
        except OSError as error:
            line, code = f"error: {error.strerror or error}: {error.filename}", 1
    except KeyboardInterrupt:
        pass
    if folder and (folder / "checkpoint_last.pt").exists():
        line += f" (the last checkpoint is whole: --resume --out {folder} continues)"
    print(" ".join(line.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
