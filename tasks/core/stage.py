"""How every stage is started: `python -m tasks.<stage> CALL.json --store DIR`.

With - for CALL.json it is read from standard input, so that a stage can import before it is called.

The last line on standard output names the entry. A user's mistake exits with 2, any other
failure with 1; with `PEFTFLOW_EVENTS=1` the error comes as one JSON event with its places.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from schemas.errors import StageError, UserError
from schemas.stages import Call, Spec
from tasks.core.progress import emit
from tasks.core.store import Store

AnySpec = TypeVar("AnySpec", bound=Spec)
Paths = dict[str, Path]


def main(spec_type: type[AnySpec], run: Callable[[AnySpec, Paths, Path], dict[str, Any]]) -> None:
    """The command line of one stage; `run(spec, paths, out_dir)` returns the entry's facts."""
    parser = argparse.ArgumentParser(prog=f"python -m tasks.{Path(sys.argv[0]).parent.name}")
    parser.add_argument("call", help="a JSON file, or -: see schemas.stages.Call")
    parser.add_argument("--store", type=Path, required=True, help="the store's root directory")
    arguments = parser.parse_args()
    given = arguments.call
    text = sys.stdin.buffer.read() if given == "-" else Path(given).read_bytes()
    call = Call.model_validate_json(text)
    try:
        spec = spec_type.model_validate(call.spec)
        paths = {name: Path(path) for name, path in call.paths.items()}
        entry = Store(arguments.store).make(
            call, lambda out: run(spec, paths, out), resumes=spec_type.RESUMES
        )
    except UserError as error:
        problems = [problem.as_dict() for problem in error.problems]
        emit({"event": "user_error", "message": str(error), "problems": problems})
        sys.exit(2)
    except Exception as error:
        if not isinstance(error, StageError):
            traceback.print_exc()
        kind = type(error) if isinstance(error, StageError) else StageError
        message = str(error) or type(error).__name__
        emit({"event": "failure", "message": message, "kind": kind.__name__})
        sys.exit(1)
    emit({"event": "entry", "message": str(entry.path), "key": entry.key})
