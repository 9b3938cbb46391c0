"""`peftflow export` of a version that a run has registered, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from flows.export import base_of
from tasks.speculate.heads import HeadsConfig, TurboHeads


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tree: Any, tiny: Path, peftflow: Any) -> Path:
    """A home with `tiny/1`, an adapter."""
    place = tmp_path_factory.mktemp("export")
    recipe = tree | {"finish": {"merge": False}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    ended = peftflow("run", place / "tiny.yaml", "--home", place / "home")
    assert ended.code == 0, ended.err
    return place / "home"


@pytest.fixture(scope="module")
def package(home: Path) -> Path:
    [found] = home.glob("mlflow/artifacts/tiny/models/*/artifacts/artifacts/package")
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits.float()
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_registered_adapter_leaves_in_every_form(
    home: Path, package: Path, tree: Any, peftflow: Any, tmp_path: Path
) -> None:
    def export(form: str, name: str = "tiny@champion") -> Any:
        return peftflow("export", name, "--format", form, tmp_path / form, "--home", home)

    assert export("peft").code == 0
    dtype = json.loads((package / "serving.json").read_text())["dtype"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=dtype)
    ended = export("merged", "tiny/1")
    assert ended.code == 0, ended.err
    assert f"tiny/1 is in {tmp_path / 'merged'} as merged" in ended.out
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    # W + B A is rounded once more to the base's dtype: by up to 2^-9 of a weight, in eight layers.
    assert (logits(whole) - logits(adapted)).norm() < 0.05 * logits(adapted).norm()

    refused = export("vllm-medusa")
    assert refused.code == 2
    assert "has no Turbo heads" in refused.out
    assert "finish: {turbo:" in refused.out

    heads = TurboHeads(
        HeadsConfig(
            heads=2,
            rank=4,
            state=4,
            hidden_size=whole.config.hidden_size,
            vocab_size=whole.config.vocab_size,
        )
    )
    (package / "heads").mkdir()
    heads.save(package / "heads")
    for form in ("vllm-medusa", "lorax", "tgi"):
        ended = export(form)
        assert ended.code == 0, ended.out
        assert "warning: the state over drafted tokens (width 4) has no place" in ended.out
        assert (tmp_path / form / "config.json").exists()

    again = export("peft")
    assert again.code == 2
    assert "is there already" in again.out
    assert export("gguf").code == 2
    out = tmp_path / "x"
    unknown = peftflow("export", "tinny@champion", "--format", "peft", out, "--home", home)
    assert unknown.code == 2
    assert "did you mean tiny?" in unknown.out
    assert not out.exists()


def test_the_base_is_where_the_registered_model_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: Any = {"model": "models/small", "revision": None, "path": str(tmp_path)}
    assert base_of(None, "small/1") is None
    assert base_of(described, "small/1") == tmp_path
    monkeypatch.setenv("PEFTFLOW_BASE", str(tmp_path / "named"))
    assert base_of(described, "small/1") == tmp_path / "named"
