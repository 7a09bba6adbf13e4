"""Makes a tokenizer from the SentencePiece vocabulary of a GGUF file.

A SentencePiece BPE vocabulary has no list of merges, but a score for each token. Text is split into
characters, and the two neighbours that make the token with the highest score are merged until
nothing is left to merge. Characters that are not in the vocabulary become tokens of their bytes
(`<0x0A>`). Here the scores become a list of merges, which the tokenizers library applies. Files of
Gemma 4 have the list.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

# Values of tokenizer.ggml.token_type.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4

_SPACE = "\u2581"  # stands for a space in tokens


def sentencepiece_tokenizer(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
    unknown: str | None,
    bos: tuple[str, int] | None,
    adds_space_prefix: bool,
    strips_after: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer for a SentencePiece vocabulary.

    merges: in the order in which they are applied (see `merges_by_score`).
    unknown: the token for characters without byte tokens.
    bos: the token before a text, with its id.
    adds_space_prefix: a text begins with a space, and so does text after a special token.
    strips_after: special tokens that take the white space that follows them.
    Raises ValueError when tokens occur twice.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{len(tokens) - len(vocabulary)} of {len(tokens)} tokens occur twice")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list(merges),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(decoding)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
        )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=token in strips_after)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (CONTROL, UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == USER_DEFINED
        ]
    )
    return tokenizer


def merges_by_score(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, those with the highest score first.

    Of tokens with the same score, the one with the lower id is first.
    Raises ValueError unless each token has a score.
    """
    if len(scores) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(scores)} scores")
    vocabulary = set(tokens)
    order = sorted(
        (index for index, token_type in enumerate(types) if token_type == NORMAL),
        key=lambda index: (-scores[index], index),
    )
    merges = []
    for index in order:
        token = tokens[index]
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges
