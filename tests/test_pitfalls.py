"""The pitfalls that `make pitfalls` plants still have a place in the source, one each."""

import pytest

from tests.pitfalls.__main__ import HOUSE, maths_tests
from tests.pitfalls.catalogue import PITFALLS, Pitfall


@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda pitfall: pitfall.name)
def test_a_pitfall_has_one_place_and_leaves_a_program_behind(pitfall: Pitfall) -> None:
    source = (HOUSE / pitfall.file).read_text()
    assert source.count(pitfall.right) == 1, f"{pitfall.file}: mend tests/pitfalls/catalogue.py"
    compile(source.replace(pitfall.right, pitfall.wrong), pitfall.file, "exec")


def test_every_pitfall_has_a_name_and_a_mistake_of_its_own() -> None:
    assert len({pitfall.name for pitfall in PITFALLS}) == len(PITFALLS)
    assert [pitfall.name for pitfall in PITFALLS if pitfall.right == pitfall.wrong] == []


@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda pitfall: pitfall.name)
def test_the_tests_that_are_to_notice_a_pitfall_are_there(pitfall: Pitfall) -> None:
    for name in maths_tests(pitfall.file):
        path, _, function = name.partition("::")
        assert not function or f"def {function}(" in (HOUSE / path).read_text()
        assert (HOUSE / path).is_file()
