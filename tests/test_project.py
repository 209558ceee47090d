"""What the README and the packaging promise."""

import inspect
import json
import re
import subprocess
import sys
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

import bigload

ROOT = Path(__file__).parent.parent


def test_readme_gives_the_two_commands_and_ci_runs_the_readmes():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)\n```", readme, re.DOTALL)
    assert "pip install '.[demo]' && bigload demo" in blocks
    assert "pip install '.[test]' && pytest" in blocks
    assert re.search(r"grep .*pip install .*pytest.* README\.md", (ROOT / ".ci" / "run").read_text())


def test_links_in_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 3
    for document in documents:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_figures_of_the_readme_are_those_of_the_result_file():
    from benchmarks.report import brief

    readme = (ROOT / "README.md").read_text()
    names = re.findall(r"<!-- made by: python -m benchmarks report --brief (\S+) -->", readme)
    assert len(names) == 3
    for name in names:
        assert brief(json.loads((ROOT / name).read_text())) in readme


# Names that programs import, and the arguments that they pass by position or by name.
PUBLIC = {
    "load_and_quantize_model": (
        "model bnb_quantization_config weights_location device_map no_split_module_classes max_memory offload_folder "
        "offload_state_dict offload key_mapping tied_parameters quantizable initialize_missing strict progress"
    ),
    "plan_device_map": (
        "model bnb_quantization_config weights_location device_map no_split_module_classes max_memory offload_folder "
        "offload key_mapping tied_parameters quantizable initialize_missing"
    ),
    "save_quantized_model": "model folder max_shard_size overwrite",
    "quantize_checkpoint": (
        "src dst bnb_quantization_config model max_shard_size device key_mapping tied_parameters quantizable "
        "initialize_missing overwrite progress"
    ),
    "dequantize_model": "model dtype",
    "init_empty_weights": "include_buffers",
    "release_buffers": "",
    "OffloadConfig": "execute slots pin reserve expert_cache",
    "BnbQuantizationConfig": (
        "load_in_8bit llm_int8_threshold load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant "
        "bnb_4bit_compute_dtype torch_dtype skip_modules keep_in_fp32_modules llm_int8_enable_fp32_cpu_offload "
        "llm_int8_has_fp16_weight bnb_4bit_quant_storage bnb_4bit_blocksize experts_modules"
    ),
}
ERRORS = {
    "BigloadError": Exception,
    "ConfigError": ValueError,
    "CheckpointError": RuntimeError,
    "PlacementError": ValueError,
    "QuantizationError": RuntimeError,
    "OffloadError": RuntimeError,
    "MissingDependencyError": ImportError,
}


def test_public_names_their_arguments_and_the_errors_are_these():
    assert sorted(bigload.__all__) == sorted([*PUBLIC, *ERRORS])
    assert set(bigload.__all__) <= set(dir(bigload))
    for name, arguments in PUBLIC.items():
        assert " ".join(inspect.signature(getattr(bigload, name)).parameters) == arguments, name
        assert getattr(bigload, name).__doc__, name
    for name, builtin in ERRORS.items():
        assert issubclass(getattr(bigload, name), (bigload.BigloadError, builtin))
        assert issubclass(getattr(bigload, name), builtin)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = bigload.no_such_name


def test_loading_imports_nothing_of_torchs_compiler():
    """It takes longer than all of bigload."""
    code = "import sys, torch; before = set(sys.modules); import bigload.loading; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bigload.pipeline.execute" in done.stdout.split()
    assert not {"torch._dynamo", "sympy"} & set(done.stdout.split())


def test_package_is_typed_and_versioned():
    assert (Path(bigload.__file__).parent / "py.typed").exists()
    assert metadata("bigload")["Version"] == bigload.__version__
    needed = {
        re.split(r"[>=;\[ ]", requirement)[0] for requirement in requires("bigload") if "extra" not in requirement
    }
    assert needed == {"torch", "bitsandbytes", "accelerate", "safetensors", "psutil", "tqdm"}


def test_python_blocks_of_the_readme_run_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for code in blocks:
        exec(code, names)
        assert type(names["model"].blocks[0].up).__name__ == "Linear4bit"
    assert "torch.Size([1, 3, 1000]) Linear4bit" in capsys.readouterr().out
    assert (tmp_path / "net-nf4" / "bigload.json").is_file()
