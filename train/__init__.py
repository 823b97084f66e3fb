"""The training harness: `python -m train --preset glyphs`."""
