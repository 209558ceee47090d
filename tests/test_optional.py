"""A library that is not there is named, with what to install, by every call that needs it and by no other."""

import subprocess
import sys

import pytest
from checkpoints import save_checkpoint
from models import GPT, llama
from torch import nn

from bigload import dequantize_model, load_and_quantize_model, save_quantized_model
from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.cli import main
from bigload.errors import MissingDependencyError, import_optional
from bigload.model.described import empty_model
from bigload.quantization import bnb


@pytest.fixture
def without(monkeypatch):
    """Make a library look as if it were not installed."""

    def hide(name):
        bnb.library.cache_clear()
        monkeypatch.setitem(sys.modules, name, None)

    yield hide
    bnb.library.cache_clear()


def test_library_that_is_there_is_given():
    assert import_optional("json.decoder", "").__name__ == "json.decoder"


def test_library_that_is_not_there_is_named_with_the_remedy_and_the_cause():
    with pytest.raises(MissingDependencyError, match=r"no_such_library.*: pip install no-such-library$") as caught:
        import_optional("no_such_library", "pip install no-such-library")
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_library_that_is_there_but_broken_says_what_it_said(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text("raise ImportError('libnative.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"broken_library.*libnative\.so: undefined symbol"):
        import_optional("broken_library", "pip install broken-library")


def test_load_without_bitsandbytes_says_what_to_install_and_leaves_the_model(without, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    save_checkpoint(model, tmp_path)
    before = model[0].weight
    without("bitsandbytes")
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert model[0].weight is before


def test_model_of_diffusers_without_it_says_what_to_install(without, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0"}')
    without("diffusers")
    with pytest.raises(MissingDependencyError, match="pip install diffusers"):
        empty_model(config)


def test_hub_id_without_huggingface_hub_says_what_to_install(without, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without("huggingface_hub")
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        open_checkpoint("org/name")


def test_local_checkpoint_needs_neither_huggingface_hub_nor_transformers(without, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    save_checkpoint(model, tmp_path)
    for name in ("huggingface_hub", "transformers"):
        without(name)
    assert load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu").is_loaded_in_4bit


@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
@pytest.mark.parametrize("build", [GPT, llama])
def test_no_call_needs_accelerate(without, tmp_path, build, mode):
    """transformers needs it for `from_pretrained` of a quantized folder and for Trainer, PEFT for all it does."""
    model = build()  # transformers imports accelerate for its own classes, if it was there as transformers came
    without("accelerate")
    model = load_and_quantize_model(model, mode, device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(build(), None, tmp_path / "saved", device_map="cpu")
    dequantize_model(again)


def test_command_line_without_transformers_is_one_message_and_status_1(without, tmp_path, capsys):
    llama(False).save_pretrained(tmp_path)
    without("transformers")
    assert main(["load", str(tmp_path), "--device-map", "cpu"]) == 1
    assert "pip install transformers" in capsys.readouterr().err


def test_bigload_does_not_import_lightning_and_says_what_to_install_where_it_is_missing():
    hidden = "import sys; sys.modules['lightning'] = None; import bigload.loading, bigload.cli"
    code = f"{hidden}; assert 'torch' in sys.modules; import bigload.lightning"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingDependencyError: this needs lightning" in ran.stderr
    assert "pip install 'bigload[lightning]'" in ran.stderr
