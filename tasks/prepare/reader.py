"""The base's tokenizer as this stage uses it: how rows become text, and what stops an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from schemas.errors import UserError
from schemas.recipe import Data
from schemas.rows import TEXTS, Kind
from schemas.tasks import Task, is_encoder_decoder, is_labelled
from tasks.core.progress import warn
from tasks.prepare.compose import ComposedTemplate
from tasks.prepare.render import ChatTemplate, render_plain
from tasks.prepare.spans import Rules
from tasks.prepare.tokenize import TextRules

Template = Literal["chat", "plain", "none"]


@dataclass(frozen=True)
class Reader:
    """tokenizer: of transformers; backend: its `tokenizers.Tokenizer`, which does the work."""

    tokenizer: Any
    backend: Any
    template: Template
    data: Data
    stops: frozenset[int]

    @property
    def max_length(self) -> int:
        return self.data.max_length

    def rules(self, kind: Kind) -> Rules:
        add_special = self.template != "chat" or kind in TEXTS
        return Rules(
            max_length=self.data.max_length,
            on_overflow=self.data.on_overflow,
            add_special=add_special,
            suffix=suffix_tokens(self.backend) if add_special else 0,
            bos=self.tokenizer.bos_token_id,
            stops=self.stops,
            eos=-1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id,
        )

    def text_rules(self, kind: Kind, *, compose: bool = True) -> TextRules:
        """compose: join the texts of chats from the template's literals, which is faster."""
        if kind in TEXTS:
            return TextRules()
        stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stops))
        if self.template == "none":
            return TextRules(stop_words=stops)
        if self.template == "plain":
            return TextRules(render_plain, [], stops)
        render = (ComposedTemplate if compose else ChatTemplate)(self.tokenizer)
        words = special_words(self.backend)
        return TextRules(render, words, words)


def special_words(backend: Any) -> list[str]:
    """The special tokens as they would be spelled in a text."""
    added = backend.get_added_tokens_decoder().values()
    return sorted({token.content for token in added if token.special and token.content})


def open_reader(base: Path, task: Task, data: Data, kinds: set[Kind]) -> Reader:
    """Load the tokenizer and settle how rows become text.

    Raises:
        UserError: no tokenizer, no EOS token, or no chat template where one is needed.
    """
    from tasks.core.models import load_tokenizer  # torch: not in the worker processes

    try:
        tokenizer = load_tokenizer(base)
    except (OSError, ValueError) as error:
        raise UserError.at(
            base,
            f"its tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            "the directory needs tokenizer.json and tokenizer_config.json",
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError.at(
            base,
            f"{type(tokenizer).__name__} has no fast tokenizer, so that answers cannot be found",
            "convert it once to tokenizer.json",
        )
    check_length(base, data.max_length)
    backend.no_padding()
    backend.no_truncation()
    if is_labelled(task):
        return Reader(tokenizer, backend, "none", data, frozenset())
    if tokenizer.eos_token_id is None:
        raise UserError.at(
            base,
            "its tokenizer has no EOS token, so that an answer would never end",
            "set eos_token in tokenizer_config.json",
        )
    if is_encoder_decoder(task):
        refuse_template(data)
        return Reader(tokenizer, backend, "none", data, stop_tokens(tokenizer, base))
    template = choose_template(tokenizer, base, data, kinds)
    return Reader(tokenizer, backend, template, data, stop_tokens(tokenizer, base))


def check_length(base: Path, max_length: int) -> None:
    """Raise a UserError for rows that may be longer than the base can read."""
    path = base / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    positions = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(positions, int) and max_length > positions:
        raise UserError.at(
            "data.max_length",
            f"{max_length} tokens, but the base reads at most {positions}",
            f"write `max_length: {positions}` or less",
        )


def refuse_template(data: Data) -> None:
    """Raise a UserError where a template is asked for, but prompt and completion are read apart."""
    if data.template != "auto":
        raise UserError.at(
            "data.template",
            f"`{data.template}` writes prompt and completion as one text, and in seq2seq an "
            "encoder reads the prompt alone",
            "leave it out; what is to stand around a prompt belongs into the rows",
        )


def choose_template(tokenizer: Any, base: Path, data: Data, kinds: set[Kind]) -> Template:
    has_template = bool(tokenizer.chat_template)
    if has_template and data.template != "plain":
        written = tokenizer.get_chat_template()
        if "strftime_now" in written:
            warn(
                "the base's chat template writes today's date into every row: rows prepared on "
                "another day differ. Set a fixed date in the template."
            )
        return "chat"
    if "chat" in kinds:
        if has_template:
            raise UserError.at(
                "data.template",
                "`plain` cannot show rows of `messages`",
                "use `template: chat`, or rows of `prompt` and `completion`",
            )
        raise UserError.at(
            base,
            "its tokenizer has no chat template, and the rows are chats (`messages`)",
            "use a base with a chat template, put chat_template.jinja beside its "
            "tokenizer.json, or give rows of `prompt` and `completion`",
        )
    if data.template == "chat":
        raise UserError.at(
            base,
            "its tokenizer has no chat template, and data.template asks for it",
            "use `template: plain`, or a base with a chat template",
        )
    return "plain"


def stop_tokens(tokenizer: Any, base: Path) -> frozenset[int]:
    """The tokens at which `generate` ends: the tokenizer's EOS and generation_config.json's."""
    stops = {int(tokenizer.eos_token_id)}
    path = base / "generation_config.json"
    if path.exists():
        given = json.loads(path.read_text()).get("eos_token_id")
        stops.update(given if isinstance(given, list) else [] if given is None else [given])
    return frozenset(stops)


def suffix_tokens(backend: Any) -> int:
    """How many special tokens the tokenizer puts behind a text."""
    mask = backend.encode("a").special_tokens_mask
    return mask[::-1].index(0) if 0 in mask else 0
