"""Saves a model that several processes hold: each writes its part of every tensor, once, into files of one folder.

The layout of the files follows from names, dtypes and shapes. So the whole model is looked at with stand-ins for its
weights, which take no memory, and no weight is ever gathered.
"""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.folders import new_folder
from ..checkpoint.writer import ShardWriter
from ..errors import CheckpointError, QuantizationError, listed
from ..quantization.bnb import library
from ..quantization.formats import Int8
from ..quantization.layers import modules_of_peft
from .ranks import Ranks
from .sharding import UNSHARDED, sharding_of
from .shards import QuantizedShard, Whole, shard_of


class JointSave:
    """The save of a model, by all processes that hold it, or by the only one.

    Attributes:
        is_first: whether this process writes what belongs to no other.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare to save a model; all processes that hold it do."""
        sharding = sharding_of(model)
        self._model = model
        self._ranks = None if sharding is None else Ranks(sharding.mesh, "save_quantized_model", "folder")
        self.is_first = self._ranks is None or self._ranks.is_first
        self._own: dict[str, tuple[int, torch.Tensor]] = {}  # name -> where this process's bytes begin, and they

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Show whole weights instead of the parts that are here, while the model is looked at."""
        if self._ranks is None:
            yield
            return
        with self._ranks.told("folder"):
            _require_no_adapters(self._model)
        before = []
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the model's own weights stay gathered after a forward
        for path, module in list(self._model.named_modules(remove_duplicate=False)):
            for name, parameter in module._parameters.items():
                if parameter is not None and shard_of(parameter) is not None:
                    self._find(f"{path}.{name}".lstrip("."), parameter)
        made: dict[int, Any] = {}
        for module in self._model.modules():
            before.append((module, type(module), dict(vars(module)), dict(module._parameters)))
            for name, parameter in module._parameters.items():
                if parameter is not None and shard_of(parameter) is not None:
                    made.setdefault(id(parameter), _stand_in(parameter))
                    module._parameters[name] = made[id(parameter)]
            _as_unsharded(module)
        try:
            with self._ranks.told("folder"), self._ranks.told("files"), self._ranks.told("saved"):
                yield
        finally:
            for module, cls, own, parameters in before:
                module.__class__ = cls
                vars(module).clear()
                vars(module).update(own)
                module._parameters.update(parameters)

    def _find(self, name: str, parameter: nn.Parameter) -> None:
        """Note which bytes of a parameter, and of what is saved beside it, this process writes."""
        ranks, own = self._ranks, shard_of(parameter)
        assert ranks is not None
        assert own is not None
        if not isinstance(own, QuantizedShard):
            rows = -(-parameter.shape[0] // ranks.ranks)
            row = math.prod(parameter.shape[1:]) * parameter.dtype.itemsize
            self._own[name] = min(ranks.rank * rows, parameter.shape[0]) * row, own
            return
        scales, whole = name.removesuffix("weight") + "SCB", own.whole
        if not isinstance(whole.fmt, Int8):
            scales = f"{name}.absmax"
        numel = math.prod(whole.shape)
        packed = numel if isinstance(whole.fmt, Int8) else (numel + 1) // 2
        blocks = whole.shape[0] if isinstance(whole.fmt, Int8) else -(-numel // whole.fmt.blocksize)
        for key, held, nbytes in (
            (name, own.packed, packed),
            (scales, own.scales, blocks * own.scales.dtype.itemsize),
        ):
            at = min(ranks.rank * held.nbytes, nbytes)
            self._own[key] = at, held.view(torch.uint8)[: min(held.nbytes, nbytes - at)]

    @contextmanager
    def folder(self, target: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
        """Yield the folder that all write into; it is put in its place when all have written.

        Raises:
            DistributedError: another process failed.
            CheckpointError: the folder cannot be written, or this process does not see the one that the first made.
        """
        if self._ranks is None:
            with new_folder(target, overwrite=overwrite) as made:
                yield made
            return
        ranks, facts = self._ranks, {"folder to save into": os.fspath(target)}
        if self.is_first:
            with new_folder(target, overwrite=overwrite) as made:
                with ranks.agreed("folder", facts, tells={"made": str(made)}):
                    pass
                yield made
        else:
            with ranks.agreed("folder", facts):
                pass
            made = Path(ranks.told_by_first("folder")["made"])
            require_shared(made)
            yield made
        with ranks.agreed("saved"):
            pass

    def write(self, writer: ShardWriter, state: dict[str, torch.Tensor]) -> None:
        """Write what this process has of each tensor of a state_dict; of a model of its own, all.

        Raises:
            DistributedError: another process failed.
            OSError: the disk is full, for instance.
        """
        if self._ranks is None:
            for name, tensor in state.items():
                writer.write(name, tensor)
            writer.finish()
            return
        with self._ranks.agreed("files", {"files to save (weights, max_shard_size)": writer.places}):
            if self.is_first:
                writer.create()
        with self._ranks.agreed("write"):
            for name, tensor in state.items():
                if name in self._own:
                    at, own = self._own[name]
                    if self._ranks.is_first_replica:
                        writer.write_values(name, at, own)
                elif self.is_first:
                    writer.write_values(name, 0, tensor)
            if not self.is_first:
                writer.sync()
        if self.is_first:
            for name in state:
                writer.complete(name)
            writer.finish()


def _require_no_adapters(model: nn.Module) -> None:
    """Refuse adapters, which are saved beside the model, and cannot be merged into it here.

    Raises:
        QuantizationError: the model has some.
    """
    adapted = modules_of_peft(model)
    if adapted:
        raise QuantizationError(
            f"{listed(adapted, 3)}: of PEFT; save the adapter by save_pretrained(folder, state_dict=...) in the first "
            "process, with what get_model_state_dict returns in all of them; or load the model without adapters"
        )


def _as_unsharded(module: nn.Module) -> None:
    """Let a module save its weights as if it had not been sharded."""
    from torch.distributed.fsdp import FSDPModule

    own = vars(module)
    if isinstance(module, FSDPModule):
        module.__class__ = type(module).__mro__[2]  # FSDP puts itself before it
    if UNSHARDED in own:
        for name in ("_save_to_state_dict", "_load_from_state_dict"):
            del own[name]
        own.update(own[UNSHARDED])
    for hooks in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        kept = ((key, hook) for key, hook in own[hooks].items() if not _is_of_fsdp(getattr(hook, "hook", hook)))
        own[hooks] = OrderedDict(kept)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take the memory of one."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _stand_in(parameter: Any) -> Any:
    own = shard_of(parameter)
    if not isinstance(own, QuantizedShard):
        return nn.Parameter(_zeros(tuple(parameter.shape), parameter.dtype), requires_grad=parameter.requires_grad)
    whole: Whole = own.whole
    if isinstance(whole.fmt, Int8):
        rows = _zeros(whole.shape, torch.int8)
        return library().nn.Int8Params(rows, requires_grad=False, CB=rows, SCB=_zeros(whole.shape[:1], torch.float32))
    numel, state = math.prod(whole.shape), copy.copy(whole.quant_state)
    state.absmax = _zeros((-(-numel // whole.fmt.blocksize),), own.scales.dtype)
    data = _zeros(((numel + 1) // 2 // whole.storage.itemsize, 1), whole.storage)
    return library().nn.Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=whole.fmt.blocksize,
        compress_statistics=whole.fmt.double_quant,
        quant_type=whole.fmt.quant_type,
        quant_storage=whole.storage,
        bnb_quantized=True,
    )


def require_shared(folder: Path) -> None:
    """Check that a folder that another process has made is seen by this one.

    Raises:
        CheckpointError: it is not.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"'{folder.parent}' is not the same folder on all hosts: save into one that they share, such as on NFS"
        )
