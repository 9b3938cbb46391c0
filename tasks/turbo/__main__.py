"""`python -m tasks.turbo CALL.json --store DIR`"""

from schemas.stages import TurboSpec
from tasks.core.stage import main
from tasks.turbo.stage import run

if __name__ == "__main__":
    main(TurboSpec, run)
