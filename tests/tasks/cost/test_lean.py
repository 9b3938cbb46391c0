"""The plan's process leaves modules out, and answers as if it had not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.candidates import AdaLora, Full, Lora
from schemas.recipe import Evaluate, Train
from schemas.stages import Call, CostSpec

ROOT = Path(__file__).parents[3]
SHAPE = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

#: Plans in one process, with the libraries whole or lean, and tells which modules have run.
PLAN = """
import json, os, sys
from pathlib import Path
os.sched_getaffinity = lambda _: {0}  # in this process, so that its modules tell
from tasks.cost import lean
if sys.argv[1] == "lean":
    lean.start()
from schemas.stages import CostSpec
from tasks.cost.stage import run
lean.started()
spec = CostSpec.model_validate_json(sys.stdin.read())
run(spec, {}, Path(sys.argv[2]))
put_off = [name for name, module in sys.modules.items() if isinstance(module, lean.PutOff)]
import transformers
names = [type(transformers).__name__]
ran = [name for name, module in sys.modules.items() if module]
print(json.dumps({"put off": put_off, "names": names, "all": ran}))
"""


def spec() -> CostSpec:
    """Methods of several kinds on a small Llama."""
    return CostSpec(
        task="causal-lm",
        shape=SHAPE,
        dtype="bfloat16",
        candidates=[Full(method="full"), Lora(method="lora"), AdaLora(method="adalora")],
        train=Train(),
        evaluate=Evaluate(),
        max_length=64,
    )


def plan(how: str, out: Path) -> dict[str, list[str]]:
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PLAN, how, str(out)],
        input=spec().model_dump_json(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_answer_is_the_same_and_nothing_that_was_put_off_has_run(tmp_path: Path) -> None:
    """Fails where a new version of a library asks one of them for more: the plan would still be
    right, and late."""
    whole, lean = plan("whole", tmp_path / "whole"), plan("lean", tmp_path / "lean")
    first, second = ((tmp_path / how / "plan.json").read_bytes() for how in ("whole", "lean"))
    assert first == second
    left_out = {
        "sympy",
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.fx.experimental.symbolic_shapes",
        "torch.utils._sympy.functions",
        "transformers.models",
    }
    assert set(lean["put off"]) == left_out
    assert not whole["put off"]
    assert (lean["names"], whole["names"]) == (["Few"], ["_LazyModule"])
    inside = {"sympy.core", "torch._dynamo.eval_frame", "torch.distributed.tensor._api", "scipy"}
    assert inside <= set(whole["all"])
    assert not inside & set(lean["all"])


NUMBERS = """
import torch, torch.fx.experimental.symbolic_shapes as real
from tasks.cost.lean import NUMBERS
for name in ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious",
             "statically_known_true", "sym_and", "sym_or"):
    for value in (True, False):
        assert NUMBERS[name](value) is getattr(real, name)(value), name
for name in ("guarding_hint_or_throw", "has_guarding_hint", "is_nested_int"):
    for value in (0, 1, 7):
        assert NUMBERS[name](value) == getattr(real, name)(value), name
for name in ("sym_and", "sym_or"):
    assert NUMBERS[name](True, False, True) == getattr(real, name)(True, False, True), name
for pair in ((1, 1), (1, 2), ((1, 2), [1, 2]), ([1, 2], [1, 3]), ((1,), (1, 2))):
    assert NUMBERS["sym_eq"](*pair) == real.sym_eq(*pair), pair
assert not NUMBERS["free_unbacked_symbols"](torch.empty(2)) and not real.free_unbacked_symbols(
    torch.empty(2)
)
assert set(NUMBERS) <= set(vars(real))
"""


def test_what_stands_for_torchs_questions_answers_them_alike_for_numbers() -> None:
    done = subprocess.run([sys.executable, "-c", NUMBERS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LATE = """
import sys
from tasks.cost import lean
lean.start()
import torch, sympy
assert type(sympy) is lean.PutOff
assert sympy.Symbol("x") + 1 != 0
from torch.distributed.tensor import DTensor
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
ShapeEnv()
import transformers
assert type(transformers).__name__ == "Few"
from transformers import LlamaForCausalLM
assert type(transformers).__name__ == "_LazyModule"
assert transformers.models.llama.modeling_llama.LlamaForCausalLM is LlamaForCausalLM
from transformers import Trainer, initialization
assert not hasattr(transformers, "Nonsense")
"""


def test_what_is_asked_for_all_the_same_is_the_real_one() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_call_is_read_from_standard_input(tmp_path: Path) -> None:
    call = Call(
        stage=CostSpec.STAGE,
        stage_version=CostSpec.VERSION,
        format="report",
        spec=spec().model_dump(mode="json"),
        unkeyed=CostSpec.UNKEYED,
        paths={},
    )
    done = subprocess.run(
        [sys.executable, "-m", "tasks.cost", "-", "--store", str(tmp_path)],
        input=call.model_dump_json(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("cost/*/plan.json"))) == 1
