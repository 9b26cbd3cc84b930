"""The PTX of `peer_sum`, interpreted: threads of several GPUs over one address space, in a random order.

An unknown instruction, an access that is misaligned or outside of an allocation, and a read of what nobody
wrote raise. Memory is no stronger than the kernel may rely on:

- A store is seen by others some time later, in no order with the thread's others, and 16 bytes as 8 and 8. It
  is seen before what follows a release of its thread or, behind a barrier, of its block.
- What a block shares (`Shared`) may be read from the barrier on that follows the store, and stored anew from
  the barrier on that follows the reads.
- A load may give what was there before, back to what the thread knows of: what it saw there, what was there
  when its kernel started, and what came before a store that its block has acquired. A load that is not
  volatile, relaxed or acquire must have no choice.

A GPU starts a kernel when all blocks of its last one have ended, wherever the other GPUs are. Blocks start in
their order, some when others have ended. Between two accesses a thread touches only its own registers, so
that all orders of instructions are orders of accesses.
"""

import random
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests.kernels.ptx_steps import Step

REGION = 1 << 36  # from the start of one allocation to that of the next


class Trap(Exception):
    """A kernel has given up."""


class Deadlock(Exception):
    """Every thread waits."""


class Memory:
    """Every value that was ever there: for each 8 bytes the times of the stores, and the two words then."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.time = 0
        self.regions: list[tuple[int, int | None]] = []  # bytes, and the word that they are full of at first
        self.histories: dict[int, list[tuple[int, list[int | None]]]] = {}
        self.watchers: dict[int, list[Thread]] = defaultdict(list)

    def allocate(self, num_bytes: int, word: int | None = None) -> int:
        self.regions.append((num_bytes, word))
        return len(self.regions) * REGION

    def history(self, address: int) -> list[tuple[int, list[int | None]]]:
        at = address & ~7
        if at not in self.histories:
            self.histories[at] = [(0, [self.regions[at // REGION - 1][1]] * 2)]
        return self.histories[at]

    def write(self, address: int, array: np.ndarray) -> None:
        for i, word in enumerate(array.view(np.uint32).ravel().tolist()):
            self.put(address + 4 * i, [word])

    def read(self, address: int, num_bytes: int) -> np.ndarray:
        words = [self.history(at)[-1][1][at >> 2 & 1] for at in range(address, address + num_bytes, 4)]
        assert None not in words, "read before it was written"
        return np.array(words, np.uint32)

    def check(self, address: int, num_words: int) -> None:
        region, offset = divmod(address, REGION)
        if not 0 < region <= len(self.regions) or offset + 4 * num_words > self.regions[region - 1][0]:
            raise IndexError(f"{num_words} words at {offset} of allocation {region}: outside")
        if address % (4 * num_words):
            raise IndexError(f"{num_words} words at {offset} of allocation {region}: misaligned")

    def load(self, thread: "Thread", address: int, num_words: int, order: str | None) -> list[int]:
        self.check(address, num_words)
        found: list[int | None] = []
        for at in range(address & ~7, address + 4 * num_words, 8):
            history = self.history(at)
            i, known = len(history) - 1, max(thread.floor, thread.seen.get(at, 0))
            assert order or history[i][0] <= known, "what a plain load gives depends on when it comes"
            while history[i][0] > known and self.rng.random() < 0.5:
                i -= 1
            thread.seen[at], words = history[i]
            thread.looked_at.append(at)
            if order == ".acquire.sys":
                thread.floor = max(thread.floor, thread.seen[at])
            found += words
        first = address >> 2 & 1
        words = found[first : first + num_words]
        assert None not in words, "read before it was written"
        return [word or 0 for word in words]

    def put(self, address: int, words: Sequence[int]) -> None:
        self.time += 1
        history, first = self.history(address), address >> 2 & 1
        whole = list(history[-1][1])
        whole[first : first + len(words)] = words
        history.append((self.time, whole))
        for thread in self.watchers.pop(address & ~7, ()):
            thread.is_asleep = False


class Registers(dict[str, int]):
    def __missing__(self, name: str) -> int:
        """A number stands for itself; what else was not written raises ValueError."""
        self[name] = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return self[name]


class Shared:
    """The memory of a block: each word, who wrote it after how many barriers, and who has read it since."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.words: dict[int, tuple[int, Thread, int]] = {}
        self.readers: dict[int, list[tuple[Thread, int]]] = defaultdict(list)

    def check(self, address: int, num_words: int) -> None:
        if address < 0 or address + 4 * num_words > self.num_bytes or address % (4 * num_words):
            raise IndexError(f"{num_words} words at {address} of {self.num_bytes} bytes of a block")

    def load(self, thread: "Thread", address: int, num_words: int) -> list[int]:
        self.check(address, num_words)
        places = range(address, address + 4 * num_words, 4)
        for place in places:
            assert place in self.words, "read before it was written"
            _, writer, phase = self.words[place]
            assert writer is thread or phase < thread.phase, (
                "what a load of shared memory gives depends on when"
            )
            self.readers[place].append((thread, thread.phase))
        return [self.words[place][0] for place in places]

    def store(self, thread: "Thread", address: int, words: Sequence[int]) -> None:
        self.check(address, len(words))
        for i, word in enumerate(words):
            place = address + 4 * i
            before = self.readers.pop(place, []) + [seen[1:] for seen in [self.words.get(place)] if seen]
            assert all(who is thread or phase < thread.phase for who, phase in before), (
                "what is in shared memory depends on when a store comes"
            )
            self.words[place] = word, thread, thread.phase


class Store(NamedTuple):
    phase: int
    address: int
    words: Sequence[int]


@dataclass(eq=False)
class Thread:
    block: "Block"
    registers: Registers
    floor: int  # a time: nothing older is seen
    place: int = 0
    phase: int = 0  # how many barriers it has passed
    meets_at: int | None = None
    is_asleep: bool = False
    stores: list[Store] = field(default_factory=list)  # that others do not see yet
    seen: dict[int, int] = field(default_factory=dict)  # the times of what it saw
    looked_at: list[int] = field(default_factory=list)  # since it last went back,
    before: dict[str, int] = field(default_factory=dict)  # with these registers

    def turn(self) -> bool:
        """Shows a store, or goes on up to the next access. False: there is nothing to do."""
        rng, steps, kind = self.block.memory.rng, self.block.steps, ""
        if self.stores and rng.random() < self.block.haste:
            self.publish(rng.choice(self.stores))
            return True
        if self.is_asleep or self.meets_at is not None or self.place == len(steps):
            return bool(self.stores)
        while kind in ("", "value", "split", "bra") and self.place < len(steps):
            step = steps[self.place]
            self.place, kind = self.place + 1, step.kind
            if self.registers[step.predicate]:
                self.execute(step)
        return True

    def execute(self, step: Step) -> None:
        threads, registers = self.block.threads, self.registers
        values = [registers[each] for each in step.sources]
        match step.kind:
            case "value":
                registers[step.to[0]] = step.value(*values)
            case "split":
                registers |= zip(step.to, (values[0] & 0xFFFF, values[0] >> 16), strict=True)
            case "bra" | "bra back":
                self.place = step.number
                if step.kind == "bra back":
                    self.rest()
            case "ld" | "ld64":
                num_words = 2 if step.kind == "ld64" else len(step.to)
                words = self.block.memory.load(self, values[0] + step.number, num_words, step.order)
                if step.kind == "ld64":
                    words = [words[0] | words[1] << 32]
                registers |= zip(step.to, words, strict=True)
            case "st":
                if step.order == ".release.sys":
                    self.fence()
                self.store(values[0] + step.number, values[1:])
            case "ld shared":
                address = values[0] + step.number
                words = self.block.shared.load(self, address, len(step.to))
                registers |= zip(step.to, words, strict=True)
            case "st shared":
                self.block.shared.store(self, values[0] + step.number, values[1:])
            case "trap":
                raise Trap
            case "bar" if self.is_last_of(threads):
                floor = max(each.floor for each in threads)
                for each in threads:
                    each.floor, each.phase = floor, each.phase + 1
            case "shfl" if self.is_last_of(lanes := threads[registers["%tid.x"] & ~31 :][:32]):
                values = [lane.registers[step.sources[0]] for lane in lanes]
                for number, lane in enumerate(lanes):
                    lane.registers[step.to[0]] = values[number ^ step.number]

    def store(self, address: int, words: Sequence[int]) -> None:
        self.block.memory.check(address, len(words))
        for i in range(0, len(words), 2):
            for earlier in [each for each in self.stores if each.address == address + 4 * i]:
                self.publish(earlier)
            self.stores.append(Store(self.phase, address + 4 * i, words[i : i + 2]))

    def publish(self, store: Store) -> None:
        self.stores.remove(store)
        self.block.memory.put(store.address, store.words)

    def fence(self) -> None:
        for each in self.block.threads:
            for store in [store for store in each.stores if each is self or store.phase < self.phase]:
                each.publish(store)

    def is_last_of(self, threads: Sequence["Thread"]) -> bool:
        """Waits here for the others; the last one frees all."""
        self.meets_at = self.place
        are_here = all(each.meets_at == self.place for each in threads)
        for each in threads if are_here else ():
            each.meets_at = None
        return are_here

    def rest(self) -> None:
        """Sleeps if another round would change nothing but the count of rounds (`polls`), until something is
        stored where it looked.
        """
        memory = self.block.memory
        is_new = any(memory.history(at)[-1][0] > self.seen[at] for at in self.looked_at)
        registers = {name: bits for name, bits in self.registers.items() if name != "polls"}
        if registers == self.before and not is_new:
            self.is_asleep = True
            for at in self.looked_at:
                memory.watchers[at].append(self)
        self.before = registers
        self.looked_at.clear()


class Launch(NamedTuple):
    steps: Sequence[Step]
    num_blocks: int
    num_threads: int
    operands: Sequence[int]
    shared_bytes: int = 0  # of each block


class Block:
    def __init__(self, memory: Memory, launch: Launch, number: int) -> None:
        self.memory, self.steps, self.pace, self.haste = memory, launch.steps, 1.0, 1.0
        given = {f"${i}": each for i, each in enumerate(launch.operands)} | {"%ctaid.x": number}
        self.shared, threads = Shared(launch.shared_bytes), range(launch.num_threads)
        self.threads = [Thread(self, Registers(given, **{"%tid.x": each}), memory.time) for each in threads]
        self.awake = self.threads

    def has_ended(self) -> bool:
        return all(each.place == len(self.steps) and each.meets_at is None for each in self.threads)


class Gpu:
    def __init__(self, launches: Sequence[Launch]) -> None:
        self.launches, self.max_running = deque(launches), 0
        self.blocks: deque[Block] = deque()
        self.running: list[Block] = []

    def start(self, memory: Memory) -> None:
        if not self.blocks and not self.running and self.launches:
            launch = self.launches.popleft()
            self.blocks.extend(Block(memory, launch, number) for number in range(launch.num_blocks))
            self.max_running = memory.rng.randint(1, launch.num_blocks)
        while self.blocks and len(self.running) < self.max_running:
            self.running.append(self.blocks.popleft())

    def end(self) -> None:
        for block in [each for each in self.running if each.has_ended()]:
            for thread in block.threads:
                thread.fence()
            self.running.remove(block)


def run(memory: Memory, launches: Sequence[Sequence[Launch]]) -> None:
    """Runs what each GPU is given, one kernel after the other."""
    rng, gpus = memory.rng, [Gpu(each) for each in launches]
    while True:
        for gpu in gpus:
            gpu.end()
            gpu.start(memory)
        live = [block for gpu in gpus for block in gpu.running]
        if not live:
            return
        for block in (
            live if rng.random() < 0.1 else ()
        ):  # Some run ahead, some fall behind, and so do stores.
            block.pace, block.haste = 2 ** rng.uniform(0, 10), rng.choice((0.02, 0.3, 1.0))
            block.awake = rng.sample(block.threads, rng.randint(1, len(block.threads)))
        [block] = rng.choices(live, [each.pace for each in live])
        has_moved = any([rng.choice(block.awake).turn() for _ in range(4 * len(block.awake))])
        if not has_moved and not any([thread.turn() for each in live for thread in each.threads]):
            raise Deadlock(f"{len(live)} blocks wait")
