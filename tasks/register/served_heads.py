"""How a registered version writes with its Turbo heads. It travels as `turbo.py`, beside `heads/`
and `speculate/`, and imports nothing of this project but what lies there.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def writer_with_heads(package: Path, model: Any, tokenizer: Any) -> Any:
    """What writes with the Turbo heads that travel with the version.

    Raises:
        RuntimeError: they were made for another tokenizer. HeadsError: for another model.
        NotSpeculableError: the libraries here read a tree of drafts otherwise than each of its
            paths.
    """
    speculate = import_folder(package / "speculate")
    heads = speculate.heads.TurboHeads.load(package / "heads")
    wanted = heads.config.made_for.get("tokenizer")
    if wanted not in (None, speculate.identity.tokenizer_fingerprint(tokenizer)):
        raise RuntimeError(
            f"{package / 'heads'} were trained with another tokenizer than the one beside "
            "them, so its tokens are others; take the version as it was registered"
        )
    writer = speculate.decode.Writer(speculate.parts.parts_of(model), heads, lookup=True)
    speculate.trial.require_exact(writer)
    return writer


def import_folder(path: Path) -> Any:
    """A package that travels with the version, with all its modules. Another version's is another
    package."""
    digest = hashlib.sha256()
    names = sorted(file.stem for file in path.glob("*.py"))
    for name in names:
        digest.update((path / f"{name}.py").read_bytes())
    whole = f"peftflow_{path.name}_{digest.hexdigest()[:12]}"
    if whole not in sys.modules:
        found: Any = importlib.util.spec_from_file_location(
            whole, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        sys.modules[whole] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[whole])
        for name in names:
            if name != "__init__":
                importlib.import_module(f"{whole}.{name}")
    return sys.modules[whole]
