"""What can be set about serving.

In:  a recipe's `[serve]`.  Out: one checked dataclass.
Knows nothing of host and port: they belong to the command line.
"""

from dataclasses import dataclass

from cluster.errors import ConfigError
from serving.experiments import ARMS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How the app answers, and how much it takes on."""

    replicas: int = 1
    """Copies of the ingress, each with the model in its own memory; where there may be more, the fewest."""
    max_replicas: int | None = None
    """Most copies: Ray adds some while more requests are under way in each than it should, and takes them back; none is
    as many as `replicas`, always."""
    target_ongoing_requests: float = 8.0
    """Requests that a copy should have under way; more on average call for another copy."""
    upscale_delay_s: float = 5.0
    """How long there must be too many before copies are added."""
    downscale_delay_s: float = 120.0
    """How long there must be too few before copies are taken back."""
    standby: bool = True
    """Whether `recloop serve` keeps one more copy outside a private Ray, which answers while Ray starts or is gone."""
    arms: tuple[str, ...] = ("live",)
    """Arms that a request may name; the first is what it gets when it names none."""
    pinned_version: int | None = None
    """Version of the arms that do not follow promotions; none is the trained one that the promoted grew from."""
    poll_interval_ms: int = 100
    """How often a replica looks for a new version, delta or item."""
    candidates: int = 100
    """Ranked items the policy draws a slate from; a longer slate draws from as many as it asks for."""
    kept_users: int = 10_000
    """Users whose candidates a replica keeps until their state or what answers is another; 0 keeps none."""
    max_k: int = 10_000
    """Longest slate a request may ask for."""
    max_batch_events: int = 1_000
    """Most events or items in one request."""
    max_body_bytes: int = 8 * 1024**2
    """Largest request body."""
    max_ongoing_requests: int = 64
    """Requests a replica works on at a time."""
    max_queued_requests: int = 16
    """Requests that wait for a replica; further ones are answered 429 with Retry-After."""
    max_wait_ms: float = 50.0
    """A replica answers 429 to requests for slates that would wait longer than so for those before them."""
    threads: int = 2
    """Threads of a replica that read state and run the model."""
    torch_threads: int = 1
    """Threads each of those gives one tensor operation."""
    key_rate_per_s: float = 1_000.0
    """Requests a second that an API key may make which has no rate of its own; further ones are answered 429. Each copy
    of the ingress grants its share of it, by the fewest copies there are: while there are more, a key may make more."""
    key_burst_s: float = 2.0
    """How many seconds' worth of them may come at once."""
    log_requests: bool = False
    """Whether each request is told of on stderr, in a line of JSON; those that fail always are."""
    seed: int = 0
    """Of the policy's draws; each replica adds its rank."""
    max_batch_texts: int = 2_048
    """Most texts in one request for vectors."""
    max_text_chars: int = 200_000
    """Longest text, or list of token ids, in such a request; of what is taken, the model reads its first tokens."""
    encoder_replicas: int = 1
    """Copies of the text encoder; where there may be more, the fewest."""
    encoder_max_replicas: int | None = None
    """Most copies of it, which Ray adds and takes back as it does those of the ingress; none is `encoder_replicas`."""
    encoder_timeout_s: float = 60.0
    """How long new items, 64 at a time, or a request for vectors wait for the text encoder."""
    interests_timeout_s: float = 1.0
    """How long a recommendation waits for the vectors of stated interests before it is made without them."""
    encoder_batch_tokens: int = 1_024
    """Tokens that the text encoder reads together at most, padding counted: how long it is before it sees to others."""
    encoder_gather_ms: float = 2.0
    """How long an idle text encoder waits for more texts to come with the first."""
    encoder_cached: int = 20_000
    """Vectors of texts that people asked about which are kept in memory; no file holds them."""
    warm_encoder: bool = True
    """Load the text encoder's model at the start, not with the first text."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.arms or len(set(self.arms)) < len(self.arms) or not set(self.arms) <= set(ARMS):
            raise ConfigError(f"serve.arms={list(self.arms)}: must be one or more of {', '.join(ARMS)}, each once")
        for name in (
            "replicas",
            "poll_interval_ms",
            "candidates",
            "max_k",
            "max_batch_events",
            "max_body_bytes",
            "max_batch_texts",
            "max_text_chars",
            "encoder_batch_tokens",
            "max_ongoing_requests",
            "max_queued_requests",
            "threads",
            "torch_threads",
            "encoder_replicas",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"serve.{name}={getattr(self, name)}: must be at least 1")
        if self.pinned_version is not None and self.pinned_version < 1:
            raise ConfigError(f"serve.pinned_version={self.pinned_version}: versions are numbered from 1")
        for name in ("encoder_gather_ms", "encoder_cached", "kept_users"):
            if getattr(self, name) < 0:
                raise ConfigError(f"serve.{name}={getattr(self, name)}: must be at least 0")
        for name in (
            "encoder_timeout_s",
            "interests_timeout_s",
            "key_rate_per_s",
            "key_burst_s",
            "max_wait_ms",
            "target_ongoing_requests",
            "upscale_delay_s",
            "downscale_delay_s",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"serve.{name}={getattr(self, name)}: must be above 0")
        for most, fewest in (("max_replicas", "replicas"), ("encoder_max_replicas", "encoder_replicas")):
            if (given := getattr(self, most)) is not None and given < getattr(self, fewest):
                raise ConfigError(f"serve.{most}={given}: must be at least serve.{fewest}={getattr(self, fewest)}")

    @property
    def most_replicas(self) -> int:
        """How many copies of the ingress there may be."""
        return self.max_replicas or self.replicas
