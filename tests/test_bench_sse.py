"""Server-sent events from reads that end anywhere."""

from hypothesis import given
from hypothesis import strategies as st

from llmkit.bench.sse import EventParser

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


def test_one_read() -> None:
    assert parse([STREAM.encode()]) == EVENTS


def test_a_read_for_each_byte() -> None:
    data = STREAM.encode()
    assert parse([data[i : i + 1] for i in range(len(data))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=8))
def test_reads_that_end_anywhere(cuts: list[int]) -> None:
    data, ends = STREAM.encode(), sorted(cuts)
    assert parse([data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]) == EVENTS


def test_lone_carriage_returns_end_lines() -> None:
    assert parse([b"data: a\r\rdata: b\r", b"\r"]) == ["a", "b"]


def test_an_event_is_complete_with_its_blank_line_only() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == ["a"]
    assert parser.feed(b"\n\n") == []


def test_the_end_of_the_stream_completes_an_event() -> None:
    assert parse([b"data: a\n\ndata: [DONE]"]) == ["a", "[DONE]"]
    assert parse([b"data: a\n\ndata: [DONE]\n"]) == ["a", "[DONE]"]
    assert parse([b"data: a\n\n", b""]) == ["a"]


def test_one_space_after_the_colon_is_dropped() -> None:
    assert parse([b"data:  two\n\ndata:none\n\n"]) == [" two", "none"]


def test_bytes_that_are_no_utf8_do_not_end_the_run() -> None:
    assert parse([b"data: a\xffb\n\n"]) == ["a\ufffdb"]
