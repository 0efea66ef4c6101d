"""Sets of numbers as sorted arrays, for what every start and every look at a chain needs.

numpy's ``unique`` and ``union1d`` make the same, but import masked arrays, in case they are given some: 20 ms for which
clients would have to wait.
"""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_Number = TypeVar("_Number", bound=np.integer[Any])


def distinct(numbers: NDArray[_Number]) -> NDArray[_Number]:
    """Each of ``numbers`` once, in ascending order."""
    ordered = np.sort(numbers)
    is_first = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return ordered[is_first]


def union(first: NDArray[_Number], second: NDArray[_Number]) -> NDArray[_Number]:
    """What is in either, each number once, in ascending order."""
    return distinct(np.concatenate((first, second)))
