"""Messages to frames and back: a MessagePack header, then raw frames. Bytes become bounded models or a WireError."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]
from pydantic import ValidationError

from common.wire.messages import MESSAGES, PROTOCOL, AnyMessage, Message

Buffer = bytes | memoryview

pack: Callable[[object], bytes] = cast(Any, msgpack).packb
unpack: Callable[..., Any] = cast(Any, msgpack).unpackb

MAX_FRAMES = 6
MAX_HEADER_BYTES = 256 << 10
MAX_HEADER_ITEMS = 4096
"""Entries of one array in a header: a few bytes can name a large container."""


class WireError(ValueError):
    """A message that is refused: what, got, expected."""


class ProtocolMismatch(WireError):
    """The peer speaks another version of the protocol."""


@dataclass(frozen=True)
class Envelope:
    """A decoded header and the raw frames that came with it."""

    message: AnyMessage
    frames: Sequence[Buffer]


def encode(message: Message, frames: Sequence[Buffer] = ()) -> list[Buffer]:
    """Header frame first."""
    header = message.model_dump(mode="json") | {"protocol": PROTOCOL}
    return [pack(header), *frames]


def decode(frames: Sequence[Buffer], *, max_bytes: int) -> Envelope:
    """Check sizes, unpack the header within bounds, validate it. Raises WireError."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"message: got {len(frames)} frames, expected 1 to {MAX_FRAMES}")
    total = sum(len(frame) for frame in frames)
    if total > max_bytes:
        raise WireError(f"message: got {total} bytes, expected at most {max_bytes}")
    return Envelope(_decode_header(frames[0]), frames[1:])


def _decode_header(frame: Buffer) -> AnyMessage:
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError(f"header: got {len(frame)} bytes, expected at most {MAX_HEADER_BYTES}")
    try:
        header: object = unpack(
            frame, raw=False, use_list=False, strict_map_key=True, max_str_len=4096, max_bin_len=4096,
            max_array_len=MAX_HEADER_ITEMS, max_map_len=64, max_ext_len=0,
        )  # fmt: skip
    except Exception as error:  # msgpack raises many kinds on broken bytes; all mean the same here
        raise WireError(f"header: not MessagePack within bounds ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise WireError(f"header: got {type(header).__name__}, expected a map")
    fields = cast("dict[str, Any]", header)
    if (protocol := fields.pop("protocol", None)) != PROTOCOL:
        got = protocol if isinstance(protocol, int) else type(protocol).__name__
        raise ProtocolMismatch(f"protocol: got {got}, expected {PROTOCOL} (update the older side)")
    if not isinstance(fields.get("kind"), str):  # deeply nested values must not be printed
        raise WireError(f"header: kind: got {type(fields.get('kind')).__name__}, expected text")
    try:
        return MESSAGES.validate_python(fields)
    except ValidationError as error:
        first = cast("dict[str, Any]", error.errors(include_url=False, include_input=False)[0])
        where = ".".join(str(part) for part in first["loc"])
        raise WireError(f"header: {where}: {first['msg']}"[:300]) from None
