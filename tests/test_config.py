"""The config: accelerate's nine fields to the letter, transformers' spelling there and back, and every refusal."""

import dataclasses
import inspect
import itertools
import json
import sys
from types import SimpleNamespace

import accelerate.utils
import pytest
import torch
import transformers

from bigload.config import BnbQuantizationConfig, as_config, warn_of_float32
from bigload.errors import ConfigError, MissingDependencyError
from bigload.notation import MODES

AccelerateConfig = accelerate.utils.BnbQuantizationConfig
TransformersConfig = transformers.BitsAndBytesConfig

NINE_FIELDS = [field.name for field in dataclasses.fields(AccelerateConfig)]

TRANSFORMERS_ARGUMENTS = [
    {"load_in_8bit": True},
    {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": ["lm_head", "h.1"]},
    {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True},
    {"load_in_4bit": True},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "float32"},
    {"load_in_4bit": True, "llm_int8_skip_modules": []},
]


def nine_fields(config):
    return {name: getattr(config, name) for name in NINE_FIELDS}


def test_first_nine_fields_have_accelerates_names_order_and_defaults():
    ours = list(inspect.signature(BnbQuantizationConfig).parameters.values())[:9]
    theirs = list(inspect.signature(AccelerateConfig).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_positional_arguments_mean_what_they_mean_to_accelerate():
    arguments = (False, 6.0, True, "nf4", True, "bf16", "fp32", ["head"], ["norm"])
    assert nine_fields(BnbQuantizationConfig(*arguments)) == nine_fields(AccelerateConfig(*arguments))


@pytest.mark.parametrize("mode", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("compute_dtype", [None, "fp32", "fp16", "bf16", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("torch_dtype", [None, "fp32", "fp16", "bf16", torch.float16, torch.bfloat16])
def test_dtypes_resolve_as_in_accelerate(mode, compute_dtype, torch_dtype):
    arguments = {mode: True, "torch_dtype": torch_dtype}
    if compute_dtype is not None:
        arguments["bnb_4bit_compute_dtype"] = compute_dtype
    assert nine_fields(BnbQuantizationConfig(**arguments)) == nine_fields(AccelerateConfig(**arguments))


@pytest.mark.parametrize(
    ("threshold", "quant_type", "double_quant", "skip"),
    list(itertools.product([6.0, 0, 3], ["nf4", "fp4"], [True, False], [None, [], ["lm_head"]])),
)
def test_other_fields_are_kept_as_in_accelerate(threshold, quant_type, double_quant, skip):
    arguments = {
        "load_in_8bit": True,
        "llm_int8_threshold": threshold,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "skip_modules": skip,
        "keep_in_fp32_modules": skip,
    }
    assert nine_fields(BnbQuantizationConfig(**arguments)) == nine_fields(AccelerateConfig(**arguments))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_in_4bit", 1),
        ("load_in_4bit", None),
        ("load_in_8bit", "yes"),
        ("llm_int8_threshold", "6.0"),
        ("llm_int8_threshold", None),
        ("bnb_4bit_quant_type", "int4"),
        ("bnb_4bit_quant_type", 4),
        ("bnb_4bit_quant_type", None),
        ("bnb_4bit_use_double_quant", 1),
        ("bnb_4bit_use_double_quant", None),
        ("bnb_4bit_compute_dtype", "fp8"),
        ("bnb_4bit_compute_dtype", 16),
        ("bnb_4bit_compute_dtype", None),
        ("torch_dtype", "int8"),
        ("torch_dtype", 16),
        ("skip_modules", "lm_head"),
        ("skip_modules", ("lm_head",)),
        ("keep_in_fp32_modules", "norm"),
        ("keep_in_fp32_modules", {"norm"}),
    ],
)
def test_what_accelerate_refuses_is_refused_by_name(name, value):
    arguments = {"load_in_4bit": True, name: value}
    with pytest.raises(ValueError, match=r"\w"):
        AccelerateConfig(**arguments)
    with pytest.raises(ConfigError, match=name):
        BnbQuantizationConfig(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llm_int8_threshold", True),
        ("llm_int8_threshold", -1.0),
        ("llm_int8_threshold", float("nan")),
        ("bnb_4bit_compute_dtype", torch.int8),
        ("torch_dtype", torch.float64),
        ("skip_modules", ["lm_head", 3]),
        ("keep_in_fp32_modules", [None]),
        ("llm_int8_enable_fp32_cpu_offload", "yes"),
        ("llm_int8_has_fp16_weight", 0),
        ("bnb_4bit_quant_storage", "int4"),
        ("bnb_4bit_quant_storage", torch.int64),
        ("bnb_4bit_quant_storage", None),
        ("bnb_4bit_blocksize", 0),
        ("bnb_4bit_blocksize", 48),
        ("bnb_4bit_blocksize", "64"),
        ("bnb_4bit_blocksize", 64.0),
        ("bnb_4bit_blocksize", True),
        ("bnb_4bit_blocksize", None),
    ],
)
def test_what_accelerate_lets_through_or_does_not_know_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        BnbQuantizationConfig(**{"load_in_4bit": True, name: value})


@pytest.mark.parametrize("chosen", [True, False])
def test_both_or_neither_mode_is_refused(chosen):
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit"):
        BnbQuantizationConfig(load_in_4bit=chosen, load_in_8bit=chosen)


def test_main_weights_in_16_bit_are_refused_for_4bit():
    with pytest.raises(ConfigError, match="llm_int8_has_fp16_weight"):
        BnbQuantizationConfig(load_in_4bit=True, llm_int8_has_fp16_weight=True)


def test_config_error_is_caught_by_code_written_for_accelerate():
    with pytest.raises(ValueError, match="load_in_4bit"):
        BnbQuantizationConfig(load_in_4bit="yes")


def test_there_are_six_modes_and_none():
    assert set(MODES) == {"nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training", "none"}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_its_own_name_and_leaves_dtypes_to_the_checkpoint(mode):
    config = BnbQuantizationConfig.from_mode(mode)
    assert config.mode == mode
    assert config.load_in_8bit == mode.startswith("int8")
    assert (config.torch_dtype, config.bnb_4bit_compute_dtype) == ("auto", "auto")


def test_from_mode_takes_the_other_fields():
    config = BnbQuantizationConfig.from_mode("nf4-dq", torch_dtype="bf16", skip_modules=["head"])
    assert (config.mode, config.torch_dtype, config.skip_modules) == ("nf4-dq", torch.bfloat16, ["head"])


@pytest.mark.parametrize("mode", ["nf8", "", "NF4", None, ["nf4"]])
def test_unknown_mode_is_refused_and_the_six_are_named(mode):
    with pytest.raises(ConfigError, match="nf4, nf4-dq, fp4, fp4-dq, int8, int8-training"):
        BnbQuantizationConfig.from_mode(mode)


@pytest.mark.parametrize("make", [BnbQuantizationConfig.from_dict, as_config])
def test_unknown_field_is_refused_by_name(make):
    with pytest.raises(ConfigError, match="load_in_3bit"):
        make({"load_in_4bit": True, "load_in_3bit": True})


def test_unknown_field_beside_a_mode_is_refused_by_name():
    with pytest.raises(ConfigError, match="blocksiez"):
        BnbQuantizationConfig.from_mode("nf4", blocksiez=64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpoint_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resolved_replaces_auto_by_the_checkpoints_dtype(mode, checkpoint_dtype):
    config = BnbQuantizationConfig.from_mode(mode)
    resolved = config.resolved(checkpoint_dtype)
    assert (resolved.torch_dtype, resolved.bnb_4bit_compute_dtype) == (checkpoint_dtype, checkpoint_dtype)
    assert resolved.mode == mode
    assert config.torch_dtype == "auto"


def test_resolved_takes_auto_compute_dtype_from_a_given_torch_dtype():
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16").resolved(torch.float16)
    assert (config.torch_dtype, config.bnb_4bit_compute_dtype) == (torch.bfloat16, torch.bfloat16)


def test_resolved_leaves_given_dtypes_alone():
    config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bf16", torch_dtype="fp16")
    assert config.resolved(torch.float32) == config


@pytest.mark.parametrize("arguments", TRANSFORMERS_ARGUMENTS, ids=str)
def test_transformers_config_comes_back_as_it_went(arguments):
    theirs = TransformersConfig(**arguments)
    ours = BnbQuantizationConfig.from_transformers(theirs)
    assert ours.to_transformers().to_dict() == theirs.to_dict()
    assert BnbQuantizationConfig.from_transformers(ours.to_transformers()) == ours


@pytest.mark.parametrize("arguments", TRANSFORMERS_ARGUMENTS, ids=str)
def test_transformers_dict_is_the_same_as_its_object(arguments):
    theirs = TransformersConfig(**arguments)
    assert as_config(theirs.to_dict()) == as_config(theirs) == BnbQuantizationConfig.from_transformers(theirs)


def test_transformers_dict_read_from_a_config_json_is_the_same_as_its_object():
    theirs = TransformersConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["head"])
    assert as_config(json.loads(json.dumps(theirs.to_dict()))) == as_config(theirs)


def test_from_transformers_sets_torch_dtype_and_leaves_it_to_the_checkpoint_by_default():
    theirs = TransformersConfig(load_in_4bit=True)
    assert BnbQuantizationConfig.from_transformers(theirs).torch_dtype == "auto"
    assert BnbQuantizationConfig.from_transformers(theirs, torch_dtype="bf16").torch_dtype is torch.bfloat16


def test_fields_that_transformers_may_get_and_have_no_effect_here_are_warned_of(logged):
    theirs = TransformersConfig(load_in_4bit=True).to_dict()
    assert not logged.records
    assert as_config({**theirs, "bnb_4bit_new": 1}) == as_config(theirs)
    assert [record.getMessage() for record in logged.records] == [
        "these fields of the transformers config have no effect: 'bnb_4bit_new'"
    ]


def test_from_transformers_takes_its_default_compute_dtype_not_accelerates():
    assert as_config(TransformersConfig(load_in_4bit=True)).bnb_4bit_compute_dtype is torch.float32
    assert as_config({"load_in_4bit": True, "quant_method": "bitsandbytes"}).bnb_4bit_compute_dtype is torch.float32


def test_from_transformers_refuses_a_config_of_no_mode():
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit"):
        as_config(TransformersConfig())


def test_to_transformers_without_transformers_names_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers"):
        BnbQuantizationConfig.from_mode("nf4").to_transformers()


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_8bit": True},
        {"load_in_8bit": True, "llm_int8_threshold": 4, "torch_dtype": "bf16"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16", "skip_modules": ["a"], "keep_in_fp32_modules": ["b"]},
    ],
)
def test_accelerates_object_and_its_dicts_all_give_the_same_config(arguments):
    theirs = AccelerateConfig(**arguments)
    expected = BnbQuantizationConfig(**arguments)
    assert BnbQuantizationConfig.from_accelerate(theirs) == expected
    assert as_config(theirs) == expected
    assert as_config(dataclasses.asdict(theirs)) == expected
    assert as_config(vars(theirs)) == expected


@pytest.mark.parametrize(
    "config",
    [
        *(BnbQuantizationConfig.from_mode(mode) for mode in MODES),
        BnbQuantizationConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype="bf16",
            torch_dtype="fp32",
            skip_modules=["a"],
            keep_in_fp32_modules=[],
            llm_int8_enable_fp32_cpu_offload=True,
            bnb_4bit_quant_storage="float64",
            bnb_4bit_blocksize=4096,
        ),
    ],
    ids=lambda config: config.mode,
)
def test_config_survives_json(config):
    assert BnbQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert as_config(config.to_dict()) == config


def given_in_every_spelling():
    names = {"skip_modules": ["a"], "keep_in_fp32_modules": ["b"]}
    return [
        BnbQuantizationConfig(load_in_4bit=True, **names),
        AccelerateConfig(load_in_4bit=True, **names),
        {"load_in_4bit": True, **names},
        TransformersConfig(load_in_4bit=True, llm_int8_skip_modules=["a"]),
        {"load_in_4bit": True, "llm_int8_skip_modules": ["a"]},
    ]


@pytest.mark.parametrize("given", given_in_every_spelling(), ids=lambda given: type(given).__module__)
def test_as_config_shares_no_list_with_the_callers_object(given):
    fields = given if isinstance(given, dict) else vars(given)
    before = {name: list(value) if isinstance(value, list) else value for name, value in fields.items()}
    config = as_config(given)
    assert config is not given
    config.skip_modules.append("ours")
    if config.keep_in_fp32_modules is not None:
        config.keep_in_fp32_modules.append("ours")
    assert fields == before


def test_as_config_checks_an_object_that_was_changed_after_it_was_made():
    config = BnbQuantizationConfig(load_in_4bit=True)
    config.bnb_4bit_quant_type = "int4"
    with pytest.raises(ConfigError, match="bnb_4bit_quant_type"):
        as_config(config)


def test_as_config_takes_a_mode_by_name():
    assert as_config("nf4-dq") == BnbQuantizationConfig.from_mode("nf4-dq")


@pytest.mark.parametrize("given", [None, 4, ["nf4"], object(), SimpleNamespace(load_in_4bit=True), "nf3"])
def test_as_config_refuses_what_is_no_config_and_names_the_modes(given):
    with pytest.raises(ConfigError, match="nf4-dq"):
        as_config(given)


def test_as_config_names_the_argument_that_is_none():
    with pytest.raises(ConfigError, match="bnb_quantization_config is None"):
        as_config(None)


@pytest.mark.parametrize("given", [{}, {"load_in_4bit": True, "load_in_8bit": True}])
def test_as_config_refuses_a_dict_of_both_or_neither_mode(given):
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit"):
        as_config(given)


@pytest.mark.parametrize("form", ["object", "dict"])
def test_float32_that_transformers_chooses_is_warned_of_once(monkeypatch, warned, form):
    warn_of_float32.cache_clear()
    given = TransformersConfig(load_in_4bit=True)
    given = given if form == "object" else given.to_dict()
    for _ in range(2):
        assert as_config(given).bnb_4bit_compute_dtype == torch.float32
    (warning,) = warned()
    assert "4-bit layers will compute in float32, the default of BitsAndBytesConfig" in warning


def test_what_the_warning_of_float32_names_is_not_warned_of(monkeypatch, warned):
    warn_of_float32.cache_clear()
    remedies = [
        TransformersConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        "nf4",
        BnbQuantizationConfig(bnb_4bit_compute_dtype="fp32", load_in_4bit=True),
        TransformersConfig(load_in_8bit=True),
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    ]
    for remedy in remedies:
        as_config(remedy)
    assert not warned()


@pytest.mark.parametrize(("word", "mode"), [("int4", "nf4"), ("4-bit", "nf4"), ("8bit", "int8"), ("BF16", "none")])
def test_a_mode_by_another_librarys_name_is_told_and_works(word, mode):
    with pytest.raises(ConfigError, match=f"did you mean '{mode}'"):
        BnbQuantizationConfig.from_mode(word)
    assert BnbQuantizationConfig.from_mode(mode).mode == mode
