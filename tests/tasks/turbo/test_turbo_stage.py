"""The whole stage on a tiny model: what it leaves, what it refuses, what it says aloud."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from schemas.errors import StageError, UserError
from schemas.report import CurvePoint
from schemas.stages import Call
from tasks.core.models import load_trained
from tasks.core.store import DiskFullError, Store
from tasks.speculate.decode import Writer
from tasks.speculate.heads import WEIGHTS, HeadsConfig, TurboHeads
from tasks.speculate.parts import parts_of
from tasks.turbo import states
from tasks.turbo.distil import agreement
from tasks.turbo.stage import run
from tasks.turbo.states import States


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The stage, run once; no library may have anything to complain of."""
    out = tmp_path_factory.mktemp("done")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*requires_grad=True to a scalar.*")
        return run(world.spec(), world.paths, out), out


def test_what_it_leaves_is_what_it_tells(done, world) -> None:
    facts, out = done
    heads = TurboHeads.load(out / "heads")
    count = sum(weight.numel() for weight in heads.parameters())
    assert facts["parameters"] == heads.config.parameters == count
    assert facts["medusa_share"] == count / facts["medusa_parameters"] <= 1 / 20
    assert facts["stored_bytes"] == (out / "heads" / WEIGHTS).stat().st_size
    # A header of a few hundred bytes beside the float32 numbers.
    assert 0 <= facts["stored_bytes"] - 4 * count < 1024
    curve = [CurvePoint.model_validate(p) for p in json.loads((out / "curve.json").read_text())]
    assert [point.step for point in curve] == list(range(1, facts["steps"] + 1))
    assert curve[-1].epoch == world.spec().turbo.epochs
    assert facts["final_loss"] == curve[-1].loss < curve[0].loss / 2
    assert facts["texts"] == 150


def test_heads_foresee_what_the_base_alone_does_not(done, world) -> None:
    """Before training each head says the next token where another is asked for, which in counting
    is never right. Afterwards they are right on texts that they have not learned."""
    facts, out = done
    [directory] = (out / "scratch").glob("states-*")
    whole = States(directory, 3)
    held = np.arange(len(whole))[-8:]
    parts = parts_of(world.model())
    trained = TurboHeads.load(out / "heads")
    fresh = TurboHeads(replace(trained.config, made_for={}))
    before, after = (agreement(heads, parts, whole, held) for heads in (fresh, trained))
    assert max(before.alone + before.followed) < 0.05
    assert after.alone == facts["right_alone"]
    assert after.followed == facts["right_followed"]
    # Far above what it was at the start, and far under what it came to: 0.5, 0.4, 0.3.
    assert min(after.followed) > 0.15
    assert after.followed[0] > after.alone[0], "the state has to be of use"


def test_agreement_counts_position_by_position(done, world) -> None:
    _, out = done
    [directory] = (out / "scratch").glob("states-*")
    whole, parts = States(directory, 3), parts_of(world.model())
    heads = TurboHeads.load(out / "heads")
    chosen = np.array([3, 0, 149])
    right, told = np.zeros(3), np.zeros(3)
    with torch.no_grad():
        for index in chosen:
            texts = whole.texts(np.array([index]))
            own = parts.lm_head(texts.states_TD).argmax(-1).tolist()
            for t, x_D in enumerate(texts.states_TD):
                for k in range(1, 4):
                    if t + k < len(own):
                        guess = int(parts.lm_head(heads.ahead(x_D[None])[k - 1, 0]).argmax())
                        right[k - 1] += guess == own[t + k]
                        told[k - 1] += 1
    assert agreement(heads, parts, whole, chosen).alone == (right / told).tolist()


def test_a_drafting_writer_accepts_and_writes_what_the_model_alone_does(done, world) -> None:
    _, out = done
    parts = parts_of(world.model())
    prompts = [world.rows.row(row)[:3].tolist() for row in range(12)]
    plain, _ = Writer(parts).write(prompts, 16, frozenset({2}))
    drafted, account = Writer(parts, TurboHeads.load(out / "heads")).write(
        prompts, 16, frozenset({2})
    )
    assert drafted == plain
    assert account.tokens_per_pass > 1


def adapter(world: Any, place: Path, config: Any) -> Path:
    """A subject with an adapter that does something."""
    base = LlamaForCausalLM.from_pretrained(world.paths["base"])
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02, generator=generator)
    model.save_pretrained(place / "model")
    return place


def test_heads_for_an_adapter_learn_from_what_the_adapter_writes(world, tmp_path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    subject = adapter(world, tmp_path / "lora", config)
    run(world.spec(epochs=4), world.paths | {"subject": subject}, tmp_path / "out")
    [directory] = (tmp_path / "out" / "scratch").glob("states-*")
    texts = States(directory, 3).texts(np.arange(20))
    model = load_trained(world.paths["base"], subject / "model", "causal-lm", None, "float32")
    greedy_T = model.get_output_embeddings()(texts.states_TD).argmax(-1)
    # Half of the texts are sampled; where they are not, the states say what was written.
    assert (greedy_T == texts.tokens_T).float().mean() > 0.9
    with torch.no_grad():
        bare_TD, own_TD = (
            parts_of(one).layers(texts.tokens_T[None, :8].long())[0]
            for one in (world.model(), model)
        )
    assert not torch.allclose(bare_TD, own_TD, atol=1e-2)
    heads = TurboHeads.load(tmp_path / "out" / "heads")
    Writer(parts_of(model), heads)
    # The way in which a registered version loads it.
    Writer(parts_of(PeftModel.from_pretrained(world.model(), subject / "model")), heads)
    with pytest.raises(ValueError, match="another model"):
        Writer(parts_of(world.model()), heads)


def test_the_bare_base_has_heads_too(world, tmp_path) -> None:
    """`none`: an entry without weights, whose model is the base."""
    (tmp_path / "model").mkdir()
    settings = {"examples": 0, "choose": "similarity", "bos": None}
    (tmp_path / "model" / "prompt.json").write_text(json.dumps(settings))
    run(world.spec(epochs=4), world.paths | {"subject": tmp_path}, tmp_path / "out")
    Writer(parts_of(world.model()), TurboHeads.load(tmp_path / "out" / "heads"))


def test_heads_learn_behind_a_soft_prompt(world, tmp_path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    subject = adapter(world, tmp_path / "soft", config)
    run(world.spec(epochs=4), world.paths | {"subject": subject}, tmp_path / "out")
    heads = TurboHeads.load(tmp_path / "out" / "heads")
    Writer(parts_of(PeftModel.from_pretrained(world.model(), subject / "model")), heads)
    with pytest.raises(ValueError, match="another model"):
        Writer(parts_of(world.model()), heads)


def test_heads_beyond_the_budget_are_refused(world, tmp_path) -> None:
    with pytest.raises(UserError, match="a twentieth of Medusa-1's"):
        run(world.spec(rank=64), world.paths, tmp_path)


def test_the_store_holds_what_it_may_and_says_what_is_left_out(world, tmp_path, capfd) -> None:
    facts = run(
        world.spec(store_mib=1, prompts=1000).model_copy(update={"max_new_tokens": 40}),
        world.paths,
        tmp_path,
    )
    room = (1 << 20) // (40 * (64 * 4 + 4))
    assert facts["texts"] == room < 250
    assert f"store_mib: 1 holds the hidden states of {room}" in capfd.readouterr().err
    kept = sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("0*.safetensors"))
    assert kept <= 1 << 20


def test_a_model_that_writes_nothing_to_foresee_is_said(world, tmp_path) -> None:
    """One token and the end is all that it says: no head is ever asked."""
    with pytest.raises(StageError, match=r"never right.*take finish\.turbo out"):
        run(world.spec(epochs=0.1).model_copy(update={"max_new_tokens": 1}), world.paths, tmp_path)


def test_a_loss_that_is_no_number_names_the_rate(world, tmp_path) -> None:
    with pytest.raises(StageError, match=r"lower finish\.turbo\.learning_rate"):
        run(world.spec(learning_rate=1e38), world.paths, tmp_path)


def test_a_full_disk_is_told_as_one(world, tmp_path, monkeypatch) -> None:
    spec = world.spec()
    call = Call(
        stage="turbo",
        stage_version=spec.VERSION,
        format="heads",
        spec=spec.model_dump(mode="json"),
        paths={},
    )
    save, written = states.save_file, []

    def full(*arguments: Any) -> None:
        if len(written) == 1:
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        written.append(save(*arguments))

    monkeypatch.setattr(states, "save_file", full)
    store = Store(tmp_path)
    with pytest.raises(DiskFullError, match="the disk is full"):
        store.make(call, lambda out: run(spec, world.paths, out), resumes=True)
    monkeypatch.setattr(states, "save_file", save)
    entry = store.make(call, lambda out: run(spec, world.paths, out), resumes=True)
    assert (entry.path / "heads" / WEIGHTS).exists()
    assert not (entry.path / "scratch").exists()


def test_heads_of_another_format_or_cut_short_are_named(done, tmp_path) -> None:
    _, out = done
    shutil.copytree(out / "heads", tmp_path / "heads")
    weights = tmp_path / "heads" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read"):
        TurboHeads.load(tmp_path / "heads")
    config = tmp_path / "heads" / "turbo_config.json"
    config.write_text(config.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, and this reads 1"):
        TurboHeads.load(tmp_path / "heads")


def test_the_seed_decides_the_heads_first_weights() -> None:
    config = HeadsConfig(3, 9, 8, 64, 512)
    one, same, other = (TurboHeads(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["down_KRD"], other["down_KRD"])
