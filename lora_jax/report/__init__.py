"""The report of section 7 for one adapter, or for two: measured kernel by kernel, written as JSON, HTML and PNG.

    measured = lora_jax.report.measure(lora_jax.peft.updates("adapter"))
    lora_jax.report.write("report", measured, title="adapter")

`lora-jax analyze` does this for folders and files.
"""

from lora_jax._extras import require

require(__name__, report=("jinja2", "markupsafe", "matplotlib"))

from lora_jax.report._measure import Measured as Measured
from lora_jax.report._measure import check_comparable as check_comparable
from lora_jax.report._measure import measure as measure
from lora_jax.report._measure import positions_of as positions_of
from lora_jax.report._summary import Kind as Kind
from lora_jax.report._summary import by_kind as by_kind
from lora_jax.report._write import check_free as check_free
from lora_jax.report._write import write as write
