"""The `--chat-template` flag, and the file beside an adapter that has the template of its training."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import lora_jax
from lora_jax import _disk
from lora_jax.cli._base import Base

FILE = "chat_template.jinja"

_Base = TypeVar("_Base", bound=Base)


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    """The chat template of conversations."""

    chat_template: Path | None = None
    """file of a chat template (Jinja), used in place of the tokenizer's; training writes it into the adapter's folder,
    where the other commands find it"""

    def of(self, base: _Base) -> _Base:
        """Return the base with this template, if one is given.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no text.
        """
        if self.chat_template is None:
            return base
        lora_jax.models.read_template(self.chat_template)
        return replace(base, template_file=self.chat_template)

    def check_text_only(self) -> None:
        """Refuse a template for rows with labels, which have no conversations.

        Raises:
            ValueError: One is given.
        """
        if self.chat_template is not None:
            raise ValueError(
                f"chat_template: {self.chat_template} given, but rows with labels have no conversations; leave it out"
            )

    def save(self, folder: Path, base: Base) -> None:
        """Write the template of a training beside its adapter, or remove an earlier one if it was the model's own.

        Without the flag it is that of the adapter that the training went on from, if there is one.
        """
        path = self.chat_template
        if path is None and base.adapter_folder is not None and (base.adapter_folder / FILE).is_file():
            path = base.adapter_folder / FILE
        if path is None:
            (folder / FILE).unlink(missing_ok=True)
        elif path.resolve() != (folder / FILE).resolve():
            _disk.write(folder / FILE, lora_jax.models.read_template(path))


NONE = TemplateFlags()
