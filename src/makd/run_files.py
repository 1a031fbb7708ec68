"""What the files are called that a run leaves in its folder for its report, and which form they have. Stands below all.

They are in `report/` beside the student, each a JSON object with `format` and `about`. One that does not apply has
`missing`, which says why, in the place of its content. Who writes them: `makd.run_folder.findings`; who reads them:
`makd.report`, which needs no torch.
"""

FORMAT = 1
"""Of all these files. It goes up when a key changes its meaning or goes; new keys may come."""
FOLDER = "report"
"""In a student's folder."""
PAGE = "report.html"
"""What `makd report` writes beside the student, unless told otherwise."""
LINEARS, SPECTRA, TRAINING, LAYERS, SAMPLES, WARNINGS = (
    "linears.json",
    "spectra.json",
    "training.json",
    "layers.json",
    "samples.json",
    "warnings.json",
)
ABOUT = {
    LINEARS: "every linear of the student: where it is, its shape and rank, why, predicted and measured error",
    SPECTRA: "singular values that ranks were chosen from, in the solver's own norm, thinned",
    TRAINING: "every logged step of each training: the loss, and the loss of each aspect",
    LAYERS: "how far each layer's hidden states and attention are from the teacher's, on held-out text",
    SAMPLES: "held-out texts, with what teacher and student make of them: this file holds text of the data",
    WARNINGS: "what was logged as a warning while the run worked",
}
"""File -> what is in it."""
