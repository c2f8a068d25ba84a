"""External ids and rows, one to one."""

import pyarrow as pa
import pytest

from embeddings.vocabulary import UNKNOWN_ROW, Vocabulary


def test_rows_follow_the_order_listed_and_unknown_ids_have_none() -> None:
    vocabulary = Vocabulary(["b", "a"], capacity=3)
    assert [vocabulary.row(external) for external in ("b", "a", "c")] == [0, 1, UNKNOWN_ROW]
    assert len(vocabulary) == 2


def test_a_column_gives_the_rows_that_single_ids_give() -> None:
    vocabulary, asked = Vocabulary(["b", "a", "ü"], capacity=3), ["ü", "c", "b", "b", ""]
    expected = [vocabulary.row(external) for external in asked]
    column = pa.chunked_array([asked[:2], asked[2:]], pa.string())
    assert vocabulary.rows(asked).tolist() == vocabulary.rows(column).tolist() == expected


@pytest.mark.parametrize("nothing", [[], pa.chunked_array([], pa.string())])
def test_no_ids_have_no_rows(nothing: list[str] | pa.ChunkedArray) -> None:
    assert Vocabulary(["a"], capacity=1).rows(nothing).tolist() == []


def test_a_new_id_gets_the_next_row_once_and_keeps_it() -> None:
    vocabulary = Vocabulary(["a"], capacity=3)
    assert [vocabulary.assign(external) for external in ("b", "a", "c", "b")] == [1, 0, 2, 1]
    assert vocabulary.ids == ["a", "b", "c"]
    assert vocabulary.row("c") == 2


def test_a_full_table_gives_no_more_rows_and_still_knows_its_own() -> None:
    vocabulary = Vocabulary(["a"], capacity=1)
    assert vocabulary.assign("b") == UNKNOWN_ROW
    assert vocabulary.assign("a") == 0
    assert vocabulary.ids == ["a"]


def test_repeated_ids_and_too_many_are_refused() -> None:
    with pytest.raises(ValueError, match="1 ids repeat"):
        Vocabulary(["a", "a"], capacity=5)
    with pytest.raises(ValueError, match="2 ids do not fit into 1 rows"):
        Vocabulary(["a", "b"], capacity=1)


def test_a_reused_row_belongs_to_the_new_id_alone() -> None:
    vocabulary = Vocabulary(["a", "b"], capacity=2)
    vocabulary.reuse(0, "c")
    assert [vocabulary.row(external) for external in ("a", "b", "c")] == [UNKNOWN_ROW, 1, 0]
    assert vocabulary.ids == ["c", "b"]
    with pytest.raises(ValueError, match="has row 1 already"):
        vocabulary.reuse(0, "b")
