"""What a load reports of itself."""

import torch

from bigload.pipeline.report import LoadReport, PeakMemory


def test_report_gives_a_peak_only_where_the_load_set_a_new_one(monkeypatch):
    used = {"cpu": [(100, 500), (300, 900)], "cuda:0": [(40, 700), (90, 700)]}
    monkeypatch.setattr("bigload.pipeline.report._used_and_highest", lambda device: used[str(device)].pop(0))
    peaks = PeakMemory([torch.device("cuda", 0)])
    found = peaks.since()
    assert found == {torch.device("cpu"): 800}
    text = str(LoadReport("nf4", 10**9, 1.0, {torch.device("cpu"): 2**20}, {torch.device("cpu"): 2**21}))
    assert text.endswith("as nf4, at most 2.00 MiB on cpu on the way")
