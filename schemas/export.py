"""The forms in which a registered version leaves for other programs."""

from __future__ import annotations

from typing import Literal

ExportFormat = Literal["peft", "merged", "vllm-medusa", "lorax", "tgi"]
