"""Fine-tuning: the step as a pure function, and a run that logs, evaluates, saves and resumes.

    encoded = lora_jax.data.encode(lora_jax.data.load("data/", "train"), model.tokenizer, max_length=512)
    result = train(model.apply, params, encoded.examples, config=TrainConfig(num_train_epochs=2), output="out")

`make_step` is the step alone, for a loop of your own.
"""

from lora_jax._extras import require

require(__name__, train=("grain", "orbax.checkpoint", "rich", "sklearn", "tensorboardX"))

from lora_jax.train._config import TrainConfig as TrainConfig
from lora_jax.train._dpo import answer_log_probs as answer_log_probs
from lora_jax.train._dpo import dpo_loss as dpo_loss
from lora_jax.train._evaluate import Evaluation as Evaluation
from lora_jax.train._evaluate import Evaluator as Evaluator
from lora_jax.train._evaluate import evaluate as evaluate
from lora_jax.train._loop import TrainResult as TrainResult
from lora_jax.train._loop import train as train
from lora_jax.train._loss import classification_loss as classification_loss
from lora_jax.train._loss import cross_entropy as cross_entropy
from lora_jax.train._loss import next_token_loss as next_token_loss
from lora_jax.train._loss import regression_loss as regression_loss
from lora_jax.train._meter import Record as Record
from lora_jax.train._optimizer import averaged as averaged
from lora_jax.train._optimizer import make_optimizer as make_optimizer
from lora_jax.train._optimizer import schedule as schedule
from lora_jax.train._orpo import orpo_loss as orpo_loss
from lora_jax.train._reference import Reference as Reference
from lora_jax.train._save import Stopped as Stopped
from lora_jax.train._step import StepMetrics as StepMetrics
from lora_jax.train._step import apply_to_batch as apply_to_batch
from lora_jax.train._step import make_loss_sums as make_loss_sums
from lora_jax.train._step import make_step as make_step
from lora_jax.train._task import LANGUAGE_MODELLING as LANGUAGE_MODELLING
from lora_jax.train._task import REGRESSION as REGRESSION
from lora_jax.train._task import Task as Task
from lora_jax.train._task import classification as classification
from lora_jax.train._task import dpo as dpo
from lora_jax.train._task import orpo as orpo
from lora_jax.train._task import task_of as task_of
from lora_jax.train._token_losses import losses_in_chunks as losses_in_chunks
