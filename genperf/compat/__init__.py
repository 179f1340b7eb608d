"""Drop-ins for classes of other libraries, under their names and with their semantics; none of these libraries is needed."""

from . import diffusers, taming

__all__ = ["diffusers", "taming"]
