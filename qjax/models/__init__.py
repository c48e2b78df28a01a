"""Language models to quantize: a Flax decoder, its loaders, tokenizers and generation loop."""

from qjax.models.cache import KVCache, init_cache, positions_of
from qjax.models.config import ModelConfig, RopeScaling
from qjax.models.decoder import Decoder
from qjax.models.generate import Generation, generate
from qjax.models.load import LoadedModel, load, load_gguf, load_hf
from qjax.models.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "Generation",
    "KVCache",
    "LoadedModel",
    "ModelConfig",
    "RopeScaling",
    "Tokenizer",
    "generate",
    "init_cache",
    "load",
    "load_gguf",
    "load_hf",
    "positions_of",
]
