"""One file per carrier protocol; the module name is the registry. See providers/README.md for how to add one."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import cast

from gateway.provider import Provider


def names() -> list[str]:
    """Every kind in this package, sorted. Underscored modules are shared parts, not providers."""
    return sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))


def load(kind: str) -> type[Provider]:
    """The provider class of `kind`: a name of `names()`, or a dotted module path for a provider outside this tree.

    Raises LookupError with the known names.
    """
    if "." not in kind and kind not in names():
        raise LookupError(f"unknown provider kind {kind!r}; known: {', '.join(names())}")
    try:
        module = import_module(kind if "." in kind else f"{__name__}.{kind}")
    except ModuleNotFoundError as error:
        raise LookupError(f"provider module {kind!r} can't be imported: {error}") from error
    return cast("type[Provider]", module.Provider)
