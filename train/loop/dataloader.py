"""The data loader: which rows each step sees, on which rank, with which seed; and the position to
save.

The order is a function of (seed, epoch). A step of B rows x W ranks x A micro-batches takes the
same rows whatever the split, so one process with the same global batch sees what two see. A dataset
that augments at random gets the seed of each row, made from (seed, epoch, row), so what it draws
does not depend on workers or on resuming.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item", covariant=True)


class SizedItems(Protocol):
    """A map-style dataset: `len` and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SeededDataset(Dataset[Item]):
    """Items with random augmentation: a function of the item's number and a seed, of nothing else.

    Implement `__len__` and `sample`; the loader calls `sample` with the seed of the row. An index
    alone stands for the item drawn with its own number as the seed.
    """

    def sample(self, index: int, seed: int) -> Item:
        """Item `index`, everything random in it drawn from `seed` (0 to 2**62)."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        return self.sample(index, index)


def hash_seed(*numbers: int) -> int:
    """Hash whole numbers >= 0 to one seed in [0, 2**62)."""
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    return (int(high) << 30) ^ int(low)


def row_generator(seed: int) -> np.random.Generator:
    """numpy's generator of a row, by way of torch's: the draws of rows trained before stay what
    they were.
    """
    drawn = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    return np.random.default_rng(int(drawn))


class _Rows(Dataset[Any]):
    """Map-style view with the keys (index, seed) that the loader hands over."""

    def __init__(self, dataset: SizedItems) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        if isinstance(self.dataset, SeededDataset):
            return self.dataset.sample(index, seed)
        return self.dataset[index]


class SeededLoader:
    """Endless, seeded, resumable source of micro-batches for one rank.

    Args:
        dataset: a `SeededDataset`, or map-style without anything random in its items.
        collate: list of items -> batch. batch_size: rows of one micro-batch on one rank.
        accumulation: micro-batches per step. rank, world_size: this process among how many.
        num_workers: loader processes. groups: a hashable key per item; a micro-batch never mixes
            groups (buckets).

    Raises:
        ValueError: the dataset is smaller than one step.
    """

    def __init__(
        self,
        dataset: SizedItems,
        collate: Callable[[list[Any]], Any] | None,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.num_workers = num_workers
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.step_in_epoch = 0
        if groups is not None and len(groups) != len(dataset):
            raise ValueError(
                f"groups: {len(groups)} keys for {len(dataset)} items; needs one key for each item"
            )
        by_group = self._by_group(groups)
        self.keys = list(by_group)
        self._members = list(by_group.values())
        if self.steps_per_epoch < 1:
            sizes = ", ".join(str(len(m)) for m in self._members[:8])
            raise ValueError(
                f"train_batch_size={batch_size}: a step needs {self.rows_per_step} items that fit, "
                f"the dataset has {sizes}; use a smaller batch, less accumulation or more data"
            )
        self._batches: Iterator[Any] | None = None

    @property
    def rows_per_step(self) -> int:
        """Global batch: rows x ranks x micro-batches."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass; the rows left over differ from epoch to epoch."""
        size = self.batch_size * self.world_size
        return sum(len(m) // size for m in self._members) // self.accumulation

    def unused(self) -> dict[Hashable, int]:
        """Items of each group that is smaller than a micro-batch over all ranks: never seen."""
        size = self.batch_size * self.world_size
        pairs = zip(self.keys, self._members, strict=True)
        return {key: len(members) for key, members in pairs if len(members) < size}

    def next_step(self) -> list[Any]:
        """The micro-batches of the next step on this rank; moves the position on."""
        if self._batches is None:
            self._batches = iter(self._loader())
        micro = [next(self._batches) for _ in range(self.accumulation)]
        self.step_in_epoch += 1
        if self.step_in_epoch == self.steps_per_epoch:
            self.epoch = self.epoch + 1
            self.step_in_epoch = 0
        return micro

    def close(self) -> None:
        """Stop the loader's workers."""
        self._batches = None

    def state_dict(self) -> dict[str, int]:
        """Position, in rows, so that a changed batch size goes on near the same place."""
        return {"epoch": self.epoch, "row": self.step_in_epoch * self.rows_per_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.epoch = state["epoch"]
        self.step_in_epoch = min(state["row"] // self.rows_per_step, self.steps_per_epoch - 1)
        self._batches = None

    def _loader(self) -> DataLoader:
        return DataLoader(
            _Rows(self.dataset),
            batch_sampler=self._keys(self.epoch, self.step_in_epoch),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator().manual_seed(
                self.seed
            ),  # else each start would draw from the global generator
            prefetch_factor=max(2, self.accumulation) if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _keys(self, epoch: int, step: int) -> Iterator[list[tuple[int, int]]]:
        """(index, seed) lists of this rank's micro-batches, from a position on, for ever."""
        while True:
            order = self._order(epoch)
            for chunk in range(step * self.accumulation, self.steps_per_epoch * self.accumulation):
                first = self.rank * self.batch_size
                row = chunk * self.batch_size * self.world_size + first
                indices = order[chunk][first : first + self.batch_size]
                yield [
                    (int(index), hash_seed(self.seed, epoch, row + k))
                    for k, index in enumerate(indices)
                ]
            epoch = epoch + 1
            step = 0

    def _order(self, epoch: int) -> list[np.ndarray]:
        """Global micro-batches of an epoch: items shuffled within each group, then all batches
        shuffled.
        """
        rng = np.random.default_rng([self.seed, epoch])
        size = self.batch_size * self.world_size
        chunks: list[np.ndarray] = []
        for members in self._members:
            shuffled = rng.permutation(members)
            chunks += [shuffled[i : i + size] for i in range(0, len(members) - size + 1, size)]
        if len(self._members) > 1:
            chunks = [chunks[i] for i in rng.permutation(len(chunks))]
        return chunks

    def _by_group(self, groups: Sequence[Hashable] | None) -> dict[Hashable, np.ndarray]:
        if groups is None:
            return {None: np.arange(len(self.dataset))}
        members: dict[Hashable, list[int]] = {}
        for index, key in enumerate(groups):
            members.setdefault(key, []).append(index)
        return {key: np.asarray(indices) for key, indices in members.items()}


def _leave_signals_to_the_parent(worker: int) -> None:
    """A Ctrl-C reaches the whole process group: the parent decides, and ends its workers with
    SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
