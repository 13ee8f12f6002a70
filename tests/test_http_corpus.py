"""The requests of http_cases.py are given to llhttp alone."""

import httptools
import pytest

from http_cases import CASES, CLOSE, CUT, KEEP, Case, Request

SHORT = 1000  # bytes; longer cases are not cut

REFUSED = "refused"
UPGRADED = "another protocol follows"


class Llhttp:
    """Feeds the bytes of one connection to llhttp in its strict mode and keeps its decisions."""

    def __init__(self) -> None:
        self.accepted: list[Request] = []
        self.end = KEEP
        self.target = self.body = b""
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.target = self.body = b""
        self.end = CUT

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        method = self.parser.get_method().decode()
        self.accepted.append((method, self.target.decode("latin-1"), self.body))
        self.end = KEEP if self.parser.should_keep_alive() else CLOSE

    def feed(self, data: bytes) -> bool:
        """Returns whether more bytes would be looked at."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.end = UPGRADED
        except httptools.HttpParserError:
            # llhttp also reports bytes after a request with `Connection: close`.
            if self.end != CLOSE:
                self.end = REFUSED
        return self.end not in (UPGRADED, REFUSED)


def decision(*pieces: bytes) -> tuple[list[Request], str]:
    """The requests that llhttp accepts, and how the connection goes on."""
    llhttp = Llhttp()
    all(llhttp.feed(piece) for piece in pieces)
    return llhttp.accepted, llhttp.end


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decisions_are_llhttps_unless_a_reason_is_given(case: Case) -> None:
    ours = list(case.accepted), case.end if isinstance(case.end, str) else REFUSED
    assert (decision(case.data) != ours) == bool(case.differs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_llhttp_decides_the_same_however_the_bytes_are_cut(case: Case) -> None:
    if len(case.data) <= SHORT:
        whole = decision(case.data)
        for at in range(1, len(case.data)):
            assert decision(case.data[:at], case.data[at:]) == whole
        assert decision(*(bytes([byte]) for byte in case.data)) == whole
