"""What is said about a model that the plugin converted names the plugin's own arguments, and helps."""

import logging

import pytest
import torch
from lightning_loops import Net, inputs
from torch import nn

from bigload import QuantizationError
from bigload.lightning import BitsandbytesPrecision


def test_a_model_that_mostly_stays_plain_is_warned_of_in_terms_of_the_plugin(logged):
    with logged.at_level(logging.WARNING, "bigload"):
        BitsandbytesPrecision("nf4").convert_module(nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 9)))
    (said,) = [record.getMessage() for record in logged.records]
    assert "left in bfloat16" in said
    assert "in ignore_modules" in said
    assert "skip_modules" not in said
    logged.clear()
    with logged.at_level(logging.WARNING, "bigload"):
        plugin = BitsandbytesPrecision("nf4", ignore_modules={"1"})
        plugin.convert_module(nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 9)))
    assert not logged.records


@pytest.mark.parametrize("options", [{"kind": "HRA"}, {"kind": "Lora", "modules_to_save": ["down"]}], ids=str)
def test_the_remedy_for_refused_adapters_is_the_plugins_argument(options):
    peft = pytest.importorskip("peft")
    kind, given = options["kind"], {name: value for name, value in options.items() if name != "kind"}
    config = getattr(peft, f"{kind}Config")(target_modules=["up"], **given)
    with pytest.raises(QuantizationError, match=r"skip_modules \(in Lightning's plugin ignore_modules\), so that it"):
        peft.get_peft_model(BitsandbytesPrecision("int8").convert_module(Net()), config)
    plain = BitsandbytesPrecision("int8", torch.float32, {"up", "down"}).convert_module(Net())
    assert peft.get_peft_model(plain, config)(inputs()).isfinite().all()
