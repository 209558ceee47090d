"""Decode steps are captured on a GPU by CUDA; on the CPU by a stand-in that records the operators."""

import pytest
from recorded_graphs import RecordedGraphs

from bigload.decoding import graphs


@pytest.fixture
def captures(device, monkeypatch):
    """Let decode steps be captured on the device; lists what captures, for each model."""
    made, on = [], graphs.graphs_on

    def graphs_on(where):
        made.append(RecordedGraphs() if where.type == "cpu" else on(where))
        return made[-1]

    monkeypatch.setattr("bigload.decoding.capture.graphs_on", graphs_on)
    return made
