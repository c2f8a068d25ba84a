"""What can be typed after `recloop`: commands, flags, help.

In:  nothing.  Out: a parser whose result names the function to run (`target`) and carries every flag.
Knows nothing of what the functions do.
"""

import argparse
from typing import TypeAlias

from cluster.config import packaged_recipes
from cluster.keys import ROLES

DEFAULT_RECIPE = "movielens"
KNOWN_SOURCES = ("movielens", "movielens-1995-2016", "complete-journey")
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000

EXIT_CODES = """\
exit codes:
  0 done · 1 failed · 2 recipe or flag · 3 data · 4 registry · 5 Ray, port, storage or log · 6 figures below their bars
  130 Ctrl-C

`recloop COMMAND --help` shows a command's flags and examples.
"""


class _Parser(argparse.ArgumentParser):
    """One command's parser: help keeps its line breaks, flags are not abbreviated."""

    def __init__(self, **settings: object) -> None:
        settings |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**settings)  # pyright: ignore[reportArgumentType]  # passed through as argparse gives them


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="recloop", description="A recommender that learns while it serves.", epilog=EXIT_CODES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", title="commands")
    for add in (
        _prepare,
        _examples,
        _plan,
        _finetune,
        _distill,
        _train,
        _tune,
        _evaluate,
        _publish,
        _serve,
        _replay,
        _demo,
        _versions,
        _events,
        _ask,
        _keys,
        _status,
    ):
        _add_common_flags(add(commands))
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _command(commands: Commands, name: str, target: str, summary: str, *examples: str) -> _Parser:
    epilog = "\n".join(["examples:", *(f"  recloop {name} {example}".rstrip() for example in examples)])
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    parser.set_defaults(target=target, result_is_json=False)
    return parser


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("flags of every command")
    group.add_argument("--home", metavar="DIR", help="registry, log, runs; default $RECLOOP_HOME or ./recloop-home")
    recipes = ", ".join(packaged_recipes())
    group.add_argument("--recipe", metavar="NAME|FILE", default=DEFAULT_RECIPE, help=f"{recipes}, or a TOML file")
    group.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="override one key of the recipe; may be repeated",
    )
    group.add_argument("--json", action="store_true", help="print the result as one line of JSON, no progress bars")
    group.add_argument("--verbose", action="store_true", help="log what happens, and where an error was raised")


def _prepare(commands: Commands) -> _Parser:
    parser = _command(
        commands,
        "prepare",
        "training.prepare.command:run",
        "make a dataset from a known source or from your own files",
        "movielens",
        "--events clicks.csv --columns user=member,item=sku,time=at --out data/clicks",
        "--events e.parquet --items i.csv --item-columns item=sku,text=title --out data/shop",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("source", nargs="?", choices=KNOWN_SOURCES, help="a known source")
    source.add_argument("--events", metavar="FILE", help="your interactions, CSV or Parquet")
    parser.add_argument("--columns", metavar="A=B,…", type=_mapping, default={}, help="user, item, time, kind, value")
    parser.add_argument("--items", metavar="FILE", help="your items, CSV or Parquet")
    parser.add_argument("--item-columns", metavar="A=B,…", type=_mapping, default={}, help="item, text, categories, …")
    parser.add_argument("--out", metavar="DIR", help="where to; default is datasets/ in the home folder")
    return parser


def _examples(commands: Commands) -> _Parser:
    summary = "make training rows of a dataset of any size, for the streamed trainer"
    parser = _command(
        commands,
        "examples",
        "training.prepare.examples:run",
        summary,
        "--out data/rows",
        "--data data/shop --out data/rows --history 50 --ids any",
    )
    _add_data_flag(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="where to, on storage that all machines share")
    parser.add_argument(
        "--history", metavar="N", type=_positive, default=20, help="items at most; default: %(default)s"
    )
    negatives = "drawn a positive where the dataset has no impressions; default: %(default)s"
    parser.add_argument("--negatives", metavar="N", type=_natural, default=4, help=negatives)
    ids = "rows: numbered by frequency, for tables of fixed size; any: digests, for dynamic ones; default: %(default)s"
    parser.add_argument("--ids", choices=["rows", "any"], default="rows", help=ids)
    parser.add_argument("--seed", metavar="N", type=_natural, default=0, help="of the negatives; default: %(default)s")
    return parser


def _plan(commands: Commands) -> _Parser:
    summary = "show which worker would hold what, and whether memory suffices, before anything starts"
    parser = _command(
        commands,
        "plan",
        "training.plan:run",
        summary,
        "--recipe clicks --data data/rows --workers 2",
        "--recipe clicks --data s3://bucket/rows --workers 16 --machines 4 --json",
        "--serve --items 1000000 --users 5000000 --rate 2000",
    )
    serving = "size the servers instead: of the published version, which is timed, or of so many items and users"
    parser.add_argument("--serve", action="store_const", dest="target", const="serving.plan:run", help=serving)
    parser.add_argument("--items", metavar="N", type=_positive, help="with --serve; default: the version's")
    parser.add_argument("--users", metavar="N", type=_positive, help="with --serve; default: the version's")
    parser.add_argument("--rate", metavar="N", type=float, default=100.0, help="with --serve: requests a second")
    _add_data_flag(parser)
    _add_workers_flag(parser)
    machines = "like this one, over which the workers are spread; default: %(default)s"
    parser.add_argument("--machines", metavar="N", type=_positive, default=1, help=machines)
    return parser


def _finetune(commands: Commands) -> _Parser:
    parser = _command(
        commands,
        "finetune",
        "training.encoder.command:run",
        "tune the text encoder to what users chose; `train --set encoder.adapter=RUN` then reads text with it",
        "--data data/shop",
        "--set finetune.tuned=top --set finetune.objective=rating_mse --workers 2",
    )
    _add_data_flag(parser)
    parser.add_argument("--workers", metavar="N", type=_positive, help="default: the recipe's train.workers")
    parser.add_argument("--epochs", metavar="N", type=_positive, help="default: the recipe's finetune.epochs")
    return parser


def _distill(commands: Commands) -> _Parser:
    parser = _command(
        commands,
        "distill",
        "training.encoder.student:run",
        "make a smaller text encoder of the recipe's; `train --set encoder.model=FOLDER` then reads text with it",
        "--data data/shop --texts data/more.txt",
        "--set student.layers=2 --set encoder.adapter=recloop-home/runs/finetune-20260101-120000-000000",
    )
    _add_data_flag(parser)
    parser.add_argument("--texts", metavar="FILE", help="further texts to learn from, one a line")
    return parser


def _train(commands: Commands) -> _Parser:
    summary = "train on a dataset's first part by time, or on an examples folder of any size"
    parser = _command(
        commands,
        "train",
        "training.trainer:run",
        summary,
        "",
        "--data data/shop --workers 4 --epochs 3",
        "--recipe clicks --data s3://bucket/rows --workers 1..4",
        "--recipe ease --data data/shop",
        "--resume recloop-home/runs/clicks-20260101-120000-000000",
    )
    _add_data_flag(parser)
    workers = "how many, or from A to B as there is room; default: the recipe's train.workers"
    parser.add_argument("--workers", metavar="N|A..B", type=_worker_range, help=workers)
    parser.add_argument("--epochs", metavar="N", type=_positive, help="default: the recipe's train.epochs")
    parser.add_argument(
        "--resume", metavar="DIR", help="go on with a run over examples, at its newest whole checkpoint"
    )
    return parser


def _tune(commands: Commands) -> _Parser:
    parser = _command(
        commands,
        "tune",
        "training.tune:run",
        "search for a better recipe, by the validation NDCG@10 of many trainings",
        "--search model.dropout=0.1..0.5 --search train.learning_rate=log:0.0005..0.01 --trials 30",
        "--search 'model.history=lstm|transformer|hstu' --parallel 4 --data data/shop",
        "--resume recloop-home/runs/tune-20260101-120000-000000",
    )
    _add_data_flag(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    search = "a key to vary: LOW..HIGH, log:LOW..HIGH or A|B; may be repeated"
    what.add_argument("--search", metavar="SECTION.KEY=RANGE", action="append", help=search)
    what.add_argument("--resume", metavar="DIR", help="go on with a search that was stopped")
    parser.add_argument("--trials", metavar="N", type=_positive, default=20, help="default: %(default)s")
    parallel = "trials at once, each on train.workers workers; default: %(default)s"
    parser.add_argument("--parallel", metavar="N", type=_positive, default=1, help=parallel)
    return parser


def _evaluate(commands: Commands) -> _Parser:
    summary = "score published versions on a dataset's last part by time, the first against the others"
    examples = ("", "1", "1 3 --segments user.gender item.categories", "1 3 --page scores.html")
    parser = _command(commands, "evaluate", "training.evaluation.command:run", summary, *examples)
    parser.add_argument("versions", nargs="*", metavar="V", help="such as 1; default: the trained version that serves")
    _add_data_flag(parser)
    help_ = "also score the users or items of each value of these, such as user.age or item.domain"
    parser.add_argument("--segments", nargs="+", default=[], metavar="ATTRIBUTE", help=help_)
    parser.add_argument("--page", metavar="FILE", help="default: reports/evaluation.html in the home folder")
    return parser


def _publish(commands: Commands) -> _Parser:
    summary = "publish a training run as the next version"
    parser = _command(commands, "publish", "training.publish:run", summary, "", "--run runs/000003")
    parser.add_argument("--run", metavar="DIR", help="default: the newest run in the home folder")
    help_ = "serve it to a share of users first; it is promoted once it has shown to be no worse"
    parser.add_argument("--canary", action="store_true", help=help_)
    return parser


def _serve(commands: Commands) -> _Parser:
    summary = "serve the promoted version over HTTP until Ctrl-C, learning from feedback"
    parser = _command(
        commands, "serve", "serving.command:run", summary, "", "--port 9000", "--data data/shop", "--local"
    )
    _add_address_flags(parser)
    parser.add_argument("--local", action="store_true", help="without Ray: one process answers, one learns")
    parser.add_argument("--data", metavar="DIR", help="also know what users did in this dataset after training's share")
    parser.add_argument(
        "--without-keys", action="store_true", help="answer anyone, be it on an address that others reach"
    )
    tls = "answer HTTPS with this certificate, in PEM with the chain; one that is replaced is taken up"
    parser.add_argument("--tls-certificate", metavar="FILE", help=tls)
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's private key, in PEM")
    for flag in ("--behind-standby", "--keys-required"):  # how it starts itself
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--public-url", help=argparse.SUPPRESS)
    return parser


def _replay(commands: Commands) -> _Parser:
    summary = "send a dataset's last part by time to a server as live traffic"
    parser = _command(commands, "replay", "training.evaluation.report:run", summary, "", "--url http://127.0.0.1:9000")
    parser.add_argument("--url", default=f"http://{DEFAULT_HOST}:{DEFAULT_PORT}", help="default: %(default)s")
    _add_data_flag(parser)
    _add_events_limit(parser)
    parser.set_defaults(result_is_json=True)
    return parser


def _demo(commands: Commands) -> _Parser:
    summary = "run the whole loop: prepare, train, publish, serve, replay, report"
    parser = _command(commands, "demo", "cluster.commands.demo:run", summary, "", "--stay", "--events 500 --workers 1")
    _add_workers_flag(parser)
    _add_address_flags(parser)
    _add_events_limit(parser)
    parser.add_argument("--stay", action="store_true", help="leave the server up afterwards, until Ctrl-C")
    parser.set_defaults(result_is_json=True)
    return parser


def _versions(commands: Commands) -> _Parser:
    summary = "list versions, show one, compare two, promote one, try one on some users, or roll back to the one before"
    examples = ("", "show 1.37", "diff 1.0 1.37", "promote 1.37 --reason 'better'", "rollback")
    examples += ("canary 2 --share 0.1", "canary", "canary --stop")
    examples += ("rollback --without-seqs 1200..1450", "rollback --without-user u7 --reason 'a bot'")
    parser = _command(commands, "versions", "cluster.commands.versions:run", summary, *examples)
    actions = ["list", "show", "diff", "promote", "canary", "rollback"]
    parser.add_argument("action", nargs="?", choices=actions, default="list")
    parser.add_argument("version", nargs="?", metavar="V", help="such as 1 or 1.37")
    parser.add_argument("other", nargs="?", metavar="W", help="diff: to which version; default: the promoted one")
    parser.add_argument("--share", type=float, help="canary: of users that get it; default: canary.share of the recipe")
    parser.add_argument("--stop", action="store_true", help="canary: end the trial without promoting")
    parser.add_argument("--reason", default="", help="kept in the registry's history")
    undo = parser.add_argument_group("rollback: undo some learning by replaying the log without it; may be repeated")
    undo.add_argument(
        "--without-seqs", metavar="FIRST..LAST", type=_seq_range, action="append", default=[], help="events by number"
    )
    undo.add_argument(
        "--without-user", metavar="ID", dest="without_users", action="append", default=[], help="a user's events"
    )
    return parser


def _events(commands: Commands) -> _Parser:
    summary = "show, verify, repair, seal, export or replay the event log; see and release what is in quarantine"
    parser = _command(
        commands,
        "events",
        "cluster.commands.events:run",
        summary,
        "",
        "tail --last 50 --follow",
        "verify --repair",
        "seal --set log.seal_after_events=100000 --set log.keep_days=90",
        "export --to data/live --from 1 --until 50000",
        "replay --from 1 --to other-home",
        "join --to joined.parquet",
        "quarantine --user u7 --release",
    )
    actions = ["tail", "verify", "seal", "export", "replay", "join", "quarantine"]
    parser.add_argument("action", nargs="?", choices=actions, default="tail")
    parser.add_argument("--last", metavar="N", type=_positive, default=10, help="how many; default: %(default)s")
    parser.add_argument("--repair", action="store_true", help="verify: save what can be read of a damaged log")
    parser.add_argument(
        "--to", metavar="DIR", help="export: the dataset's folder; replay: the home that takes the events; join: a file"
    )
    first = "export, replay: the first sequence number; default: %(default)s"
    parser.add_argument("--from", metavar="SEQ", dest="first_seq", type=_positive, default=1, help=first)
    last = "export, replay: the last one; default: the newest"
    parser.add_argument("--until", metavar="SEQ", dest="last_seq", type=_positive, help=last)
    parser.add_argument("--follow", action="store_true", help="go on with new ones until Ctrl-C")
    parser.add_argument("--user", metavar="ID", help="quarantine: of this user alone")
    parser.add_argument("--item", metavar="ID", help="quarantine: with this item alone")
    fate = parser.add_mutually_exclusive_group()
    fate.add_argument("--release", action="store_true", help="quarantine: let what is held be learned")
    fate.add_argument("--drop", action="store_true", help="quarantine: never let it be learned")
    return parser


def _ask(commands: Commands) -> _Parser:
    summary = "ask a running server what it would recommend to a user"
    examples = ("u1", "a-stranger --interests 'slow-burn Nordic crime, no gore' --k 5")
    parser = _command(commands, "ask", "cluster.commands.ask:run", summary, *examples)
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--interests", metavar="TEXT", help="what the user says they like, in plain words")
    parser.add_argument("--k", metavar="N", type=_positive, default=10, help="how many; default: %(default)s")
    parser.add_argument("--category", metavar="NAME", action="append", help="only items of it; may be repeated: of any")
    parser.add_argument("--domain", metavar="NAME", help="only items of it")
    parser.add_argument("--arm", help="default: the first of the server's")
    parser.add_argument("--url", default=f"http://{DEFAULT_HOST}:{DEFAULT_PORT}", help="default: %(default)s")
    parser.add_argument("--key", help="an API key; default: $RECLOOP_API_KEY, which no list of processes shows")
    parser.add_argument("--ca", metavar="FILE", help="certificates to trust of an https server, in PEM")
    return parser


def _keys(commands: Commands) -> _Parser:
    summary = "make, list and revoke API keys; once there is one, a server answers nobody without"
    examples = ("add shop --role write", "add dashboard --role read --rate 50", "list", "revoke 3f2a9c01d4e7")
    parser = _command(commands, "keys", "cluster.commands.keys:run", summary, *examples)
    parser.add_argument("action", choices=["add", "list", "revoke"])
    parser.add_argument("name", nargs="?", metavar="NAME|ID", help="add: whose it is; revoke: the key's id")
    role = "read: recommendations and vectors; write: feedback and items too; admin: all; default: %(default)s"
    parser.add_argument("--role", choices=ROLES, default="read", help=role)
    parser.add_argument("--rate", metavar="N", type=float, help="requests a second; default: serve.key_rate_per_s")
    return parser


def _status(commands: Commands) -> _Parser:
    summary = "show what is published, logged and learned, and whether a server answers"
    parser = _command(commands, "status", "cluster.commands.status:run", summary, "", "--url http://127.0.0.1:9000")
    parser.add_argument("--url", default=f"http://{DEFAULT_HOST}:{DEFAULT_PORT}", help="default: %(default)s")
    return parser


def _add_data_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", help="a prepared dataset; default: datasets/movielens in the home folder"
    )


def _add_workers_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", metavar="N", type=_positive, help="default: the recipe's train.workers")


def _add_address_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default=DEFAULT_HOST, help="default: %(default)s")
    parser.add_argument("--port", type=_positive, default=DEFAULT_PORT, help="default: %(default)s")


def _add_events_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--events", metavar="N", type=_positive, help="replay only the first N; default: all")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _seq_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("..")
    return _positive(first), _positive(last or first)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _worker_range(text: str) -> tuple[int, int]:
    fewest, dots, most = text.partition("..")
    bounds = _positive(fewest), _positive(most if dots else fewest)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not from few to many; try {most}..{fewest}")
    return bounds


def _mapping(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if wrong := [before for before, equals, after in pairs if not (before.strip() and equals and after.strip())]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not of the form name=column; try user=member,item=sku")
    return {before.strip(): after.strip() for before, _, after in pairs}
