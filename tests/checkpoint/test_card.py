"""Folders that are ready for the hub: their model card, whose code runs, and the tokenizer beside the weights."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import empty, empty_like, save_checkpoint
from comparisons import assert_same_bits
from huggingface_hub import ModelCard, metadata_load
from models import Layers, llama
from transformers import LlamaForCausalLM

from bigload import load_and_quantize_model, quantize_checkpoint, save_quantized_model
from bigload.checkpoint.card import MARK
from bigload.checkpoint.folders import TOKENIZERS

_TOKENIZER = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "vocab.txt": "a\nb",
    "preprocessor_config.json": "{}",
}
_OTHERS = {"trainer_state.json": "{}", "run.log": "secret", "optimizer.pt": "x", "notes.txt": "mine"}


@pytest.fixture(params=["save", "convert"])
def write(request):
    """Both ways to write a quantized folder: of a loaded model, and from files to files."""

    def written(model, source, target, mode="nf4", **options):
        given = model if isinstance(model, Layers) or "diffusers" in type(model).__module__ else empty_like(model)
        if request.param == "convert":
            return quantize_checkpoint(source, target, mode, model=given, device="cpu", **options)
        made = load_and_quantize_model(given, mode, source, device_map="cpu")
        return save_quantized_model(made, target, **options)

    return written


def of_llama(folder, **files):
    model = llama()
    model.save_pretrained(folder)
    for name, text in files.items():
        (folder / name).write_text(text)
    return model


def code_in(card):
    return re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_card_says_how_the_model_was_quantized_and_its_code_loads_it(tmp_path, monkeypatch, write, mode, device):
    model = of_llama(tmp_path / "source")
    write(model, tmp_path / "source", tmp_path / "made", mode)
    card = ModelCard.load(tmp_path / "made" / "README.md")
    said = metadata_load(tmp_path / "made" / "README.md")
    assert (said["library_name"], said["quantization"]) == ("transformers", mode)
    assert set(said["tags"]) == {"bigload", "bitsandbytes", mode, "8-bit" if mode == "int8" else "4-bit"}
    assert "base_model" not in said  # nothing says which it is
    assert str(tmp_path) not in card.content
    assert "| layers quantized | 14 |" in card.content
    assert "| layers left plain | 1 ('lm_head') |" in card.content
    ours, theirs = code_in(card.content)
    monkeypatch.chdir(tmp_path / "made")
    expected = load_and_quantize_model(empty_like(model), None, tmp_path / "made", device_map=device).state_dict()
    for code in (ours, theirs):
        names = {}
        exec(code.replace("None, folder)", f"None, folder, device_map='{device}')"), names)
        assert_same_bits(names["model"].to(device).state_dict(), expected)


def test_card_of_a_model_of_ones_own_names_its_class(tmp_path, write):
    save_checkpoint(Layers(), tmp_path / "source")
    write(Layers(), tmp_path / "source", tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text()
    assert metadata_load(tmp_path / "made" / "README.md")["library_name"] == "bigload"
    (code,) = code_in(text)
    assert "model = Layers(...)" in code


def test_card_of_a_model_of_diffusers_loads_it(tmp_path, monkeypatch, write):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"sample_size": 8, "in_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 24, "out_channels": 4}
    model = diffusers.SD3Transformer2DModel(**sizes).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    write(model, tmp_path / "source", tmp_path / "made")
    assert metadata_load(tmp_path / "made" / "README.md")["library_name"] == "diffusers"
    ours, theirs = code_in((tmp_path / "made" / "README.md").read_text())
    monkeypatch.chdir(tmp_path / "made")
    names = {}
    exec(ours.replace("None, folder)", "None, folder, device_map='cpu')"), names)
    assert names["model"].is_loaded_in_4bit
    assert "SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)" in theirs


def test_card_does_not_name_a_library_that_cannot_read_the_folder(tmp_path, monkeypatch, write):
    monkeypatch.setattr("bigload.model.transformers_facts.is_quantized_by_transformers", lambda cls, config: False)
    write(of_llama(tmp_path / "source"), tmp_path / "source", tmp_path / "made")
    assert metadata_load(tmp_path / "made" / "README.md")["library_name"] == "bigload"
    assert "from_pretrained(folder)\n```" not in (tmp_path / "made" / "README.md").read_text()


def test_original_of_the_hub_is_the_base_and_its_licence_stays(tmp_path, write):
    source = tmp_path / "models--org--tiny.llama" / "snapshots" / ("a" * 40)
    card = "---\nlicense: apache-2.0\nlanguage: [en, de]\npipeline_tag: text-generation\nextra: x\n---\n# Tiny\n"
    model = of_llama(source, **{"README.md": card})
    write(model, source, tmp_path / "made")
    said = metadata_load(tmp_path / "made" / "README.md")
    assert (said["base_model"], said["base_model_relation"]) == ("org/tiny.llama", "quantized")
    assert (said["license"], said["language"], said["pipeline_tag"]) == ("apache-2.0", ["en", "de"], "text-generation")
    assert "extra" not in said
    assert "https://huggingface.co/org/tiny.llama" in (tmp_path / "made" / "README.md").read_text()
    again = load_and_quantize_model(empty_like(model), None, tmp_path / "made", device_map="cpu")
    save_quantized_model(again, tmp_path / "again")  # still a quantized copy of the original
    assert metadata_load(tmp_path / "again" / "README.md") == said


def test_several_originals_are_all_named(tmp_path, write):
    card = "---\nbase_model: [org/a, org/b]\nbase_model_relation: quantized\n---\n"
    write(of_llama(tmp_path / "source", **{"README.md": card}), tmp_path / "source", tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text()
    assert metadata_load(tmp_path / "made" / "README.md")["base_model"] == ["org/a", "org/b"]
    assert "\n# org/a, org/b in " in text
    assert "https://huggingface.co/org/a)" in text
    assert "https://huggingface.co/org/b)" in text


@pytest.mark.parametrize("text", ["", "no front matter", "---\n[: not yaml\n---\n", "---\n- a list\n---\n"])
def test_card_of_the_original_that_cannot_be_read_is_no_error(tmp_path, write, text):
    write(of_llama(tmp_path / "source", **{"README.md": text}), tmp_path / "source", tmp_path / "made")
    assert metadata_load(tmp_path / "made" / "README.md")["library_name"] == "transformers"


def test_card_that_its_owner_wrote_stays_and_ours_is_replaced(tmp_path, write):
    model = of_llama(tmp_path / "source", **{"README.md": "of the original"})
    made = tmp_path / "made"
    write(model, tmp_path / "source", made, "nf4")
    write(model, tmp_path / "source", made, "int8", overwrite=True)
    assert metadata_load(made / "README.md")["quantization"] == "int8"
    (made / "README.md").write_text((made / "README.md").read_text().replace(MARK, "") + "mine")
    write(model, tmp_path / "source", made, "nf4", overwrite=True)
    assert metadata_load(made / "README.md")["quantization"] == "int8"
    assert (made / "README.md").read_text().endswith("mine")


def test_tokenizer_and_processor_come_along_and_nothing_else_of_a_loaded_model(tmp_path):
    model = of_llama(tmp_path / "source", **_TOKENIZER, **_OTHERS)
    loaded = load_and_quantize_model(empty_like(model), "nf4", tmp_path / "source", device_map="cpu")
    assert loaded.load_report.source == tmp_path / "source"
    save_quantized_model(loaded, tmp_path / "made")
    found = {path.name for path in (tmp_path / "made").iterdir()}
    ours = {"README.md", "bigload.json", "config.json", "generation_config.json", "model.safetensors"}
    assert found == ours | _TOKENIZER.keys()
    (tmp_path / "made" / "tokenizer.json").write_text("mine")  # what is there already stays
    save_quantized_model(loaded, tmp_path / "made", overwrite=True)
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "mine"
    assert (tmp_path / "made" / "vocab.txt").read_text() == "a\nb"


def test_variants_of_the_original_do_not_come_along(tmp_path, write):
    model = of_llama(tmp_path / "source", **{"model.safetensors.index.fp16.json": "{}", **_TOKENIZER})
    (tmp_path / "source" / "model.fp16-00001-of-00001.safetensors").write_bytes(b"of another dtype")
    write(model, tmp_path / "source", tmp_path / "made")
    assert not [path.name for path in (tmp_path / "made").iterdir() if "fp16" in path.name]
    assert (tmp_path / "made" / "vocab.txt").exists()


def test_files_beside_a_file_that_was_named_are_not_taken(tmp_path):
    model = of_llama(tmp_path / "source", **_TOKENIZER)
    loaded = load_and_quantize_model(
        empty_like(model), "nf4", tmp_path / "source" / "model.safetensors", device_map="cpu"
    )
    assert loaded.load_report.source is None
    save_quantized_model(loaded, tmp_path / "made")
    assert not (tmp_path / "made" / "vocab.txt").exists()


def test_folder_that_is_gone_by_the_time_of_the_save_is_no_error(tmp_path):
    model = of_llama(tmp_path / "source", **_TOKENIZER)
    loaded = load_and_quantize_model(empty_like(model), "nf4", tmp_path / "source", device_map="cpu")
    (tmp_path / "source").rename(tmp_path / "moved")
    save_quantized_model(loaded, tmp_path / "made")
    assert not (tmp_path / "made" / "vocab.txt").exists()


def test_model_that_transformers_loaded_brings_its_tokenizer_too(tmp_path):
    of_llama(tmp_path / "source", **_TOKENIZER)
    model = load_and_quantize_model(LlamaForCausalLM.from_pretrained(tmp_path / "source"), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path / "made")
    assert (tmp_path / "made" / "vocab.txt").read_text() == "a\nb"


def test_a_real_tokenizer_loads_from_the_saved_folder(tmp_path):
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁a": 3}
    tokenizer = transformers.LlamaTokenizer(words, merges=[])
    model = of_llama(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    loaded = load_and_quantize_model(empty_like(model), "nf4", tmp_path / "source", device_map="cpu")
    save_quantized_model(loaded, tmp_path / "made")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert again("a")["input_ids"] == tokenizer("a")["input_ids"]


def test_files_of_every_tokenizer_of_transformers_are_known():
    names = set()
    for file in Path(transformers.__file__).parent.rglob("tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", file.read_text(), re.DOTALL):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert len(names) > 20
    assert [name for name in sorted(names) if not TOKENIZERS.fullmatch(name)] == []


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json", ".env", ".env.model", "train.py", "README.md"])
def test_other_files_are_not_taken_for_those_of_a_tokenizer(name):
    assert not TOKENIZERS.fullmatch(name)


def test_empty_model_without_a_source_has_a_card(tmp_path):
    model = load_and_quantize_model(Layers(), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path / "made")
    assert "base_model" not in metadata_load(tmp_path / "made" / "README.md")
    assert_same_bits(
        load_and_quantize_model(empty(), None, tmp_path / "made", device_map="cpu").state_dict(), model.state_dict()
    )
