"""`python -m tasks.cost CALL.json --store DIR`."""

from schemas.stages import CostSpec
from tasks.core.stage import main
from tasks.cost.stage import run

if __name__ == "__main__":
    main(CostSpec, run)
