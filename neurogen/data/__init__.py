"""Text -> ids -> lanes: what the model reads, and in which order."""

from neurogen.data.batches import Batch, Batches, LaneBatches, RandomBatches, validation_batches
from neurogen.data.config import DataConfig
from neurogen.data.corpus import Corpus, build_corpus, open_corpus
from neurogen.data.serving import make_batches
from neurogen.data.stream import TokenStream
from neurogen.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

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
