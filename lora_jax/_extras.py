"""Packages that only a part of the library needs, and the extra that installs them."""

from importlib.util import find_spec


class MissingExtra(ImportError):
    """A package that isn't installed; the message names the extra that brings it."""


def require(needs: str, **extras: tuple[str, ...]) -> None:
    """Check that packages are installed, without importing them.

    Args:
        needs: The module or command that needs them, for the message.
        extras: For each extra of `lora_jax`, its packages that are needed, by the name that is imported.

    Raises:
        MissingExtra: A package isn't installed.

    >>> require("lora_jax.peft", hf=("no_such_package",))
    Traceback (most recent call last):
    lora_jax._extras.MissingExtra: lora_jax.peft needs no_such_package: pip install 'lora_jax[hf]'
    """
    for extra, packages in extras.items():
        for package in packages:
            if not _is_installed(package):
                raise MissingExtra(f"{needs} needs {package}: pip install 'lora_jax[{extra}]'", name=package)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package, such as orbax of `orbax.checkpoint`
        return False
