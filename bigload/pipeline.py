"""Executes a Plan: bytes are read once, in file order, land on their device, are cast, quantized and stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .bnb import QuantizedWeight
from .errors import CheckpointError, PlacementError, QuantizationError, listed
from .extents import Delivery
from .formats import FourBit, Int8, Plain
from .keys import Source
from .memory import show
from .placement import Plan, PlannedTensor
from .prequantized import QuantizedTensor
from .quantize import Quantizer, from_parts, quantize
from .ring import slot_bytes
from .stored import LazyTensor, StoredTensor
from .stores import DeviceStore, reserve
from .transfer import WINDOW_BYTES, default_stream, deliver

Landed = torch.Tensor | QuantizedWeight


def execute(
    plan: Plan,
    *,
    on_bytes: Callable[[int], object] = lambda count: None,
    on_landed: Callable[[str, Landed], object] = lambda name, value: None,
) -> dict[str, Landed]:
    """Bring every tensor of a plan into its home. The model is not touched.

    Args:
        plan: what to do.
        on_bytes: called with the count of checkpoint bytes that have landed since the last call.
        on_landed: called with each tensor, by its first name, as soon as it is whole; others are still being read.

    Returns:
        By the tensor's first name: the weight, plain or quantized. Tensors without sources are left out.

    Raises:
        CheckpointError: a file could not be read to its end.
        PlacementError: a device ran out of memory.
        QuantizationError: a weight has values that its format cannot hold.
    """
    landed: dict[str, Landed] = {}

    def keep(name: str, value: Landed) -> None:
        landed[name] = value
        on_landed(name, value)

    with ExitStack() as streams:
        for device in {planned.device for planned in plan.tensors}:
            streams.enter_context(default_stream(device))
        for device, nbytes in plan.device_bytes.items():
            reserve(device, nbytes)
        ways = [way for planned in plan.tensors if planned.sources for way in _ways(planned, plan, keep)]
        with _out_of_memory_named(functools.partial(_on_the_way, plan)):
            deliver(_in_file_order([way for way in ways if _is_stored(way.source)]), on_bytes=on_bytes)
        for way in ways:
            if not _is_stored(way.source):
                way.walk()
                on_bytes(way.source.tensor.nbytes)
        _require_finite(landed, plan)
    for device in plan.device_bytes:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # what is given back is there, and errors are ours
    return landed


def _is_stored(source: Source) -> bool:
    return isinstance(source.tensor, StoredTensor) and not isinstance(source.tensor, LazyTensor)


def _in_file_order(ways: list[_Way]) -> list[Delivery]:
    deliveries = [way.delivery() for way in ways]
    files: dict[Path, int] = {file: rank for rank, file in enumerate(sorted({d.tensor.file for d in deliveries}))}
    return sorted(deliveries, key=lambda delivery: (files[delivery.tensor.file], delivery.tensor.offset))


@dataclass(frozen=True, eq=False)
class _Way:
    """How the values of one source go in: see `Delivery`."""

    source: Source
    device: torch.device
    take: Callable[[torch.Tensor, int], None]
    arrived: Callable[[int], None]
    home: torch.Tensor | None = None
    granule: int = 1

    def delivery(self) -> Delivery:
        """The same, to be read from a file."""
        assert isinstance(self.source.tensor, StoredTensor)
        return Delivery(self.source.tensor, self.device, self.take, self.home, self.granule, self.arrived)

    def walk(self) -> None:
        """Take the values from memory: the model's own, or what a LazyTensor loads."""
        tensor = self.source.tensor
        assert isinstance(tensor, (LazyTensor, torch.Tensor))
        loaded = tensor.load() if isinstance(tensor, LazyTensor) else tensor
        values = loaded.detach().contiguous().view(-1)
        step = max(1, slot_bytes() // tensor.dtype.itemsize // self.granule) * self.granule
        for begin in range(0, len(values), step):
            self.take(values[begin : begin + step].to(self.device), begin)
        self.arrived(len(values))


def _ways(planned: PlannedTensor, plan: Plan, keep: Callable[[str, Landed], None]) -> list[_Way]:
    """Make ready for one tensor: memory where it needs some from the start, and a way in for each source."""
    name, where = planned.tensor.name, functools.partial(_at, planned)
    own = planned.sources[0]
    with _out_of_memory_named(where):
        if isinstance(planned.format, Plain) and isinstance(own.tensor, torch.Tensor) and not own.region:
            # Itself, where nothing about it changes.
            tensor = own.tensor.detach().mT if own.transposed else own.tensor.detach()
            keep(name, tensor.to(planned.device).to(planned.format.dtype))
            return []
        sinks, finish = _sinks(planned, plan.config.landing_dtype)
    pending = sum(_numel(sink.source) for sink in sinks)

    def arrived(count: int) -> None:
        nonlocal pending
        pending -= count
        if not pending:
            with _out_of_memory_named(where):
                value = finish()
            keep(name, value)

    if not pending:
        arrived(0)
        return []

    def named(take: Callable[[torch.Tensor, int], None], values: torch.Tensor, begin: int) -> None:
        with _out_of_memory_named(where):
            take(values, begin)

    return [
        _Way(sink.source, planned.device, functools.partial(named, sink.take), arrived, sink.home, sink.granule)
        for sink in sinks
        if _numel(sink.source)
    ]


def _numel(source: Source) -> int:
    return source.tensor.nbytes // source.tensor.dtype.itemsize


@contextmanager
def _out_of_memory_named(where: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlacementError(f"{where()}; choose a smaller mode or free memory there") from error


def _at(planned: PlannedTensor) -> str:
    return f"{planned.device} ran out of memory at '{planned.tensor.name}' ({show(planned.nbytes)})"


def _on_the_way(plan: Plan) -> str:
    devices = listed(map(str, plan.device_bytes))
    return f"{devices} ran out of memory for what is on its way there ({show(WINDOW_BYTES)} beside the model)"


@dataclass(frozen=True, eq=False)
class _Sink:
    """Where the values of one source end: see `Delivery`."""

    source: Source
    take: Callable[[torch.Tensor, int], None]
    home: torch.Tensor | None = None
    granule: int = 1


def _sinks(planned: PlannedTensor, torch_dtype: torch.dtype) -> tuple[list[_Sink], Callable[[], Landed]]:
    """Give a sink for each source, and what makes the tensor when all have been filled."""
    stored = planned.sources[0].tensor
    if isinstance(stored, QuantizedTensor):
        return _prequantized_sinks(stored, DeviceStore(planned.device))
    if isinstance(planned.format, Plain):
        values = DeviceStore(planned.device).allocate(planned.shape, planned.format.dtype)
        return [_filling(values, source) for source in planned.sources], lambda: values
    return _quantizing_sinks(planned, planned.format, torch_dtype)


def _prequantized_sinks(stored: QuantizedTensor, store: DeviceStore) -> tuple[list[_Sink], Callable[[], Landed]]:
    parts = {name: store.allocate(part.shape, part.dtype) for name, part in stored.parts.items()}
    sinks = [_filling(parts[name], Source(part)) for name, part in stored.parts.items()]
    return sinks, lambda: from_parts(stored, parts)


def _quantizing_sinks(
    planned: PlannedTensor, fmt: FourBit | Int8, torch_dtype: torch.dtype
) -> tuple[list[_Sink], Callable[[], Landed]]:
    quantizer = Quantizer(planned.shape, fmt, torch_dtype, planned.device)
    begins = [_flat_begin(source, planned.shape, quantizer.granule) for source in planned.sources]
    room = slot_bytes()
    streams = all(begin is not None for begin in begins) and all(
        quantizer.granule * source.tensor.dtype.itemsize <= room for source in planned.sources
    )
    if not streams:
        return _sinks_put_together(planned, fmt, torch_dtype)

    def sink(source: Source, base: int) -> _Sink:
        def take(piece: torch.Tensor, begin: int) -> None:
            quantizer.add(piece.to(torch_dtype), base + begin)

        return _Sink(source, take, granule=quantizer.granule)

    sinks = [sink(source, begin or 0) for source, begin in zip(planned.sources, begins, strict=True)]
    return sinks, quantizer.finish


def _sinks_put_together(
    planned: PlannedTensor, fmt: FourBit | Int8, torch_dtype: torch.dtype
) -> tuple[list[_Sink], Callable[[], Landed]]:
    """Put a weight together before it is quantized, since its pieces are not runs of it: transposed, or too long.

    Memory for it is taken when the first piece is there and let go of when it is quantized: one such weight at a time.
    """
    held: list[torch.Tensor] = []

    def sink(source: Source) -> _Sink:
        filling: list[_Sink] = []

        def take(piece: torch.Tensor, begin: int) -> None:
            if not held:
                held.append(DeviceStore(planned.device).allocate(planned.shape, torch_dtype))
            if not filling:
                filling.append(_filling(held[0], source))
            filling[0].take(piece, begin)
            if begin + len(piece) == _numel(source):
                filling.clear()

        return _Sink(source, take)

    return [sink(source) for source in planned.sources], lambda: quantize(held.pop(), fmt)


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


def _filling(values: torch.Tensor, source: Source) -> _Sink:
    """Fill a source's region of a tensor."""
    target = values[source.region] if source.region else values
    target = target.mT if source.transposed else target
    if target.is_contiguous():
        flat = target.view(-1)

        def copy(piece: torch.Tensor, begin: int) -> None:
            flat[begin : begin + len(piece)].copy_(piece)

        return _Sink(source, copy, home=flat.view(torch.uint8) if source.tensor.dtype == flat.dtype else None)
    gathered: list[torch.Tensor] = []

    def gather(piece: torch.Tensor, begin: int) -> None:
        # Columns or a transpose: from a copy that is whole and contiguous, which lives until then.
        if not gathered:
            gathered.append(torch.empty(target.shape, dtype=piece.dtype, device=piece.device))
        whole = gathered[0].view(-1)
        whole[begin : begin + len(piece)].copy_(piece)
        if begin + len(piece) == len(whole):
            target.copy_(gathered.pop())

    return _Sink(source, gather)


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
    # The largest of each, in one kernel, which passes NaN on.
    largest = torch.stack([torch.linalg.vector_norm(values, math.inf).float() for _, values in checked]).tolist()
    bad = list(
        dict.fromkeys(name for (name, _), value in zip(checked, largest, strict=True) if not math.isfinite(value))
    )
    damaged = [name for name in bad if name in stored]
    if damaged:
        raise CheckpointError(f"{listed(damaged)}: stored with scales that are not finite: the file is damaged")
    if bad:
        through = "float16, whose largest value is 65504" if plan.config.load_in_8bit else f"{plan.config.torch_dtype}"
        raise QuantizationError(
            f"{listed(bad)}: values that are not finite as {plan.config.mode} (they go through {through}); if the "
            "checkpoint's own are finite, add these to skip_modules or choose another mode or torch_dtype"
        )
