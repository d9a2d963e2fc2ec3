"""Documents packed into one lane: which tokens may see which."""

import torch
from torch import Tensor


def segment_index(document_start: Tensor) -> Tensor:
    """Number of document starts up to and including each token.

    Arguments:
        document_start: `[..., T]` bool, true where a new document begins.

    Returns:
        `[..., T]` int64. 0 means the token still belongs to the document of the carried state; two tokens are of one
        document exactly when their numbers are equal.
    """
    return document_start.to(torch.int64).cumsum(-1)
