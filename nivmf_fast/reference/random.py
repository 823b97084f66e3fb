"""The random stream: Philox 4x32-10, keyed by the seed, counted by (block, sample, image, part)."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Map each counter of four words (int64 tensors holding 32 bits) to four random words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """

    def multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:  # high and low word of a * m
        upper, lower = a * (m >> 16), a * (m & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _MASK

    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Map a word into (0, 1]: word 2^-32 + 2^-33, the word first rounded to `dtype`."""
    return word.to(dtype) * 2.0**-32 + 2.0**-33


class Stream:
    """The random words of each (sample, image), by block and part.

    Part 0 holds the normals of the tangent direction, four to a block. Part a > 0 belongs to the
    a-th attempt of the rejection: block 0 to the proposal, block r > 0 to round r of the
    proposal's chi^2. `image_offset` is the index of the first image.
    """

    def __init__(self, n: int, B: int, seed: Tensor, image_offset: int, dtype: torch.dtype) -> None:
        self.index = torch.arange(n * B, device=seed.device)
        self.sample = self.index // max(B, 1)
        self.image = (self.index % max(B, 1) + image_offset) & _MASK
        self.seed, self.dtype = seed, dtype

    def words(self, at: Tensor, block: Tensor | int, part: int) -> list[Tensor]:
        sample, image = self.sample[at], self.image[at]
        block = torch.as_tensor(block, device=at.device)
        counter = torch.broadcast_tensors(block, sample, image, torch.full_like(at, part))
        return philox(list(counter), self.seed)

    def uniform(self, word: Tensor) -> Tensor:
        return uniform(word, self.dtype).double()  # rounded once, then exact, as in the kernels

    def normal_pair(self, word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
        r = torch.sqrt(-2 * torch.log(self.uniform(word0)))
        angle = 2 * math.pi * self.uniform(word1)
        return r * torch.cos(angle), r * torch.sin(angle)

    def normals(self, D: int) -> Tensor:  # [N B, D], of part 0
        blocks = torch.arange((D + 3) // 4, device=self.index.device)
        w = self.words(self.index[:, None], blocks, 0)
        four = (*self.normal_pair(w[0], w[1]), *self.normal_pair(w[2], w[3]))
        return torch.stack(four, dim=-1).flatten(1)[:, :D]
