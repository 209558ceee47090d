"""What a load by several processes needs of each, before there are any: `bigload plan --ranks`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.view import ModelView
from ..notation import show
from ..planning.placing.shares import shared_among
from ..planning.plan import Plan
from ..planning.planned_tensors import PlannedTensor
from .sharding import groups_of


@dataclass(frozen=True)
class Gather:
    """Weights that are gathered together for a forward.

    Attributes:
        path: of the module; "" for what is left to the model itself, and stays gathered until the backward is over.
        nbytes: of the whole weights.
    """

    path: str
    nbytes: int


@dataclass(frozen=True)
class RanksPlan:
    """What a load by several processes needs.

    Attributes:
        mode: of quantization.
        ranks: how many processes there are.
        held_bytes: that each holds at rest; shares are padded to one size.
        read_bytes: that each reads of the checkpoint, by rank.
        gathers: of each forward, in its order; a backward gathers all but the last again.
        whole_bytes: of the model in one process.

    Examples:
        >>> import bigload, torch
        >>> from bigload.distributed.ranks_plan import plan_ranks
        >>> layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
        >>> made = plan_ranks(layers, bigload.plan_device_map(layers, "nf4", device_map="cuda:0"), 4)
        >>> made.held_bytes, made.read_bytes, made.whole_bytes
        (1495744, (4198400, 4198400, 4198400, 4198400), 5980864)
    """

    mode: str
    ranks: int
    held_bytes: int
    read_bytes: tuple[int, ...]
    gathers: tuple[Gather, ...]
    whole_bytes: int

    @property
    def gathered_bytes(self) -> int:
        """Bytes of whole weights that are there at once at most: of the model itself, one block, and the next one."""
        *blocks, own = (gather.nbytes for gather in self.gathers)
        return own + max((a + b for a, b in zip(blocks, [*blocks[1:], 0], strict=True)), default=0)

    @property
    def received_bytes(self) -> int:
        """Bytes that each process gets from the others in a forward."""
        return sum(gather.nbytes for gather in self.gathers) * (self.ranks - 1) // self.ranks

    def rows(self, hosts: int = 1) -> Iterator[tuple[str, ...]]:
        """Yield the rows of a table, the first being its head."""
        yield "", "bytes"
        yield "held by each rank", show(self.held_bytes)
        yield "gathered at once beside it, at most", show(self.gathered_bytes)
        yield "read by each rank, at most", show(max(self.read_bytes))
        yield "read by each host", show(-(-sum(self.read_bytes) // hosts))
        yield "read by all", show(sum(self.read_bytes))
        yield f"received in a forward, in {len(self.gathers)} gathers", show(self.received_bytes)

    def summary(self) -> str:
        """Say it in a sentence."""
        what = "Not quantized" if self.mode == "none" else f"In {self.mode}"
        return (
            f"{what}, each of {self.ranks} ranks holds {show(self.held_bytes)} of {show(self.whole_bytes)}, and needs "
            f"{show(self.held_bytes + self.gathered_bytes)} with what is gathered, beside activations, gradients and "
            "the optimizer."
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it, in bytes."""
        return {
            "mode": self.mode,
            "ranks": self.ranks,
            "held_bytes": self.held_bytes,
            "gathered_bytes": self.gathered_bytes,
            "read_bytes": list(self.read_bytes),
            "received_bytes": self.received_bytes,
            "gathers": [vars(gather) for gather in self.gathers],
            "whole_bytes": self.whole_bytes,
        }


def plan_ranks(model: nn.Module, plan: Plan, ranks: int, no_split: Collection[str] | None = None) -> RanksPlan:
    """Divide a plan among processes.

    Args:
        model: that the plan is of.
        plan: for one device, from `plan_device_map`.
        ranks: how many processes there are.
        no_split: names of the classes of blocks, by default the model's own.
    """
    view = ModelView(model)
    shares = [shared_among(plan.tensors, rank, ranks) for rank in range(ranks)]
    groups = groups_of(view, plan, no_split)
    by_group: dict[str, int] = dict.fromkeys([*groups, ""], 0)
    for planned in plan.tensors:
        if planned.tensor.is_parameter:
            by_group[_group(planned.tensor.name, groups)] += planned.nbytes
    return RanksPlan(
        plan.config.mode,
        ranks,
        sum(planned.nbytes for planned in shares[0]),
        tuple(sum(_read_bytes(planned, plan.config.load_dtype) for planned in share) for share in shares),
        tuple(Gather(path, nbytes) for path, nbytes in by_group.items()),
        plan.nbytes,
    )


def _group(name: str, groups: Collection[str]) -> str:
    return next((path for path in groups if name.startswith(f"{path}.")), "")


def _read_bytes(planned: PlannedTensor, dtype: torch.dtype) -> int:
    """Return what is read for a tensor; weights that are not here count as stored in the dtype of the load."""
    read = planned.read_bytes
    stored = planned.sources[0].tensor if planned.sources else None
    if isinstance(stored, torch.Tensor) and stored.is_meta and stored.is_floating_point():
        return read * dtype.itemsize // stored.dtype.itemsize
    return read
