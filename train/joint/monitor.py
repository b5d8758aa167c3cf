"""Audio cannot fail silently: what the numbers of a run say when a modality or a branch stops
learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PATIENCE = 3  # log windows in a row: one window without a task is chance


class LearningMonitor:
    """Reads each log line and warns once per trouble, again only after it went away.

    Args:
        modalities: those that are trained. branches: those with trainable weights; both are
            expected to learn.
        without_adapter: modalities that are trained by a LoRA that has no layer of their own.
    """

    def __init__(
        self,
        modalities: Iterable[str],
        branches: Iterable[str],
        without_adapter: Iterable[str] = (),
    ) -> None:
        self.modalities = tuple(modalities)
        self.branches = tuple(branches)
        self._without_adapter = list(without_adapter)
        self._norms: dict[str, float] = {}
        self._usual: dict[str, float] = {}
        self._bad: dict[str, int] = {}

    def read(self, values: Mapping[str, float]) -> list[str]:
        """Warnings for one log line; empty if all is well."""
        said = []
        while self._without_adapter:
            m = self._without_adapter.pop(0)
            said.append(
                f"the adapter has no layer of the {m} stream, which the loss trains too: it will "
                f"hardly learn; add a target for it, or leave {m} out of modalities"
            )
        for m in self.modalities:
            key = f"update_norm/{m}"
            norm = values.get(key)
            still = norm is not None and norm == self._norms.get(key, 0.0)
            if self._lasting(f"still {m}", still):
                said.append(
                    f"the adapters of the {m} stream do not move: check learning rates, "
                    f"lora_targets, and that the tasks generate {m}"
                )
            if norm is not None:
                self._norms[key] = norm
            share = values.get(f"supervised/{m}", 0.0)
            usual = self._usual.setdefault(m, share)
            if self._lasting(f"share {m}", share < 0.5 * usual or share == 0):
                said.append(
                    f"{m} supervision fell to {share:.0%} of the tokens (it was {usual:.0%}): "
                    "check that clips "
                    f"still come with {m} and that the task mix generates it"
                )
            else:
                self._usual[m] = 0.9 * usual + 0.1 * share
        for b in self.branches:
            if self._lasting(f"gradient {b}", not values.get(f"grad_norm/{b}", 0.0) > 0):
                said.append(
                    f"the {b} branch gets no gradient: it is trainable, but nothing in the loss "
                    "reaches it"
                )
            key = f"adapter_norm/{b}"
            if key in values and self._lasting(key, values[key] == 0):
                said.append(f"the adapter of the {b} branch is still zero: it learns nothing")
        return said

    def _lasting(self, name: str, bad: bool) -> bool:
        self._bad[name] = self._bad.get(name, 0) + 1 if bad else 0
        return self._bad[name] == PATIENCE
