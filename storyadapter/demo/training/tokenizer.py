"""A CLIP tokenizer with a small vocabulary: whole words for the words it is given, bytes for everything else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
_PIECES = re.compile(r"[^\W\d_]+|\d|[^\s\w]+")  # as in CLIP: runs of letters, single digits, runs of signs


def byte_letters() -> list[str]:
    """The 256 letters that CLIP's byte-level BPE writes bytes with, in the published order of ids.

    Source: the byte table of GPT-2 (github.com/openai/gpt-2, encoder.py), which CLIP took over.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def merges_for(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until each word is one token.

    Words are ASCII; the merges are the same for the same set of words in any order.
    """
    spelled = {word: (*word[:-1], word[-1] + "</w>") for word in sorted(set(words))}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in spelled.values() for pair in zip(parts, parts[1:], strict=False))
        if not pairs:
            return merges
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(pair)
        spelled = {word: _merge(parts, pair) for word, parts in spelled.items()}


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def words_of(texts: Iterable[str]) -> list[str]:
    """The distinct ASCII pieces of some texts as CLIP's pre-tokenizer splits them (lower case), sorted."""
    return sorted({piece for text in texts for piece in _PIECES.findall(text.lower()) if piece.isascii()})


def vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: 256 bytes, 256 bytes that end a word, one id per merge, then start and end."""
    merges = merges_for(words)
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges), START, END]
    ids = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    return ids, merges


def write_tokenizer(folder: Path, words: Iterable[str], pad_token: str, length: int = 77) -> int:
    """Write `vocab.json`, `merges.txt` and the two configuration files of a `CLIPTokenizer`.

    Args:
        folder: made if it is missing.
        words: pieces that become single tokens (see `words_of`).
        pad_token: the published SDXL pads the first tokenizer with the end token and the second with "!" (id 0).
        length: `model_max_length`.

    Returns:
        The number of tokens; the end token has the highest id.
    """
    ids, merges = vocabulary(words)
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(ids)
