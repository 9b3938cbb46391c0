"""`python -m tasks.train CALL.json --store DIR`"""

from schemas.stages import TrainSpec
from tasks.core.stage import main
from tasks.train.stage import run

if __name__ == "__main__":
    main(TrainSpec, run)
