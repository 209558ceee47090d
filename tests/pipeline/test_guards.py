"""What others do wrong with quantized layers is refused in each process that holds some, however they came there."""

import json
import subprocess
import sys
from textwrap import dedent

import pytest

pytest.importorskip("peft")

COMMON = """
    import sys, torch
    from torch import nn
    from bigload.errors import QuantizationError

    folder = sys.argv[1]

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
            return torch.load(f"{folder}/{mode}.pt", weights_only=False)
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


# Each case runs in a process that has done nothing before: a child of one that has only imported the libraries.
FORKING = """
    import importlib, json, os, sys, traceback
    for name in ("torch", "bitsandbytes", "transformers", "peft", "lightning.fabric"):
        importlib.import_module(name)
    failed = {}
    for name, code in json.loads(sys.stdin.read()).items():
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                exec(code, globals())  # pickle looks for classes there
            except BaseException:
                os.write(writes, traceback.format_exc()[-4000:].encode())
                os._exit(1)
            os._exit(0)
        os.close(writes)
        if os.waitpid(child, 0)[1]:
            failed[name] = os.read(reads, 4000).decode()
        os.close(reads)
    print(json.dumps(failed))
"""


def test_each_way_to_a_quantized_model_refuses_what_others_do_wrong(tmp_path):
    pytest.importorskip("lightning")
    cases = {
        f"{mode}, to be unpickled": (MAKING["loaded"], f'torch.save(made("{mode}"), f"{{folder}}/{mode}.pt")')
        for mode in USES
    }
    cases |= {f"{mode}, {how}": (make, use) for mode, use in USES.items() for how, make in MAKING.items()}
    codes = {name: "\n".join(map(dedent, (COMMON, *parts))) for name, parts in cases.items()}
    command = [sys.executable, "-c", dedent(FORKING), str(tmp_path)]
    done = subprocess.run(command, input=json.dumps(codes), stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {}
