"""Ask a registered version one prompt: text as it is written, and how fast it was.

The version is loaded as anybody would load it, by MLflow and with the code that travels with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import UserError
from tasks.register import registry
from tasks.register.registry import VersionRecord
from tasks.speculate.choose import Choice, Greedy, Sampled
from tasks.speculate.decode import Writer
from tasks.speculate.parts import NotSpeculableError, parts_of
from tasks.speculate.trial import require_exact

#: Told of text as it is written.
Listener = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest. seed: the same numbers, the same text."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def choice(self, longest: int) -> Choice:
        if self.temperature == 0:
            return Greedy()
        return Sampled(1, longest, temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class Written:
    """An answer. seconds: with its prompt. tokens_per_pass: of the model."""

    text: str
    tokens: list[int]
    seconds: float
    tokens_per_pass: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return len(self.tokens) / max(self.seconds, 1e-9)


class Version:
    """A version that writes, loaded.

    has_heads: whether it writes with Turbo heads.
    """

    def __init__(self, home: Path, record: VersionRecord) -> None:
        """Raises a UserError for a version that writes no text, or whose base cannot be walked."""
        import mlflow

        mlflow.set_tracking_uri(registry.tracking_uri(home))
        name = f"{record.name}/{record.version}"
        loaded = mlflow.pyfunc.load_model(f"models:/{name}")
        self.served: Any = loaded.unwrap_python_model()
        task = self.served.serving["task"]
        if task != "causal-lm":
            raise UserError.at(
                name,
                f"is a {task} model, and generate streams what a causal language model writes",
                f"ask it in Python: mlflow.pyfunc.load_model('models:/{name}').predict([...])",
            )
        self.has_heads = self.served.writer is not None
        try:
            self._plain = Writer(parts_of(self.served.model))
            require_exact(self._plain)
        except NotSpeculableError as error:
            raise UserError.at(
                name,
                str(error),
                f"ask it in Python: mlflow.pyfunc.load_model('models:/{name}').predict([...])",
            ) from error

    def write(
        self,
        prompt: str,
        longest: int | None,
        sampling: Sampling,
        *,
        heads: bool,
        listener: Listener | None = None,
    ) -> Written:
        """The answer to one prompt. longest: tokens; None: what the version says."""
        longest = longest or int(self.served.serving["max_new_tokens"])
        asked = list(self.served.ask(prompt, longest))
        stops = frozenset(self.served.serving["stop_ids"])
        stream = Stream(self.served.tokenizer, stops, listener)
        writer = self.served.writer if heads and self.has_heads else self._plain
        with torch.inference_mode():
            started = time.perf_counter()
            (tokens,), account = writer.write(
                [asked], longest, stops, sampling.choice(longest), stream
            )
            seconds = time.perf_counter() - started
        stream.end()
        return Written(stream.text, tokens, seconds, account.tokens_per_pass)


class Stream:
    """Tokens as text, told as soon as their characters are whole."""

    def __init__(self, tokenizer: Any, stops: frozenset[int], listener: Listener | None) -> None:
        self.tokenizer, self.stops, self.listener = tokenizer, stops, listener
        self.tokens: list[int] = []
        self.text = ""

    def __call__(self, row: int, tokens: list[int]) -> None:
        self.tokens += [token for token in tokens if token not in self.stops]
        # A character of several tokens reads as U+FFFD until its last one is there.
        if not (text := self._read()).endswith("\ufffd"):
            self._tell(text)

    def end(self) -> None:
        self._tell(self._read())

    def _read(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        if self.listener is not None and len(text) > len(self.text):
            self.listener(text[len(self.text) :])
        self.text = text
