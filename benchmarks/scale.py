"""What a step takes at 7 B and 70 B, counted: operations, memory and bytes moved of each process.

    python benchmarks/scale.py

Sizes are those of Llama 2; students have half of the linears' parameters and a dense vocabulary. Nothing is run: the
table in docs/explanation/scale.md is made of these formulas.
"""

from dataclasses import dataclass

FLOAT32, BFLOAT16 = 4, 2
KEPT = 0.5
ROWS_TOKENS = 8 * 2048
"""Tokens of a process in a step: rows of 2048."""
WIDTH = 2048


@dataclass(frozen=True)
class Size:
    """A Llama."""

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int
    """Features of keys, and of values."""
    vocabulary: int = 32000

    @property
    def layer(self) -> int:
        """Parameters of a layer's linears."""
        return self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.inner)

    @property
    def head(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def teacher(self) -> int:
        """Parameters."""
        return self.layers * self.layer + 2 * self.head

    @property
    def student(self) -> int:
        """Parameters."""
        return int(self.layers * self.layer * KEPT) + 2 * self.head

    @property
    def operations(self) -> float:
        """Of a token: the teacher's forward, the student's forward and backward; embeddings look up."""
        attention = 4 * self.layers * WIDTH / 2 * self.hidden  # causal: half of the pairs; scores and values
        return 2 * (self.teacher - self.head) + 6 * (self.student - self.head) + attention * (1 + 3)

    @property
    def kept(self) -> int:
        """Bytes of a token that plan `full` keeps for the backward, of products in bfloat16.

        A difference of each tapped tensor (q, k, v, up, down, hidden), and gradients of attention's queries and keys.
        """
        return BFLOAT16 * self.layers * (2 * self.hidden + 2 * self.keys + self.inner + 2 * self.hidden + self.keys)


SIZES = (
    Size("7 B", 32, 4096, 11008, 4096),
    Size("70 B", 80, 8192, 28672, 1024),
)


def memory(size: Size, processes: int, *, sharded: bool, teacher_sharded: bool) -> float:
    """Bytes of a process without activations: float32 weights, gradients and two moments; a teacher in bfloat16."""
    share = processes if sharded else 1
    student = 4 * FLOAT32 * size.student / share
    gathered = FLOAT32 * (size.layer * KEPT * 2 + size.head) if sharded else 0.0  # this layer, the next, the head
    teacher = BFLOAT16 * size.teacher / (processes if teacher_sharded else 1)
    gathered += BFLOAT16 * (2 * size.layer + size.head) if teacher_sharded else 0.0
    return student + gathered + teacher


def moved(size: Size, processes: int, *, sharded: bool, teacher_sharded: bool) -> float:
    """Bytes that a process sends in a step."""
    others = (processes - 1) / processes
    if not sharded:
        return 2 * others * FLOAT32 * size.student  # an all-reduce of gradients
    gathers = 2 * BFLOAT16 * size.student  # forward and backward, in the dtype of the products
    return others * (gathers + FLOAT32 * size.student + (BFLOAT16 * size.teacher if teacher_sharded else 0))


def main() -> None:
    """Print the table."""
    print(
        "| teacher | GPUs | way | TFLOP a step | GB of each, without activations | GB kept by `full` | GB sent a step |"
    )
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    ways = {
        "DDP": {"sharded": False, "teacher_sharded": False},
        "FSDP2": {"sharded": True, "teacher_sharded": False},
        "FSDP2, teacher sharded": {"sharded": True, "teacher_sharded": True},
    }
    for size in SIZES:
        for processes in (8, 64):
            for name, way in ways.items():
                operations = size.operations * ROWS_TOKENS / 1e12
                held, sent = memory(size, processes, **way) / 1e9, moved(size, processes, **way) / 1e9
                kept = size.kept * ROWS_TOKENS / 1e9
                figures = (f"{operations:,.0f}", f"{held:,.0f}", f"{kept:,.0f}", f"{sent:,.0f}")
                print(f"| {size.name} | {processes} | {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
