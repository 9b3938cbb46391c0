from schemas.stages import PageSpec
from tasks.core.stage import main
from tasks.report.run import run

if __name__ == "__main__":
    main(PageSpec, run)
