"""`python -m benchmarks against`: two checkouts are timed in turn. Here the other one has little in it."""

import json
from pathlib import Path

import pytest

# What a process imports of a checkout; torch too, whose import would take the time of the test.
CHECKOUT = {
    "torch.py": "",
    "benchmarks/__init__.py": "",
    "benchmarks/checkpoints.py": "def build(folder):\n    return folder.name",
    "bigload/__init__.py": """
import time

class BnbQuantizationConfig:
    def __init__(self, **fields):
        assert fields == {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "auto"}

def load_and_quantize_model(model, config, folder, device_map, progress):
    assert (model, device_map, progress) == ("many-20", {"": "cpu"}, False)
    time.sleep(0.02 if config == "nf4" else 0.01)
    return model
""",
}


def test_both_checkouts_are_timed_in_each_round(tmp_path, capsys):
    from benchmarks.__main__ import main
    from benchmarks.against import Case
    from benchmarks.checkpoints import make_checkpoint

    folder, out = make_checkpoint("many-20", tmp_path / "many-20"), tmp_path / "out.json"
    cases = f"{folder}:none", f"{folder}:nf4"
    for name, text in CHECKOUT.items():
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text(text)
    main(["against", str(tmp_path / "other"), *cases, "--device", "cpu", "--rounds", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    row, other = result["rows"]
    assert other["case"] == "many-20 nf4: a load"
    assert len(other["ours_s"]) == len(other["other_s"]) == 6
    assert other["other_median_s"] >= 0.02
    assert row["case"] == "many-20 none: a load"
    assert len(row["ours_s"]) == len(row["other_s"]) == 6  # of the loads of a process the first does not count
    assert row["ratio"] == pytest.approx(row["ours_median_s"] / row["other_median_s"], rel=0.1)
    assert row["case"] in capsys.readouterr().err
    assert Case(Path("8b"), "nf4", 32).name == "8b nf4: a token with 32 blocks offloaded"
    main(["report", str(out)])
    assert (
        f"| many-20 none: a load | {row['other_median_s']:.4f} | {row['ours_median_s']:.4f} |"
        in capsys.readouterr().out
    )
