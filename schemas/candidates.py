"""Candidates: what a recipe says of each tuning method, a class with its hyper-parameters for each.

`tasks/methods/` has a file for each that builds it.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from schemas.frozen import NAME, Frozen
from schemas.manifest import ModelFormat
from schemas.turbo import Turbo


class TrainOverrides(Frozen):
    """What one candidate does differently from the recipe's `train`."""

    epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    batch_tokens: int | None = Field(None, ge=1)
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)


class CandidateBase(Frozen):
    """What every candidate has, whatever its method.

    MERGES: whether `finish.merge` folds it into the base. Of what does not, `full` is whole
        already, and the others are served beside their base.
    TRAINS: whether it learns, at a rate.
    FORMAT: what training leaves of it; of a `prompt` nothing is trained.
    ALONE: why it cannot learn together with another (`schemas/together.py`); empty: it can.
    CHANGES: what it changes. Two with a word in common cannot learn together.
    LAYER: its place among others on one base: what is inside of layers, and around them, and
        before the row.
    HEADLESS: why no Turbo heads can be trained for it; empty: they can.
    """

    MERGES: ClassVar[bool] = True
    TRAINS: ClassVar[bool] = True
    FORMAT: ClassVar[ModelFormat] = "peft-adapter"
    ALONE: ClassVar[str] = ""
    CHANGES: ClassVar[frozenset[str]] = frozenset()
    LAYER: ClassVar[int] = 0
    HEADLESS: ClassVar[str] = ""

    name: str | None = Field(None, pattern=NAME, description="Shown in tables; unique.")
    train: TrainOverrides = Field(default_factory=TrainOverrides)

    method: str

    @property
    def label(self) -> str:
        return self.name or self.default_name()

    @property
    def seeded(self) -> bool:
        """Whether it depends on the seed; else one result stands for all."""
        return self.TRAINS

    @property
    def parts(self) -> tuple[CandidateBase, ...]:
        """The methods that learn: itself, or those of a composition, in their order on a base."""
        return (self,)

    def default_name(self) -> str:
        return self.method

    def as_trained(self) -> CandidateBase:
        """Of it what decides its training, beside the schedule: two that are the same here are
        trained once."""
        return self.model_copy(update={"name": None, "train": TrainOverrides()})

    def heads(self) -> Turbo | None:
        """The Turbo heads that belong to it, beside those of the recipe's `finish`."""
        return None


class Full(CandidateBase):
    """Every weight of the base is trained."""

    MERGES: ClassVar[bool] = False
    FORMAT: ClassVar[ModelFormat] = "transformers"
    ALONE: ClassVar[str] = "trains every weight of the base already"

    method: Literal["full"]


class PromptBase(CandidateBase):
    """What has no weights: the base as it is, and what stands before a question."""

    MERGES: ClassVar[bool] = False
    TRAINS: ClassVar[bool] = False
    FORMAT: ClassVar[ModelFormat] = "prompt"
    ALONE: ClassVar[str] = "trains nothing"

    @model_validator(mode="after")
    def _nothing_is_trained(self) -> PromptBase:
        if self.train != TrainOverrides():
            raise ValueError(f"{self.method} trains nothing: remove `train`")
        return self


class ZeroShot(PromptBase):
    """The base as it is, asked with the prompt alone: the yardstick of all that adds to it."""

    method: Literal["zero_shot", "none"] = Field(description="none: another word for zero_shot.")

    @field_validator("method")
    @classmethod
    def _one_word(cls, method: str) -> str:
        return "zero_shot"


class FewShot(PromptBase):
    """The base as it is, with train rows in front of each prompt. Brown et al. 2020,
    arXiv:2005.14165."""

    HEADLESS: ClassVar[str] = "shows examples before each prompt, which heads do not learn from"

    method: Literal["few_shot"]
    examples: int = Field(
        4, ge=1, description="At most so many: as many of them as the context holds are shown."
    )
    choose: Literal["similarity", "seed"] = Field(
        "similarity",
        description="similarity: the most alike of all train rows, for each prompt (BM25, "
        "Robertson & Zaragoza 2009), which all ship; seed: the same for all prompts, drawn with "
        "train.seed.",
    )

    @property
    def seeded(self) -> bool:
        return self.choose == "seed"

    def default_name(self) -> str:
        return f"few_shot-{self.examples}" + ("-seed" if self.choose == "seed" else "")


class LoraBase(CandidateBase):
    """What LoRA has whatever its base is kept in."""

    CHANGES: ClassVar[frozenset[str]] = frozenset({"the weights of linear layers"})
    LAYER: ClassVar[int] = 1

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Linear layers by the last part of their name, e.g. [q_proj, v_proj].",
    )
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Other ranks for some of them, by the last part of their name, e.g. "
        "{down_proj: 32}.",
    )
    rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank), which keeps high ranks learning. "
        "Kalajdzievski 2023, arXiv:2312.03732.",
    )
    dora: bool = Field(
        False,
        description="Learn the length of each row of W apart from its direction. "
        "Liu et al. 2024, arXiv:2402.09353.",
    )
    b_rate: float = Field(
        1.0,
        gt=0,
        description="LoRA+: B learns at this many times the rate of A, e.g. 16. "
        "Hayou et al. 2024, arXiv:2402.12354.",
    )

    def default_name(self) -> str:
        kinds = {"rs": self.rslora, "dora": self.dora, "plus": self.b_rate != 1}
        chosen = (kind for kind, on in kinds.items() if on)
        return "-".join([self.method, f"r{self.rank}", *chosen])


class Lora(LoraBase):
    """Low-rank adaptation, W + (alpha / rank) B A. Hu et al. 2021, arXiv:2106.09685."""

    method: Literal["lora"]
    init: Literal["default", "pissa", "olora"] = Field(
        "default",
        description="Where A and B start: default, at an update of zero; pissa, in the largest "
        "singular values of W (Meng et al. 2024, arXiv:2404.02948); olora, in its QR "
        "decomposition (Büyükakyüz 2024, arXiv:2406.01775). Those two ship twice the rank.",
    )

    def default_name(self) -> str:
        start = "" if self.init == "default" else f"-{self.init}"
        return super().default_name() + start


class TurboLora(Lora):
    """LoRA for quality, and Turbo heads for speed once it is the one that is finished. The two
    are trained one after the other: the heads foresee what LoRA has made of the model."""

    ALONE: ClassVar[str] = "is LoRA with heads that come last: compose lora, and set finish.turbo"

    method: Literal["turbo_lora"]  # type: ignore[assignment]
    turbo: Turbo = Field(default_factory=Turbo)

    def as_trained(self) -> CandidateBase:
        values = super().as_trained().model_dump(exclude={"turbo"})
        return Lora.model_validate(values | {"method": "lora"})

    def heads(self) -> Turbo | None:
        return self.turbo


class QLora(LoraBase):
    """LoRA on a base in 4 bits. Dettmers et al. 2023, arXiv:2305.14314."""

    method: Literal["qlora"]
    quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="Levels for weights as they are spread, or evenly for floats."
    )
    double_quantisation: bool = Field(
        True, description="The scales of the blocks are quantised too: 0.37 bits a weight less."
    )


class AdaLora(CandidateBase):
    """LoRA whose ranks go to the layers that need them. Zhang et al. 2023, arXiv:2303.10512."""

    CHANGES: ClassVar[frozenset[str]] = frozenset({"the weights of linear layers"})
    LAYER: ClassVar[int] = 1

    method: Literal["adalora"]
    rank: int = Field(8, ge=1, description="In the end, on average over the layers.")
    initial_rank: int = Field(12, ge=2, description="Of every layer at the start.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / initial_rank.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Linear layers by the last part of their name, e.g. [q_proj, v_proj].",
    )
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps before the first rank is taken away."
    )
    final: float = Field(
        0.3, ge=0, lt=1, description="Share of the steps, the last ones, with the final ranks."
    )
    orthogonality: float = Field(
        0.5, ge=0, description="Weight of the penalty that holds rows of A and columns of B apart."
    )

    @model_validator(mode="after")
    def _ranks_fall(self) -> AdaLora:
        if self.rank >= self.initial_rank:
            raise ValueError(
                f"rank {self.rank} is not below initial_rank {self.initial_rank}, so no rank would "
                "be taken away: raise initial_rank, or use method: lora"
            )
        if self.warmup + self.final >= 1:
            raise ValueError(
                f"warmup {self.warmup} and final {self.final} leave no step in which ranks are "
                "taken away: lower one of them"
            )
        return self

    def default_name(self) -> str:
        return f"adalora-r{self.rank}"


class Ia3(CandidateBase):
    """IA3: keys, values and what the feed-forward reads, each scaled by a learned vector.

    Liu et al. 2022, arXiv:2205.05638.
    """

    CHANGES: ClassVar[frozenset[str]] = frozenset({"the scale of what layers read and write"})
    LAYER: ClassVar[int] = 2

    method: Literal["ia3"]
    target_modules: list[str] | None = Field(
        None,
        description="Linear layers by the last part of their name. null: those that are usual "
        "for the base's kind.",
    )
    feedforward_modules: list[str] | None = Field(
        None, description="Those of target_modules that are scaled where they read."
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> Ia3:
        targets, inside = self.target_modules, self.feedforward_modules
        if (targets is None) != (inside is None):
            raise ValueError("give both `target_modules` and `feedforward_modules`, or neither")
        if extra := sorted(set(inside or ()) - set(targets or ())):
            raise ValueError(f"feedforward_modules has {extra[0]}, which target_modules has not")
        return self


class LayerNorm(CandidateBase):
    """The weights (and biases) of the norms alone. Zhao et al. 2024, arXiv:2312.11420."""

    CHANGES: ClassVar[frozenset[str]] = frozenset({"the norms"})

    method: Literal["layer_norm"]


class LastLayers(CandidateBase):
    """Every weight of the top blocks and of the final norm. Lee et al. 2019, arXiv:1911.03090."""

    #: Inside its blocks nothing is left for another method.
    CHANGES: ClassVar[frozenset[str]] = frozenset(
        {
            "the weights of linear layers",
            "the scale of what layers read and write",
            "the norms",
            "the biases",
            "the top blocks",
        }
    )

    method: Literal["last_layers"]
    layers: int = Field(2, ge=1, description="Blocks to train, counted from the top.")

    def default_name(self) -> str:
        return f"last_layers-{self.layers}"


class BitFit(CandidateBase):
    """The model's own biases and nothing else. Ben Zaken et al. 2022, arXiv:2106.10199."""

    CHANGES: ClassVar[frozenset[str]] = frozenset({"the biases", "the norms"})

    method: Literal["bitfit"]


class Bottleneck(CandidateBase):
    """Adapters of two small layers with a nonlinearity between, inside every block.

    Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; beside the
    feed-forward: He et al. 2022, arXiv:2110.04366.
    """

    MERGES: ClassVar[bool] = False
    CHANGES: ClassVar[frozenset[str]] = frozenset({"the top blocks"})
    LAYER: ClassVar[int] = 3

    method: Literal["bottleneck"]
    placement: Literal["double_sequential", "sequential", "parallel"] = Field(
        "sequential",
        description="After attention and feed-forward, after the feed-forward alone, or beside it.",
    )
    reduction_factor: int = Field(16, ge=1, description="Hidden width over the adapter's.")
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scaling: float = Field(1.0, gt=0, description="Of what the adapter adds.")
    attention_modules: list[str] | None = Field(
        None, description="Where attention ends, by the end of the name. null: known by the base."
    )
    feed_forward_modules: list[str] | None = Field(
        None, description="The feed-forwards, by the end of the name. null: known by the base."
    )

    @model_validator(mode="after")
    def _attention_has_an_adapter(self) -> Bottleneck:
        if self.attention_modules is not None and self.placement != "double_sequential":
            raise ValueError(
                "attention_modules is read by `placement: double_sequential` alone: "
                "remove it, or change the placement"
            )
        return self

    def default_name(self) -> str:
        return f"bottleneck-{self.placement}-{self.reduction_factor}"


class SoftPrompt(CandidateBase):
    """Virtual tokens in front of every row, which the base attends to and which are learned."""

    MERGES: ClassVar[bool] = False
    CHANGES: ClassVar[frozenset[str]] = frozenset({"what stands before a row"})
    LAYER: ClassVar[int] = 4

    virtual_tokens: int = Field(
        20, ge=1, description="Tokens in front of every row. They count towards its length."
    )

    def default_name(self) -> str:
        return f"{self.method.replace('_', '-')}-{self.virtual_tokens}"


class PromptTuning(SoftPrompt):
    """The virtual tokens' embeddings are learned. Lester et al. 2021, arXiv:2104.08691."""

    method: Literal["prompt_tuning"]
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary",
        description="From the embeddings of tokens drawn with train.seed, or from N(0, 1).",
    )


class PTuning(SoftPrompt):
    """The virtual tokens' embeddings are written by a small network that is learned.

    Liu et al. 2021, arXiv:2103.10385.
    """

    method: Literal["p_tuning"]
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden_size: int | None = Field(
        None, ge=1, description="Width of the network. null: that of the base's embeddings."
    )


class PrefixTuning(SoftPrompt):
    """The virtual tokens' keys and values are learned, in every layer.

    Li & Liang 2021, arXiv:2101.00190.
    """

    method: Literal["prefix_tuning"]
    projection: bool = Field(
        False, description="Written by a network of two layers, which is learned, from embeddings."
    )
    hidden_size: int | None = Field(
        None, ge=1, description="Width of that network. null: that of a layer's keys."
    )

    @model_validator(mode="after")
    def _the_width_has_a_network(self) -> PrefixTuning:
        if self.hidden_size is not None and not self.projection:
            raise ValueError(
                "hidden_size is read with `projection: true` alone: remove it, or project"
            )
        return self


class Peft(CandidateBase):
    """Any other tuner of PEFT's, configured in PEFT's own words; served beside its base."""

    MERGES: ClassVar[bool] = False
    ALONE: ClassVar[str] = "does inside of a layer what only PEFT knows"
    #: Fields of every configuration that are not a recipe's to give, and why.
    OURS: ClassVar[dict[str, str]] = {
        "task_type": "it follows from the recipe's `task`",
        "modules_to_save": "the task's head, and nothing else of the base, is trained and kept",
        "base_model_name_or_path": "it is the recipe's `base`",
        "revision": "it is the recipe's `base`",
        "inference_mode": "it is trained here, and frozen where it is served",
        "auto_mapping": "PEFT writes it",
        "peft_version": "PEFT writes it",
        "runtime_config": "it is no part of an adapter",
    }

    method: Literal["peft"]
    peft: dict[str, JsonValue] = Field(
        description="peft_type, e.g. LOHA, and the fields of its configuration as PEFT names them."
    )

    @field_validator("peft")
    @classmethod
    def _only_what_is_not_ours(cls, peft: dict[str, JsonValue]) -> dict[str, JsonValue]:
        kind = peft.get("peft_type")
        if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", kind):
            raise ValueError("name the tuner with `peft_type`, e.g. `peft_type: LOHA`")
        if ours := [f"`{key}`: {why}" for key, why in cls.OURS.items() if key in peft]:
            raise ValueError(f"remove {'; '.join(ours)}")
        return peft

    @property
    def peft_type(self) -> str:
        return str(self.peft["peft_type"])

    def default_name(self) -> str:
        return self.peft_type.lower()


#: Every method by itself.
Single = (
    Full
    | ZeroShot
    | FewShot
    | Lora
    | TurboLora
    | QLora
    | AdaLora
    | Ia3
    | LayerNorm
    | LastLayers
    | BitFit
    | Bottleneck
    | PromptTuning
    | PTuning
    | PrefixTuning
    | Peft
)
