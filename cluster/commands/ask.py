"""`recloop ask`: what a running server would recommend to a user.

In:  a server's address, a user, perhaps interests in plain words.  Out: the slate, with texts.
Knows nothing of models.
"""

import argparse

from cluster.client import Client
from cluster.output import Result


def run(args: argparse.Namespace) -> Result:
    """Ask once."""
    fields = {"k": args.k, "with_text": True, "interests": args.interests, "arm": args.arm}
    fields |= {"categories": args.category, "domain": args.domain}
    with Client(args.url, args.key, ca_file=args.ca) as client:
        answer = client.recommend(args.user, **{name: value for name, value in fields.items() if value is not None})
    shown = ("version", "arm", "cold_start", "used", "interests", "encoder", "fallback")
    slate = [{name: item[name] for name in ("item_id", "score", "text") if name in item} for item in answer["items"]]
    return {**{name: answer[name] for name in shown if name in answer}, "items": slate}
