"""`bigload show` says what is in a checkpoint without loading it."""

import pytest
import torch
from checkpoints import quantized, save, save_checkpoint
from models import Layers

from bigload import save_quantized_model
from bigload.cli import main

VALUES = sum(parameter.numel() for parameter in Layers().parameters())
QUANTIZED = 160 * 128 + 128 * 35 + 35 * 5


def shown(capsys, path):
    assert main(["show", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def saved(tmp_path, mode, **fields):
    model = quantized(tmp_path / "source", "cpu", mode, **fields)
    save_quantized_model(model, tmp_path / "saved", "10KB")
    return tmp_path / "saved"


def test_plain_checkpoint(tmp_path, capsys):
    save_checkpoint(Layers(), tmp_path, shards=3, dtype=torch.bfloat16)
    lines = shown(capsys, tmp_path)
    assert lines[0] == str(tmp_path / "model.safetensors.index.json")
    assert lines[1:] == [
        f"  3 files, safetensors: {2 * VALUES / 1024:.2f} KiB",
        f"  {VALUES:,} values in 9 tensors",
        f"  bfloat16: 9 tensors, {VALUES:,} values, {2 * VALUES / 1024:.2f} KiB",
    ]


@pytest.mark.parametrize(
    ("mode", "fields", "how", "computes"),
    [
        ("nf4", {}, "nf4, blocks of 64, a float32 scale each", "computes in: bfloat16"),
        (
            "fp4-dq",
            {"bnb_4bit_blocksize": 128, "bnb_4bit_quant_storage": "float16", "bnb_4bit_compute_dtype": "fp32"},
            "fp4, blocks of 128, their scales quantized again, stored as float16",
            "computes in: float32",
        ),
        ("int8", {"llm_int8_threshold": 4.5}, "int8, a scale for each row", "outliers computed in 16 bit: above 4.5"),
    ],
    ids=["nf4", "fp4-dq", "int8"],
)
def test_quantized_checkpoint(tmp_path, capsys, mode, fields, how, computes):
    skipped = {"skip_modules": ["odd", "head"]} if mode == "fp4-dq" else {}
    lines = shown(capsys, saved(tmp_path, mode, **fields, **skipped))
    count, values = (2, QUANTIZED - 35 * 5) if skipped else (3, QUANTIZED)
    assert lines[2].startswith(f"  {VALUES:,} values in ")
    assert lines[3].startswith(f"  quantized: {count} tensors, {values:,} values, ")
    assert lines[3].endswith(f" as {how}")
    assert lines[4] == f"  {computes}"
    assert lines[5].startswith(f"  bfloat16: {9 - count} tensors, {VALUES - values:,} values, ")
    assert lines[6] == "  layers not quantized: " + ("odd, head" if skipped else "head")


def test_pickled_checkpoint_and_several_dtypes(tmp_path, capsys):
    torch.save({"a": torch.zeros(3), "b": torch.zeros(5, dtype=torch.int64)}, tmp_path / "model.bin")
    assert shown(capsys, tmp_path / "model.bin")[1:] == [
        "  1 file, pickled: 52 B",
        "  8 values in 2 tensors",
        "  int64: 1 tensor, 5 values, 40 B",
        "  float32: 1 tensor, 3 values, 12 B",
    ]


def test_what_is_no_checkpoint_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main(["show", str(tmp_path / "none")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    save({"a": torch.zeros(3)}, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    assert main(["show", str(tmp_path)]) == 1
    assert "truncated" in capsys.readouterr().err
