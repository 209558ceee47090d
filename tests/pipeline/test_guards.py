"""What others do wrong with quantized layers is refused in each process that holds some, however they came there."""

from textwrap import dedent

import pytest

pytest.importorskip("peft")

COMMON = """
    import torch
    from torch import nn
    from bigload.errors import QuantizationError

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.second(self.first(x))

    def refused(act):
        try:
            act()
        except QuantizationError as error:
            return str(error)
        raise SystemExit("not refused")
"""
MAKING = {
    "converted by the plugin": """
        def made(mode):
            from bigload.lightning import BitsandbytesPrecision
            return BitsandbytesPrecision(mode, dtype=torch.float16).convert_module(Net())
    """,
    "built empty": """
        def made(mode):
            from bigload.lightning import BitsandbytesPrecision
            from lightning.fabric import Fabric
            fabric = Fabric(accelerator="cpu", plugins=BitsandbytesPrecision(mode, dtype=torch.float16))
            with fabric.init_module(empty_init=True):
                model = Net()
            model = fabric.setup(model)
            model.load_state_dict(Net().state_dict())
            return model.module
    """,
    "loaded": """
        def made(mode):
            from bigload import BnbQuantizationConfig, load_and_quantize_model
            config = BnbQuantizationConfig.from_mode(mode, skip_modules=[], torch_dtype="fp16")
            return load_and_quantize_model(Net(), config, device_map="cpu")
    """,
    "unpickled": """
        def made(mode):
            return torch.load(f"{mode}.pt", weights_only=False)
    """,
}
USES = {
    "int8": """
        from peft import HRAConfig, get_peft_model
        model = made("int8")
        message = refused(lambda: get_peft_model(model, HRAConfig(target_modules=["first"])))
        assert "'first' is quantized, and PEFT's peft.tuners.hra.layer.HRALinear would compute" in message, message
    """,
    "int8-training": """
        model = made("int8-training").train()
        model(torch.ones(2, 64, dtype=torch.float16)).sum().backward()
        message = refused(torch.optim.AdamW(model.parameters()).step)
        assert "AdamW would compute with the main weights" in message, message
    """,
}


@pytest.mark.parametrize("how", MAKING)
@pytest.mark.parametrize("mode", USES)
def test_each_way_to_a_quantized_model_refuses_what_others_do_wrong(mode, how, tmp_path, programs):
    if "lightning" in MAKING[how]:
        pytest.importorskip("lightning")

    def run(*parts):
        programs.run("\n".join(map(dedent, (COMMON, *parts))), tmp_path)

    if how == "unpickled":
        run(MAKING["loaded"], f'torch.save(made("{mode}"), "{mode}.pt")')
    run(MAKING[how], USES[mode])
