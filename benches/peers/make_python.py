#!/usr/bin/env python3
"""Make a Python with the libraries that benches/vs_peers compares with. Usage: make_python.py DIR

A virtual environment in DIR, with what requirements.txt beside this file pins; torch for the CPU alone if the index of
PyTorch is within reach, and otherwise the one of PyPI, which brings some gigabytes of CUDA libraries along. The last
thing written is DIR/READY, so a folder without it is made again.
"""
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HERE = Path(__file__).resolve().parent


def main(target):
    if (target / "READY").exists():
        return
    if target.exists():
        if not (target / "pyvenv.cfg").exists():
            sys.exit(f"{target} exists and is no virtual environment: name another folder")
        shutil.rmtree(target)
    venv.create(target, with_pip=True)
    pip = [target / "bin" / "python", "-m", "pip", "install", "--quiet"]
    # pip asks an index that it cannot reach again for every package, and warns of each.
    index = ["--extra-index-url", CPU_INDEX] if within_reach(CPU_INDEX) else []
    subprocess.run([*pip, *index, "-r", HERE / "requirements.txt"], check=True)
    (target / "READY").touch()


def within_reach(url):
    try:
        with urllib.request.urlopen(url + "/", timeout=10):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
