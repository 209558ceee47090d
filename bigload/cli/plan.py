"""`bigload plan`: says whether a model fits, and what it needs of each place, without loading it."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, PlacementError
from .arguments import (
    PATH,
    add_placement,
    add_plot,
    add_quant,
    config,
    device_map,
    max_memory,
    offload,
    positive,
    rate,
    require_picture,
)
from .load import is_quantized
from .locations import config_file
from .parser import add_command

if TYPE_CHECKING:
    import torch

    from ..distributed.ranks_plan import RanksPlan
    from ..planning.placing.accounts import Account
    from ..planning.plan import Plan
    from ..planning.report import Rates

logger = logging.getLogger(__name__)

# Where nothing is measured: PCIe 4.0 with 16 lanes, and an NVMe disk.
_USUAL_LINK, _USUAL_DISK = 25.0, 3.0
# The modes to compare, and those that take the same bytes.
_COMPARED = {
    "none": "none",
    "int8-training": "int8-training",
    "int8": "int8",
    "nf4": "nf4, fp4",
    "nf4-dq": "nf4-dq, fp4-dq",
}
# What a plan of processes takes no notice of: each has one GPU, whose size it is not told.
_NOT_OF_RANKS = ["device_map", "max_memory", "reserve", "context", "blocks", "plot", "offload_folder", "expert_cache"]
_UNSET: tuple[object, ...] = (None, False, [], "auto")


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plan",
        run,
        help="say whether a model fits, and what it needs of GPUs, CPU and disk",
        description=(
            "Say whether a model fits, and what it needs of GPUs, CPU and disk, without loading it: from the headers "
            "of the weights if they are here, otherwise from config.json, the only file that is fetched from a "
            "repository. The GPUs that --max-memory names need not be in this machine."
        ),
        examples=(
            "bigload plan org/name --max-memory 0=8GiB cpu=32GiB",
            "bigload plan org/name --quant nf4 --context 8192",
            "bigload plan ./model/config.json --json",
        ),
    )
    parser.add_argument("path", help=f"{PATH}, with or without weights, or a config.json")
    add_quant(parser, "nf4, and a table that compares all; a quantized checkpoint stays as it is")
    add_placement(parser)
    parser.add_argument("--context", type=positive, metavar="N", help="tokens in the KV cache (default: not counted)")
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="sequences at once (default: %(default)s)"
    )
    parser.add_argument(
        "--link-gbps",
        type=rate,
        metavar="GB/S",
        help=f"speed of the link to a GPU (default: measured if there is one, otherwise {_USUAL_LINK:g})",
    )
    parser.add_argument(
        "--disk-gbps",
        type=rate,
        metavar="GB/S",
        help=f"speed of the disk that blocks are offloaded to (default: {_USUAL_DISK:g})",
    )
    parser.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="processes that divide the model among them, by torchrun and FSDP2",
    )
    parser.add_argument(
        "--hosts", type=positive, default=1, metavar="N", help="hosts that they are on (default: %(default)s)"
    )
    parser.add_argument("--blocks", action="store_true", help="a row for each block (default: equal ones share one)")
    add_plot(parser, "the plan")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds (default: tables)")


def run(options: argparse.Namespace) -> None:
    """Print the verdict, the modes and the plan."""
    unused = [f"--{name.replace('_', '-')}" for name in _NOT_OF_RANKS if getattr(options, name) not in _UNSET]
    if options.ranks is not None and unused:
        raise ConfigError(f"{', '.join(unused)}: a plan of --ranks does not count this; leave it out")
    if options.ranks is None and options.hosts > 1:
        raise ConfigError("--hosts: pass --ranks too, the number of processes on all of them")
    if options.ranks is not None and options.ranks % options.hosts:
        raise ConfigError(f"--ranks {options.ranks} --hosts {options.hosts}: hosts have equally many processes")
    planner = _Planner(options)
    require_picture(options.plot)
    from ..notation import output_width, text_table, wrapped
    from ..planning.plan import plan_table
    from ..planning.report import plan_json, verdict
    from .pictures import draw_plan

    planner.open()
    stored = planner.stored_config()
    if options.ranks is not None:
        _show_ranks(options, planner.of_ranks(stored))
        return
    compared: dict[str, Plan | PlacementError] = {}
    if options.quant is None and stored is None:
        for mode in _COMPARED:
            options.quiet = mode != "nf4"  # what the others warn of, a load of theirs will
            compared[mode] = planner.tried(config(options, mode))
        options.quiet = False
        chosen = compared["nf4"]
    else:
        chosen = planner.tried(config(options, options.quant) if options.quant else stored)
    rates, said = _rates(options, [chosen, *compared.values()])
    width = output_width()
    is_table = any(not isinstance(plan, PlacementError) for plan in compared.values())
    table = text_table(list(_compared_rows(compared, rates, options.batch)), width) if is_table else []
    if isinstance(chosen, PlacementError):
        print("\n".join(table), end="\n" if table else "")
        raise chosen
    if options.json:
        made = {"verdict": verdict(chosen, rates, said, options.batch), **plan_json(chosen, rates, options.batch)}
        made["gb_per_s"] = vars(rates)
        if compared:
            made["modes"] = {mode: _mode_json(plan) for mode, plan in compared.items()}
        print(json.dumps(made, indent=2))
    else:
        lines = wrapped(verdict(chosen, rates, said, options.batch), width)
        for line in planner.notes(chosen):
            lines += wrapped(line, width)
        lines += ["", *table, ""] if table else [""]
        print("\n".join([*lines, plan_table(chosen, width, every_unit=options.blocks)]))
    if options.plot is not None:
        draw_plan(chosen, Path(options.plot).expanduser(), options.path, dark=options.dark)


def _show_ranks(options: argparse.Namespace, plan: RanksPlan) -> None:
    from ..notation import output_width, text_table, wrapped

    if options.json:
        print(json.dumps({**plan.to_json(), "hosts": options.hosts}, indent=2))
        return
    width = output_width()
    print("\n".join([*wrapped(plan.summary(), width), "", *text_table(list(plan.rows(options.hosts)), width)]))


class _Planner:
    """Makes plans of one model, in several modes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._places, self._budgets = device_map(options.device_map), max_memory(options.max_memory)
        self._reserved: dict[int, int] = {}
        self._for_graphs: dict[int, int] = {}
        self._caches: dict[tuple[Any, int, int, torch.dtype], list[int] | None] = {}

    def open(self) -> None:
        """Build the empty model, and find the weights beside its config."""
        from ..model.described import empty_model

        typed = Path(self._options.path).expanduser()
        self._config = config_file(self._options, self._options.path)
        self._weights = None if typed.is_file() else _weights_beside(self._config, is_here=typed.exists())
        self._model = empty_model(typed if typed.is_file() else self._config.parent)

    def stored_config(self) -> Any:
        """Return what says how the weights are stored quantized: the checkpoint, or config.json; None if they are not.

        Returns:
            A config, or `...` for the checkpoint's own.
        """
        from ..checkpoint.scaled.stated import READ_METHODS
        from ..config import as_config

        if self._weights is not None:
            return ... if is_quantized(self._weights) else None
        said = json.loads(self._config.read_bytes()).get("quantization_config")
        if not isinstance(said, dict) or self._options.quant is not None:
            return None
        method = said.get("quant_method", "bitsandbytes")
        if method == "bitsandbytes":
            return as_config(said)
        if method not in READ_METHODS:  # which are loaded as if they were in 16 bit
            logger.warning(
                "the weights are quantized with %s, says config.json: this plans them as if they were not", method
            )
        return None

    def of_ranks(self, stored: Any) -> RanksPlan:
        """Return what several processes need, each with a GPU; by default in nf4, or as the weights are stored."""
        from ..distributed.ranks_plan import plan_ranks
        from ..planning.planner import plan_device_map

        quant = self._options.quant or (None if stored else "nf4")
        given = None if stored is ... else stored
        chosen = config(self._options, quant) if quant else given
        if getattr(chosen, "llm_int8_has_fp16_weight", False):
            raise ConfigError("--ranks: int8-training is not divided among processes; use nf4 or int8 with adapters")
        return plan_ranks(
            self._model, plan_device_map(self._model, chosen, self._weights, "cuda:0"), self._options.ranks
        )

    def tried(self, config: Any) -> Plan | PlacementError:
        """Return the plan, or why there is none."""
        try:
            return self._with_kv_cache(None if config is ... else config)
        except PlacementError as error:
            return error

    def _with_kv_cache(self, config: Any) -> Plan:
        from ..planning.report import verdict, with_kv_cache

        plan = self._plan(config, self._options.reserve)
        if self._options.context is None:
            return plan
        gpus = [account for account in plan.accounts if account.reserve]
        layers, graphs = self._kept(plan, len(gpus))
        try:
            made = self._spread(config, gpus, layers, graphs)
        except PlacementError:
            if not graphs:
                raise
            made = self._spread(config, gpus, layers, 0)
            self._for_graphs[id(made)] = -graphs
        made = made or with_kv_cache(plan, layers)
        if any(account.free is not None and account.free < 0 for account in made.accounts):
            said = verdict(made, _given_rates(self._options)).rstrip(".")
            raise PlacementError(f"with the KV cache, {said[0].lower()}{said[1:]}")
        return made

    def _spread(self, config: Any, gpus: Sequence[Account], layers: Sequence[int], graphs: int) -> Plan | None:
        """Return a plan with room for the cache, and for captured steps; None without a GPU."""
        from ..planning.report import with_kv_cache

        share, made = -(-sum(layers) // max(1, len(gpus))), None
        for _ in range(len(gpus)):  # how the layers are spread depends on the room that is left for their cache
            reserve = max(account.reserve for account in gpus) + share + graphs
            try:
                made = with_kv_cache(self._plan(config, reserve), layers, share)
            except PlacementError as error:
                said = str(error).replace("kept for activations", "kept for activations and the KV cache")
                raise PlacementError(said) from None
            self._reserved[id(made)], self._for_graphs[id(made)] = reserve, graphs
            largest = max(account.kv_cache for account in made.accounts)
            if largest <= share:
                return made
            share = largest
        return made

    def _kept(self, plan: Plan, gpus: int) -> tuple[list[int], int]:
        """Return the bytes of each layer's KV cache, and of captured decode steps, which one GPU has."""
        from ..inspection.kv_cache import captured_step_bytes, kv_cache_bytes, static_cache_bytes

        context, batch, dtype = self._options.context, self._options.batch, plan.config.load_dtype
        layers = self._cache(kv_cache_bytes, plan, context, batch)
        if layers is None:
            raise ConfigError(f"the KV cache of {type(self._model).__name__} is not known; leave --context out")
        static = self._cache(static_cache_bytes, plan, context, batch) if gpus == 1 else None
        if static is None:
            return layers, 0
        return static, captured_step_bytes(self._model, static, batch, dtype)

    def _plan(self, config: Any, reserve: int | str | None) -> Plan:
        from ..planning.planner import plan_device_map

        return plan_device_map(
            self._model,
            config,
            self._weights,
            self._places,
            max_memory=self._budgets,
            offload_folder=self._options.offload_folder,
            offload=offload(self._options, reserve),
        )

    def _cache(self, count: Callable[..., list[int] | None], plan: Plan, context: int, batch: int) -> list[int] | None:
        """Return what a function of `kv_cache.py` counts, once for all modes that compute in one dtype."""
        if not getattr(self._model, "can_generate", bool)():
            return None
        asked = count, context, batch, plan.config.load_dtype
        if asked not in self._caches:
            self._caches[asked] = count(self._model, *asked[1:])
        return self._caches[asked]

    def notes(self, plan: Plan) -> Iterator[str]:
        """Yield what is to be known of the KV cache."""
        from ..inspection.kv_cache import kv_cache_bytes
        from ..notation import show

        if self._options.context is None:
            layers = self._cache(kv_cache_bytes, plan, 1, 1)
            if layers is not None:
                yield f"Not counted: the KV cache, {show(sum(layers))} for each token (--context N counts it)."
            return
        cache = sum(account.kv_cache for account in plan.accounts)
        tokens = f"{self._options.context} tokens x {self._options.batch}"
        graphs = self._for_graphs.get(id(plan), 0)
        more = f", and {show(graphs)} in the reserve for captured decode steps" if graphs > 0 else ""
        yield f"Counted: the KV cache of {tokens}, {show(cache)}{more}."
        if graphs < 0:
            yield f"Captured decode steps, which need {show(-graphs)} more, have no room."
        if id(plan) in self._reserved:
            yield f"`bigload load` keeps this room with --reserve {-(-self._reserved[id(plan)] // 2**20)}MiB."


def _weights_beside(config: Path, *, is_here: bool) -> Path | None:
    """Return the folder of a config.json if it holds weights; in a hub's cache they may not be complete."""
    from ..checkpoint.checkpoint import open_checkpoint
    from ..checkpoint.folders import WEIGHTS

    folder = config.parent
    if not any(WEIGHTS.fullmatch(path.name) for path in folder.iterdir()):
        return None
    try:
        open_checkpoint(folder)
    except CheckpointError:
        if is_here:
            raise
        return None
    return folder


def _given_rates(options: argparse.Namespace, link: float | None = None) -> Rates:
    from ..planning.report import Rates

    return Rates(options.link_gbps or link or _USUAL_LINK, options.disk_gbps or _USUAL_DISK)


def _rates(options: argparse.Namespace, plans: list[Plan | PlacementError]) -> tuple[Rates, str]:
    """Return the rates of the link and the disk, and what the verdict says of those that it uses."""
    import torch

    streamed = [
        placed
        for plan in plans
        if not isinstance(plan, PlacementError)
        for placed in plan.offloaded
        if placed.streamed_bytes
    ]
    on_gpu = any(placed.device.type == "cuda" for placed in streamed)
    measured = None
    if on_gpu and options.link_gbps is None and torch.cuda.is_available():
        from ..hardware.bandwidth import link_gb_per_s

        measured = link_gb_per_s(torch.device("cuda", 0))
    rates = _given_rates(options, measured)
    said = []
    if on_gpu:
        how = "" if options.link_gbps else ", measured" if measured else ", assumed: --link-gbps"
        said.append(f"the link at {rates.link:.3g} GB/s{how}")
    if any(placed.home == "disk" for placed in streamed):
        said.append(f"the disk at {rates.disk:.3g} GB/s" + ("" if options.disk_gbps else ", assumed: --disk-gbps"))
    return rates, f" ({'; '.join(said)})" if said else ""


def _compared_rows(
    plans: Mapping[str, Plan | PlacementError], rates: Rates, sequences: int
) -> Iterator[tuple[str, ...]]:
    from ..notation import show
    from ..planning.report import per_second, step_bytes, step_seconds

    yield "mode", "size", "fits", "per token", "tokens/s"
    for mode, plan in plans.items():
        if isinstance(plan, PlacementError):
            yield _COMPARED[mode], "-", "no", "-", "-"
        elif not plan.streamed_bytes:
            yield _COMPARED[mode], show(plan.nbytes), "whole", "-", "-"
        else:
            nbytes, seconds = step_bytes(plan, sequences), step_seconds(plan, rates, sequences)
            most = f"<= {per_second(seconds, sequences)}" if seconds else "-"
            yield _COMPARED[mode], show(plan.nbytes), "streamed", show(round(nbytes)), most


def _mode_json(plan: Plan | PlacementError) -> dict[str, Any]:
    if isinstance(plan, PlacementError):
        return {"fits": False, "why": str(plan)}
    return {"fits": True, "bytes": plan.nbytes, "streamed_bytes": plan.streamed_bytes}
