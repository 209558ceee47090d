"""What a load reports of itself."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT

from bigload import load_and_quantize_model
from bigload.io.timeline import Span, Timeline
from bigload.pipeline import report
from bigload.pipeline.report import LoadReport, PeakMemory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def measured(monkeypatch):
    """Return a function that says what will be measured: device -> (used, highest), each time."""

    def measure(**used):
        answers = {CPU if name == "cpu" else GPU: list(values) for name, values in used.items()}
        monkeypatch.setattr("bigload.pipeline.report._used_and_highest", lambda device: answers[device].pop(0))
        monkeypatch.setattr("bigload.pipeline.report._highest", lambda device: answers[device].pop(0)[1])

    return measure


@pytest.mark.parametrize("mode", ["nf4", "int8", "none"])
def test_report_has_the_times_of_all_stages(tmp_path, device, mode, monkeypatch):
    monkeypatch.setattr("bigload.io.timeline._SHORTEST_S", -1.0)  # what is read ahead need not be waited for
    folder = save_checkpoint(GPT(layers=4), tmp_path)
    report = load_and_quantize_model(empty(GPT, layers=4), mode, folder, device_map={"": device}).load_report
    stages = {span.stage for span in report.timeline}
    expected = {"plan", "read"} | ({"copy"} if device.type == "cuda" else set())
    assert stages - {"quantize"} == expected
    assert ("quantize" in stages) == (mode != "none")
    for stage in stages:
        spans = [span for span in report.timeline if span.stage == stage]
        assert all(0 <= span.begin_s <= span.end_s <= report.elapsed_s + 1 for span in spans)
        assert all(one.end_s <= other.begin_s + 1e-3 for one, other in itertools.pairwise(spans))
        assert report.stage_s[stage] == pytest.approx(sum(span.end_s - span.begin_s for span in spans))
    assert list(report.stage_s) == [stage for stage in ("plan", "read", "copy", "quantize") if stage in stages]
    assert "<td" in report._repr_html_()
    assert all(stage in report._repr_html_() for stage in stages)
    assert "Span" not in repr(report)


def test_spans_are_computed_when_they_are_first_asked_for_or_the_report_is_copied():
    asked = []

    def spans():
        asked.append(1)
        return (Span("plan", CPU, 0.0, 0.25),)

    report = LoadReport("nf4", 10**9, 1.0, timeline=spans)
    assert "nf4" in str(report)
    assert report == LoadReport("nf4", 10**9, 1.0)
    assert not asked
    assert pickle.loads(pickle.dumps(report)).timeline == copy.deepcopy(report).timeline == spans()
    assert report.stage_s == {"plan": 0.25}
    assert len(asked) == 2  # once by us
    assert LoadReport("nf4", 10**9, 1.0).timeline == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.timeline = ()


def test_a_load_asks_for_no_times_and_its_report_for_all(tmp_path, device, monkeypatch):
    asked = []
    spans = Timeline.spans
    monkeypatch.setattr(Timeline, "spans", lambda self: asked.append(1) or spans(self))
    folder = save_checkpoint(GPT(layers=4), tmp_path)
    model = load_and_quantize_model(empty(GPT, layers=4), "nf4", folder, device_map={"": device})
    str(model.load_report)
    assert not asked
    copied = copy.deepcopy(model)
    assert copied.load_report.timeline == model.load_report.timeline != ()
    assert len(asked) == 1


def test_report_gives_a_peak_only_where_the_load_set_a_new_one(measured):
    measured(cpu=[(100, 500), (300, 900)], gpu=[(40, 700), (90, 700)])
    assert PeakMemory({GPU: 50}, {}).since() == {CPU: 800}
    text = str(LoadReport("nf4", 10**9, 1.0, {CPU: 2**20}, {CPU: 2**21}))
    assert text.endswith("as nf4, peak 2.00 MiB on cpu")


def test_what_the_model_held_before_counts_as_the_loads(measured):
    measured(cpu=[(600, 700), (650, 720)])
    assert PeakMemory({CPU: 400}, {CPU: 450}).since() == {CPU: 570}


def test_a_peak_below_the_models_own_size_is_no_peak(measured):
    measured(cpu=[(600, 700), (650, 720)], gpu=[(100, 200), (400, 450)])
    assert PeakMemory({CPU: 400, GPU: 300}, {}).since() == {GPU: 350}


def test_memory_of_a_gpu_is_what_torch_allocated_there(monkeypatch):
    stats = {"allocated_bytes": {"all": {"current": 300, "peak": 500}}}
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: asked.append(device) or stats)
    before = PeakMemory({GPU: 100}, {GPU: 50})
    stats = {"allocated_bytes": {"all": {"current": 450, "peak": 900}}}
    assert before.since()[GPU] == 900 - (300 - 50)
    stats = {}  # of a GPU on which nothing was allocated yet
    assert GPU not in PeakMemory({GPU: 100}, {}).since()
    assert set(asked) == {GPU}


def test_what_the_system_does_not_tell_is_left_out(monkeypatch):
    def refused():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("bigload.pipeline.report.psutil.Process", refused)
    assert PeakMemory({CPU: 1}, {}).since() == {}


def test_an_older_c_library_does_not_tell_what_it_keeps(monkeypatch):
    monkeypatch.setattr(report, "_mallinfo", report._mallinfo.__wrapped__)
    assert report._freed_but_kept() >= 0
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert report._freed_but_kept() == 0


# Small tensors are allocated on the heap, where what was freed is taken again without a new page of the system.
REUSED = """
import sys, torch
from torch import nn
from bigload import load_and_quantize_model
plain = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}
build = lambda: nn.Sequential(*[nn.Linear(128, 128) for _ in range(1000)])
load_and_quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "nf4", device_map="cpu")  # imports
freed = [torch.ones(128, 128) for _ in range(700)]
last = freed[-1]  # keeps the heap from shrinking
freed.clear()
with torch.device("meta"):
    model = build()
report = load_and_quantize_model(model, plain, sys.argv[1], device_map="cpu").load_report
for peak in report.peak_bytes.values():
    assert peak >= report.nbytes, (peak, report.nbytes)
assert report.peak_bytes or sys.platform != "linux", "not known"
"""


def test_memory_that_was_freed_before_the_load_is_counted_when_it_is_used_again(tmp_path, programs):
    folder = save_checkpoint(torch.nn.Sequential(*[torch.nn.Linear(128, 128) for _ in range(1000)]), tmp_path)
    programs.run(f"import sys; sys.argv[1:] = [{str(folder)!r}]\n{REUSED}", tmp_path)


def test_a_model_that_is_quantized_where_it_is_holds_itself(device):
    plain = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}
    report = load_and_quantize_model(GPT(width=256).to(device), plain, device_map=device).load_report
    assert all(peak >= report.device_bytes.get(place, 0) for place, peak in report.peak_bytes.items())


def test_error_of_a_load_shows_a_path_as_it_was_written(tmp_path):
    with pytest.raises(Exception, match="no such") as caught:
        load_and_quantize_model(empty(GPT), "nf4", tmp_path / "none", device_map="cpu")
    assert "Path(" not in str(caught.value)
    assert f"(loading '{tmp_path / 'none'}' with" in str(caught.value)
