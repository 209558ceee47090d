"""Plans and loads as pictures."""

from dataclasses import replace

import pytest
import torch
from checkpoints import empty
from models import GPT, llama

from bigload import ConfigError, plan_device_map
from bigload.cli import main
from bigload.cli.pictures import draw_plan, load_figure, plan_figure, theme
from bigload.io.timeline import Span
from bigload.pipeline.report import LoadReport
from bigload.planning.report import with_kv_cache

GIB = 2**30


@pytest.fixture
def plan(small_parts_stream):
    budgets = {0: "1GiB", "cpu": "3GiB"}
    places = {"": 0, "transformer.h.1": "cpu", "transformer.h.3": "cpu"}
    return plan_device_map(empty(GPT, layers=6), "nf4", device_map=places, max_memory=budgets)


@pytest.mark.parametrize("dark", [False, True])
def test_each_place_has_an_axis_whose_bars_add_up_to_its_budget(plan, dark):
    plan = with_kv_cache(plan, [2**20] * 6)
    figure = plan_figure(plan, "A title", theme(dark=dark))
    assert figure.get_suptitle().startswith("A title\n")
    assert "2 of 6 blocks streamed" in figure.get_suptitle()
    assert [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes] == ["cuda", "cpu"]
    for account, axes in zip(plan.accounts, figure.axes, strict=True):
        widths = [bar.get_width() for bar in axes.patches]
        parts = [account.weights, account.quant_state, account.ring, account.reserve, account.kv_cache]
        assert widths[-1] == pytest.approx(account.free / GIB)
        assert [width for width in widths[:-1] if width] == pytest.approx([part / GIB for part in parts if part])
        assert sum(widths) == pytest.approx(account.budget / GIB)
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert [bar.get_x() for bar in axes.patches] == pytest.approx([0, *ends[:-1]])
        assert axes.get_xlim()[1] >= account.budget / GIB
        assert axes.get_facecolor() == pytest.approx(figure.get_facecolor())
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["weights", "quant state", "ring", "reserve", "KV cache", "free"]
    assert "free" in figure.axes[0].get_xlabel()


def test_what_is_missing_is_said_in_another_colour(plan):
    gpu, cpu = plan.accounts
    made = replace(plan, accounts=(replace(gpu, budget=gpu.needed - 2**20), replace(cpu, budget=None)))
    short, unknown = plan_figure(made, "", theme()).axes
    assert short.get_title(loc="left").endswith("1.00 MiB too little")
    assert "not known" in unknown.get_title(loc="left")
    assert "free" not in short.get_xlabel() + unknown.get_xlabel()


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_formats_are_named_by_the_ending(plan, tmp_path, ending):
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    draw_plan(plan, tmp_path / f"plan.{ending}", "t")
    assert (tmp_path / f"plan.{ending}").read_bytes().startswith(begins)


def test_an_svg_holds_its_words_and_is_the_same_each_time(plan, tmp_path):
    for name in ("a", "b"):
        draw_plan(plan, tmp_path / f"{name}.svg", "my model")
    text = (tmp_path / "a.svg").read_text()
    assert ">my model<" in text
    assert text == (tmp_path / "b.svg").read_text()


def test_what_cannot_be_written_is_refused(plan, tmp_path):
    for name in ("absent/plan.png", "plan.docx"):
        with pytest.raises(ConfigError, match="cannot be written"):
            draw_plan(plan, tmp_path / name)


@pytest.mark.parametrize("dark", [False, True])
def test_a_load_has_a_lane_for_each_stage_of_each_device(dark):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    spans = [("plan", cpu, 0.0, 0.5), ("read", cpu, 0.5, 1.0), ("read", gpu, 1.0, 1.25), ("read", gpu, 1.5, 2.0)]
    spans += [("copy", gpu, 1.25, 2.5), ("quantize", gpu, 1.5, 3.0), ("quantize", cpu, 1.0, 1.1)]
    peaks = {gpu: 3 * 2**30}  # which the heading has no room for
    report = LoadReport("nf4", 8 * 10**9, 4.0, {gpu: 2**31}, peaks, None, tuple(Span(*span) for span in spans))
    (axes,) = load_figure(report, "A title", theme(dark=dark)).axes
    lanes = [text.get_text() for text in axes.get_yticklabels()]
    assert lanes == [
        "plan  0.50 s",
        "read, cpu  0.50 s",
        "read, cuda:0  0.75 s",
        "copy to the GPU, cuda:0  1.25 s",
        "quantize, cuda:0  1.50 s",
        "quantize, cpu  0.10 s",
    ]
    boxes = [path.vertices[:, 0] for path in axes.collections[2].get_paths()]
    assert [(box.min(), box.max()) for box in boxes] == [(1.0, 1.25), (1.5, 2.0)]
    assert axes.get_xlim() == (0, 4)
    assert axes.get_title(loc="left") == "A title\nread 8.000 GB in 4.00 s at 2.00 GB/s into 2.00 GiB on cuda:0 as nf4"


def test_command_draws_a_load(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama(False).save_pretrained("model")
    assert not main(["load", "model", "--device-map", "cpu", "--plot", "load.svg", "--dark"])
    drawn = (tmp_path / "load.svg").read_text()
    for text in ("model", "plan", "read", "quantize", "as nf4"):
        assert text in drawn
    assert f"fill: {theme(dark=True).paper}" in drawn
    assert main(["load", "absent", "--plot", "nowhere/load.svg"])
    assert "name a file in a folder that exists" in capsys.readouterr().err


def test_command_draws_for_light_and_dark_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    llama(False).config.save_pretrained("model")
    for options, paper in ([], theme().paper), (["--dark"], theme(dark=True).paper):
        assert not main(["plan", "model", "--max-memory", "cpu=1GiB", "--plot", "plan.svg", *options])
        assert f"fill: {paper}" in (tmp_path / "plan.svg").read_text()
        assert ">model<" in (tmp_path / "plan.svg").read_text()
