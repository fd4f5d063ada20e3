"""Draw docs/train.svg: what `lora-jax train` prints, from a run of it.

python docs/make_train_svg.py
"""

import contextlib
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from lora_jax import cli
from lora_jax.cli import _show

PICTURE = Path(__file__).with_name("train.svg")
FONT_FACES = re.compile(r"@font-face \{.*?\}\n", re.DOTALL)  # a picture should fetch nothing


def main() -> None:
    console = Console(record=True, width=112, highlight=False, force_terminal=False)
    _show.results = _show.notes = lambda: console
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        console.print("$ lora-jax train", style="bold")
        if cli.main(["train"]) != 0:
            raise SystemExit(1)
    console.save_svg(str(PICTURE), title="lora-jax train", theme=MONOKAI)
    PICTURE.write_text(FONT_FACES.sub("", PICTURE.read_text()))


if __name__ == "__main__":
    main()
