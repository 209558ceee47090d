"""Weights stored as small numbers with scales: their values in every form, and what is damaged about them."""

import gc
import json

import pytest
import torch
from checkpoints import empty, save
from comparisons import assert_same_bits, equal, state_of
from safetensors.torch import load_file
from scaled import BLOCKS, FP8, by_hand, in_blocks, says
from torch import nn

from bigload import (
    CheckpointError,
    ConfigError,
    OffloadConfig,
    load_and_quantize_model,
    plan_device_map,
    quantize_checkpoint,
)
from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.checkpoint.describe import describe_checkpoint
from bigload.checkpoint.scaled import values as scaled_values
from bigload.checkpoint.scaled.stated import stated
from bigload.checkpoint.scaled.tensor import ScaledTensor
from bigload.io import transfer
from bigload.io.ring import slot_bytes
from bigload.pipeline import transcoding

PLAIN = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "bf16"}
CHANNELS = {"quant_method": "compressed-tensors", "format": "float-quantized"}


class Net(nn.Module):
    """Its weights end within blocks of 128 x 128, in both directions."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(320, 200, bias=False), nn.Linear(200, 320)
        self.head = nn.Linear(320, 8)

    def forward(self, x):
        return self.head(self.down(self.up(x)))


def stored(make):
    """Return a state with both layers stored by `make`, which gives a weight's parts; and their values in bf16."""
    state, values = {name: tensor.bfloat16() for name, tensor in Net().state_dict().items()}, {}
    values = dict(state)
    for layer in ("up", "down"):
        parts, values[f"{layer}.weight"] = make(state.pop(f"{layer}.weight").float())
        state |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    return state, values


def blocks(weight, size=(128, 128), cast=torch.Tensor.float):
    numbers, scales = in_blocks(weight, size)
    return {"weight": numbers, "weight_scale_inv": cast(scales)}, by_hand(numbers, cast(scales), size)


def exponents(weight, dtype=torch.uint8, size=(128, 128), end="_inv"):
    numbers, scales = in_blocks(weight, size)
    bits = (scales.log2().round() + 127).to(torch.uint8)
    bits[0, 0] = 0  # 2 ** -127, below the normal numbers of float32
    value = torch.exp2(bits.double() - 127).float()
    return {"weight": numbers, f"weight_scale{end}": bits.view(dtype)}, by_hand(numbers, value, size)


def blocks_of_modelopt(weight, size=128):
    """As ModelOpt exports FP8_PB_WO: the dimensions that its maxima were taken over are kept."""
    numbers, scales = in_blocks(weight, (size, size))
    return {"weight": numbers, "weight_scale": scales[:, None, :, None]}, by_hand(numbers, scales, (size, size))


def by_tensor(weight):
    scale = weight.abs().max() / 448
    numbers = (weight / scale).to(FP8)
    parts = {"weight": numbers, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return parts, (numbers.float() * scale.item()).bfloat16()


def by_row(weight, number=FP8, most=448):
    scales = (weight.abs().amax(1, keepdim=True) / most).bfloat16()
    numbers = (weight / scales.float()).round().clamp(-most, most).to(number)
    return {"weight": numbers, "weight_scale": scales}, (numbers.float() * scales.float()).bfloat16()


FORMS = {
    "blocks": (blocks, BLOCKS, "fp8 by blocks of 128 x 128"),
    "scales in 16 bit": (lambda w: blocks(w, cast=torch.Tensor.bfloat16), BLOCKS, "fp8 by blocks of 128 x 128"),
    "blocks of 64 x 32": (
        lambda w: blocks(w, (64, 32)),
        BLOCKS | {"weight_block_size": [64, 32]},
        "fp8 by blocks of 64 x 32",
    ),
    "exponents": (exponents, BLOCKS | {"scale_fmt": "ue8m0"}, "fp8 by blocks of 128 x 128"),
    "exponents as such": (lambda w: exponents(w, torch.float8_e8m0fnu), BLOCKS, "fp8 by blocks of 128 x 128"),
    "exponents of rows": (
        lambda w: exponents(w, size=(1, 32), end=""),
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        "fp8 by blocks of 1 x 32",
    ),
    "blocks of ModelOpt": (
        blocks_of_modelopt,
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        "fp8 by blocks of 128 x 128",
    ),
    "blocks of ModelOpt, of a size": (
        lambda w: blocks_of_modelopt(w, 64),
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "group_size": 64},
        "fp8 by blocks of 64 x 64",
    ),
    "blocks of ModelOpt, as others name them": (
        blocks,
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "group_size": None},
        "fp8 by blocks of 128 x 128",
    ),
    "by tensor": (by_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8 by tensor"),
    "by row": (by_row, CHANNELS, "fp8 by rows"),
    "int8": (lambda w: by_row(w, torch.int8, 127), CHANNELS | {"format": "int-quantized"}, "int8 by rows"),
}


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    """A checkpoint in one form; the same in 16 bit; and what it is called."""
    make, quantization, kind = FORMS[request.param]
    state, values = stored(make)
    folder = save(state, tmp_path / "scaled", shards=3)  # scales are in another file than their weight
    says(folder, **quantization)
    return folder, save(values, tmp_path / "plain"), values, kind


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8", "none"])
def test_values_are_those_of_the_formula(form, mode, device):
    folder, plain, _, _ = form
    found = load_and_quantize_model(empty(Net), mode, folder, device_map=device)
    assert_same_bits(state_of(found), state_of(load_and_quantize_model(empty(Net), mode, plain, device_map=device)))


def test_weights_can_be_kept_in_16_bit(form, warned):
    folder, _, values, _ = form
    assert_same_bits(state_of(load_and_quantize_model(empty(Net), PLAIN, folder, device_map="cpu")), values)
    assert not warned()


def test_values_are_right_whatever_arrives_first(form, monkeypatch):
    folder, _, values, _ = form
    monkeypatch.setattr(transcoding, "CPU_VALUES", 999)

    def order(tasks):
        return sorted(tasks, key=lambda task: isinstance(task, transcoding._ScalesTask))

    monkeypatch.setattr("bigload.pipeline.execute.in_file_order", order)
    assert_same_bits(state_of(load_and_quantize_model(empty(Net), PLAIN, folder, device_map="cpu")), values)


@pytest.mark.parametrize("is_pickled", [False, True])
def test_numbers_need_not_be_kept_until_their_scales_arrive(form, is_pickled, monkeypatch, tmp_path, device):
    folder, _, values, _ = form
    if is_pickled:
        state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        (tmp_path / "pickled").mkdir()
        torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
        (tmp_path / "pickled" / "config.json").write_text((folder / "config.json").read_text())
        folder = tmp_path / "pickled"
    kept, own = [], transcoding._Landing._take

    def taken(self, piece, begin):
        own(self, piece, begin)
        kept.append(len(self._early))

    monkeypatch.setattr(transcoding._Landing, "_take", taken)
    assert_same_bits(state_of(load_and_quantize_model(empty(Net), PLAIN, folder, device_map=device)), values)
    assert kept
    assert not any(kept)


def test_the_description_says_how_they_are_stored(form):
    folder, _, _, kind = form
    assert f"  {kind}: 2 tensors, 128,000 values" in describe_checkpoint(folder)


def test_none_asks_for_a_config(form):
    folder, _, _, kind = form
    with pytest.raises(ConfigError, match=f"is stored as {kind}, which is not kept: pass what to load it as, 'nf4'"):
        load_and_quantize_model(empty(Net), None, folder, device_map="cpu")


def test_a_plan_has_the_bytes_of_the_loaded_model(form):
    folder, plain, _, _ = form
    found, expected = (plan_device_map(empty(Net), "nf4", each, device_map="cpu") for each in (folder, plain))
    assert found.device_bytes == expected.device_bytes
    assert found.source_bytes < expected.source_bytes


def test_a_plan_keeps_memory_free_for_what_the_values_are_computed_in(form):
    folder, plain, _, _ = form
    told = OffloadConfig(reserve=0)
    found, expected = (plan_device_map(empty(Net), "nf4", each, device_map=0, offload=told) for each in (folder, plain))
    values, scales = 200 * 320 * 2, 320 * 10 * 8 + 320 * 32  # in bf16, and of all rows at most
    beside = found.accounts[0].reserve - expected.accounts[0].reserve
    assert expected.accounts[0].reserve == 144 * 2**20
    stored = sum(
        source.tensor.scales.nbytes + 512
        for p in found.tensors
        for source in p.sources
        if isinstance(source.tensor, ScaledTensor)
    )
    assert values + stored < beside <= values + stored + scales


def test_files_are_made_of_them_and_their_scales_are_gone(form, tmp_path):
    folder, plain, _, _ = form
    for name, source in (("a", folder), ("b", plain)):
        quantize_checkpoint(source, tmp_path / name, "nf4-dq", model=empty(Net), device="cpu")
    loaded = [load_and_quantize_model(empty(Net), None, tmp_path / name, device_map="cpu") for name in "ab"]
    assert_same_bits(*map(state_of, loaded))
    assert not [name for name in open_checkpoint(tmp_path / "a").tensors if "scale" in name]


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["nf4", "int8", "none"])
def test_offloaded_weights_compute_the_same(form, place, mode, tmp_path, device, small_parts_stream):
    folder, plain, _, _ = form
    x = torch.randn(4, 320, device=device, dtype=torch.bfloat16)
    whole = load_and_quantize_model(empty(Net), mode, folder, device_map=device)
    outputs = []
    for source in (folder, plain, folder):  # the last one finds its files
        model = load_and_quantize_model(
            empty(Net),
            mode,
            source,
            device_map={"": device, "up": place, "down": place},
            offload_folder=tmp_path / "cache",
            offload=OffloadConfig(),
        )
        outputs.append(model(x))
        is_resident = place == device.type  # on the CPU, host memory is where it computes
        assert hasattr(model, "offload") is not is_resident
        if not is_resident:
            model.offload.remove()
        assert_same_bits(state_of(model), state_of(whole))
    assert equal(outputs[0], whole(x))
    assert equal(outputs[0], outputs[1])
    assert equal(outputs[0], outputs[2])


def test_files_of_other_scales_are_not_taken_for_these(tmp_path, small_parts_stream):
    outputs = []
    for factor in (1, 2, 1):
        state, _ = stored(lambda weight: blocks(torch.ones_like(weight) * factor))  # noqa: B023
        folder = save(state, tmp_path / str(factor))
        says(folder, **BLOCKS)
        how = {"device_map": {"": "cpu", "down": "disk"}, "offload_folder": tmp_path / "cache"}
        model = load_and_quantize_model(empty(Net), "nf4", folder, **how)
        assert model.offload
        outputs.append(model.down(torch.ones(1, 200).bfloat16()))
    assert equal(outputs[0], outputs[2])
    assert not equal(outputs[0], outputs[1])


def requested():
    """Bytes that were asked of a GPU's allocator, which rounds them up."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize(("dtype", "copied"), [("bf16", 200 * 320 * 2), ("fp16", 0)])
def test_a_plan_keeps_memory_free_for_the_float16_that_int8_is_made_of(tmp_path, dtype, copied):
    state, _ = stored(blocks)
    folder = save(state, tmp_path)
    says(folder, **BLOCKS)
    modes = {"load_in_8bit": True, "torch_dtype": dtype}, {"load_in_4bit": True, "torch_dtype": dtype}
    plans = [
        plan_device_map(empty(Net), mode, folder, device_map=0, offload=OffloadConfig(reserve=0)) for mode in modes
    ]
    assert plans[0].accounts[0].reserve - plans[1].accounts[0].reserve == copied


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["nf4", "int8", "none"])
def test_a_load_needs_no_more_of_a_gpu_than_is_kept_free(tmp_path, mode):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(12))

    state = {}
    numbers = torch.randn(4096, 4096).mul_(100).clamp_(-448, 448).to(FP8)
    for name in Large().state_dict():
        state |= {name: numbers.clone(), f"{name}_scale_inv": torch.full((32, 32), 2e-4)}
    folder = save(state, tmp_path, shards=2)
    says(folder, **BLOCKS)
    plan = plan_device_map(empty(Large), mode, folder, device_map=0, offload=OffloadConfig(reserve=0))
    load_and_quantize_model(empty(Large), mode, folder, device_map=0)  # what the process keeps
    gc.collect()  # layers of bitsandbytes are cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = requested()
    model = load_and_quantize_model(empty(Large), mode, folder, device_map=0)
    final = torch.cuda.memory_allocated()
    assert requested() - before == plan.device_bytes[torch.device("cuda", 0)]
    assert torch.cuda.max_memory_allocated() - final <= plan.accounts[0].reserve
    assert model.layers[11] is not None


def fp8(scales=lambda s: s, **more):
    """Return a state in blocks, with its scales changed."""
    state, _ = stored(blocks)
    changed = {name: scales(t) if name.endswith("_inv") else t for name, t in state.items()}
    return {name: tensor for name, tensor in (changed | more).items() if tensor is not None}


def nan(scales):
    scales = scales.clone()
    scales[-1, -1] = torch.nan
    return scales


DAMAGED = {
    "no scales": (lambda: fp8(lambda s: None), BLOCKS, r"'down.weight_scale_inv'.*is missing|'up.weight_scale_inv'"),
    "one without": (lambda: fp8(**{"up.weight_scale_inv": None}), BLOCKS, "'up.weight_scale_inv' is missing: download"),
    "a row too few": (lambda: fp8(lambda s: s[:-1]), BLOCKS, r"has shape .* needs \(.*\) in blocks of 128 x 128"),
    "turned": (lambda: fp8(lambda s: s.mT), BLOCKS, "needs"),
    "integers": (lambda: fp8(torch.Tensor.int), BLOCKS, "expected scales in a floating dtype"),
    "not a number": (lambda: fp8(nan), BLOCKS, "stored with scales that are not finite: the file is damaged"),
    "other blocks": (fp8, BLOCKS | {"weight_block_size": [64, 64]}, "in blocks of 64 x 64, as 'config.json' says"),
    "no blocks": (fp8, BLOCKS | {"weight_block_size": [0, 128]}, r"blocks of \[0, 128\]; expected two positive"),
    "one number": (fp8, BLOCKS | {"weight_block_size": 128}, "blocks of 128; expected two positive integers"),
    "blocks that nothing says": (
        lambda: {n.replace("_inv", ""): t for n, t in fp8().items()},
        None,
        "no config beside it says how large its blocks are",
    ),
    "blocks of ModelOpt, of another size": (
        lambda: stored(blocks_of_modelopt)[0],
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO", "group_size": 64},
        "in blocks of 64 x 64, as 'config.json' says",
    ),
    "blocks of ModelOpt, too few": (
        lambda: {n: t[:-1] if t.dim() == 4 else t for n, t in stored(blocks_of_modelopt)[0].items()},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        r"has shape .* needs \(.*\) in blocks of 128 x 128: the file is damaged",
    ),
    "another method": (fp8, {"quant_method": "mxfp4"}, "quantized by 'mxfp4', but 'down.weight' is|but 'up.weight' is"),
    "16 bit": (lambda: stored(blocks)[1], BLOCKS, "no weight there is stored so: if they have been dequantized"),
    "scales of 16 bit": (
        lambda: fp8(**{"up.weight": torch.ones(200, 320).bfloat16()}),
        BLOCKS,
        "is stored as torch.bf",
    ),
    "a vector": (
        lambda: fp8(**{"norm.weight": torch.ones(128).to(FP8), "norm.weight_scale_inv": torch.ones(1)}),
        BLOCKS,
        "'norm.weight' is stored as fp8, but its shape .* is not that of a matrix",
    ),
    "groups of several sizes": (
        fp8,
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                str(size): {"weights": {"strategy": "block", "block_structure": [size, size]}} for size in (64, 128)
            },
        },
        r"names blocks of several sizes, \[64, 64\], \[128, 128\]",
    ),
    "scales of nothing": (lambda: fp8(**{"up.weight": None}), BLOCKS, "'up.weight' is not there"),
    "offsets": (
        lambda: stored(lambda w: by_row(w, torch.int8, 127))[0] | {"up.weight_zero_point": torch.ones(200, 1)},
        CHANNELS,
        "offsets.*use the original checkpoint",
    ),
    "one int8 without": (
        lambda: {n: t for n, t in stored(lambda w: by_row(w, torch.int8, 127))[0].items() if n != "up.weight_scale"},
        CHANNELS,
        "weights are stored as int8, but 'up.weight_scale' is missing: download",
    ),
    "another order": (
        lambda: stored(lambda w: by_row(w, torch.int8, 127))[0] | {"up.weight_g_idx": torch.ones(320).int()},
        CHANNELS,
        "columns in another order.*use the original checkpoint",
    ),
}


@pytest.mark.parametrize("mode", ["nf4", "none"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_and_nothing_is_loaded(tmp_path, case, mode, device):
    make, quantization, message = DAMAGED[case]
    folder = save(make(), tmp_path)
    if quantization is not None:
        says(folder, **quantization)
    model = Net()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(model, mode, folder, device_map=device)
    assert_same_bits(state_of(model), before)


class Doubled(nn.Linear):
    """Computes with the values when it is loaded."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_a_rule_that_computes_with_the_values_is_given_them_or_the_damage_is_named(tmp_path, device):
    def build():
        net = Net()
        net.up = Doubled(320, 200, bias=False)
        return net

    state = fp8()
    scales = state["up.weight_scale_inv"]
    says(save(state, tmp_path / "sound"), **BLOCKS)
    says(save(state | {"up.weight_scale_inv": nan(scales)}, tmp_path / "damaged"), **BLOCKS)
    model = load_and_quantize_model(empty(build), PLAIN, tmp_path / "sound", device_map=device)
    expected = by_hand(state["up.weight"], scales, dtype=torch.float32) * 2
    assert torch.equal(model.up.weight.cpu(), expected.bfloat16())
    with pytest.raises(CheckpointError, match="stored with scales that are not finite: the file is damaged"):
        load_and_quantize_model(empty(build), PLAIN, tmp_path / "damaged", device_map=device)


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_and_nothing_is_written(tmp_path, case, device):
    make, quantization, message = DAMAGED[case]
    folder = save(make(), tmp_path / "damaged")
    if quantization is not None:
        says(folder, **quantization)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(folder, tmp_path / "nf4", "nf4", model=empty(Net), device=device)
    assert not (tmp_path / "nf4").exists()


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_scales_are_named_where_values_made_of_them_are_found_first(tmp_path, mode):
    """Scales are looked at when all is there, and each file's weights before."""
    folder = save(fp8(nan), tmp_path / "damaged")
    says(folder, **BLOCKS)
    message = "'(down|up).weight', '(down|up).weight': stored with scales that are not finite"
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(empty(Net), mode, folder, device_map="cpu")
    with pytest.raises(CheckpointError, match=r"'(down|up).weight'.*: stored with scales that are not finite"):
        quantize_checkpoint(folder, tmp_path / mode, mode, model=empty(Net), device="cpu")
    assert not (tmp_path / mode).exists()


def test_scales_of_rows_are_computed_for_a_few_at_a_time(tmp_path, monkeypatch):
    most, make = [], scaled_values.as_factors

    def watched(scales):
        most.append(scales.numel())
        return make(scales)

    monkeypatch.setattr(scaled_values, "as_factors", watched)
    monkeypatch.setattr(transcoding, "CPU_VALUES", 4 * 96)
    folder = save(mxfp4(), tmp_path)
    load_and_quantize_model(empty(Turned), "nf4", folder, device_map="cpu")
    assert most.count(4 * 3) == 3 * 40 // 4  # steps of 4 rows, with 3 scales each, through all experts
    assert max(most) == 4 * 3


@pytest.mark.parametrize("ring", ["2KiB", "64KiB"])
def test_scales_that_come_in_pieces_are_put_together(tmp_path, monkeypatch, ring, device):
    """The ring's slots are smaller than the 16 KiB of scales here; of the second ring they are not."""
    weight = torch.randn(4096, 32)
    numbers, scales = (by_row(weight)[0][name] for name in ("weight", "weight_scale"))
    folder = save({"0.weight": numbers, "0.weight_scale": scales}, tmp_path)
    says(folder, **CHANNELS)
    pieces, own = [], transcoding._Landing._take_scales

    def taken(self, piece, begin):
        pieces.append(len(piece))
        own(self, piece, begin)

    monkeypatch.setattr(transcoding._Landing, "_take_scales", taken)
    monkeypatch.setenv("BIGLOAD_RING_BYTES", ring)
    monkeypatch.setattr(transfer, "_BATCH_BYTES", slot_bytes())  # on a GPU, pieces are as large as these
    model = load_and_quantize_model(
        empty(lambda: nn.Sequential(nn.Linear(32, 4096, bias=False))), PLAIN, folder, device_map=device
    )
    assert torch.equal(model[0].weight.cpu(), (numbers.float() * scales.float().view(-1, 1)).bfloat16())
    assert len(pieces) > 1 or ring != "2KiB"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.two.weight = self.one.weight


def test_one_weight_stored_twice_with_other_scales_is_said(tmp_path, warned):
    numbers = torch.randn(128, 128).to(FP8)
    for factor, count in ((1, 0), (2, 1)):
        state = {f"{name}.weight": numbers.clone() for name in ("one", "two")}
        state |= {"one.weight_scale_inv": torch.ones(1, 1), "two.weight_scale_inv": torch.ones(1, 1) * factor}
        load_and_quantize_model(empty(Tied), "nf4", save(state, tmp_path / str(factor)), device_map="cpu")
        assert len([message for message in warned() if "stored with different values" in message]) == count


def test_what_was_dequantized_loads_without_the_stale_config(tmp_path):
    _, values = stored(blocks)
    folder = save(values, tmp_path)
    says(folder, **BLOCKS)
    with pytest.raises(CheckpointError, match="remove quantization_config from"):
        load_and_quantize_model(empty(Net), PLAIN, folder, device_map="cpu")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_bits(state_of(load_and_quantize_model(empty(Net), PLAIN, folder, device_map="cpu")), values)


@pytest.mark.parametrize(("method", "block"), [("MXFP8", (1, 32)), ("NVFP4", None), ("", None)])
def test_file_that_modelopt_writes_says_how_weights_are_stored(tmp_path, method, block):
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": method}}))
    found = stated(tmp_path)
    assert (found.method, found.file) == (("modelopt", "hf_quant_config.json") if method else ("", ""))
    assert found.block == block


def test_groups_of_which_only_inputs_are_quantized_name_no_blocks(tmp_path):
    groups = {"a": {"weights": None}, "b": {"weights": {"strategy": "group", "group_size": 64}}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    assert stated(tmp_path).block == (1, 64)


def test_scales_of_modelopts_blocks_say_so_themselves(tmp_path):
    """A config of several methods names none for all weights, and its older exports have it in a file of their own."""
    state, values = stored(blocks_of_modelopt)
    folder = save(state, tmp_path)
    quantized = {name: {"quant_algo": "FP8_PB_WO", "group_size": 128} for name in ("up", "down")}
    for said in ({"quant_algo": "MIXED_PRECISION", "quantized_layers": quantized}, {"quant_algo": "FP8_PB_WO"}):
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
        assert_same_bits(state_of(load_and_quantize_model(empty(Net), PLAIN, folder, device_map="cpu")), values)


def test_blocks_are_known_when_the_config_lies_beside(tmp_path):
    state = {name.replace("_inv", ""): tensor for name, tensor in fp8().items()}
    folder = save(state, tmp_path)
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    says(folder, **CHANNELS, config_groups={"group_0": {"weights": weights}})
    assert "fp8 by blocks of 128 x 128" in describe_checkpoint(folder)


SOUND = {
    "no scales": (fp8, BLOCKS),
    "one without": (fp8, BLOCKS),
    "not a number": (fp8, BLOCKS),
    "other blocks": (fp8, BLOCKS),
    "no blocks": (fp8, BLOCKS),
    "scales of nothing": (fp8, BLOCKS),
    "another method": (fp8, BLOCKS),
    "blocks that nothing says": (
        DAMAGED["blocks that nothing says"][0],
        CHANNELS | {"config_groups": {"a": {"weights": {"strategy": "block", "block_structure": [128, 128]}}}},
    ),
    "offsets": (lambda: stored(lambda w: by_row(w, torch.int8, 127))[0], CHANNELS),
}


@pytest.mark.parametrize("case", SOUND)
def test_damaged_checkpoints_load_once_they_are_sound(tmp_path, case):
    make, quantization, message = DAMAGED[case]
    folder = save(make(), tmp_path)
    if quantization is not None:
        says(folder, **quantization)
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(empty(Net), "nf4", folder, device_map="cpu")
    make, quantization = SOUND[case]
    says(save(make(), tmp_path), **quantization)
    assert type(load_and_quantize_model(empty(Net), "nf4", folder, device_map="cpu").up).__name__ == "Linear4bit"


@pytest.mark.parametrize("mode", ["nf4", "int8", "none"])
def test_a_mode_is_what_the_error_without_one_asks_for(form, mode):
    folder, _, _, _ = form
    with pytest.raises(ConfigError, match="pass what to load it as"):
        load_and_quantize_model(empty(Net), None, folder, device_map="cpu")
    assert load_and_quantize_model(empty(Net), mode, folder, device_map="cpu").load_report


class Turned(nn.Module):
    """Experts as GPT-OSS has them: (E, in_features, out_features)."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.ones(3, 96, 40))
        self.head = nn.Linear(40, 8)


def mxfp4(scale=None, width=16):
    scale = torch.randint(100, 140, (3, 40, 3), dtype=torch.uint8) if scale is None else scale
    numbers = torch.randint(0, 256, (3, 40, 3, width), dtype=torch.uint8)
    plain = {name: tensor for name, tensor in Turned().state_dict().items() if "head" in name}
    return plain | {"experts.down_proj_blocks": numbers, "experts.down_proj_scales": scale}


@pytest.mark.parametrize("mode", ["nf4", "none"])
def test_a_pickle_of_them_has_the_same_values(tmp_path, mode, device):
    """Experts are read one by one, of which a pickle holds no bytes of their own."""
    state = mxfp4()
    (tmp_path / "pickled").mkdir()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    expected = load_and_quantize_model(empty(Turned), mode, save(state, tmp_path / "stored"), device_map=device)
    found = load_and_quantize_model(empty(Turned), mode, tmp_path / "pickled", device_map=device)
    assert_same_bits(state_of(found), state_of(expected))


def test_a_plan_keeps_memory_free_for_both_numbers_of_a_byte(tmp_path):
    folder = save(mxfp4(), tmp_path)
    plan = plan_device_map(empty(Turned), PLAIN, folder, device_map=0, offload=OffloadConfig(reserve=0))
    values, pairs, scales = 96 * 40 * 2, 96 * 40 // 2 * 4, 40 * 3 * 8 + 40 * 32
    stored = 3 * (40 * 3 + 512)  # of three experts, and a number of each that is kept to the end
    assert plan.accounts[0].reserve - 144 * 2**20 == values + pairs + scales + stored


def test_mxfp4_is_what_the_specification_says(tmp_path, device):
    state = mxfp4()
    folder = save(state, tmp_path)
    found = load_and_quantize_model(empty(Turned), PLAIN | {"torch_dtype": "fp32"}, folder, device_map=device)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    numbers, exponents = state["experts.down_proj_blocks"].tolist(), state["experts.down_proj_scales"].tolist()
    expected = [
        [
            [
                table[(numbers[e][r][c // 32][c % 32 // 2] >> 4 * (c % 2)) & 15]
                * 2.0 ** (exponents[e][r][c // 32] - 127)
                for r in range(40)
            ]
            for c in range(96)
        ]
        for e in range(3)
    ]
    assert equal(found.experts.down_proj.cpu(), torch.tensor(expected))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: mxfp4(torch.ones(3, 40, 2, dtype=torch.uint8)), r"it must be \(3, 40, 3\) of torch.uint8"),
        (lambda: mxfp4(torch.ones(3, 40, 3)), "of torch.float32; for"),
        (lambda: mxfp4(torch.full((3, 40, 3), 255, dtype=torch.uint8)), "scales that are not finite"),
        (lambda: mxfp4(width=8), "has blocks of 8 bytes, mxfp4 has blocks of 16"),
        (lambda: {n: t for n, t in mxfp4().items() if "_scales" not in n}, "'experts.down_proj_scales' is missing"),
        (lambda: {n: t for n, t in mxfp4().items() if "_blocks" not in n}, "'experts.down_proj_blocks' is missing"),
    ],
    ids=["shape", "dtype", "not finite", "width", "no scales", "no blocks"],
)
def test_damaged_mxfp4_is_named(tmp_path, state, message, device):
    folder = save(state(), tmp_path)
    says(folder, quant_method="mxfp4")
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(empty(Turned), PLAIN, folder, device_map=device)


def test_mxfp4_that_a_config_says_is_fp8_is_named(tmp_path):
    folder = save(mxfp4(), tmp_path)
    says(folder, **BLOCKS)
    with pytest.raises(
        CheckpointError, match=r"quantized by 'fp8', but 'experts.down_proj' is stored as mxfp4, blocks"
    ):
        load_and_quantize_model(empty(Turned), PLAIN, folder, device_map="cpu")
    says(folder, quant_method="mxfp4")
    assert load_and_quantize_model(empty(Turned), PLAIN, folder, device_map="cpu").experts.down_proj.isfinite().all()


FP4 = {"up.weight": torch.zeros(200, 160, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"up.weight_scale_inv": torch.ones(200, 9)}, "into no equal blocks"),
        ({"up.weight_scale_inv": torch.ones(1)}, "into no equal blocks"),
        ({"up.weight_scale_inv": torch.ones(200, 10).int()}, "of torch.int32, which divides"),
        ({"up.weight_scale_inv": torch.ones(200, 10) * torch.inf}, "scales that are not finite"),
        ({}, "weights are stored as int8, but 'up.weight_scale_inv' is missing: download"),
    ],
    ids=["uneven", "one", "integers", "infinite", "none"],
)
def test_damaged_fp4_is_named(tmp_path, parts, message, device):
    state = {name: tensor for name, tensor in fp8().items() if not name.startswith("up.")}
    folder = save(state | FP4 | parts, tmp_path)
    says(folder, **BLOCKS, expert_dtype="fp4")
    with pytest.raises(CheckpointError, match=message):
        load_and_quantize_model(empty(Net), PLAIN, folder, device_map=device)
