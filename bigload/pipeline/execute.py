"""Executes a Plan: bytes are read once, in file order, land on their device, are cast, quantized and stored."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..errors import CheckpointError, PlacementError, QuantizationError, listed
from ..hardware.allocation import DeviceStore, reserve
from ..hardware.devices import CPU
from ..io.extents import Delivery
from ..io.ring import slot_bytes
from ..io.tensors import LazyTensor, StoredTensor
from ..io.transfer import WINDOW_BYTES, default_stream, deliver
from ..offload.resting import Resting
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from ..planning.sources import Source
from ..quantization.formats import FourBit, Int8, Plain
from ..quantization.quantized_weight import QuantizedWeight
from ..quantization.quantizer import Quantizer, quantize
from ..sizes import show

Landed = torch.Tensor | QuantizedWeight
_NO_MEMORY: Mapping[str, torch.Tensor] = {}


def execute(
    plan: Plan,
    *,
    on_bytes: Callable[[int], object] = lambda count: None,
    on_landed: Callable[[str, Landed], object] = lambda name, value: None,
    resting: Resting | None = None,
) -> dict[str, Landed]:
    """Bring every tensor of a plan into its home. The model is not touched.

    Args:
        plan: what to do.
        on_bytes: called with the count of checkpoint bytes that have landed since the last call.
        on_landed: called with each tensor, by its first name, as soon as it is whole; others are still being read.
        resting: where what is offloaded comes to rest.

    Returns:
        By the tensor's first name: the weight, plain or quantized. Tensors without sources are left out.

    Raises:
        CheckpointError: a file could not be read to its end.
        PlacementError: a device ran out of memory.
        QuantizationError: a weight has values that its format cannot hold.
    """
    landed: dict[str, Landed] = {}
    homes = {planned.tensor.name: planned for planned in plan.tensors if planned.home is not None}

    def keep(name: str, value: Landed) -> None:
        if resting is not None and name in homes:
            value = resting.put(homes[name], value)
        arrive(name, value)

    def arrive(name: str, value: Landed) -> None:
        landed[name] = value
        on_landed(name, value)

    def begin(planned: PlannedTensor) -> list[Delivery]:
        name, rest = planned.tensor.name, _NO_MEMORY
        if resting is not None and planned.home is not None:
            known = resting.known(planned)
            if known is not None:
                arrive(name, known)
                on_bytes(sum(source.tensor.nbytes for source in planned.sources))
                return []
            rest, planned = resting.memory(planned), _read_at_home(planned)
        if _is_itself(planned):
            keep(name, _named(functools.partial(_at, planned), _itself)(planned))
            return []
        prepare = functools.partial(_prepared, plan.config.landing_dtype, rest)
        return deliveries_for(planned, prepare, functools.partial(keep, name))

    with ExitStack() as streams:
        for device in {planned.device for planned in plan.tensors}:
            streams.enter_context(default_stream(device))
        for device, nbytes in plan.device_bytes.items():
            reserve(device, nbytes)
        deliveries = [way for planned in plan.tensors if planned.sources for way in begin(planned)]
        deliver_all(deliveries, plan, on_bytes=on_bytes)
        if homes:
            _finish(plan)  # what went home is looked at there
        _require_finite(landed, plan)
    _finish(plan)
    return landed


def _finish(plan: Plan) -> None:
    """Wait for GPUs: what is given back is there, and errors are ours."""
    for device in {planned.device for planned in plan.tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _read_at_home(planned: PlannedTensor) -> PlannedTensor:
    """Let what rests on the CPU as it is stored go straight there: only what is quantized passes through the device."""
    stored = isinstance(planned.sources[0].tensor, QuantizedTensor)
    is_ready = stored or isinstance(planned.format, Plain)
    return dataclasses.replace(planned, device=CPU) if planned.home is not None and is_ready else planned


def deliver_all(deliveries: Sequence[Delivery], plan: Plan, *, on_bytes: Callable[[int], object]) -> None:
    """Read what lies in files, in their order, and take the rest from memory.

    Raises:
        CheckpointError: a file could not be read to its end.
        PlacementError: a device ran out of memory.
    """
    ordered = _in_file_order([way for way in deliveries if not isinstance(way.tensor, LazyTensor)])
    _named(functools.partial(_on_the_way, plan), functools.partial(deliver, on_bytes=on_bytes))(ordered)
    for delivery in deliveries:
        if isinstance(delivery.tensor, LazyTensor):
            _walk(delivery, delivery.tensor.load())
            on_bytes(delivery.tensor.nbytes)


def _in_file_order(deliveries: list[Delivery]) -> list[Delivery]:
    files = {delivery.tensor.file for delivery in deliveries}
    rank: dict[Path, int] = {file: rank for rank, file in enumerate(sorted(files))}
    return sorted(deliveries, key=lambda delivery: (rank[delivery.tensor.file], delivery.tensor.offset))


def _walk(delivery: Delivery, tensor: torch.Tensor) -> None:
    """Take values from memory."""
    values = tensor.detach().contiguous().view(-1)
    step = max(1, slot_bytes() // tensor.dtype.itemsize // delivery.granule) * delivery.granule
    for begin in range(0, len(values), step):
        delivery.take(values[begin : begin + step].to(delivery.device), begin)
    delivery.arrived(len(values))


Finish = Callable[[], Any]
Prepare = Callable[[PlannedTensor], tuple[list[Delivery], Finish]]


def deliveries_for(planned: PlannedTensor, prepare: Prepare, kept: Callable[[Any], object]) -> list[Delivery]:
    """Make ready for one tensor that is read, or made of several.

    Args:
        planned: the tensor.
        prepare: takes the memory that it needs from the start, and gives a delivery for each source and what to do when
            all have arrived.
        kept: is given what that returned.
    """
    where = functools.partial(_at, planned)
    deliveries, finish = _named(where, prepare)(planned)
    finish = _named(where, finish)
    pending = sum(_numel(delivery.tensor) for delivery in deliveries)

    def arrived(count: int) -> None:
        nonlocal pending
        pending -= count
        if not pending:
            kept(finish())

    if not pending:
        arrived(0)
        return []
    for delivery in deliveries:
        delivery.take, delivery.arrived = _named(where, delivery.take), arrived
    return [delivery for delivery in deliveries if delivery.tensor.nbytes]


def _is_itself(planned: PlannedTensor) -> bool:
    """Ask whether it is a tensor of the model's own, and of nothing else."""
    own = planned.sources[0]
    return isinstance(planned.format, Plain) and isinstance(own.tensor, torch.Tensor) and not own.region


def _itself(planned: PlannedTensor) -> torch.Tensor:
    """Give the model's own tensor: the very object where nothing about it changes."""
    own = planned.sources[0]
    assert isinstance(own.tensor, torch.Tensor)
    assert isinstance(planned.format, Plain)
    tensor = own.tensor.detach().mT if own.transposed else own.tensor.detach()
    return tensor.to(planned.device).to(planned.format.dtype)


def _numel(tensor: StoredTensor | torch.Tensor) -> int:
    return tensor.nbytes // tensor.dtype.itemsize


def _stored(tensor: StoredTensor | torch.Tensor) -> StoredTensor:
    """Give where a source's values are, the model's own as such that need no reading."""
    if isinstance(tensor, StoredTensor):
        return tensor
    return LazyTensor("", Path(), tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, lambda: tensor)


def _named(where: Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
    """Make a call say where memory ran out, if it does."""

    def named(*args: Any) -> Any:
        try:
            return call(*args)
        except torch.OutOfMemoryError as error:
            raise PlacementError(f"{where()}; choose a smaller mode or free memory there") from error

    return named


def _at(planned: PlannedTensor) -> str:
    return f"{planned.device} ran out of memory at '{planned.tensor.name}' ({show(planned.nbytes)})"


def _on_the_way(plan: Plan) -> str:
    devices = listed(map(str, plan.device_bytes))
    return f"{devices} ran out of memory for what is on its way there ({show(WINDOW_BYTES)} beside the model)"


_Prepared = tuple[list[Delivery], Callable[[], Landed]]


def _prepared(torch_dtype: torch.dtype, rest: Mapping[str, torch.Tensor], planned: PlannedTensor) -> _Prepared:
    """Give a delivery for each source, and what makes the tensor when all have arrived."""
    stored, store = planned.sources[0].tensor, DeviceStore(planned.device)
    if isinstance(stored, QuantizedTensor):
        parts = {
            name: rest[name] if name in rest else store.allocate(part.shape, part.dtype)
            for name, part in stored.parts.items()
        }
        filling = [filling_of(parts[name], Source(part)) for name, part in stored.parts.items()]
        return filling, lambda: _from_stored(stored, parts)
    if isinstance(planned.format, Plain):
        values = rest["weight"] if rest else store.allocate(planned.shape, planned.format.dtype)
        return [filling_of(values, source) for source in planned.sources], lambda: values
    return _quantizing(planned, planned.format, torch_dtype)


def _from_stored(stored: QuantizedTensor, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """Make a weight that was stored quantized; of its parts one is a number in the description of the others."""
    if "nested_absmax" in parts:
        offset = torch.tensor(stored.nested_offset, dtype=torch.float32, device=parts["weight"].device)
        parts = {**parts, "nested_offset": offset}
    return QuantizedWeight.from_parts(stored.format, stored.shape, stored.dtype, parts)


def _quantizing(planned: PlannedTensor, fmt: FourBit | Int8, torch_dtype: torch.dtype) -> _Prepared:
    quantizer = Quantizer(planned.shape, fmt, torch_dtype, planned.device)
    deliveries = streamed(planned, torch_dtype, quantizer.granule, quantizer.add)
    if deliveries is None:
        return put_together(planned, torch_dtype, lambda weight: quantize(weight, fmt))
    return deliveries, quantizer.finish


def streamed(
    planned: PlannedTensor, torch_dtype: torch.dtype, granule: int, add: Callable[[torch.Tensor, int], object]
) -> list[Delivery] | None:
    """Give a delivery for each source whose pieces are used as they come, if they are runs of the tensor.

    Args:
        planned: the tensor.
        torch_dtype: what pieces are cast to first.
        granule: values that must stay together.
        add: is given each piece, and the index of its first value in the flattened tensor.

    Returns:
        None where sources lie across the tensor, or a granule does not fit a slot: see `put_together`.
    """
    begins = [_flat_begin(source, planned.shape, granule) for source in planned.sources]
    room = slot_bytes()
    fits = all(granule * source.tensor.dtype.itemsize <= room for source in planned.sources)
    if not fits or any(begin is None for begin in begins):
        return None

    def delivery(source: Source, base: int) -> Delivery:
        def take(piece: torch.Tensor, begin: int) -> None:
            add(piece.to(torch_dtype), base + begin)

        return Delivery(_stored(source.tensor), planned.device, take, granule=granule)

    return [delivery(source, begin or 0) for source, begin in zip(planned.sources, begins, strict=True)]


def put_together(
    planned: PlannedTensor, torch_dtype: torch.dtype, use: Callable[[torch.Tensor], Any]
) -> tuple[list[Delivery], Finish]:
    """Put a tensor together before it is used, since its pieces are not runs of it: transposed, or too long.

    Memory for it is taken when the first piece is there and let go of when it was used: one such tensor at a time.
    """
    held: list[torch.Tensor] = []

    def delivery(source: Source) -> Delivery:
        filling: list[Delivery] = []

        def take(piece: torch.Tensor, begin: int) -> None:
            if not held:
                held.append(DeviceStore(planned.device).allocate(planned.shape, torch_dtype))
            if not filling:
                filling.append(filling_of(held[0], source))
            filling[0].take(piece, begin)
            if begin + len(piece) == _numel(source.tensor):
                filling.clear()

        return Delivery(_stored(source.tensor), planned.device, take)

    return [delivery(source) for source in planned.sources], lambda: use(held.pop())


def _flat_begin(source: Source, shape: tuple[int, ...], granule: int) -> int | None:
    """Give the index in the flattened tensor where a source's values begin, if they follow each other from there."""
    if source.transposed:
        return None
    whole = torch.empty(shape, device="meta")
    part = whole[source.region] if source.region else whole
    begin = int(part.storage_offset())
    # A granule may not be shared with the next source.
    is_run = part.is_contiguous() and begin % granule == 0
    is_last = begin + part.numel() == whole.numel()
    return begin if is_run and (is_last or part.numel() % granule == 0) else None


def filling_of(values: torch.Tensor, source: Source) -> Delivery:
    """Fill a source's region of a tensor."""
    target = values[source.region] if source.region else values
    target = target.mT if source.transposed else target
    if target.is_contiguous():
        flat = target.view(-1)

        def copy(piece: torch.Tensor, begin: int) -> None:
            flat[begin : begin + len(piece)].copy_(piece)

        home = flat.view(torch.uint8) if source.tensor.dtype == flat.dtype else None
        return Delivery(_stored(source.tensor), values.device, copy, home)
    gathered: list[torch.Tensor] = []

    def gather(piece: torch.Tensor, begin: int) -> None:
        # Columns or a transpose: from a copy that is whole and contiguous, which lives until then.
        if not gathered:
            gathered.append(torch.empty(target.shape, dtype=piece.dtype, device=piece.device))
        whole = gathered[0].view(-1)
        whole[begin : begin + len(piece)].copy_(piece)
        if begin + len(piece) == len(whole):
            target.copy_(gathered.pop())

    return Delivery(_stored(source.tensor), values.device, gather)


def _require_finite(landed: dict[str, Landed], plan: Plan) -> None:
    """Refuse weights that the format turned to infinity: their rows would be zeros or noise. One sync for all."""
    main_weights = (
        {f"{path}.weight".lstrip(".") for path in plan.layers} if plan.config.llm_int8_has_fp16_weight else set()
    )
    stored = {p.tensor.name for p in plan.tensors if p.sources and isinstance(p.sources[0].tensor, QuantizedTensor)}
    checked: list[tuple[str, torch.Tensor]] = []
    for name, value in landed.items():
        if isinstance(value, QuantizedWeight):
            checked += [(name, scales) for scales in value.scales if scales.numel()]
        elif name in main_weights:
            checked.append((name, value))
    if not checked:
        return
    devices = dict.fromkeys(values.device for _, values in checked)
    bad = list(dict.fromkeys(name for device in devices for name in _not_finite(checked, device)))
    damaged = [name for name in bad if name in stored]
    if damaged:
        raise CheckpointError(f"{listed(damaged)}: stored with scales that are not finite: the file is damaged")
    if bad:
        through = "float16, whose largest value is 65504" if plan.config.load_in_8bit else f"{plan.config.torch_dtype}"
        raise QuantizationError(
            f"{listed(bad)}: values that are not finite as {plan.config.mode} (they go through {through}); if the "
            "checkpoint's own are finite, add these to skip_modules or choose another mode or torch_dtype"
        )


def _not_finite(checked: Sequence[tuple[str, torch.Tensor]], device: torch.device) -> list[str]:
    """Name what is not finite on one device."""
    there = [(name, values) for name, values in checked if values.device == device]
    # The largest of each, in one kernel, which passes NaN on.
    largest = torch.stack([torch.linalg.vector_norm(values, math.inf).float() for _, values in there]).tolist()
    return [name for (name, _), value in zip(there, largest, strict=True) if not math.isfinite(value)]
