"""Reading data files and making batches of token ids, with a weight for each target of the loss.

    rows = load("data/", "train")                          # the rows of a file, checked line by line
    encoded = encode(rows, tokenizer, max_length=512)      # token ids, and which of them are targets
    for batch in batches(encoded.examples, 16, seed=0):    # numpy arrays [16, length], few lengths
        ...

A file holds rows of one form: `{"text"}`, `{"prompt", "completion"}`, `{"messages"}`, `{"text", "label"}` or
`{"text", "text_pair", "label"}`, Alpaca's or ShareGPT's; `load(..., columns={"prompt": "question", "completion":
"answer"})` reads columns of other names. Rows of `{"prompt", "chosen", "rejected"}` are tokenised by
`encode_preferences`. For rows with labels, and for GLUE's own files (`load(..., glue="cola")`),
there is `encode_labelled(rows, tokenizer, 128, labels_of(rows))`.
"""

from lora_jax.data._batches import WINDOW as WINDOW
from lora_jax.data._batches import AnyExample as AnyExample
from lora_jax.data._batches import Batch as Batch
from lora_jax.data._batches import batches as batches
from lora_jax.data._batches import bucket as bucket
from lora_jax.data._batches import pad as pad
from lora_jax.data._chat_template import render_chat as render_chat
from lora_jax.data._encode import Encoded as Encoded
from lora_jax.data._encode import Example as Example
from lora_jax.data._encode import Tokenizer as Tokenizer
from lora_jax.data._encode import TruncationMode as TruncationMode
from lora_jax.data._encode import encode as encode
from lora_jax.data._encode_labelled import EncodedLabelled as EncodedLabelled
from lora_jax.data._encode_labelled import LabelledExample as LabelledExample
from lora_jax.data._encode_labelled import PairTokenizer as PairTokenizer
from lora_jax.data._encode_labelled import encode_labelled as encode_labelled
from lora_jax.data._encode_preferences import PreferenceExample as PreferenceExample
from lora_jax.data._encode_preferences import encode_preferences as encode_preferences
from lora_jax.data._forms import Format as Format
from lora_jax.data._glue import GLUE_TASKS as GLUE_TASKS
from lora_jax.data._glue import GlueTask as GlueTask
from lora_jax.data._glue import glue_task as glue_task
from lora_jax.data._labels import Labels as Labels
from lora_jax.data._labels import labels_of as labels_of
from lora_jax.data._load import Split as Split
from lora_jax.data._load import load as load
from lora_jax.data._load import read_jsonl as read_jsonl
from lora_jax.data._load import split_files as split_files
from lora_jax.data._mixture import Mixture as Mixture
from lora_jax.data._mixture import check_weights as check_weights
from lora_jax.data._mixture import mix_streams as mix_streams
from lora_jax.data._pack import Packing as Packing
from lora_jax.data._pack import pack as pack
from lora_jax.data._pack import packing_of as packing_of
from lora_jax.data._rows import Chat as Chat
from lora_jax.data._rows import Completion as Completion
from lora_jax.data._rows import Labelled as Labelled
from lora_jax.data._rows import Loss as Loss
from lora_jax.data._rows import Preference as Preference
from lora_jax.data._rows import Row as Row
from lora_jax.data._rows import Text as Text
from lora_jax.data._rows import listed as listed
from lora_jax.data._sets import has_splits as has_splits
from lora_jax.data._stream import stream as stream
