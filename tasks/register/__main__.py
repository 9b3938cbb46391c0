"""`python -m tasks.register CALL.json --store DIR`, with MLFLOW_TRACKING_URI in the environment."""

from schemas.stages import RegisterSpec
from tasks.core.stage import main
from tasks.register.stage import run

if __name__ == "__main__":
    main(RegisterSpec, run)
