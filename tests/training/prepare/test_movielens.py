"""MovieLens-100K as a dataset: from the package, and from an archive served by a real HTTP server."""

import hashlib
import io
import logging
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cluster.dataset import Dataset
from cluster.errors import DataError
from training.prepare.films import Film
from training.prepare.movielens import item_text, prepare_movielens

U_DATA = "7\t1\t5\t300\n9\t267\t2\t100\n7\t543\t4\t100\n"
U_ITEM = "\n".join(
    "|".join(
        [item_id, title, "01-Jan-1995", "", "http://us.imdb.com/x", *("1" if n in genres else "0" for n in range(19))]
    )
    for item_id, title, genres in [
        ("1", "Toy Story (1995)", {3, 4, 5}),
        ("267", "unknown", {0}),
        ("543", "Misérables, Les (1995)", {8, 12}),
        ("1412", "Land Before Time III: The Time of the Great Giving (1995) (V)", {3, 4}),
    ]
)
U_USER = "7|24|M|technician|85711\n9|53|F|other|94043\n"


GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"]
GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "www"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def archive(*names: str) -> bytes:
    content = {"u.data": U_DATA, "u.item": U_ITEM, "u.user": U_USER}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as members:
        for name in names:
            members.writestr(f"ml-100k/{name}", content[name].encode("iso-8859-1"))
    return buffer.getvalue()


def package_archive() -> bytes:
    """The packaged copy in GroupLens' own layout."""
    spec = find_spec("recbole")
    assert spec is not None
    assert spec.submodule_search_locations
    stem = Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k" / "ml-100k"
    inter, item, user = (
        [line.split("\t") for line in stem.with_suffix(f".{name}").read_text("utf-8").splitlines()[1:]]
        for name in ("inter", "item", "user")
    )
    items = []
    for item_id, title, year, genres in item:
        full = {"unkonwn": "unknown", "V": f"{title} (V)"}.get(year, f"{title} ({year})")
        flags = ["1" if name in genres.split() else "0" for name in GENRES]
        items.append("|".join([item_id, full, "01-Jan-1995", "", "", *flags]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as members:
        for name, lines in [("data", map("\t".join, inter)), ("item", items), ("user", map("|".join, user))]:
            members.writestr(f"ml-100k/u.{name}", "\n".join(lines).encode("iso-8859-1"))
    return buffer.getvalue()


def serve(served: tuple[Path, str], content: bytes) -> dict[str, str]:
    folder, address = served
    (folder / "ml-100k.zip").write_bytes(content)
    return {"url": f"{address}/ml-100k.zip", "md5": hashlib.md5(content, usedforsecurity=False).hexdigest()}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_movielens(tmp_path_factory.mktemp("packaged") / "ml-100k", official=False)


def test_packaged_copy_is_the_whole_of_movielens_100k(packaged: Dataset) -> None:
    assert (packaged.info.events, packaged.info.items, packaged.info.users) == (100_000, 1_682, 943)
    assert packaged.info.kinds == {"rating": 100_000}
    assert packaged.info.facts["film_join_coverage"] >= 0.82
    assert all(source.licence and source.url for source in packaged.info.sources)


def test_events_lie_in_time_order_with_equal_times_in_file_order(packaged: Dataset) -> None:
    events = packaged.events()
    ts_us = events["ts_us"].to_numpy()
    file_rows = np.array([int(event_id.removeprefix("ml-100k-")) for event_id in events["event_id"].to_pylist()])
    np.testing.assert_array_equal(np.lexsort((file_rows, ts_us)), np.arange(100_000))
    first = events.slice(0, 1).to_pylist()[0]
    assert (first["user_id"], first["item_id"], first["value"]) == ("259", "255", 4.0)
    assert first["ts_us"] == 874_724_710 * 1_000_000
    assert first["domain"] == "movies"


def test_item_text_reads_as_sentences(packaged: Dataset) -> None:
    text = dict(zip(packaged.items()["item_id"].to_pylist(), packaged.items()["text"].to_pylist(), strict=True))
    assert text["1"].startswith("Toy Story (1995). Animation, Children's, Comedy")
    assert "Directed by John Lasseter. " in text["1"]
    assert text["12"].startswith("The Usual Suspects (1995). Crime, Thriller")
    assert "Starring Benicio del Toro, " in text["12"]
    assert text["267"] == "Unknown film."
    assert all(text.values())


def test_item_text_names_each_genre_once_and_leaves_out_what_is_unknown() -> None:
    film = Film(title="X", year=1995, genres=("Drama", "War"), directors=(), cast=("A", "B"), countries=("Iceland",))
    assert item_text("X, The", 1995, ["War"], film) == "The X (1995). War, Drama. Starring A, B. Iceland."
    assert item_text("X", None, [], None) == "X."


def test_users_have_their_attributes(packaged: Dataset) -> None:
    first = packaged.users().slice(0, 1).to_pylist()[0]
    assert first["user_id"] == "1"
    assert dict(first["attributes"]) == {"age": "24", "gender": "M", "occupation": "technician", "zip_code": "85711"}


def test_official_archive_is_read_from_the_network(served: tuple[Path, str], tmp_path: Path) -> None:
    where = serve(served, archive("u.data", "u.item", "u.user"))
    dataset = prepare_movielens(tmp_path / "ml", **where)
    assert dataset.info.sources[0].url == where["url"]
    assert dataset.events()["event_id"].to_pylist() == ["ml-100k-2", "ml-100k-3", "ml-100k-1"]
    items = {item["item_id"]: item for item in dataset.items().to_pylist()}
    assert items["543"]["text"].startswith("Les Misérables (1995). Drama, Musical")
    assert items["543"]["categories"] == ["Drama", "Musical"]
    assert items["267"]["text"] == "Unknown film."
    assert items["267"]["categories"] == []
    assert items["1412"]["text"].startswith("Land Before Time III: The Time of the Great Giving (1995). ")


def test_both_sources_give_the_same_dataset(served: tuple[Path, str], tmp_path: Path, packaged: Dataset) -> None:
    official = prepare_movielens(tmp_path / "ml", **serve(served, package_archive()))
    assert official.info.sources[0] != packaged.info.sources[0]
    assert official.events().equals(packaged.events())
    assert official.items().equals(packaged.items())
    assert official.users().equals(packaged.users())


def test_archive_with_another_checksum_is_refused_with_a_warning(
    served: tuple[Path, str], tmp_path: Path, packaged: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    where = serve(served, archive("u.data", "u.item", "u.user"))
    with caplog.at_level(logging.WARNING):
        dataset = prepare_movielens(tmp_path / "ml", url=where["url"], md5="0" * 32)
    assert f"has MD5 {where['md5']} instead of {'0' * 32}" in caplog.text
    assert dataset.events().equals(packaged.events())


@pytest.mark.parametrize("path", ["/nothing-here.zip", None])
def test_an_unreachable_archive_falls_back_with_a_warning(
    served: tuple[Path, str], tmp_path: Path, path: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    url = served[1] + path if path else "http://127.0.0.1:1/closed.zip"
    with caplog.at_level(logging.WARNING):
        dataset = prepare_movielens(tmp_path / "ml", url=url, timeout_s=2.0)
    assert f"{url} cannot be fetched" in caplog.text
    assert dataset.info.events == 100_000


def test_an_archive_without_its_files_is_an_error(served: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not the ml-100k archive .*u\.user"):
        prepare_movielens(tmp_path / "ml", **serve(served, archive("u.data", "u.item")))
    assert not (tmp_path / "ml").exists()
