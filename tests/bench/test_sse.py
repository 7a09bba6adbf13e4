"""Server-sent events from reads that end anywhere."""

from hypothesis import given
from hypothesis import strategies as st

from llmkit.common.sse import EventParser

STREAM = (
    'data: {"text": "naïve 日本 🦊"}\n\n'
    ": a comment\r\nevent: x\r\ndata:first\r\ndata: second\r\n\r\n"
    "id: 3\n\n"
    "data: [DONE]\n\n"
)
EVENTS = ['{"text": "naïve 日本 🦊"}', "first\nsecond", "[DONE]"]


def parse(reads: list[bytes]) -> list[str]:
    parser = EventParser()
    return [data for read in reads for data in parser.feed(read)] + parser.close()


def test_sse_parser_reads_one_read() -> None:
    assert parse([STREAM.encode()]) == EVENTS


def test_sse_parser_reads_single_bytes() -> None:
    data = STREAM.encode()
    assert parse([data[i : i + 1] for i in range(len(data))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=8))
def test_sse_parser_accepts_reads_that_end_anywhere(cuts: list[int]) -> None:
    data = STREAM.encode()
    ends = sorted(cuts)
    assert parse([data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]) == EVENTS


def test_sse_parser_ends_lines_at_carriage_returns() -> None:
    assert parse([b"data: a\r\rdata: b\r", b"\r"]) == ["a", "b"]


def test_sse_parser_completes_an_event_at_the_blank_line() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == ["a"]
    assert parser.feed(b"\n\n") == []


def test_sse_parser_completes_an_event_at_the_end_of_the_stream() -> None:
    assert parse([b"data: a\n\ndata: [DONE]"]) == ["a", "[DONE]"]
    assert parse([b"data: a\n\ndata: [DONE]\n"]) == ["a", "[DONE]"]
    assert parse([b"data: a\n\n", b""]) == ["a"]


def test_sse_parser_drops_one_space_after_the_colon() -> None:
    assert parse([b"data:  two\n\ndata:none\n\n"]) == [" two", "none"]


def test_sse_parser_replaces_invalid_utf8() -> None:
    assert parse([b"data: a\xffb\n\n"]) == ["a\ufffdb"]
