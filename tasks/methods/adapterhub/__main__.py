"""`python -m tasks.methods.adapterhub`"""

import argparse
import sys
from pathlib import Path

from schemas.errors import UserError
from tasks.methods.adapterhub.convert import from_adapterhub, to_adapterhub
from tasks.methods.adapterhub.names import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.methods.adapterhub")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="come", action="store_true", help="AdapterHub's to PEFT's")
    way.add_argument("--to", dest="go", action="store_true", help="PEFT's to AdapterHub's")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model-type", choices=sorted(MODELS), help="of the base; with --to")
    parser.add_argument("--name", default="default", help="of the adapter; with --to")
    arguments = parser.parse_args()
    if arguments.go and arguments.model_type is None:
        parser.error("--to needs --model-type")
    try:
        if arguments.go:
            to_adapterhub(arguments.source, arguments.target, arguments.model_type, arguments.name)
        else:
            from_adapterhub(arguments.source, arguments.target)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
