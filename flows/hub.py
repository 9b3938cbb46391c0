"""Base models from the hub, at a pinned commit, as a local directory."""

from __future__ import annotations

import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from schemas.errors import UserError
from schemas.load import is_hub_id, resolve
from schemas.recipe import Data, Recipe, Source

#: What a base is described by: its configuration and its tokenizer.
TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
#: What a base may be made of. Pickles (`.bin`, `.pt`) are not even fetched.
WANTED = [*TEXTS, "*.safetensors"]


def base_directory(recipe: Recipe, recipe_path: Path, *, weights: bool = True) -> Path:
    """Where the base lies on this machine; a hub id is fetched into the hub's own cache.

    weights: whether they are fetched too.

    Raises:
        UserError: the hub id cannot be had; the message says how to go on without a network.
    """
    model, revision = recipe.base.model, recipe.base.revision
    if recipe.base.shape is not None:
        raise UserError.at(
            f"{recipe_path} base.shape",
            "a shape has no weights",
            "give base.model; a shape is for `peftflow plan` alone",
        )
    if not is_hub_id(model, recipe_path.parent):
        return resolve(model, recipe_path)
    place = f"{recipe_path} base.model"
    return fetched(model, revision, place, "write `model: DIR`", weights=weights)


def fetched(
    model: str, revision: str | None, place: str, instead: str, *, weights: bool = True
) -> Path:
    """A base of the hub in its own cache.

    place, instead: for errors, where its id stands and what to write of a directory DIR.
    weights: whether they are fetched too.

    Raises:
        UserError: it cannot be had; the message says how to go on without a network.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = not reachable()
    try:
        directory = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=WANTED if weights else TEXTS,
                local_files_only=cached,
            )
        )
        if cached and weights and not any(directory.glob("*.safetensors")):
            # A plan has fetched its texts, which the client takes for all of it.
            raise LocalEntryNotFoundError(f"{directory} holds no weights")
        return directory
    except LocalEntryNotFoundError as error:
        raise UserError.at(
            place,
            f"{model}@{revision} is not in the local cache and the hub cannot be reached",
            "fetch it where there is a network (`hf download "
            f"{model} --revision {revision} --local-dir DIR`) and {instead}",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        summary = str(error).strip().splitlines()[0]
        raise UserError.at(
            place,
            f"the hub refuses {model}@{revision}: {summary}",
            "check the id and the commit; a gated model needs HF_TOKEN in the environment",
        ) from error


def reachable(timeout_s: float = 3.0) -> bool:
    """Whether the hub answers at all, so that nobody waits half a minute for its client's retries.

    Behind a proxy only the client can tell, so the answer is yes.
    """
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    if "https" in urllib.request.getproxies():
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout_s).close()
    except OSError:
        return False
    return True


def offline(recipe: Recipe) -> bool:
    """Whether stages ask no hub: no rows come from there, or it is out of reach.

    Out of reach, rows that were fetched before are still found, and others missed at once.
    """
    needed = any(source.path.startswith("hub:") for source in sources(recipe.data).values())
    return not (needed and reachable())


def sources(data: Data) -> dict[str, Source]:
    """A recipe's row sources by split. A hold-out is none: it is a share of train."""
    given = {"train": data.train, "test": data.test}
    if data.retention is not None:
        given["retention"] = data.retention
    return {name: source for name, source in given.items() if isinstance(source, Source)}
