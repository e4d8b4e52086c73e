"""The bytes of single tokens, so that a page can show which token wrote what.

A token of a byte-level vocabulary may be a part of a character: text is had from the bytes of several, never token by
token.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}
"""The alphabet of byte-level BPE: a printable byte is its own letter, the others are the letters from U+0100 on."""
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""


class Pieces:
    """A tokenizer's vocabulary as bytes."""

    def __init__(self, folder: Path | None) -> None:
        """None, or a folder without a tokenizer, gives numbers in place of text."""
        path = folder / TOKENIZER if folder else None
        self._tokenizer = Tokenizer.from_file(str(path)) if path and path.is_file() else None
        self.has_text = self._tokenizer is not None
        self._special: dict[int, str] = {}
        self._is_byte_level = False
        if self._tokenizer:
            self._special = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
            self._is_byte_level = "ByteLevel" in _types(json.loads(self._tokenizer.to_str())["decoder"])

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 once those of consecutive tokens are joined."""
        piece = self._tokenizer.id_to_token(token) if self._tokenizer else None
        if piece is None:
            return f"⟨{token}⟩".encode()
        if token in self._special:
            return self._special[token].encode()
        if self._is_byte_level and all(letter in BYTE_OF for letter in piece):
            return bytes(BYTE_OF[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece's fall-back to a byte
            return bytes.fromhex(piece[3:5])
        return piece.replace(_SPACE, " ").encode()


def _types(decoder: dict[str, Any] | None) -> set[str]:
    """Of a decoder and of those that it is a sequence of."""
    inner = (decoder or {}).get("decoders", [])
    return {(decoder or {}).get("type", ""), *(kind for one in inner for kind in _types(one))}
