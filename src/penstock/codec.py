"""Bodies: Python values to bytes and back.

Bytes stay bytes, text is UTF-8, everything else is JSON. The `content-type` header says which; where
a foreign publisher left it out, the body is JSON if it parses as JSON and bytes otherwise.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import msgspec.inspect

from penstock.errors import InvalidMessage, Unencodable, one_line

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BYTES = "application/octet-stream"

CONTENT_TYPE = "content-type"
CONTENT_ENCODING = "content-encoding"
CONTENT = (CONTENT_TYPE, CONTENT_ENCODING)
"""The headers that describe a body."""

COMPRESS_OVER = 32 * 1024  # bytes
ASIDE_OVER = 256 * 1024
"""Bytes over which compressing would hold up an event loop."""
SAMPLE = 64 * 1024  # bytes of a large body that show whether it is worth it
COMPRESS_LEVEL = 3  # half as fast for a tenth less is not worth it on a message's way

_CHARSETS = re.compile("utf|ascii|iso8859|cp125|shift_jis|euc|gb|big5|koi8")
"""Whose decoders take no longer than their text is long, which not all do."""

_JSON_HEADERS: Mapping[str, str] = {CONTENT_TYPE: JSON}

Decode = Callable[[bytes, Mapping[str, Any], int], Any]


def _foreign(value: Any) -> Any:
    """What msgspec does not know: text of a class of its own is text, pydantic models say themselves as plain data."""
    if isinstance(value, str):
        return str.__str__(value)
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump(mode="json")
    raise TypeError(f"cannot be sent: {type(value).__module__}.{type(value).__qualname__} has no JSON form")


_json_encoder = msgspec.json.Encoder(enc_hook=_foreign)
_json_decoder = msgspec.json.Decoder()


def encode(body: Any, headers: Mapping[str, Any] | None = None) -> tuple[bytes, Mapping[str, Any]]:
    """The bytes of a body and the headers that describe it.

    :raises Unencodable: a value without a JSON form.
    """
    kind = type(body)
    if headers:
        headers = _plain(headers)
    if kind is bytes or kind is bytearray or kind is memoryview:
        data, content_type = bytes(body), BYTES
    elif isinstance(body, str):
        try:
            data, content_type = str.encode(body), TEXT
        except UnicodeEncodeError as error:
            raise Unencodable(f"text that is not valid Unicode: {one_line(error)}") from None
    else:
        try:
            data, content_type = _json_encoder.encode(body), JSON
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise Unencodable(" ".join(str(error).split()) or type(error).__name__) from None
        if not headers:
            return data, _JSON_HEADERS
    if headers and CONTENT_TYPE in headers:
        return data, headers
    return data, {**(headers or {}), CONTENT_TYPE: content_type}


def _plain(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Text of a class of its own, a `Handle` say, as plain text: not every adapter could write it."""
    return {
        str.__str__(name): str.__str__(value) if isinstance(value, str) else value for name, value in headers.items()
    }


def decode(raw: bytes, headers: Mapping[str, Any], limit: int) -> Any:
    """The value of a received body, as its headers declare it.

    `limit` is the ceiling of the decompressed size in bytes.

    :raises InvalidMessage: declared JSON that does not parse, text that is not in its charset, a bad
        or oversize compressed body.
    """
    content_type = headers.get(CONTENT_TYPE)
    if CONTENT_ENCODING in headers:
        raw = decompress(raw, headers, limit)
    if content_type == JSON:
        return _parse(raw)
    if content_type is None:
        try:
            return _parse(raw)
        except InvalidMessage:
            return raw
    main, parameters = _main_type(content_type)
    if _is_json(main):
        return _parse(raw)
    if main.startswith("text/"):
        return _text(raw, parameters)
    return raw


def _main_type(content_type: Any) -> tuple[str, str]:
    main, _, parameters = str(content_type).partition(";")
    return main.strip().lower(), parameters


def _is_json(main: str) -> bool:
    return main == JSON or main.endswith("+json")


def typed(kind: Any) -> Decode:
    """A decoder of bodies into `kind`: `str`, `bytes`, a dataclass, TypedDict, msgspec Struct, pydantic model or any
    type that msgspec can validate. Text and bytes are for kinds that take them; all else is JSON, whatever a body says
    that it is.

    :raises TypeError: bodies cannot be decoded into `kind`.
    :raises InvalidMessage: from the decoder, when a body does not fit.
    """
    validate_json = getattr(kind, "model_validate_json", None)
    plain: _Plain | None = None
    if callable(validate_json):
        parse: Callable[[bytes], Any] = validate_json
    else:
        info = msgspec.inspect.type_info(kind)
        if isinstance(info, msgspec.inspect.CustomType):
            raise TypeError(f"{kind!r} is not a type that JSON can be validated against")
        parse, plain = msgspec.json.Decoder(kind).decode, _plain_of(info)

    def parsed(raw: bytes) -> Any:
        try:
            return parse(raw)
        except Exception as error:  # msgspec's, pydantic's, and whatever the type's own checks raise
            raise InvalidMessage(one_line(error)) from None

    def decode_typed(raw: bytes, headers: Mapping[str, Any], limit: int) -> Any:
        if CONTENT_ENCODING in headers:
            raw = decompress(raw, headers, limit)
        if plain is None:
            return parsed(raw)
        content_type = headers.get(CONTENT_TYPE)
        main, parameters = ("", "") if content_type is None else _main_type(content_type)
        if _is_json(main):
            return parsed(raw)
        if content_type is None and not (plain.alone and plain.kind is bytes):
            try:
                return parsed(raw)
            except InvalidMessage:
                if not plain.alone and _is_parsed(raw):
                    raise
        return _converted(raw if plain.kind is bytes else _text(raw, parameters), kind)

    return decode_typed


class _Plain(NamedTuple):
    """That a type takes text, or bytes, as they are. msgspec allows none that takes both."""

    kind: type[str] | type[bytes]
    alone: bool
    """Whether it takes nothing else, but for None."""


def _plain_of(info: msgspec.inspect.Type) -> _Plain | None:
    """None: a type that takes neither."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _plain_of(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        others = [one for one in info.types if not isinstance(one, msgspec.inspect.NoneType)]
        found = next((found for found in map(_plain_of, others) if found is not None), None)
        return None if found is None else _Plain(found.kind, found.alone and len(others) == 1)
    if isinstance(info, msgspec.inspect.BytesType):
        return _Plain(bytes, alone=True)
    if isinstance(info, msgspec.inspect.LiteralType):
        texts = [isinstance(value, str) for value in info.values]
        return _Plain(str, all(texts)) if any(texts) else None
    return _Plain(str, alone=True) if isinstance(info, msgspec.inspect.StrType) else None


def _is_parsed(raw: bytes) -> bool:
    with contextlib.suppress(InvalidMessage):
        _parse(raw)
        return True
    return False


def _converted(value: str | bytes, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidMessage(one_line(error)) from None


def compress(data: bytes, headers: Mapping[str, Any]) -> tuple[bytes, Mapping[str, Any]]:
    """A body and its headers, gzipped where that is worth it: over 32 KiB, not packed already, and smaller for it."""
    if len(data) <= COMPRESS_OVER or CONTENT_ENCODING in headers:
        return data, headers
    if len(data) > ASIDE_OVER and len(_pack(data[:SAMPLE])) >= SAMPLE * 0.95:
        return data, headers
    packed = _pack(data)
    if len(packed) >= len(data):
        return data, headers
    return packed, {**headers, CONTENT_ENCODING: "gzip"}


async def compress_aside(data: bytes, headers: Mapping[str, Any]) -> tuple[bytes, Mapping[str, Any]]:
    """As `compress`; a large body in a thread."""
    if len(data) <= ASIDE_OVER:
        return compress(data, headers)
    return await asyncio.to_thread(compress, data, headers)


def _pack(data: bytes) -> bytes:
    packer = zlib.compressobj(level=COMPRESS_LEVEL, wbits=31)
    return packer.compress(data) + packer.flush()


def decompress(raw: bytes, headers: Mapping[str, Any], limit: int) -> bytes:
    """The body behind `content-encoding`, never unpacking more than `limit` bytes.

    :raises InvalidMessage: an unknown encoding, broken data, or more than `limit` bytes.
    """
    encoding = str(headers[CONTENT_ENCODING]).strip().lower()
    if encoding in ("", "identity"):
        return raw
    if encoding != "gzip":
        raise InvalidMessage(f"content-encoding {encoding!r} is not known")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        data = unpacker.decompress(raw, limit + 1)
    except zlib.error as error:
        raise InvalidMessage(f"broken gzip body: {error}") from None
    if len(data) > limit:
        raise InvalidMessage(f"body unpacks to more than the ceiling of {limit} bytes (max_body)")
    if not unpacker.eof:
        raise InvalidMessage("broken gzip body: it ends too early")
    if unpacker.unused_data:  # half a body would be worse than none, and a million tiny parts a trap
        raise InvalidMessage("gzip body of several parts: send it as one")
    return data


def _parse(raw: bytes) -> Any:
    try:
        return _json_decoder.decode(raw)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidMessage(f"not JSON: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InvalidMessage("not JSON: nested too deeply") from None


def _text(raw: bytes, parameters: str) -> str:
    charset = "utf-8"
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip('"')
    try:
        if not _CHARSETS.match(codecs.lookup(charset).name):
            raise LookupError(f"{charset!r} is no charset of a message here")
        return raw.decode(charset)
    except (LookupError, ValueError) as error:
        raise InvalidMessage(f"not text: {' '.join(str(error).split())}") from None
