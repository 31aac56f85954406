"""Projections against their definition, guards that stay below open limits, and the trip through JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsweep.constraints.domains import Capped, NonNegative, Simplex, SumBelow, domain_from_dict

DOMAINS = [NonNegative(), SumBelow(1.0), SumBelow(2, margin=0.1), Capped((0.2, 0.06, 1.0)), Simplex()]
three = st.tuples(*[st.floats(-50, 50)] * 3)
every_domain = pytest.mark.parametrize("domain", DOMAINS, ids=str)


def member(domain, values, slack=1e-9):
    inside = (values >= 0).all()
    if isinstance(domain, SumBelow):
        return inside and values.sum() < domain.limit
    if isinstance(domain, Capped):
        return inside and (values < np.array(domain.caps)).all()
    return inside and (not isinstance(domain, Simplex) or abs(values.sum() - 1) <= slack)


@every_domain
@given(values=three)
def test_a_projection_is_inside_and_a_second_one_changes_nothing(domain, values):
    projected = domain.project(values)
    assert member(domain, projected)
    assert domain.project(projected) == pytest.approx(projected, abs=1e-12)


@every_domain
@given(values=three, other=three)
def test_a_projection_is_the_nearest_point(domain, values, other):
    """Obtuse angle: <values - projected, z - projected> <= 0 for every z inside."""
    projected, inside = domain.project(values), domain.project(other)
    # round-off of products of size 50 * 50
    assert (np.array(values) - projected) @ (inside - projected) <= 1e-9


@every_domain
@given(values=three)
def test_a_projection_does_not_depend_on_the_order_of_its_entries(domain, values):
    if isinstance(domain, Capped):
        return  # its caps belong to places
    assert domain.project(values[::-1]) == pytest.approx(domain.project(values)[::-1], abs=1e-12)


def test_known_projections():
    assert NonNegative().project([-1.0, 2.0]).tolist() == [0.0, 2.0]
    assert Simplex().project([0.0, 0.0]) == pytest.approx([0.5, 0.5])
    assert Simplex().project([3.0, 0.0]) == pytest.approx([1.0, 0.0])
    assert Simplex().project([1e9, 1e9 + 0.5]) == pytest.approx([0.25, 0.75], abs=1e-6)
    assert SumBelow(1.0, margin=0.0).project([1.0, 0.5]) == pytest.approx([0.75, 0.25])
    assert SumBelow(1.0).project([0.2, 0.3]).tolist() == [0.2, 0.3]
    assert Capped((0.2, 0.5), margin=0.0).project([1.0, 0.3]).tolist() == [0.2, 0.3]


def test_saturation_marks_the_multipliers_at_an_upper_limit_and_no_others():
    assert SumBelow(1.0).saturated(SumBelow(1.0).project([3.0, 1.0, -5.0])).tolist() == [True, False, False]
    assert SumBelow(1.0).saturated(SumBelow(1.0).project([3.0, 3.0, -5.0])).tolist() == [True, True, False]
    assert not SumBelow(1.0).saturated([0.3, 0.3, 0.0]).any()
    capped = Capped((0.2, 0.06, 1.0))
    assert capped.saturated(capped.project([0.1, 5.0, 0.9])).tolist() == [False, True, False]
    assert not NonNegative().saturated([0.0, 1e9]).any()
    assert not Simplex().saturated([1.0, 0.0]).any()


@every_domain
def test_a_domain_survives_json(domain):
    assert domain_from_dict(json.loads(json.dumps(domain.to_dict()))) == domain


@pytest.mark.parametrize("domain", [NonNegative(), SumBelow(1.0), Capped(()), Simplex()], ids=str)
def test_a_problem_without_constraints_has_an_empty_vector(domain):
    assert domain.project([]).shape == (0,)
    assert domain.saturated([]).shape == (0,)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"kind": "ball"}, r"domain=.*'simplex'"),
        ("simplex", "domain='simplex'"),
        ({"kind": "sum_below"}, r"missing keys \['limit'\]"),
        ({"kind": "sum_below", "limit": 0}, "domain.limit=0.*> 0"),
        ({"kind": "sum_below", "limit": 1, "margin": 1}, "domain.margin=1"),
        ({"kind": "capped", "caps": [0.1, -0.2]}, r"domain.caps\[1\]=-0.2"),
        ({"kind": "simplex", "limit": 1}, r"unknown keys \['limit'\]"),
    ],
)
def test_a_bad_domain_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        domain_from_dict(data)


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one cap a constraint"):
        Capped((0.1,)).project([0.1, 0.2])
    for domain in DOMAINS:
        with pytest.raises(ValueError, match="finite"):
            domain.project([0.0, math.nan, 1.0])
