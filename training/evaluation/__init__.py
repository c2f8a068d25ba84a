"""How good recommendations are: ranking metrics, offline scores, live replays, reports."""
