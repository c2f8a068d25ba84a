"""MovieLens-100K with film text, as a dataset folder.

In:  GroupLens' ml-100k.zip where it can be reached, else the copy inside the package recbole; the film table.
Out: a `Dataset`: 100,000 ratings of 1,682 films by 943 users, item text with director, cast, genres and country.
Knows nothing of models. The same dataset results from both sources; only its list of sources tells them apart.

Harper and Konstan: The MovieLens Datasets, ACM TiiS 5(4), 2015. The data may be used for research and not be passed on.
"""

import csv
import hashlib
import http.client
import io
import logging
import re
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.dataset import Dataset, Source, write_dataset
from cluster.errors import DataError
from training.prepare.films import FILMS_SOURCE, Film, FilmTable, package_file, spoken_title
from training.prepare.tables import build_events, build_items, build_users

OFFICIAL_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
OFFICIAL_MD5 = "0e33842e24a9c977be4e0107933c0723"
LICENCE = "MovieLens terms: research use, no redistribution, acknowledgement of GroupLens"
DOMAIN = "movies"
LABEL = "every rating is a positive interaction for retrieval; its stars are the rating task's target"
CAST_IN_TEXT = 6
DOWNLOAD_LIMIT_S = 60.0
DOWNLOAD_LIMIT_BYTES = 64 * 2**20

_GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"]
_GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]
_UNKNOWN_TITLES = frozenset({"unknown", "unkonwn"})
_TITLE_YEAR = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)(?:\s*\(?V\)?)?$")
_USER_ATTRIBUTES = ("age", "gender", "occupation", "zip_code")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Movie:
    item_id: str
    title: str
    year: int | None
    genres: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """MovieLens-100K as it lies in one of its sources."""

    ratings: list[tuple[str, str, str, str]]
    """user, item, stars, seconds since 1970; in file order."""
    movies: list[_Movie]
    users: list[tuple[str, ...]]
    source: Source


def prepare_movielens(
    out: Path, *, official: bool = True, timeout_s: float = 5.0, url: str = OFFICIAL_URL, md5: str = OFFICIAL_MD5
) -> Dataset:
    """Write MovieLens-100K joined with the film table to `out`.

    With `official`, `url` is tried first; when it does not answer within `timeout_s` or its MD5 differs, a warning is
    logged and the packaged copy is read. Raises `DataError` naming a package that is needed and not installed.
    """
    films = FilmTable.from_package()
    archive = _download(url, md5, timeout_s) if official else None
    raw = _read_package() if archive is None else _read_zip(archive, url)
    found = [films.find(movie.title, movie.year) if movie.year else None for movie in raw.movies]
    joined = sum(film is not None for film in found)
    coverage = joined / len(raw.movies) if raw.movies else 0.0
    _log.info("%d of %d films joined with the film table (%.1f%%)", joined, len(raw.movies), 100 * coverage)
    return write_dataset(
        out,
        name="ml-100k",
        events=_events(raw.ratings),
        items=_items(raw.movies, found),
        users=_users(raw.users),
        label=LABEL,
        sources=[raw.source, FILMS_SOURCE],
        rejected={},
        facts={"films_joined": joined, "film_join_coverage": round(coverage, 4)},
    )


def item_text(title: str, year: int | None, genres: Sequence[str], film: Film | None) -> str:
    """Describe a film in sentences: title and year, genres, then what the film table knows."""
    sentences = [f"{spoken_title(title)} ({year})" if year else spoken_title(title)]
    further = film.genres if film else ()
    if named := [*genres, *(genre for genre in further if genre not in genres)]:
        sentences.append(", ".join(named))
    if film and film.directors:
        sentences.append(f"Directed by {', '.join(film.directors)}")
    if film and film.cast:
        sentences.append(f"Starring {', '.join(film.cast[:CAST_IN_TEXT])}")
    if film and film.countries:
        sentences.append(", ".join(film.countries))
    return "".join(f"{sentence}. " for sentence in sentences).rstrip()


def parse_title(title_and_year: str) -> tuple[str, int | None]:
    """Part 'Title (1995)' into title and year; no year where none is stated."""
    text = " ".join(title_and_year.split())
    match = _TITLE_YEAR.match(text)
    return (match["title"], int(match["year"])) if match else (text, None)


def _download(url: str, md5: str, timeout_s: float) -> bytes | None:
    """Fetch the archive; `None`, with a warning, when it cannot be had or is not the one expected."""
    deadline_s = time.monotonic() + DOWNLOAD_LIMIT_S
    content = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            while chunk := response.read1(2**16):
                content.write(chunk)
                if content.tell() > DOWNLOAD_LIMIT_BYTES or time.monotonic() > deadline_s:
                    raise TimeoutError(f"{content.tell():,} bytes and no end within {DOWNLOAD_LIMIT_S:.0f} s")
    except (OSError, http.client.HTTPException) as error:
        _log.warning("%s cannot be fetched (%s); using the packaged copy", url, error)
        return None
    digest = hashlib.md5(content.getvalue(), usedforsecurity=False).hexdigest()
    if digest != md5:
        _log.warning("%s has MD5 %s instead of %s; using the packaged copy", url, digest, md5)
        return None
    return content.getvalue()


def _read_zip(archive: bytes, url: str) -> _Raw:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            ratings, movies, users = (
                members.read(f"ml-100k/u.{name}").decode("iso-8859-1") for name in ("data", "item", "user")
            )
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{url}: is not the ml-100k archive ({error})") from error
    return _Raw(
        ratings=[(user, item, stars, seconds) for user, item, stars, seconds in _rows(ratings, "\t")],
        movies=[
            _movie(item_id, title, [genre for genre, flag in zip(_GENRES, flags, strict=True) if flag == "1"])
            for item_id, title, _released, _video, _page, *flags in _rows(movies, "|")
        ],
        users=[tuple(row) for row in _rows(users, "|")],
        source=Source(name="MovieLens-100K (GroupLens)", licence=LICENCE, url=url),
    )


def _read_package() -> _Raw:
    inside = "dataset_example/ml-100k/ml-100k"
    ratings, movies, users = (
        list(_rows(package_file("recbole", f"{inside}.{name}", install="recbole==1.2.1").read_text("utf-8"), "\t"))[1:]
        for name in ("inter", "item", "user")
    )
    return _Raw(
        ratings=[(user, item, stars, seconds) for user, item, stars, seconds in ratings],
        movies=[_movie(item_id, f"{title} ({year})", genres.split()) for item_id, title, year, genres in movies],
        users=[tuple(row) for row in users],
        source=Source(
            name="MovieLens-100K (packaged in recbole 1.2.1)",
            licence=LICENCE,
            url="https://github.com/RUCAIBox/RecBole",
        ),
    )


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    return (row for row in csv.reader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_NONE) if row)


def _movie(item_id: str, title_and_year: str, genres: Sequence[str]) -> _Movie:
    """Read 'Title (1995)', also '… (1995) (V)' for a video; recbole spells the one film without a title 'unkonwn'."""
    title, year = parse_title(title_and_year)
    if title.split(" ")[0].lower() in _UNKNOWN_TITLES and year is None:
        title = "Unknown film"
    return _Movie(
        item_id=item_id, title=title, year=year, genres=tuple(genre for genre in genres if genre != "unknown")
    )


def _events(ratings: Sequence[tuple[str, str, str, str]]) -> pa.Table:
    users, items, stars, seconds = zip(*ratings, strict=True) if ratings else ((), (), (), ())
    columns = {
        "ts_us": np.asarray(seconds, dtype=np.float64).astype(np.int64) * 1_000_000,
        "user_id": users,
        "item_id": items,
        "kind": ["rating"] * len(ratings),
        "value": np.asarray(stars, dtype=np.float64),
    }
    return build_events("ml-100k", DOMAIN, columns)


def _items(movies: Sequence[_Movie], films: Sequence[Film | None]) -> pa.Table:
    texts = [item_text(m.title, m.year, m.genres, film) for m, film in zip(movies, films, strict=True)]
    return build_items(DOMAIN, [movie.item_id for movie in movies], texts, [movie.genres for movie in movies])


def _users(users: Sequence[tuple[str, ...]]) -> pa.Table:
    return build_users({user_id: list(zip(_USER_ATTRIBUTES, values, strict=True)) for user_id, *values in users})
