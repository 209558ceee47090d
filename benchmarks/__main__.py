"""The command line of the benchmarks; docs/benchmarks.md says what each command measures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .peers import MODES, PEERS, QUANTIZING

# What imports torch is imported by the command that needs it: `one` measures how long its imports take.

SIZES = "tiny, 1b, 8b, 30b (Llamas), tiny-moe, half-30b-a3b (Qwen3-MoEs), tiny-gpt-oss, gpt-oss-20b, many-20k"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_limits(commands.add_parser("limits", help="measure what the machine can do"))
    _add_make(commands.add_parser("make", help="write a synthetic checkpoint"))
    _add_load(commands.add_parser("load", help="time loads of a checkpoint, peer by peer, against the limits"))
    _add_profile(commands.add_parser("profile", help="tell where the seconds of a load go, part by part"))
    _add_quantize(commands.add_parser("quantize", help="time quantizing a checkpoint from files to files"))
    _add_offload(commands.add_parser("offload", help="time forwards of a model of which part rests on the CPU"))
    _add_decode(commands.add_parser("decode", help="time generation, as it is and captured in CUDA graphs"))
    _add_spread(commands.add_parser("spread", help="time a model over several GPUs against the same on one"))
    _add_distributed(commands.add_parser("distributed", help="time loads by several processes, started by torchrun"))
    _add_experts(commands.add_parser("experts", help="time fused experts in 4 bit against the same in 16 bit"))
    _add_against(commands.add_parser("against", help="time this checkout against another one, in turn"))
    _add_plans(commands.add_parser("plans", help="plan well-known models on usual budgets: the table in docs/plans.md"))
    _add_sweep(commands.add_parser("sweep", help="compare small models of many classes with themselves dequantized"))
    _add_coverage(commands.add_parser("coverage", help="tell what share of each class of transformers 4 bit takes"))
    _add_report(commands.add_parser("report", help="turn result files into Markdown tables and charts"))
    _add_plot(commands.add_parser("plot", help="show loads as bars, and draw the documents' pictures"))
    _add_one(commands.add_parser("one"))  # without a help, so that it is not listed
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint; without it no reading is measured")
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache and time the disk too")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_limits)


def _limits(options: argparse.Namespace) -> None:
    from .limits import describe_machine, measure_limits

    device = _device(options.device)
    result = {
        "benchmark": "limits",
        "checkpoint": options.folder and options.folder.name,
        **describe_machine(device, options.commit),
        "limits": measure_limits(options.folder, device, cold=options.cold),
    }
    _give(result, options.out)


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("size", help=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=4, help="number of files (default: %(default)s)")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--quant", choices=QUANTIZING, help="write it quantized already, from a checkpoint in 16 bit")
    stored.add_argument("--format", choices=("fp8", "mxfp4"), help="write small numbers with scales (mxfp4: GPT-OSS)")
    parser.add_argument(
        "--source", type=Path, help="that checkpoint (default: the folder SIZE beside FOLDER, which is made if need be)"
    )
    parser.set_defaults(run=_make)


def _make(options: argparse.Namespace) -> None:
    from .checkpoints import make_checkpoint, make_quantized

    if not options.quant:
        print(make_checkpoint(options.size, options.folder, options.shards, options.format or "bf16"))
        return
    source = options.source or options.folder.parent / options.size
    if source.absolute() == options.folder.absolute():
        raise SystemExit(f"'{source}' is where the checkpoint in 16 bit is: name another folder, or a --source")
    if options.source is None:
        make_checkpoint(options.size, source, options.shards)
    print(make_quantized(source, options.folder, options.quant, options.shards))


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="FOLDER", help="the same model in other formats, in turn"
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="default: nf4 int8, or stored for a checkpoint that is quantized"
    )
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--cold", action="store_true", help="load once, from the disk instead of the page cache")
    parser.add_argument(
        "--limits", action=argparse.BooleanOptionalAction, default=True, help="measure the machine's limits first"
    )
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    parser.add_argument("--append", action="store_true", help="add rows to the result that --out names")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a row may take (default: %(default)s)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_load)


def _load(options: argparse.Namespace) -> None:
    from .load import Job, compare

    compare(
        Job(
            options.folder,
            _device(options.device),
            tuple(options.peers),
            options.modes and tuple(options.modes),
            options.cold,
            options.limits,
            options.out,
            options.append,
            options.timeout,
            options.commit,
            tuple(options.beside),
        )
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["nf4", "none"], help="(default: nf4 none)")
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--loads", type=int, default=5, help="of each mode (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> None:
    from .profiles import measure_profile

    measured = measure_profile(options.folder, options.modes, _device(options.device), options.loads, options.commit)
    _give_as_it_grows(measured, options.out)


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint in 16 bit")
    parser.add_argument("--mode", choices=QUANTIZING, default="nf4", help="(default: %(default)s)")
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--scratch", type=Path, help="where it is written to (default: beside the checkpoint)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_quantize)


def _quantize(options: argparse.Namespace) -> None:
    from .quantize import measure_quantizing

    scratch = options.scratch or options.folder.absolute().parent
    result = measure_quantizing(options.folder, options.mode, _device(options.device), scratch, options.commit)
    _give(result, options.out)


def _give_as_it_grows(results: Iterable[Mapping[str, Any]], out: Path | None) -> None:
    """Show each row as it comes, and give what there is: a run that is cut keeps it."""
    result: Mapping[str, Any] = {}
    for result in results:
        print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
        if out is not None:
            _give(result, out)
    if out is None:
        _give(result, None)


def _give(result: Mapping[str, Any], out: Path | None) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if out:
        out.write_text(text)
    else:
        print(text, end="")


def _add_offload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint of a Llama in 16 bit")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PEER:MODE:BLOCKS[:WHERE]",
        help="such as bigload:nf4:22, bigload:nf4:32:disk or bigload:int8:2:fp32 (default: those in offload.py)",
    )
    parser.add_argument("--device", help="'cuda:N' (default: the first GPU)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_offload)


def _offload(options: argparse.Namespace) -> None:
    from .offload import CASES, Case, measure_offload

    parts = [text.split(":") for text in options.cases or ()]
    cases = [Case(peer, mode, int(blocks), *more) for peer, mode, blocks, *more in parts] or list(CASES)
    measured = measure_offload(options.folder, cases, _device(options.device), options.commit)
    _give_as_it_grows(measured, options.out)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    modes = ("nf4", "none", "nf4-dq", "int8", "int8-t0")
    peers = ("transformers", "transformers, static", "transformers, compiled")
    parser.add_argument("--sizes", nargs="+", default=["8b", "Qwen3-30B-A3B"], help="or tiny (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="(default: %(default)s)")
    parser.add_argument(
        "--offloaded",
        nargs="*",
        type=int,
        default=[8, 32],
        help="blocks in host memory (default: %(default)s)",
    )
    parser.add_argument(
        "--cached",
        nargs="*",
        type=int,
        default=[25],
        help="per cent of a mixture's experts that stay on the GPU, the others in host memory (default: %(default)s)",
    )
    parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    parser.add_argument("--generated", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--long", type=int, default=2000, help="tokens that shall leave memory as it was, once")
    parser.add_argument("--seconds", type=float, default=400, help="begin no row after them (default: %(default)s)")
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_decode)


def _decode(options: argparse.Namespace) -> None:
    from .decode import cases_of, measure_decode

    cases = cases_of(options.sizes, options.modes, options.batches, options.offloaded, options.cached, options.peers)
    how = options.generated, options.long, options.seconds
    _give_as_it_grows(measure_decode(cases, _device(options.device), options.commit, *how), options.out)


def _add_spread(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint of a Llama in 16 bit")
    parser.add_argument("--mode", choices=QUANTIZING, default="nf4", help="(default: %(default)s)")
    parser.add_argument("--devices", nargs="+", help="such as cuda:0 cuda:1 (default: all GPUs)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_spread)


def _spread(options: argparse.Namespace) -> None:
    import torch

    from .spread import measure_spread

    if any(torch.device(device).type == "cuda" for device in options.devices or ()) and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU")
    devices = options.devices or [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    _give_as_it_grows(measure_spread(options.folder, devices, options.mode, options.commit), options.out)


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the checkpoint in 16 bit")
    parser.add_argument("--mode", choices=QUANTIZING, default="nf4", help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="(default: those in distributed.py)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda, cpu where there is no GPU)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_distributed)


def _distributed(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    from .distributed import WAYS, joined, measure_distributed

    device = joined(options.device)
    results = measure_distributed(options.folder, options.ways or list(WAYS), options.mode, device, options.commit)
    if dist.get_rank() == 0:
        _give_as_it_grows(results, options.out)
    else:
        for _ in results:
            pass
    dist.destroy_process_group()


def _add_experts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", help="such as Qwen3-30B-A3B or tiny (default: those in experts.py)")
    parser.add_argument("--tokens", nargs="+", type=int, help="how many at once (default: 1 4 16 256 2048)")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="time experts in host memory, with caches of 10, 25 and 50%%, instead: whole models, and experts alone",
    )
    parser.add_argument("--layers", type=int, help="of whole models (default: those in offloaded_models.py)")
    parser.add_argument("--alone", action="store_true", help="with --offload, no whole models")
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--seconds", type=float, default=400, help="begin no row after them (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_experts)


def _experts(options: argparse.Namespace) -> None:
    from . import offloaded_experts
    from .experts import SHAPES, TOKENS, measure_experts

    shapes, result = options.shapes or list(SHAPES), dict[str, Any]()
    tokens = options.tokens or (offloaded_experts.TOKENS if options.offload else TOKENS)
    measure = offloaded_experts.measure_offloaded_experts if options.offload else measure_experts
    whole = {"layers": options.layers} if options.offload and not options.alone else None
    how, shown = {"models": whole} if options.offload else {}, None
    for result in measure(shapes, tokens, _device(options.device), options.commit, options.seconds, **how):
        latest = (result["rows"] or result.get("models") or [None])[-1]
        if latest is not shown:  # some are left out
            print(json.dumps(latest), file=sys.stderr, flush=True)
            shown = latest
        if options.out is not None:
            _give(result, options.out)
    if options.out is None:
        _give(result, None)


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("other", type=Path, help="the root of the other checkout")
    parser.add_argument(
        "cases",
        nargs="+",
        metavar="FOLDER:MODE[:BLOCKS]",
        help="such as 8b:nf4, many-20k:none, or 8b:nf4:32 for a token",
    )
    parser.add_argument("--device", help="'cpu' or 'cuda:N' (default: the first GPU, the CPU where there is none)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON (default: standard output)")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--other-commit", help="of the other")
    parser.set_defaults(run=_against)


def _against(options: argparse.Namespace) -> None:
    from .against import Case, compare_checkouts
    from .limits import describe_machine

    device, parts = _device(options.device), [text.split(":") for text in options.cases]
    cases = [Case(Path(folder), mode, *map(int, blocks)) for folder, mode, *blocks in parts]
    result = {"benchmark": "against", **describe_machine(device, options.commit), "other_commit": options.other_commit}
    for rows in compare_checkouts(options.other, cases, device, options.rounds):
        result["rows"] = rows
        print(json.dumps({row["case"]: row["ratio"] for row in rows}), file=sys.stderr, flush=True)
        if options.out is not None:
            _give(result, options.out)
    if options.out is None:
        _give(result, None)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classes", nargs="*", help="names of classes, of one library (default: all)")
    parser.add_argument("--libraries", nargs="+", default=["transformers", "diffusers"], help="(default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a class may take (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    parser.add_argument("--commit", help="bigload's, where git cannot tell")
    parser.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace) -> None:
    from .limits import describe_machine
    from .sweep import EXACT, TOLERANCE, as_json, summary, sweep

    result = {"benchmark": "sweep", **describe_machine("cpu", options.commit), "tolerance": TOLERANCE, "exact": EXACT}
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    for found in sweep(options.libraries, options.classes, options.timeout):
        rows += found
        print(*(json.dumps(row) for row in found), sep="\n", file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(as_json(result))
    print(summary(rows))


def _add_coverage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classes", nargs="*", help="names of classes of transformers (default: all)")
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.set_defaults(run=_coverage)


def _coverage(options: argparse.Namespace) -> None:
    import logging
    import warnings

    from .coverage import coverage, line

    logging.disable(logging.WARNING)  # of configs that are only tried
    warnings.simplefilter("ignore")
    rows = []
    for row in coverage(options.classes):
        print(line(row), flush=True)
        rows.append(row)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


def _add_plans(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--brief", action="store_true", help="only one mode on one GPU, as the README has them")
    parser.set_defaults(run=_plans)


def _plans(options: argparse.Namespace) -> None:
    from .plans import brief_plans_table, plans_table

    print(brief_plans_table() if options.brief else plans_table())


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results of `load`, `offload` or `limits`")
    parser.add_argument("--brief", action="store_true", help="only the seconds, as the README has them")
    parser.add_argument("--gain", action="store_true", help="only a sentence: the first load in nf4, and later ones")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="draw charts into this folder too; needs matplotlib")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from .report import BRIEF, brief, gain, markdown

    results = [(file.stem, json.loads(file.read_text())) for file in options.files]
    if options.gain:
        print("\n\n".join(gain(result) for _, result in results if result["benchmark"] == "load"))
        return
    if options.brief:
        for name, result in results:
            if result["benchmark"] not in BRIEF:
                print(f"{name}: a result of `{result['benchmark']}` has no brief form", file=sys.stderr)
        print("\n\n".join(brief(result) for _, result in results if result["benchmark"] in BRIEF))
        return
    print("\n\n".join(markdown(name, result) for name, result in results))
    if options.charts:
        from .pictures import draw

        for name, result in results:
            for path in draw(name, result, options.charts):
                print(path, file=sys.stderr)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="results of `load` (default: the README's)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="draw the pictures of docs/pictures into this folder; needs matplotlib"
    )
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> None:
    from bigload.notation import output_width

    from .pictures import MODES, README_RESULT, draw_documents, text_bars

    for file in options.files or [README_RESULT]:
        print("\n".join(text_bars(json.loads(file.read_text()), output_width(), () if options.files else MODES)))
    if options.out:
        for path in draw_documents(options.out):
            print(path, file=sys.stderr)


def _add_one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("device")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cold", action="store_true")
    parser.set_defaults(run=_one)


def _one(options: argparse.Namespace) -> None:
    from .one import measure

    row = measure(options.folder, PEERS[options.peer], options.mode, options.device, cold=options.cold)
    options.out.write_text(json.dumps(row))


def _device(given: str | None) -> str:
    import torch

    device = given or ("cuda:0" if torch.cuda.is_available() else "cpu")
    return "cuda:0" if device == "cuda" else device


if __name__ == "__main__":
    main()
