"""Where the embedded model is: the one that is served where none is named."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny"
"""A folder of the usual layout: config.json, safetensors, tokenizer, chat template."""
