"""Copies of pages: the bytes of any tensors come back to other rows."""

from __future__ import annotations

import pytest
import torch

from llmkit.runtime.prefix_pages import Page, PageCopier

CPU = torch.device("cpu")


def caches(seed: int) -> list[torch.Tensor]:
    """Tensors [A, 8 rows, ...]: words, half words, odd bytes, none, a single dimension more."""
    generator = torch.Generator().manual_seed(seed)
    floats = torch.randn(2, 8, 3, 4, generator=generator)
    halves = torch.randn(1, 8, 3, generator=generator).to(torch.bfloat16)  # 6 bytes a row
    bytes_ = torch.randint(-128, 127, (3, 8, 5), generator=generator, dtype=torch.int8)
    return [halves, floats, torch.zeros(1, 8, 0), bytes_, torch.zeros(1, 8, 0, 0, 0)]


@pytest.mark.parametrize(("rows", "others"), [([5], [0]), ([1, 6, 2], [7, 0, 3])])
def test_page_copier_brings_rows_back_to_other_rows(rows: list[int], others: list[int]) -> None:
    source = caches(0)
    target = caches(1)
    expected = [tensor.clone() for tensor in target]
    for tensor, right in zip(source, expected, strict=True):
        right[:, others] = tensor[:, rows]
    page = Page([b"hash"] * len(rows), "key", 0)
    copied = PageCopier(source, len(rows), CPU).copy(page, rows)
    copier = PageCopier(target, len(rows), CPU)
    assert copied.page is page
    assert copied.copied is None
    # Each tensor's part begins at a word.
    sizes = [6 * len(rows), 2 * 48 * len(rows), 3 * 5 * len(rows)]
    assert copied.data.shape == (copier.num_bytes,) == (sum(-(-n // 8) * 8 for n in sizes),)
    copier.restore(others, copied.data)
    for tensor, right in zip(target, expected, strict=True):
        assert torch.equal(tensor, right)


def test_page_copier_of_no_tensors_copies_nothing() -> None:
    copier = PageCopier([torch.zeros(1, 4, 0)], 2, CPU)
    copied = copier.copy(Page([b"a", b"b"], "key", 0), [1, 3])
    assert (copier.num_bytes, copied.data.numel()) == (0, 0)
    copier.restore([0, 2], copied.data)
