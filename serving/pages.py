"""The dashboard's files: a page at `/` that asks the API for all it shows.

In:  requests for the page.  Out: its files, which hold no data and need no key; what it asks for does.
Knows nothing of what the page shows. Nothing is loaded from elsewhere, and the page may not even try.
"""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = "/dashboard/"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
FILES = ("index.html", "style.css", "page.js", "charts.js", "icon.svg")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def build_pages() -> list[Route]:
    """Return the routes of the page and of what belongs to it."""
    found = files("serving").joinpath("dashboard")
    contents = {name: found.joinpath(name).read_bytes() for name in FILES}

    def route(path: str, name: str) -> Route:
        kind = TYPES[name.rpartition(".")[2]]

        async def show(request: Request) -> Response:
            return Response(contents[name], media_type=kind, headers=HEADERS)

        return Route(path, show, include_in_schema=False)

    return [route("/", "index.html"), *(route(FOLDER + name, name) for name in FILES[1:])]
