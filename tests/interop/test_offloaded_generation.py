"""Models whose embedding, the first parameter, rests elsewhere: all that makes tensors on `model.device` works.

What they give is, bit for bit, what the model gives that is wholly on the device.
"""

import gc
from functools import partial

import pytest
import torch
from adapters import lora_losses
from checkpoints import empty, offloaded, save_checkpoint
from models import clip, llama, t5
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from bigload import OffloadConfig, OffloadError, load_and_quantize_model

pytestmark = pytest.mark.usefixtures("small_parts_stream")

TOKENS = torch.arange(1, 11).view(2, 5)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def loaded(tmp_path, device):
    """Return a function that loads a model wholly onto the device, and again with parts of it elsewhere."""

    def loading(build, *away, mode="nf4"):
        torch.manual_seed(0)
        folder = save_checkpoint(build().bfloat16(), tmp_path / f"of {len(list(tmp_path.iterdir()))}")
        whole = load_and_quantize_model(empty(build), mode, folder, device_map=device)
        part = offloaded(build, folder, device, away, folder / "cache", mode)
        return whole.eval(), part.eval()

    return loading


def berts():
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 32}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), BertConfig(**sizes))
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return EncoderDecoderModel(config)


OFF = {"embedding": ["model.embed_tokens"], "most": ["model.embed_tokens", "model.layers.0", "lm_head"]}


def same(found, expected):
    return torch.equal(found.cpu(), expected.cpu())


@pytest.fixture(params=OFF)
def models(loaded, request):
    return loaded(llama, *OFF[request.param])


@pytest.mark.parametrize("there", [True, False], ids=["its device", "cpu"])
def test_tokens_are_generated_from_wherever_the_prompt_is(models, device, there):
    whole, part = models
    assert part.device == part.model.device == device
    tokens = TOKENS.to(device if there else "cpu")
    for more in ({}, {"attention_mask": torch.ones_like(tokens)}, {"num_beams": 2}, {"cache_implementation": "static"}):
        found = part.generate(tokens, **GREEDY, **more)
        more = {name: value.to(device) if torch.is_tensor(value) else value for name, value in more.items()}
        assert same(found, whole.generate(TOKENS.to(device), **GREEDY, **more))


def test_logits_come_back_to_where_the_prompt_is(models, device):
    whole, part = models
    with torch.no_grad():
        expected = whole(TOKENS.to(device), labels=TOKENS.to(device))
        for tokens in (TOKENS, TOKENS.to(device)):
            out = part(tokens, labels=tokens)
            assert out.logits.device == out.loss.device == tokens.device
            assert same(out.logits, expected.logits)
            assert same(out.loss, expected.loss)


def test_models_within_it_may_be_called(models, device):
    whole, part = models
    with torch.no_grad():
        expected = whole.model(TOKENS.to(device)).last_hidden_state
        for tokens in (TOKENS, TOKENS.to(device)):
            found = part.model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            assert found.device == device
            assert same(found, expected)


def test_moved_to_its_device_it_gives_what_it_gave(models, device):
    whole, part = models
    expected = whole.generate(TOKENS.to(device), **GREEDY)
    assert part.to(device) is part
    assert same(getattr(part, device.type)().generate(TOKENS, **GREEDY), expected)
    with pytest.raises(OffloadError, match=r"cannot be moved to meta.*offload\.remove\(\)"):
        part.to("meta")
    assert same(part.generate(TOKENS, **GREEDY), expected)


@pytest.mark.parametrize("rows", [140, 120])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_embedding_that_looks_up_on_the_host_may_be_resized(loaded, device, rows, mean_resizing):
    whole, part = loaded(llama, "model.embed_tokens", "model.layers.0")
    for model in (whole, part):
        model.resize_token_embeddings(rows, mean_resizing=mean_resizing)
    assert part.get_input_embeddings().weight.shape == part.lm_head.weight.shape == (rows, 64)
    assert part.lm_head.weight.device == device
    known = min(rows, 128)
    with torch.no_grad():
        expected = whole(TOKENS.to(device)).logits[..., :known]
        assert same(part(TOKENS.to(device)).logits[..., :known], expected)
        added = part(torch.full((1, 2), rows - 1)).logits
    assert added.isfinite().all()
    part.lm_head.weight = whole.lm_head.weight  # whose new rows are drawn on another device
    expected = whole.generate(TOKENS.to(device), **GREEDY, suppress_tokens=list(range(known, rows)) or None)
    found = part.generate(TOKENS, **GREEDY, suppress_tokens=list(range(known, rows)) or None)
    assert same(found, expected)
    part.offload.remove()
    assert part.get_input_embeddings().weight.device == device
    assert same(part.generate(TOKENS, **GREEDY, suppress_tokens=list(range(known, rows)) or None), expected)


def test_head_that_is_streamed_is_resized_only_when_it_is_back(loaded, device):
    whole, part = loaded(llama, *OFF["most"])
    assert part.resize_token_embeddings() is part.get_input_embeddings()
    part.resize_token_embeddings(128)
    part.resize_token_embeddings(100, pad_to_multiple_of=128)
    for given in ({"new_num_tokens": 140}, {"pad_to_multiple_of": 100}, {"new_num_tokens": 64}):
        with pytest.raises(OffloadError, match=r"'lm_head'.* 128 tokens.*offload\.remove\(\)"):
            part.resize_token_embeddings(**given)
        assert part.config.vocab_size == len(part.get_input_embeddings().weight) == 128
    assert same(part.generate(TOKENS.to(device), **GREEDY), whole.generate(TOKENS.to(device), **GREEDY))
    part.offload.remove()
    for model in (whole, part):
        model.resize_token_embeddings(120)
    assert same(part.generate(TOKENS.to(device), **GREEDY), whole.generate(TOKENS.to(device), **GREEDY))


def test_embeddings_may_be_given_and_looked_up_by_the_caller(models, device):
    whole, part = models
    embeds = part.get_input_embeddings()(TOKENS)
    assert embeds.device == device
    expected = whole.generate(inputs_embeds=whole.get_input_embeddings()(TOKENS.to(device)), **GREEDY)
    assert same(part.generate(inputs_embeds=embeds, **GREEDY), expected)


def test_assistant_helps_that_is_offloaded_itself(models, loaded, device):
    whole, part = models
    helping, helped = loaded(partial(llama, num_hidden_layers=1), "model.embed_tokens")
    tokens = TOKENS[:1].to(device)
    expected = whole.generate(tokens, assistant_model=helping, **GREEDY)
    assert same(part.generate(tokens, assistant_model=helped, **GREEDY), expected)
    assert same(whole.generate(tokens, assistant_model=helped, **GREEDY), expected)


def test_prompts_are_looked_up_for_tokens(models, device):
    whole, part = models
    tokens = TOKENS[:1].to(device).repeat(1, 3)
    expected = whole.generate(tokens, prompt_lookup_num_tokens=2, **GREEDY)
    assert same(part.generate(tokens, prompt_lookup_num_tokens=2, **GREEDY), expected)


def tokenizer():
    """A tokenizer of 128 words, "w0" to "w127"."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


def test_pipelines_run(models):
    whole, part = models
    texts = []
    for model in (whole, part):
        generates = pipeline("text-generation", model=model, tokenizer=tokenizer(), return_full_text=False)
        texts.append(generates("w5 w6 w7", **GREEDY)[0]["generated_text"])
    assert len(texts[0].split()) == 6
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("build", "away"),
    [
        (t5, ["encoder.block.0", "decoder.block.0"]),
        (berts, ["encoder.embeddings", "decoder.bert.encoder.layer.0"]),
    ],
    ids=["t5", "berts"],
)
def test_encoder_may_be_called_and_what_it_gives_be_decoded(loaded, device, build, away):
    whole, part = loaded(build, *away)
    assert part.device == device
    encoded = [
        whole.get_encoder()(TOKENS.to(device)),
        part.get_encoder()(TOKENS),
        part.get_encoder()(TOKENS.to(device), attention_mask=torch.ones_like(TOKENS)),
    ]
    assert all(same(one.last_hidden_state, encoded[0].last_hidden_state) for one in encoded)
    expected = whole.generate(TOKENS.to(device), **GREEDY)
    assert same(part.generate(TOKENS, **GREEDY), expected)
    assert same(part.generate(TOKENS.to(device), **GREEDY), expected)
    assert same(part.generate(encoder_outputs=encoded[1], **GREEDY), expected)


def test_towers_of_an_image_model_may_be_called(loaded, device):
    whole, part = loaded(clip, "text_model.embeddings", "vision_model.encoder.layers.0", "text_model.encoder.layers.1")
    assert part.text_model.device == part.vision_model.device == device
    pixels = torch.rand(2, 3, 32, 32).bfloat16()
    with torch.no_grad():
        for call, given in (("get_image_features", pixels), ("get_text_features", TOKENS)):
            found = [
                getattr(made, "pooler_output", made)
                for made in (
                    getattr(whole, call)(given.to(device)),
                    getattr(part, call)(given),
                    getattr(part, call)(given.to(device)),
                )
            ]
            assert found[1].device == device
            assert same(found[1], found[0])
            assert same(found[2], found[0])
        expected = whole(input_ids=TOKENS.to(device), pixel_values=pixels.to(device)).logits_per_text
        assert same(part(input_ids=TOKENS, pixel_values=pixels).logits_per_text, expected)


def test_adapters_are_trained_on_batches_from_wherever_they_are(models, device):
    pytest.importorskip("peft")
    whole, part = models
    expected = lora_losses(whole, TOKENS.to(device), 3)
    assert lora_losses(part, TOKENS, 3) == expected


@pytest.mark.parametrize("there", [True, False], ids=["its device", "cpu"])
def test_compiled_it_gives_what_it_gives(models, device, there):
    whole, part = models
    tokens = TOKENS.to(device if there else "cpu")
    compiled = torch.compile(part, backend="eager")
    with torch.no_grad():
        found = compiled(tokens).logits
        assert found.device == tokens.device
        assert same(found, whole(TOKENS.to(device)).logits)


def test_compiling_asks_nothing_of_modules_that_are_freed_meanwhile(loaded, device):
    """What lists of modules have held, anywhere in the process, is no concern of a compiled forward."""
    _, part = loaded(llama, *OFF["most"])
    others = [torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(20)]) for _ in range(40)]
    before = len(others)

    def backend(graph, inputs):
        others.pop()
        gc.collect()
        return graph.forward

    tokens = TOKENS.to(device)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = part(tokens).logits
        assert same(torch.compile(part, backend=backend)(tokens).logits, expected)
    assert len(others) < before


@pytest.mark.cuda
def test_embedding_that_the_cpu_computes_gives_the_same(tmp_path):
    folder = save_checkpoint(llama().bfloat16(), tmp_path)
    whole = load_and_quantize_model(empty(llama), "nf4", folder, device_map=0).eval()
    device_map, offload = {"": 0, "model.embed_tokens": "cpu"}, OffloadConfig(execute="cpu")
    part = load_and_quantize_model(empty(llama), "nf4", folder, device_map=device_map, offload=offload).eval()
    expected = whole.generate(TOKENS.cuda(), **GREEDY)
    for tokens in (TOKENS, TOKENS.cuda()):
        assert same(part(tokens).logits, whole(TOKENS.cuda()).logits)
        assert same(part.generate(tokens, **GREEDY), expected)


@pytest.mark.multi_gpu
@pytest.mark.cuda
def test_two_gpus_generate_with_an_embedding_on_neither(tmp_path):
    folder = save_checkpoint(llama().bfloat16(), tmp_path)
    whole = load_and_quantize_model(empty(llama), "nf4", folder, device_map=0).eval()
    device_map = {"": 0, "model.embed_tokens": "cpu", "model.layers.1": 1}
    part = load_and_quantize_model(empty(llama), "nf4", folder, device_map=device_map).eval()
    assert part.device == part.model.device == torch.device("cuda", 0)
    expected = whole.generate(TOKENS.cuda(), **GREEDY)
    for device in ("cpu", 0, 1):
        assert part(TOKENS.to(device)).logits.device == TOKENS.to(device).device
        assert same(part.model(TOKENS.to(device)).last_hidden_state, whole.model(TOKENS.cuda()).last_hidden_state)
    assert same(part.generate(TOKENS, **GREEDY), expected)
    part.offload.remove()
    assert same(part.generate(TOKENS.cuda(), **GREEDY), expected)
