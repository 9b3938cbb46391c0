"""`python -m tasks.evaluate CALL.json --store DIR`."""

from schemas.stages import EvaluateSpec
from tasks.core.stage import main
from tasks.evaluate.stage import run

if __name__ == "__main__":
    main(EvaluateSpec, run)
