"""Writing to the disk: complete files or none, one run in a folder, and JSON that any reader accepts."""

from lora_jax._disk.atomic import check_free as check_free
from lora_jax._disk.atomic import placing as placing
from lora_jax._disk.atomic import replacing as replacing
from lora_jax._disk.atomic import write as write
from lora_jax._disk.json import finite as finite
from lora_jax._disk.json import to_json as to_json
from lora_jax._disk.lock import check_unheld as check_unheld
from lora_jax._disk.lock import hold as hold
