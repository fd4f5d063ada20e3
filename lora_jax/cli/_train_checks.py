"""Refuses settings and folders of `lora-jax train` before a model or data are read."""

from lora_jax import _disk
from lora_jax._config import CHANGES_KERNELS
from lora_jax._processes import several
from lora_jax.checkpoint import newest
from lora_jax.cli import _base, _card, _embedded, _hub, _labels, _new_tokens, _run_file, _start, _template
from lora_jax.cli._train_settings import Settings
from lora_jax.train._report import check_installed
from lora_jax.train._save import CHECKPOINTS, FILES, check_ours

RUN_FILES = (
    _labels.FILE,
    _run_file.FILE,
    _card.CURVE,
    "adapter_config.json",
    "adapter_model.safetensors",
    *FILES,
    _template.FILE,
)


def check(settings: Settings) -> None:
    """Refuse settings and outputs before any model or data are read."""
    _embedded.check_data_given(settings.base, settings.data)
    settings.reading.check(settings.data, settings.train.max_steps)
    if settings.lora.init == "loftq" and settings.base.quantize is None:
        raise ValueError("init: 'loftq' given for a base that isn't quantized, expected --quantize too; or take pissa")
    if settings.lora.init in CHANGES_KERNELS and several():
        raise ValueError(f"init: {settings.lora.init!r} given for several processes, expected one; take another init")
    _start.check_reference(settings.train, settings.prefix_length)
    check_installed(settings.train)
    if settings.add_tokens is not None:
        _new_tokens.check(settings.add_tokens, settings.output)
    if settings.push_to_hub is not None:
        _hub.check(settings.push_to_hub)
    _base.check_writable(settings.output)
    if settings.from_adapter is not None:
        _start.check_adapter(
            settings.from_adapter, settings.output, settings.lora, settings.prefix_length, settings.add_tokens
        )
    held = [name for name in RUN_FILES if (settings.output / name).exists()]
    if held and not (settings.overwrite or settings.resume):
        raise FileExistsError(
            f"{settings.output}: holds a run already ({held[0]}); pass --overwrite or another --output"
        )
    _disk.check_unheld(settings.output)
    if held and not settings.resume:
        check_ours(settings.output)
        _base.check_adapter_written_here(settings.output)
    if settings.resume and newest(settings.output / CHECKPOINTS) is None:
        raise FileNotFoundError(
            f"{settings.output}: no checkpoint to resume from (they are written every --save-minutes, or every "
            "--save-steps); leave --resume out"
        )
