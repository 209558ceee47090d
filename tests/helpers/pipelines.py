"""Tiny pipelines of diffusers, one for each kind of transformer: random weights, built from configs, 16 x 16 images."""

from functools import partial

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

diffusers = pytest.importorskip("diffusers")

_WIDTH = 32  # of the text encoders
_LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]


def _vae(**options):
    config = {"block_out_channels": (8,), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1}
    return diffusers.AutoencoderKL(**config, sample_size=16, **options).eval()


def _flux():
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=_WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=_WIDTH, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=64, d_model=_WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=_WIDTH, pooled_projection_dim=_WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5TokenizerFast(words, extra_ids=0, model_max_length=64),
        transformer=transformer.eval(),
    )


def _without_text(cls, scheduler, **modules):
    nothing = dict.fromkeys(set(cls._optional_components) | {"text_encoder", "tokenizer"})
    if cls is diffusers.StableDiffusion3Pipeline:
        nothing |= dict.fromkeys(f"{what}_{i}" for what in ("text_encoder", "tokenizer") for i in (2, 3))
    return cls(**{**nothing, "scheduler": scheduler, **{name: module.eval() for name, module in modules.items()}})


def _sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=_WIDTH, caption_projection_dim=32, pooled_projection_dim=_WIDTH,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    vae = _vae(shift_factor=0.06, scaling_factor=1.5)
    return _without_text(diffusers.StableDiffusion3Pipeline, scheduler, transformer=transformer, vae=vae)


def _pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, caption_channels=_WIDTH,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return _without_text(diffusers.PixArtSigmaPipeline, scheduler, transformer=transformer, vae=_vae())


def _wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=_WIDTH, freq_dim=32,
        ffn_dim=64, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return _without_text(diffusers.WanPipeline, scheduler, transformer=transformer, vae=vae)


def _unet():
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=_WIDTH, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return _without_text(diffusers.StableDiffusionPipeline, scheduler, unet=unet, vae=_vae())


BUILD = {"flux": _flux, "sd3": _sd3, "pixart": _pixart, "wan": _wan, "unet": _unet}


def pipeline(kind):
    """Build a pipeline. Its transformer is `transformer`, or `unet`."""
    torch.manual_seed(0)
    made = BUILD[kind]()
    made.set_progress_bar_config(disable=True)
    return made


def denoiser(kind):
    """Return the name of the component that is worth quantizing."""
    return "unet" if kind == "unet" else "transformer"


def image(pipe, kind):
    """Run two steps. Returns the image, or frames, in [0, 1] on the CPU."""
    made = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=made)
    device = pipe._execution_device
    text = {"prompt_embeds": random(1, 7, _WIDTH).to(device)}
    more = {}
    if kind == "flux":
        text, more = {"prompt": "a cat"}, {"max_sequence_length": 16}
    elif kind == "sd3":
        text["pooled_prompt_embeds"] = random(1, _WIDTH).to(device)
    elif kind == "pixart":
        text["prompt_attention_mask"] = torch.ones(1, 7, device=device)
        text["negative_prompt"] = None
        more = {"use_resolution_binning": False}
    elif kind == "wan":
        more = {"num_frames": 5}
    if kind != "flux":
        more["guidance_scale"] = 1.0
    out = pipe(**text, height=16, width=16, num_inference_steps=2, output_type="pt", generator=made, **more)
    frames = out.frames if kind == "wan" else out.images
    assert frames.isfinite().all()
    return frames.float().cpu()
