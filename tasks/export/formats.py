"""Every form in which a version leaves, as data over one way of writing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from schemas.export import ExportFormat
from schemas.tasks import is_labelled
from tasks.core.models import MODEL_CLASSES
from tasks.export.adapter import write_adapter
from tasks.export.medusa import LORAX, MODEL, TGI, VLLM, Layout, write_medusa
from tasks.export.merged import write_merged
from tasks.export.place import whole_or_absent
from tasks.export.version import Version


@dataclass(frozen=True)
class Form:
    """write: a version's files into a directory, told where they will lie in the end; gives what
    is to be said of them. how: the lines of Markdown that say how they are used, with what `readme`
    fills in."""

    write: Callable[[Version, Path, Path], list[str]]
    how: str


def medusa(layout: Layout, how: str) -> Form:
    return Form(partial(write_medusa, layout=layout), how)


FORMS: dict[ExportFormat, Form] = {
    "peft": Form(
        lambda version, work, _: write_adapter(version, work),
        """\
```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("{base}", dtype="{dtype}"{labels})
model = PeftModel.from_pretrained(base, "{out}")
```""",
    ),
    "merged": Form(
        lambda version, work, _: write_merged(version, work),
        "A transformers directory: give it to `from_pretrained`, or to any server as its model, "
        "in {dtype}.",
    ),
    "vllm-medusa": medusa(
        VLLM,
        """\
```
vllm serve {model} --dtype {dtype} --speculative-config \\
  '{{"method": "medusa", "model": "{out}", "num_speculative_tokens": {heads}}}'
```""",
    ),
    "lorax": medusa(
        LORAX,
        """\
```
lorax-launcher --model-id {model} --adapter-id {out} --adapter-source local
```

In a container, mount both directories and give the paths that it sees.""",
    ),
    "tgi": medusa(
        TGI,
        """\
```
text-generation-launcher --model-id {out}
```

It loads `base_model_name_or_path` of config.json: in a container, mount that too and write there
the path that it sees.""",
    ),
}


def export(version: Version, form: ExportFormat, out: Path) -> list[str]:
    """Write a version in a form to `out`, with a README.md that says how to use it: all of it or
    nothing. Returns what is to be said of it aloud.

    Raises:
        UserError: `out` is there already, or the version has not what the form is for.
        DiskFullError: nothing is left.
    """
    with whole_or_absent(out) as work:
        said = FORMS[form].write(version, work, out)
        (work / "README.md").write_text(readme(version, form, out, work, said))
    return said


def readme(version: Version, form: ExportFormat, out: Path, work: Path, said: list[str]) -> str:
    """What the directory is, how it is used, and what it lacks."""
    base = "" if version.is_whole else version.base_name
    labels = version.serving["labels"]
    facts = [
        f"version: {version.name}, {version.task}, measured in {version.dtype}",
        f"format: {form}",
        *([f"base: {base}"] if base else []),
        *asked(version),
        *said,
    ]
    how = FORMS[form].how.format(
        out=out.resolve(),
        model=out.resolve() / MODEL if (work / MODEL).is_dir() else base,
        base=base,
        dtype=version.dtype,
        loader=MODEL_CLASSES[version.task].__name__,
        labels=f", num_labels={len(labels)}" if labels else "",
        heads=version.heads.config.heads if "{heads}" in FORMS[form].how else "",
    )
    lines = "\n".join(f"- {fact}" for fact in facts)
    return f"# {version.name} as {form}\n\n{lines}\n\n{how}\n"


def asked(version: Version) -> list[str]:
    """How a model that writes is asked as it was trained: servers do not read serving.json."""
    serving = version.serving
    if is_labelled(version.task):
        return []
    prompt = "through the chat template" if serving["template"] == "chat" else "as they are"
    ends = " or ".join(map(str, serving["stop_ids"]))
    return [f"prompts: {prompt}; an answer ends with token {ends}"]
