"""Flux with a transformer in 4 bit: quantized as it loads, used in a pipeline, saved, and loaded again.

The pipeline here is a tiny one with random weights, built from configs, so that the script runs in seconds on any
machine. For the real one, set FOLDER to where `hf download black-forest-labs/FLUX.1-dev --local-dir flux` has put it.
"""

import tempfile
from pathlib import Path

import diffusers
import torch

import bigload

FOLDER = None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_tiny_flux(folder: Path) -> None:
    """Write a pipeline as diffusers does; it has no text encoders, so that it takes embeddings instead of a prompt."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=16,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    diffusers.FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **text).save_pretrained(folder)


def load_transformer(folder: Path, config: str | None) -> diffusers.FluxTransformer2DModel:
    """Build the transformer empty, and quantize its weights while they are read; None takes them as they are."""
    cls = diffusers.FluxTransformer2DModel
    with bigload.init_empty_weights():
        empty = cls.from_config(cls.load_config(folder))
    # device_map="auto" with max_memory={0: "8GiB"} streams what does not fit.
    return bigload.load_and_quantize_model(empty.eval(), config, folder, device_map=DEVICE)


def draw(folder: Path, transformer: diffusers.FluxTransformer2DModel) -> torch.Tensor:
    """Return an image, (1, 3, height, width) in [0, 1], of the pipeline in a folder with this transformer."""
    # Every other part is loaded by diffusers; the tiny pipeline lacks those that are None.
    others = {} if FOLDER else dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.FluxPipeline.from_pretrained(
        folder, transformer=transformer, torch_dtype=transformer.dtype, **others
    ).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    if FOLDER:
        return pipe("a cat on a boat", output_type="pt", generator=noise).images
    embeds = {"prompt_embeds": torch.ones(1, 7, 32), "pooled_prompt_embeds": torch.ones(1, 32)}
    embeds = {name: value.to(DEVICE) for name, value in embeds.items()}
    sizes = {"height": 16, "width": 16, "num_inference_steps": 2}
    return pipe(**embeds, **sizes, output_type="pt", generator=noise).images


def main() -> None:
    """Quantize, draw, save, load and draw again."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, saved = Path(FOLDER or f"{temporary}/flux"), Path(temporary) / "flux-transformer-nf4"
        if not FOLDER:
            write_tiny_flux(folder)

        transformer = load_transformer(folder / "transformer", "nf4")
        print(transformer.load_report)
        image = draw(folder, transformer)

        # The folder has a model card: `hf upload` puts it on the hub. On a GPU, diffusers itself reads it too.
        bigload.save_quantized_model(transformer, saved)
        print(*sorted(path.name for path in saved.iterdir()))
        again = draw(folder, load_transformer(saved, None))
        assert torch.equal(image, again), "the saved folder gives another image"
        print(f"drawn twice: an image of {tuple(image.shape)}, and the same from the saved folder")


if __name__ == "__main__":
    main()
