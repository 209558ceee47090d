"""What people do with a loaded model, for each mode and place: as with a resident model, or refused with a reason."""

import gc

import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import equal
from jobs import FAMILIES, JOBS, Context

from bigload import BigloadError, BnbQuantizationConfig, OffloadConfig, load_and_quantize_model, plan_device_map

pytestmark = pytest.mark.usefixtures("small_parts_stream")

MODES = ("nf4", "int8", "none")
# Half of the bytes by "auto", everything away, two GPUs. A CPU takes a cell of each kind, for time's sake.
CELLS = [("cpu", "half", "nf4"), ("cpu", "away", "int8"), ("cpu", "away", "none")]
CELLS += [pytest.param("cuda", place, mode, marks=pytest.mark.cuda) for place in ("half", "away") for mode in MODES]
CELLS += [pytest.param("cuda", "two", mode, marks=[pytest.mark.multi_gpu, pytest.mark.cuda]) for mode in MODES]

# Job and mode -> what the resident model too is refused with, by transformers.
IMPOSSIBLE = dict.fromkeys(
    [("cast_to_float32", "nf4"), ("cast_to_float32", "int8")], "not supported for quantized model"
)
# Job and mode -> what it is refused with where parts are offloaded; docs/offload.md says so.
REFUSED = {("vocabulary_enlarged", mode): "is streamed and cannot be resized.*remove" for mode in MODES}
REFUSED[("cast_to_float32", "none")] = "cannot be cast to torch.float32.*remove"
# The same where the model is on two GPUs.
REFUSED_ON_TWO = {("moved_to_its_device", mode): "is on 'cuda:0', 'cuda:1' and cannot be moved" for mode in MODES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family."""
    made = {}
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = save_checkpoint(build().bfloat16(), tmp_path_factory.mktemp(name))
    return made


def config_of(mode):
    fields = {"torch_dtype": "bf16"} | ({"skip_modules": ["*"]} if mode == "none" else {})
    return BnbQuantizationConfig.from_mode("nf4" if mode == "none" else mode, **fields)


def options_of(place, build, config, folder, device, cache):
    """A device map, and what belongs to it."""
    if place == "away" and device.type == "cpu":
        return {"device_map": "disk", "offload_folder": cache}
    if place == "away":
        return {"device_map": {"": device} | {name: "cpu" for name, _ in empty(build).named_children()}}
    plan = plan_device_map(empty(build), config, folder, {"": device})
    total, reserve = sum(plan.device_bytes.values()), plan.accounts[0].reserve if device.type == "cuda" else 0
    if place == "two":
        return {"device_map": "balanced", "max_memory": dict.fromkeys((0, 1), total * 3 // 4 + reserve)}
    if device.type == "cpu":
        return {"device_map": "auto", "max_memory": {"cpu": total * 3 // 4, "disk": "10GiB"}, "offload_folder": cache}
    # Two slots alone take half of the smallest of these models.
    budgets = {device: total // 2 + reserve, "cpu": "10GiB"}
    return {"device_map": "auto", "max_memory": budgets, "offload": OffloadConfig(slots=1)}


def is_streamed(model, path):
    return "offload" in vars(model) and any(path in placed.unit.paths for placed in model.offload.plan.offloaded)


def flat(found, prefix=""):
    """The tensors and numbers in what a job gives, by name."""
    if isinstance(found, dict):
        return {k: v for name, each in found.items() for k, v in flat(each, f"{prefix}{name}.").items()}
    return {prefix: found}


@pytest.mark.parametrize(("kind", "place", "mode"), CELLS)
@pytest.mark.parametrize("name", JOBS)
def test_job_gives_what_the_resident_model_gives(folders, tmp_path, name, kind, place, mode):
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    family, run = JOBS[name]
    build, config = FAMILIES[family], config_of(mode)
    options = options_of(place, build, config, folders[family], device, tmp_path / "cache")
    part = load_and_quantize_model(empty(build), config, folders[family], **options).eval()
    assert place == "two" or "offload" in vars(part)
    whole = load_and_quantize_model(empty(build), config, folders[family], device_map={"": device}).eval()
    for folder in ("whole", "part"):
        (tmp_path / folder).mkdir()
    if (name, mode) in IMPOSSIBLE:
        with pytest.raises(Exception, match=IMPOSSIBLE[name, mode]):
            run(whole, Context(device, tmp_path / "whole"))
        return
    expected = flat(run(whole, Context(device, tmp_path / "whole")))
    refused = (REFUSED_ON_TWO if place == "two" else REFUSED).get((name, mode))
    if refused and (name != "vocabulary_enlarged" or is_streamed(part, "lm_head")):
        with pytest.raises(BigloadError, match=refused):
            run(part, Context(device, tmp_path / "part"))
        return
    found = flat(run(part, Context(device, tmp_path / "part")))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert equal(found[key].cpu(), value.cpu()), key
        else:
            assert found[key] == value, key
    if kind == "cuda":
        del whole, part
        gc.collect()
