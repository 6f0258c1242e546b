import pytest
import torch
from helpers import num_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_hf import allocate_position_ids
from neo_hf.indexing_neo import image_ids

IMAGE, START, END, TEXT = 1, 2, 3, 9
ROLES = {"image_token_id": IMAGE, "image_start_token_id": START}


@st.composite
def documents(draw):
    """A document: text, images and lone `<img>` in any order. Returns ids and token grids."""
    ids, grids = [], []
    for kind in draw(st.lists(st.sampled_from(["text", "image", "lone start"]), min_size=1, max_size=5)):
        if kind == "text":
            ids += [TEXT] * draw(st.integers(1, 4))
        elif kind == "lone start":
            ids += [START] * draw(st.integers(1, 2))  # at the end of a document as well
        else:
            rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4))
            ids += [START, *[IMAGE] * (rows * columns), END]
            grids.append((rows, columns))
    return ids, grids


def oracle(ids, grids):
    """One document, token by token."""
    t, positions, grids = -1, [], iter(grids)
    cells = []
    for i, token in enumerate(ids):
        t += (token != IMAGE) + (i > 0 and ids[i - 1] == START)
        row = column = 0
        if token == IMAGE:
            if not cells:
                rows, columns = next(grids)
                cells = [(r, c) for r in range(rows) for c in range(columns)]
            row, column = cells.pop(0)
        positions.append((t, row, column))
    return positions


@settings(max_examples=num_examples(300))
@given(
    st.lists(st.lists(documents(), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([TEXT, START]),
)
def test_allocate_position_ids(rows, padding, merge, padding_id):
    """Packed rows with padding on either side, against a loop over tokens."""
    length = max(
        sum(len(ids) for ids, _ in row) + left + right for row, (left, right) in zip(rows, padding, strict=False)
    )
    input_ids = torch.full((len(rows), length), padding_id)
    document_ids = torch.full((len(rows), length), -1)
    expected = torch.zeros(3, len(rows), length, dtype=torch.long)
    grids = []
    for number, (row, (left, _)) in enumerate(zip(rows, padding, strict=False)):
        place = left
        for document, (ids, document_grids) in enumerate(row):
            here = slice(place, place + len(ids))
            input_ids[number, here] = torch.tensor(ids)
            document_ids[number, here] = document
            expected[:, number, here] = torch.tensor(oracle(ids, document_grids)).T
            grids += document_grids
            place += len(ids)
    found = allocate_position_ids(
        input_ids,
        merge * torch.tensor(grids, dtype=torch.long).reshape(-1, 2),
        **ROLES,
        spatial_merge_size=merge,
        attention_mask=(document_ids >= 0).long(),
        document_ids=document_ids,
    )
    assert torch.equal(found, expected)

    # Without padding or packing, each document alone.
    ids, document_grids = rows[0][0]
    alone = allocate_position_ids(
        torch.tensor([ids]), 2 * torch.tensor(document_grids, dtype=torch.long).reshape(-1, 2), **ROLES
    )
    assert torch.equal(alone[:, 0], torch.tensor(oracle(ids, document_grids)).T)


@settings(max_examples=num_examples(200))
@given(st.lists(documents(), min_size=1, max_size=4))
def test_image_ids(row):
    ids, document_ids, grids, image_of = [], [], [], []
    for document, (document_tokens, document_grids) in enumerate(row):
        sizes = iter([rows * columns for rows, columns in document_grids])
        for i, token in enumerate(document_tokens):
            if token == IMAGE and document_tokens[i - 1] != IMAGE:
                size = next(sizes)
                # An image of one token stands alone, as text does.
                number = None if size == 1 else (document, i)
            image_of.append(number if token == IMAGE else None)
        ids += document_tokens
        document_ids += [document] * len(document_tokens)
        grids += document_grids
    document_ids = torch.tensor([document_ids])
    t = allocate_position_ids(
        torch.tensor([ids]),
        2 * torch.tensor(grids, dtype=torch.long).reshape(-1, 2),
        **ROLES,
        document_ids=document_ids,
    )[0]
    found = image_ids(t, document_ids)[0].tolist()
    for i, a in enumerate(image_of):
        assert (found[i] >= 0) == (a is not None)
        for j, b in enumerate(image_of):
            if a is not None and b is not None:
                assert (found[i] == found[j]) == (a == b)


def test_next_index_is_not_the_length():
    ids = torch.tensor([[TEXT, START, IMAGE, IMAGE, IMAGE, IMAGE, END, TEXT]])
    t, h, w = allocate_position_ids(ids, torch.tensor([[4, 4]]), **ROLES)[:, 0].tolist()
    assert t == [0, 1, 2, 2, 2, 2, 3, 4]
    assert h == [0, 0, 0, 0, 1, 1, 0, 0]
    assert w == [0, 0, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[2, 2]], r"holds 2 image tokens, but image_grid_hw describes 1 images of \[1\] tokens"),
        ([[2, 2], [2, 2], [2, 2]], r"3 images of \[1, 1, 1\] tokens"),
        ([[3, 4]], r"image_grid_hw\[0\] must be positive multiples of 2 patches \(rows, columns\), got \(3, 4\)"),
        ([[2, 2], [0, 2]], r"image_grid_hw\[1\] .* got \(0, 2\)"),
        ([2, 4], r"shape \(images, 2\).*got \(2,\)"),
        ([[2.0, 4.0]], "float32"),
        (None, "2 image tokens, but image_grid_hw describes 0 images"),
    ],
)
def test_mismatched_grids(grid, message):
    ids = torch.tensor([[START, IMAGE, IMAGE, END]])
    with pytest.raises(ValueError, match=message):
        allocate_position_ids(ids, None if grid is None else torch.tensor(grid), **ROLES)


def test_mismatched_shapes():
    ids = torch.tensor([[TEXT, TEXT]])
    with pytest.raises(ValueError, match=r"got list \[\[2, 4\]\]"):
        allocate_position_ids(ids, [[2, 4]], **ROLES)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids \(1, 2\), got \(1, 3\)"):
        allocate_position_ids(ids, **ROLES, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"document_ids must have the shape of input_ids \(1, 2\), got \(2,\)"):
        allocate_position_ids(ids, **ROLES, document_ids=torch.zeros(2))
