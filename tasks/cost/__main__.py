"""`python -m tasks.cost CALL.json --store DIR`."""

import sys
from pathlib import Path

from schemas.candidates import QLora
from schemas.stages import Call, CostSpec


def hide_bitsandbytes(path: Path) -> None:
    """Where no candidate of a call is held in 4 bits, take bitsandbytes for absent.

    PEFT imports it wherever it is installed, and it torch's compiler: a part of the time to a
    first answer. A module that is None is absent to Python, and so to PEFT and transformers.
    """
    spec = CostSpec.model_validate(Call.model_validate_json(path.read_bytes()).spec)
    parts = [part for candidate in spec.candidates for part in candidate.parts]
    if not any(isinstance(part, QLora) for part in parts):
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


if __name__ == "__main__":
    if len(sys.argv) > 1 and Path(sys.argv[1]).is_file():
        hide_bitsandbytes(Path(sys.argv[1]))
    # After it is hidden.
    from tasks.core.stage import main
    from tasks.cost.stage import run

    main(CostSpec, run)
