"""Models of diffusers: the dtypes that its own loader gives, and folders that either library reads from the other."""

import json
import logging
from functools import cache, partial

import pytest
import torch
from checkpoints import PLAIN, empty
from comparisons import assert_same_bits
from safetensors.torch import save_file
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    dequantize_model,
    load_and_quantize_model,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.cli import main
from bigload.quantization.layers import quantized_layers

diffusers = pytest.importorskip("diffusers")
MODES = ("nf4", "nf4-dq", "fp4", "int8")

_WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 24}
_WAN |= {"freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32}
_ANIMATE = _WAN | {"in_channels": 12, "latent_channels": 4, "image_dim": 24}
_ANIMATE |= {"motion_encoder_size": 8, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16}
_ANIMATE |= {"motion_encoder_channel_sizes": {"4": 16, "8": 16}, "face_encoder_hidden_dim": 16}
_ANIMATE |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
_COSMOS = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
_COSMOS |= {"mlp_ratio": 2, "text_embed_dim": 24, "adaln_lora_dim": 8, "max_size": (2, 8, 8)}
_KANDINSKY = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 24, "time_dim": 16}
_KANDINSKY |= {"model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6)}
_FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
_FLUX |= {"joint_attention_dim": 24, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8)}
_SD3 = {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
_SD3 |= {"joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 24, "out_channels": 4}
_PIXART = {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_attention_heads": 2}
_PIXART |= {"attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 24}
_UNET = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 24}
_UNET |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4}
_UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
MODELS = {
    "WanTransformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _ANIMATE,  # computes buffers in the dtype of the load
    "SkyReelsV2Transformer3DModel": _WAN,
    "CosmosTransformer3DModel": _COSMOS | {"extra_pos_embed_type": "learnable"},
    "Kandinsky5Transformer3DModel": _KANDINSKY,
    "FluxTransformer2DModel": _FLUX,  # a `proj_out` of its own, and one in each block
    "SD3Transformer2DModel": _SD3,
    "PixArtTransformer2DModel": _PIXART,
    "UNet2DConditionModel": _UNET,
}
# Each model in int8 and in one of the modes of 4 bit, in turn: they differ in how they store values alone.
IN_TWO_MODES = pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for number, name in enumerate(MODELS) for mode in ("int8", MODES[number % 3])]
)
# By name: to ask the classes, each process of the tests would import them.
KEEPS_FP32 = list(MODELS)[:5]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def as_on_gpu(device, monkeypatch):
    """diffusers quantizes only where there is a GPU, which on the CPU it is not asked for."""
    if device.type == "cpu":
        quantizers = pytest.importorskip("diffusers.quantizers.bitsandbytes.bnb_quantizer")
        for cls in (quantizers.BnB4BitDiffusersQuantizer, quantizers.BnB8BitDiffusersQuantizer):
            monkeypatch.setattr(cls, "validate_environment", lambda self, *given, **named: None)


def cls_of(name):
    return getattr(diffusers, name)


@cache
def random_model(name, dtype):
    """A model that is only saved, the same each time."""
    torch.manual_seed(0)
    return cls_of(name)(**MODELS[name]).to(dtype)


def saved(name, folder, dtype=torch.bfloat16):
    """Write a random model as diffusers does. Returns the folder."""
    random_model(name, dtype).save_pretrained(folder)
    return folder


def loaded(name, folder, config, device="cpu", **options):
    return load_and_quantize_model(empty(cls_of(name), **MODELS[name]), config, folder, device_map=device, **options)


def read_by_diffusers(name, folder, device, **options):
    options.setdefault("torch_dtype", torch.bfloat16)
    return cls_of(name).from_pretrained(folder, device_map={"": device}, **options)


def said_of_from_pretrained(logged):
    ours = [record.getMessage() for record in logged.records if record.name.startswith("bigload")]
    return [message for message in ours if "from_pretrained" in message]


def of_diffusers(mode, **fields):
    return BnbQuantizationConfig.from_mode(mode, bnb_4bit_compute_dtype=torch.bfloat16, **fields).to_diffusers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_tensor_has_the_dtype_and_the_values_that_diffusers_gives_it(tmp_path, name, dtype):
    saved(name, tmp_path, torch.float32)
    theirs = cls_of(name).from_pretrained(tmp_path, torch_dtype=dtype)
    assert_same_bits(loaded(name, tmp_path, PLAIN | {"torch_dtype": dtype}).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", KEEPS_FP32)
def test_what_is_compared_has_both_dtypes(tmp_path, name):
    assert cls_of(name)._keep_in_fp32_modules
    model = loaded(name, saved(name, tmp_path), PLAIN)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.bfloat16}


def test_a_model_inside_another_keeps_its_own_in_fp32(tmp_path):
    """A plain module around it, as in a pipeline of one's own."""
    name = "WanTransformer3DModel"
    wan = cls_of(name).from_pretrained(saved(name, tmp_path / "wan"), torch_dtype=torch.bfloat16)
    state = {f"inner.{key}": tensor.contiguous() for key, tensor in wan.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    outer = nn.ModuleDict({"inner": empty(cls_of(name), **MODELS[name])})
    model = load_and_quantize_model(outer, PLAIN, tmp_path / "model.safetensors", device_map="cpu")
    assert_same_bits(model.state_dict(), state)


@IN_TWO_MODES
def test_the_same_layers_are_quantized_to_the_same_bits(tmp_path, name, mode, device, as_on_gpu):
    saved(name, tmp_path)
    theirs = read_by_diffusers(name, tmp_path, device, quantization_config=of_diffusers(mode))
    ours = loaded(name, tmp_path, BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.bfloat16), device)
    assert quantized_layers(ours)
    assert quantized_layers(ours).keys() == quantized_layers(theirs).keys()
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    assert_same_bits(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [cls_of, lambda name: partial(empty, cls_of(name))], ids=["real", "empty"])
@pytest.mark.parametrize("name", KEEPS_FP32)  # of others diffusers casts every buffer, unless it quantizes
def test_buffers_that_no_checkpoint_has_are_as_diffusers_computes_them(tmp_path, name, build, dtype):
    saved(name, tmp_path, torch.float32)
    theirs = cls_of(name).from_pretrained(tmp_path, torch_dtype=dtype)
    ours = load_and_quantize_model(
        build(name)(**MODELS[name]), PLAIN | {"torch_dtype": dtype}, tmp_path, device_map="cpu"
    )
    assert_same_bits(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@IN_TWO_MODES
def test_diffusers_reads_what_its_save_pretrained_writes_of_our_model(tmp_path, name, mode, device, as_on_gpu):
    model = loaded(name, saved(name, tmp_path / "full"), BnbQuantizationConfig.from_mode(mode), device)
    model.save_pretrained(tmp_path / "saved")
    again = read_by_diffusers(name, tmp_path / "saved", device)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert {path: type(module) for path, module in again.named_modules()} == {
        path: type(module) for path, module in model.named_modules()
    }
    assert_same_bits(loaded(name, tmp_path / "saved", None, device, strict=True).state_dict(), model.state_dict())


@IN_TWO_MODES
def test_diffusers_reads_what_save_quantized_model_writes(tmp_path, name, mode, device, as_on_gpu):
    model = loaded(name, saved(name, tmp_path / "full"), BnbQuantizationConfig.from_mode(mode), device)
    save_quantized_model(model, tmp_path / "saved", "9KB" if mode == "int8" else "1GB")
    assert_same_bits(read_by_diffusers(name, tmp_path / "saved", device).state_dict(), model.state_dict())
    assert_same_bits(loaded(name, tmp_path / "saved", None, device, strict=True).state_dict(), model.state_dict())


@IN_TWO_MODES
def test_diffusers_reads_what_is_quantized_from_files_to_files(tmp_path, name, mode, device, as_on_gpu):
    config = BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.bfloat16)
    folder = saved(name, tmp_path / "full")
    model = loaded(name, folder, config, device)
    given = empty(cls_of(name), **MODELS[name])
    quantize_checkpoint(folder, tmp_path / "made", config, model=given, max_shard_size="9KB", device=device)
    assert (tmp_path / "made" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same_bits(read_by_diffusers(name, tmp_path / "made", device).state_dict(), model.state_dict())


def test_command_line_builds_the_model_from_its_config(tmp_path, name, capsys):
    folder = saved(name, tmp_path / "full")
    assert main(["quantize", str(folder), str(tmp_path / "made"), "--device", "cpu"]) == 0
    assert main(["load", str(tmp_path / "made"), "--device-map", "cpu"]) == 0
    assert main(["plan", str(folder / "config.json"), "--device-map", "cpu"]) == 0
    ours = loaded(name, tmp_path / "made", None, strict=True)
    assert_same_bits(ours.state_dict(), loaded(name, folder, "nf4").state_dict())


@pytest.mark.parametrize("fields", [{"_class_name": "NoSuchModel"}, {"num_layers": "two"}])
def test_a_config_that_diffusers_cannot_build_is_one_message(tmp_path, capsys, fields):
    folder = saved("SD3Transformer2DModel", tmp_path)
    said = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(said))
    assert main(["load", str(folder), "--device-map", "cpu"]) == 1
    assert "diffusers cannot build a model" in capsys.readouterr().err


@IN_TWO_MODES
def test_we_read_what_diffusers_has_quantized(tmp_path, name, mode, device, as_on_gpu):
    folder = saved(name, tmp_path / "full")
    theirs = read_by_diffusers(name, folder, device, quantization_config=of_diffusers(mode))
    theirs.save_pretrained(tmp_path / "saved")
    ours = loaded(name, tmp_path / "saved", None, device, strict=True)
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    model = empty(cls_of(name).from_config, cls_of(name).load_config(tmp_path / "saved"))  # which says "quantized"
    ours = load_and_quantize_model(model, None, tmp_path / "saved", device_map=device)
    ours.save_pretrained(tmp_path / "again")
    assert_same_bits(read_by_diffusers(name, tmp_path / "again", device).state_dict(), theirs.state_dict())


def test_some_layers_left_plain_stay_so_when_diffusers_reads_it(tmp_path, mode, device, as_on_gpu):
    name = "SD3Transformer2DModel"
    config = BnbQuantizationConfig.from_mode(mode, skip_modules=["attn.to_k", "proj_out", "norm1"])
    model = loaded(name, saved(name, tmp_path / "full"), config, device)
    plain = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {"transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.to_k", "proj_out"}
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(read_by_diffusers(name, tmp_path / "saved", device).state_dict(), model.state_dict())


def test_a_layer_that_diffusers_cannot_tell_from_others_is_said_once(tmp_path, logged, device, as_on_gpu):
    """Flux has a `proj_out` of its own and one in each block, and a list of names cannot mean the first alone."""
    name = "FluxTransformer2DModel"
    model = loaded(name, saved(name, tmp_path / "full"), "nf4", device)
    model.proj_out = nn.Linear(32, 4)
    with logged.at_level(logging.WARNING, "bigload"):
        save_quantized_model(model, tmp_path / "saved")
    (warning,) = said_of_from_pretrained(logged)
    assert "single_transformer_blocks.0.proj_out" in warning
    with pytest.raises(ValueError, match="proj_out"):
        read_by_diffusers(name, tmp_path / "saved", device)
    ours = loaded(name, tmp_path / "saved", None, device, strict=True)  # the remedy that it names
    assert_same_bits(ours.state_dict(), model.state_dict())


def test_nothing_is_said_of_a_model_that_diffusers_reads(tmp_path, name, logged):
    model = loaded(name, saved(name, tmp_path / "full"), "nf4")
    with logged.at_level(logging.WARNING, "bigload"):
        save_quantized_model(model, tmp_path / "saved")
    assert not said_of_from_pretrained(logged)


def test_attributes_are_those_that_diffusers_sets_and_go_with_the_quantization(tmp_path, mode, device, as_on_gpu):
    name = "SD3Transformer2DModel"
    folder = saved(name, tmp_path)
    theirs = read_by_diffusers(name, folder, device, quantization_config=of_diffusers(mode))
    given = empty(cls_of(name), **MODELS[name])
    before = given.config
    ours = load_and_quantize_model(given, mode, folder, device_map=device)
    names = ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    assert [getattr(ours, each, False) for each in names] == [getattr(theirs, each, False) for each in names]
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert ours.config.quantization_config.load_in_8bit is (mode == "int8")
    assert "quantization_config" not in before  # others may share it
    with pytest.raises(ValueError, match="Casting a quantized model"):
        ours.to(torch.float32)
    plain = dequantize_model(ours)
    assert not any(hasattr(plain, each) for each in ("is_quantized", "hf_quantizer", "quantization_method"))
    assert plain.config == before
    assert not hasattr(plain.config, "quantization_config")
    plain.to(torch.float32).save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = cls_of(name).from_pretrained(tmp_path / "plain")
    assert_same_bits(again.state_dict(), plain.state_dict())


@IN_TWO_MODES
def test_config_that_is_saved_is_that_of_diffusers_but_for_the_list_of_plain_layers(
    tmp_path, name, mode, device, as_on_gpu
):
    """Ours names every plain Linear; theirs finds them again by the class's own rule."""
    folder, fields = saved(name, tmp_path / "full"), {"bnb_4bit_compute_dtype": torch.bfloat16}
    theirs = read_by_diffusers(name, folder, device, quantization_config=of_diffusers(mode))
    ours = loaded(name, folder, BnbQuantizationConfig.from_mode(mode, torch_dtype=torch.bfloat16, **fields), device)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    save_quantized_model(ours, tmp_path / "saved")

    def said_in(folder):
        said = json.loads((tmp_path / folder / "config.json").read_text())
        fields = said["quantization_config"]
        del fields["llm_int8_skip_modules"]
        if mode == "int8":
            del fields["bnb_4bit_compute_dtype"]  # of no use there
        return {key: value for key, value in said.items() if key != "_name_or_path"}

    assert said_in("ours") == said_in("saved") == said_in("theirs")


@pytest.mark.cuda
def test_an_offloaded_model_saves_as_a_resident_one(tmp_path, mode):
    name = "SD3Transformer2DModel"
    folder = saved(name, tmp_path / "full")
    resident = loaded(name, folder, mode, "cuda")
    model = loaded(name, folder, mode, {"": "cuda", "transformer_blocks.0": "cpu"})
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(read_by_diffusers(name, tmp_path / "saved", "cuda").state_dict(), resident.state_dict())
