"""The pitfalls that `make pitfalls` plants still have a place in the source, one each."""

from pathlib import Path

import pytest

from tests.pitfalls.catalogue import PITFALLS, Pitfall

HOUSE = Path(__file__).parents[1]


@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda pitfall: pitfall.name)
def test_a_pitfall_has_one_place_and_leaves_a_program_behind(pitfall: Pitfall) -> None:
    source = (HOUSE / pitfall.file).read_text()
    assert source.count(pitfall.right) == 1, f"{pitfall.file}: mend tests/pitfalls/catalogue.py"
    compile(source.replace(pitfall.right, pitfall.wrong), pitfall.file, "exec")


def test_every_pitfall_has_a_name_and_a_mistake_of_its_own() -> None:
    assert len({pitfall.name for pitfall in PITFALLS}) == len(PITFALLS)
    assert [pitfall.name for pitfall in PITFALLS if pitfall.right == pitfall.wrong] == []
