"""Small vocabularies of every kind of decoding, made in memory."""

import functools
import io
import json

import sentencepiece
import tokenizers

from meshway.framework.data.vocabularies import Bytes, HuggingFace, Opaque, SentencePiece
from meshway.framework.data.vocabulary import _byte_of_letter

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "the",
    "##ing",
    "##s",
    ".",
    ",",
    "'",
    "##'",
    "n",
    "##t",
    "do",
    "not",
    "don",
    "n't",
    "é",
    "##☃",
    "[UNK]",
    "a",
    "!",
]
PIECES = ["<unk>", "</s>", *BYTES, "▁", "▁▁", "▁a", "a", "b", "▁b▁c", "☃", " ", ".", "�"]
TEXTS = [f"A naïve line {n}, and  two ☃ of 東京.\n" for n in range(40)]


def hugging_face(model, decoder, added=()):
    made = tokenizers.Tokenizer(model)
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens(list(added))
    return HuggingFace(made.to_str().encode(), eos_id=None)


def plain_bpe(tokens, decoder):
    vocabulary = {token: n for n, token in enumerate(tokens)}
    return hugging_face(tokenizers.models.BPE(vocabulary, [], byte_fallback=True), decoder, ["<|end|>", "▁<x>"])


def sentence_piece(**settings):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=330, hard_vocab_limit=False, byte_fallback=True,
        minloglevel=2, **settings,
    )  # fmt: skip
    return SentencePiece(file.getvalue(), extra_ids=3)


@functools.cache
def vocabulary(name):
    decoders, models = tokenizers.decoders, tokenizers.models
    metaspace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    words = {word: n for n, word in enumerate(WORDS)}
    match name:
        case "byte-level":
            letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
            return plain_bpe([*sorted(letters), "Ġthe", "âĺ", "ĥĊ", "☃"], decoders.ByteLevel())
        case "byte fallback":
            return plain_bpe(PIECES, decoders.Sequence([*metaspace, decoders.Strip(" ", 1, 0)]))
        case "byte fallback, two spaces dropped":
            return plain_bpe(PIECES, decoders.Sequence([*metaspace, decoders.Strip(" ", 2, 0)]))
        case "byte fallback without strip":
            return plain_bpe(PIECES, decoders.Sequence(metaspace))
        case "metaspace":
            return plain_bpe(PIECES, decoders.Metaspace())
        case "no decoder":
            return plain_bpe(PIECES, None)
        case "suffix":
            return plain_bpe(["a</w>", "b", "c</w>", "."], decoders.BPEDecoder())
        case "WordPiece":
            return hugging_face(models.WordPiece(words, unk_token="[UNK]"), decoders.WordPiece(), ["[SEP]"])
        case "WordPiece as it is":
            return hugging_face(models.WordPiece(words, unk_token="[UNK]"), decoders.WordPiece("##", False))
        case "SentencePiece":
            return sentence_piece()
        case "SentencePiece that keeps spaces":
            return sentence_piece(remove_extra_whitespaces=False)
        case "SentencePiece without a dummy space":
            return sentence_piece(add_dummy_prefix=False, remove_extra_whitespaces=False)
        case "bytes":
            return Bytes(5)
    return Opaque("ids", 20, eos_id=1)


@functools.cache
def byte_id(made, byte):
    if isinstance(made, Bytes):
        return byte + 3
    if isinstance(made, SentencePiece):
        return made._processor.PieceToId(f"<0x{byte:02X}>")
    letter = next(letter for letter, each in _byte_of_letter().items() if each == byte)
    ids = json.loads(made._content())["model"]["vocab"]
    return ids.get(f"<0x{byte:02X}>", ids.get(letter))
