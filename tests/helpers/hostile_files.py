"""Damage to the files of a checkpoint, drawn from a seed: what is opened must be consistent, or refused clearly."""

import json
import random
import shutil
from pathlib import Path

import torch
from checkpoints import empty, save, save_shards
from references import quantized_state
from scaled import in_fp8, in_rows
from torch import nn

from bigload import BigloadError, load_and_quantize_model, save_quantized_model
from bigload.checkpoint.checkpoint import open_checkpoint

# Values in the place of others: wrong types, sizes that overflow, paths, deep and long ones.
ODD = (
    *(None, True, False, 0, 1, -1, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "F32", "BF16", "U8", "nf4", "../x", "/etc/passwd", "a" * 3000, "\0", "\ud800", "model.safetensors"),
    *([], [0], [1], [2**62, 2**62], [[[[]]]], {}, {"a": {}}, [None], ["x"] * 50),
)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def header_of(raw):
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def write_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(value, rng, depth=0):
    """Change something in a value of JSON: one leaf, key or element of it."""
    if isinstance(value, dict) and value and (depth < 1 or rng.random() < 0.9):
        made, key = dict(value), rng.choice(list(value))
        what = rng.random()
        if what < 0.1:
            del made[key]
        elif what < 0.2:
            made[rng.choice([str(rng.choice(ODD)), key + "x", key.upper()])] = made.pop(key)
        else:
            made[key] = changed(value[key], rng, depth + 1)
        return made
    if isinstance(value, list) and value and rng.random() < 0.7:
        made, at = list(value), rng.randrange(len(value))
        what = rng.random()
        if what < 0.2:
            del made[at]
        elif what < 0.4:
            made.insert(at, rng.choice(ODD))
        else:
            made[at] = changed(value[at], rng, depth + 1)
        return made
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice([-1, 1, 8, -8, value, 2**32])
    return rng.choice(ODD)


def damaged_bytes(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        what = rng.random()
        if what < 0.2 and raw:
            del raw[rng.randrange(len(raw)) :]
        elif what < 0.8 and raw:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        else:
            at = rng.randrange(len(raw) + 1)
            raw[at:at] = bytes(rng.choice(b'{}[]",:0\\') for _ in range(rng.randint(1, 9)))
    return bytes(raw)


def _header(folder, rng):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = header_of(raw)
    for _ in range(rng.randint(1, 3)):
        header = changed(header, rng)
    write_header(path, header, raw[8 + int.from_bytes(raw[:8], "little") :])


def _raw(folder, rng):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(damaged_bytes(raw[:end], rng) + raw[end:])


def _json_file(name):
    def damage(folder, rng):
        path = folder / name
        if rng.random() < 0.3:
            path.write_bytes(damaged_bytes(path.read_bytes(), rng))
            return
        said = json.loads(path.read_text())
        for _ in range(rng.randint(1, 3)):
            said = changed(said, rng)
        path.write_bytes(json.dumps(said).encode("utf-8", "surrogatepass"))

    return damage


def _quant_state(folder, rng):
    path = folder / "model.safetensors"
    from safetensors.torch import load_file

    state = load_file(path)
    name = rng.choice([name for name in state if "quant_state" in name])
    raw = bytes(state[name].numpy())
    made = damaged_bytes(raw, rng) if rng.random() < 0.3 else json.dumps(changed(json.loads(raw), rng)).encode()
    state[name] = torch.tensor(list(made), dtype=torch.uint8)
    save(state, folder)


def _parts(folder, rng):
    """Scales and codes of other shapes and dtypes, or none."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    name = rng.choice(list(state))
    tensor = state.pop(name)
    what = rng.randrange(6)
    if what == 0:
        state[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
    elif what == 1:
        state[name] = tensor.reshape(1, *tensor.shape)
    elif what == 2:
        state[name] = tensor.to(rng.choice([torch.float16, torch.int64, torch.bool, torch.uint8]))
    elif what == 3:
        state[name] = torch.cat([tensor.reshape(-1)] * 2)
    elif what == 4:
        state[name + rng.choice(["x", ".weight", ".absmax"])] = tensor
    save(state, folder)


def _pickle(folder, rng):
    path = folder / "model.bin"
    path.write_bytes(damaged_bytes(path.read_bytes(), rng))


# name: (which files, what is done to them)
KINDS = {
    "header": ("plain", _header),
    "bytes of a header": ("plain", _raw),
    "index": ("shards", _json_file("model.safetensors.index.json")),
    "quant_state": ("nf4-dq", _quant_state),
    "parts": ("nf4-dq", _parts),
    "parts of int8": ("int8", _parts),
    "bigload.json": ("saved", _json_file("bigload.json")),
    "config.json": ("config", _json_file("config.json")),
    "pickle": ("pickle", _pickle),
}
_made = {}


def _files(kind, fill, root):
    """Write a good checkpoint of a kind, once."""
    if (kind, fill) in _made:
        return _made[kind, fill]
    folder = root / f"good-{kind}"
    torch.manual_seed(0)
    model = Layers()
    if fill is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(fill)
    if kind == "shards":
        folder.mkdir(parents=True)
        names = list(model.state_dict())
        state = model.state_dict()
        save_shards(
            {"a.safetensors": {n: state[n] for n in names[:3]}, "b.safetensors": {n: state[n] for n in names[3:]}},
            folder,
        )
    elif kind in ("nf4-dq", "int8", "config"):
        save(quantized_state(model, "nf4-dq" if kind == "config" else kind, torch.device("cpu")), folder)
    elif kind in ("fp8", "fp8 in rows", "modelopt"):
        save(model.bfloat16().state_dict(), folder)
        _ = in_fp8(folder, size=(16, 16)) if kind == "fp8" else in_rows(folder)
        if kind == "modelopt":
            (folder / "config.json").unlink()
            (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    elif kind == "saved":
        save_quantized_model(load_and_quantize_model(model, "nf4", device_map="cpu"), folder)
    elif kind == "pickle":
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "model.bin")
    else:
        save(model.state_dict(), folder)
    if kind == "config":
        fields = {"load_in_4bit": True, "llm_int8_threshold": 6.0, "bnb_4bit_compute_dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "quantization_config": fields}))
    _made[kind, fill] = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return _made[kind, fill]


def attempt(kind, seed, folder: Path, fill=None):
    """Load a checkpoint with damage that is drawn from a seed.

    Returns:
        The messages of the errors: none where it was opened and loaded, whose tensors then are in the files.

    Raises:
        Exception: one that is not of the package.
    """
    which, damage = KINDS[kind]
    write_good(which, folder, fill)
    damage(folder, random.Random(f"{kind} {seed}"))
    return opened_and_loaded(which, folder)


def write_good(which, folder, fill=None):
    """Write the good files that are damaged then."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in _files(which, fill, folder).items():
        (folder / name).write_bytes(raw)


def opened_and_loaded(which, folder):
    """Return the messages of the errors by which a folder is refused; raises any other error."""
    said = []
    try:
        checkpoint = open_checkpoint(folder)
        for tensor in checkpoint.tensors.values():
            assert tensor.offset >= 0
            assert tensor.nbytes >= 0
    except BigloadError as error:
        said.append(str(error))
    try:
        mode = None if which in ("nf4-dq", "int8", "saved", "config") else "nf4"
        load_and_quantize_model(empty(Layers), mode, folder, device_map="cpu")
    except BigloadError as error:
        said.append(str(error))
    return said
