"""The processes that load a model together: who they are, and how each learns what became of the others.

They report to each other through the store that the process group was made with, not by collectives: a collective that
one of them never enters tells the others nothing but that time is up, and on a GPU ends their processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import BigloadError, ConfigError, DistributedError, listed, reason
from ..hardware.devices import CPU

_SAME = "let all ranks make the same calls, in the same order, with the same files, model and arguments"


class Ranks:
    """The processes of a mesh.

    Attributes:
        mesh: the mesh, whose last dimension the model is divided along.
        rank: the number of this process among those that divide the model.
        ranks: how many these are.
        group: their process group.
        device: that this process computes on.
        numbers: the global ranks of all processes of the mesh.
    """

    def __init__(self, mesh: Any, call: str, step: str) -> None:
        """Look at a mesh, and join the others in a call.

        Args:
            mesh: of the processes.
            call: the function that all of them have called.
            step: the first at which they report.

        Raises:
            ConfigError: it is no mesh of processes that bigload can load on.
            DistributedError: the first process is in another call, or in none.
        """
        _require_mesh(mesh)
        self.mesh = mesh
        last = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]
        self.rank, self.ranks, self.group = last.get_local_rank(), last.size(), last.get_group()
        self.device = CPU if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
        self.numbers: list[int] = mesh.mesh.flatten().tolist()
        self._own = dist.get_rank()
        name = "-".join(map(str, self.numbers)) if len(self.numbers) < 16 else str(hash(tuple(self.numbers)))
        self._told: set[str] = set()  # the steps that this process has reported
        self._prefix = self._joined(f"bigload/{name}", call, step)

    def _joined(self, base: str, call: str, step: str) -> str:
        """Return the prefix of the keys of this call: the first process opens it, the others join what is open.

        If each process counted its calls, the numbers would differ for good after a call that only some of them make.
        A call that has failed is joined even so, to be told why, but for those that were given up for want of others.
        """
        store, first = self._store, self.numbers[0]
        if self.is_first:
            number = store.add(f"{base}/opened", 1)
            store.set(f"{base}/{number}/call", json.dumps([call, step]))
            return f"{base}/{number}"
        last = store.add(f"{base}/joined by {self._own}", 0)
        number = last + 1
        while store.check([f"{base}/{number}/given up"]):  # this process, or another one, was waited for in vain
            number += 1
        if not self._wait([f"{base}/{number}/call"], self.timeout):
            raise DistributedError(
                f"rank {first} did not call {call} within {self.timeout.total_seconds():g} s, the timeout of the "
                f"process group: {_SAME}",
                ranks=[first],
            )
        store.add(f"{base}/joined by {self._own}", number - last)
        self._prefix = f"{base}/{number}"
        others, first_step = json.loads(store.get(f"{self._prefix}/call"))
        if others != call:
            error = DistributedError(
                f"rank {first} is in {others}, and rank {self._own} in {call}: {_SAME}", ranks=[first]
            )
            self._report_error(first_step, error)
            raise error
        return self._prefix

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of the mesh."""
        return self._own == self.numbers[0]

    @property
    def is_first_replica(self) -> bool:
        """Whether this process is among those that hold the model for the first time."""
        return bool(self.mesh.ndim == 1 or self.mesh.get_coordinate()[0] == 0)

    @property
    def timeout(self) -> timedelta:
        """How long the process group waits for its members."""
        options = getattr(self.group._get_backend(self.device), "options", None)  # not in all versions of torch
        return getattr(options, "_timeout", None) or self._store.timeout  # type: ignore[no-any-return]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all processes, one after the other: (ranks * n,) of (n,), contiguous."""
        made = own.new_empty(self.ranks * own.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        gather(made, own.view(-1), group=self.group)
        return made

    def spread(self, tensor: torch.Tensor, *, among_replicas: bool = False) -> None:
        """Give all processes of the mesh the values that the first has of a tensor. A collective.

        Args:
            tensor: written to in the others.
            among_replicas: only to those that hold the same share, which are several in a mesh of two dimensions.
        """
        for dimension in range(self.mesh.ndim - 1 if among_replicas else self.mesh.ndim):
            group = self.mesh.get_group(dimension)
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)

    @contextmanager
    def agreed(
        self, step: str, facts: Mapping[str, str] | None = None, *, tells: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Do a step that all processes must do: at its end each knows whether all have, or raises.

        Args:
            step: its name, for messages; each only once for a load.
            facts: what must be the same in all processes, by name; filled in by the step.
            tells: what the others may ask for afterwards, by `told_by_first`.

        Raises:
            DistributedError: another process failed, did not come to the end of the step within the timeout of the
                process group, or has other facts.
        """
        try:
            yield
        except BaseException as error:
            # What torch raises may be a collective's, which fails because another process does not take part in it.
            is_torch = isinstance(error, RuntimeError) and not isinstance(error, BigloadError)
            self._report_error(step, error, is_torch=is_torch)
            if is_torch:
                self._require_all(step, at_fault=self._own)
            raise
        self._report(step, {"facts": dict(facts or {}), "tells": dict(tells or {})})
        self._require_all(step)

    def told_by_first(self, step: str) -> dict[str, str]:
        """Return what the first process had to tell at a step that is over."""
        return json.loads(self._store.get(self._key(step, self.numbers[0])))["tells"]  # type: ignore[no-any-return]

    @contextmanager
    def told(self, step: str) -> Iterator[None]:
        """Tell the others if what comes before a step fails, so that they need not wait for this process there."""
        try:
            yield
        except BaseException as error:
            if step not in self._told:
                self._report_error(step, error)
            raise

    def _report_error(self, step: str, error: BaseException, *, is_torch: bool = False) -> None:
        report = {"error": f"{type(error).__name__}: {reason(error)}", "is_torch": is_torch}
        self._report(step, report)
        if self.is_first and not is_torch:  # the others wait for what it concludes, not for its report
            verdict = _verdict(step, {self._own: report}, [self._own], self.timeout)
            self._store.set(self._key(step, "verdict"), json.dumps(verdict))

    def _report(self, step: str, report: Mapping[str, Any]) -> None:
        self._told.add(step)
        self._store.set(self._key(step, self._own), json.dumps(report))

    @property
    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()

    def _key(self, step: str, number: int | str) -> str:
        return f"{self._prefix}/{step}/{number}"

    def _require_all(self, step: str, at_fault: int | None = None) -> None:
        """Raise if another process has failed. The first collects the reports, so that not each asks for each."""
        if self.is_first:
            reports = self._collected(step)
            if len(reports) < len(self.numbers):
                self._store.set(f"{self._prefix}/given up", "")
            verdict = _verdict(step, reports, self.numbers, self.timeout)
            self._store.set(self._key(step, "verdict"), json.dumps(verdict))
        else:
            key = self._key(step, "verdict")
            if self._wait([key], self.timeout):
                verdict = json.loads(self._store.get(key))
            else:
                verdict = _verdict(step, self._collected(step, timedelta(0)), self.numbers, self.timeout)
        others = [number for number in verdict["ranks"] if number not in (self._own, at_fault)]
        if verdict["message"] and (others or at_fault is None):
            raise DistributedError(verdict["message"], ranks=others or verdict["ranks"])

    def _collected(self, step: str, patience: timedelta | None = None) -> dict[int, dict[str, Any]]:
        """Return the reports of those that have come to the end of a step, by rank."""
        keys = {number: self._key(step, number) for number in self.numbers}
        self._wait(list(keys.values()), self.timeout * 0.9 if patience is None else patience)
        present = {number: key for number, key in keys.items() if self._store.check([key])}
        return {number: json.loads(self._store.get(key)) for number, key in present.items()}

    def _wait(self, keys: list[str], patience: timedelta) -> bool:
        if not patience:
            return bool(self._store.check(keys))
        try:
            self._store.wait(keys, patience)
        except RuntimeError:  # what a store raises when time is up, and when the process that holds it is gone
            return False
        return True


def _verdict(
    step: str, reports: Mapping[int, Mapping[str, Any]], numbers: Sequence[int], timeout: timedelta
) -> dict[str, Any]:
    """Return what became of a step: a message, "" if all is well, and the ranks at fault."""
    missing = [number for number in numbers if number not in reports]
    if missing:
        return {
            "message": f"{_named(missing)} did not come to the end of '{step}' within {timeout.total_seconds():g} s, "
            "the timeout of the process group: it has ended, hangs, is in no such call (all ranks must make it), or is "
            "slower than that (then pass a longer timeout to init_process_group)",
            "ranks": missing,
        }
    failed = {number: report["error"] for number, report in reports.items() if "error" in report}
    failed = {number: said for number, said in failed.items() if not reports[number]["is_torch"]} or failed
    if failed:
        first = min(failed)
        return {"message": f"{_named(list(failed))} failed in '{step}': {failed[first]}", "ranks": list(failed)}
    first_report = reports[numbers[0]]
    for fact, expected in first_report["facts"].items():
        others = [number for number in numbers if reports[number]["facts"].get(fact) != expected]
        if others:
            return {
                "message": f"{_named(others)} and rank {numbers[0]} do not have the same {fact}: {_SAME}",
                "ranks": others,
            }
    return {"message": "", "ranks": []}


def _named(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _require_mesh(mesh: Any) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "mesh needs a process group: start the program by torchrun or accelerate launch, and make the mesh by "
            "torch.distributed.device_mesh.init_device_mesh"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(f"mesh must be a DeviceMesh, as init_device_mesh makes it, but it is a {type(mesh).__name__}")
    if mesh.ndim > 2 or (mesh.ndim == 2 and not mesh.mesh_dim_names):
        raise ConfigError(
            f"mesh has {mesh.ndim} dimensions, with the names {listed(mesh.mesh_dim_names or ())}: pass one with one "
            "dimension, or with two that have names, (replicate, shard), as fully_shard takes them"
        )
    if mesh.device_type not in ("cpu", "cuda"):
        raise ConfigError(f"mesh is of '{mesh.device_type}' devices: bigload loads onto 'cuda' or 'cpu'")
    if mesh.get_coordinate() is None:
        raise ConfigError(f"this process, rank {dist.get_rank()}, is not in the mesh")
