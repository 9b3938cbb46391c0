"""`python -m tasks.compare CALL.json --store DIR`."""

from schemas.stages import CompareSpec
from tasks.compare.stage import run
from tasks.core.stage import main

if __name__ == "__main__":
    main(CompareSpec, run)
