import pytest

from cluster.output import render_result


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, ""),
        ({"a": 1, "long_name": None}, "a          1\nlong_name  -"),
        ({"share": 0.123456, "seconds": 12345.6, "ok": True}, "share    0.1235\nseconds  12,346\nok       yes"),
        ({"hit": {"live": 0.5, "frozen": 0.25}, "tags": ["a", "b"]}, "hit   live 0.5, frozen 0.25\ntags  a, b"),
        ({"n": 2, "rows": [{"x": 1, "y": "a"}, {"x": 20, "z": 3}]}, "n  2\n\nrows:\nx   y  z\n1   a  -\n20  -  3"),
        ({"rows": []}, "rows  -"),
    ],
)
def test_a_result_is_aligned_for_a_person(result: dict, text: str) -> None:
    assert render_result(result) == text
