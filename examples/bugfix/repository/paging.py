"""Cuts a list of entries into pages."""


def page_count(entries, size):
    """How many pages of `size` entries show `entries` entries."""
    if size < 1:
        raise ValueError("a page holds at least one entry")
    return entries // size


def page(entries, number, size):
    """The entries on page `number`, which counts from 1."""
    if not 1 <= number <= page_count(len(entries), size):
        raise IndexError(f"there is no page {number}")
    start = (number - 1) * size
    return entries[start : start + size]
