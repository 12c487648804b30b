"""Markdown, as all pages have it."""

__all__ = ['table']


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return '\n'.join(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *rows])
