"""Properties of the two forms of values."""

import numpy as np

from autocompress.optimize.encoding import Encoding
from tests import scripted

SPACE = scripted.space(6)
BLOCKS = {layer: block for block, members in SPACE.members.items() for layer in members}


def test_an_override_that_says_what_its_block_says_is_no_difference() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    base = SPACE.uniform("w8a8")
    over = base | {"layer:conv1": "w8a8"}
    other = base | {"layer:conv1": "w4a8"}
    rows = encoding.rows([base, over, other])
    assert (rows[0] == rows[1]).all()
    assert (rows[0] != rows[2]).sum() == 1
    block = base | {"precision:block0": "w4a8"}
    assert (encoding.rows([block])[0] != rows[0]).sum() == 2


def test_numbers_are_values_again() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    for values in (SPACE.uniform("w8a8", 0.5), SPACE.uniform("fp32") | {"layer:conv3": "w4a8"}):
        assert encoding.values(encoding.numbers([values])[0]) == values


def test_the_best_choice_of_each_variable_has_the_lowest_score() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, encoding.size))
    around = encoding.numbers([SPACE.uniform("w8a8")] * 3)
    columns = encoding.columns(encoding.best(scores, around))
    drawn = encoding.columns(rng.integers(0, encoding.sizes, (200, len(encoding.sizes))))
    for own, best in zip(scores, columns, strict=True):
        assert own[best].sum() <= own[drawn].sum(1).min()


def test_choices_of_a_kind_are_shared_by_its_variables() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    rows = encoding.rows([SPACE.uniform("w8a8", 0.5), SPACE.uniform("w8a8", 0.5) | {"layer:conv0": "fp32"}])
    one, other = encoding.shared()[rows].sum(1)
    assert sorted(one[one > 0]) == [6, 6]  # six layers of one precision, six groups of one width
    assert sorted(other[other > 0]) == [1, 5, 6]


def test_borders_are_between_kernels_not_between_bits() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    base = SPACE.uniform("w8a8")
    inside = base | {"layer:conv2": "fp32"}
    first = base | {"layer:conv0": "fp32"}
    fewer_bits = base | {"layer:conv2": "w4a8"}
    assert encoding.borders(encoding.rows([base, inside, first, fewer_bits])).tolist() == [0, 2, 1, 0]


def test_the_borders_of_a_choice_are_what_taking_it_alone_changes() -> None:
    encoding = Encoding(SPACE.variables, BLOCKS)
    rng = np.random.default_rng(3)
    around = encoding.columns(rng.integers(0, encoding.sizes, (20, len(encoding.sizes))))
    before, alone = encoding.borders(around), encoding.bordering(around)
    for place in range(around.shape[1]):
        other = around.copy()
        other[:, place] = rng.integers(encoding.starts[place], encoding.starts[place + 1], len(around))
        each = np.arange(len(around))
        expected = alone[each, other[:, place]] - alone[each, around[:, place]]
        assert (encoding.borders(other) - before == expected).all()


def test_numbers_are_near_by_their_steps_and_names_are_not() -> None:
    encoding = Encoding({"width:a": (64, 48, 32, 16), "precision:b": ("fp32", "w8a8", "w4a8")}, {})
    places = encoding.places()
    apart = ((places[:, None] - places) ** 2).sum(2)
    assert np.allclose(apart[0, :4], [0, 1 / 3, 2 / 3, 1])
    assert np.allclose(apart[4:, 4:], 1 - np.eye(3))
