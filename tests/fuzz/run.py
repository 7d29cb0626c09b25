"""`make fuzz`: each target under atheris for a while, guided by what code it reaches; by hypothesis alone, with many examples,
where atheris isn't installed. Exits with 1 if a target fell, and leaves the bytes that did it in `--keep`.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = "20000"
MAX_BYTES = 4096
PATIENCE_S = 30  # for a target's process to end by itself when its time is over


def main() -> int:
    options = _options()
    if options.target is not None:
        _fuzz(options.target, options.seconds, options.keep)
        return 0
    if importlib.util.find_spec("atheris") is None:
        sys.stdout.write("atheris is not installed: hypothesis alone\n")
        command = [sys.executable, "-m", "pytest", "-q", "tests/fuzz"]
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, "MESHPROXY_EXAMPLES": EXAMPLES}, check=False
        ).returncode
    return max(_process(name, options.seconds, options.keep) for name in _names())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="for each target")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"), help="where corpora and crashing inputs are kept")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    return parser.parse_args()


def _names() -> list[str]:
    sys.path.insert(0, str(ROOT))
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def _process(name: str, seconds: int, keep: Path) -> int:
    """Fuzz one target in a process of its own: libFuzzer ends the process it runs in."""
    sys.stdout.write(f"== {name}: {seconds} s\n")
    sys.stdout.flush()
    command = [sys.executable, __file__, "--target", name, "--seconds", str(seconds), "--keep", str(keep.resolve())]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=seconds + PATIENCE_S, check=False
    )
    return int(done.returncode != 0)


def _fuzz(name: str, seconds: int, keep: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["meshproxy"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = keep / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    dictionary = keep / f"{name}.words"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words if len(word) <= 64))
    flags = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-dict={dictionary}", f"-artifact_prefix={keep}/"]
    atheris.Setup([name, *flags, "-print_final_stats=1", "-verbosity=0", str(corpus)], target.check)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.exit(main())
