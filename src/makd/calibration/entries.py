"""The names of everything that a factorization keeps in its stores, and what of it goes when.

In the store of a walk, which a folder on disk may be (`DiskStore`: a file for each entry):

| entry | what it holds |
| --- | --- |
| `teacher/<layer>/<batch>` | hidden states that enter this layer of the teacher; one above the last: that leave it |
| `gradients/<layer>/<batch>` | of each probe, the gradient at those states |
| `spectra/<linear or group>` | its spectrum, with a note where the solver fell back |
| `factors/<linear or group>` | its factors, of the largest rank that it may get |
| `gram/<linear>` | second moments of the gradients at its output: half of a matrix |
| `student/<layer>/<batch>` | hidden states that enter this layer of the student |
| `made/<layer>` | notes alone: errors of its linears, and what teaching it did |
| `learned/<layer>` | parameters of this layer of the student |
| `done/<entry>` | a mark: that entry, or all that lies below it, is whole |

Marks that no entry belongs to: `cut/<layer>` (decomposed without text), `whole` (the walk ends where the model does),
`checked` (the teacher's files are finite).

In the scratch store of a walk, while one layer of the student is made:

| entry | what it holds |
| --- | --- |
| `targets/<batch>` | what the teacher's linears give, or what they read |
| `known/<batch>/<linear>` | outputs of the student's linears that are made, of the group that begins with this one |
| `sum/<batch>` | what the layer's last linear reads, and what its output is added to |
"""

from typing import NewType

Entry = NewType("Entry", str)
"""Name of an entry, or of a folder of entries. Only this module makes them: a misspelt one would be made anew, or stay
on disk for ever."""

MODEL_CHECKED = Entry("whole")
FILES_CHECKED = Entry("checked")
TARGETS = Entry("targets")

OF_WALK = (Entry("teacher"), Entry("done"), Entry("spectra"), Entry("factors"))
"""What a walk leaves that turned out to be impossible."""
OF_STUDENT = (Entry("student"), Entry("done/student"), Entry("made"), Entry("learned"))
"""What belongs to one student, and not to another of the same calibration."""
OF_UNFINISHED = (Entry("teacher"), Entry("gradients"), Entry("gram"), Entry("student"))
"""What only students need that are not finished; without it a finished one can still be put together again."""
OF_STUDENT_LAYER = (Entry("known"), Entry("sum"))
"""What is in the scratch store of a layer of the student while it is made, and holds no longer when it is changed."""


def of_batch(layer: Entry, batch: int) -> Entry:
    """The entry of a batch, in the folder of a layer."""
    return Entry(f"{layer}/{batch:05}")


def mark_of(entry: Entry) -> Entry:
    """The mark that says that an entry is whole."""
    return Entry(f"done/{entry}")


def teacher_states(layer: int) -> Entry:
    """Hidden states that enter a layer of the teacher: a folder, with an entry `of_batch` each."""
    return Entry(f"teacher/{layer:04}")


def gradients(layer: int) -> Entry:
    """Gradients at the states that enter a layer of the teacher: a folder, with an entry `of_batch` each."""
    return Entry(f"gradients/{layer:04}")


def spectrum(name: str) -> Entry:
    """The spectrum of a linear, stack of experts or group."""
    return Entry(f"spectra/{name}")


def factors(name: str) -> Entry:
    """The factors of a linear, stack of experts or group."""
    return Entry(f"factors/{name}")


def output_gram(linear: str) -> Entry:
    """Second moments of the gradients at the output of a linear."""
    return Entry(f"gram/{linear}")


def decomposed(layer: int) -> Entry:
    """Marked when the linears of a layer were decomposed without text."""
    return Entry(f"cut/{layer:04}")


def student_states(layer: int) -> Entry:
    """Hidden states that enter a layer of the student: a folder, with an entry `of_batch` each."""
    return Entry(f"student/{layer:04}")


def layer_report(layer: int) -> Entry:
    """What is known of a layer of the student when it is made."""
    return Entry(f"made/{layer:04}")


def layer_parameters(layer: int) -> Entry:
    """Parameters of a layer of the student."""
    return Entry(f"learned/{layer:04}")


def targets(batch: int) -> Entry:
    """What the linears of the layer at hand are to give; in the scratch store."""
    return of_batch(TARGETS, batch)


def known_outputs(batch: int, linear: str) -> Entry:
    """What the linears give that are made together with `linear`, the first of them; in the scratch store."""
    return Entry(f"known/{batch:05}/{linear}")


def last_sum(batch: int) -> Entry:
    """What the last linear of the layer at hand reads, and what its output is added to; in the scratch store."""
    return Entry(f"sum/{batch:05}")
