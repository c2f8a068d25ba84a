"""What goes over the wire, for validation of requests and for `/docs`.

In:  request bodies.  Out: checked models, and the schemas of bodies and answers.
Knows nothing of how requests are answered. Answers are written as JSON directly; their models document them.
"""

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SkipValidation, TypeAdapter

from cluster.catalogue import MAX_CATEGORIES, Item, User
from cluster.events import KINDS, MAX_ID_CHARS, Event
from serving.interests import Fallback

MAX_INTERESTS_CHARS = 2_000


def _without_nul(value: str) -> str:
    if "\x00" in value:
        raise ValueError("holds a NUL")
    return value


Identifier = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_without_nul)]


Identifiers = Annotated[list[Identifier], Field(max_length=10_000)]
MAX_DEADLINE_MS = 600_000


class AskRequest(BaseModel):
    """What both kinds of requests for a slate hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: Identifier
    arm: str | None = Field(default=None, max_length=100, description="Arm of an experiment; see /v1/versions.")
    min_seq: int | None = Field(default=None, ge=0, le=2**62, description="A sequence number from feedback to reflect.")
    exclude: Identifiers = Field(default=[], description="Items not to recommend.")
    boost: Identifiers = Field(default=[], description="Items that stand before all others, where they are candidates.")
    bury: Identifiers = Field(default=[], description="Items that stand behind all others.")
    with_text: bool = Field(default=False, description="Whether to return each item's text.")
    interests: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_INTERESTS_CHARS,
        description="What the user says they like; clauses beginning with no, not, without … count as disliked.",
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="After so long, the answer is the user's last slate, or what is popular, and says so.",
    )


class RankRequest(AskRequest):
    """The caller's candidates, to be put in order for a user."""

    items: list[Identifier] = Field(min_length=1, max_length=10_000, description="Ids; one given twice counts once.")


class RecommendRequest(AskRequest):
    """What to recommend to whom."""

    k: int = Field(
        default=10, ge=1, le=2**31, description="Length of the slate; a smaller catalogue gives a shorter one."
    )
    categories: list[Identifier] = Field(
        default=[], max_length=MAX_CATEGORIES, description="Only items of any of these, where some are given."
    )
    domain: Identifier | None = Field(default=None, description="Only items of it.")


class ExplainRequest(BaseModel):
    """Why an item is shown to a user."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user_id: Identifier
    item_id: Identifier
    arm: str | None = Field(default=None, max_length=100, description="Arm of an experiment; see /v1/versions.")
    boost: Identifiers = Field(default=[], description="As in the request for the slate.")
    bury: Identifiers = Field(default=[], description="As in the request for the slate.")


Why = Annotated[str, Field(max_length=1_000, description="Kept in the registry's history.")]


class PromoteRequest(BaseModel):
    """Which version is to answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=1, lt=2**31)] | Annotated[str, Field(min_length=1, max_length=40)] = Field(
        description='Such as 3, or "3.12" with its deltas.'
    )
    reason: Why = ""


class RollBackRequest(BaseModel):
    """That the version before is to answer again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Why = ""


class RecommendedItem(BaseModel):
    """One position of a slate."""

    item_id: str
    position: int
    score: float
    propensity: float
    text: str | None = None


class UsedInterests(BaseModel):
    """How stated interests were understood."""

    liked: str
    disliked: list[str]
    fallback: Fallback | None = Field(default=None, description="Why they were not used.")


class RecommendResponse(BaseModel):
    """A slate, answered by exactly one version."""

    request_id: str
    user_id: str
    version: str
    learned_seq: int
    state_seq: int
    state_fallback: bool = False
    reflects_min_seq: bool | None = None
    arm: str
    cold_start: bool = Field(description="Whether nothing the user did, or says they like, could be used.")
    items: list[RecommendedItem]
    encoder: str | None = Field(
        default=None, description="Where interests were stated: fingerprint of what read them and the items."
    )
    interests: UsedInterests | None = None
    fallback: Literal["cached", "popular"] | None = Field(
        default=None, description="What took the place of a slate that was not ready by the deadline."
    )
    used: list[Literal["interests", "history"]] | None = None


TOKENS = 2**31
Token = Annotated[int, Field(ge=0, lt=TOKENS)]


class EmbeddingsRequest(BaseModel):
    """Texts whose vectors are wanted, as OpenAI's API takes them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: SkipValidation[str | list[str] | list[Token] | list[list[Token]]] = Field(
        description="A text, texts, or lists of the model's own token ids without special ones."
    )
    """Checked in embeddings.py, up to the first unsound entry: pydantic would tell of each, once for each kind."""
    model: str = Field(description="See /v1/models.")
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64 is of little-endian float32."
    )
    dimensions: int | None = Field(default=None, ge=1, description="Keep the first so many, at length 1 again.")
    user: str | None = Field(default=None, description="Taken and not looked at.")


class EmbeddingEntry(BaseModel):
    """One text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    truncated: bool | None = Field(default=None, description="True where the text has more than the model reads.")


class EmbeddingsUsage(BaseModel):
    """What the model read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Vectors of length 1, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingsUsage
    encoder: str = Field(description="Fingerprint; vectors of different ones do not compare.")


class ModelDescription(BaseModel):
    """A model that makes vectors."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    dimensions: int
    max_tokens: int


class ModelsResponse(BaseModel):
    """All of them, of which there is one."""

    object: Literal["list"] = "list"
    data: list[ModelDescription]


class OpenAIProblem(BaseModel):
    """What is wrong, as clients of OpenAI's API expect it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error of the routes that are compatible with OpenAI's."""

    error: OpenAIProblem


class UnrankedItem(BaseModel):
    """A candidate that was left out."""

    item_id: str
    reason: Literal["unknown", "unavailable", "excluded"]


class RankResponse(RecommendResponse):
    """The candidates in order."""

    unranked: list[UnrankedItem]


class RejectedEntry(BaseModel):
    """One entry that was refused, by its place in the request."""

    index: int
    field: str
    reason: str


class AppendedEvent(BaseModel):
    """Where an event stands in the log."""

    event_id: str
    seq: int
    duplicate: bool


class FeedbackResponse(BaseModel):
    """What became of each event; sent once all accepted ones are durable."""

    accepted: int
    duplicates: int
    last_seq: int | None
    results: list[AppendedEvent]
    rejected: list[RejectedEntry]


class ItemsResponse(BaseModel):
    """What became of each item; accepted ones are recommendable from now on."""

    accepted: int
    rejected: list[RejectedEntry]


class UsersResponse(ItemsResponse):
    """What became of each user told of; accepted ones are durable."""


class DeletedResponse(BaseModel):
    """What became of each item to be deleted."""

    deleted: int
    rejected: list[RejectedEntry]


class DeleteRequest(BaseModel):
    """Items to be deleted."""

    items: list[str] = Field(min_length=1, description="Ids.")


class ItemResponse(BaseModel):
    """An item as the system sees it."""

    item_id: str
    text: str | None
    categories: list[str]
    domain: str | None
    available: bool = Field(description="Whether it may be recommended now.")
    deleted: bool
    available_from_us: int | None
    available_until_us: int | None
    version: str
    has_row: bool = Field(description="Whether the version has learned of this very item, not of its text alone.")


class SimilarUser(BaseModel):
    """A neighbour."""

    user_id: str
    score: float


class SimilarUsersResponse(BaseModel):
    """A user's nearest neighbours, nearest first."""

    user_id: str
    version: str
    by: Literal["row", "history"] = Field(description="Cosine of the version's rows, or else of the items they have.")
    users: list[SimilarUser]


class HistoryEntry(BaseModel):
    """Something that a user did."""

    item_id: str
    kind: str
    value: float | None
    ts_us: int
    seq: int = Field(description="Place in the log; 0 or less for what was known beforehand.")
    text: str | None = Field(description="Of the item; none where the version does not know it.")


class UserResponse(BaseModel):
    """A user as the system sees them."""

    user_id: str
    version: str
    has_row: bool = Field(description="Whether the version has learned of this very user.")
    state_seq: int = Field(description="The user's newest event in the log; 0 where there is none.")
    state_fallback: bool = False
    attributes: dict[str, str] = Field(description="What was told of the user.")
    items: int = Field(description="How many items the user has.")
    looked_back_on: int = Field(description="Newest interactions that the version answers from.")
    history: list[HistoryEntry] = Field(description="Newest interactions, oldest first.")


class Reason(BaseModel):
    """An item the user had, and what it adds to the score."""

    item_id: str
    kind: str = Field(description="Of the user's newest interaction with it.")
    text: str | None
    adds: float | None = Field(
        description="The score less what it is without the item; none where that is all there is."
    )


class ExplainResponse(BaseModel):
    """An item's score for a user, and what it rests on."""

    user_id: str
    item_id: str
    arm: str
    version: str
    score: float
    place: int = Field(description="Among the user's best candidates, from 1.")
    among: int = Field(description="How many these are.")
    cold_start: bool = Field(description="Whether nothing the user did could be used: what is popular is shown.")
    interactions: int = Field(description="How many interactions the score rests on.")
    user_has_row: bool = Field(description="Whether the version has learned of this very user.")
    item_is_new: bool = Field(description="Whether the item was put since training, and is placed by its text.")
    uses_text: bool = Field(description="Whether the item's text plays a part.")
    text: str | None
    because: list[Reason] = Field(description="Items of the history without which the score changes most.")
    rule: Literal["boosted", "buried"] | None = Field(description="What of the request moves it, whatever its score.")


class FeedbackMinute(BaseModel):
    """What became of the slates of an arm whose first event came in a minute."""

    minute_us: int
    arm: str
    events: int
    impressions: int = Field(description="Items of slates that were shown.")
    clicks: int = Field(description="Of these, clicked or bought.")
    ctr: float | None = Field(description="Clicks over impressions; none where no impressions were logged.")
    slates: int
    hit_rate: float = Field(description="Slates with a click, like, cart, purchase or share, over slates.")


class DeltaFigures(BaseModel):
    """Progressive validation: how well events were foreseen before they were learned from, as a delta tells."""

    version: str
    seq: int = Field(description="The newest event of the delta.")
    log_loss: float
    base_log_loss: float = Field(description="Of the same events, without anything learned since the version.")
    ndcg_at_10: float
    base_ndcg_at_10: float


class PublishedVersion(BaseModel):
    """A version as it was published, without its deltas."""

    version: str
    created_us: int
    learned_seq: int
    system: str
    promoted: str | None = Field(description="The version with its delta that is promoted, where it is of this one.")


class Move(BaseModel):
    """What was promoted when, and why."""

    at_us: int
    version: str
    reason: str


class TrafficSlice(BaseModel):
    """What a replica answered in some seconds."""

    at_us: int
    seconds: float
    requests: int
    refused: int = Field(description="With 429 or 503.")
    failed: int = Field(description="With 500.")
    p50_ms: float | None
    p99_ms: float | None


class ReplicaTraffic(BaseModel):
    """How the replica that answers has done lately."""

    replica: str
    slices: list[TrafficSlice]


class StatsResponse(BaseModel):
    """What a dashboard shows; all but the replica's traffic is the same whichever replica answers."""

    feedback: list[FeedbackMinute]
    learning: list[DeltaFigures]
    versions: list[PublishedVersion] = Field(description="The newest first.")
    moves: list[Move] = Field(description="The newest ones, oldest first, without those from delta to delta.")
    replica: ReplicaTraffic


class MoveResponse(BaseModel):
    """How the pointer has moved."""

    promoted: str
    before: str | None
    reason: str


class SimilarItem(BaseModel):
    """A neighbour."""

    item_id: str
    score: float


class SimilarResponse(BaseModel):
    """An item's nearest neighbours, nearest first."""

    item_id: str
    version: str
    learned_seq: int
    items: list[SimilarItem]


class Problem(BaseModel):
    """An error, after RFC 9457 (application/problem+json)."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = Field(default=None, description="As in the header X-Request-Id.")
    errors: list[RejectedEntry] | None = None


REFUSALS = (400, 401, 403, 404, 409, 413, 422, 429, 503)
OPENAI = ("/v1/embeddings", "/v1/models")
"""Paths, and beginnings of paths, whose clients expect errors in OpenAI's form."""


def describe_problems(path: str, model: type[BaseModel] | None) -> dict[int | str, dict[str, Any]]:
    """Return the description of a route's refusals, by status; one that takes entries answers all refused as any."""
    if path.startswith(OPENAI):
        content = {"application/json": {"schema": OpenAIError.model_json_schema()}}
    else:
        content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    problems = {status: {"description": HTTPStatus(status).phrase, "content": content} for status in REFUSALS}
    if model in (FeedbackResponse, ItemsResponse, UsersResponse, DeletedResponse):
        assert model is not None, "it is one of these"
        problems[422]["content"] = {**content, "application/json": {"schema": model.model_json_schema()}}
    return {**problems}


def event_schema() -> dict[str, Any]:
    """Return the JSON schema of one event as a client may state it."""
    schema = TypeAdapter(Event).json_schema()
    schema["required"] = ["user_id", "item_id", "kind"]  # the others are minted or stay empty
    schema["properties"]["kind"]["enum"] = list(KINDS)
    return schema


def item_schema() -> dict[str, Any]:
    """Return the JSON schema of one item."""
    return TypeAdapter(Item).json_schema()


def user_schema() -> dict[str, Any]:
    """Return the JSON schema of what is told of one user."""
    return TypeAdapter(User).json_schema()


def one_or_many(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the schema of one entry, of a list of them, or of an object that holds the list under a name."""
    many = {"type": "array", "items": schema}
    return {"anyOf": [schema, many, {"type": "object", "properties": {name: many}, "required": [name]}]}
