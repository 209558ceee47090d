"""Where little of a model is quantized a warning says what is left, and is silent where that was asked for."""

import functools

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import Net
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    ConfigError,
    load_and_quantize_model,
    plan_device_map,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.notation import show


class Experts(nn.Module):
    """All of them in one parameter, as transformers has them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 128))


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


def mixture():
    return Net(
        embed=nn.Embedding(5000, 64),
        blocks=nn.ModuleList(Net(fc=nn.Linear(64, 64), experts=Experts()) for _ in range(3)),
        head=nn.Linear(64, 5000),
    )


def in_bf16(elements):
    return show(elements * 2)


def test_little_is_said_with_what_is_left_and_in_which_class(device, warned):
    load_and_quantize_model(mixture().bfloat16(), "nf4", device_map=device)
    (message,) = warned()
    experts, linears = 3 * 4 * 64 * 128, 3 * 64 * 64
    assert message.startswith(
        f"nf4 was asked for, but of {in_bf16(experts + linears)} only {in_bf16(linears)} are quantized"
    )
    assert (
        f"left in bfloat16, beside embeddings and the head: {in_bf16(experts)} in 3 Experts "
        "(Experts computes its experts in a way of its own). " in message
    )


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_nothing_is_said_plainly(device, warned, mode):
    model = Net(a=Scaled(64, 64), b=Scaled(64, 128), c=nn.Conv1d(64, 8, 3), norm=nn.LayerNorm(8)).bfloat16()
    load_and_quantize_model(model, mode, device_map=device)
    (message,) = warned()
    assert message.startswith(f"{mode} was asked for, but nothing is quantized")
    assert f"{in_bf16(64 * 192)} in 2 Scaled (do not do just what nn.Linear does)" in message
    assert f"{in_bf16(64 * 8 * 3)} in 1 Conv1d (no nn.Linear)" in message
    assert message.index("Scaled") < message.index("Conv1d")


def test_largest_classes_are_named_and_the_others_counted(warned):
    kinds = [type(f"Kind{n}", (Scaled,), {}) for n in range(7)]
    model = Net(layers=nn.Sequential(*(cls(64, 64 * (n + 1)) for n, cls in enumerate(kinds))))
    load_and_quantize_model(model.bfloat16(), "nf4", device_map="cpu")
    (message,) = warned()
    assert [name for name in (cls.__name__ for cls in kinds) if name in message] == ["Kind3", "Kind4", "Kind5", "Kind6"]
    assert f"{in_bf16(64 * 64 * (1 + 2 + 3))} in others." in message


def test_class_that_holds_less_than_a_hundredth_of_the_rest_is_not_named(warned):
    class Tiny(Scaled):
        pass

    plan_device_map(Net(large=Scaled(640, 640), tiny=Tiny(8, 8), norm=nn.LayerNorm(8)), "nf4", device_map="cpu")
    (message,) = warned()
    assert "1 Scaled" in message
    assert "Tiny" not in message
    assert "others" not in message


class ReadsItsChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x):
        return x @ self.proj.weight


def tied():
    model = Net(a=nn.Linear(64, 64), b=nn.Linear(64, 64), norm=nn.LayerNorm(64))
    model.b.weight = model.a.weight
    return model


def patched():
    model = Net(a=nn.Linear(64, 64), norm=nn.LayerNorm(64))
    model.a.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Net(a=ReadsItsChild()), "1 Linear (their owner reads their weight)"),
        (tied, "1 Linear (tied)"),
        (patched, "1 Linear (changed after they were made)"),
    ],
    ids=["read", "tied", "patched"],
)
def test_linear_that_is_left_alone_is_named_with_the_reason(warned, build, reason):
    plan_device_map(build(), "nf4", device_map="cpu")
    assert len(warned()) == 1
    assert reason in warned()[0]


def test_class_that_is_named_is_left_because_its_owner_reads_it_and_not_because_of_what_it_does(warned):
    class Multiplies(ReadsItsChild):
        def __init__(self):
            super().__init__()
            self.proj = Scaled(64, 64)

    plan = plan_device_map(Net(a=Multiplies()), "nf4", device_map="cpu", quantizable=(Scaled,))
    assert "1 Scaled (their owner reads their weight)" in warned()[0]
    assert plan.read_weights == {"a.proj": "values"}


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (mixture, {"skip_modules": ["*"]}),
        (mixture, {"skip_modules": ["experts"]}),
        (mixture, {"skip_modules": ["blocks.*.experts", "head"]}),
        (mixture, {"keep_in_fp32_modules": ["experts"]}),
        (lambda: Net(embed=nn.Embedding(96, 64), head=nn.Linear(64, 96)), {}),
        (lambda: Net(a=nn.Linear(64, 64), b=Scaled(64, 64), norm=nn.LayerNorm(64)), {}),
        (lambda: nn.LayerNorm(64), {}),
    ],
    ids=["all", "named", "pattern", "fp32", "head", "half", "none"],
)
def test_nothing_is_said_where_it_was_asked_for_or_the_head_is_all_there_is(device, warned, build, fields):
    config = BnbQuantizationConfig.from_mode("nf4", **fields)
    load_and_quantize_model(build(), config, device_map=device)
    assert not warned()


def test_what_the_class_keeps_in_fp32_does_not_count(warned):
    model = Net(wo=nn.Linear(64, 256), wi=nn.Linear(64, 64), norm=nn.LayerNorm(64))
    model._keep_in_fp32_modules = ["wo"]
    plan_device_map(model, "nf4", device_map="cpu")
    assert not warned()


@pytest.mark.parametrize("remedy", ["quantizable", "skip_modules", "plain"])
def test_each_remedy_works(warned, remedy):
    class Tried(nn.Linear):
        def merged(self):
            return self.weight

    cls = nn.Linear if remedy == "plain" else Tried
    skip = {"skip_modules": ["a"]} if remedy == "skip_modules" else {}
    config = BnbQuantizationConfig.from_mode("nf4", **skip)
    options = {"quantizable": (Tried,)} if remedy == "quantizable" else {}
    plan_device_map(Net(a=Tried(64, 64), norm=nn.LayerNorm(64)), "nf4", device_map="cpu")
    assert len(warned()) == 1
    plan_device_map(Net(a=cls(64, 64), norm=nn.LayerNorm(64)), config, device_map="cpu", **options)
    assert len(warned()) == 1


def test_saved_model_comes_back_without_another_warning(tmp_path, device, warned):
    save_checkpoint(mixture(), tmp_path / "source")
    build = functools.partial(empty, mixture)
    quantize_checkpoint(tmp_path / "source", tmp_path / "converted", "nf4", model=build(), device=device)
    assert len(warned()) == 1
    model = load_and_quantize_model(build(), None, tmp_path / "converted", device_map=device)
    save_quantized_model(model, tmp_path / "saved")
    load_and_quantize_model(build(), None, tmp_path / "saved", device_map=device)
    assert len(warned()) == 1


def test_checkpoint_of_which_nothing_can_be_quantized_is_refused_after_what_is_left_is_said(tmp_path, device, warned):
    def build():
        return Net(a=Scaled(64, 64), norm=nn.LayerNorm(64))

    save_checkpoint(build(), tmp_path / "source")
    with pytest.raises(ConfigError, match="nothing in this Net"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "converted", "nf4", model=build(), device=device)
    assert len(warned()) == 1
    assert "1 Scaled" in warned()[0]
