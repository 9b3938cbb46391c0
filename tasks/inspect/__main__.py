"""`python -m tasks.inspect CALL.json --store DIR`."""

from schemas.stages import InspectSpec
from tasks.core.stage import main
from tasks.inspect.stage import run

if __name__ == "__main__":
    main(InspectSpec, run)
