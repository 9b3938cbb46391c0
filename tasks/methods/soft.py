"""Soft prompts: V virtual tokens in front of every row, which the base attends to.

All that a real token of a causal model sees of the virtual ones is their keys and values, layer
by layer, and these depend on no real token. So every such prompt is a cache of V keys and values,
which all rows of a batch share: prefix tuning learns it as it is; for prompt embeddings one pass
of the base over V tokens gives it. Rows then stand behind it as behind a prompt that was read
before: positions count from V, and padding on either side stays masked. (PEFT's own forward
ignores positions, so that rows padded on the left come out wrong under it, and a decoder with a
classification head reads padding where rows are padded on the right.)

Encoders see in both directions, so their virtual tokens do depend on the real ones: there PEFT's
own forward is used, with rows padded on the right, where it is exact. Of an encoder-decoder
`tasks/methods/soft_pairs.py` says where they stand.

Shapes: B rows, T positions, V virtual tokens, K heads of keys and values, D head width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftType, PromptLearningConfig
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from schemas.candidates import SoftPrompt
from schemas.errors import DivergedError, UserError
from schemas.tasks import is_labelled
from tasks.methods import soft_pairs
from tasks.methods.course import Course
from tasks.methods.method import place, task_settings
from tasks.methods.soft_pairs import decoder_shape, is_pair_model

#: Keys and values of the virtual tokens, [1, K, V, D] each, layer by layer.
Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]

#: Kinds whose first position is not 0, and what it is.
FIRST_POSITIONS = dict.fromkeys(("roberta", "xlm-roberta", "camembert"), 2)


def config(
    model: PreTrainedModel, candidate: SoftPrompt, task: str, kind: Any, **options: Any
) -> PromptLearningConfig:
    """What PEFT is told: a configuration of that kind.

    Sizes are given, as PEFT looks for them under names that not every kind of base has.

    Raises:
        UserError: a base whose layers do not see all virtual tokens.
    """
    needs_cache = options.pop("needs_cache", False)
    check_base(model, place(candidate), task, needs_cache)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    if is_pair_model(model):
        layers, heads, _ = decoder_shape(model)
        # PEFT's word for: before the source alone, or before both (of which a prefix has one).
        options["num_transformer_submodules"] = 2 if needs_cache else 1
    made: PromptLearningConfig = kind(
        **task_settings(model, task),
        num_virtual_tokens=candidate.virtual_tokens,
        num_layers=layers,
        num_attention_heads=heads,
        **options,
    )
    return made


def embedding_width(model: PreTrainedModel) -> int:
    """Of what the base reads for a token: not in every kind its hidden width."""
    return int(model.get_input_embeddings().weight.shape[1])


def check_base(model: PreTrainedModel, place: str, task: str, needs_cache: bool) -> None:
    """Raise a UserError for a base whose layers do not all look at keys and values before a row.

    needs_cache: for encoders too, which prompt embeddings do not.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    near = not needs_cache and config.model_type in soft_pairs.NEAR_SIGHTED
    if near or kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        raise UserError.at(
            f"{place}.method",
            f"{config.model_type} has layers that look back over a window or keep no keys and "
            "values, so that virtual tokens get out of sight",
            "use method: lora or bottleneck, or a base whose layers see the whole row",
        )
    if not needs_cache and config.model_type in soft_pairs.SCALED_OUTSIDE:
        raise UserError.at(
            f"{place}.method",
            f"{config.model_type} does not read embeddings as it reads the tokens that have them",
            "use method: prefix_tuning, lora or bottleneck",
        )
    readers = (model, model.base_model) if is_labelled(task) else (model,)
    if (needs_cache or not is_labelled(task)) and not any(map(_takes_cache, readers)):
        raise UserError.at(
            f"{place}.method",
            f"{config.model_type} takes no keys and values from before a row",
            "use method: prompt_tuning, p_tuning, lora or bottleneck"
            if is_labelled(task)
            else "use method: lora or bottleneck",
        )


def check_room(model: nn.Module, *sides: int) -> None:
    """Raise a UserError where the longest row, behind its virtual tokens, has no position left.

    sides: tokens of the longest row; of pairs, of the longest source and of the longest target.
    """
    virtual = virtual_tokens(model)
    if not virtual:
        return
    config: Any = model.get_base_model().config.get_text_config()  # type: ignore[operator]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    positions -= FIRST_POSITIONS.get(config.model_type, 0)
    longest = sides[-1] if is_cache(model) else sides[0]
    if longest + virtual > positions:
        raise UserError.at(
            "data.max_length",
            f"rows of up to {longest} tokens behind {virtual} virtual ones, but the base reads "
            f"at most {positions}",
            f"write `max_length: {positions - virtual}` or less, or fewer virtual_tokens",
        )


def check_checkpointing(model: nn.Module) -> None:
    """Raise a UserError where virtual tokens are a cache, which is dropped in layers that are
    computed again. (Packed rows do not get theirs as a cache.)"""
    if is_cache(model):
        raise UserError.at(
            "train.gradient_checkpointing",
            "true, but layers that are computed again do not keep the virtual tokens' keys and "
            "values, and this base and device have no packed rows",
            "set it to false and lower train.micro_batch_tokens, or use another method",
        )


def virtual_tokens(model: nn.Module) -> int:
    """V of a model with a soft prompt, 0 of any other."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if isinstance(config, PromptLearningConfig) else 0


def is_cache(model: nn.Module) -> bool:
    """Whether a soft prompt is keys and values alone: everywhere but for prompt embeddings of an
    encoder, beside a decoder or not, which are tokens of each row in every layer."""
    peft: Any = model
    if not virtual_tokens(model):
        return False
    base = peft.get_base_model()
    prefix = peft.active_peft_config.peft_type == PeftType.PREFIX_TUNING
    return prefix or (_takes_cache(base) and not is_pair_model(base))


def run(model: nn.Module, **arguments: Any) -> Any:
    """A forward pass of any model, behind its soft prompt if it has one; differentiable.

    arguments: those of the base's forward. With `past_key_values` of an earlier pass of this
        function, mask and positions count as if there were no virtual tokens, as in that pass.
    """
    if not virtual_tokens(model):
        return model(**arguments)
    base: Any = model.get_base_model()  # type: ignore[operator]
    # The whole model of an encoder takes no cache: PEFT's forward goes by its backbone.
    return base(**behind(model, arguments)) if _takes_cache(base) else model(**arguments)


def behind(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the base is to be called with, so that rows stand behind the virtual tokens."""
    virtual = virtual_tokens(model)
    if is_pair_model(model):
        return soft_pairs.behind(model, virtual, is_cache(model), arguments)
    arguments, ids_BT = dict(arguments), arguments["input_ids"]
    if arguments.get("attention_mask") is None:
        assert arguments.get("past_key_values") is None, "a mask says what of a cache is padding"
        arguments["attention_mask"] = torch.ones_like(ids_BT)
    arguments["attention_mask"] = F.pad(arguments["attention_mask"], (virtual, 0), value=1)
    if arguments.get("position_ids") is not None:
        arguments["position_ids"] = arguments["position_ids"] + virtual
    if arguments.get("past_key_values") is None:
        arguments["past_key_values"] = DynamicCache(
            [
                tuple(x.expand(len(ids_BT), -1, -1, -1) for x in layer)
                for layer in keys_and_values(model)
            ]
        )
    return arguments


def keys_and_values(model: nn.Module) -> Layers:
    """What every layer of a causal base sees of the virtual tokens; differentiable."""
    peft: Any = model
    with torch.autocast(peft.device.type, enabled=False):
        # As it is saved: what is trained under autocast must not be rounded where it is written.
        prompt = peft.get_prompt(1)
    if isinstance(prompt, DynamicCache):
        return tuple((layer.keys, layer.values) for layer in prompt.layers)
    cache = DynamicCache()
    backbone = peft.get_base_model().base_model
    embeds_1VH = prompt.to(peft.word_embeddings.weight.dtype)
    training = backbone.training
    # Gradient checkpointing, which is of training alone, gives no keys and values.
    backbone.train(False)
    try:
        backbone(inputs_embeds=embeds_1VH, past_key_values=cache, use_cache=True)
    finally:
        backbone.train(training)
    return tuple((layer.keys, layer.values) for layer in cache.layers)


class SoftCourse(Course):
    """Proves in the end that the base attends to its virtual tokens."""

    def finish(self) -> dict[str, Any]:
        """Raises a DivergedError where rows come out the same whatever the virtual tokens are."""
        moved = moved_logits(self.model)
        if moved == 0:
            raise DivergedError(
                "no row attends to the virtual tokens: its logits do not go by them; "
                "lower train.learning_rate"
            )
        return {"virtual_tokens_move_logits": moved}


@torch.no_grad()
def moved_logits(model: nn.Module) -> float:
    """The most that a logit of a short row moves when all that was learned of the virtual tokens
    changes its sign, which is exact and so leaves no trace."""
    peft: Any = model
    learned = list(peft.prompt_encoder.parameters())
    frozen = next(peft.get_base_model().parameters())
    ids_1T = torch.arange(1, 5, device=frozen.device)[None]
    inputs = {"input_ids": ids_1T}
    if is_pair_model(model):
        inputs["decoder_input_ids"] = ids_1T
    training = model.training
    model.eval()
    with torch.autocast(ids_1T.device.type, frozen.dtype, enabled=frozen.dtype is torch.bfloat16):
        before = run(model, **inputs).logits
        for weight in learned:
            weight.neg_()
        after = run(model, **inputs).logits
        for weight in learned:
            weight.neg_()
    model.train(training)
    return float((after.float() - before.float()).abs().max())


def _takes_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters
