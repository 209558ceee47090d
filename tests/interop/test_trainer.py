"""transformers' Trainer takes a loaded model as it takes one of transformers' own loader."""

import shutil

import pytest
import tokenizers
import torch
from checkpoints import empty
from comparisons import state_of
from models import llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from bigload import BnbQuantizationConfig, load_and_quantize_model

peft = pytest.importorskip("peft")

MODES = ("nf4", "nf4-dq", "int8")
SEQUENCES = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(6)]


def arguments(folder):
    return TrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


def adapted(model):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", MODES)
def test_trainer_trains_a_lora_on_a_loaded_llama(tmp_path, mode):
    model = adapted(load_and_quantize_model(llama(False), mode, device_map="cpu"))
    before = state_of(model)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=SEQUENCES)
    assert trainer.train().global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize("mode", MODES)
def test_trainer_refuses_a_model_without_adapters_as_it_refuses_transformers_own(tmp_path, mode):
    full = llama(False)
    full.save_pretrained(tmp_path / "full")
    quantization = BnbQuantizationConfig.from_mode(mode).to_transformers()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=quantization, device_map={"": "cpu"}
    )
    messages = []
    for model in (load_and_quantize_model(full, mode, device_map="cpu"), theirs):
        with pytest.raises(ValueError, match="purely quantized models") as caught:
            Trainer(model=model, args=arguments(tmp_path), train_dataset=SEQUENCES)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_trainer_takes_a_model_of_which_nothing_was_quantized(tmp_path):
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["*"])
    model = load_and_quantize_model(llama(False), config, device_map="cpu")
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=SEQUENCES)
    assert trainer.train().global_step == 3


@pytest.mark.parametrize("place", ["resident", "disk"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("small_parts_stream")
def test_sft_trainer_of_trl_has_the_losses_that_it_has_on_transformers_own_load(tmp_path, device, mode, place):
    """It casts adapters of quantized models to bfloat16, and looks at many attributes to know that they are."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    llama(False).save_pretrained(tmp_path / "full")
    quantization = BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32", bnb_4bit_compute_dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full",
        quantization_config=quantization.to_transformers(),
        device_map={"": device},
        dtype=torch.float32,
    )
    away = dict.fromkeys(("model.layers.0", "model.layers.1"), "disk") if place == "disk" else {}
    ours = load_and_quantize_model(
        empty(llama),
        quantization,
        tmp_path / "full",
        device_map={"": device} | away,
        offload_folder=tmp_path / "cache",
    )
    losses = []
    for name, model in (("theirs", theirs), ("ours", ours)):
        torch.manual_seed(1)
        asked = trl.SFTConfig(
            output_dir=tmp_path / name,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=device.type == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            loss_type="nll",
        )
        asked._n_gpu = min(1, asked.n_gpu)
        trainer = trl.SFTTrainer(
            model=model,
            args=asked,
            train_dataset=datasets.Dataset.from_list([{"input_ids": list(range(i, i + 8))} for i in range(3, 11)]),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    trainer.save_model(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}


@pytest.mark.parametrize("place", ["resident", "disk"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("small_parts_stream")
def test_a_run_goes_on_from_its_checkpoint_as_it_would_have(tmp_path, device, mode, place):
    torch.manual_seed(0)
    llama(False).save_pretrained(tmp_path / "full")
    away = dict.fromkeys(("model.layers.0", "model.layers.1"), "disk") if place == "disk" else {}

    def trained(steps, **resume):
        torch.manual_seed(1)
        model = load_and_quantize_model(
            empty(llama),
            mode,
            tmp_path / "full",
            device_map={"": device} | away,
            offload_folder=tmp_path / "cache",
        )
        asked = arguments(tmp_path / "run")
        asked.use_cpu, asked.optim, asked.lr_scheduler_type = device.type == "cpu", "adamw_8bit", "constant"
        asked._n_gpu = min(1, asked.n_gpu)  # with several it would make DataParallel of a model on one
        asked.max_steps, asked.save_strategy, asked.save_steps = steps, "steps", 2
        trainer = Trainer(model=adapted(model), args=asked, train_dataset=SEQUENCES)
        trainer.train(**resume)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}

    expected = trained(4)
    shutil.rmtree(tmp_path / "run")
    trained(2)
    found = trained(4, resume_from_checkpoint=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def tokenizer():
    """Each number is a word."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, 128)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
