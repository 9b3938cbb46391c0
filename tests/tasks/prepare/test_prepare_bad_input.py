"""Bad input: one clear error that names the file, line or key, and the fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.errors import UserError
from schemas.recipe import Source
from schemas.stages import Call, PrepareSpec
from tasks.prepare.sources import open_source

Prepare = Callable[..., Any]

TEST = [{"prompt": "test question", "completion": "test answer"}]
LABELLED = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


def problem(raised: pytest.ExceptionInfo[UserError]) -> str:
    return str(raised.value)


def test_a_missing_column_lists_those_found_and_the_nearest(prepare: Prepare) -> None:
    rows = [{"question": "a", "answer": "b", "id": 3}]
    with pytest.raises(UserError) as raised:
        prepare(rows, rows)
    text = problem(raised)
    assert "question, answer, id" in text
    assert "{prompt: question, completion: answer}" in text
    assert "train.jsonl" in text
    assert "test.jsonl" in text  # both files at once
    mapped = {"prompt": "question", "completion": "answer"}
    made = prepare(rows, [{"question": "c", "answer": "d"}], columns=mapped)
    assert made.report.splits["train"].rows_kept == 1


def test_a_mapping_to_a_column_that_is_not_there(prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"no column 'promt'(.|\n)*map `prompt` to prompt"):
        prepare(TEST, TEST, columns={"prompt": "promt"})
    with pytest.raises(UserError, match="`label` is no column of causal-lm rows"):
        prepare(TEST, TEST, columns={"label": "prompt"})


def test_a_csv_of_300_columns(prepare: Prepare) -> None:
    names = [f"c{number}" for number in range(298)] + ["text", "tag"]
    rows = "".join(
        ",".join(["x"] * 298 + [f"t {number}", "ab"[number % 2]]) + "\n" for number in range(4)
    )
    content = (",".join(names) + "\n" + rows).encode()
    test = (",".join(names) + "\n" + rows.replace("t ", "u ")).encode()
    task = {"task": "sequence-classification", "suffix": ".csv"}
    with pytest.raises(UserError) as raised:
        prepare(content, test, **task)
    assert "300 columns" in problem(raised)
    assert "and 288 more" in problem(raised)
    assert "{label: tag}" in problem(raised)
    made = prepare(content, test, columns={"label": "tag"}, **task)
    assert made.report.splits["train"].rows_kept == 4


def test_a_csv_with_a_nul_byte_and_bad_utf8(prepare: Prepare) -> None:
    content = b"prompt,completion\na,b\nc\0,d\n\xff,e\nf,g\n"
    made = prepare(content, b"prompt,completion\nx,y\n", suffix=".csv")
    assert made.reasons() == {3: ["nul_byte"], 4: ["bad_utf8"]}
    assert made.quarantine["raw"].to_list() == ["c\0,d", "base64:/yxl"]


def test_all_rows_refused_says_why(prepare: Prepare) -> None:
    with pytest.raises(UserError) as raised:
        prepare(b'{"prompt": "a", "completion": ""}\nbroken\nbroken\n', TEST)
    text = problem(raised)
    assert "all 3 rows are refused: 2 malformed_json" in text
    assert "1 empty_answer" in text
    assert "see line 1" in text


@pytest.mark.parametrize("content", [b"\xff\xfe\n\xff\n", b"not json\n", b"[1]\n"])
def test_a_file_without_a_single_object(prepare: Prepare, content: bytes) -> None:
    with pytest.raises(UserError, match="rows are refused"):
        prepare(content, TEST)


def test_empty_files(prepare: Prepare) -> None:
    with pytest.raises(UserError, match="is empty"):
        prepare(b"", TEST)
    with pytest.raises(UserError, match="no row"):
        prepare(b"prompt,completion\n", b"prompt,completion\na,b\n", suffix=".csv")
    with pytest.raises(UserError, match="no header"):
        prepare(b"\n", b"prompt,completion\na,b\n", suffix=".csv")


def test_unknown_formats_and_separators(prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"\*\.json are not read"):
        prepare(TEST, TEST, suffix=".json")
    with pytest.raises(UserError, match="separated by semicolons"):
        prepare(b"prompt;completion\na;b\n", b"prompt;completion\na;b\n", suffix=".csv")
    with pytest.raises(UserError, match="more than one column"):
        prepare(b"prompt,prompt,completion\na,b,c\n", b"prompt,completion\na,b\n", suffix=".csv")
    with pytest.raises(UserError, match="no whole Parquet file"):
        prepare(b"PAR1 and no more", b"PAR1 and no more", suffix=".parquet")


def test_labels_in_test_that_train_never_saw(prepare: Prepare) -> None:
    test = [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}, {"text": "z", "label": "c"}]
    with pytest.raises(UserError) as raised:
        prepare(LABELLED, test, task="sequence-classification")
    assert "'c' (line 2, 3)" in problem(raised)
    with pytest.raises(UserError, match="every train row has the label 'a'"):
        prepare(LABELLED[:1], test[:1], task="sequence-classification")


def test_a_hold_out_that_holds_nothing(prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"raise data\.test\.holdout"):
        prepare(TEST, {"holdout": 0.01})


def test_chats_without_a_chat_template(prepare: Prepare, make_base: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [{"messages": messages}]
    with pytest.raises(UserError, match="no chat template, and the rows are chats"):
        prepare(chats, TEST, base=make_base(None))
    with pytest.raises(UserError, match="`plain` cannot show rows of `messages`"):
        prepare(chats, TEST, template="plain")
    with pytest.raises(UserError, match=r"data\.template asks for it"):
        prepare(TEST, TEST, base=make_base(None), template="chat")


def test_a_base_without_a_tokenizer(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        prepare(TEST, TEST, base=tmp_path / "nothing")


def test_rows_longer_than_the_base_reads(prepare: Prepare, make_base: Any, tmp_path: Path) -> None:
    """Else a base with learned positions fails at its first long row, an hour in."""
    base = shutil.copytree(make_base(), tmp_path / "short")
    (base / "config.json").write_text('{"max_position_embeddings": 64}')
    with pytest.raises(UserError, match="reads at most 64"):
        prepare(TEST, TEST, base=base, max_length=65)


def test_parquet_rows_are_found_again_as_json_lines(prepare: Prepare, tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"prompt": ["a", "c", None], "completion": ["b", "", "e"], "day": [None, None, None]}
    )
    frame.write_parquet(tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    frame.head(1).with_columns(prompt=pl.lit("z")).write_parquet(tmp_path / "rows.parquet")
    made = prepare(content, (tmp_path / "rows.parquet").read_bytes(), suffix=".parquet")
    assert made.reasons() == {2: ["empty_answer"], 3: ["missing:prompt"]}
    assert json.loads(made.quarantine["raw"][0]) == {"prompt": "c", "completion": "", "day": None}


def test_a_hub_data_set_from_a_directory(tmp_path: Path) -> None:
    """`datasets` itself reads it; class labels become their names."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    folder = tmp_path / "set"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    readable = open_source(Source(path=f"hub:{folder}"), None, tmp_path)
    assert readable.columns == ["text", "label"]
    assert readable.path.read_text() == ('{"text":"a","label":"yes"}\n{"text":"b","label":"no"}\n')


def test_a_hub_id_with_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = Source(path="hub:no-one/nothing", revision="0" * 40)
    with pytest.raises(UserError, match="without a network, give a file"):
        open_source(source, None, tmp_path)
    with pytest.raises(UserError, match="add `revision"):
        open_source(Source(path="hub:no-one/nothing"), None, tmp_path)


def test_the_command_line_leaves_the_store_as_it_was(tmp_path: Path, make_base: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("broken\n")
    source = {"path": "rows.jsonl"}
    spec = PrepareSpec.model_validate(
        {"task": "causal-lm", "data": {"train": source, "test": source}}
    )
    paths = {"train": str(rows), "test": str(rows), "base": str(make_base())}
    call = Call(
        stage="prepare",
        stage_version=1,
        format="rows",
        spec=spec.model_dump(mode="json"),
        paths=paths,
    )
    (tmp_path / "call.json").write_text(call.model_dump_json())
    store = tmp_path / "store"
    command = [sys.executable, "-m", "tasks.prepare", str(tmp_path / "call.json")]
    done = subprocess.run(
        [*command, "--store", str(store)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PEFTFLOW_EVENTS": "1"},
    )
    assert done.returncode == 2
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["event"] == "user_error"
    assert last["problems"][0]["place"].startswith("rows.jsonl")
    assert not [path for path in store.rglob("*") if path.is_file()]
