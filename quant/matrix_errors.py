"""The errors of a quantized matrix to its source: of the whole, to one side, and of each row.

A matrix of 7168 rows does not show one broken row: zeroed, it adds 1/sqrt(7168) to an error of
0.1. By itself it does: a zeroed row errs by 1, another's row by about sqrt 2, and neither is like
the source's (cosine 0; 1/sqrt(K) by chance).

What right rows may err by. FP8 is rounded to nearest: one part in 16, and 0.07 with scales in
bfloat16. Others may come of GPTQ, which moves weights where inputs have few directions, or small
ones: on weights with outliers and Hessians made to provoke it rows reached 1.04 at 2 bits, 0.82 at
3 and 4, 0.67 at 5, 0.13 at 8 and 0.47 at NVFP4. The demo model, quantized with 45 to 600 tokens,
has a matrix whose rows reach 1.36 at W3A16 and 0.89 at NVFP4, and a cosine of 0.57 (0.31 at 2 bits,
of an error of 2.5). So few bits have bounds above 1, and a cosine finds the row below them that is
another's. All rows share the Hessian, and where it moves one far it moves all: five times their
median is right too (4.4 times was seen).

Rows so small that the format cannot hold them (of an FP8 block, or under an NVFP4 global scale
that others need) may vanish: E4M3 ends 2^−18 below its largest value, and what is within
RESOLUTION of the largest weight is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant.schemes import Scheme
from quant.spec_decoder import Array

# largest relative error of one row, by bits of integers and by kind of the others
INTEGER_ROWS: Mapping[int, float] = {2: 1.5, 3: 1.4, 4: 1.2, 5: 1.0, 6: 0.7, 7: 0.5, 8: 0.4}
FLOAT_ROWS: Mapping[str, float] = {"nvfp4": 1.1, "fp8_block": 0.2, "fp8_channel": 0.2}
UNLIKE_ERROR, UNLIKE_COSINE = 0.9, 0.2  # beyond both a row is another's, or none
MEDIANS = 5.0  # of the rows' errors, which a row may reach in any case
RESOLUTION = 2.0**-16  # of the largest weight
NVFP4_LARGEST = 6.0 * 448.0  # what a global scale of 1 can hold
CHUNK = 1 << 20  # weights: their difference stays in a cache


@dataclass(frozen=True, slots=True)
class MatrixErrors:
    """Norms of the rows of W, of Ŵ and of W − Ŵ, and W·Ŵ; float64 [N].

    `lean` is |mean of W − Ŵ| by its root mean square: 1 when all weights are off by one number.
    Rounding leaves about 1/sqrt(weights), however coarse; a zero point of the other convention
    moves every weight one step the same way.
    """

    weight_N: Array
    decoded_N: Array
    difference_N: Array
    product_N: Array
    largest: float
    columns: int
    lean: float

    @property
    def relative(self) -> float:
        """||W − Ŵ|| / ||W||; 0 for equal values."""
        return ratio(np.linalg.norm(self.difference_N), np.linalg.norm(self.weight_N))

    def broken_rows(self, scheme: Scheme, global_scale: float | None = None) -> list[int]:
        """Rows that rounding to `scheme` does not explain, the worst first.

        `global_scale` is NVFP4's, which may be that of a larger partner.
        """
        largest = self.largest
        if global_scale is not None:
            largest = max(largest, NVFP4_LARGEST / global_scale)
        unheld = RESOLUTION * largest * self.columns**0.5
        error_N = self.difference_N - unheld
        unlike_N = self.product_N < UNLIKE_COSINE * self.weight_N * self.decoded_N
        unlike_N |= self.decoded_N == 0
        used = self.weight_N > 0
        usual = np.median(self.difference_N[used] / self.weight_N[used]) if used.any() else 0.0
        broken_N = error_N > max(row_bound(scheme), MEDIANS * usual) * self.weight_N
        broken_N |= unlike_N & (error_N > UNLIKE_ERROR * self.weight_N)
        rows = np.flatnonzero(broken_N)
        return sorted(rows.tolist(), key=lambda row: -self.of_row(row))

    def of_row(self, row: int) -> float:
        """The relative error of one row."""
        return ratio(self.difference_N[row], self.weight_N[row])


def ratio(error: float | np.floating[Any], norm: float | np.floating[Any]) -> float:
    """An error by the norm of what it is an error of; 0 for none, infinity beside a norm of 0."""
    if error == 0:
        return 0.0
    return float(error / norm) if norm else float("inf")


def row_bound(scheme: Scheme) -> float:
    """The largest relative error of a row that is like the source's, in a matrix of small ones."""
    return INTEGER_ROWS[scheme.bits] if scheme.kind == "int" else FLOAT_ROWS[scheme.kind]


def matrix_errors(weight: Array, decoded: Array) -> MatrixErrors | None:
    """The errors of `decoded`, float32 [N, K], a few rows at a time; None for unlike shapes."""
    if weight.shape != decoded.shape:
        return None
    rows, columns = weight.shape
    squares = np.empty((4, rows))  # of W, of Ŵ, of their difference; and the product
    total, largest = 0.0, 0.0
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        one, other = np.ascontiguousarray(weight[part], np.float32), decoded[part]
        difference = one - other
        pairs = ((one, one), (other, other), (difference, difference), (one, other))
        for sums, (left, right) in zip(squares, pairs, strict=True):
            sums[part] = np.einsum("nk,nk->n", left, right)
        total += float(difference.sum(dtype=np.float64))
        largest = max(largest, float(one.max()), -float(one.min()))
    mean_square = float(squares[2].sum()) / weight.size
    return MatrixErrors(
        weight_N=np.sqrt(squares[0]),
        decoded_N=np.sqrt(squares[1]),
        difference_N=np.sqrt(squares[2]),
        product_N=squares[3],
        largest=largest,
        columns=columns,
        lean=abs(total) / weight.size / mean_square**0.5 if mean_square else 0.0,
    )
