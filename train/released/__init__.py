"""Translate command lines of the paper's released code: `python -m train --from-released "..."`.

docs/migrating.md has the table of its flags, with their defaults and their counterparts here.
"""

from train.released.flags import FLAGS, LOSS_NAMES, MINER_NAMES, table
from train.released.translation import translate

__all__ = ["FLAGS", "LOSS_NAMES", "MINER_NAMES", "table", "translate"]
