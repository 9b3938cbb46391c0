"""`python -m tasks.cost CALL.json --store DIR`."""

from schemas.stages import CostSpec
from tasks.cost import lean

if __name__ == "__main__":
    lean.start()
    # After that.
    from tasks.core.stage import main
    from tasks.cost.stage import run

    lean.started()
    main(CostSpec, run)
    lean.end()
