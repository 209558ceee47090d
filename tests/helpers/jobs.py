"""What people do with a loaded model, one function for each; what it gives is compared with a resident model's.

Each takes a model and a `Context`, and returns tensors or numbers by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from models import clip, llama, t5
from torch import nn

TOKENS = torch.arange(1, 11).view(2, 5)
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
GREEDY = LENGTH | {"do_sample": False}


@dataclass(frozen=True)
class Context:
    """Where a job runs.

    Attributes:
        device: the one that computes.
        folder: an empty folder.
    """

    device: torch.device
    folder: Path

    @property
    def tokens(self) -> torch.Tensor:
        """Two prompts of five tokens, on the device."""
        return TOKENS.to(self.device)


def whisper() -> nn.Module:
    """A Whisper of transformers, random."""
    sizes = {"vocab_size": 96, "d_model": 64, "encoder_layers": 6, "decoder_layers": 6, "num_mel_bins": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 128}
    sizes |= {"decoder_ffn_dim": 128, "max_source_positions": 16, "max_target_positions": 32}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))


def llava() -> nn.Module:
    """A model of images and text, random: a CLIP tower, a projector and a Llama."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128, max_position_embeddings=64)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=127, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def bert() -> nn.Module:
    """A classifier of sentences, random."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, vocab_size=128, max_position_embeddings=32, num_labels=3)
    return transformers.BertForSequenceClassification(config)


FAMILIES = {
    "llama": partial(llama, num_hidden_layers=3),
    "t5": partial(t5, num_layers=6),
    "whisper": whisper,
    "llava": llava,
    "clip": partial(clip, num_hidden_layers=6),
    "bert": bert,
}
JOBS: dict[str, tuple[str, Callable[[Any, Context], dict[str, Any]]]] = {}


def _job(family: str) -> Callable[[Callable[[Any, Context], dict[str, Any]]], Callable[[Any, Context], dict[str, Any]]]:
    def listed(run: Callable[[Any, Context], dict[str, Any]]) -> Callable[[Any, Context], dict[str, Any]]:
        JOBS[run.__name__] = (family, run)
        return run

    return listed


# Generation.


@_job("llama")
def greedy(model, at):
    return {"tokens": model.generate(at.tokens, **GREEDY)}


@_job("llama")
def prompt_on_the_cpu(model, at):
    return {"tokens": model.generate(TOKENS, **GREEDY)}


@_job("llama")
def sampled(model, at):
    torch.manual_seed(3)
    return {"tokens": model.generate(at.tokens, **LENGTH, do_sample=True, top_k=20, temperature=0.8)}


@_job("llama")
def beams(model, at):
    return {"tokens": model.generate(at.tokens, **GREEDY, num_beams=3)}


@_job("llama")
def with_scores_and_states(model, at):
    wanted = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    made = model.generate(at.tokens, **GREEDY, **wanted)
    return {"tokens": made.sequences, "scores": torch.stack(made.scores), "states": made.hidden_states[0][-1]}


@_job("llama")
def padded_on_the_left(model, at):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=at.device)
    return {"tokens": model.generate(at.tokens, attention_mask=mask, **GREEDY)}


@_job("llama")
def static_cache(model, at):
    return {"tokens": model.generate(at.tokens, **GREEDY, cache_implementation="static", disable_compile=True)}


@_job("llama")
def lookup_of_prompts(model, at):
    return {"tokens": model.generate(at.tokens[:1].repeat(1, 3), prompt_lookup_num_tokens=2, **GREEDY)}


@_job("llama")
def assisted(model, at):
    return {"tokens": model.generate(at.tokens[:1], assistant_model=model, **GREEDY)}


@_job("llama")
def embeddings_given(model, at):
    embeds = model.get_input_embeddings()(at.tokens)
    return {"tokens": model.generate(inputs_embeds=embeds, **GREEDY)}


@_job("llama")
def loop_with_a_cache(model, at):
    tokens, cache, made = at.tokens, None, []
    with torch.inference_mode():
        for _ in range(4):
            out = model(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            made.append(tokens)
    return {"tokens": torch.cat(made, 1)}


@_job("llama")
def text_pipeline(model, at):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    generates = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False)
    return {"text": generates("w5 w6 w7", **GREEDY)[0]["generated_text"]}


# Encoders with decoders, images, sound.


@_job("t5")
def translated(model, at):
    return {"tokens": model.generate(at.tokens, **GREEDY)}


@_job("t5")
def encoded_once(model, at):
    encoded = model.get_encoder()(at.tokens)
    return {"states": encoded.last_hidden_state, "tokens": model.generate(encoder_outputs=encoded, **GREEDY)}


@_job("t5")
def loss_of_labels(model, at):
    with torch.no_grad():
        return {"loss": model(input_ids=at.tokens, labels=at.tokens).loss}


@_job("whisper")
def transcribed(model, at):
    features = torch.rand(2, 8, 32, generator=torch.Generator().manual_seed(0)).to(at.device, floating(model))
    return {"tokens": model.generate(features, **GREEDY)}


@_job("llava")
def image_described(model, at):
    tokens = torch.cat([torch.full((2, 4), 127, device=at.device), at.tokens], dim=1)
    pixels = pictures(at, floating(model))
    features = model.get_image_features(pixel_values=pixels)
    made = model.generate(tokens, pixel_values=pixels, **GREEDY)
    return {"features": torch.cat(list(getattr(features, "pooler_output", features))), "tokens": made}


@_job("clip")
def image_and_text_compared(model, at):
    with torch.no_grad():
        pixels = pictures(at, floating(model))
        image, text = model.get_image_features(pixels), model.get_text_features(at.tokens)
        both = model(input_ids=at.tokens, pixel_values=pixels).logits_per_text
    return {"both": both} | {
        name: getattr(given, "pooler_output", given) for name, given in (("image", image), ("text", text))
    }


@_job("bert")
def classified(model, at):
    with torch.no_grad():
        out = model(at.tokens, labels=torch.tensor([0, 2], device=at.device))
    return {"loss": out.loss, "logits": out.logits}


def pictures(at: Context, dtype: torch.dtype) -> torch.Tensor:
    """Two images."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(at.device, dtype)


def floating(model: nn.Module) -> torch.dtype:
    """The dtype of the model's values that are not quantized."""
    return next(p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "norm" in name)


# Ways to run it.


@_job("llama")
def under_autocast(model, at):
    with torch.no_grad(), torch.autocast(at.device.type, torch.bfloat16):
        return {"logits": model(at.tokens).logits}


@_job("llama")
def compiled(model, at):
    """On a CPU the resident model gives the same bits as it is, without the seconds that compiling takes."""
    is_plain = at.device.type == "cpu" and "offload" not in vars(model)
    run = model if is_plain else torch.compile(model, backend="eager")
    with torch.no_grad():
        return {"logits": run(at.tokens).logits}


@_job("llama")
def hooked(model, at):
    seen: dict[str, Any] = {}
    layer = model.model.layers[1]
    handles = [
        layer.register_forward_hook(lambda module, given, out: seen.update(out=out)),
        layer.mlp.register_forward_pre_hook(lambda module, given: seen.update(given=given[0])),
    ]
    with torch.no_grad():
        seen["logits"] = model(at.tokens).logits
    for handle in handles:
        handle.remove()
    return {name: value[0] if isinstance(value, tuple) else value for name, value in seen.items()}


@_job("llama")
def block_called_alone(model, at):
    states = model.get_input_embeddings()(at.tokens)
    positions = torch.arange(5, device=at.device)[None]
    with torch.no_grad():
        rotary = model.model.rotary_emb(states, positions)
        out = model.model.layers[1](states, position_embeddings=rotary, position_ids=positions)
    return {"states": out[0] if isinstance(out, tuple) else out}


@_job("llama")
def moved_to_its_device(model, at):
    with torch.no_grad():
        return {"logits": model.to(at.device)(at.tokens).logits}


@_job("llama")
def prepared_by_accelerate(model, at):
    from accelerate import Accelerator

    prepared = Accelerator(cpu=at.device.type == "cpu").prepare_model(model, evaluation_mode=True)
    with torch.no_grad():
        return {"logits": prepared(at.tokens).logits}


# Training.


@_job("llama")
def lora(model, at):
    from adapters import lora_losses

    return {"losses": lora_losses(model, at.tokens, 3)}


@_job("llama")
def lora_with_checkpointing(model, at):
    import peft
    from adapters import lora_losses

    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return {"losses": lora_losses(model, at.tokens, 3)}


def _adapted(model, **options):
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


@_job("llama")
def adapter_saved_and_loaded(model, at):
    import peft

    adapted = _adapted(model)
    with torch.no_grad():
        expected = adapted(at.tokens).logits
    adapted.save_pretrained(at.folder / "adapter")
    again = peft.PeftModel.from_pretrained(adapted.unload(), at.folder / "adapter").eval()
    with torch.no_grad():
        found = again(at.tokens).logits
    assert torch.equal(found, expected)
    return {"logits": found}


@_job("llama")
def adapter_merged(model, at):
    with torch.no_grad():
        return {"logits": _adapted(model).merge_and_unload()(at.tokens).logits}


@_job("llama")
def head_trained_in_full(model, at):
    adapted = _adapted(model, modules_to_save=["lm_head"])
    loss = adapted(input_ids=at.tokens, labels=at.tokens).loss
    loss.backward()
    return {"loss": loss, "grads": {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}}


@_job("llama")
def adapter_of_the_embedding(model, at):
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        return {"logits": adapted(input_ids=at.tokens).logits}


@_job("llama")
def trained_by_the_trainer(model, at):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    adapted = _adapted(model, task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=at.folder,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=at.device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # more would get larger batches
    data = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(4)]
    trainer = Trainer(model=adapted, args=arguments, train_dataset=data)
    trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


# Changing, saving.


@_job("llama")
def vocabulary_enlarged(model, at):
    old = model.config.vocab_size
    model.resize_token_embeddings(132, mean_resizing=False)
    with torch.no_grad():
        logits = model(at.tokens).logits
    return {"logits": logits[..., :old], "size": logits.shape[-1]}  # the new rows are random, by device


@_job("llama")
def saved_by_transformers(model, at):
    model.save_pretrained(at.folder / "saved")
    again = type(model).from_pretrained(at.folder / "saved", device_map={"": str(at.device)}).eval()
    with torch.no_grad():
        return {"logits": again(at.tokens).logits}


@_job("llama")
def state_saved(model, at):
    torch.save(model.state_dict(), at.folder / "state.pt")
    return dict(torch.load(at.folder / "state.pt", weights_only=True))


@_job("llama")
def layer_copied(model, at):
    layer = copy.deepcopy(model.model.layers[1].mlp)
    states = torch.rand(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(at.device, floating(model))
    with torch.no_grad():
        return {"states": layer(states)}


@_job("llama")
def set_to_train_and_back(model, at):
    with torch.no_grad():
        first = model.train()(at.tokens).logits
        return {"first": first, "second": model.eval()(at.tokens).logits}


@_job("llama")
def cast_to_float32(model, at):
    with torch.no_grad():
        return {"logits": model.float()(at.tokens).logits}
