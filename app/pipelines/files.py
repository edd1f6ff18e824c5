"""Reads the files of a skill: within its folder, within a size, as UTF-8."""

from pathlib import Path

from app.pipelines.report import WHOLE_FILE, Unreadable, nearest


def read_inside(folder: Path, relative: str, max_bytes: int) -> str:
    """The text of a file beside a skill file. Raises Unreadable, also where a link leads out of the folder."""
    path = folder / relative
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise Unreadable(WHOLE_FILE, f"cannot be read: {error}.") from error
    if not inside:
        raise Unreadable(WHOLE_FILE, "is a link that leads out of the skill's folder.")
    return read(path, max_bytes)


def read(path: Path, max_bytes: int) -> str:
    """The text of a file, lines ended by a newline alone. Raises Unreadable."""
    try:
        if not path.exists():
            raise Unreadable(WHOLE_FILE, f"is missing.{_near(path)}")
        if not path.is_file():  # reading a pipe or a device might never end
            raise Unreadable(WHOLE_FILE, "is not a regular file.")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(WHOLE_FILE, f"cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > max_bytes:
        raise Unreadable(WHOLE_FILE, f"is larger than {max_bytes} bytes.")
    return _decode(data)


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
        line_start = data.rfind(b"\n", 0, start) + 1
        place = (data.count(b"\n", 0, start) + 1, len(data[line_start:start].decode()) + 1)
        raise Unreadable(place, f"is not UTF-8: byte 0x{data[start]:02x} at offset {start}.") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _near(path: Path) -> str:
    """The nearest name in the same folder."""
    if not path.parent.is_dir():
        return ""
    hint = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return hint if hint.startswith(" Did") else ""
