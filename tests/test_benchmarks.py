"""The benchmark suite: small checkpoints on the CPU, and results made by hand."""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import stored
from safetensors import safe_open

import bigload
import bigload.checkpoint.describe

ROOT = Path(__file__).parent.parent
IN_FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return made("tiny", tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return made("many-50", tmp_path_factory.mktemp("checkpoints") / "many")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Time less than a figure needs that is to be trusted: none is looked at here, but that it is there."""
    monkeypatch.setattr("benchmarks.limits._SHAPE", (256, 256))
    monkeypatch.setattr("benchmarks.limits._QUANTIZING_S", 0.0)
    monkeypatch.setattr("benchmarks.experts._CALLS_S", 0.0)


def made(size, folder, *options):
    run("make", size, folder, *options)
    return folder


def run(*arguments):
    from benchmarks.__main__ import main

    main([str(argument) for argument in arguments])


def job(folder, **options):
    from benchmarks.load import Job

    return Job(folder, "cpu", **{"limits": False, "commit": "abc", **options})


# make


@pytest.mark.parametrize("name", ["tiny", "many"])
def test_checkpoint_fits_the_empty_model_that_its_folder_builds(name, request):
    from benchmarks.checkpoints import build

    folder = request.getfixturevalue(name)
    model = build(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = stored(folder)
    assert {key: tensor.shape for key, tensor in found.items()} == expected
    assert all(tensor.dtype == torch.bfloat16 and tensor.float().std() > 0.01 for tensor in found.values())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == expected.keys()
    for file in sorted(set(index.values())):
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {key for key in index if index[key] == file}


def test_many_is_that_many_tensors_of_four_kilobytes(many):
    assert [tensor.nbytes for tensor in stored(many).values()] == [4096] * 50


def test_shards_are_as_many_as_asked_and_of_like_size(tmp_path):
    folder = made("many-50", tmp_path / "many", "--shards", 3)
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) < 1.2 * min(sizes)


def test_experts_of_a_mixture_are_stored_each_for_itself_and_load(tmp_path):
    from benchmarks.checkpoints import build

    folder = made("tiny-moe", tmp_path / "moe")
    keys = list(stored(folder))
    one = [key for key in keys if ".layers.1.mlp.experts.7." in key]
    assert [key.rpartition("experts.7.")[2] for key in one] == [
        f"{name}_proj.weight" for name in ("down", "gate", "up")
    ]
    model = bigload.load_and_quantize_model(build(folder), "nf4", folder, device_map="cpu")
    assert model.model.layers[1].mlp.experts.gate_up_proj.quant_state.shape == (8, 128, 256)


def test_unknown_size_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no size is called 'many-x'; there are tiny, 1b, .* many-N"):
        run("make", "many-x", tmp_path / "x")


def test_quantized_checkpoint_has_bitsandbytes_names_and_says_what_was_kept(tiny, tmp_path):
    folder = made("tiny", tmp_path / "nf4", "--quant", "nf4-dq", "--source", tiny)
    found = stored(folder)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert {name.removeprefix(layer) for name in found if name.startswith(layer)} == {
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    }
    assert found["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_quantized_checkpoint_makes_its_source_beside_it_and_never_over_it(tmp_path):
    folder = made("many-10", tmp_path / "int8", "--quant", "int8")
    assert len(stored(tmp_path / "many-10")) == 10
    assert {name.rpartition(".")[2] for name in stored(folder)} == {"weight", "SCB", "weight_format"}
    with pytest.raises(SystemExit, match="name another folder"):
        run("make", "many-10", tmp_path / "many-10", "--quant", "int8")


@pytest.mark.parametrize(
    ("size", "form", "kind", "method"),
    [
        ("tiny", "fp8", "fp8 by blocks of 128 x 128: 28 tensors", "fp8"),
        ("tiny-moe", "fp8", "fp8 by blocks of 128 x 128: 56 tensors", "fp8"),
        ("many-20", "fp8", "fp8 by blocks of 128 x 128: 20 tensors", "fp8"),
        ("tiny-gpt-oss", "mxfp4", "mxfp4, blocks of 32: 4 tensors", "mxfp4"),
    ],
)
def test_checkpoint_of_small_numbers_is_as_publishers_make_it_and_loads(tmp_path, size, form, kind, method):
    from benchmarks.checkpoints import build

    folder = made(size, tmp_path / "made", "--format", form)
    assert kind in bigload.checkpoint.describe.describe_checkpoint(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == method
    config = bigload.BnbQuantizationConfig(load_in_4bit=True, skip_modules=["*"], torch_dtype="bf16")
    model = bigload.load_and_quantize_model(build(folder), config, folder, device_map="cpu")
    for tensor in model.state_dict().values():
        assert 0.002 < tensor.float().std() < 0.3  # as of usual weights, and of any layer that is quantized


@pytest.mark.parametrize(("size", "form"), [("tiny", "mxfp4"), ("tiny-gpt-oss", "fp8")])
def test_format_that_a_size_does_not_have_is_named(tmp_path, size, form):
    with pytest.raises(SystemExit, match=f"'{size}' is not made in {form}: tiny-gpt-oss, gpt-oss-20b are made in mx"):
        run("make", size, tmp_path / "made", "--format", form)


# experts


def test_experts_are_timed_in_each_way_forward_and_backward(tmp_path):
    from benchmarks.experts import WAYS
    from bigload.quantization.expert_linears import expert_limits

    before = dataclasses.replace(expert_limits)
    out = tmp_path / "experts.json"
    shapes = ("tiny", "tiny-gpt-oss")
    run("experts", "--device", "cpu", "--shapes", *shapes, "--tokens", 1, 16, "--out", out, "--commit", "abc")
    found = json.loads(out.read_text())
    assert found["commit"] == "abc"
    assert found["left_out"] == []
    assert {(row["shape"], row["tokens"]) for row in found["rows"]} == {
        (shape, tokens) for shape in shapes for tokens in (1, 16)
    }
    measured = {(way.peer, way.way) for way in WAYS if way.suits(1, 0) or way.suits(16, 0)}
    assert {(row["peer"], row["way"]) for row in found["rows"]} == measured
    assert {row["way"] for row in found["rows"] if row["backward"]} == {"grouped_mm", "as it chooses"}
    for row in found["rows"]:
        assert row["ms"] > 0
        assert row["weights_gib"] > 0
        assert row.get("relative_error", 0) < 0.02
    assert expert_limits == before


def test_offloaded_experts_are_timed_with_each_cache_and_equal_the_resident_ones(tmp_path, capsys):
    out = tmp_path / "experts.json"
    shapes = ("tiny", "tiny-gpt-oss")
    run("experts", "--offload", "--alone", "--device", "cpu", "--shapes", *shapes, "--tokens", 1, 300, "--out", out)
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    ways = ["resident", "10% cached", "25% cached", "50% cached", "whole modules"]
    assert {(row["shape"], row["way"]) for row in found["rows"]} == {(s, way) for s in shapes for way in ways}
    assert {(row["tokens"], row["skew"]) for row in found["rows"]} == {(1, 0.6), (1, 1.0), (300, 0.6)}
    for row in found["rows"]:
        assert row["is_equal"]
        assert row["tokens_per_s"] > 0
        assert (row.get("hit_rate") is not None) == ("cached" in row["way"] and row["tokens"] == 1)
    run("report", out)
    lines = capsys.readouterr().out.splitlines()
    assert "| tiny, tokens/s | GPU GiB | 1 tokens, skew 0.6 | 1 tokens, skew 1 | 300 tokens, skew 0.6 |" in lines
    assert sum(line.startswith("| 25% cached | 0 |") for line in lines) == 2


def test_whole_models_with_offloaded_experts_compute_what_resident_ones_do(tmp_path, capsys, small_parts_stream):
    out = tmp_path / "models.json"
    run("experts", "--offload", "--device", "cpu", "--shapes", "tiny-gpt-oss", "--tokens", 1, "--out", out)
    found = json.loads(out.read_text())
    rows = {row["way"]: row for row in found["models"]}
    assert list(rows) == [
        "resident",
        "whole blocks",
        "10% cached",
        "25% cached",
        "50% cached",
        "25% cached, on disk",
    ]
    assert found["rows"]
    assert found["left_out"] == []
    for way, row in rows.items():
        assert row["is_equal"]
        assert row["is_prompt_equal"]
        assert row["tokens_per_s"] > 0
        assert row["prompt_s"] > 0
        assert row.get("is_flat", True)
        assert (row.get("mib_per_token", 0) > 0) == (way != "resident" and row["hit_rate"] != 1)
    assert rows["25% cached"]["hit_rate"] < rows["50% cached"]["hit_rate"] <= 1
    assert rows["25% cached"]["are_losses_equal"]
    assert len(set(rows["25% cached"]["losses"])) == 3
    assert rows["resident"]["beside_ms"] > 0
    assert [way for way, row in rows.items() if "captured_tokens_per_s" in row] == [
        "resident",
        "10% cached",
        "25% cached",
        "50% cached",
    ]
    assert all(row["captured_tokens_per_s"] > 0 for row in rows.values() if row.get("is_captured_equal"))
    assert not any(row.get("is_captured_equal") is False for row in rows.values())
    run("report", out)
    said = capsys.readouterr().out
    assert "| tiny-gpt-oss, 3 layers, " in said
    run("report", "--brief", out)
    brief = capsys.readouterr().out.splitlines()
    assert brief[0].startswith("| tiny-gpt-oss, 3 layers, ")
    assert [line.split(" | ")[0] for line in brief[2:]] == [f"| {way}" for way in rows]
    assert "NOT EQUAL" not in said
    assert "GROWS" not in said


def test_experts_that_there_is_no_time_for_are_named(tmp_path):
    out = tmp_path / "experts.json"
    run("experts", "--device", "cpu", "--shapes", "tiny", "--tokens", 1, "--seconds", 0, "--out", out)
    found = json.loads(out.read_text())
    assert found["rows"] == []
    assert {row["peer"] for row in found["left_out"]} == {"transformers bf16", "bitsandbytes nf4", "bigload nf4"}


def test_a_table_of_experts_compares_with_the_best_in_16_bit(tmp_path, capsys):
    rows = [
        {"tokens": 1, "peer": "transformers bf16", "way": "eager", "ms": 4.0},
        {"tokens": 1, "peer": "transformers bf16", "way": "batched_mm", "ms": 2.0},
        {"tokens": 1, "peer": "bigload nf4", "way": "gemv", "ms": 1.0, "graph_ms": 0.5},
        {"tokens": 16, "peer": "bigload nf4", "way": "gemv", "ms": 3.0},
    ]
    rows = [{"shape": "A", "backward": False, **row} for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(result(benchmark="experts", limits=None, rows=rows)))
    run("report", tmp_path / "a.json")
    lines = capsys.readouterr().out.splitlines()
    assert "| A | transformers bf16, eager | 4 (2.00x) | - |" in lines
    assert "| A | bigload nf4, gemv | 1, graph 0.5 (0.50x) | 3 |" in lines


# limits


def test_limits_of_a_cpu(many, tmp_path):
    run("limits", many, "--device", "cpu", "--cold", "--out", tmp_path / "limits.json")
    result = json.loads((tmp_path / "limits.json").read_text())
    limits = result["limits"]
    assert result["cores"] > 0
    assert result["versions"]["torch"] == torch.__version__
    assert list(limits["page_cache_gb_per_s"])[:2] == ["1", "2"]
    assert all(0 < speed < 1000 for speed in limits["page_cache_gb_per_s"].values())
    assert 0 < limits["memory_gb_per_s"] < 1000
    assert 0 < limits["cold_disk_gb_per_s"] < 1000
    assert limits["quantize_gb_per_s"].keys() == {"nf4", "fp4", "int8"}
    assert all(speed > 0 for by in limits["quantize_gb_per_s"].values() for speed in by.values())
    assert "link_gb_per_s" not in limits


GPU = {"link_gb_per_s": 50.0, "page_cache_gb_per_s": {"1": 5.0, "16": 40.0}, "cold_disk_gb_per_s": 4.0}
CPU = {"page_cache_gb_per_s": {"1": 5.0, "2": 8.0}, "memory_gb_per_s": 2.0}


@pytest.mark.parametrize(
    ("limits", "mode", "cold", "seconds"),
    [
        (GPU, "nf4", False, 1.0),  # the page cache is the slowest
        (GPU, "none", False, 1.0),
        (GPU | {"link_gb_per_s": 20.0}, "nf4", False, 2.0),
        (GPU | {"read_and_copy_gb_per_s": 80.0}, "nf4", False, 0.5),
        (GPU | {"read_and_copy_gb_per_s": 80.0}, "nf4", True, 10.0),
        (GPU, "nf4", True, 10.0),
        (CPU, "int8", False, 5.0),
        (CPU, "none", False, 20.0),
        (CPU, "stored", False, 20.0),
        (CPU, "int8", True, None),  # not measured
        ({}, "int8", False, None),
    ],
)
def test_floor_is_the_slowest_stage(limits, mode, cold, seconds):
    from benchmarks.limits import floor

    assert floor(40 * 10**9, limits, mode, cold=cold) == seconds


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a compiler")
def test_the_floor_is_run_in_each_setting(tiny):
    from benchmarks.files import shards
    from benchmarks.floors import read_and_copy_s

    found = read_and_copy_s(shards(tiny), gpus=0)
    assert len(found) >= 3
    assert all(0 < seconds < 60 for seconds in found.values())
    assert all(setting.endswith(" MiB") for setting in found)


def test_every_byte_is_read_once_whatever_the_threads(tiny):
    from benchmarks.files import opened, read, shards, total_bytes

    whole = b"".join(file.read_bytes() for file in shards(tiny))
    for threads in (1, 3):
        buffer = memoryview(bytearray(total_bytes(shards(tiny))))
        with opened(shards(tiny)) as pieces:
            read(pieces, threads, lambda piece, thread, turn, buffer=buffer: buffer[piece.position :])
        assert buffer == whole


WATCHED = """
import subprocess, time, torch
from pathlib import Path
from benchmarks.host import watched_host

own, started = subprocess.Popen, []
subprocess.Popen = lambda *args, **kw: started.append(own(*args, **kw)) or started[-1]

def sleeps(watcher):
    lines = Path(f"/proc/{watcher.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

with watched_host(on_gpu=False) as host:
    filled = torch.ones(2**26)  # 256 MiB
    for watcher in started:
        before = sleeps(watcher)
        while sleeps(watcher) < before + 10:  # it sleeps between two looks, and may while it looks
            time.sleep(0.001)
    del filled
print(host.over_start_gib, host.kept_gib)
"""


def test_host_memory_is_what_the_block_took_at_most(tmp_path, programs):
    # Other tests leave memory in this process, and threads that fill or free some.
    over_start, kept = programs.run(WATCHED, tmp_path).split()
    if over_start == "None":
        pytest.skip("the system does not tell a process's memory")
    assert float(over_start) > 0.2
    assert float(kept) < 0.1


# load


@pytest.fixture
def in_this_process(monkeypatch):
    """Return a function after which rows are measured here, not in processes of their own that import all anew."""
    from benchmarks.one import measure
    from benchmarks.peers import PEERS

    def row(job, folder, peer, mode):
        return measure(folder, PEERS[peer], mode, job.device)

    return lambda: monkeypatch.setattr("benchmarks.load._row", row)


def test_profile_says_where_the_seconds_of_each_mode_go(tiny, tmp_path):
    out = tmp_path / "out.json"
    run("profile", tiny, "--device", "cpu", "--modes", "nf4", "none", "--loads", 2, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["nf4", "none"]
    for row in rows:
        parts = [row[name] for name in ("open", "plan", "prepare", "deliver", "commit")]
        assert all(part > 0 for part in parts)
        assert sum(parts) < row["all"] * 1.2
        assert row["deliver.finish"] < row["deliver"]
        assert row["first"].keys() == row.keys() - {"mode", "first"}
        assert row["first"]["all"] > row["first"]["deliver"] > 0
    assert rows[0]["deliver.quantize"] > 0 == rows[1]["deliver.quantize"]


@pytest.fixture
def short_limits(monkeypatch):
    """Measure the limits here: a process of their own would take the time that a figure needs that is to be trusted."""
    from benchmarks import load

    own = load._run

    def here(arguments, job):
        return run(*arguments) if arguments[0] == "limits" else own(arguments, job)

    monkeypatch.setattr(load, "_run", here)


@pytest.mark.slow
@pytest.mark.usefixtures("short_limits")
def test_load_measures_each_peer_in_each_mode_and_appends(many, tmp_path, in_this_process):
    from benchmarks.files import shards
    from benchmarks.limits import floor

    out = tmp_path / "out.json"
    options = ("--device", "cpu", "--out", out, "--commit", "abc")
    run("load", many, *options, "--peers", "safetensors", "--modes", "none")
    first = json.loads(out.read_text())
    assert [(row["peer"], row["mode"]) for row in first["rows"]] == [("safetensors", "none")]
    assert first["rows"][0]["imports_s"] > 0.1
    in_this_process()
    run("load", many, *options, "--append", "--peers", "bigload", "safetensors", "--modes", "none", "int8")
    result = json.loads(out.read_text())
    assert result["limits"] == first["limits"]  # not measured a second time
    assert [(row["peer"], row["mode"]) for row in result["rows"]] == [
        ("bigload", "none"),
        ("safetensors", "none"),
        ("bigload", "int8"),  # safetensors cannot quantize
    ]
    for row in (*first["rows"], *result["rows"]):
        assert row["first_s"] > 0
        assert row["second_s"] == pytest.approx(statistics.median(row["later_s"]), abs=1e-4)
        assert len(row["later_s"]) == 5 or sum(row["later_s"]) > 10
        # To the decimals that are kept.
        best = floor(result["checkpoint_bytes"], result["limits"], row["mode"])
        assert row["floor_s"] == pytest.approx(best, abs=1e-4)
        assert row["ratio_first"] == pytest.approx(row["first_s"] / best, abs=1e-3)
        assert row["ratio_second"] == pytest.approx(row["second_s"] / best, abs=1e-3)
        assert row["gb_per_s"] == pytest.approx(result["checkpoint_bytes"] / 1e9 / row["second_s"], abs=1e-4)
        assert row["gpu_peak_over_final_gib"] is None
        assert (row["build_s"] is None) == (row["peer"] == "safetensors")
    assert result["checkpoint_bytes"] == sum(shard.stat().st_size for shard in shards(many))
    assert result["checkpoint"] == "many"

    run("load", many, *options, "--peers", "safetensors", "--modes", "none", "--append")
    again = json.loads(out.read_text())
    assert again["rows"][:2] == [result["rows"][0], result["rows"][2]]
    assert again["rows"][2]["peer"] == "safetensors"


def test_other_formats_are_loaded_in_turn_and_held_against_the_first(many, tmp_path, in_this_process, capsys):
    in_this_process()
    other, out = made("many-50", tmp_path / "many-fp8", "--format", "fp8"), tmp_path / "out.json"
    options = ("--beside", other, "--device", "cpu", "--no-limits", "--out", out, "--commit", "abc")
    run("load", many, *options, "--peers", "bigload", "safetensors", "--modes", "nf4", "stored")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["peer"], row["mode"], row.get("checkpoint")) for row in rows] == [
        ("bigload", "nf4", None),
        ("bigload", "nf4", "many-fp8"),
        ("safetensors", "stored", "many-fp8"),
    ]
    assert rows[1]["share_second"] == pytest.approx(rows[1]["second_s"] / rows[0]["second_s"], rel=0.1)
    assert rows[1]["gb_per_s"] == pytest.approx(rows[1]["checkpoint_bytes"] / 1e9 / rows[1]["second_s"], abs=1e-4)
    assert rows[1]["tensors"] == 100
    assert rows[1]["checkpoint_bytes"] == sum(file.stat().st_size for file in other.glob("*.safetensors"))
    capsys.readouterr()
    run("report", out)
    assert "| nf4 from many-fp8, 0.00 GB, times the seconds from many | " in capsys.readouterr().out


def test_cold_load_is_one(many):
    from benchmarks.load import compare

    result = compare(job(many, peers=("safetensors",), modes=("none",), cold=True))
    (row,) = result["rows"]
    assert row["second_s"] is None
    assert row["gb_per_s"] == pytest.approx(result["checkpoint_bytes"] / 1e9 / row["first_s"], abs=1e-4)
    assert "cached_share_after_drop" in row


def test_result_of_another_checkpoint_is_not_added_to(tiny, many, tmp_path, in_this_process):
    from benchmarks.load import compare

    in_this_process()
    options = {"peers": ("safetensors",), "modes": ("none",), "out": tmp_path / "out.json", "append": True}
    compare(job(many, **options))
    with pytest.raises(SystemExit, match="cannot be added to: of another checkpoint"):
        compare(job(tiny, **options))


def test_absent_peer_is_skipped_with_the_reason(many, monkeypatch):
    from benchmarks.load import compare
    from benchmarks.peers import PEERS

    absent = dataclasses.replace(PEERS["fastsafetensors"], modules=("torch", "no_such_package"))
    monkeypatch.setitem(PEERS, "fastsafetensors", absent)
    result = compare(job(many, peers=("fastsafetensors",), modes=("none",)))
    assert result["rows"] == [
        {"peer": "fastsafetensors", "mode": "none", "skipped": "no_such_package is not installed"}
    ]


def test_row_that_fails_says_why(many, tmp_path):
    from benchmarks.load import compare

    (row,) = compare(job(many, peers=("safetensors",), modes=("none",), timeout_s=0.01))["rows"]
    assert row["error"] == "took longer than 0.01 s"
    broken = tmp_path / "broken"
    broken.mkdir()
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (broken / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (row,) = compare(job(broken, peers=("safetensors",), modes=("none",)))["rows"]
    assert "SafetensorError" in row["error"]


def test_what_no_peer_can_do_is_said(many):
    from benchmarks.load import compare

    with pytest.raises(SystemExit, match="none of transformers can do none for this checkpoint on cpu"):
        compare(job(many, peers=("transformers",), modes=("none",)))


@pytest.mark.parametrize(
    ("peer", "mode", "config", "device", "can"),
    [
        ("bigload", "nf4", {}, "cpu", True),
        ("bigload", "stored", {}, "cpu", False),
        ("bigload", "stored", {"quantization_config": {}}, "cpu", True),
        ("bigload", "nf4", {"quantization_config": {}}, "cpu", False),
        ("transformers", "nf4", {"model_type": "llama"}, "cpu", True),
        ("transformers", "nf4", {"many": 50}, "cpu", False),
        ("accelerate", "nf4", {}, "cpu", False),
        ("accelerate", "none", {}, "cpu", True),
        ("accelerate", "nf4", {}, "cuda:0", True),
        ("safetensors", "nf4", {}, "cpu", False),
        ("fastsafetensors", "stored", {"quantization_config": {}}, "cpu", True),
        ("bigload", "nf4", IN_FP8, "cpu", True),
        ("bigload", "stored", IN_FP8, "cpu", False),
        ("transformers", "none", IN_FP8 | {"model_type": "qwen3"}, "cpu", True),
        ("transformers", "nf4", IN_FP8 | {"model_type": "qwen3"}, "cpu", False),
        ("accelerate", "none", IN_FP8, "cuda:0", False),
        ("safetensors", "stored", IN_FP8, "cpu", True),
        ("safetensors", "none", IN_FP8, "cpu", False),
    ],
)
def test_peers_are_asked_for_what_they_can_do(peer, mode, config, device, can):
    from benchmarks.peers import can_load

    assert can_load(peer, mode, config, device) is can


def test_imports_are_timed_from_a_process_without_torch():
    code = "import sys, benchmarks.__main__, benchmarks.one; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_checkpoint_that_is_quantized_already_is_loaded_as_it_is(many, tmp_path, mode, in_this_process):
    from benchmarks.load import compare

    in_this_process()
    folder = made("many-50", tmp_path / mode, "--quant", mode, "--source", many)
    rows = compare(job(folder, peers=("bigload", "safetensors")))["rows"]
    assert [(row["peer"], row["mode"]) for row in rows] == [("bigload", "stored"), ("safetensors", "stored")]
    assert all(row["second_s"] > 0 for row in rows)


def test_summary_has_a_line_for_each_mode_with_the_floor_first():
    from benchmarks.report import summary

    lines = summary(result()).splitlines()
    modes = list(dict.fromkeys(row["mode"] for row in result()["rows"]))
    assert [line.split("|")[1].strip() for line in lines[2 : 2 + len(modes)]] == modes
    assert lines[0].split("|")[2].strip() == "floor"
    assert "GPU memory" in lines[-2]
    assert "host memory" in lines[-1]


# report


def result(**fields):
    rows = [
        {"peer": "bigload", "mode": "nf4", "first_s": 0.8, "second_s": 0.5, "build_s": 0.1, "floor_s": 0.4}
        | {"ratio_second": 1.25, "gpu_peak_over_final_gib": 0.1, "gpu_final_gib": 5.0, "host_over_start_gib": 0.25},
        {"peer": "accelerate", "mode": "nf4", "error": "took longer than 300 s"},
        {"peer": "safetensors", "mode": "none", "first_s": 0.01, "second_s": 0.0012, "gpu_final_gib": None}
        | {"floor_s": 0.4, "ratio_second": 0.003, "host_kept_gib": 0.0},
    ]
    return {
        "benchmark": "load",
        "checkpoint_bytes": 16 * 10**9,
        "tensors": 291,
        "cold": False,
        "device": "GPU",
        "cores": 16,
        "versions": {"torch": "2.11.0", "fastsafetensors": None},
        "python": "3.12.3",
        "commit": "abc",
        "date": "2026-11-22T03:36:00+00:00",
        "limits": GPU | {"pinning_s_per_gib": 0.4, "quantize_gb_per_s": {"nf4": {"bitsandbytes": 150.0}}},
        "rows": rows,
        **fields,
    }


def test_table_has_seconds_floor_and_memory_by_mode():
    from benchmarks.report import table

    assert table(result()).splitlines() == [
        "| 16.00 GB onto GPU | bigload | accelerate | safetensors |",
        "|---|---|---|---|",
        "| nf4 | 0.50 s | - | - |",
        "| nf4, times the floor of 0.40 s | 1.2 | - | - |",
        "| nf4, GPU memory over the model | 0.10 GiB | - | - |",
        "| nf4, host memory over the start | 0.25 GiB | - | - |",
        "| none | - | - | 0.0012 s |",
        "| none, times the floor of 0.40 s | - | - | 0.0 |",
    ]


def test_table_of_many_tensors_tells_what_each_costs():
    from benchmarks.report import table

    rows = [{"peer": "bigload", "mode": "none", "first_s": 1.0, "second_s": 0.5, "floor_s": 0.01, "ratio_second": 50.0}]
    lines = table(result(checkpoint_bytes=10_000 * 4096, tensors=10_000, rows=rows)).splitlines()
    assert lines[2:] == ["| none | 0.50 s |", "| none, for each of 10000 tensors | 50 us |"]


def test_report_explains_what_the_table_cannot(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(result()))
    run("report", tmp_path / "a.json", tmp_path / "a.json")
    text = capsys.readouterr().out
    assert text.count("### a\n") == 2
    assert "- accelerate, nf4: error: took longer than 300 s" in text
    assert "mapped and not read, which is left to the model's first run: safetensors (none)" in text
    assert "but for transformers: bigload 0.10 s" in text
    assert "| page cache to reused buffers, 1 / 16 threads | 5.0 / 40.0 GB/s |" in text
    assert "| quantizing to nf4, of 16-bit input | bitsandbytes 150 GB/s |" in text
    assert "GPU, 16 cores; Python 3.12.3, torch 2.11.0; commit abc, 2026-11-22" in text


def test_charts_are_pictures(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(result()))
    run("report", tmp_path / "a.json", "--charts", tmp_path / "charts")
    names = ("a-page-cache.png", "a-seconds.png")
    assert sorted(path.name for path in (tmp_path / "charts").iterdir()) == list(names)
    for name in names:
        assert (tmp_path / "charts" / name).read_bytes().startswith(b"\x89PNG")


def test_charts_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    from benchmarks.pictures import draw
    from bigload import MissingDependencyError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        draw("a", result(), tmp_path)


@pytest.mark.parametrize("dark", [False, True])
def test_bars_are_as_long_as_the_loads_and_the_floor_is_drawn(dark):
    from benchmarks.pictures import bars_figure
    from bigload.cli.pictures import theme

    colours = theme(dark=dark)
    (axes,) = bars_figure(result(), colours).axes
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.0012]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["nf4  bigload", "16 bit  safetensors"]
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["0.50 s (the first load 0.80 s)", "0.0012 s (the first load 0.01 s)"]
    assert list(axes.lines[0].get_xdata()) == [0.4, 0.4]
    assert "0.40 s" in texts[2]
    assert {text.get_color() for text in axes.texts} == {colours.ink}
    assert axes.get_title(loc="left") == "Seconds to load 16.00 GB onto GPU"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bars_of_text_fit_the_terminal_and_keep_their_proportions(width, capsys, monkeypatch):
    from benchmarks.pictures import README_RESULT

    monkeypatch.setenv("COLUMNS", str(width))
    run("plot", README_RESULT)
    lines = capsys.readouterr().out.splitlines()
    rows = {(row["mode"], row["peer"]): row for row in json.loads(README_RESULT.read_text())["rows"]}
    drawn = [line for line in lines if set("\u2588\u2589\u258a\u258b\u258c\u258d\u258e\u258f") & set(line)]
    assert len(drawn) == len(rows) + 1  # and the floor
    assert all(len(line) <= width for line in lines)
    lengths = {}
    for line in drawn[:-1]:
        mode, peer, bar, seconds = line.split()[:4]
        assert seconds == f"{rows[mode, peer]['second_s']:.2f}"
        lengths[mode, peer] = 8 * bar.count("\u2588") + sum(0x2590 - ord(block) for block in bar.strip("\u2588"))
    longest = max(rows, key=lambda key: rows[key]["second_s"])
    for key, length in lengths.items():
        share = rows[key]["second_s"] / rows[longest]["second_s"]
        assert length == pytest.approx(max(1, share * lengths[longest]), abs=1.01)
    assert ("the first load" in drawn[0]) == (width >= 80)


def test_gain_is_a_sentence_of_first_and_later_loads():
    from benchmarks.report import gain

    said = "**Loaded as nf4 onto GPU, 16.00 GB take 0.80 s the first time in a process and 0.50 s each later time.**"
    assert gain(result()) == said
    rows = [row | {"first_s": row["second_s"] * 2} for row in result()["rows"] if "second_s" in row]
    rows += [rows[0] | {"peer": "accelerate", "first_s": 9.0, "second_s": 8.0}]
    rows += [rows[0] | {"peer": "transformers", "first_s": 3.0, "second_s": 2.0}]
    assert gain(result(rows=rows)).endswith(
        "\nFor the same, accelerate takes 9.00 s and 8.00 s, transformers 3.00 s and 2.00 s."
    )


def test_quantizing_file_to_file_is_held_against_reading_and_writing(tmp_path):
    from benchmarks.__main__ import main

    main(["make", "tiny", str(tmp_path / "tiny")])
    main(["quantize", str(tmp_path / "tiny"), "--mode", "int8", "--device", "cpu", "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["checkpoint_bytes"] > result["written_bytes"] > 0.5 * result["checkpoint_bytes"]
    limits = result["limits"]
    slower = max(
        result["checkpoint_bytes"] / limits["read_gb_per_s"], result["written_bytes"] / limits["write_gb_per_s"]
    )
    assert result["floor_s"] == pytest.approx(slower / 1e9, rel=0.01, abs=1e-4)
    assert result["share_of_floor"] == pytest.approx(slower / 1e9 / result["seconds"], rel=0.01, abs=1e-3)
    assert 0 <= result["host_over_start_gib"] < result["ring_gib"] + 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "tiny"]


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr("benchmarks.offload.GENERATED", 4)
    monkeypatch.setattr("benchmarks.offload._REPEATS", 3)


@pytest.mark.usefixtures("few_steps")
def test_offloading_is_timed_from_the_disk_too_and_written_as_a_table(tiny, tmp_path, monkeypatch):
    from benchmarks.report import offload_table

    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)
    monkeypatch.setattr("benchmarks.offload.TOKENS", (1, 2))
    out = tmp_path / "out.json"
    run("offload", tiny, "--device", "cpu", "--cases", "bigload:nf4:1:disk", "bigload:none:0", "--out", out)
    result = json.loads(out.read_text())
    disk, whole = result["rows"]
    assert disk["streamed_bytes"] > 0 == whole["streamed_bytes"]
    for row in (disk, whole):
        assert 0 < row["step_1_s"] <= row["step_1_median_s"]
        assert row["token_s"] > 0
    table = offload_table(result)
    assert f"| bigload | nf4 | 1, on the disk | {disk['load_s']:.1f} s | {disk['step_1_s']:.3f} s |" in table
    assert f"| bigload | none | 0 | {whole['load_s']:.1f} s |" in table


def test_what_a_peer_cannot_do_is_a_row_that_says_why(tiny, tmp_path):
    out = tmp_path / "out.json"
    run("offload", tiny, "--device", "cpu", "--cases", "accelerate:int8:1", "--out", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["error"]


@pytest.mark.usefixtures("few_steps")
def test_a_model_over_devices_is_held_against_the_same_on_one(tiny, tmp_path):
    out = tmp_path / "out.json"
    run("spread", tiny, "--devices", "cpu", "--out", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["is_bit_equal_to_one"]
    assert row["floor_s"] > 0 < row["second_s"]


def test_generation_is_timed_in_each_way_and_written_as_a_table(tmp_path, capsys, monkeypatch, small_parts_stream):
    out, how = tmp_path / "decode.json", ("--generated", 4, "--long", 6, "--batches", 1, 2, "--device", "cpu")
    few = (
        "--modes",
        "nf4",
        "none",
        "int8-t0",
        "--offloaded",
        1,
        "--cached",
        25,
        "--peers",
        "transformers",
        "transformers, static",
    )
    run("decode", "--sizes", "tiny", "tiny-gpt-oss", *few, *how, "--out", out)
    result = json.loads(out.read_text())
    cases = [(row["size"], row["mode"], row["offloaded"], row["batch"], row["peer"]) for row in result["rows"]]
    assert list(dict.fromkeys(cases)) == [
        ("tiny", "nf4", None, 1, "bigload"),
        ("tiny", "none", None, 1, "bigload"),
        ("tiny", "int8-t0", None, 1, "bigload"),
        ("tiny", "nf4", 1, 1, "bigload"),
        ("tiny", "nf4", None, 2, "bigload"),
        ("tiny", "none", None, 1, "transformers"),
        ("tiny", "none", None, 1, "transformers, static"),
        ("tiny", "none", None, 2, "transformers"),
        ("tiny", "none", None, 2, "transformers, static"),
        ("tiny-gpt-oss", "nf4", None, 1, "bigload"),
        ("tiny-gpt-oss", "nf4", 25, 1, "bigload"),
    ]
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0, row
        # On a busy machine the call for one token may take longer than that for four, and a step then less than 0.
        seconds = row["first_token_s"] + 3 * row["step_ms"] / 1e3
        assert seconds == pytest.approx(row["batch"] * 4 / row["tokens_per_s"], rel=0.02, abs=1e-3)
    ways = [(row["peer"], row["way"]) for row in result["rows"] if row["peer"] != "bigload"]
    assert ways == [("transformers", "dynamic"), ("transformers, static", "static")] * 2
    captured = [row for row in result["rows"] if row["way"] == "captured"]
    assert len(captured) == 7
    for row in captured:
        assert row["is_equal"]
        assert row["logits_differ"] == 0
        assert row["replayed"] == 0
        assert row["reasons"] == ["the model is on cpu, and CUDA graphs need a GPU"]
    assert [row["offloaded"] for row in result["rows"] if row.get("streamed_gb")] == [1, 1, 1, 25, 25, 25]
    assert [row["is_flat"] for row in result["rows"] if "is_flat" in row] == [True]
    capsys.readouterr()
    for brief in ((), ("--brief",)):
        run("report", *brief, out)
        lines = capsys.readouterr().out.splitlines()
        assert "| tokens a second | dynamic | static | captured | step | first token | capture | equal |" in lines
        assert sum(line.startswith("| tiny, nf4, 1 blocks offloaded, batch 1 |") for line in lines) == 1
        assert "- not captured: the model is on cpu, and CUDA graphs need a GPU" in lines


def test_what_cannot_be_generated_is_a_row_that_says_why(tmp_path):
    from benchmarks.decode import Case, decode_table, measure_decode

    (result,) = measure_decode([Case("tiny", "nf5")], "cpu", None, 4, 0, 60)
    assert "unknown quantization mode 'nf5'" in result["rows"][0]["error"]
    assert "ConfigError: unknown quantization mode" in decode_table(result)
    assert list(measure_decode([Case("tiny", "nf4")], "cpu", None, 4, 0, -1)) == []


def test_a_generation_that_has_no_time_left_ends_after_a_row(monkeypatch):
    from benchmarks import decode

    def rows(*case):
        yield {"way": "dynamic"}
        monkeypatch.setattr(decode.time, "perf_counter", lambda: 1e9)
        yield {"way": "static"}
        yield {"way": "captured"}

    monkeypatch.setattr(decode, "_rows", rows)
    made = decode.measure_decode([decode.Case("tiny", "nf4")] * 2, "cpu", None, 4, 0, 60)
    assert [[row["way"] for row in result["rows"]] for result in map(dict, made)][-1] == ["dynamic", "static"]
