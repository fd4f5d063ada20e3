"""The report on one adapter or two, after section 7 of the paper, as JSON, HTML and PNG files.

    measured = lora_jax.report.measure(lora_jax.peft.updates("adapter"))
    lora_jax.report.write("report", measured, title="adapter")

`lora-jax analyze` does this for folders and files of adapters.
"""

from lora_jax._extras import require

require(__name__, report=("jinja2", "markupsafe", "matplotlib"))

from lora_jax.report._loss import loss_png as loss_png
from lora_jax.report._measure import KernelMeasurements as KernelMeasurements
from lora_jax.report._measure import check_comparable as check_comparable
from lora_jax.report._measure import measure as measure
from lora_jax.report._measure import positions_of as positions_of
from lora_jax.report._summary import KindSummary as KindSummary
from lora_jax.report._summary import by_kind as by_kind
from lora_jax.report._write import check_free as check_free
from lora_jax.report._write import write as write
