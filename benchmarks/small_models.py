"""Small models of many classes of transformers and diffusers, made from configs alone, and inputs for their forwards.

Nothing is known of a class beside what its config and its forward's parameters are called: sizes are shrunk by their
names, and inputs are made by theirs. What cannot be built or fed so is left out of the sweep.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

# Sizes by what a field's name matches first; a size is never made larger than its default.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(num_|n_)?(experts_per_tok|experts_per_token)|moe_topk|moe_k|top_?k_experts|num_selected_experts", 2),
    (r"(num_|n_)?(local_|routed_)?experts|num_total_experts|moe_num_experts", 4),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r".*(key_value|kv|query_group)_?.*heads?", 2),
    (r".*(attention_)?heads?|(n|num)_(head|heads)|nheads?", 4),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_|block_)?(layers?|blocks)|depth|n_layer|.*_layers|num_.*blocks?", 2),
    (r"(v_|qk_nope_|qk_rope_|attention_|attn_|global_)?head_dim|d_kv|kv_channels|qk_head_dim|attention_head_size", 16),
    (r"(q|kv|o|v)_lora_rank", 16),
    (
        r"(.*_)?(moe_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|feed_forward.*|mlp_hidden_size|mlp_dim)",
        128,
    ),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|projection_dim|hidden_dim|d_embed|emb_dim|dim)", 64),
    (r"(.*_)?vocab_size.*|(.*_)?num_embeddings", 96),
    (r"(max|n)_(position.*|positions|target_positions|seq_len.*|sequence_length)|max_text_len|n_ctx", 64),
    (r"max_source_positions", 16),
    (r"num_mel_bins|feature_size", 16),
    (r"image_size|input_size|sample_size|crop_size", 32),
    (r"num_(queries|labels)|num_query_tokens", 8),
)
_KEPT = re.compile(r".*(token_id|_index|dropout|eps|theta|prob|std|scale|factor|ratio).*")
# The classes of each type of model, the first of them that there is.
_TASKS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
MAX_PARAMETERS = 15_000_000  # of a model that is small enough

Build = Callable[[], nn.Module]


class NotBuiltError(Exception):
    """A class that no small model could be made of, or none that runs with the inputs made for it."""


def class_names(library: str) -> list[str]:
    """Return the names of the classes that are tried: one for each type of model of transformers, all of diffusers."""
    if library == "transformers":
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
        tasks = [getattr(auto, task, {}) for task in _TASKS]
        types = dict.fromkeys(kind for task in tasks for kind in task)
        named = [next(task[kind] for task in tasks if kind in task) for kind in types]
        return list(dict.fromkeys(name if isinstance(name, str) else name[0] for name in named))
    diffusers = importlib.import_module("diffusers")
    classes = [(name, getattr(diffusers, name)) for name in dir(diffusers) if not name.startswith("_")]
    models = [(name, cls) for name, cls in classes if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)]
    return [name for name, cls in models if cls is not diffusers.ModelMixin]


def builder(library: str, name: str) -> Build:
    """Return what builds a small model of a class, the same each time it is called with the same seed.

    Raises:
        NotBuiltError: none of the ways that are tried builds it.
    """
    try:
        cls: Any = getattr(importlib.import_module(library), name)
    except (AttributeError, ImportError) as error:
        raise NotBuiltError(str(error)) from error
    why: list[str] = []
    for build in (_of_transformers if library == "transformers" else _of_diffusers)(cls):
        try:
            with torch.device("meta"):
                model = build()
            parameters = sum(parameter.numel() for parameter in model.parameters())
            if parameters <= MAX_PARAMETERS:
                return build
            why.append(f"{parameters / 1e6:.0f} million parameters")
        except Exception as error:  # configs and models raise anything
            why.append(f"{type(error).__name__}: {error}")
    raise NotBuiltError(why[0] if why else "no config")


def _of_transformers(cls: Any) -> Iterator[Build]:
    config_class = cls.config_class
    for leave in ((), ("head_dim", "kv"), ("hidden_size", "embed_dim", "dim"), ("heads",), ("layers",)):
        try:
            fields = _shrunk_config(config_class, leave)
            config_class(**fields)
        except Exception:  # the next way may do
            continue

        def build(fields: Mapping[str, Any] = fields) -> nn.Module:
            config = config_class(**fields)
            config._attn_implementation = "eager"
            return cls(config)  # type: ignore[no-any-return]

        yield build


def _shrunk_config(config_class: Any, leave: tuple[str, ...]) -> dict[str, Any]:
    default, fields = config_class(), {}
    for name, value in default.to_dict().items():
        inner = getattr(default, name, None)
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            small = _shrunk_config(type(inner), leave)
            fields[name] = {**small, "model_type": inner.model_type}
        else:
            small_value = _shrunk(name, value, leave)
            if small_value != value:
                fields[name] = small_value
    pad = getattr(default, "pad_token_id", None)
    if isinstance(pad, int) and pad >= 96:
        fields["pad_token_id"] = 0
    return fields


def _shrunk(name: str, value: Any, leave: tuple[str, ...] = ()) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or _KEPT.fullmatch(name):
        return value
    if any(part in name for part in leave):
        return value
    return next((min(size, value) for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)


def _of_diffusers(cls: Any) -> Iterator[Build]:
    given = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    # Rotary tables fix the size of a head, so that it is left as it is; few heads make the model narrow.
    few: dict[str, int]
    for few in ({}, {"attention_head_dim": 16}, {"block_out_channels": 32}):
        fields = {name: _shrunk_of_diffusers(name, value, few) for name, value in given.items()}
        wide, narrow = (_width(each) for each in (given, fields))
        # Some are told their own width again: SD3's caption_projection_dim.
        fields |= {name: narrow for name, value in given.items() if wide and value == wide}
        yield lambda fields=fields: cls(**fields)


def _width(fields: Mapping[str, Any]) -> int | None:
    heads, size = fields.get("num_attention_heads"), fields.get("attention_head_dim")
    return heads * size if isinstance(heads, int) and isinstance(size, int) else None


def _shrunk_of_diffusers(name: str, value: Any, few: Mapping[str, int]) -> Any:
    if name in few and isinstance(value, int):
        return few[name]
    if name in few and isinstance(value, (tuple, list)):
        return type(value)([few[name]] * len(value))
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if re.fullmatch(r".*layers.*|.*depth.*|nlayers|num_.*blocks", name):
        return min(value, 1 if "refiner" in name else 2)
    if re.fullmatch(r"num.*heads|nheads", name):
        return min(value, 2)
    if re.fullmatch(r".*(ffn_dim|intermediate_size|ff_dim).*", name):
        return min(value, 64)
    if re.fullmatch(r".*(text_dim.*|joint_attention_dim|caption_channels|text_embed.*|pooled.*|text_in.*)", name):
        return min(value, 32)
    return value


def inputs_of(model: Any) -> Iterator[dict[str, Any]]:
    """Make inputs for a model's forward by the names of its parameters, one likely set after the other."""
    return _inputs_of_transformers(model) if hasattr(model, "main_input_name") else _inputs_of_diffusers(model)


def _inputs_of_transformers(model: Any) -> Iterator[dict[str, Any]]:
    taken = inspect.signature(model.forward).parameters
    config = model.config
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    tokens = torch.arange(3, 15).view(1, 12) % 90
    texts = {name: tokens for name in ("input_ids", "decoder_input_ids") if name in taken}
    texts |= {"attention_mask": torch.ones_like(tokens)} if "attention_mask" in taken else {}
    if "input_ids" in taken:
        yield texts
        yield {"input_ids": tokens}
    decoder = {"decoder_input_ids": tokens[:, :6]} if "decoder_input_ids" in taken else {}
    if "pixel_values" in taken:
        for size in dict.fromkeys([*_sizes(parts, "image_size"), 32, 64]):
            for channels in dict.fromkeys([*_sizes(parts, "num_channels"), 3]):
                image = torch.linspace(-1, 1, channels * size * size).view(1, channels, size, size)
                yield {"pixel_values": image, **decoder}
                yield {"pixel_values": image, "input_ids": tokens}
    if "input_features" in taken:
        for mels in dict.fromkeys([*_sizes(parts, "num_mel_bins"), *_sizes(parts, "feature_size"), 16]):
            for length in (32, 24):
                features = torch.linspace(-1, 1, mels * length).view(1, mels, length)
                yield {"input_features": features, **decoder}
                yield {"input_features": features.transpose(1, 2).contiguous(), **decoder}
    if "input_values" in taken:
        wave = torch.linspace(0, 400, 4000).sin().view(1, -1)
        yield {"input_values": wave, **decoder}
        yield {"input_values": wave[:, None], **decoder}
    if "inputs_embeds" in taken and "input_ids" not in taken:
        for width in _sizes(parts, "hidden_size"):
            yield {"inputs_embeds": torch.linspace(-1, 1, 12 * width).view(1, 12, width)}


def _sizes(parts: list[Any], name: str) -> list[int]:
    values = [getattr(part, name, None) for part in parts]
    flat = [value[0] if isinstance(value, (list, tuple)) and value else value for value in values]
    return [value for value in flat if isinstance(value, int)]


def _inputs_of_diffusers(model: Any) -> Iterator[dict[str, Any]]:
    taken = inspect.signature(model.forward).parameters
    config = dict(model.config)
    first = next(iter(taken))
    channels = config.get("in_channels") or config.get("in_visual_dim") or 3
    texts = [value for name, value in config.items() if isinstance(value, int) and _IS_WIDTH_OF_TEXT.fullmatch(name)]
    shapes = ((1, channels, 8, 8), (1, channels, 32, 32), (1, channels, 1, 8, 8), (1, channels, 5, 32, 32))
    shapes += ((1, 16, channels), (1, channels, 16), (1, 2, channels, 8, 8), (1, channels, 256))
    for shape in shapes:
        for width in dict.fromkeys([*texts, channels, 64]):
            for time in (torch.tensor([5.0]), torch.tensor([5])):
                known = _by_name(config, shape, width, time) | {first: _ramp(shape)}
                always = _ALWAYS | ({"guidance"} if config.get("guidance_embeds") else set())
                yield {
                    name: known[name]
                    for name, parameter in taken.items()
                    if name in known and (parameter.default is parameter.empty or name in always)
                }


_IS_WIDTH_OF_TEXT = re.compile(
    r".*(text_dim|joint_attention_dim|cross_attention_dim|caption_channels|text_embed_dim).*"
)
_ALWAYS = {"encoder_hidden_states", "timestep", "img_ids", "txt_ids", "pooled_projections", "class_labels"}
_ALWAYS |= {"img_shapes", "added_cond_kwargs", "num_frames", "height", "width", "padding_mask"}


def _by_name(config: Mapping[str, Any], shape: tuple[int, ...], width: int, time: torch.Tensor) -> dict[str, Any]:
    text = _ramp((1, 7, width))
    masks = dict.fromkeys(
        ("encoder_attention_mask", "encoder_hidden_states_mask", "prompt_attention_mask"), torch.ones(1, 7)
    )
    axes = len(config.get("axes_dims_rope") or (0, 0, 0))
    grid = _ramp((shape[1] if len(shape) == 3 else 16, axes))
    pooled = config.get("pooled_projection_dim") or width
    return masks | {
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": None,
        "timestep": time,
        "timesteps": time,
        "class_labels": torch.tensor([1]),
        "pooled_projections": _ramp((1, pooled)),
        "pooled_text_embeds": _ramp((1, pooled)),
        "img_ids": grid,
        "txt_ids": torch.zeros(7, axes),
        "guidance": torch.tensor([1.0]),
        "fps": torch.tensor([8]),
        "controlnet_cond": _ramp((1, 3, 64, 64)),
        "img_shapes": [[(1, 4, 4)]],
        "txt_seq_lens": [7],
        "num_frames": 1,  # of 16 tokens of a picture
        "height": 4,
        "width": 4,
        "padding_mask": torch.zeros(1, 1, shape[-2], shape[-1]),
        "original_size": _ramp((1, 2)),
        "target_size": _ramp((1, 2)),
        "crop_coords": _ramp((1, 2)),
        "added_cond_kwargs": {"resolution": _ramp((1, 2)), "aspect_ratio": _ramp((1, 1))},
        "encoder_hid": text,
    }


def _ramp(shape: tuple[int, ...]) -> torch.Tensor:
    """Make values in (-1, 1) that differ from place to place, the same each time."""
    count = 1
    for size in shape:
        count *= size
    return torch.arange(count).mul(0.618).frac().mul(2).sub(1).view(shape)
