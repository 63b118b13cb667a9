"""Flattened inputs and outputs of a compiled or exported model: datatypes, sizes and their bounds.

Plain data that AOTI packages and exported programs have in common, and what it means for a
configuration. No torch. Made by `package.py` and `program.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from configs import dtypes
from configs.offer import Offer, Offered
from deployments.signature import Signature, Slot

# torch.export calls a size at least 2 unless told otherwise, and means nothing by it.
_MEANINGLESS_LOW = 2
_NO_BOUND = 2**31 - 1  # of the proto's max_batch_size

BY_TORCH = {one.torch: one.config for one in dtypes.DATATYPES if one.torch is not None}


@dataclass(frozen=True, slots=True)
class Size:
    """One dimension: fixed, or `symbol` with bounds. `high` None is without one; what has the same
    symbol has the same size."""

    low: int
    high: int | None
    symbol: str = ""

    @property
    def shape(self) -> int:
        return -1 if self.symbol else self.low

    @property
    def fewest(self) -> int:
        return 1 if self.low <= _MEANINGLESS_LOW else self.low

    def misfit(self, size: int) -> str:
        """What is wrong with a size, in the words of compiled packages; "" if nothing."""
        if not self.symbol:
            return "" if size == self.low else f"expected: {self.low}, but got: {size}"
        if size < self.fewest:
            return f"expected it to be >= {self.fewest}, but got: {size}"
        if self.high is not None and size > self.high:
            return f"expected to be <= {self.high}, but got: {size}"
        return ""


@dataclass(frozen=True, slots=True)
class Leaf:
    """`torch_type` is torch's name of the datatype. `sizes` None: not known."""

    torch_type: str
    sizes: tuple[Size, ...] | None

    def offered(self, names: tuple[str, ...], batched: bool | None = None) -> Offered:
        shape = None if self.sizes is None else tuple(size.shape for size in self.sizes)
        return Offered(names, BY_TORCH.get(self.torch_type, ""), shape, batched)

    def led_by(self, symbols: Collection[str]) -> bool | None:
        """Whether its first dimension is one of these; None where it is not known."""
        if self.sizes is None:
            return None
        return bool(self.sizes) and self.sizes[0].symbol in symbols


def batch(inputs: Iterable[Leaf]) -> Size | None:
    """The first dimension of all of them, None where some has none of any size.

    They need not share a symbol: the rows of a batch are the same for all.
    """
    firsts = [leaf.sizes[0] if leaf.sizes else None for leaf in inputs]
    given = [first for first in firsts if first is not None and _free(first)]
    if not given or len(given) < len(firsts):
        return None
    highs = [first.high for first in given if first.high is not None]
    return Size(max(f.low for f in given), min(highs) if highs else None, given[0].symbol)


def _free(size: Size) -> bool:
    """Whether it is of any size by itself, not worked out from another."""
    return bool(size.symbol) and "(" not in size.symbol


def most_rows(size: Size) -> int:
    """0 without a bound."""
    return 0 if size.high is None or size.high >= _NO_BOUND else size.high


def names(slot: Slot, word: str, own: Mapping[int, str] | None = None) -> tuple[str, ...]:
    """What a tensor may be called: first as the model's maker has, then by the grammar."""
    given = (own or {}).get(slot.position)
    return ((given,) if given else ()) + (slot.name, f"{word}__{slot.position}")


def fixed_rows(inputs: Iterable[Leaf]) -> int:
    """The size of every input's first dimension where all are fixed at the same, else 0."""
    firsts = {leaf.sizes[0] if leaf.sizes else None for leaf in inputs}
    first = firsts.pop() if len(firsts) == 1 else None
    return 0 if first is None or first.symbol else first.low


def offer(
    signature: Signature,
    inputs: Mapping[int, Leaf],
    outputs: Mapping[int, Leaf] | None,
    own: tuple[Mapping[int, str], Mapping[int, str]] = ({}, {}),
) -> Offer:
    """What a configuration is completed from. `own` names come before those of the grammar."""
    slots = signature.inputs or ()
    known = all(slot.position in inputs for slot in slots)
    first = batch(inputs.values()) if known else None
    rows = {leaf.sizes[0].symbol for leaf in inputs.values() if leaf.sizes} - {""}
    unknown = Leaf("", None)
    return Offer(
        inputs=tuple(
            inputs.get(s.position, unknown).offered(names(s, "INPUT", own[0])) for s in slots
        ),
        outputs=None
        if outputs is None
        else tuple(
            outputs[s.position].offered(
                names(s, "OUTPUT", own[1]), outputs[s.position].led_by(rows)
            )
            for s in signature.outputs or ()
            if s.position in outputs
        ),
        batching=first is not None if known else None,
        most_rows=fixed_rows(inputs.values()) if first is None else most_rows(first),
    )
