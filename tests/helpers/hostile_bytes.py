"""The parts of a checkpoint's files that a fuzzer writes, each as bytes; all else of the checkpoint is good."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoints import save
from hostile_files import changed, damaged_bytes, header_of, opened_and_loaded, write_good, write_header
from safetensors.torch import load_file

WEIGHTS = "model.safetensors"
_STRING = re.compile(rb'"([^"\\]*)"')  # of JSON, without escapes


class Target(NamedTuple):
    """What is damaged: `read` returns the bytes of a folder with these files, `write` puts others in their place."""

    files: str
    read: Callable[[Path], bytes]
    write: Callable[[Path, bytes], None]


def _file(files, name):
    return Target(files, lambda folder: (folder / name).read_bytes(), lambda folder, new: _write(folder / name, new))


def _write(path, new):
    path.write_bytes(new)


def _header(files):
    """The JSON of a header; its length is then written as it is."""

    def write(folder, new):
        raw = (folder / WEIGHTS).read_bytes()
        write_header(folder / WEIGHTS, new, raw[_end_of_header(raw) :])

    return Target(files, lambda folder: json.dumps(header_of((folder / WEIGHTS).read_bytes())).encode(), write)


def _head(files):
    """A header with its length."""

    def read(folder):
        raw = (folder / WEIGHTS).read_bytes()
        return raw[: _end_of_header(raw)]

    def write(folder, new):
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(new + raw[_end_of_header(raw) :])

    return Target(files, read, write)


def _end_of_header(raw):
    return 8 + int.from_bytes(raw[:8], "little")


def _tensor(files, name):
    """The values of a tensor of bytes."""

    def write(folder, new):
        save(load_file(folder / WEIGHTS) | {name: torch.tensor(list(new), dtype=torch.uint8)}, folder)

    return Target(files, lambda folder: bytes(load_file(folder / WEIGHTS)[name].numpy()), write)


def _pickled(files, name):
    """The pickle in the archive that torch writes, whose checksum is then right."""

    def read(folder):
        with zipfile.ZipFile(folder / name) as archive:
            return archive.read(next(each for each in archive.namelist() if each.endswith("data.pkl")))

    def write(folder, new):
        with zipfile.ZipFile(folder / name) as archive:
            members = {each: archive.read(each) for each in archive.namelist()}
        with zipfile.ZipFile(folder / name, "w") as archive:
            for each, raw in members.items():
                archive.writestr(each, new if each.endswith("data.pkl") else raw)

    return Target(files, read, write)


TARGETS = {
    "header": _header("plain"),
    "header with its length": _head("plain"),
    "header of nf4-dq": _header("nf4-dq"),
    "header of int8": _header("int8"),
    "header of fp8": _header("fp8"),
    "quant_state": _tensor("nf4-dq", "first.weight.quant_state.bitsandbytes__nf4"),
    "index": _file("shards", "model.safetensors.index.json"),
    "bigload.json": _file("saved", "bigload.json"),
    "config.json of nf4-dq": _file("config", "config.json"),
    "config.json of fp8": _file("fp8", "config.json"),
    "config.json of fp8 in rows": _file("fp8 in rows", "config.json"),
    "hf_quant_config.json": _file("modelopt", "hf_quant_config.json"),
    "pickle in its archive": _pickled("pickle", "model.bin"),
}


def good_bytes(name, folder):
    """Return what a target is in a good checkpoint."""
    write_good(TARGETS[name].files, folder)
    return TARGETS[name].read(folder)


def attempt_bytes(name, new, folder):
    """Load a checkpoint with other bytes in the place of a target's; as `attempt` of `hostile_files.py`."""
    write_good(TARGETS[name].files, folder)
    TARGETS[name].write(folder, new)
    return opened_and_loaded(TARGETS[name].files, folder)


def mutated(raw, rng, mutate):
    """Change bytes: as JSON, where they are that, mostly so that they stay it.

    Args:
        raw: what a target is.
        rng: draws what is done.
        mutate: changes some bytes, in a way of a fuzzer's own.
    """
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        said = None
    what = rng.random()
    if said is None or what < 0.1:
        return mutate(raw) if what < 0.6 else damaged_bytes(raw, rng)
    strings = [found.span(1) for found in _STRING.finditer(raw)]
    if strings and what < 0.4:
        begin, end = rng.choice(strings)
        new = mutate(raw[begin:end]).decode(errors="replace")
        return raw[:begin] + json.dumps(new)[1:-1].encode() + raw[end:]
    for _ in range(rng.randint(1, 3)):
        said = changed(said, rng)
    return json.dumps(said).encode("utf-8", "surrogatepass")
