"""Tokenizers kept in other forms than a tokenizer.json: GGUF's metadata, tiktoken's ranks.

Each is rebuilt as the `tokenizers` library's own, so that what encodes is one piece of code. How
text is cut before merging is not in either form, only its name: the expressions are those that
the models' authors published.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assay.data.tokenizers import BYTE_OF, HuggingFaceTokenizer
from assay.errors import AssayError, did_you_mean

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LINES
_QWEN2 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LINES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _SLASHES
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CASELESS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CASELESS}?|\p{{N}}{{1,3}}" + _SLASHES
)

DIGITS = "digits"
"""Marks a cut at each digit, before GPT-2's expression."""

GGUF_CUTS: dict[str, str] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "olmo", "jais", "mpt", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"),
        _LLAMA3,
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""`tokenizer.ggml.pre` -> how text is cut. `olmo` is GPT-NeoX's, which is GPT-2's."""

CONTROL, USER_DEFINED, BYTE = 3, 4, 6


def from_gguf(metadata: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer that the metadata of a GGUF file describes.

    Raises:
        AssayError: if its kind, or how it cuts text, is not known.
    """
    tokens = _list(metadata, "tokens", str)
    kind = metadata.get("tokenizer.ggml.model")
    types = _list(metadata, "token_type", int, len(tokens)) or [1] * len(tokens)
    template = metadata.get("tokenizer.chat_template")

    def token(role: str) -> str | None:
        i = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None

    if not isinstance(kind, str) or kind not in GGUF_KINDS:
        raise AssayError(
            f"tokenizer.ggml.model is {kind!r}, not supported; supported are: "
            f"{', '.join(GGUF_KINDS)}."
        )
    library = GGUF_KINDS[kind](metadata, tokens, token("unknown"))
    control = [t for t, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    defined = [t for t, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    _add(library, control, defined)
    if metadata.get("tokenizer.ggml.add_bos_token", BEGINS[kind]) and token("bos") is not None:
        _begin(library, token("bos"), metadata["tokenizer.ggml.bos_token_id"])
    return HuggingFaceTokenizer(
        library.to_str(),
        eos=token("eos"),
        bos=token("bos"),
        chat_template=template if isinstance(template, str) else None,
    )


def _begin(library, token: str, i: int) -> None:
    """Every text begins with this token."""
    from tokenizers.processors import TemplateProcessing

    library.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, i)]
    )


def _list(metadata: Mapping[str, Any], name: str, kind: Any, length: int | None = None) -> list:
    """A list of the metadata, empty where it is not there.

    Raises:
        AssayError: if it is no list of this kind, or has another length than the tokens.
    """
    found = metadata.get(name := f"tokenizer.ggml.{name}")
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise AssayError(f"{name} is no list of {'texts' if kind is str else 'numbers'}.")
    if length is not None and len(found) != length:
        raise AssayError(f"{name} has {len(found)} entries, but there are {length} tokens.")
    return found


def _add(library, special: Sequence[str], plain: Sequence[str] = ()) -> None:
    from tokenizers import AddedToken

    library.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    library.add_tokens([AddedToken(t, normalized=False) for t in plain])


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], unknown: str | None):
    if "tokenizer.ggml.merges" not in metadata:
        raise AssayError("tokenizer.ggml.merges is missing.")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in GGUF_CUTS:
        raise AssayError(f"tokenizer.ggml.pre is '{pre}'; {did_you_mean(pre, GGUF_CUTS)}")
    pairs = [tuple(merge.split(" ", 1)) for merge in _list(metadata, "merges", str)]
    if broken := [pair for pair in pairs if len(pair) != 2]:
        raise AssayError(f"tokenizer.ggml.merges has '{broken[0][0]}', which is no pair.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    whole = pre in ("llama3", "llama-v3", "llama-bpe")
    return _library(vocabulary, pairs, GGUF_CUTS[pre], whole_words=whole)


def _library(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    cut: str,
    *,
    whole_words: bool = False,
):
    """Byte-level BPE. With `whole_words`, a word that is a token is one, whatever the merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    try:
        library = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    except Exception as error:  # the library raises the bare class
        reason = str(error).splitlines()[0]
        raise AssayError(f"its merges are not of its vocabulary ({reason}).") from None
    first = (
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(_GPT2), "isolated"),
        ]
        if cut == DIGITS
        else [pre_tokenizers.Split(Regex(cut), "isolated")]
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    library.decoder = decoders.ByteLevel()
    return library


def _scores(metadata: Mapping[str, Any], length: int) -> list[float]:
    if metadata.get("tokenizer.ggml.scores") is None:
        raise AssayError("tokenizer.ggml.scores is missing.")
    return _list(metadata, "scores", (int, float), length)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], unknown: str | None):
    """SentencePiece's BPE: what may be merged, and in which order, follows from the scores."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = _scores(metadata, len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-score, len(left), len(right), left, right) for left, right in known]
    merges.sort(key=lambda merge: merge[:3])
    model = models.BPE(
        ids,
        [merge[3:] for merge in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    library = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    library.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    return library


def _unigram(metadata: Mapping[str, Any], tokens: list[str], unknown: str | None):
    """SentencePiece's unigrams, as T5 has them: the likeliest cut, by the scores.

    Files call T5's 100 marks of a blank in the text `[PAD32000]` and on; here they get their names,
    of which the last is the first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = _scores(metadata, len(tokens))
    named = list(tokens)
    blanks = [i for i, token in enumerate(named) if re.fullmatch(r"\[PAD\d+\]", token)]
    for n, i in enumerate(blanks[:BLANKS]):
        named[i] = f"<extra_id_{BLANKS - 1 - n}>"
    unknown_id = None if unknown is None else tokens.index(unknown)
    model = models.Unigram(list(zip(named, scores, strict=True)), unknown_id, byte_fallback=False)
    library = Tokenizer(model)
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        library.normalizer = normalizers.Precompiled(bytes(charsmap))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    library.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    _add(library, [named[i] for i in blanks[:BLANKS]])
    return library


BLANKS = 100
BEGINS = {"gpt2": False, "llama": True, "t5": False}
"""`tokenizer.ggml.model` -> whether a token begins every text where the file does not say."""

GGUF_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}
"""`tokenizer.ggml.model` -> what rebuilds it."""

# ---------------------------------------------------------------------------- tiktoken

_END, BEGIN = "<|endoftext|>", "<|begin_of_text|>"
_RESERVED = range(128002, 128006)
KNOWN_RANKS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (_GPT2, {_END: 50256}),
    "r50k_base": (_GPT2, {_END: 50256}),
    "p50k_base": (_GPT2, {_END: 50256}),
    "cl100k_base": (
        _LLAMA3,
        {
            _END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (_GPT4O, {_END: 199999, "<|endofprompt|>": 200018}),
    "qwen": (_QWEN2, {_END: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    "llama3": (
        _LLAMA3,
        {
            BEGIN: 128000,
            "<|end_of_text|>": 128001,
            "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007,
            "<|eom_id|>": 128008,
            "<|eot_id|>": 128009,
            "<|python_tag|>": 128010,
            **{f"<|reserved_special_token_{i}|>": i for i in (*_RESERVED, *range(128011, 128256))},
        },
    ),
}
"""File name without its ending -> how text is cut, and the special tokens beside the ranks."""

BY_COUNT = {
    50256: "gpt2",
    100256: "cl100k_base",
    128000: "llama3",
    151643: "qwen",
    199998: "o200k_base",
}
"""How many ranks a file of another name has -> whose they are."""


def read_ranks(path: Path) -> HuggingFaceTokenizer:
    """A tiktoken file: a line a token, its bytes in base64 and its rank.

    The file's name says how text is cut (`cl100k_base.tiktoken`), or the count of its ranks (Llama
    3's `tokenizer.model`); any other is taken to be cut as `cl100k_base`, with `<|endoftext|>`
    after the last rank where it is not in the ranks. A pair is merged where what it gives has a
    rank, the lowest first.

    Raises:
        AssayError: if a line is not that, or if a byte has no rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            why = (
                ""
                if path.suffix == ".tiktoken"
                else (
                    " (SentencePiece's models are not read; name the tokenizer.json of this model)"
                )
            )
            raise AssayError(
                f"{path}: line {number} is not a token in base64 and its rank{why}."
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise AssayError(f"{path}: {len(missing)} of the 256 bytes have no rank.")
    if len(set(ranks.values())) != len(ranks):
        raise AssayError(f"{path}: two tokens have the same rank.")
    whose = path.stem if path.stem in KNOWN_RANKS else BY_COUNT.get(len(ranks))
    cut, special = KNOWN_RANKS.get(whose, (_LLAMA3, {_END: max(ranks.values()) + 1}))
    character = {value[0]: name for name, value in BYTE_OF.items()}

    def spelt(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(rank, i, spelt(a), spelt(b)) for i, (a, b) in enumerate(known)]
    merges.sort(key=lambda merge: merge[:2])
    vocabulary = {spelt(token): rank for token, rank in ranks.items()}
    special = {token: i for token, i in special.items() if i not in ranks.values()}
    library = _library(vocabulary | special, [merge[2:] for merge in merges], cut, whole_words=True)
    _add(library, list(special))
    end = next((token for token in (_END, "<|end_of_text|>") if token in special), None)
    if BEGIN not in special:
        return HuggingFaceTokenizer(library.to_str(), eos=end, bos=end)
    _begin(library, BEGIN, special[BEGIN])
    return HuggingFaceTokenizer(library.to_str(), eos=end, bos=BEGIN)
