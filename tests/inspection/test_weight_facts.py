"""Code that reads a weight's dtype or shape gets the right one, or the layer stays plain and the plan says so."""

import functools
import sys

import pytest
import torch
from checkpoints import empty, save_checkpoint
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, UMT5Config, UMT5EncoderModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from bigload import BnbQuantizationConfig, load_and_quantize_model, plan_device_map
from bigload.model.quantizable import plain_because_read

CONFIGS = {
    "nf4": BnbQuantizationConfig.from_mode("nf4"),
    "nf4 in bf16 storage": BnbQuantizationConfig.from_mode("nf4", bnb_4bit_quant_storage=torch.bfloat16),
    "int8": BnbQuantizationConfig.from_mode("int8"),
    "int8-training": BnbQuantizationConfig.from_mode("int8-training"),
}
FOUR_BIT, EIGHT_BIT = {"nf4"}, {"int8"}
QUANTIZED = FOUR_BIT | EIGHT_BIT


class Tower(nn.Module):
    """An input layer, whose weight the code of a subclass looks at, and one more."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(48, 64)
        self.rest = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        self.norm = nn.LayerNorm(64)

    def cast(self, x):
        return x

    def forward(self, x):
        x = self.proj(self.cast(x))
        for layer in self.rest:
            x = layer(x)
        return self.norm(x)


class Casts(Tower):
    def cast(self, x):
        return x.to(self.proj.weight.dtype)


class CastsByKeyword(Tower):
    def cast(self, x):
        return x.to(device=self.proj.weight.device, dtype=self.proj.weight.dtype)


class CastsByAName(Tower):
    def cast(self, x):
        wanted = self.proj.weight.dtype
        return x.to(wanted)


class CastsToAnothers(Tower):
    def cast(self, x):
        return x.to(self.rest[-1].weight.dtype)


class CastsInALoop(Tower):
    def forward(self, x):
        x = self.proj(x)
        for _, layer in enumerate(self.rest):
            x = layer(x.to(layer.weight.dtype))
        return self.norm(x)


class CastsByGetattr(Tower):
    def cast(self, x):
        return x.type(getattr(self.proj, "weight").dtype)  # noqa: B009


class CastsByGetParameter(Tower):
    def cast(self, x):
        return x.to(self.get_parameter("proj.weight").dtype)


class CastsToTheFirst(Tower):
    def cast(self, x):
        return x.to(next(self.parameters()).dtype)


class CastsToTheFirstByAName(Tower):
    def cast(self, x):
        first = next(iter(self.proj.parameters()))
        return x.to(first.device, first.dtype)


class CastsUnlessEqual(Tower):
    def cast(self, x):
        if x.dtype != self.proj.weight.dtype:
            x = x.to(self.proj.weight.dtype)
        return x


class CastsUnlessInt8(Tower):
    """T5's guard: it knows of int8 alone."""

    def cast(self, x):
        if (
            isinstance(self.proj.weight, torch.Tensor)
            and x.dtype != self.proj.weight.dtype
            and self.proj.weight.dtype != torch.int8
        ):
            x = x.to(self.proj.weight.dtype)
        return x


class CastsIfFloating(Tower):
    def cast(self, x):
        if (wanted := self.proj.weight.dtype).is_floating_point:
            x = x.to(wanted)
        return x


class CastsIfFloatingByCall(Tower):
    def cast(self, x):
        return x.to(self.proj.weight.dtype) if self.proj.weight.is_floating_point() else x


class CastsUnlessQuantized(Tower):
    def cast(self, x):
        dtype = self.proj.weight.dtype
        if dtype in (torch.uint8, torch.int8):
            return x
        return x.to(dtype)


class Compares(Tower):
    def cast(self, x):
        return x.half() if self.proj.weight.dtype == torch.float16 else x


class Complains(Tower):
    def cast(self, x):
        if x.dim() == 1:
            raise ValueError(f"expected {self.proj.weight.shape[1]} of {self.proj.weight.dtype}")
        return x


class AsksForTheDevice(Tower):
    def cast(self, x):
        assert self.proj.weight.ndim == 2
        return x.to(self.proj.weight.device)


class ScalesByItsWidth(Tower):
    def cast(self, x):
        return x * self.proj.weight.shape[1] ** -0.5


class CountsItsElements(Tower):
    def cast(self, x):
        return x / self.proj.weight.numel()


def dtype_of(layer):
    return layer.weight.dtype


class CastsByAFunction(Tower):
    def cast(self, x):
        return x.to(dtype_of(self.proj))


class CastsByAMethod(Tower):
    def like(self, x, layer):
        return x.to(layer.weight.dtype)

    def cast(self, x):
        return self.like(x, layer=self.proj)


class CastsByAModulesFunction(Tower):
    def cast(self, x):
        return x.to(sys.modules[__name__].dtype_of(self.proj)) if False else x.to(this.dtype_of(self.proj))


this = sys.modules[__name__]


class Processor:
    def __call__(self, tower, x):
        return x.to(tower.proj.weight.dtype)


class CastsByAProcessor(Tower):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def cast(self, x):
        return self.processor(self, x)


class HasAnUnusedGetter(Tower):
    def get_dtype_of_input(self):
        return self.proj.weight.dtype


class Router(Tower):
    """Computes in float32 whatever the rest is in, as the routers of Switch Transformers and NLLB do."""

    def cast(self, x):
        self.proj = self.proj.to(torch.float32)
        return x.float()

    def forward(self, x):
        x = self.proj(self.cast(x)).to(self.norm.weight.dtype)
        for layer in self.rest:
            x = layer(x)
        return self.norm(x)


class CastsInPlace(Router):
    def cast(self, x):
        self.proj.float()
        return x.float()


class CastsAllOfAList(Tower):
    def cast(self, x):
        for layer in self.rest:
            layer.to(device=x.device, dtype=self.norm.weight.dtype)
        return x


class OnlyMoves(Tower):
    def cast(self, x):
        self.proj = self.proj.to(x.device)
        self.proj.to("cpu" if x.device.type == "cpu" else x.device, non_blocking=True)
        return x


READS = [
    (Router, QUANTIZED | {"nf4 in bf16 storage"}, "proj"),
    (CastsInPlace, QUANTIZED | {"nf4 in bf16 storage"}, "proj"),
    (CastsAllOfAList, QUANTIZED | {"nf4 in bf16 storage"}, "rest.0"),
    (OnlyMoves, set(), "proj"),
    (Tower, set(), None),
    (Casts, QUANTIZED, "proj"),
    (CastsByKeyword, QUANTIZED, "proj"),
    (CastsByAName, QUANTIZED, "proj"),
    (CastsToAnothers, QUANTIZED, "rest.1"),
    (CastsInALoop, QUANTIZED, "rest.0"),
    (CastsByGetattr, QUANTIZED, "proj"),
    (CastsByGetParameter, QUANTIZED, "proj"),
    (CastsToTheFirst, QUANTIZED, "proj"),
    (CastsToTheFirstByAName, QUANTIZED, "proj"),
    (CastsUnlessEqual, QUANTIZED, "proj"),
    (CastsUnlessInt8, FOUR_BIT, "proj"),
    (CastsIfFloating, set(), "proj"),
    (CastsIfFloatingByCall, set(), "proj"),
    (CastsUnlessQuantized, set(), "proj"),
    (Compares, set(), "proj"),
    (Complains, set(), "proj"),
    (AsksForTheDevice, set(), "proj"),
    (ScalesByItsWidth, FOUR_BIT | {"nf4 in bf16 storage"}, "proj"),
    (CountsItsElements, FOUR_BIT | {"nf4 in bf16 storage"}, "proj"),
    (CastsByAFunction, QUANTIZED, "proj"),
    (CastsByAMethod, QUANTIZED, "proj"),
    (CastsByAModulesFunction, QUANTIZED, "proj"),
    (CastsByAProcessor, QUANTIZED, "proj"),
    (HasAnUnusedGetter, set(), "proj"),
]


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize(("tower", "modes", "layer"), READS, ids=lambda value: getattr(value, "__name__", None))
def test_layer_stays_plain_in_the_modes_that_show_something_else_than_the_code_expects(tower, modes, layer, mode):
    config = CONFIGS[mode].resolved(torch.bfloat16)
    found = plain_because_read(tower(), config)
    assert (layer in found) == (mode in modes)
    assert set(found) <= {layer, "rest.0", "rest.1"}
    assert len(found) in (0, 1, 2 if tower in (CastsInALoop, CastsAllOfAList) else 1)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("tower", [tower for tower, _, _ in READS], ids=lambda tower: tower.__name__)
def test_loaded_model_computes_as_the_plain_one_within_the_modes_rounding(tower, mode, tmp_path, device):
    torch.manual_seed(0)
    model = tower().eval()
    save_checkpoint(model, tmp_path)
    loaded = load_and_quantize_model(empty(tower), mode, tmp_path, device_map=device).eval()
    assert any(type(module).__module__.startswith("bitsandbytes") for module in loaded.modules())
    x = torch.rand(5, 48) * 2 - 1
    with torch.no_grad():
        expected, found, of_half = model(x), loaded(x.to(device)).cpu(), loaded(x.to(device) / 2).cpu()
    assert (found - expected).norm() < (0.3 if mode == "nf4" else 0.03) * expected.norm()
    assert not torch.equal(found, of_half)


class Inner(nn.Module):
    """Tells others its dtype, by a method or as a property."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.other = nn.Linear(64, 64)

    def wanted(self):
        return self.fc.weight.dtype

    @property
    def entry_dtype(self):
        return self.fc.weight.dtype

    def forward(self, x):
        return self.other(self.fc(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.norm = nn.LayerNorm(64)


class UsesTheMethod(Outer):
    def forward(self, x):
        return self.norm(self.inner(x.to(self.inner.wanted())))


class UsesTheProperty(Outer):
    def forward(self, x):
        return self.norm(self.inner((10 * x).to(self.inner.entry_dtype).float()))


class UsesNone(Outer):
    def forward(self, x):
        return self.norm(self.inner(x))


@pytest.mark.parametrize(
    ("outer", "read"), [(UsesTheMethod, {"inner.fc"}), (UsesTheProperty, {"inner.fc"}), (UsesNone, set())]
)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_dtype_that_a_module_tells_counts_if_another_asks_for_it(outer, read, mode, device):
    assert set(plain_because_read(outer(), BnbQuantizationConfig.from_mode(mode))) == read
    model = outer().eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        found = load_and_quantize_model(model, mode, device_map=device)(x.to(device)).cpu()
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_the_plan_says_which_layers_stay_plain_and_why():
    plan = plan_device_map(Casts(), "nf4", device_map="cpu")
    assert plan.read_weights == {"proj": "dtype"}
    assert "not quantized, as other code reads the dtype of their weight: 'proj'" in str(plan)
    assert "not quantized" not in str(plan_device_map(Tower(), "nf4", device_map="cpu"))
    text = str(plan_device_map(Router(), "int8", device_map="cpu"))
    assert "not quantized, as other code casts their weight: 'proj'" in text


def test_the_warning_of_what_is_left_says_why(warned):
    class Most(Casts):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(48, 4096)

    plan_device_map(Most(), "int8", device_map="cpu")
    assert "1 Linear (other code reads the dtype of their weight)" in warned()[0]


def test_models_of_transformers_whose_reads_are_guarded_or_unused_stay_quantized():
    sizes = {"vocab_size": 32, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 4}
    umt5 = UMT5EncoderModel(UMT5Config(**sizes))
    int8, nf4 = (BnbQuantizationConfig.from_mode(mode) for mode in ("int8", "nf4"))
    assert plain_because_read(umt5, int8) == {}
    assert set(plain_because_read(umt5, nf4)) == {"encoder.block.0.layer.1.DenseReluDense.wo"}  # which stays in fp32
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 32}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 1}
    with torch.device("meta"):
        qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    assert functools.reduce(getattr, ["model", "visual", "get_dtype"], qwen)() == torch.float32  # nobody calls it
    assert plain_because_read(qwen, nf4) == {}
