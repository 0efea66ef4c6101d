"""What an operator wants of an export."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nbdq.chain.views import View
from nbdq.server.admission.access import Access
from nbdq.server.exports.rate import Rates
from nbdq.server.exports.writing import DetectZeroes


@dataclass(frozen=True)
class Wish:
    """What an operator wants of an export."""

    id: str
    name: str
    description: str = ""
    writable: bool = False
    view: View = field(default_factory=View)
    """Other views than the disk itself are read-only."""
    bitmaps: Sequence[str] = ()
    allocation_depth: bool = False
    maximum_connections: int = 0
    access: Access = field(default_factory=Access)
    rates: Rates = field(default_factory=Rates)
    discard: bool = True
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
