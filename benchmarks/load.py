"""Seconds and memory of a load, each peer and mode in a process of its own, which loads twice."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PEERS = ("bigload", "transformers", "accelerate")
PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "safetensors")


def compare(folder: Path, peers: list[str], modes: list[str], device: str, out: Path | None = None) -> dict[str, Any]:
    """Run every peer in every mode.

    Args:
        folder: the checkpoint.
        peers: names in `PEERS`.
        modes: as `BnbQuantizationConfig.from_mode` takes them.
        device: "cpu" or "cuda:N".
        out: where the result goes, written after each row so that a run that is cut keeps what it has.

    Returns:
        The machine, versions and date, and a row for each run; what a peer cannot do has its error as the row.
    """
    rows: list[dict[str, Any]] = []
    checkpoint_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    result = {"benchmark": "load", "checkpoint_bytes": checkpoint_bytes, **_machine(device), "rows": rows}
    for mode in modes:
        for peer in peers:
            command = [sys.executable, "-m", "benchmarks", "one", str(folder), peer, mode, device]
            done = subprocess.run(command, capture_output=True, text=True)
            last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
            row = json.loads(last) if done.returncode == 0 else {"error": last}
            rows.append({"peer": peer, "mode": mode, **row})
            print(json.dumps(rows[-1]), flush=True)
            if out is not None:
                out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """Write a result as a Markdown table: seconds of the second load in a process, and memory over the model."""
    lines = [
        f"| {result['checkpoint_bytes'] / 1e9:.2f} GB onto {result['device']} | " + " | ".join(PEERS) + " |",
        "|---" * (len(PEERS) + 1) + "|",
    ]
    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        rows = {row["peer"]: row for row in result["rows"] if row["mode"] == mode}
        for name, key, unit in (("", "second_s", "s"), (", GPU memory over the model", "peak_over_final_gib", "GiB")):
            cells = [f"{rows[peer][key]:.2f} {unit}" if key in rows.get(peer, {}) else "-" for peer in PEERS]
            lines.append(f"| {mode}{name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _machine(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(0) if device != "cpu" else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measure(folder: Path, peer: str, mode: str, device: str) -> dict[str, float]:
    """Load twice in this process; the import of the libraries and the CUDA context are not counted.

    Returns:
        first_s, second_s: seconds of the loads. peak_over_final_gib: GPU memory above the loaded model (0 on the CPU).
    """
    import bitsandbytes  # noqa: F401

    import bigload  # noqa: F401

    load = {"bigload": _bigload, "transformers": _transformers, "accelerate": _accelerate}[peer]
    if device != "cpu":
        torch.zeros(1, device=device)
    seconds, over = [], 0.0
    for _ in range(2):
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model = load(folder, mode, device)
        if device != "cpu":
            torch.cuda.synchronize()
            over = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 2**30
        seconds.append(time.perf_counter() - started)
        del model
    return {"first_s": seconds[0], "second_s": seconds[1], "peak_over_final_gib": over}


def _bigload(folder: Path, mode: str, device: str) -> Any:
    import bigload
    from bigload.hf import empty_model

    return bigload.load_and_quantize_model(empty_model(folder), mode, folder, device_map=device, progress=False)


def _transformers(folder: Path, mode: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    from bigload import BnbQuantizationConfig

    config = BnbQuantizationConfig.from_mode(mode, bnb_4bit_compute_dtype="bf16").to_transformers()
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": device}, dtype=torch.bfloat16
    )


def _accelerate(folder: Path, mode: str, device: str) -> Any:
    from accelerate import init_empty_weights
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
    from transformers import AutoConfig, AutoModelForCausalLM

    quant = (
        {"load_in_8bit": True, "torch_dtype": torch.bfloat16}
        if mode == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": mode[:3],
            "bnb_4bit_use_double_quant": mode.endswith("-dq"),
            "bnb_4bit_compute_dtype": "bf16",
        }
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return load_and_quantize_model(
        model,
        BnbQuantizationConfig(**quant),
        weights_location=folder,
        device_map={"": 0 if device != "cpu" else device},
    )
