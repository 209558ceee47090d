"""The record beside the weights: what is damaged is refused, and one of other weights has no say."""

import json

import pytest
import torch
from checkpoints import empty, loaded, quantized, save
from comparisons import equal
from models import Layers
from references import quantized_state

from bigload import (
    CheckpointError,
    load_and_quantize_model,
    save_quantized_model,
)


def changed_record(folder, **changes):
    path = folder / "bigload.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this bigload knows 1"),
        ({"format_version": "1"}, "damaged: it names no format_version"),
        ({"layers": "all"}, "damaged.*not a list of names"),
        ({"ties": [1]}, "damaged.*not a list of names"),
        ({"config": {"load_in_4bit": "yes"}}, "damaged.*load_in_4bit"),
        ({"config": {"load_in_2bit": True}}, "damaged.*load_in_2bit"),
        ({"config": None}, "damaged"),
    ],
)
def test_damaged_record_is_refused(tmp_path, device, changes, message):
    save_quantized_model(quantized(tmp_path / "source", device), tmp_path / "saved")
    changed_record(tmp_path / "saved", **changes)
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path / "saved", device).eval()


def test_record_that_is_no_json_is_refused_and_one_of_other_weights_has_no_say(tmp_path, device, logged):
    model = quantized(tmp_path / "source", device, bnb_4bit_compute_dtype="fp32")
    save_quantized_model(model, tmp_path / "saved")
    changed_record(tmp_path / "saved", layout="of others")
    again = loaded(tmp_path / "saved", device).eval()
    assert again.c_proj.compute_dtype == torch.bfloat16  # the checkpoint's own, since nothing says otherwise
    assert equal(again.c_proj.weight.data, model.c_proj.weight.data)
    assert "written with other weights" in logged.text
    (tmp_path / "saved" / "bigload.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bigload\.json' is damaged"):
        loaded(tmp_path / "saved", device).eval()


def test_recorded_layer_that_the_model_lacks_is_an_error(tmp_path, device):
    save_quantized_model(quantized(tmp_path / "source", device, "int8-training"), tmp_path / "saved")
    changed_record(tmp_path / "saved", layers=["norm"])
    with pytest.raises(CheckpointError, match="'norm': quantized when it was saved"):
        loaded(tmp_path / "saved", device).eval()


def test_record_of_what_was_there_before_has_no_say(tmp_path, device, logged):
    """Another library saved another model over ours."""
    model = quantized(tmp_path / "source", device, "nf4", bnb_4bit_compute_dtype="fp32")
    save_quantized_model(model, tmp_path / "saved")
    save(quantized_state(Layers().bfloat16(), "fp4", device), tmp_path / "saved")
    again = load_and_quantize_model(empty(), None, tmp_path / "saved", device_map=device)
    assert again.c_proj.weight.quant_type == again.c_proj.weight.quant_state.quant_type == "fp4"
    assert "written with other weights" in logged.text
