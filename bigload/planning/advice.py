"""Errors for a model that does not fit: where, by how many bytes, and what would help."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..errors import PlacementError, listed
from ..hardware.devices import Place
from ..io.transfer import WINDOW_BYTES
from ..notation import show
from ..quantization import formats
from ..quantization.formats import FourBit, Plain
from .placing.accounts import Account
from .placing.solver import DoesNotFitError
from .request import longest_match
from .units import RESIDENT_BYTES, Unit

# Why other tensors stay on the device that computes, though their unit is offloaded.
ONLY_LEAVES_LEAVE = (
    "only floating-point parameters that the forward of one module without children reads can be offloaded"
)
_SMALLER = {name: FourBit("nf4", 64, name == "nf4-dq", torch.uint8) for name in ("nf4", "nf4-dq")}


def does_not_fit_error(
    error: DoesNotFitError,
    units: Sequence[Unit],
    devices: Sequence[torch.device],
    reserve: int,
    *,
    may_use_disk: bool,
    may_leave_out: bool,
) -> PlacementError:
    """Return the error for a shortage, with the place, the missing bytes, and remedies.

    Args:
        error: the shortage.
        units: of the model.
        devices: that compute.
        reserve: bytes kept free on each GPU.
        may_use_disk: whether the model fits if blocks may be offloaded to a disk.
        may_leave_out: whether it fits without the device that is too small.
    """
    is_device = isinstance(error.place, int)
    place = devices[error.place] if isinstance(error.place, int) else error.place
    allowed = max(error.allowed, 0)
    lacking = error.needed - error.allowed
    # Where nothing may be used, any unit is too large, and which one says nothing.
    alone = units[error.item].name if error.item is not None and allowed else ""
    extra = f", beside {show(reserve)} {_kept_for(reserve)}" if is_device and reserve else ""
    too_large = f"'{alone}' alone is too large for it; " if alone else ""
    bound = _large_and_bound(units) if is_device else []
    if bound:
        too_large += f"{listed(bound, 3)} cannot be offloaded: {ONLY_LEAVES_LEAVE}; "
    helps = _smaller_modes(units, lacking)
    if may_use_disk:
        helps.append("an offload_folder, so that blocks may be offloaded to the disk")
    helps.append(f"a budget {show(lacking)} larger there")
    if may_leave_out:
        helps.append(f"leaving {place} out")
    return PlacementError(
        f"what must be on {place} needs {show(error.needed)}, where {show(allowed)} may be used{extra}: "
        f"{show(lacking)} too little; {too_large}what would help: {', or '.join(helps)}"
    )


def _large_and_bound(units: Sequence[Unit]) -> list[str]:
    """List large parameters that stay on a device though their unit is offloaded, the largest first."""
    found = {
        planned.tensor.name: planned.nbytes
        for unit in units
        for planned in unit.tensors
        if planned.tensor.is_parameter and planned.nbytes >= RESIDENT_BYTES and planned not in unit.offloaded
    }
    return sorted(found, key=lambda name: -found[name])


def _kept_for(reserve: int) -> str:
    return "kept for the transfers of the load" if reserve == WINDOW_BYTES else "kept for activations"


def _smaller_modes(units: Sequence[Unit], lacking: int) -> list[str]:
    """List modes that would save at least the missing bytes, each with the size of the whole model in it."""
    tensors = {id(planned): planned for unit in units for planned in unit.tensors}.values()
    if any(isinstance(source.tensor, QuantizedTensor) for planned in tensors for source in planned.sources):
        return []  # the checkpoint has decided
    total, found = sum(planned.nbytes for planned in tensors), []
    for mode, fmt in _SMALLER.items():
        made = sum(
            planned.nbytes if isinstance(planned.format, Plain) else formats.nbytes(fmt, planned.shape)
            for planned in tensors
        )
        if made < total and total - made >= lacking:
            found.append(f"{mode} ({show(made)} in all, not {show(total)})")
    return found


def check_accounts(accounts: Sequence[Account], limited: Collection[Place]) -> None:
    """Check that no place needs more than its budget.

    Args:
        accounts: of all places.
        limited: places whose budget the caller set; for the others it is what is free now.

    Raises:
        PlacementError: a place needs more; names the bytes needed and allowed.
    """
    for account in accounts:
        if account.free is not None and account.free < 0:
            beside = f" (of it {show(account.reserve)} {_kept_for(account.reserve)})" if account.reserve else ""
            allowed = "max_memory allows" if account.place in limited else "where there is free now"
            raise PlacementError(
                f"the model needs {show(account.needed)}{beside} on {account.place}, {allowed} "
                f"{show(account.budget or 0)}, {show(-account.free)} too little; choose a smaller mode, another "
                f"device_map{', a smaller expert_cache' if account.cache else ''} or a larger budget"
            )


def split_unit_error(unit: Unit, places: Mapping[str, Place], found: Sequence[Place]) -> PlacementError:
    """Return the error for a device map that splits a unit over several places."""
    by_place: dict[Place, list[str]] = defaultdict(list)
    for path, place in places.items():
        if any(longest_match(name, places) == path for planned in unit.tensors for name in planned.tensor.names):
            by_place[place].append(path)
    parts = "; ".join(f"{listed(by_place[place], 3)} on {place}" for place in found)
    what = f"modules that share a weight: {listed(unit.paths)}"
    if len(unit.paths) == 1:
        what = f"the block '{unit.name}'" if unit.is_block else f"the module '{unit.name}'"
    return PlacementError(f"device_map divides {what} ({parts}): one device must hold it whole")
