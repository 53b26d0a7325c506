"""The server's side: take activations, recover, train three streams, fuse their decisions, send gradients back.

The stations in the order in which data passes them: ``inbox``, ``schedule``, ``recovery``, ``streams``, ``fusion``,
``trainer``, ``replies``; ``service`` composes them, ``assembly`` builds a trainer from a bundle. Import them from their
modules: this package itself stays light, so that importing one station does not load torch for another.
"""

from __future__ import annotations

__all__: list[str] = []
