"""Preferences, a tokenizer for them and losses on which we are compared with TRL's DPOTrainer and ORPOTrainer."""

from peft_cases import CASES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CASE = CASES["untied"]
BETA = 0.3
LOSSES = {"sigmoid": 0.0, "robust": 0.1, "hinge": 0.0, "ipo": 0.0}  # label_smoothing of each
ORPO_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"),
    *("nll_loss", "log_odds_ratio", "log_odds_chosen"),
)
SPECIAL = ("<pad>", "<s>", "</s>", "<user>", "<assistant>", "<unk>")
WORDS = (
    *SPECIAL,
    *["the", "sky", "is", "blue", "green", "now", "and", "then", "why", "how", "who", "sees", "it", "red", "yes", "no"],
)
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer():
    """Each word a token."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)


def said(*contents):
    """A conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content):
    return [{"role": "assistant", "content": content}]


# Of each form three rows, with answers of different lengths.
ROWS = {
    "text": [
        {"prompt": "the sky is", "chosen": " blue now and then", "rejected": " green"},
        {"prompt": "who sees it", "chosen": " yes", "rejected": " no no it is red now"},
        {"prompt": "why is the sky blue", "chosen": " how is it red", "rejected": " then it is"},
    ],
    "text without prompt": [
        {"chosen": "the sky is blue now and then", "rejected": "the sky is green"},
        {"chosen": "who sees it yes", "rejected": "who sees it no no it is red now"},
        {"chosen": "why is the sky blue how is it red", "rejected": "why is the sky blue then it is"},
    ],
    "chat": [
        {"prompt": said("is the sky blue"), "chosen": answer("yes"), "rejected": answer("no it is green")},
        {"prompt": said("who sees it", "yes", "why"), "chosen": answer("now and then"), "rejected": answer("how")},
        {"prompt": said("the sky"), "chosen": answer("is red"), "rejected": answer("is red and green and blue")},
    ],
    "chat without prompt": [
        {"chosen": said("is the sky blue", "yes"), "rejected": said("is the sky blue", "no it is green")},
        {"chosen": said("who sees it", "yes", "why", "now"), "rejected": said("who sees it", "yes", "why", "how")},
        {"chosen": said("the sky", "is red"), "rejected": said("the sky", "is red and green and blue")},
    ],
}
