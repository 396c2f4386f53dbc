#!/usr/bin/env bash
# Tests of scripts/with-libtorch that need no network: every failure gives its own message, and the run after it
# recovers. A python3 on PATH stands in for pip; everything else is real. Takes a few seconds.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd -P)
sandbox=$(mktemp -d)
trap 'rm -rf "$sandbox"' EXIT
unset LIBTORCH LIBTORCH_USE_PYTORCH
python=$(python3 -c 'import sys; print(sys.executable)') # not a shim
failures=0

# A fresh copy of the scripts, an empty PATH folder, and pins for wheels of a few bytes made here.
start() {
    name=$1
    root="$sandbox/$name/clone"
    bin="$sandbox/$name/bin"
    mkdir -p "$root/scripts" "$bin"
    cp "$repository"/scripts/{with-libtorch,install_libtorch.py,libtorch.pins} "$root/scripts/"
    for tool in sh cat dirname sed env true; do ln -s "$(type -P $tool)" "$bin/"; done
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >"$bin/python3"
    printf '#!/bin/sh\necho ran cargo "$@"\n' >"$bin/cargo"
    ln -s "$(type -P true)" "$bin/c++"
    chmod +x "$bin"/*
}

# A python3 whose `-m pip download` runs the shell code in $1; `$dest` there is pip's --dest folder.
fake_pip() {
    cat >"$bin/python3" <<EOF
#!/bin/bash
export PATH="$PATH"
wheels="$sandbox/wheels"
if [ "\${1-} \${2-} \${3-}" = "-m pip download" ]; then
    while [ "\$1" != --dest ]; do shift; done
    dest=\$2
    $1
    exit
fi
[ "\${1-} \${2-}" = "-m pip" ] && exit 0
# The real interpreter, told that it is this script, so that it calls this script for pip.
if [ "\${1-}" = -c ]; then exec "$python" "\$@"; fi
exec "$python" -c 'import runpy, sys; sys.executable = "'"\$0"'"; sys.argv = sys.argv[1:]; sys.path.insert(0, "'"$root/scripts"'"); runpy.run_path(sys.argv[0], run_name="__main__")' "\$@"
EOF
}

# Wheels with the right names inside and next to nothing in them, and pins that fit them.
small_wheels() {
    "$python" - "$sandbox/wheels" "$root/scripts" <<'EOF'
import hashlib, os, shutil, sys, sysconfig, zipfile
sys.path.insert(0, sys.argv[2])
import install_libtorch as install
folder = sys.argv[1]
os.makedirs(folder, exist_ok=True)
name = install.this_platform()
# A library that loads: the platform's own C library under another name.
loads = next(p for p in ("/lib/x86_64-linux-gnu/libm.so.6", "/lib64/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6", sys.executable) if os.path.exists(p))
header = "".join(f"#define TORCH_VERSION_{k} {v}\n" for k, v in (("MAJOR", 2), ("MINOR", 11), ("PATCH", 0)))
libraries = install.LIBRARIES[name]
contents = {
    "torch": {"torch/include/torch/headeronly/version.h": header.encode(), "torch/lib/libtorch_cuda.so": b"not wanted",
              **{f"torch/lib/{n}": open(loads, "rb").read() for n in libraries if "libcu" not in n}},
    "nvidia-cuda-runtime": {"nvidia/cu13/lib/libcudart.so.13": b"cudart"},
    "nvidia-cuda-cupti": {"nvidia/cu13/lib/libcupti.so.13": b"cupti"},
}
rows = []
for wheel in install.pinned_wheels(name):
    path = f"{folder}/{wheel.name}-{wheel.version}.whl"
    if not os.path.exists(path):
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in contents[wheel.name].items():
                archive.writestr(member, data)
    data = open(path, "rb").read()
    rows.append(f"{name} {wheel.name}=={wheel.version} {wheel.tag} {len(data)} {hashlib.sha256(data).hexdigest()}\n")
open(f"{sys.argv[2]}/libtorch.pins", "w").writelines(rows)
shutil.rmtree(f"{sys.argv[2]}/__pycache__", ignore_errors=True)
EOF
}

serve='name=$(sed -n "s/==.*//p" "$dest/requirements.txt"); cp "$wheels/$name"-*.whl "$dest/"'

# run EXPECTED_CODE TEXT CMD...: with-libtorch CMD in the sandbox exits so and says TEXT.
run() {
    local expected=$1 text=$2 code=0 output
    shift 2
    output=$(cd "$root" && env -i HOME="$HOME" PATH="$bin" ${extra-} "$root/scripts/with-libtorch" "$@" 2>&1) || code=$?
    if [ "$code" != "$expected" ] || ! grep -qF -- "$text" <<<"$output"; then
        printf 'FAILED %s: wanted exit %s and "%s", got exit %s and:\n%s\n' "$name" "$expected" "$text" "$code" "$output"
        failures=$((failures + 1))
    else
        echo "ok     $name"
    fi
}

check() {
    local what=$1
    shift
    if "$@"; then echo "ok     $name: $what"; else
        echo "FAILED $name: $what"
        failures=$((failures + 1))
    fi
}

start 'LIBTORCH set, steps aside'
rm "$bin/python3" "$bin/c++"
extra="LIBTORCH=/elsewhere" run 0 'LIBTORCH=/elsewhere' env
extra="LIBTORCH_USE_PYTORCH=1" run 0 'LIBTORCH_USE_PYTORCH=1' env
check 'nothing installed' test ! -e "$root/.libtorch.partial"

start 'no cargo'
rm "$bin/cargo"
run 1 'cargo not found' cargo test

start 'no C++ compiler'
rm "$bin/c++"
run 1 'no C++ compiler' cargo test

start 'no python3'
rm "$bin/python3"
run 1 'python3 not found' cargo test

start 'no pip'
fake_pip ''
sed -i.bak 's/^\[ .*"-m pip" \].*/[ "${1-} ${2-}" = "-m pip" ] \&\& exit 1/' "$bin/python3"
run 1 'has no pip' cargo test

start 'no network'
small_wheels
fake_pip 'echo "WARNING: Retrying after connection broken by NewConnectionError: Connection refused" >&2; exit 1'
run 1 'no network' cargo test
fake_pip "$serve"
run 0 'ran cargo test' cargo test

start 'index without the wheel'
small_wheels
fake_pip 'echo "ERROR: No matching distribution found for torch" >&2; exit 1'
run 1 'does not offer' cargo test

start 'disk full before the download'
"$python" - "$root/scripts/libtorch.pins" <<'EOF'
import sys, pathlib, re
pins = pathlib.Path(sys.argv[1])
pins.write_text(re.sub(r" (\d{6,}) ", " 99999999999999999 ", pins.read_text()))
EOF
fake_pip 'exit 1'
run 1 'disk full' cargo test

start 'disk full during the download'
small_wheels
fake_pip 'echo "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device" >&2; exit 1'
run 1 'disk full while downloading' cargo test

start 'a damaged download'
small_wheels
fake_pip "$serve; echo x >>\"\$dest/\$name.whl\"; rm -f \"\$dest\"/\$name-*.whl"
run 1 'is not the pinned file' cargo test
check 'nothing installed' test ! -e "$root/.libtorch"
fake_pip "$serve"
run 0 'ran cargo test' cargo test

start 'installs, then does nothing'
small_wheels
fake_pip "$serve"
run 0 'ran cargo test' cargo test
check 'libtorch.so is the CPU library' test "$(readlink "$root/.libtorch/lib/libtorch.so")" = libtorch_cpu.so
check 'no CUDA library' test ! -e "$root/.libtorch/lib/libtorch_cuda.so"
check 'no remains' test ! -e "$root/.libtorch.partial"
rm "$bin/python3"
run 0 'ran cargo build' cargo build

start 'other pins install anew'
small_wheels
fake_pip "$serve"
run 0 'ran cargo test' cargo test
echo '# changed' >>"$root/scripts/libtorch.pins"
touch "$root/.libtorch/old"
run 0 'installing libtorch' cargo test
check 'the old one is gone' test ! -e "$root/.libtorch/old"

start 'killed in a download, then run again'
small_wheels
fake_pip "$serve; case \$name in torch) rm \"\$dest\"/torch*; echo half >\"\$dest/torch.whl\"; kill -9 \$PPID; exit 1;; esac"
(cd "$root" && env -i HOME="$HOME" PATH="$bin" scripts/with-libtorch true >/dev/null 2>&1) || true
check 'nothing installed' test ! -e "$root/.libtorch"
fake_pip "case \$(cat \"\$dest/requirements.txt\") in nvidia*) exit 9;; esac; $serve" # the small wheels are kept
run 0 'ran cargo test' cargo test

start 'two runs at once'
small_wheels
fake_pip "echo one >>'$sandbox/downloads'; sleep 0.3; $serve"
(cd "$root" && env -i HOME="$HOME" PATH="$bin" scripts/with-libtorch true >/dev/null 2>&1) &
run 0 'ran cargo test' cargo test
wait
check 'one download of each' test "$(wc -l <"$sandbox/downloads")" -le 3

start 'a libtorch put there by hand'
mkdir -p "$root/.libtorch/include/torch/headeronly"
printf '#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n#define TORCH_VERSION_PATCH 1\n' >"$root/.libtorch/include/torch/headeronly/version.h"
run 1 'its headers say version 2.9.1' cargo test
sed -i.bak 's/MINOR 9/MINOR 11/; s/PATCH 1/PATCH 0/' "$root/.libtorch/include/torch/headeronly/version.h"
run 0 'ran cargo test' cargo test

[ "$failures" = 0 ] || { echo "$failures failed"; exit 1; }
echo "with-libtorch: all passed"
