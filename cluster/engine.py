"""Open what a recipe's `[engine]` names.

In:  a recipe and a home.  Out: the registry.
Knows nothing of what is kept there.
"""

from cluster.config import EngineConfig, Recipe
from cluster.home import Home
from cluster.registry import Registry


def open_registry(recipe: Recipe, home: Home) -> Registry:
    """Return the registry that the recipe names, or the home folder's."""
    return Registry(recipe.section(EngineConfig).registry_uri or home.registry)
