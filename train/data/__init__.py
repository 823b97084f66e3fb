"""Image sets, their splits and transforms, and batches of them."""

from train.data.batches import ClassBalancedBatches, all_batches, train_batches
from train.data.layouts import class_folders
from train.data.sets import ImageSet, decode, load, transforms

__all__ = [
    "ClassBalancedBatches",
    "ImageSet",
    "all_batches",
    "class_folders",
    "decode",
    "load",
    "train_batches",
    "transforms",
]
