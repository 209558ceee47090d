"""A plan as a table, as JSON and as a picture."""

import json
from functools import partial

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import GPT

from bigload import OffloadConfig, load_and_quantize_model, plan_device_map
from bigload.planning.plan import plan_table
from bigload.planning.report import Rates, plan_json, step_seconds, verdict, with_kv_cache


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


def on(places, **options):
    return plan_device_map(empty(GPT, layers=6), "nf4", device_map={"": 0} | places, **options)


def test_what_is_on_the_disk_comes_at_the_speed_of_the_disk(small_parts_stream, tmp_path):
    block = on({"transformer.h.1": "cpu"}).streamed_bytes
    rates = Rates(link=50, disk=2)
    for host, disk in ((2, 0), (0, 3), (2, 3)):
        places = {f"transformer.h.{n}": "cpu" for n in range(host)}
        places |= {f"transformer.h.{n + 2}": "disk" for n in range(disk)}
        plan = on(places, offload_folder=tmp_path)
        assert step_seconds(plan, rates) == pytest.approx(host * block / 50e9 + disk * block / 2e9)
        assert ("of it from the disk" in str(plan)) == (disk > 0)
    # A disk that is faster than the link is no faster behind it.
    assert step_seconds(plan, Rates(link=1, disk=2)) == pytest.approx(5 * block / 1e9)


def test_gpus_share_the_disk_but_not_their_links(small_parts_stream, tmp_path):
    away = {f"transformer.h.{n}": "disk" for n in range(6)}
    plan = plan_device_map(
        empty(GPT, layers=6), "nf4", device_map={"": 0, "lm_head": 1} | away, offload_folder=tmp_path
    )
    assert {placed.device.index for placed in plan.offloaded} == {0, 1}
    assert step_seconds(plan, Rates(link=50, disk=2)) == pytest.approx(plan.streamed_bytes / 2e9)
    assert step_seconds(plan, Rates(link=1, disk=100)) == pytest.approx(plan.streamed_bytes / 2 / 1e9)


def test_what_the_cpu_computes_from_the_disk_waits_for_no_link(small_parts_stream, tmp_path):
    plan = plan_device_map(
        empty(GPT, layers=4), "nf4", device_map={"": "cpu", "transformer.h.1": "disk"}, offload_folder=tmp_path
    )
    assert plan.streamed_bytes
    assert step_seconds(plan, Rates(link=1e-3, disk=2)) == pytest.approx(plan.streamed_bytes / 2e9)


def test_verdict_says_what_fits_and_what_it_does_not_know(small_parts_stream):
    build = partial(plan_device_map, empty(GPT, layers=6), device_map="auto", offload=OffloadConfig(reserve=0))
    rates = Rates(50, 5)
    assert verdict(build("nf4", max_memory={0: "1GiB"}), rates).startswith("In nf4 the model fits: it needs ")
    assert verdict(build("none", max_memory={0: "1GiB"}), rates).startswith("Not quantized, the model fits: it needs ")
    assert "may fit, as what is free is not known: it needs" in verdict(on({}), rates)
    said = verdict(on({"transformer.h.1": "cpu", "transformer.h.3": "cpu"}), rates, " (as told)", 4)
    assert "if 2 of 6 blocks are streamed" in said
    assert "(as told)" in said
    seconds = step_seconds(on({"transformer.h.1": "cpu", "transformer.h.3": "cpu"}), rates)
    assert f"at most {4 / seconds:.0f} tokens a second" in said
    plan = build("nf4", max_memory={0: 145 * 2**20})
    said = verdict(with_kv_cache(plan, [2**20] * 6, 0), rates)
    assert ("does not fit" in said) == (plan.accounts[0].free < 6 * 2**20)


def test_cache_is_where_the_blocks_are_computed(small_parts_stream):
    places = {f"transformer.h.{n}": n % 2 for n in range(6)} | {"transformer.h.3": "cpu"}
    plan = with_kv_cache(on(places), [1, 10, 100, 1000, 10_000, 100_000], 7)
    cached = {str(account.place): account.kv_cache for account in plan.accounts}
    by_device = {}
    for number, placed in enumerate(p for p in plan.units if p.unit.is_block):
        by_device[str(placed.device)] = by_device.get(str(placed.device), 0) + 10**number
    assert cached == {"cpu": 0} | by_device
    assert "KV cache" in str(plan)
    assert "KV cache" not in str(on(places))


def test_equal_blocks_share_a_row_unless_each_is_asked_for(small_parts_stream):
    plan = on({f"transformer.h.{n}": "cpu" for n in (1, 3, 5)})
    rows = [line.split() for line in str(plan).splitlines()]
    assert ["transformer.h.0", "to", "4", "3"] in [row[:4] for row in rows]
    assert ["transformer.h.1", "to", "5", "3"] in [row[:4] for row in rows]
    single = plan_table(plan, every_unit=True)
    assert all(f"transformer.h.{n} " in single for n in range(6))


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_table_fits_a_width(small_parts_stream, width):
    plan = on({f"transformer.h.{n}": "cpu" for n in (1, 3, 5)}, max_memory={0: "1GiB", 1: "2GiB", "cpu": "3GiB"})
    lines = plan_table(plan, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "streamed for each forward" in " ".join(lines)


def test_plan_shows_itself_in_a_line_and_in_notebooks_as_its_table(small_parts_stream):
    plan = plan_device_map(empty(GPT, layers=24), "nf4", device_map={"": 0, "transformer.h.1": "cpu"})
    assert repr(plan).startswith("Plan(nf4: ")
    assert len(repr(plan)) < 200
    assert all(len(repr(one)) < 300 for one in (*plan.units, *plan.accounts))
    assert "streamed" in repr(plan)
    html = plan._repr_html_()
    assert html.count("<table>") == 2
    assert "transformer.h.0 to 23" in html
    assert "offloaded: 1 of 24 blocks" in html


def test_report_of_a_load_shows_itself(tmp_path):
    folder = save_checkpoint(GPT(), tmp_path)
    model = load_and_quantize_model(empty(GPT), "nf4", folder, device_map="cpu")
    report = model.load_report
    assert repr(report) == f"LoadReport({report})"
    assert "<td" in report._repr_html_()
    plain = load_and_quantize_model(empty(GPT), "none", folder, device_map="cpu").load_report
    assert plain.mode == "none"
    assert " as " not in str(plain)
    assert torch.device("cpu") in plain.device_bytes
