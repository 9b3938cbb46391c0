"""One HTML file that holds everything: it reads offline, prints, and asks for nothing else."""

from __future__ import annotations

import base64
import gzip
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from schemas.stages import PageSpec
from tasks.core.files import write_atomic
from tasks.report import criteria, data_view, examples, overhead, provenance, summary
from tasks.report.apart import apart, rates, recommendation
from tasks.report.curves import loss_plot
from tasks.report.figures import figure, in_words
from tasks.report.inputs import TITLES, Inputs, read_inputs
from tasks.report.lengths import length_plots
from tasks.report.plots import numbers, styles
from tasks.report.predicted import on_larger, predicted
from tasks.report.trade_offs import other_pairs, trade_offs
from tasks.report.turbo import turbo_view

HERE = Path(__file__).parent
PAGE = "report.html"


def run(spec: PageSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `report.html` into `out_dir`. The same entries give the same bytes."""
    page = render(spec, read_inputs(spec, paths))
    write_atomic(out_dir / PAGE, page)
    return {"page": PAGE, "bytes": len(page.encode())}


def render(spec: PageSpec, inputs: Inputs) -> str:
    """The page. Everything that comes from outside is escaped: rows are anybody's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pareto, pairs = trade_offs(spec, inputs), other_pairs(spec, inputs)
    table = criteria.criteria_table(inputs, spec.labels)
    looks = styles(spec)
    loss = loss_plot(spec, inputs)
    lengths = length_plots(inputs.data)
    turbo = turbo_view(inputs)
    drawn = [*pareto, *pairs, *([loss] if loss else []), *lengths]
    drawn += [turbo.accepted] if turbo else []
    script = (HERE / "page.js").read_text()
    plotly_js = get_plotlyjs()
    return environment.get_template("page.html.j2").render(
        spec=spec,
        inputs=inputs,
        css=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        plotly=Markup(packed(plotly_js)),
        script_hashes=f"{csp_hash(script)} {csp_hash(plotly_js)}",
        verdict=summary.verdict(spec, inputs),
        tiles=summary.tiles(spec, inputs),
        subjects=[TITLES.get(name, name) for name in inputs.reports],
        apart=apart(inputs),
        recommendation=recommendation(spec, inputs),
        rates=rates(spec),
        criteria=table,
        overview=criteria.overview(spec, inputs, table),
        numbers=numbers(spec),
        looks=looks,
        how=criteria.measured_how(inputs),
        device=sorted({f"{report.device}, {report.dtype}" for report in inputs.reports.values()}),
        latency=overhead.latency_table(inputs),
        answers=examples.answers(inputs, spec.selected),
        splits=data_view.split_rows(inputs.data),
        reasons=data_view.reason_rows(inputs.data),
        refused=data_view.refused_rows(inputs.quarantine),
        labels=data_view.labels(inputs.data),
        span_counts=data_view.span_counts(inputs.data),
        row_words=data_view.row_words(inputs.data),
        entries=provenance.entry_rows(inputs.manifests),
        facts=provenance.facts(inputs.manifests),
        recipe=provenance.without_directories(spec.recipe_yaml),
        better="Down" if figure(summary.quality_figure(spec, inputs)).better == "lower" else "Up",
        pareto=pareto,
        pairs=pairs,
        loss=loss,
        lengths=lengths,
        predicted=predicted(inputs),
        larger=on_larger(inputs),
        turbo=turbo,
        larger_size=in_words("trainable_parameters", inputs.larger_parameters),
        figures={plot.id: plot.spec for plot in drawn},
    )


def packed(text: str) -> str:
    """gzip in base64, which page.js unpacks: plotly.js shrinks from 4.8 to 2.0 MB."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def csp_hash(script: str) -> str:
    """A script as the page's Content-Security-Policy names it: no other script may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
