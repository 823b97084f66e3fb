"""Translate command lines of the paper's released code: `python -m train --from-released "..."`.

Its flags, with their defaults there and what they are here, are the table of docs/migrating.md.
"""

from train.released.flags import FLAGS, LOSS_NAMES, MINER_NAMES, table
from train.released.translation import translate

__all__ = ["FLAGS", "LOSS_NAMES", "MINER_NAMES", "table", "translate"]
