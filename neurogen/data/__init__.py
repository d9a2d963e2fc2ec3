"""Text -> ids -> lanes: what the model reads, and in which order."""

from neurogen.data.batches import Batch, Batches, LaneBatches, RandomBatches, validation_batches
from neurogen.data.bpe import BpeTokenizer
from neurogen.data.build import build_corpus
from neurogen.data.config import DataConfig
from neurogen.data.corpus import Corpus
from neurogen.data.serving import make_batches
from neurogen.data.stream import TokenStream
from neurogen.data.text_corpus import open_corpus
from neurogen.data.tokenizer import ByteTokenizer, Tokenizer
from neurogen.data.tokenizer_files import load_tokenizer

__all__ = [
    "Batch",
    "Batches",
    "BpeTokenizer",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "LaneBatches",
    "RandomBatches",
    "TokenStream",
    "Tokenizer",
    "build_corpus",
    "load_tokenizer",
    "make_batches",
    "open_corpus",
    "validation_batches",
]
