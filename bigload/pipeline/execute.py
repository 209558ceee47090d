"""Executes a Plan: reads every byte once, in file order, copies it to its device, casts and quantizes it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from operator import itemgetter
from typing import Any

import torch

from ..checkpoint.bitsandbytes import QuantizedTensor
from ..errors import CheckpointError, PlacementError, QuantizationError, listed
from ..hardware.allocation import allocate, is_shortage, reserve
from ..hardware.devices import CPU
from ..hardware.interrupts import check_interrupt, interruptible
from ..io.program import ReadTask, not_taken
from ..io.ring import slot_bytes
from ..io.tensors import LazyTensor, StoredTensor
from ..io.timeline import Timeline
from ..io.transfer import WINDOW_BYTES, default_stream, read_all
from ..notation import show
from ..offload.targets import OffloadTargets
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from ..quantization.formats import Plain
from ..quantization.quantized_weight import QuantizedWeight
from ..quantization.quantizer import largest
from .sinks import CopySink, QuantizeSink, Sink, StoredPartsSink, gathered_if_needed, numel, stored_weight
from .transcoding import Transcoder, in_file_order

LoadedTensor = torch.Tensor | QuantizedWeight


def execute(
    plan: Plan,
    *,
    on_bytes: Callable[[int], object] = lambda count: None,
    on_loaded: Callable[[str, LoadedTensor], object] = lambda name, value: None,
    meanwhile: Callable[[], object] = lambda: None,
    targets: OffloadTargets | None = None,
    timeline: Timeline | None = None,
) -> dict[str, LoadedTensor]:
    """Load every tensor of a plan. The model is not changed.

    Args:
        plan: what to load, from where, in which format and to which device.
        on_bytes: called with the number of checkpoint bytes that have been loaded since the last call.
        on_loaded: called with each tensor and its first name as soon as it is complete, while others are being read.
        meanwhile: called once, while the first bytes are read.
        targets: where to put the offloaded tensors.
        timeline: gets the times of reads, copies and the work on values.

    Returns:
        First name of each tensor -> the weight, plain or quantized. Tensors without sources are left out.

    Raises:
        CheckpointError: a file could not be read to its end.
        PlacementError: a device ran out of memory.
        QuantizationError: a weight has values that its format cannot hold.
    """
    loader = _Loader(plan, targets, on_bytes, on_loaded)
    with ExitStack() as streams:
        for device in {planned.device for planned in plan.tensors}:
            streams.enter_context(default_stream(device))
        for device, nbytes in plan.device_bytes.items():
            reserve(device, nbytes)
        tasks = [task for planned in plan.tensors if planned.sources for task in loader.begin(planned)]
        read_and_load(tasks, plan, on_bytes=on_bytes, meanwhile=meanwhile, timeline=timeline)
        if any(planned.home is not None for planned in plan.tensors):
            _synchronize(plan)  # the CPU looks at what was copied into host memory
        _require_finite(loader.loaded, plan)
    _synchronize(plan)
    if timeline is not None:
        timeline.end()
    return loader.loaded


class _Loader:
    """Loads the tensors of a plan.

    Attributes:
        loaded: first name -> each tensor that is complete.
    """

    def __init__(
        self,
        plan: Plan,
        targets: OffloadTargets | None,
        on_bytes: Callable[[int], object],
        on_loaded: Callable[[str, LoadedTensor], object],
    ) -> None:
        self._load_dtype, self._targets = plan.config.load_dtype, targets
        self._on_bytes, self._on_loaded = on_bytes, on_loaded
        self.loaded: dict[str, LoadedTensor] = {}

    def begin(self, planned: PlannedTensor) -> list[ReadTask]:
        """Return the reads that a tensor needs; one that is in memory or in the offload folder is loaded at once."""
        check_interrupt()
        target = self._targets if planned.home is not None else None
        finish = functools.partial(self._finish, planned, target)
        buffers: Mapping[str, torch.Tensor] = {}
        if target is not None:
            cached = target.find_cached(planned)
            if cached is not None:
                self._keep(planned, cached)
                self._on_bytes(sum(source.tensor.nbytes for source in planned.sources))
                return []
            buffers, planned = target.host_buffers(planned), _read_on_cpu(planned)
        if _is_own_tensor(planned):
            finish(_explain_out_of_memory(functools.partial(_tensor_shortage, planned), _own_tensor)(planned))
            return []
        # Most are stored as they will be, and there may be tens of thousands: those need no sink.
        homes = [] if buffers else _read_home(planned, finish)
        make = functools.partial(_make_sink, self._load_dtype, buffers)
        return homes or read_tasks_for(planned, make, finish)

    def _finish(self, planned: PlannedTensor, target: OffloadTargets | None, value: LoadedTensor) -> None:
        self._keep(planned, value if target is None else target.offload(planned, value))

    def _keep(self, planned: PlannedTensor, value: LoadedTensor) -> None:
        name = planned.tensor.name
        self.loaded[name] = value
        self._on_loaded(name, value)


def _read_home(planned: PlannedTensor, finish: Callable[[LoadedTensor], object]) -> list[ReadTask]:
    """Return the reads of a tensor that is stored as it will be, straight into its memory; none for any other."""
    source, stored = planned.sources[0].tensor, planned.stored_as_is
    parts: Mapping[str, StoredTensor]
    make: Callable[[Mapping[str, torch.Tensor]], LoadedTensor]
    if isinstance(source, QuantizedTensor) and not isinstance(source.parts["weight"], LazyTensor):
        parts, make = source.parts, functools.partial(stored_weight, source)
    elif stored is not None:
        parts, make = {"weight": stored}, itemgetter("weight")
    else:
        return []
    missing = sum(map(numel, parts.values()))
    try:
        values = {name: allocate(tuple(part.shape), part.dtype, planned.device) for name, part in parts.items()}
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise _out_of_memory(_tensor_shortage(planned)) from error

    def arrived(count: int) -> None:
        nonlocal missing
        missing -= count
        if not missing:
            finish(make(values))

    homes = ((part, values[name]) for name, part in parts.items() if part.nbytes)
    return [ReadTask(part, planned.device, not_taken, home, arrived=arrived) for part, home in homes]


def _synchronize(plan: Plan) -> None:
    """Wait for GPUs, so that what is returned is complete and errors are raised here."""
    for device in {planned.device for planned in plan.tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _read_on_cpu(planned: PlannedTensor) -> PlannedTensor:
    """Read an offloaded tensor straight into host memory, unless its device must quantize it first."""
    is_stored_quantized = isinstance(planned.sources[0].tensor, QuantizedTensor)
    needs_quantizing = not is_stored_quantized and not isinstance(planned.format, Plain)
    return planned if planned.home is None or needs_quantizing else dataclasses.replace(planned, device=CPU)


def read_and_load(
    tasks: Sequence[ReadTask],
    plan: Plan,
    *,
    on_bytes: Callable[[int], object],
    meanwhile: Callable[[], object] = lambda: None,
    timeline: Timeline | None = None,
) -> None:
    """Read the tasks' tensors from files, in file order, then take those that are in memory.

    Raises:
        CheckpointError: a file could not be read to its end, or holds scales that are not finite.
        PlacementError: a device ran out of memory.
    """
    transcoder, where = Transcoder(), functools.partial(_window_shortage, plan)
    tasks = _explain_out_of_memory(where, transcoder.reads)(tasks)
    ordered = in_file_order([task for task in tasks if not isinstance(task.tensor, LazyTensor)])
    read = functools.partial(read_all, on_bytes=on_bytes, meanwhile=meanwhile, timeline=timeline)
    with transcoder.finite():
        _explain_out_of_memory(where, read)(ordered)
        for task in tasks:
            if isinstance(task.tensor, LazyTensor):
                check_interrupt()
                _feed(task, task.tensor.load())
                on_bytes(task.tensor.nbytes)


def _feed(task: ReadTask, tensor: torch.Tensor) -> None:
    """Give a task its values from memory, in pieces."""
    values = tensor.detach().contiguous().view(-1)
    step = max(1, slot_bytes() // tensor.dtype.itemsize // task.values_per_scale) * task.values_per_scale
    for begin in range(0, len(values), step):
        check_interrupt()
        task.take(values[begin : begin + step].to(task.device), begin)
    task.arrived(len(values))


def read_tasks_for(
    planned: PlannedTensor, make_sink: Callable[[PlannedTensor], Sink], kept: Callable[[Any], object]
) -> list[ReadTask]:
    """Make the sink of one tensor and return the reads that fill it.

    Args:
        planned: the tensor.
        make_sink: makes the sink, which may allocate memory.
        kept: called with what the sink has made, when all values have arrived.
    """
    where = functools.partial(_tensor_shortage, planned)
    sink = _explain_out_of_memory(where, make_sink)(planned)
    finish = _explain_out_of_memory(where, sink.finish)
    tasks = sink.tasks()
    missing = sum(numel(task.tensor) for task in tasks)

    def count_down(count: int) -> None:
        nonlocal missing
        missing -= count
        if not missing:
            kept(finish())

    if not missing:
        kept(finish())
        return []
    for task in tasks:
        task.take, task.arrived = _explain_out_of_memory(where, task.take), count_down
    return [task for task in tasks if task.tensor.nbytes]


def _make_sink(torch_dtype: torch.dtype, buffers: Mapping[str, torch.Tensor], planned: PlannedTensor) -> Sink:
    """Make what takes a tensor's values.

    Args:
        torch_dtype: the dtype that weights are cast to before they are quantized.
        buffers: memory for the tensor's parts, by their names in its format; the others are allocated.
        planned: the tensor.
    """
    stored, fmt = planned.sources[0].tensor, planned.format

    def buffer(part: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return buffers[part] if part in buffers else allocate(shape, dtype, planned.device)

    if isinstance(stored, QuantizedTensor):
        return StoredPartsSink(stored, {part: buffer(part, s.shape, s.dtype) for part, s in stored.parts.items()})
    if isinstance(fmt, Plain):
        return CopySink(planned, buffer("weight", planned.shape, fmt.dtype))
    return gathered_if_needed(QuantizeSink(planned, fmt, torch_dtype))


def _is_own_tensor(planned: PlannedTensor) -> bool:
    """Whether a tensor's only source is a tensor that the model holds already."""
    own = planned.sources[0]
    return isinstance(planned.format, Plain) and isinstance(own.tensor, torch.Tensor) and not own.region


def _own_tensor(planned: PlannedTensor) -> torch.Tensor:
    """Return the tensor that the model holds; it shares memory with that one unless its device or dtype changes."""
    own = planned.sources[0]
    assert isinstance(own.tensor, torch.Tensor)
    assert isinstance(planned.format, Plain)
    tensor = own.tensor.detach().mT if own.transposed else own.tensor.detach()
    return tensor.to(planned.device).to(planned.format.dtype)


def _explain_out_of_memory(where: Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call so that it raises a PlacementError that says where memory ran out."""

    def explained(*args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            raise _out_of_memory(where()) from error

    return explained


def _out_of_memory(where: str) -> PlacementError:
    return PlacementError(f"{where}; choose a smaller mode or free memory there")


def _tensor_shortage(planned: PlannedTensor) -> str:
    return f"{planned.device} ran out of memory at '{planned.tensor.name}' ({show(planned.nbytes)})"


def _window_shortage(plan: Plan) -> str:
    devices = listed(map(str, plan.device_bytes))
    return f"{devices} ran out of memory for tensors on their way there ({show(WINDOW_BYTES)} beside the model)"


def _require_finite(loaded: dict[str, LoadedTensor], plan: Plan) -> None:
    """Refuse weights that overflow in their format: their rows would be zeros or noise. One sync for each device."""
    main_weights = (
        {f"{path}.weight".lstrip(".") for path in plan.layers} if plan.config.llm_int8_has_fp16_weight else set()
    )
    checked: list[tuple[str, torch.Tensor]] = []
    for name, value in interruptible(loaded.items()):
        if isinstance(value, QuantizedWeight):
            checked += [(name, scales) for scales in value.scales if scales.numel()]
        elif name in main_weights:
            checked.append((name, value))
    if not checked:
        return
    devices = dict.fromkeys(values.device for _, values in checked)
    bad = list(dict.fromkeys(name for device in devices for name in _not_finite(checked, device)))
    stored = {p.tensor.name for p in plan.tensors if p.sources and isinstance(p.sources[0].tensor, QuantizedTensor)}
    damaged = [name for name in bad if name in stored]
    if damaged:
        raise CheckpointError(f"{listed(damaged)}: stored with scales that are not finite: the file is damaged")
    if bad:
        through = "float16, whose largest value is 65504" if plan.config.load_in_8bit else f"{plan.config.torch_dtype}"
        raise QuantizationError(
            f"{listed(bad)}: values that are not finite as {plan.config.mode} (they are cast to {through}); if the "
            "checkpoint's own are finite, add these to skip_modules or choose another mode or torch_dtype"
        )


def _not_finite(checked: Sequence[tuple[str, torch.Tensor]], device: torch.device) -> list[str]:
    on_device = [(name, values) for name, values in checked if values.device == device]
    found = largest([values for _, values in on_device])
    return [name for (name, _), value in zip(on_device, found, strict=True) if not math.isfinite(value)]
