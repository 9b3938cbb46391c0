"""`python -m tasks.merge CALL.json --store DIR`."""

from schemas.stages import MergeSpec
from tasks.core.stage import main
from tasks.merge.stage import run

if __name__ == "__main__":
    main(MergeSpec, run)
