#!/usr/bin/env python3
"""Make a Python with the libraries that benches/vs_peers compares with. Usage: make_python.py DIR

A virtual environment in DIR, with what requirements.txt beside this file pins; torch for the CPU alone if the index of
PyTorch is within reach, and otherwise the one of PyPI, which brings some gigabytes of CUDA libraries along. The last
thing written is DIR/READY, so a folder without it is made again.
"""
import shutil
import subprocess
import sys
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
    pip = [target / "bin" / "python", "-m", "pip", "install", "--quiet", "--retries", "1"]
    subprocess.run([*pip, "--extra-index-url", CPU_INDEX, "-r", HERE / "requirements.txt"], check=True)
    (target / "READY").touch()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
