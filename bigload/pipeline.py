"""Executes a Plan: bytes are read once, in file order, land on their device, are cast, quantized and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import bnb
from .bnb import QuantizedWeight
from .checkpoint import StoredTensor
from .errors import PlacementError, QuantizationError, listed
from .formats import Plain
from .keys import Source
from .memory import show
from .placement import Plan, PlannedTensor
from .stores import DeviceStore
from .transfer import Reader, default_stream

Landed = torch.Tensor | QuantizedWeight


def execute(plan: Plan, *, on_bytes: Callable[[int], object] = lambda count: None) -> dict[str, Landed]:
    """Bring every tensor of a plan into its home. The model is not touched.

    Args:
        plan: what to do.
        on_bytes: called with the count of checkpoint bytes that have landed since the last call.

    Returns:
        By the tensor's first name: the weight, plain or quantized. Tensors without sources are left out.

    Raises:
        CheckpointError: a file could not be read to its end.
        PlacementError: a device ran out of memory.
        QuantizationError: a weight has values that its format cannot hold.
    """
    waiting = [_Landing(planned, plan.config.landing_dtype) for planned in plan.tensors if planned.sources]
    arrivals = [(source, landing) for landing in waiting for source in landing.planned.sources]
    order = {file: rank for rank, file in enumerate(_files(arrivals))}
    arrivals.sort(key=lambda arrival: _position(arrival[0], order))
    landed: dict[str, Landed] = {}
    stored = [source.tensor for source, _ in arrivals if isinstance(source.tensor, StoredTensor)]
    with Reader(stored, pinned=any(planned.device.type == "cuda" for planned in plan.tensors)) as reader:
        for source, landing in arrivals:
            planned = landing.planned
            with default_stream(planned.device), _out_of_memory_named(planned):
                landing.receive(source, reader, on_bytes)
                if landing.is_complete:
                    landed[planned.tensor.name] = landing.finish()
    _require_finite(landed, plan)
    return landed


@contextmanager
def _out_of_memory_named(planned: PlannedTensor) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlacementError(
            f"{planned.device} ran out of memory at '{planned.tensor.name}' ({show(planned.nbytes)}); choose a smaller "
            "mode or free memory there"
        ) from error


def _files(arrivals: list[tuple[Source, _Landing]]) -> list[Path]:
    return sorted({source.tensor.file for source, _ in arrivals if isinstance(source.tensor, StoredTensor)})


def _position(source: Source, order: dict[Path, int]) -> tuple[int, int]:
    if isinstance(source.tensor, StoredTensor):
        return order[source.tensor.file], source.tensor.offset
    return -1, 0  # already in memory


class _Landing:
    """One tensor on its way: where its pieces land, and what is left to come."""

    def __init__(self, planned: PlannedTensor, torch_dtype: torch.dtype) -> None:
        self.planned = planned
        # What the values are cast to as they land; a weight to be quantized is cast first.
        self._dtype = planned.format.dtype if isinstance(planned.format, Plain) else torch_dtype
        self._pending = len(planned.sources)
        self._values: torch.Tensor | None = None

    @property
    def is_complete(self) -> bool:
        return self._pending == 0

    def receive(self, source: Source, reader: Reader, on_bytes: Callable[[int], object]) -> None:
        """Take in one source, whole."""
        if isinstance(source.tensor, torch.Tensor):
            self._take(source.tensor, source)
            on_bytes(source.tensor.nbytes)
        else:
            self._read(source.tensor, source, reader, on_bytes)
        self._pending -= 1

    def _take(self, tensor: torch.Tensor, source: Source) -> None:
        """Use a tensor that the model holds already, itself where nothing about it changes."""
        tensor = tensor.detach()
        if len(self.planned.sources) == 1 and not source.region:
            tensor = tensor.mT if source.transposed else tensor
            self._values = tensor.to(self.planned.device).to(self._dtype)
        else:
            self._target(source).copy_(tensor)

    def _read(self, tensor: StoredTensor, source: Source, reader: Reader, on_bytes: Callable[[int], object]) -> None:
        target = self._target(source)
        # A target that is not contiguous is filled at once, from a copy that is.
        whole = target if target.is_contiguous() else torch.empty(target.shape, dtype=self._dtype, device=target.device)
        flat = whole.view(-1)
        begin = 0
        for piece in reader.pieces(tensor, self.planned.device):
            if piece.dtype != flat.dtype:  # cast on the device: a copy that converts is many times slower
                piece = piece.to(self.planned.device, non_blocking=True)
            flat[begin : begin + len(piece)].copy_(piece, non_blocking=True)
            begin += len(piece)
            on_bytes(piece.nbytes)
        if whole is not target:
            target.copy_(whole)

    def _target(self, source: Source) -> torch.Tensor:
        if self._values is None:
            self._values = DeviceStore(self.planned.device).allocate(self.planned.shape, self._dtype)
        target = self._values[source.region] if source.region else self._values
        return target.mT if source.transposed else target

    def finish(self) -> Landed:
        values, self._values = self._values, None
        assert values is not None
        if isinstance(self.planned.format, Plain):
            return values
        return bnb.quantize(values, self.planned.format)


def _require_finite(landed: dict[str, Landed], plan: Plan) -> None:
    """Refuse weights that the format turned to infinity: their rows would be zeros or noise. One sync for all."""
    main_weights = (
        {f"{path}.weight".lstrip(".") for path in plan.layers} if plan.config.llm_int8_has_fp16_weight else set()
    )
    checked: dict[str, torch.Tensor] = {}
    for name, value in landed.items():
        if isinstance(value, QuantizedWeight):
            checked[name] = value.scales
        elif name in main_weights:
            checked[name] = value
    if not checked:
        return
    good = torch.stack([torch.isfinite(values).all() for values in checked.values()]).tolist()
    bad = [name for name, is_good in zip(checked, good, strict=True) if not is_good]
    if bad:
        through = "float16, whose largest value is 65504" if plan.config.load_in_8bit else f"{plan.config.torch_dtype}"
        raise QuantizationError(
            f"{listed(bad)}: values that are not finite as {plan.config.mode} (they go through {through}); if the "
            "checkpoint's own are finite, add these to skip_modules or choose another mode or torch_dtype"
        )
