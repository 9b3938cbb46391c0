"""From a YAML file to a `Recipe`, or to every error at once, each with its place and its fix.

Imports pydantic and yaml alone, so that a typo is answered in a blink.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from schemas.errors import Problem, UserError
from schemas.recipe import Evaluate, Recipe
from schemas.report import TASK_METRICS, figure_names
from schemas.tasks import TASKS, reads_images
from schemas.together import KINDS

#: `org/name`: what a hub id looks like.
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
HUB_COMMIT = re.compile(r"^[0-9a-f]{40}$")

#: The class of each candidate by its `method`. Pydantic's locations name these as well.
_METHODS = {
    name: model for model in KINDS for name in get_args(model.model_fields["method"].annotation)
}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in `path` with `key=value` overrides (`train.learning_rate=1e-3`) applied.

    A list item is named by its number: `candidates.1.rank=8`. Values are read as YAML.

    Raises:
        UserError: everything that is wrong with the file, not the first thing alone.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError.at(path, "no such file", "give the path of a recipe (YAML)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError.at(path, f"cannot be read: {error}", "a recipe is UTF-8 YAML") from error
    try:
        root = yaml.compose(text, Loader=UniqueKeyLoader)
        tree = yaml.load(text, Loader=UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _not_yaml(path, text, error) from None
    if not isinstance(tree, dict):
        raise UserError.at(path, "not a mapping", "a recipe starts with `name:` and `task:`")
    for override in overrides or []:
        _apply(tree, override)
    source = _Document(path, root, tree)
    problems = [
        *_figure_problems(source),
        *_text_problems(source),
        *_turbo_problems(source),
        *_file_problems(source),
    ]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
        problems += [_problem(source, detail) for detail in details if not _echo(detail, details)]
    if problems:
        raise UserError(sorted(problems, key=lambda problem: _line_of(problem.place)))
    return recipe


def is_hub_id(model: str, directory: Path) -> bool:
    """Whether a `base.model` names the hub: no such path beside the recipe, and `org/name`."""
    return not os.path.exists(directory / model) and bool(HUB_ID.match(model))


def resolve(name: str, recipe_path: Path) -> Path:
    """A path as written in a recipe, which means relative to the recipe's own directory."""
    return (recipe_path.parent / name).resolve()


def recipe_json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (YAML's own loader keeps the last, silently),
    reads 2e-3 as a number (YAML 1.1 wants 2.0e-3 and calls the rest a string), and names the
    line of a date or number that cannot be."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # PyYAML raises these for a text that its tag, resolved or written, does not fit.
            raise yaml.constructor.ConstructorError(
                None, None, f"{_short(node.value)} cannot be read: {error}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no key for a mapping: refused below
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _not_yaml(path: Path, text: str, error: yaml.YAMLError | RecursionError) -> UserError:
    """What keeps a text from being YAML, with its line where the parser knows it."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        found = f"not YAML: the control character {text[error.position]!r}"
        return UserError.at(f"{path}:{line}", found, "remove it")
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        return UserError.at(place, f"not YAML: {error.problem}", "correct this line")
    return UserError.at(path, "sections or brackets nested too deeply", "a recipe has five at most")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    place = f"--set {override}"
    if not equals or not key:
        raise UserError.at(place, "not of the form key=value", "e.g. --set train.epochs=1")
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError.at(
                    place,
                    f"{'.'.join(parts[:depth])} has items 0 to {len(node) - 1}",
                    "name an item by its number",
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise UserError.at(
                place, f"{'.'.join(parts[:depth])} is {node!r}, not a section", "shorten the key"
            )
        if last:
            try:
                node[index] = yaml.load(value, Loader=UniqueKeyLoader)
            except (yaml.YAMLError, RecursionError):
                raise UserError.at(place, f"{value!r} is not YAML", "quote the value") from None
        elif isinstance(node, dict):
            node = node.setdefault(index, {})
        else:
            node = node[index]


@dataclass(frozen=True)
class _Document:
    """A recipe as read: its path, YAML nodes (for line numbers) and plain values."""

    path: Path
    root: Any
    tree: dict[str, Any]

    def place(self, location: list[int | str]) -> str:
        return f"{self.path}:{_line(self.root, location)} {_dotted(location) or '(top level)'}"

    def get(self, *location: str) -> Any:
        node: Any = self.tree
        for part in location:
            node = node.get(part) if isinstance(node, dict) else None
        return node


def _line_of(place: str) -> int:
    match = re.search(r":(\d+) ", place)
    return int(match[1]) if match else 0


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`? " if near else ""


def _echo(detail: ErrorDetails, details: list[ErrorDetails]) -> bool:
    """Whether a "missing" only repeats a misspelt key of the same section, reported anyway."""
    if detail["type"] != "missing":
        return False
    unknown = [
        str(other["loc"][-1])
        for other in details
        if other["type"] == "extra_forbidden" and other["loc"][:-1] == detail["loc"][:-1]
    ]
    return bool(difflib.get_close_matches(str(detail["loc"][-1]), unknown, n=1, cutoff=0.5))


def _figure_problems(source: _Document) -> Iterator[Problem]:
    """Figures that are named in `select` and the gate but that no report will have."""
    task = source.get("task")
    if not isinstance(task, str) or task not in TASK_METRICS:
        return
    sizes = source.get("evaluate", "batch_sizes")
    if not isinstance(sizes, list):
        sizes = Evaluate().batch_sizes
    known = figure_names(task, sizes, _prompt_lengths(source))
    named: list[tuple[list[int | str], Any]] = []
    for goal in ("maximize", "minimize", "prefer"):
        named.append((["select", goal], source.get("select", goal)))
    for section in (["select", "subject_to"], ["register", "gate"]):
        bounds = source.get(*section)
        if isinstance(bounds, dict):
            named += [([*section, key], key) for key in bounds]
    for location, figure in named:
        if isinstance(figure, str) and figure not in known:
            yield Problem(
                source.place(location),
                f"unknown figure {figure!r}",
                f"{_nearest(figure, known)}A {task} report has: {', '.join(known)}",
            )


def _prompt_lengths(source: _Document) -> list[int]:
    """The recipe's, or the default where what it gives is none (and told elsewhere)."""
    given = source.get("evaluate", "prompt_tokens")
    try:
        return Evaluate.model_validate({"prompt_tokens": given}).prompt_lengths
    except ValueError:
        return Evaluate().prompt_lengths


#: What a recipe says of texts alone.
OF_TEXTS: tuple[list[int | str], ...] = (
    ["data", "max_length"],
    ["data", "on_overflow"],
    ["data", "template"],
    ["data", "retention"],
    ["evaluate", "prompt_tokens"],
    ["evaluate", "max_new_tokens"],
    ["evaluate", "generate_rows"],
)


def _text_problems(source: _Document) -> Iterator[Problem]:
    """What would have no effect where rows are images."""
    task = source.get("task")
    if not isinstance(task, str) or task not in TASKS or not reads_images(task):
        return
    for location in OF_TEXTS:
        value = source.get(*map(str, location))
        if value is not None:
            found = f"found {_short(value)}, which is said of texts, and {task} reads images"
            yield Problem(source.place(location), found, "take it out")


def _turbo_problems(source: _Document) -> Iterator[Problem]:
    """Turbo heads where there is nothing that they could draft, or nobody who could be finished
    with them."""
    candidates = source.get("candidates")
    candidates = candidates if isinstance(candidates, list) else []
    asked = source.get("finish", "turbo") is not None
    places: list[list[int | str]] = [["finish", "turbo"]] if asked else []
    for index, candidate in enumerate(candidates):
        parts = candidate if isinstance(candidate, list) else [candidate]
        if isinstance(candidate, dict) and isinstance(candidate.get("of"), list):
            parts = candidate["of"]
        methods = [part.get("method") for part in parts if isinstance(part, dict)]
        if "turbo_lora" in methods:
            places.append(["candidates", index, "method"])
        for method in methods if asked else []:
            why = getattr(_METHODS.get(method), "HEADLESS", "") if isinstance(method, str) else ""
            if why:
                yield Problem(
                    source.place(["candidates", index]),
                    f"{method} {why}, and finish.turbo trains heads for whichever is selected",
                    "make it a recipe of its own, or take `turbo` out",
                )
    task = source.get("task")
    if isinstance(task, str) and task in TASKS and task != "causal-lm":
        for place in places:
            yield Problem(
                source.place(place),
                f"Turbo heads draft the tokens of a causal language model, and the task is {task}",
                "take it out" if place == ["finish", "turbo"] else "choose lora",
            )


def _file_problems(source: _Document) -> Iterator[Problem]:
    """Files and directories that are named but not there, and hub ids without a commit."""
    directory = source.path.parent
    model = source.get("base", "model")
    # os.path, since pathlib raises where a name is longer than any file's.
    if isinstance(model, str) and not os.path.exists(directory / model):
        revision = source.get("base", "revision")
        if not HUB_ID.match(model):
            yield Problem(
                source.place(["base", "model"]),
                f"no such directory: {_short(model)}",
                "give a directory relative to the recipe file, or a hub id `org/name`",
            )
        elif not isinstance(revision, str) or not HUB_COMMIT.match(revision):
            yield Problem(
                source.place(["base", "model"]),
                f"{model} is a hub id without a pinned commit (and no such directory exists)",
                "add `revision:` with the 40 hexadecimal digits of the commit, since a branch "
                "can change under a recipe",
            )
    for split in ("train", "test", "retention"):
        name = source.get("data", split, "path")
        if not isinstance(name, str) or name.startswith("hub:"):
            continue
        if not os.path.isfile(directory / name):
            yield Problem(
                source.place(["data", split, "path"]),
                f"no such file: {_short(name)}",
                "paths are relative to the recipe file; `hub:NAME` names a hub data set",
            )


def _problem(source: _Document, detail: ErrorDetails) -> Problem:
    """One pydantic error in the words of a recipe's author."""
    tree = source.tree
    location = _yaml_location(detail["loc"], tree)
    place = source.place(location)
    kind = detail["type"]
    context = detail.get("ctx", {})
    found = detail["input"]
    if kind == "extra_forbidden":
        keys = _allowed_keys(location[:-1], tree)
        hint = _nearest(str(location[-1]), keys)
        return Problem(place, "unknown key", f"{hint}Allowed here: {', '.join(keys)}")
    if kind == "missing":
        return Problem(place, "is missing", "add this key")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        wanted = sorted(_METHODS)
        value = found.get("method") if isinstance(found, dict) else found
        hint = _nearest(str(value), wanted)
        shown = f"unknown method {value!r}" if value is not None else "no `method`"
        return Problem(place, shown, f"{hint}Known methods: {', '.join(wanted)}")
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "")
        hint = _nearest(str(found), allowed.replace(" or ", ", ").split(", "))
        return Problem(place, f"found {found!r}", f"{hint}Allowed: {allowed}")
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return Problem(place, f"found {_short(found)}", message)
    if kind in ("model_type", "model_attributes_type"):
        return Problem(place, f"found {_short(found)}", "a section with keys is needed here")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(place, f"found {_short(found)}", message.replace("input should", "it should"))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _yaml_location(location: tuple[int | str, ...], tree: Any) -> list[int | str]:
    """A pydantic location without the union branches that it names between the keys."""
    parts: list[int | str] = []
    node = tree
    for index, part in enumerate(location):
        last = index == len(location) - 1
        inside = (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if inside:
            node = node[part]
            parts.append(part)
        elif last and isinstance(node, dict) and part not in _METHODS:
            parts.append(part)
    return parts


def _dotted(location: list[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _line(root: Any, location: list[int | str]) -> int:
    """The line, from 1, of the deepest part of a location that stands in the YAML."""
    node, line = root, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    node, line = value, key.start_mark.line + 1
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            if part >= len(node.value):
                return line
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _allowed_keys(location: list[int | str], tree: Any) -> list[str]:
    """The keys that may stand at a location, read from the classes."""
    models: list[type[BaseModel]] = [Recipe]
    node = tree
    for part in location:
        node = node[part]
        if isinstance(part, int):
            continue
        fields = [field for model in models if (field := _field(model, str(part)))]
        models = [model for field in fields for model in _models_in(field.annotation)]
    if isinstance(node, dict) and node.get("method") in _METHODS:
        models = [_METHODS[node["method"]]]
    keys: dict[str, None] = {}
    for model in models:
        keys.update(dict.fromkeys(f.alias or name for name, f in model.model_fields.items()))
    return list(keys)


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    for name, field in model.model_fields.items():
        if key == (field.alias or name):
            return field
    return None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
