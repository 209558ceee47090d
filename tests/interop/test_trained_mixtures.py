"""LoRA around experts in 4 bit: PEFT and Trainer train what they train around the same experts in 16 bit."""

import pytest
import torch
from checkpoints import offloaded
from comparisons import state_of
from mixtures import MIXTURES, TOKENS, config, mixture, unpacked, weights_of_experts
from torch import nn
from transformers import Trainer, TrainingArguments

from bigload import BnbQuantizationConfig, QuantizationError, load_and_quantize_model
from bigload.quantization.bnb import dequantize_4bit
from bigload.quantization.saved_experts import quantized_experts

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

FIRST = "model.layers.0.mlp.experts"
SEQUENCES = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(3, 11)]


def in_fp32(mode="nf4", **fields):
    return BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", bnb_4bit_compute_dtype="fp32", **fields)


def loaded(name, device, mode="nf4"):
    return unpacked(load_and_quantize_model(mixture(name), in_fp32(mode), device_map=device))


def with_plain_experts(name, device, mode="nf4"):
    """The same model, whose experts have the values that the packed ones dequantize to."""
    packed = weights_of_experts(loaded(name, device, mode))
    asked = in_fp32(mode, skip_modules=["experts", "lm_head"])
    model = unpacked(load_and_quantize_model(mixture(name), asked, device_map=device))
    for key, weight in packed.items():
        path, _, leaf = key.rpartition(".")
        module, values = model.get_submodule(path), dequantize_4bit(weight.data, weight.quant_state, torch.float32)
        is_turned = values.shape != module._parameters[leaf].shape or name == "gpt_oss"
        module._parameters[leaf] = nn.Parameter(values.mT.contiguous() if is_turned else values, requires_grad=False)
    assert not quantized_experts(model)
    return model


def adapted(model, **fields):
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.gate.weight"]}  # the router's
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **(targets | fields)))


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_of(model, folder, device, steps=20):
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=SEQUENCES)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_trainer_has_the_losses_of_plain_experts_with_the_same_values(tmp_path, device, mode):
    model = peft.prepare_model_for_kbit_training(loaded("qwen3_moe", device, mode))
    packed = {
        key: (weight.data.clone(), weight.quant_state.absmax.clone())
        for key, weight in weights_of_experts(model).items()
    }
    found = losses_of(trainer_of(adapted(model), tmp_path / "found", device))
    plain = with_plain_experts("qwen3_moe", device, mode)
    plain = peft.prepare_model_for_kbit_training(plain)
    expected = losses_of(trainer_of(adapted(plain), tmp_path / "expected", device))
    assert len(found) == 20
    assert found[-1] < found[0] - 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if device.type == "cuda" else 1e-4)
    after = weights_of_experts(model)
    assert after.keys() == packed.keys()
    for key, (data, absmax) in packed.items():
        assert torch.equal(after[key].data, data)
        assert torch.equal(after[key].quant_state.absmax, absmax)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v2", "llama4"])
def test_preparing_for_training_leaves_experts_in_4_bit(device, name):
    model = loaded(name, device)
    before = {key: weight.data.clone() for key, weight in weights_of_experts(model).items()}
    prepared = peft.prepare_model_for_kbit_training(model)
    after = weights_of_experts(prepared)
    assert after.keys() == before.keys()
    for key, weight in after.items():
        assert weight.dtype == torch.uint8
        assert not weight.requires_grad
        assert torch.equal(weight.data, before[key])
    made = peft.get_peft_model(prepared, peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    made(TOKENS.to(device), labels=TOKENS.to(device)).loss.backward()
    grads = [p.grad for n, p in made.named_parameters() if "lora_B" in n and "layers.0.self_attn" in n]
    assert grads
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
def test_adapters_of_packed_experts_are_refused_and_both_remedies_work(device, weight, storage):
    """Packed bytes that are stored as bfloat16 would take the sum with a product."""

    def load(**fields):
        return load_and_quantize_model(
            mixture("qwen3_moe"), in_fp32(bnb_4bit_quant_storage=storage, **fields), device_map=device
        )

    targets = {"target_parameters": [f"mlp.experts.{weight}"]}
    with pytest.raises(QuantizationError, match=rf"'{weight}' of '{FIRST}' holds experts in 4 bit.* or name"):
        adapted(load(), **targets)
    left_out = adapted(load())
    left_out(TOKENS.to(device), labels=TOKENS.to(device)).loss.backward()
    plain = adapted(load(skip_modules=["experts", "lm_head"]), **targets)
    plain(TOKENS.to(device), labels=TOKENS.to(device)).loss.backward()
    assert any("experts.lora_B" in name and p.grad is not None for name, p in plain.named_parameters())


def test_layers_that_peft_takes_for_experts_are_refused_by_the_same_words(device):
    for named in ("all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]):
        with pytest.raises(QuantizationError, match=r"PEFT takes 'all-linear', gate_proj, up_proj and down_proj for"):
            adapted(loaded("qwen3_moe", device), target_modules=named)


def test_biases_of_experts_are_frozen_and_adapters_of_them_refused(device):
    model = loaded("gpt_oss", device)
    biases = [p for name, p in model.named_parameters() if name.endswith("_proj_bias")]
    assert len(biases) == 4
    assert not any(bias.requires_grad for bias in biases)
    with pytest.raises(QuantizationError, match="'down_proj_bias' of"):
        adapted(model, target_parameters=["mlp.experts.down_proj_bias"])


@pytest.mark.usefixtures("small_parts_stream")
def test_adapters_train_around_streamed_experts(tmp_path, device):
    mixture("qwen3_moe").save_pretrained(tmp_path / "source")
    found = []
    for away in ([], ["model.layers.0", "model.layers.1"]):
        model = offloaded(
            lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe")),
            tmp_path / "source",
            device,
            away,
            tmp_path / "cache",
            config=in_fp32(),
            home="disk",
        )
        model = adapted(peft.prepare_model_for_kbit_training(unpacked(model)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for _ in range(4):
            loss = model.train()(TOKENS.to(device), labels=TOKENS.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, {key: t for key, t in state_of(model).items() if "lora_" in key}))
    (expected, adapters), (losses, others) = found
    assert losses == expected
    assert all(torch.equal(others[key], tensor) for key, tensor in adapters.items())
