from typing import Any

if __name__ != "pjengine.models":
    raise ImportError("import pjengine.models, not models: a second copy of every class would be loaded")

__all__ = ["register"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pjengine.models' has no attribute {name!r}")
    from pjengine.models import registry

    return getattr(registry, name)
