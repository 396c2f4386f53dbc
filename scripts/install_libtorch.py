#!/usr/bin/env python3
"""Install the libtorch named in libtorch.pins into ROOT/.libtorch. Called by with-libtorch; usage: install_libtorch.py ROOT

The wheels are downloaded by pip, checked against their pinned hashes and unpacked in ROOT/.libtorch.partial, which
becomes ROOT/.libtorch by one rename when everything is on disk. A run that dies leaves only .libtorch.partial behind;
the next one keeps the wheels there that are whole. A lock makes concurrent runs wait.
"""
import collections
import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

PINS = Path(__file__).resolve().with_name("libtorch.pins")
OWN = "or set LIBTORCH to a libtorch {version} of your own (docs/libtorch.md)."

# What a CPU build links and loads, of all that the wheels hold.
LIBRARIES = {
    "linux-x86_64": ["libc10.so", "libtorch_cpu.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"],
    "linux-aarch64": [
        "libc10.so", "libtorch_cpu.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13",
        "libarm_compute.so", "libarm_compute_graph.so", "libgfortran.so.5", "libnvpl_blas_core.so.0",
        "libnvpl_blas_lp64_gomp.so.0", "libnvpl_lapack_core.so.0", "libnvpl_lapack_lp64_gomp.so.0",
    ],
    "macos-arm64": ["libc10.dylib", "libtorch_cpu.dylib", "libtorch.dylib", "libomp.dylib"],
}
UNPACKED_BYTES = 640_000_000

Wheel = collections.namedtuple("Wheel", "name version tag size sha256")


class Failure(Exception):
    """A reason to stop, in words for the user."""


def main(root):
    wheels = pinned_wheels(this_platform())
    version = wheels[0].version
    target, partial = root / ".libtorch", root / ".libtorch.partial"
    with exclusive(root / ".libtorch.lock"):
        if installed(target):
            return  # by the run that held the lock before
        if is_users_own(target, version):
            say(f"using the libtorch {version} found in {target}")
            return
        partial.mkdir(exist_ok=True)
        for leftover in partial.glob("work-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # the pip of a killed run may still be writing there
        (partial / "wheels").mkdir(exist_ok=True)
        missing = [w for w in wheels if not whole(stored(partial, w), w)]
        check_pip()
        check_space(partial, missing)
        say(f"installing libtorch {version} (CPU) into {target}, once")
        for wheel in sorted(missing, key=lambda w: w.size):
            download(wheel, partial)
        unpack(wheels, partial, target)
        shutil.rmtree(partial, ignore_errors=True)
        say("done")


def this_platform():
    system, machine = platform.system(), platform.machine()
    name = {
        ("Linux", "x86_64"): "linux-x86_64",
        ("Linux", "aarch64"): "linux-aarch64",
        ("Darwin", "arm64"): "macos-arm64",
    }.get((system, machine))
    if name is None:
        raise Failure(f"no libtorch is pinned for {system} on {machine}; " + OWN.format(version="2.11"))
    libc, release = platform.libc_ver() if system == "Linux" else ("", "")
    numbers = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    if system == "Linux" and libc == "glibc" and numbers < (2, 28):
        raise Failure(f"libtorch 2.11 needs glibc 2.28 or newer, this system has {release}.")
    return name


def pinned_wheels(platform_name):
    rows = [line.split() for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    return [
        Wheel(*requirement.split("=="), tag, int(size), sha256)
        for name, requirement, tag, size, sha256 in rows
        if name == platform_name
    ]


@contextlib.contextmanager
def exclusive(path):
    """Hold a lock that the system drops when this process ends, however it ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is installing libtorch; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def installed(target):
    marker = target / PINS.name
    return marker.is_file() and marker.read_bytes() == PINS.read_bytes()


def is_users_own(target, version):
    """A folder without our marker was put there by hand: use it if it fits, never delete it."""
    if not target.exists() and not target.is_symlink():
        return False
    if (target / PINS.name).is_file():
        return False  # ours, of other pins: replaced
    found = header_version(target)
    if found == version:
        return True
    raise Failure(
        f"{target} exists, was not made by this script, and its headers say "
        f"{'version ' + found if found else 'nothing of a version'}; libtorch {version} is needed. Move it away and run this again."
    )


def header_version(folder):
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        return None
    parts = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
    return ".".join(parts.get(key, "?") for key in ("MAJOR", "MINOR", "PATCH"))


def check_pip():
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if probe.returncode != 0:
        raise Failure(
            f"this python3 ({sys.executable}) has no pip; it is needed once, to download libtorch. Install it and run this again:\n"
            "  Debian, Ubuntu: apt install python3-pip    Fedora: dnf install python3-pip    elsewhere: python3 -m ensurepip"
        )


def check_space(folder, missing):
    # pip writes a wheel twice (a temporary file and the result); the largest counts, as they are fetched one by one.
    fetch = sum(w.size for w in missing) + max((w.size for w in missing), default=0)
    unpack_peak = sum(w.size for w in missing) + UNPACKED_BYTES
    need, free = max(fetch, unpack_peak), shutil.disk_usage(folder).free
    if free < need:
        raise Failure(f"disk full: {megabytes(need)} are needed in {folder}, {megabytes(free)} are free. Make room and run this again.")


def stored(partial, wheel):
    return partial / "wheels" / f"{wheel.name}-{wheel.version}.whl"


def whole(path, wheel):
    if not path.is_file() or path.stat().st_size != wheel.size:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest() == wheel.sha256


def download(wheel, partial):
    say(f"downloading {wheel.name} {wheel.version} ({megabytes(wheel.size)})")
    # A folder of its own for each attempt: a pip left over from a killed run cannot write into ours.
    work = Path(tempfile.mkdtemp(prefix="work-", dir=partial))
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    # The tags are spelled out so that the choice does not depend on the python that runs pip.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation", "cp", "--abi", "cp311"]
    command += ["--python-version", "3.11", "--platform", wheel.tag, "--dest", str(work), "-r", str(requirements)]
    code, errors = run_with_progress(command, work, wheel)
    files = list(work.glob("*.whl"))
    if code != 0 or len(files) != 1:
        raise Failure(explain(wheel, errors, partial))
    if not whole(files[0], wheel):
        raise Failure(f"the downloaded {wheel.name} is not the pinned file (its sha256 differs). Run this again.")
    sync(files[0])
    os.replace(files[0], stored(partial, wheel))
    shutil.rmtree(work, ignore_errors=True)


def run_with_progress(command, work, wheel):
    """Run pip, pass its words on, and return its exit code and the end of what it wrote to stderr."""
    environment = dict(os.environ, TMPDIR=str(work), PIP_REQUIRE_VIRTUALENV="0", PYTHONWARNINGS="ignore")
    tail = collections.deque(maxlen=60)
    with subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, universal_newlines=True, errors="replace") as pip:

        def forward():
            for line in pip.stderr:
                sys.stderr.write(line)
                tail.append(line)

        reader = threading.Thread(target=forward)
        reader.start()
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=10)
                    break
                if not sys.stderr.isatty():  # on a terminal pip draws a bar of its own
                    done = min(largest_file(work), wheel.size)
                    say(f"  {wheel.name}: {megabytes(done)} of {megabytes(wheel.size)}")
        except BaseException:
            pip.kill()
            raise
        finally:
            reader.join()
    return pip.returncode, "".join(tail)


def largest_file(folder):
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            largest = max(largest, path.stat().st_size)
    return largest


def explain(wheel, errors, partial):
    again = " What arrived whole is kept; run this again, " + OWN.format(version="2.11")
    if "No space left" in errors or "Errno 28" in errors or shutil.disk_usage(partial).free < 1_000_000:
        return f"disk full while downloading {wheel.name} into {partial}. Make room and run this again."
    if "DO NOT MATCH THE HASHES" in errors:
        return f"the {wheel.name} {wheel.version} that the package index serves is not the pinned file (its sha256 differs)." + again
    unreachable = r"connection broken|Max retries|Connection refused|Failed to establish|resolution|timed out|ProxyError|SSLError|HTTP error|IncompleteRead|ConnectionReset"
    if re.search(unreachable, errors, re.IGNORECASE):
        return f"no network: pip could not fetch {wheel.name} {wheel.version} (its words are above). Check the connection and, behind a proxy, HTTPS_PROXY or PIP_INDEX_URL." + again
    if "No matching distribution" in errors:
        return f"the package index that pip uses does not offer {wheel.name} {wheel.version} for {wheel.tag} (PIP_NO_INDEX, PIP_INDEX_URL or pip.conf may say why)." + again
    return f"pip could not download {wheel.name} {wheel.version} (its words are above)." + again


def unpack(wheels, partial, target):
    say("unpacking")
    work = Path(tempfile.mkdtemp(prefix="work-", dir=partial))
    tree = work / "libtorch"
    (tree / "lib").mkdir(parents=True)
    wanted = set(LIBRARIES[this_platform()])
    for wheel in wheels:
        with zipfile.ZipFile(stored(partial, wheel)) as archive:
            for member in archive.infolist():
                path = destination(member.filename, wanted)
                if path is not None:
                    copy_member(archive, member, tree / path)
    if sys.platform != "darwin":
        # The wheel's libtorch.so would pull libtorch_cuda.so in.
        (tree / "lib" / "libtorch.so").symlink_to("libtorch_cpu.so")
    verify(tree, wanted, wheels[0].version)
    shutil.copyfile(PINS, tree / PINS.name)
    os.sync()
    if target.exists():
        os.rename(target, work / "old")
    os.rename(tree, target)
    sync(target.parent)


def destination(member, wanted):
    name = member.rsplit("/", 1)[-1]
    if member.startswith("torch/include/") and name:
        return Path(member).relative_to("torch")
    if name in wanted and "/lib/" in member:
        return Path("lib") / name
    return None


def copy_member(archive, member, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, open(path, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def verify(tree, wanted, version):
    absent = sorted(name for name in wanted if not (tree / "lib" / name).is_file())
    if absent:
        raise Failure(f"the wheels lack {', '.join(absent)}.")
    if header_version(tree) != version:
        raise Failure(f"the unpacked headers say version {header_version(tree)}, not {version}.")
    library = next(tree / "lib" / name for name in wanted if name.startswith("libtorch_cpu."))
    load = f"import ctypes; ctypes.CDLL({str(library)!r})"
    probe = subprocess.run([sys.executable, "-c", load], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, errors="replace")
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        raise Failure(f"the installed libtorch does not load on this system: {reason}")


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def megabytes(count):
    return f"{count / 1e6:,.0f} MB"


def say(text):
    print(f"with-libtorch: {text}", file=sys.stderr, flush=True)


def interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main(Path(sys.argv[1]))
    except Failure as failure:
        say(str(failure))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the next run goes on from here")
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            say(f"disk full while writing {error.filename or 'libtorch'}. Make room and run this again.")
        else:
            say(f"cannot install libtorch: {error}")
        sys.exit(1)
    except zipfile.BadZipFile as error:
        say(f"a wheel cannot be unpacked ({error}). Run this again.")
        sys.exit(1)
