"""A recipe that cannot be trained is told so on shapes alone, all of its candidates at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import FewShot, Full, Lora, PrefixTuning, ZeroShot
from schemas.errors import UserError
from schemas.stages import InspectSpec
from schemas.together import Candidate, Together
from tasks.inspect.stage import run

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A configuration alone: inspecting needs no weights."""
    CONFIG.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def spec(*candidates: Candidate) -> InspectSpec:
    return InspectSpec(task="causal-lm", candidates=list(candidates))


def test_counts_are_those_of_the_formula_and_of_the_real_model(base: Path, tmp_path: Path) -> None:
    facts = run(
        spec(Full(method="full"), Lora(method="lora", rank=4, target_modules=["q_proj", "v_proj"])),
        {"base": base},
        tmp_path,
    )
    everything = sum(weight.numel() for weight in LlamaForCausalLM(CONFIG).parameters())
    assert facts["total_parameters"] == everything
    assert facts["candidates"]["full"]["trainable_parameters"] == everything
    # q: 32 to 32, v: 32 to 16, in two layers, rank * (in + out) each.
    assert facts["candidates"]["lora-r4"]["trainable_parameters"] == 2 * 4 * (64 + 48)


def test_every_problem_of_every_candidate_at_its_place(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(
            spec(
                Full(method="full"),
                Lora(method="lora", rank=4, target_modules=["q_prj"]),
                Lora(method="lora", rank=17, target_modules=["v_proj"]),
            ),
            {"base": base},
            tmp_path,
        )
    target, rank = caught.value.problems
    assert target.place == "candidates[1].target_modules"
    assert "q_proj" in target.fix
    assert rank.place == "candidates[2].rank"
    assert "at most 16" in rank.fix


def test_a_problem_of_a_part_stands_at_the_part(base: Path, tmp_path: Path) -> None:
    lora = Lora(method="lora", rank=17, target_modules=["v_proj"])
    prefix = PrefixTuning(method="prefix_tuning")
    with pytest.raises(UserError) as caught:
        run(spec(Together(method="together", of=[prefix, lora])), {"base": base}, tmp_path)
    [problem] = caught.value.problems
    assert problem.place == "candidates[0].of[method=lora].rank"
    assert "at most 16" in problem.fix
    tagger = InspectSpec(
        task="token-classification",
        candidates=[Together(method="together", of=[prefix, Lora(method="lora", rank=4)])],
    )
    with pytest.raises(UserError) as caught:
        run(tagger, {"base": base}, tmp_path)
    [problem] = caught.value.problems
    assert problem.place == "candidates[0].of[method=prefix_tuning]"
    assert problem.found == "prefix_tuning cannot be used for token-classification"


def test_prompts_train_nothing_and_are_refused_for_a_classifier(base: Path, tmp_path: Path) -> None:
    candidates = [Full(method="full"), ZeroShot(method="zero_shot"), FewShot(method="few_shot")]
    facts = run(InspectSpec(task="causal-lm", candidates=candidates), {"base": base}, tmp_path)
    for label in ("zero_shot", "few_shot-4"):
        assert facts["candidates"][label] == {"trainable_parameters": 0, "trainable_share": 0}
    classifier = InspectSpec(task="sequence-classification", candidates=candidates)
    with pytest.raises(UserError) as caught:
        run(classifier, {"base": base}, tmp_path)
    places = [(problem.place, problem.found) for problem in caught.value.problems]
    assert places == [
        ("candidates[1].method", "zero_shot cannot be used for sequence-classification"),
        ("candidates[2].method", "few_shot cannot be used for sequence-classification"),
    ]
