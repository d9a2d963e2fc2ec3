"""The installed distribution and its neighbours."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE_TRANSFORMERS = """
import kernels
from transformers import LlamaConfig, LlamaForCausalLM
import torch
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
print(kernels.__file__, tuple(LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape))
"""


def test_transformers_works_beside_our_package_called_kernels():
    # Another distribution has that import name, and transformers imports from it where it believes it is installed.
    result = subprocess.run([sys.executable, "-c", USE_TRANSFORMERS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    path, shape = result.stdout.split(" ", 1)
    assert Path(path) == ROOT / "kernels" / "__init__.py"
    assert shape.strip() == "(1, 3, 40)"


def test_imports_point_one_way():
    """scripts -> neurogen -> kernels: no package imports from one above it."""
    above = {"kernels": ("neurogen", "scripts"), "neurogen": ("scripts",)}
    for package, forbidden in above.items():
        for path in (ROOT / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    assert words[1].split(".")[0] not in forbidden, f"{path}: {line}"
