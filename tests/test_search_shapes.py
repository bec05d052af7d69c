"""Shapes of plans: even tapers, their neighbours, the depth that a budget allows, and groups that join."""

import pytest

from idlefx.options import PlanOptions
from idlefx.search.shapes import Shape, even_tapers, filled, fitted


def test_even_tapers_are_those_of_the_field():
    starts = [shape.starts for shape in even_tapers(12)]
    assert {(3, 6, 9), (1, 3, 5, 7, 9, 11), (1, 4, 7, 10), (0,), tuple(range(12))} <= set(starts)
    assert len(starts) == len(set(starts)) < 40


def test_neighbours_of_a_shape_are_shapes():
    shapes = list(Shape((1, 3), (1.0, 2.0)).neighbours(4, 0.4))
    assert len(shapes) == len(set(shapes)) > 8
    for shape in shapes:
        assert list(shape.starts) == sorted(set(shape.starts)) and len(shape.starts) == len(shape.depths)
        assert shape.starts[0] >= 0 and shape.starts[-1] < 4 and all(depth > 0 for depth in shape.depths)


def test_depth_is_the_least_that_fits():
    assert fitted(lambda depth: 10 - depth, 7.0, 9.0) == pytest.approx(3.0, abs=1e-3)
    assert fitted(lambda depth: 10 - depth, 10.0, 9.0) == 0.0 and fitted(lambda depth: 10.0, 7.0, 9.0) is None


def test_what_rounding_leaves_goes_to_the_first_stages():
    shape = Shape((1, 3), (1.0, 2.0))
    assert shape.shares(0.5) == (38 / 64, 23 / 64) and shape.shares(shape.deepest) == (1 / 64, 1 / 64)
    assert filled(sum, 1.0, (0.5, 15 / 32)) == (33 / 64, 31 / 64) and filled(sum, 1.0, (0.5, 0.5)) == (0.5, 0.5)


def test_groups_that_join_never_become_more():
    shape = Shape((0, 1, 3), (1.0, 0.5, 2.0), joined=True)
    assert shape.shares(0.5) == (38 / 64, 38 / 64, 23 / 64)
    assert shape.allows((0.6, 0.6, 0.5)) and not shape.allows((0.6, 0.7, 0.5))
    assert Shape((0, 1, 3), (1.0, 0.5, 2.0)).allows((0.6, 0.7, 0.5))


def test_joining_is_an_option_of_the_plan_and_of_every_neighbour():
    base, shape = PlanOptions([0], 1.0, idle="follow"), Shape((1, 3), (1.0, 2.0), joined=True)
    assert not shape.options((0.6, 0.4), range(4), 4, base).reselect
    assert Shape((1, 3), (1.0, 2.0)).options((0.6, 0.4), range(4), 4, base).reselect
    assert all(near.joined for near in shape.neighbours(4, 0.4))
