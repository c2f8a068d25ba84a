"""README's tables of quality are those of the recorded results."""

from benchmarks.tables import BEGIN, END, ROOT, build_tables


def test_readme_has_the_tables_of_the_results() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == build_tables()
