"""A linear layer in fp8 with row-wise scales, from the definition of e4m3 in float64: to hold common/lm/fp8.py against.

No code of this repository, no torch: e4m3 (arXiv 2209.05433) is the list of its 127 finite values from 0 up, and a
number is rounded to the nearest of them, to the one of even code where two are as near.
"""

import numpy as np


def values() -> np.ndarray:
    """The finite values of e4m3 from 0 up, in the order of their codes: bias 7, 3 bits of mantissa, 448 the largest."""
    codes = [(exponent, mantissa) for exponent in range(16) for mantissa in range(8)][:-1]  # the last one is NaN
    return np.array([2.0 ** (max(e, 1) - 7) * (m / 8 + (e > 0)) for e, m in codes])


def rounded(x: np.ndarray) -> np.ndarray:
    """Each number of `x` as its nearest value of e4m3."""
    grid = values()
    size = np.abs(x)
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    nearer_high = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return np.sign(x) * np.where(nearer_high, high, low)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `x` (M, K) as values of e4m3 (M, K) and a scale each (M, 1).

    Scale and ratio are float32: 16-bit numbers are often exactly between two values, and the ratio decides for one.
    """
    x = x.astype(np.float32)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    return rounded(x / scale), scale.astype(np.float64)


def forward(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x W^T of x (M, K) and weight (N, K): x rounded by token, the weight by output channel."""
    (a, a_scale), (b, b_scale) = quantized(x), quantized(weight)
    return (a * a_scale) @ (b * b_scale).T


def backward(dy: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """dy W of dy (M, N): the weight's scales go into dy, which is then rounded by token."""
    b, b_scale = quantized(weight)
    a, a_scale = quantized(dy.astype(np.float32) * b_scale.T.astype(np.float32))
    return a_scale * (a @ b)
