"""A plan as a table, as JSON and as a picture."""

import json

import pytest
from checkpoints import empty
from models import GPT

from bigload import plan_device_map
from bigload.planning.plan import plan_table
from bigload.planning.report import Rates, plan_json, step_seconds


def test_plan_is_written_as_a_table_and_as_json(monkeypatch):
    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 1000)
    budgets = {0: 2**28, "cpu": "1GiB"}
    plan = plan_device_map(empty(GPT, layers=6), "nf4", max_memory=budgets)
    assert "nothing is offloaded" in plan_table(plan)
    places = {f"transformer.h.{n}": "cpu" for n in (1, 3, 5)} | {"": 0}
    plan = plan_device_map(empty(GPT, layers=6), "nf4", device_map=places, max_memory=budgets)
    text = str(plan)
    assert "offloaded: 3 of 6 blocks" in text
    assert "256.00 MiB" in text
    made = json.loads(json.dumps(plan_json(plan, Rates(50, 5))))
    assert [unit["home"] for unit in made["units"] if unit["is_block"]] == ["cuda:0", "cpu"] * 3
    assert sum(unit["streamed_bytes"] for unit in made["units"]) == made["streamed_bytes"] == plan.streamed_bytes > 0
    assert made["step_s"] == step_seconds(plan, Rates(50, 5)) == pytest.approx(plan.streamed_bytes / 50e9)
    for place in made["places"]:
        assert place["needed"] == sum(place[part] for part in ("weights", "quant_state", "ring", "reserve", "kv_cache"))
        assert place["free"] == place["budget"] - place["needed"]


def test_picture_of_a_plan(tmp_path):
    pytest.importorskip("matplotlib")
    from bigload.planning.report import draw_plan

    draw_plan(plan_device_map(empty(GPT), "nf4", max_memory={0: "1GiB"}), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
