"""Turbo heads: what tokens come after the next one, read off the model's own last hidden state.

    h_k = x + SiLU(B_k A_k x + b_k)                      the state that head k puts in x's place
    s_k = SiLU(U s_(k-1) + A_e E[y_k] + A_h x)           what was drafted so far, s_0 = 0
    logits_k = W (h_k + C s_k)                           W: the frozen lm_head, shared by all

x is what the lm_head reads at a token; head k (from 1) guesses the token k + 1 after it, where the
model itself guesses the next one. y_k is the token drafted before it: y_1 the model's own next
one. B and C start at zero, so that each head starts as the model's next-token guess. Medusa
(Cai et al. 2024, arXiv:2401.10774) has a residual layer of full rank and an lm_head for each
head; here rank r and the model's own lm_head make that K (2 d r + d) parameters. The state s makes
a head depend on what was drafted before it, as in Hydra (Ankner et al. 2024, arXiv:2402.05109)
and ReDrafter (Zhang et al. 2024, arXiv:2403.09919), for 3 d s + s^2 parameters in all.

Shapes: K heads, R rank, D hidden width, S width of the state, V vocabulary, N rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "turbo_heads.safetensors"
CONFIG = "turbo_config.json"
#: Of what CONFIG and the tensors mean.
FORMAT = 1


class HeadsError(ValueError):
    """Heads that do not fit: damaged, or made for another model."""


@dataclass(frozen=True)
class HeadsConfig:
    """heads: tokens that are drafted ahead. rank: of each head; 0: none, only the state.
    state: width of what follows the drafted tokens; 0: none.

    made_for: what the heads were trained on, by name: content hashes of the base, of an adapter,
    of the tokenizer. Empty: not known.
    seconds: the time that a pass over so many tokens took where they were trained; a first guess.
    """

    heads: int
    rank: int
    state: int
    hidden_size: int
    vocab_size: int
    made_for: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """K (2 d r + d) of the heads, 3 d s + s^2 of the state."""
        d, s = self.hidden_size, self.state
        return self.heads * (2 * d * self.rank + d) + 3 * d * s + s * s

    @property
    def medusa_parameters(self) -> int:
        """Of Medusa-1 with as many heads: K (d^2 + d + d V)."""
        d = self.hidden_size
        return self.heads * (d * d + d + d * self.vocab_size)


class TurboHeads(nn.Module):
    """The trained part. Weights are float32 as they are trained; `to` gives the model's dtype."""

    def __init__(self, config: HeadsConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        k, r, d, s = config.heads, config.rank, config.hidden_size, config.state
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            # Rows of unit length on average, whatever they read: RMS of 1 in, 1 out.
            return nn.Parameter(torch.randn(shape, generator=generator) * shape[-1] ** -0.5)

        self.down_KRD = drawn(k, r, d)
        self.up_KDR = nn.Parameter(torch.zeros(k, d, r))
        self.bias_KD = nn.Parameter(torch.zeros(k, d))
        if s:
            self.state_SS = drawn(s, s)
            self.state_token_SD = drawn(s, d)
            self.state_hidden_SD = drawn(s, d)
            self.out_DS = nn.Parameter(torch.zeros(d, s))

    def forward(
        self, x_ND: torch.Tensor, rows: list[int], written: list[torch.Tensor] | None
    ) -> list[torch.Tensor]:
        """As training reads them: of each head k what it would have the lm_head read, for the first
        rows[k - 1] of x (no more than of the head before it), [rows, D]. Weights are in x's dtype.

        written: for each head the embeddings of the tokens before its own, with which the state
        goes on, [rows, D]; None: without the state.
        """
        # One product for all: x is read once.
        low_NKR = F.linear(x_ND, self.down_KRD.flatten(0, 1))
        each_NR = low_NKR.view(len(x_ND), *self.down_KRD.shape[:2]).unbind(1)
        begun_NS = None if written is None else self.begin(x_ND)
        state_NS: torch.Tensor | None = None
        found = []
        for k, (count, low_NR) in enumerate(zip(rows, each_NR, strict=True)):
            high_ND = F.linear(low_NR[:count], self.up_KDR[k], self.bias_KD[k])
            h_ND = F.silu(high_ND) + x_ND[:count]
            if written is not None and begun_NS is not None:
                before_NS = None if state_NS is None else state_NS[:count]
                state_NS = self.follow(before_NS, self.read(written[k]), begun_NS[:count])
                h_ND = h_ND + self.correction(state_NS)
            found.append(h_ND)
        return found

    def ahead(self, x_ND: torch.Tensor) -> torch.Tensor:
        """h_KND of each x: what head k would have the lm_head read, before the state's part."""
        low_KNR = x_ND @ self.down_KRD.transpose(1, 2)
        high_KND = torch.baddbmm(self.bias_KD[:, None], low_KNR, self.up_KDR.transpose(1, 2))
        return F.silu(high_KND) + x_ND

    def logits(
        self, x_ND: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], count: int
    ) -> torch.Tensor:
        """[K, N, V] of the first `count` heads, before the state's part."""
        return lm_head(self.ahead(x_ND)[:count])

    def begin(self, x_ND: torch.Tensor) -> torch.Tensor:
        """A_h x, [N, S]: the part of the state that stays the same for all drafts of a row."""
        return F.linear(x_ND, self.state_hidden_SD)

    def read(self, token_ND: torch.Tensor) -> torch.Tensor:
        """A_e E[y], [N, S], of the embeddings of drafted tokens."""
        return F.linear(token_ND, self.state_token_SD)

    def follow(
        self, state_NS: torch.Tensor | None, read_NS: torch.Tensor, begun_NS: torch.Tensor
    ) -> torch.Tensor:
        """s_k from s_(k-1) (None: zero), what was `read` of the token drafted last, and `begin`."""
        sum_NS = read_NS + begun_NS
        if state_NS is not None:
            sum_NS = sum_NS + F.linear(state_NS, self.state_SS)
        return F.silu(sum_NS)

    def correction(self, state_NS: torch.Tensor) -> torch.Tensor:
        """C s, [N, D]: what the state adds to what the lm_head reads."""
        return F.linear(state_NS, self.out_DS)

    def bonus_of(self, scored_MD: torch.Tensor) -> torch.Tensor:
        """w C, [M, S], of some tokens' rows w of the lm_head: what s adds to their logits is the
        product with s, w (C s) = (w C) s, without the model's width."""
        return scored_MD @ self.out_DS

    def save(self, directory: Path) -> None:
        """Write the tensors (float32) and the configuration."""
        tensors = {name: tensor.float().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        record = {"format": FORMAT, **asdict(self.config)}
        (directory / CONFIG).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, directory: Path) -> TurboHeads:
        """Heads as they were saved, frozen, in float32.

        Raises:
            HeadsError: files that are missing, of another format, or not what they say.
        """
        config = read_config(directory)
        with torch.device("meta"):
            heads = cls(config)
        try:
            tensors = load_file(directory / WEIGHTS)
            heads.load_state_dict(tensors, assign=True)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise HeadsError(f"{directory / WEIGHTS} cannot be read: {error}") from error
        return heads.requires_grad_(False).eval()


def is_heads(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def read_config(directory: Path) -> HeadsConfig:
    """Raises a HeadsError for what is no configuration of this format."""
    path = directory / CONFIG
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if (found := record.pop("format", None)) != FORMAT:
            raise HeadsError(f"{path} has format {found}, and this reads {FORMAT}")
        return HeadsConfig(**record)
    except (OSError, ValueError, TypeError) as error:
        raise error if isinstance(error, HeadsError) else HeadsError(f"{path}: {error}") from error
