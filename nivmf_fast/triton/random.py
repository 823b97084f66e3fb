"""The random stream: Philox 4x32-10 words of a counter (block, sample, image, part), and normals.

Device functions, called by both sampler files. The words are those of `reference/random.py`.
"""

# Kernels are written in the language of Triton, whose types mypy does not know.
# mypy: disable-error-code="no-untyped-def"

import math

import triton
import triton.language as tl


@triton.jit
def philox(block, sample, image, part, key0, key1):
    """The words of a counter; block and part may be narrower than sample and image, or ints."""
    zero = sample ^ sample
    return tl.philox_impl(zero + block, sample, image, zero + part, key0, key1)


@triton.jit
def uniform(word, dtype: tl.constexpr):
    return word.to(dtype) * 2.0**-32 + 2.0**-33  # exact product: the same with and without FMA


# Taylor coefficients of cos and sin of a quarter turn times f, in f^2
_COS = tl.constexpr(
    tuple((-1) ** i * (math.pi / 2) ** (2 * i) / math.factorial(2 * i) for i in range(9))
)
_SIN = tl.constexpr(
    tuple((-1) ** i * (math.pi / 2) ** (2 * i + 1) / math.factorial(2 * i + 1) for i in range(9))
)


@triton.jit
def cos_sin(turns):
    """cos and sin of 2 pi turns, without tl.sin's slow path through local memory."""
    TERMS: tl.constexpr = 5 if turns.dtype == tl.float32 else 9
    nearest = tl.floor(4 * turns + 0.5)
    f = 4 * turns - nearest
    f2 = f * f
    cos, sin = tl.zeros_like(f) + _COS[TERMS - 1], tl.zeros_like(f) + _SIN[TERMS - 1]
    for i in tl.static_range(TERMS - 2, -1, -1):
        cos = cos * f2 + _COS[i]
        sin = sin * f2 + _SIN[i]
    sin *= f
    quadrant = nearest.to(tl.int32)
    odd = (quadrant & 1) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    return first, tl.where((quadrant & 2) != 0, -second, second)


@triton.jit
def normal_pair(word0, word1, dtype: tl.constexpr):
    r = tl.sqrt(-2 * tl.log(uniform(word0, dtype)))
    cos, sin = cos_sin(uniform(word1, dtype))
    return r * cos, r * sin


@triton.jit
def normals(
    start, sample, image, key0, key1, dtype: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Normals start .. start + BLOCK_D - 1 of each row, zero from D on."""
    block = (start // 4 + tl.arange(0, BLOCK_D // 4)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = philox(block, sample[:, None], image[:, None], 0, key0, key1)
    n0, n1 = normal_pair(w0, w1, dtype)
    n2, n3 = normal_pair(w2, w3, dtype)
    four = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    row = tl.reshape(four, (sample.shape[0], BLOCK_D))
    return tl.where((start + tl.arange(0, BLOCK_D))[None, :] < D, row, 0.0)
