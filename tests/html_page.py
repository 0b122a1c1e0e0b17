"""A parser that reads the pages that commands write."""

import html.parser


class Page(html.parser.HTMLParser):
    """The name, the attributes and the texts of each element of a page, in order; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "input", "option", "br"):  # without an end
            self._open.append((tag, self.elements[-1][2]))

    def handle_endtag(self, tag):
        if tag != "option":
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, texts in self._open:
            texts.append(data)

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _, _ in self.elements]

    @property
    def text(self) -> str:
        return "".join(self.elements[0][2])

    @property
    def rows(self) -> list[list[str]]:
        """The cells of each row of the tables."""
        rows: list[list[str]] = []
        for tag, _, texts in self.elements:
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("".join(texts))
        return rows

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)
