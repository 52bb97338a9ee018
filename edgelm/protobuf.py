"""The wire format of Protocol Buffers, read with bounds: messages <-> numbered fields. Knows no message by name.

Nothing is copied and nothing is believed: a length is compared with the bytes that are left before it is used, the
number of fields that one file may have is limited, and bytes that are skipped are never touched, so that a file of
gigabytes costs as much as its structure. (https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import FormatError

MAX_FIELDS = 1 << 22  # of one file; graphs of the largest models have some hundred thousand

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Message:
    """A message: a part of a file's bytes. `left` counts, for all messages of the file, the fields that may follow."""

    def __init__(self, data: memoryview, where: str, left: list[int] | None = None) -> None:
        self.data, self.where = data, where
        self._left = left or [MAX_FIELDS]

    def fields(self) -> Iterator[tuple[int, int | memoryview]]:
        """Number and value of each field: an unsigned number for numbers, a view for everything that has a length.

        Raises:
            FormatError: it ends in the middle of a field, or is no message.
        """
        data, at, end = self.data, 0, len(self.data)
        while at < end:
            self._left[0] -= 1
            if self._left[0] < 0:
                raise FormatError(f"{self.where}: more than {MAX_FIELDS} fields; this is no ONNX model")
            key, at = self._varint(at)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self._varint(at)
                yield number, value
                continue
            if kind == _BYTES:
                size, at = self._varint(at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise FormatError(f"{self.where}: a field of an unknown kind ({kind}); it is damaged, or no ONNX model")
            if size > end - at:
                raise FormatError(f"{self.where}: a field of {size} bytes where {end - at} are left; it is truncated")
            yield number, data[at : at + size]
            at += size

    def message(self, data: memoryview | int) -> Message:
        """A field's value as a message of its own."""
        if isinstance(data, int):
            raise FormatError(f"{self.where}: a number where a message belongs")
        return Message(data, self.where, self._left)

    def text(self, data: memoryview | int, most: int = 1 << 16) -> str:
        """A field's value as text."""
        if isinstance(data, int) or len(data) > most:
            raise FormatError(f"{self.where}: a name that is no text, or too long")
        try:
            return bytes(data).decode()
        except UnicodeDecodeError:
            raise FormatError(f"{self.where}: a name that is not valid UTF-8") from None

    def numbers(self, data: memoryview | int) -> list[int]:
        """A field's value, or a packed field's values, as signed numbers of 64 bits."""
        if isinstance(data, int):
            return [signed(data)]
        if np.count_nonzero(np.frombuffer(data, np.uint8) < 128) > 1 << 16:
            raise FormatError(f"{self.where}: more numbers in one field than any graph has")
        inner, at, found = Message(data, self.where, self._left), 0, []
        while at < len(data):
            value, at = inner._varint(at)
            found.append(signed(value))
        return found

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(self.data):
                raise FormatError(f"{self.where}: it ends in the middle of a number; the file is truncated")
            byte = self.data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & 0xFFFFFFFFFFFFFFFF, at
        raise FormatError(f"{self.where}: a number of more than 64 bits; the file is damaged, or no ONNX model")


def signed(value: int) -> int:
    """A number of 64 bits with its sign."""
    return value - (1 << 64) if value >> 63 else value
