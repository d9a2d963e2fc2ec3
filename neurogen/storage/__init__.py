"""Files that are whole or absent: atomic writes, strict JSON, named tensors with every fault in one line."""
