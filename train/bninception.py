"""Batch-Normalised Inception (Ioffe & Szegedy 2015, arXiv 1502.03167) without its classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Output channels of a block's branches: 1x1; 3x3 after its reduction; two 3x3 after theirs; the
# pooling's projection. A block without the first and the last has stride 2.
BLOCKS: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (0, (128, 160), (64, 96), 0),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 128),
    "4d": (96, (128, 192), (160, 192), 128),
    "4e": (0, (128, 192), (192, 256), 0),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}
MAX_POOLED = ("3c", "4e", "5b")


class BNInception(nn.Module):
    """Images [n, 3, H, W], H and W multiples of 32, to a map [n, 1024, H / 32, W / 32].

    All layers are direct children, named as in the ImageNet weights from Caffe, so that these
    load: inception_3a_1x1.weight, inception_3a_1x1_bn.running_mean, ...
    """

    def __init__(self) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, kernel=7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64)
        self._add("conv2_3x3", 64, 192, kernel=3)
        c_in = 192
        for block, (one, (reduced, three), (double_reduced, double), projected) in BLOCKS.items():
            name, stride = f"inception_{block}", 1 if one else 2
            if one:
                self._add(f"{name}_1x1", c_in, one)
            self._add(f"{name}_3x3_reduce", c_in, reduced)
            self._add(f"{name}_3x3", reduced, three, kernel=3, stride=stride)
            self._add(f"{name}_double_3x3_reduce", c_in, double_reduced)
            self._add(f"{name}_double_3x3_1", double_reduced, double, kernel=3)
            self._add(f"{name}_double_3x3_2", double, double, kernel=3, stride=stride)
            if projected:
                self._add(f"{name}_pool_proj", c_in, projected)
            c_in = one + three + double + (projected or c_in)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self._run(images, "conv1_7x7_s2"), 3, stride=2, ceil_mode=True)
        x = self._run(x, "conv2_3x3_reduce", "conv2_3x3")
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        for block, (one, _, _, _) in BLOCKS.items():
            name = f"inception_{block}"
            double = [f"{name}_double_3x3_{part}" for part in ("reduce", 1, 2)]
            branches = [
                self._run(x, f"{name}_3x3_reduce", f"{name}_3x3"),
                self._run(x, *double),
            ]
            if one:
                pool = F.max_pool2d if block in MAX_POOLED else F.avg_pool2d
                pooled = pool(x, 3, stride=1, padding=1)
                branches.insert(0, self._run(x, f"{name}_1x1"))
                branches.append(self._run(pooled, f"{name}_pool_proj"))
            else:
                branches.append(F.max_pool2d(x, 3, stride=2, ceil_mode=True))
            x = torch.cat(branches, dim=1)
        return x

    def _add(self, name: str, c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(c_out))

    def _run(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = F.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x)), inplace=True)
        return x
