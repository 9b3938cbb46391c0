"""Loading says what a checkpoint lacks, and never replaces what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from schemas.errors import StageError, UserError
from tasks.core.models import load_base, load_trained

ADAPTER = "adapter_model.safetensors"
TINY_BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def classifier(place: Path, labels: int) -> BertForSequenceClassification:
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(num_labels=labels, **TINY_BERT))
    model.save_pretrained(place)
    return model


def test_a_base_with_a_head_for_other_labels_gets_a_new_one_by_seed(tmp_path):
    classifier(tmp_path, 3)
    labels = list("abcde")
    first, again, other = (
        load_base(tmp_path, "sequence-classification", labels, "float32", head_seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.classifier.weight.shape == (5, 16)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    rounded = load_base(tmp_path, "sequence-classification", labels, "bfloat16")
    assert torch.equal(rounded.classifier.weight, first.classifier.weight.bfloat16())


def test_a_trained_head_of_another_size_is_an_error_and_is_not_redrawn(tmp_path):
    own = classifier(tmp_path, 3)
    right = load_trained(tmp_path, tmp_path, "sequence-classification", list("abc"), "float32")
    assert torch.equal(right.classifier.weight, own.classifier.weight)
    with pytest.raises(RuntimeError, match="size"):
        load_trained(tmp_path, tmp_path, "sequence-classification", list("abcde"), "float32")


def test_a_trained_model_without_its_head_is_an_error(tmp_path):
    BertModel(BertConfig(**TINY_BERT)).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"lacks classifier\.bias"):
        load_trained(tmp_path, tmp_path, "sequence-classification", list("abc"), "float32")


def test_an_encoder_is_no_language_model(tmp_path):
    classifier(tmp_path, 2)
    with pytest.raises(UserError, match="holds no weights for"):
        load_base(tmp_path, "causal-lm", None, "float32")


def test_a_layer_that_the_base_lacks_is_said_aloud_and_a_head_is_not(tmp_path, capfd):
    """A pooler is of the head, which is new for each task and trained by every method."""
    BertModel(BertConfig(**TINY_BERT), add_pooling_layer=False).save_pretrained(tmp_path)
    load_base(tmp_path, "sequence-classification", list("ab"), "float32")
    assert "drawn at random" not in capfd.readouterr().err
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("output.dense.bias"))
    left = {name: weight for name, weight in weights.items() if name != gone}
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    load_base(tmp_path, "sequence-classification", list("ab"), "float32")
    said = capfd.readouterr().err
    assert "drawn at random" in said
    assert gone in said


def test_a_decoder_without_a_padding_token_classifies_rows_of_different_lengths(tmp_path):
    """Each text's logits are those that it has alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(20)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert config.pad_token_id is None

    model = load_base(tmp_path, "sequence-classification", list("ab"), "float32")
    pad = model.config.pad_token_id
    rows = [[5, 6, 7], [8, 9]]
    ids = torch.tensor([rows[0], [*rows[1], pad]])
    together = model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])).logits
    alone = [model(torch.tensor([row])).logits[0] for row in rows]
    # float32 rounding of a batch against one row.
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)


def test_an_adapter_that_lacks_a_tensor_is_an_error(tmp_path):
    """PEFT itself warns, draws the tensor at random, and goes on."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = classifier(base, 2)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(adapter)
    load_trained(base, adapter, "sequence-classification", list("ab"), "float32")
    weights = load_file(adapter / ADAPTER)
    gone = next(name for name in weights if "lora_A" in name)
    save_file({name: w for name, w in weights.items() if name != gone}, adapter / ADAPTER)
    with pytest.raises(StageError, match="missing adapter keys"):
        load_trained(base, adapter, "sequence-classification", list("ab"), "float32")
