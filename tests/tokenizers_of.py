"""Small tokenizers of the kinds that models come with, made in memory."""

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BOS, EOS = 1, 2
LETTERS = "abceghinrstuvwxyz?:()<>=."


def finished(core, **settings):
    """It puts `<s>` in front, unless it is told not to."""
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **settings
    )


def merging(space):
    """A vocabulary of letters in which words of two letters, and a space before them, are joined."""
    merges = [("a", "b"), (space, "a"), ("y", "e"), ("ye", "s"), (space, "yes"), (":", space), ("ab", "ab")]
    words = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), space, *LETTERS, *(one + two for one, two in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(words))}
    return Tokenizer(kinds.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def _decoder():
    back = decoders.Replace("▁", " ")
    return decoders.Sequence([back, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def metaspace(scheme):
    """Llama's: a mark before the first word (`"first"`), or after every special token too (`"always"`)."""
    core = merging("▁")
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = _decoder()
    return finished(core)


def prepend():
    """Llama 2's file: the mark is written in front by a normalizer."""
    core = merging("▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = _decoder()
    return finished(core)


def byte_level():
    """GPT-2's and Llama 3's: bytes, and nothing in front."""
    merges = [("a", "b"), ("Ġ", "a"), ("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("ab", "ab")]
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(one + two for one, two in merges)]
    core = Tokenizer(kinds.BPE(vocab={token: number for number, token in enumerate(words)}, merges=merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return finished(core)


KINDS = {
    "metaspace": lambda: metaspace("first"),
    "metaspace_legacy": lambda: metaspace("always"),
    "prepend": prepend,
    "byte_level": byte_level,
}

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ '\n' }}{{ m.content }}{{ eos_token }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '\n' }}{% endif %}"
)
