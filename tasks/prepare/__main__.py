"""`python -m tasks.prepare CALL.json --store DIR`."""

if __name__ == "__main__":
    # Inside: worker processes import this module too, and need nothing of what it imports.
    from schemas.stages import PrepareSpec
    from tasks.core.stage import main
    from tasks.prepare.stage import run

    main(PrepareSpec, run)
