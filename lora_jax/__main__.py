"""`python -m lora_jax` and `lora-jax` start the command line, or print one line that names the missing extra."""

import importlib
import sys

from lora_jax._extras import MissingExtra


def main() -> int:
    """Run the command that `sys.argv` names and return its exit code."""
    try:
        cli = importlib.import_module("lora_jax.cli")
    except MissingExtra as missing:
        print(f"lora-jax: {missing}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
