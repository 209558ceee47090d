"""Models built in the tests."""

import torch
from torch import nn

# The config.json of a model of 8 billion parameters, of which there are no weights here.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}


class Attention(nn.Module):
    """Causal self-attention as minGPT writes it, with its mask as a persistent buffer."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))
        self.heads = heads

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.bias[:, :, :time, :time] == 0, float("-inf"))
        mixed = scores.softmax(dim=-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, block_size)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """A plain module in minGPT's shape and names."""

    def __init__(self, vocab=96, width=64, heads=2, layers=2, block_size=16, tied=False) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(block_size, width),
                "h": nn.ModuleList(Block(width, heads, block_size) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class Layers(nn.Module):
    """Sizes that fill blocks and that do not, an odd number of values, and a name that ends in another's."""

    def __init__(self):
        super().__init__()
        self.c_proj = nn.Linear(160, 128)  # 320 blocks: their nested scales take more than one
        self.norm = nn.LayerNorm(128)
        self.proj = nn.Linear(128, 35, bias=False)
        self.odd = nn.Linear(35, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.odd(torch.relu(self.proj(self.norm(self.c_proj(x))))))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.fc2 = nn.Linear(128, 64, bias=False)


class Blocks(nn.Module):
    """Two blocks between an embedding and a head, and three buffers of the model's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList([Pair(), Pair()])
        self.register_buffer("positions", torch.arange(7))
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))
        self.register_buffer("running_mean", torch.ones(5))
        self.head = nn.Linear(64, 10)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer.fc2(layer.norm(layer.fc1(x)))
        return self.head(x)


class Attended(nn.Module):
    """Holds nn.MultiheadAttention, whose out_proj is a subclass of Linear that it reads past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.leave = nn.Linear(64, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = self.enter(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.leave(mixed))


class Net(nn.Module):
    """A model of named children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


# What any of the language models here can be run on.
TOKENS = torch.arange(10).view(2, 5)


def llama(tied: bool = False, **sizes):
    """A Llama of transformers, random, without weights from anywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **(options | sizes)))


def save_tokenizer(folder, words=None):
    """Write a tokenizer of words: by default of `llama`'s tokens, "w0" to "w126" and "<unk>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(words or [*(f"w{n}" for n in range(127)), "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def t5(**options):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 128, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}
    sizes |= options
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))


def clip(**options):
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= options
    text = sizes | {"vocab_size": 128, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
