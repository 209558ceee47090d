"""What the packaging and the public names promise."""

import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

import bigload

ROOT = Path(__file__).parent.parent


def test_source_archive_has_all_that_a_checkout_has_and_the_wheel_the_package_and_a_readme_that_stands_alone(tmp_path):
    parts = ["benchmarks", "bigload", "docs", "examples", "tests"]
    kept = [path for part in parts for path in (ROOT / part).rglob("*") if path.is_file()]
    kept += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".gitignore"]
    names = {str(path.relative_to(ROOT)) for path in kept if "__pycache__" not in path.parts and path.suffix != ".so"}
    for name in names:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    build = "from setuptools import build_meta as b; b.build_sdist('../made'); b.build_wheel('../made')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "copy", check=True, capture_output=True)
    (source,), (wheel,) = (tmp_path / "made").glob("*.tar.gz"), (tmp_path / "made").glob("*.whl")
    with tarfile.open(source) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    assert names <= archived
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {"bigload/io/_feed.abi3.so"} if shutil.which("gcc") else set()
    assert installed == {name for name in names if name.startswith("bigload/") and not name.endswith(".c")} | compiled
    assert "-cp310-abi3-" in wheel.name  # with the part in C, or where that could not be built
    (info,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    shown = zipfile.ZipFile(wheel).read(info).decode()
    assert "Load PyTorch models that are larger than your GPU" in shown
    assert "fine-tuning" in shown
    assert "](" not in re.sub(r"```.*?```", "", shown, flags=re.DOTALL).replace("](http", "")
    assert "<picture" not in shown
    for classifier in ("Environment :: GPU :: NVIDIA CUDA", "Typing :: Typed"):
        assert f"\nClassifier: {classifier}\n" in shown


# Names that programs import, and the arguments that they pass by position or by name.
PUBLIC = {
    "load_and_quantize_model": (
        "model bnb_quantization_config weights_location device_map no_split_module_classes max_memory offload_folder "
        "offload_state_dict offload key_mapping tied_parameters quantizable initialize_missing strict progress mesh "
        "replicate fsdp_options adapters"
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
    "capture_decode": "model step max_graphs",
    "load_pipeline_stage": (
        "model bnb_quantization_config weights_location mesh no_split_module_classes max_memory key_mapping "
        "tied_parameters quantizable progress"
    ),
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
    "DistributedError": RuntimeError,
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
    assert needed == {"torch", "bitsandbytes", "safetensors", "psutil", "tqdm"}
