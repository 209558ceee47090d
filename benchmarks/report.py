"""Result files as Markdown tables, which are all that documents may quote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from .peers import PEERS

Result = Mapping[str, Any]
Row = Mapping[str, Any]

# A checkpoint whose tensors are smaller on average is one that is measured for their number.
SMALL_TENSOR_BYTES = 2**16


def markdown(name: str, result: Result) -> str:
    """Write all that a result says.

    Args:
        name: the heading, usually the file's name.
        result: of `load`, `offload`, `decode`, `against`, `experts` or `limits`.
    """
    parts = [f"### {name}"]
    if result["benchmark"] == "load":
        parts += [table(result), *notes(result)]
    if result["benchmark"] == "offload":
        parts.append(offload_table(result))
    if result["benchmark"] == "decode":
        from .decode import decode_table  # imports torch

        parts.append(decode_table(result))
    if result["benchmark"] == "against":
        parts.append(against_table(result))
    if result["benchmark"] == "offloaded-experts":
        from .offloaded_experts import offloaded_experts_table  # imports torch

        parts.append(offloaded_experts_table(result))
    if result["benchmark"] == "experts":
        from .experts import experts_table  # imports torch

        parts.append(experts_table(result))
    if result.get("limits"):
        parts.append(limits_table(result["limits"]))
    return "\n\n".join([*parts, _machine(result)])


def against_table(result: Result) -> str:
    """Write the rows of an `against`: the medians of both checkouts, and how ours compares."""
    lines = ["| median seconds | the other checkout | this one | this over the other |", "|---|---|---|---|"]
    for row in result["rows"]:
        cells = (f"{row['other_median_s']:.4f}", f"{row['ours_median_s']:.4f}", f"{row['ratio']:.3f}")
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def offload_table(result: Result) -> str:
    """Write the rows of an `offload`: seconds of the load, of a token, of longer inputs, and the GPU's memory."""
    heads = (
        "peer",
        "mode",
        "blocks off the GPU",
        "load",
        "1 token",
        "of the link",
        "512",
        "2048",
        "a token generated",
        "GPU",
    )
    keys = ("load_s", "step_1_s", "share_of_link", "step_512_s", "step_2048_s", "token_s", "gpu_peak_gib")
    forms = ("{:.1f} s", "{:.3f} s", "{:.0%}", "{:.3f} s", "{:.3f} s", "{:.3f} s", "{:.2f} GiB")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        where = _whereabouts(row)
        cells = [_figure(row.get(key), form) or "-" for key, form in zip(keys, forms, strict=True)]
        lines.append("| " + " | ".join([row["peer"], row["mode"], where, *cells]) + " |")
    return "\n".join(lines)


# Benchmarks that have a brief form.
BRIEF = ("load", "offload", "experts", "offloaded-experts", "decode")


def brief(result: Result) -> str:
    """Write what documents have of a `load`, an `offload`, `experts`, or whole mixtures of `experts --offload`."""
    if result["benchmark"] == "decode":
        from .decode import decode_table  # imports torch

        return decode_table(result)
    if result["benchmark"] == "offloaded-experts":
        from .offloaded_models import models_summary  # imports torch

        return models_summary(result)
    if result["benchmark"] == "experts":
        from .experts import experts_summary  # imports torch

        return experts_summary(result)
    return summary(result) if result["benchmark"] == "load" else offload_summary(result)


def offload_summary(result: Result) -> str:
    """Write an `offload` in a line for each choice of blocks: what the link allows, each peer's seconds of a token."""
    link = result["limits"]["link_gb_per_s"]
    away = [row for row in result["rows"] if row["offloaded"]]
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in away)]
    resident = {row["mode"]: row.get("step_1_s") for row in result["rows"] if not row["offloaded"]}
    heads = [f"blocks off the {result['device']}", "none off it", "the link allows", *peers, "bigload's GPU memory"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in dict.fromkeys((row["mode"], row["offloaded"], row["where"]) for row in away):
        rows = {row["peer"]: row for row in away if (row["mode"], row["offloaded"], row["where"]) == case}
        own = rows.get("bigload", {})
        allowed = own["streamed_bytes"] / link / 1e9 if own.get("streamed_bytes") and link else None
        seconds = [
            _figure(found, "{:.3f} s") or "-"
            for found in (resident.get(case[0]), allowed, *(rows.get(p, {}).get("step_1_s") for p in peers))
        ]
        held = _figure(own.get("gpu_held_gib"), "{:.2f} GiB") or "-"
        lines.append(
            "| " + " | ".join([f"{case[0]}, {_whereabouts(next(iter(rows.values())))}", *seconds, held]) + " |"
        )
    return "\n".join(lines)


def _whereabouts(row: Row) -> str:
    where = {"disk": ", on the disk", "fp32": ", in fp32 on the CPU"}.get(row["where"], "")
    return f"{row['offloaded']}{where}"


def table(result: Result) -> str:
    """Write the rows of a `load`: by mode the seconds, how many times the floor they are, and the memory.

    The seconds are those of the second load in a process, from a cold disk of the first.
    """
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in result["rows"])]
    cold = ", from a cold disk" if result.get("cold") else ""
    lines = [
        f"| {result['checkpoint_bytes'] / 1e9:.2f} GB onto {result['device']}{cold} | " + " | ".join(peers) + " |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for name in dict.fromkeys(map(_name, result["rows"])):
        rows = {row["peer"]: row for row in result["rows"] if _name(row) == name}
        lines += chain.from_iterable(_line(name, label, cell, peers, rows) for label, cell in _cells(result, rows))
    return "\n".join(lines)


def summary(result: Result) -> str:
    """Write a `load` in a line a mode: the floor and each peer's seconds, and the most memory in any of the modes."""
    rows = result["rows"]
    peers = [peer for peer in PEERS if any(row["peer"] == peer for row in rows)]
    title = f"{result['checkpoint_bytes'] / 1e9:.2f} GB onto {result['device']}"
    lines = ["| " + " | ".join([title, "floor", *peers]) + " |", "|---" * (len(peers) + 2) + "|"]
    for name in dict.fromkeys(map(_name, rows)):
        by_peer = {row["peer"]: row for row in rows if _name(row) == name}
        floor_s = next((row["floor_s"] for row in by_peer.values() if row.get("floor_s")), None)
        found = [floor_s, *(seconds(by_peer.get(peer, {})) for peer in peers)]
        lines.append("| " + " | ".join([name, *(seconds_text(value) or "-" for value in found)]) + " |")
    for label, name in (("GPU", "gpu_peak_over_final_gib"), ("host", "host_over_start_gib")):
        most = [max((row.get(name) or 0.0 for row in rows if row["peer"] == peer), default=0.0) for peer in peers]
        over = "the model" if label == "GPU" else "the start"
        lines.append(f"| {label} memory over {over}, at most | | " + " | ".join(f"{m:.2f} GiB" for m in most) + " |")
    return "\n".join(lines)


def _name(row: Row) -> str:
    """Name what a row of a `load` loaded: the mode, and the checkpoint where it is not the result's own."""
    other = row.get("checkpoint")
    return f"{row['mode']} from {other}, {row['checkpoint_bytes'] / 1e9:.2f} GB" if other else str(row["mode"])


def own_rows(result: Result) -> list[Row]:
    """List the rows of a `load` that are of the result's own checkpoint, not of one beside it."""
    return [row for row in result["rows"] if not row.get("checkpoint")]


def gain(result: Result, mode: str = "nf4") -> str:
    """Write a `load` in a sentence: what the first load in one mode takes and what later ones do, peer by peer."""
    found = {
        row["peer"]: f"{row['first_s']:.2f} s and {row['second_s']:.2f} s"
        for row in own_rows(result)
        if row["mode"] == mode and row.get("second_s")
    }
    own = found.pop("bigload").replace(" and ", " the first time in a process and ")
    size = f"{result['checkpoint_bytes'] / 1e9:.2f} GB"
    said = f"**Loaded as {mode} onto {result['device']}, {size} take {own} each later time.**"
    if found:
        first, *others = (f"{peer} {text}" for peer, text in found.items())
        said += f"\nFor the same, {', '.join([first.replace(' ', ' takes ', 1), *others])}."
    return said


def seconds(row: Row) -> float | None:
    """Give the seconds that a row stands for; None if nothing was measured."""
    found: float | None = row.get("second_s") or row.get("first_s")
    return found


def _cells(result: Result, rows: Mapping[str, Row]) -> list[tuple[str, Callable[[Row], str | None]]]:
    """Give the lines of a mode: what is added to its name, and what stands in a cell."""
    floor_s = next((row["floor_s"] for row in rows.values() if row.get("floor_s")), 0.0)
    lines: list[tuple[str, Callable[[Row], str | None]]] = [("", lambda row: seconds_text(seconds(row)))]
    about = next((row for row in rows.values() if row.get("checkpoint")), result)
    if about.get("tensors") and about["checkpoint_bytes"] < SMALL_TENSOR_BYTES * about["tensors"]:
        count = about["tensors"]
        label = f", for each of {count} tensors"
        lines.append((label, lambda row: _figure(seconds(row), "{:.0f} us", 1e6 / count)))
    else:
        label = f", times the floor of {seconds_text(floor_s)}"
        lines.append((label, lambda row: _figure(row.get("ratio_second") or row.get("ratio_first"), "{:.1f}")))
    if about is not result:
        label = f", times the seconds from {result['checkpoint']}"
        lines.append((label, lambda row: _figure(row.get("share_second") or row.get("share_first"), "{:.2f}")))
    lines.append((", GPU memory over the model", lambda row: _figure(_gpu_peak(row), "{:.2f} GiB")))
    lines.append((", host memory over the start", lambda row: _figure(row.get("host_over_start_gib"), "{:.2f} GiB")))
    return lines


def _gpu_peak(row: Row) -> float | None:
    # The second name is that of results from before November 2026.
    found: float | None = row.get("gpu_peak_over_final_gib", row.get("peak_over_final_gib"))
    return found


def seconds_text(value: float | None) -> str | None:
    """Write seconds with two decimals, or as many digits where they are few."""
    return None if value is None else f"{value:.2f} s" if value >= 0.1 else f"{value:.2g} s"


def _figure(value: float | None, form: str, factor: float = 1.0) -> str | None:
    return None if value is None else form.format(value * factor)


def _line(
    mode: str, label: str, cell: Callable[[Row], str | None], peers: Sequence[str], rows: Mapping[str, Row]
) -> list[str]:
    """Write a line of a mode, or none where no peer has a figure for it."""
    cells = [cell(rows.get(peer, {})) for peer in peers]
    if not any(cells):
        return []
    return [f"| {mode}{label} | " + " | ".join(text or "-" for text in cells) + " |"]


def notes(result: Result) -> list[str]:
    """Say what the table cannot: why cells are empty, and what its figures hide."""
    rows = result["rows"]
    lines = [
        f"{row['peer']}, {_name(row)}: {outcome}: {row[outcome]}"
        for row in rows
        for outcome in ("skipped", "error")
        if outcome in row
    ]
    mapped = [f"{row['peer']} ({row['mode']})" for row in rows if _is_mapped(row, result)]
    if mapped:
        lines.append(f"mapped and not read, which is left to the model's first run: {', '.join(mapped)}")
    built = {row["peer"]: row["build_s"] for row in rows if row.get("build_s") is not None}
    if built:
        values = ", ".join(f"{peer} {seconds_text(value)}" for peer, value in built.items())
        lines.append(f"building the empty model is not in the seconds, but for transformers: {values}")
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _is_mapped(row: Row, result: Result) -> bool:
    """Ask whether a load onto the CPU left its bytes in the files: it keeps less than half of them in memory."""
    kept = row.get("host_kept_gib")
    on_cpu = row.get("gpu_final_gib") is None
    nbytes = row.get("checkpoint_bytes", result["checkpoint_bytes"])
    return on_cpu and kept is not None and row["mode"] in ("none", "stored") and kept * 2**31 < nbytes


def limits_table(limits: Mapping[str, Any]) -> str:
    """Write what a machine can do."""
    lines = ["| limit | |", "|---|---|"]
    names = {
        "link_gb_per_s": "pinned host memory to GPU",
        "memory_gb_per_s": "page cache to memory of the checkpoint's size",
        "cold_disk_gb_per_s": "disk",
    }
    lines += [f"| {text} | {limits[key]:.1f} GB/s |" for key, text in names.items() if limits.get(key)]
    if "page_cache_gb_per_s" in limits:
        speeds = limits["page_cache_gb_per_s"]
        values = " / ".join(f"{speed:.1f}" for speed in speeds.values())
        lines.append(f"| page cache to reused buffers, {' / '.join(speeds)} threads | {values} GB/s |")
    if "pinning_s_per_gib" in limits:
        lines.append(f"| pinning | {limits['pinning_s_per_gib']:.2f} s a GiB |")
    for mode, speeds in limits.get("quantize_gb_per_s", {}).items():
        values = ", ".join(f"{who} {speed:.3g}" for who, speed in speeds.items())
        lines.append(f"| quantizing to {mode}, of 16-bit input | {values} GB/s |")
    return "\n".join(lines)


def _machine(result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    return (
        f"{result['device']}, {result['cores']} cores; Python {result['python']}, {versions}; "
        f"commit {result['commit']}, {result['date'][:10]}"
    )
