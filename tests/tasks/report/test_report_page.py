"""The page as text: whole, the same every time, and nothing in it that came in as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from schemas.errors import UserError
from schemas.report import Example, Interval
from schemas.stages import PageSpec
from tasks.report.inputs import Inputs, read_inputs
from tasks.report.run import render, run


class Markup(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts by id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = (dict(attrs).get("id") or "") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = data
            self._script = None

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(spec: PageSpec, inputs: Inputs) -> str:
    return render(spec, inputs)


@pytest.fixture(scope="module")
def markup(page: str) -> Markup:
    return Markup(page)


def test_same_entries_give_the_same_bytes(
    spec: PageSpec, entries: dict[str, Path], tmp_path: Path
) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        facts = run(spec, entries, tmp_path / name)
        made.append((tmp_path / name / "report.html").read_bytes())
        assert facts == {"page": "report.html", "bytes": len(made[-1])}
    assert made[0] == made[1]


def test_every_figure_of_every_report_is_in_a_table(inputs: Inputs, markup: Markup) -> None:
    shown: dict[str, list[float]] = {}
    row: dict[str, str | None] = {}
    for tag, found in markup.elements:
        row = found if tag == "tr" else row
        if tag == "td" and "data-value" in found:
            # A cell names its figure, or its row does.
            for name in (found.get("data-figures") or row["data-figures"] or "").split():
                shown.setdefault(name, []).append(float(found["data-value"] or "nan"))
    for report in inputs.reports.values():
        for name, value in report.figures().items():
            # The same bytes in MiB share a row with the bytes.
            wanted = report.storage.shipped_bytes if name == "adapter_mib" else value
            assert wanted in shown[name], name


def test_a_metric_that_nobody_heard_of_is_shown_too(spec: PageSpec, inputs: Inputs) -> None:
    report = inputs.reports["lora-r4"]
    metrics = report.accuracy.metrics | {"bits_per_byte": Interval(value=0.731, low=0.7, high=0.8)}
    accuracy = report.accuracy.model_copy(update={"metrics": metrics})
    reports = inputs.reports | {"lora-r4": report.model_copy(update={"accuracy": accuracy})}
    page = render(spec, Inputs(**(vars(inputs) | {"reports": reports})))
    assert "Bits per byte" in page
    assert 'data-value="0.731"' in page


def test_rows_are_text_and_never_markup(page: str, markup: Markup, hostile: str) -> None:
    assert hostile not in page
    assert "&lt;script&gt;document.documentElement.dataset.owned" in page
    ids = [attributes.get("id") for attributes in markup.all("script")]
    assert ids == ["figures", "plotly", None]
    assert markup.all("img") == []
    assert not any(name.startswith("on") for _, found in markup.elements for name in found)


def test_hostile_names_stay_inside_their_places(
    spec: PageSpec, inputs: Inputs, hostile: str
) -> None:
    """Also where text meets attributes and the JSON of the plots."""
    quoted = f'"{hostile}'
    report = inputs.reports["full"].model_copy(
        update={"how": {"storage": quoted, "</p>": quoted}, "device": quoted}
    )
    data = inputs.data.model_copy(update={"labels": {quoted: 3}})
    data = data.model_copy(update={"splits": {quoted: inputs.data.splits["train"]}})
    changed = vars(inputs) | {"reports": inputs.reports | {"full": report}, "data": data}
    page = render(spec.model_copy(update={"why": quoted, "recipe_yaml": quoted}), Inputs(**changed))
    markup = Markup(page)
    assert len(markup.all("script")) == 3
    assert markup.all("img") == []
    assert not any(name.startswith("on") for _, found in markup.elements for name in found)
    assert any(quoted in name for name in json.loads(markup.scripts["figures"]))


def test_nothing_is_fetched_and_nothing_else_may_run(markup: Markup) -> None:
    for tag, attributes in markup.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
    policy = next(found["content"] or "" for found in markup.all("meta") if "http-equiv" in found)
    assert policy.startswith("default-src 'none'")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert re.fullmatch(r"('sha256-[^']+' ?){2}", rules["script-src"])


def test_no_directories_of_the_machine(page: str, entries: dict[str, Path]) -> None:
    text = re.sub(r'<script type="application/octet-stream".*?</script>', "", page, flags=re.S)
    for directory in ("/home/someone", "~/data", "/mnt/data", str(entries["prepared"].parent)):
        assert directory not in text
    assert "…/tiny-llama" in text
    assert "retention.jsonl}  # general text" in text


def test_plotly_knows_every_key_of_every_plot(markup: Markup) -> None:
    """plotly.js ignores what it does not know; the Python schema refuses it."""
    figures = json.loads(markup.scripts["figures"])
    assert len(figures) == 9 + 10  # and the folded pairs
    for figure in figures.values():
        go.Figure(figure)


def test_tables_and_plots_are_named_for_those_who_do_not_see_them(markup: Markup) -> None:
    assert all(found.get("scope") for found in markup.all("th"))
    plots = [found for found in markup.all("div") if found.get("class") == "plot"]
    assert all(found["role"] == "img" and found["aria-label"] for found in plots)
    ids = [found["id"] for _, found in markup.elements if "id" in found]
    assert len(ids) == len(set(ids))
    assert all((found["href"] or "")[1:] in ids for found in markup.all("a"))


def test_a_goal_that_is_to_fall_is_better_further_down(spec: PageSpec, inputs: Inputs) -> None:
    page = render(spec.model_copy(update={"goal": "perplexity"}), inputs)
    assert "Down and to the left is better" in page
    front = json.loads(Markup(page).scripts["figures"])["plot-storage"]["data"][0]
    assert front["y"] == sorted(front["y"], reverse=True)


def test_without_a_finished_model_or_curves_or_latencies(spec: PageSpec, inputs: Inputs) -> None:
    reports = {
        name: report.model_copy(update={"inference_overhead": [], "examples": [], "how": {}})
        for name, report in inputs.reports.items()
        if name != "finished"
    }
    curves: dict[str, list[object]] = {label: [] for label in spec.labels}
    page = render(spec, Inputs(**(vars(inputs) | {"reports": reports, "curves": curves})))
    assert "No candidate has a training curve" in page
    assert "No examples were kept" in page
    assert 'id="plot-overhead"' not in page


def test_missing_entries_are_named_all_at_once(spec: PageSpec, entries: dict[str, Path]) -> None:
    fewer = {name: path for name, path in entries.items() if "r16" not in name}
    wrong = spec.model_copy(update={"selected": "lora-r5"})
    with pytest.raises(UserError) as caught:
        read_inputs(wrong, fewer)
    places = [problem.place for problem in caught.value.problems]
    assert places == ["paths['train:lora-r16']", "paths['evaluate:lora-r16']", "spec.selected"]


def test_classification_decodes_nothing(spec: PageSpec, inputs: Inputs) -> None:
    reports = {}
    for name, report in inputs.reports.items():
        prefill_only = {"token_p50_ms": None, "token_p95_ms": None, "token_ratio": None}
        rows = [row.model_copy(update=prefill_only) for row in report.inference_overhead]
        accuracy = report.accuracy.model_copy(
            update={"metrics": {"accuracy": report.accuracy.metrics["exact_match"]}}
        )
        changed = {"inference_overhead": rows, "accuracy": accuracy}
        reports[name] = report.model_copy(update=changed)
    data = inputs.data.model_copy(
        update={"task": "sequence-classification", "labels": {"lost_card": 40, "top_up": 35}}
    )
    goal = spec.model_copy(update={"goal": "accuracy"})
    page = render(goal, Inputs(**(vars(inputs) | {"reports": reports, "data": data})))
    assert page.count("nothing is decoded") == sum(
        len(report.inference_overhead) for report in reports.values()
    )
    assert "2 labels, 35 to 40 rows each in train" in page
    overhead = json.loads(Markup(page).scripts["figures"])["plot-overhead"]
    assert overhead["layout"]["xaxis"]["title"]["text"] == "Prefill, batch 1 (× base)"
    # The finished model was measured merged alone, and stands in the plot all the same.
    assert {trace.get("name") for trace in overhead["data"]} >= {*spec.labels, "finished"}


def test_spans_are_counted_and_shown_one_a_line(spec: PageSpec, inputs: Inputs) -> None:
    report = inputs.reports[spec.selected]
    accuracy = report.accuracy.model_copy(
        update={"metrics": {"entity_f1": report.accuracy.metrics["exact_match"]}}
    )
    example = Example(prompt="at nine", expected="time [3:7] nine", got="no span", right=False)
    changed = report.model_copy(update={"accuracy": accuracy, "examples": [example]})
    split = inputs.data.splits["train"].model_copy(update={"spans": 1234, "spans_cut": 5})
    data = inputs.data.model_copy(
        update={
            "task": "token-classification",
            "labels": {"date": 40, "time": 35},
            "splits": inputs.data.splits | {"train": split},
        }
    )
    goal = spec.model_copy(update={"goal": "entity_f1"})
    reports = dict.fromkeys(inputs.reports, changed)
    page = render(goal, Inputs(**(vars(inputs) | {"reports": reports, "data": data})))
    assert "2 labels, 35 to 40 spans each in train" in page
    assert "Train: 1,234 spans, 5 of them cut off at max_length." in page
    assert "Span F1" in page
    assert "nats a token" in page
