"""Pipelines of diffusers with models that bigload has loaded: their images, and the ways to move and offload them."""

import functools
import json

import accelerate
import pytest
import torch
import transformers
from checkpoints import empty
from comparisons import assert_same_bits
from pipelines import BUILD, denoiser, image, pipeline

from bigload import dequantize_model, load_and_quantize_model, save_quantized_model
from bigload.cli import main
from bigload.errors import OffloadError
from bigload.quantization.layers import quantized_layers

diffusers = pytest.importorskip("diffusers")
bnb_quantizer = pytest.importorskip("diffusers.quantizers.bitsandbytes.bnb_quantizer")
MODES = ("nf4", "nf4-dq", "fp4", "int8")
FOUR_BIT = MODES[:3]
# Images are in [0, 1]. int8 on a GPU rounds activations too; the CPU multiplies by the dequantized rows.
TOLERANCE = {("cpu", "int8"): 1e-5, ("cuda", "int8"): 0.1}
BITS, ROUNDING = 0.0, 1e-3  # on a GPU, kernels for few and for many rows round in different orders


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that writes a pipeline as diffusers does, once, and returns its folder."""

    @functools.cache
    def written(kind):
        folder = tmp_path_factory.mktemp(kind)
        pipeline(kind).save_pretrained(folder)
        return folder

    return written


def loaded(folder, kind, mode, device_map, **options):
    """Load the denoiser from its folder in that of the pipeline."""
    _, name = json.loads((folder / "model_index.json").read_text())[denoiser(kind)]
    cls, inner = getattr(diffusers, name), folder / denoiser(kind)
    model = empty(cls.from_config, cls.load_config(inner))
    return load_and_quantize_model(model, mode, inner, device_map=device_map, **options)


def with_models(folder, by=None, **models):
    said = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, classes in said.items() if classes == [None, None]}
    pipe = (by or getattr(diffusers, said["_class_name"])).from_pretrained(folder, **absent, **models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(folder, mode, device, **options):
    """Return Flux with a quantized transformer, and all of it on a device."""
    model = loaded(folder, "flux", mode, options.pop("device_map", device), **options)
    return with_models(folder, transformer=model).to(device)


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", BUILD)
def test_images_are_those_of_the_dequantized_model(folder_of, kind, mode, device):
    folder, name = folder_of(kind), denoiser(kind)
    model = loaded(folder, kind, mode, device)
    assert len(quantized_layers(model)) > 10
    ours = image(with_models(folder, **{name: model}).to(device), kind)
    plain = image(with_models(folder, **{name: dequantize_model(model)}).to(device), kind)
    default = 1e-6 if device.type == "cpu" else ROUNDING
    assert difference(ours, plain) <= TOLERANCE.get((device.type, mode), default)
    assert difference(ours, image(with_models(folder).to(device), kind)) > 1e-4  # the model's share in the image


@pytest.mark.parametrize("kind", sorted({*BUILD} - {"wan"}))
def test_pipeline_takes_the_model_by_its_name(folder_of, kind):
    model = loaded(folder_of(kind), kind, "nf4", "cpu")
    pipe = with_models(folder_of(kind), diffusers.DiffusionPipeline, **{denoiser(kind): model})
    assert getattr(pipe, denoiser(kind)) is model


def test_pipeline_with_an_optional_transformer_takes_it_by_its_own_class_only(folder_of):
    """Through `DiffusionPipeline`, diffusers loads the one in the folder instead, without a word."""
    model = loaded(folder_of("wan"), "wan", "nf4", "cpu")
    assert with_models(folder_of("wan"), diffusers.DiffusionPipeline, transformer=model).transformer is not model
    assert with_models(folder_of("wan"), diffusers.WanPipeline, transformer=model).transformer is model


def test_models_of_transformers_in_it_load_from_their_folders(folder_of, device):
    folder, models = folder_of("flux"), {}
    for name in ("text_encoder", "text_encoder_2"):
        config = transformers.AutoConfig.from_pretrained(folder / name)
        model = empty(getattr(transformers, config.architectures[0]), config)
        models[name] = load_and_quantize_model(model.eval(), "nf4", folder / name, device_map=device)
        assert quantized_layers(models[name])
    ours = image(with_models(folder, **models).to(device), "flux")
    plain = image(with_models(folder, **{k: dequantize_model(v) for k, v in models.items()}).to(device), "flux")
    assert difference(ours, plain) <= (1e-6 if device.type == "cpu" else ROUNDING)


@pytest.mark.parametrize("mode", MODES)
def test_pipeline_saves_and_loads_with_the_quantized_model(folder_of, tmp_path, monkeypatch, mode, device):
    model = loaded(folder_of("flux"), "flux", mode, device)
    with_models(folder_of("flux"), transformer=model).save_pretrained(tmp_path / "theirs")
    again = loaded(tmp_path / "theirs", "flux", None, device)
    assert_same_bits(again.state_dict(), model.state_dict())
    pipeline("flux").save_pretrained(tmp_path / "ours")
    save_quantized_model(model, tmp_path / "ours" / "transformer", overwrite=True)
    assert_same_bits(loaded(tmp_path / "ours", "flux", None, device).state_dict(), model.state_dict())
    if device.type == "cpu":
        _let_diffusers_load_on_the_cpu(monkeypatch)
    for folder in ("theirs", "ours"):  # without a dtype it casts what is not packed to float16
        pipe = with_models(tmp_path / folder, torch_dtype=torch.float32)
        assert_same_bits(pipe.transformer.state_dict(), model.state_dict())


def _let_diffusers_load_on_the_cpu(monkeypatch):
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})


def test_diffusers_itself_refuses_to_quantize_without_a_gpu(folder_of, tmp_path, monkeypatch):
    """All that it refuses: with this check out of the way it loads, and quantizes, on the CPU."""
    save_quantized_model(loaded(folder_of("sd3"), "sd3", "nf4", "cpu"), tmp_path / "saved")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="No GPU found"):
        diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("mode", MODES)
def test_model_offload_moves_the_whole_model_and_gives_the_same_images(folder_of, mode, device):
    pipe = flux(folder_of("flux"), mode, device)
    before = image(pipe, "flux")
    pipe.enable_model_cpu_offload(device=device)
    for _ in range(2):
        assert difference(image(pipe, "flux"), before) <= (BITS if device.type == "cpu" else ROUNDING)
        assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    pipe.remove_all_hooks()
    pipe._all_hooks = []
    assert difference(image(pipe.to(device), "flux"), before) <= (BITS if device.type == "cpu" else ROUNDING)


@pytest.mark.parametrize("mode", MODES)
def test_pipeline_moves_with_the_quantized_model_and_does_not_cast_it(folder_of, mode, device):
    pipe = flux(folder_of("flux"), mode, device)
    before, state = image(pipe, "flux"), {k: v.cpu() for k, v in pipe.transformer.state_dict().items()}
    pipe.to("cpu")
    assert_same_bits(pipe.transformer.state_dict(), state)
    pipe.to(device)
    assert difference(image(pipe, "flux"), before) <= (BITS if device.type == "cpu" else ROUNDING)
    pipe.to(torch.bfloat16)
    assert_same_bits({k: v.cpu() for k, v in pipe.transformer.state_dict().items()}, state)


# On the CPU the pipeline's own method asks for a GPU; this is what it calls for each model.
def _offload_sequentially(pipe, device):
    if device.type == "cpu":
        accelerate.cpu_offload(pipe.transformer, device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def test_sequential_offload_of_int8_gives_the_same_images(folder_of, device):
    pipe = flux(folder_of("flux"), "int8", device)
    before = image(pipe, "flux")
    _offload_sequentially(pipe, device)
    for _ in range(2):
        assert difference(image(pipe, "flux"), before) <= (BITS if device.type == "cpu" else ROUNDING)


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_sequential_offload_of_4_bit_is_refused(folder_of, tmp_path, mode, device, small_parts_stream):
    """accelerate puts the scales on meta, so that nothing has them any more."""
    pipe = flux(folder_of("flux"), mode, device)
    before = image(pipe, "flux")
    _offload_sequentially(pipe, device)
    with pytest.raises(OffloadError, match=r"load the model again.*enable_model_cpu_offload"):
        image(pipe, "flux")
    again = flux(folder_of("flux"), mode, device)  # the remedies
    again.enable_model_cpu_offload(device=device)
    assert difference(image(again, "flux"), before) <= (BITS if device.type == "cpu" else ROUNDING)
    blocks = {"": device, "transformer_blocks.0": "disk"}
    streamed = flux(folder_of("flux"), mode, device, device_map=blocks, offload_folder=tmp_path)
    assert difference(image(streamed, "flux"), before) == 0


@pytest.mark.parametrize(
    ("on", "place"),
    [("cpu", "disk"), *(pytest.param("cuda:0", place, marks=pytest.mark.cuda) for place in ("cpu", "disk"))],
)
@pytest.mark.parametrize("mode", MODES)
def test_streamed_blocks_give_the_same_images(folder_of, tmp_path, mode, on, place, small_parts_stream):
    folder, device = folder_of("flux"), torch.device(on)
    before = image(flux(folder, mode, device), "flux")
    blocks = {"": device, "transformer_blocks.0": place, "single_transformer_blocks.1": place}
    pipe = flux(folder, mode, device, device_map=blocks, offload_folder=tmp_path)
    streamed = pipe.transformer.offload
    for _ in range(2):
        assert difference(image(pipe, "flux"), before) == 0
    assert pipe.transformer.device == device
    save_quantized_model(pipe.transformer, tmp_path / "saved")
    streamed.remove()
    assert difference(image(pipe, "flux"), before) == 0


@pytest.mark.parametrize("mode", MODES)
def test_sequential_offload_of_a_streamed_model_is_refused(folder_of, tmp_path, mode, device, small_parts_stream):
    blocks = {"": device, "transformer_blocks.0": "disk"}
    pipe = flux(folder_of("flux"), mode, device, device_map=blocks, offload_folder=tmp_path)
    accelerate.cpu_offload(pipe.transformer, device)
    with pytest.raises(OffloadError, match=r"on meta since|load the model again"):
        image(pipe, "flux")


@pytest.mark.parametrize("place", [None, "disk"], ids=["resident", "streamed"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_pipeline_made_from_another_and_saved_keeps_the_model(
    folder_of, tmp_path, mode, place, device, small_parts_stream
):
    blocks = {"": device, "transformer_blocks.0": place or device}
    pipe = flux(folder_of("flux"), mode, device, device_map=blocks, offload_folder=tmp_path / "offloaded")
    before = image(pipe, "flux")
    # diffusers takes a model of exactly the class that it expects, and that of a streamed one is a subclass.
    named = {"transformer": pipe.transformer} if place else {}
    other = diffusers.FluxPipeline.from_pipe(pipe, **named)
    assert other.transformer is pipe.transformer
    assert difference(image(other, "flux"), before) == 0
    pipe.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert said["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    again = with_models(tmp_path / "saved", transformer=loaded(tmp_path / "saved", "flux", None, device)).to(device)
    assert difference(image(again, "flux"), before) == 0


@pytest.mark.parametrize("place", [None, "disk"], ids=["resident", "streamed"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_adapter_on_the_model_in_a_pipeline(folder_of, tmp_path, mode, place, device, small_parts_stream):
    peft = pytest.importorskip("peft")
    blocks = {"": device, "transformer_blocks.0": place or device}
    pipe = flux(folder_of("flux"), mode, device, device_map=blocks, offload_folder=tmp_path)
    before = image(pipe, "flux")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    assert difference(image(pipe, "flux"), before) > 1e-4
    pipe.transformer.disable_adapters()
    assert difference(image(pipe, "flux"), before) == 0


@pytest.mark.parametrize("mode", MODES)
def test_projections_are_not_fused(folder_of, mode, device):
    pipe = flux(folder_of("flux"), mode, device)
    with pytest.raises(RuntimeError, match="floating point"):
        pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "text_encoder_2"])
def test_command_line_quantizes_a_folder_of_a_pipeline(folder_of, tmp_path, name, capsys):
    assert main(["quantize", str(folder_of("flux") / name), str(tmp_path / name), "--device", "cpu"]) == 0
    assert main(["load", str(tmp_path / name), "--device-map", "cpu"]) == 0
    assert (tmp_path / name / "README.md").is_file()
    capsys.readouterr()
    assert main(["quantize", str(folder_of("flux")), str(tmp_path / "all"), "--device", "cpu"]) == 1
    assert "is a pipeline of diffusers" in capsys.readouterr().err


@pytest.mark.cuda
def test_streamed_model_is_not_moved_by_a_pipeline(folder_of, small_parts_stream):
    folder, device = folder_of("flux"), torch.device("cuda", 0)
    pipe = flux(folder, "nf4", device, device_map={"": device, "transformer_blocks.0": "cpu"})
    before = image(pipe, "flux")
    for move in (pipe.enable_model_cpu_offload, functools.partial(pipe.to, "cpu")):
        with pytest.raises(OffloadError, match=r"offload\.remove\(\) first"):
            move()
        assert difference(image(pipe.to(device), "flux"), before) == 0
    pipe.transformer.offload.remove()  # the remedy
    pipe.enable_model_cpu_offload()
    assert difference(image(pipe, "flux"), before) <= ROUNDING
